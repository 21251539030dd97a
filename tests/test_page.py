"""Pages as readers meet them: what they say, that nothing is loaded or run, and how a browser shows them."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from invented_report import ROWS, report

from qdeploy import cli, page
from qdeploy.demo import MODEL
from qdeploy.page import axes, charts, document, images
from qdeploy.page.markup import VOID, Markup, tag

HOSTILE = '<script>document.title = "taken"</script>"\'><img src=x onerror=alert(1)>&amp;\u202e'
SHOWN = HOSTILE.replace("\u202e", "\\u202e")
LAYER = {"member": "m", "op": "conv2d", "weights": 4608, "quantizer": "learned", "grid": "file"}


def node(name: str, microseconds: float, **others: object) -> dict:
    found = {"member": "m", "name": name, "op": "conv2d", "kernel": "k", "bits": 7, "macs": 1000, "tile": "14x32"}
    found |= {"split": "tiles", "note": "", "shape": [8, 4, 4], "microseconds": microseconds}
    return {**found, "of_time": microseconds / 10, "gmacs_per_second": 1.5, "of_peak": 0.25, **others}


def profile_page(name: str = "conv1") -> str:
    nodes = [node(name, 7.0), node("conv2", 2.0), node("mean", 1.0, bits=0, gmacs_per_second=None, of_peak=None)]
    about = {"file": "runs/net.safetensors", "isa": "avx2", "threads": 2, "batch": 4, "macs": 3000}
    return page.of_profile({**about, "peak_gmacs": {"int8": 100.0}, "call_ms": 0.0125, "of_peak": 0.2, "nodes": nodes})


def export_page(name: str = "conv1") -> str:
    layers = [{**LAYER, "name": name, "bits": 4, "macs": 73728, "sqnr_db": 31.25}]
    layers += [{**LAYER, "name": "head", "bits": 8, "macs": 640, "sqnr_db": None}]
    sizes = {"fp32_bytes": 20_000, "packed_bytes": 3_000, "file_bytes": 5_000, "file_ratio": 0.25, "packed_ratio": 0.15}
    about = {
        "path": "runs/net.safetensors",
        "images": 256,
        "top1_agreement": 0.9921875,
        "output_sqnr_db": 28.5,
        "notes": [],
    }
    return page.of_export(
        {**about, **sizes, "layers": layers, "mac_share": {4: 0.99, 8: 0.01}, "warnings": [f"see {name}"]}
    )


def report_page(name: str = ROWS[0]) -> str:
    return page.of_report(report((name, *ROWS[1:4]), seeds=2))


PAGES = {"profile": profile_page, "export": export_page, "report": report_page}
all_pages = pytest.mark.parametrize("kind", PAGES)


class Reader(HTMLParser):
    """Text, elements with their attributes, and whether each element that begins ends."""

    def __init__(self, text: str):
        super().__init__()
        self.texts: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.parents: list[tuple[str, ...]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        self.parents.append(tuple(self._open))
        if name not in VOID:
            self._open.append(name)

    def handle_endtag(self, name):
        assert self._open.pop() == name

    def handle_data(self, text):
        if self._open[-1:] != ["style"]:
            self.texts.append(text)

    def attributes(self, *names: str) -> list[str]:
        return [found[name] for _, found in self.elements for name in names if name in found]


# ---- What pages say --------------------------------------------------------------------------------------------------


def test_profile_says_where_the_time_goes():
    texts = Reader(profile_page()).texts
    for text in ("net.safetensors", "12.5 \u00b5s", "320,000", "20.0%", "3.00 k", "avx2", "2 threads, batch 4"):
        assert text in texts
    assert "Half of the time goes to 1 of 3 operations. conv1 takes most: 70.0%." in texts
    assert "8x4x4" in texts and "k" in texts and "14x32" in texts


def test_export_says_how_close_and_how_small_the_file_is():
    texts = Reader(export_page()).texts
    for text in ("0.250x", "5,000", "99.22%", "the same class, of 256 images", "28.5 dB", "see conv1"):
        assert text in texts
    text = "2 layers in the order in which they run. The layer furthest off is conv1: SQNR 31.2 dB."
    assert text in texts


def test_report_has_the_sections_that_there_is_something_for():
    def titles(data: dict) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", page.of_report(data))

    table = "Digits-DG: the rows of QT-DoG"
    measured = ["Flatness", "Loss surfaces", "Where the networks look", "Measures"]
    full = report(ROWS[:3], seeds=1)
    assert titles(full) == [table, "Training", "Layers of the files", *measured]
    assert titles(report(ROWS[:3], seeds=1, measured=False) | {"files": []}) == [table, "Training"]
    assert titles({"title": "none", "tables": full["tables"], "runs": []}) == [table]


def test_a_table_shows_published_figures_beside_ours_and_what_is_missing_as_missing():
    cell = {"mean": 61.26, "error": 0.5, "n": 3, "published": 63.8, "published_error": 0.4}
    only_published = {"mean": None, "error": None, "n": 0, "published": 66.2, "published_error": None}
    rows = [{"label": "ERM", "cells": [cell, None], "size": 140000}, {"label": "SWAD", "cells": [only_published, None]}]
    about = {"name": "all", "title": "T", "columns": ["PACS", "mean"], "decimals": [1, 1], "units": ["%", ""]}
    table = {**about, "rows": rows, "notes": ["n"]}
    text = page.of_report({"title": "runs", "tables": [table], "runs": []})
    (body,) = re.findall(r"<tbody>(.*?)</tbody>", text.split("<ul")[0])
    cells = [re.sub("<.*?>", "", found) for found in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", body)]
    assert cells == ["ERM", "61.3 \u00b1 0.5(63.8 \u00b1 0.4)", "-", "140,000", "SWAD", "-(66.2)", "-", "-"]


def test_the_switch_is_marked_where_a_run_was_quantized():
    drawn = page.of_report(report(("ERM", "QT-DoG, 7 bits"), seeds=1, measured=False)).split("<h2>Training</h2>")[1]
    figures = re.findall(r"<figure>.*?</figure>", drawn)
    marked = {re.search("<title>(.*?), ", found)[1] for found in figures if ">quantized<" in found}
    assert marked == {"QT-DoG"}
    at = {re.search(r'class="mark" d="M([\d.]+) ', found)[1] for found in figures if "mark" in found}
    assert at == {f"{axes.linear('', [0, 1000], from_zero=True).x(400):.1f}"}


def test_numbers_that_are_none_are_gaps_and_dashes():
    x, y = axes.linear("x", [0, 4]), axes.linear("y", [0, 1])
    line = charts.Line("l", [0, 1, 2, 3, 4], [0.0, 1.0, None, math.nan, 1.0])
    (path,) = re.findall(r'class="line s0" d="(.*?)"', charts.lines("t", "d", [line], x, y, None))
    assert re.sub(r"[\d. ]+", "", path) == "MLM"
    assert [document.number(value, ".1f") for value in (None, math.nan, math.inf, 2, "text")] == ["-"] * 3 + [
        "2.0",
        "text",
    ]


def test_a_map_without_losses_is_shown_as_such():
    data = report(ROWS[:1], seeds=1)
    surface = data["runs"][0]["measures"]["surface"]
    surface["loss"] = None
    for row in surface["table"]:
        row["loss"] = None
    assert (
        ": loss - at the weights, - to - on the map." in Reader(page.of_report(data | {"runs": data["runs"][:1]})).texts
    )


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1000.0], [0, 250, 500, 750, 1000]),
        ([61.3, 69.8], [60, 62.5, 65, 67.5, 70]),
        ([5.0], [4, 4.5, 5, 5.5, 6]),
        ([], [-0.01, -0.005, 0, 0.005, 0.01]),
        ([math.nan, 1.0, 2.0], [1, 1.25, 1.5, 1.75, 2]),
    ],
)
def test_ticks_are_round_and_hold_all_values(values, ticks):
    axis = axes.linear("x", values)
    assert axis.ticks == pytest.approx(ticks, abs=1e-12)
    assert (axis.low, axis.high) == (axis.ticks[0], axis.ticks[-1])


def test_ticks_of_a_logarithmic_axis():
    axis = axes.logarithmic("MB", [0.0165, 0.18])
    assert axis.ticks == pytest.approx([0.02, 0.05, 0.1, 0.2])
    assert axis.share(axis.low) == 0 and axis.share(axis.high) == 1


def test_equal_values_have_an_axis():
    assert axes.logarithmic("MB", [0.0173, 0.0173]).ticks == [0.016, 0.017, 0.018, 0.019]


@given(low=st.floats(1e-6, 1e6), wide=st.floats(1, 1e6))
def test_a_logarithmic_axis_has_three_to_six_ticks(low, wide):
    axis = axes.logarithmic("x", [low, low * wide])
    assert 3 <= len(axis.ticks) <= 6
    assert axis.low <= min(axis.ticks) and max(axis.ticks) <= axis.high


@pytest.mark.parametrize(("size", "title"), [(999_999, "size, kB"), (1_000_000, "size, MB")])
def test_small_files_are_told_in_small_units(size, title):
    table = report(ROWS[:3], seeds=1)["tables"][0]
    rows = [row | {"size": size} for row in table["rows"]]
    text = page.of_report({"title": "runs", "tables": [table | {"rows": rows}], "runs": []})
    assert f"against {title}" in text


def test_labels_do_not_lie_on_each_other():
    points = [charts.Point(f"row {i}", 1 + i / 100, 60 + i / 100) for i in range(5)]
    x, y = axes.logarithmic("x", [0.5, 2]), axes.linear("y", [50, 70])
    drawn = charts.scatter("t", "d", points, x, y)
    places = sorted(float(at) for at in re.findall(r'class="strong halo" x="[\d.]+" y="([\d.]+)"', drawn))
    assert len(places) == 5 and min(np.diff(places)) > 11


def test_png_holds_the_pixels():
    image = pytest.importorskip("PIL.Image", reason="Pillow reads it: pip install 'qdeploy[train]'")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 3), np.uint8)
    with image.open(io.BytesIO(images.png(pixels))) as opened:
        assert np.array_equal(np.asarray(opened), pixels)


# ---- Strangers' texts, readers who listen ----------------------------------------------------------------------------


@all_pages
def test_texts_of_strangers_stay_texts(kind):
    found = Reader(PAGES[kind](HOSTILE))
    assert {name for name, _ in found.elements}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert sum(SHOWN in text for text in found.texts) >= 2
    assert "\u202e" not in PAGES[kind](HOSTILE)


def test_only_markup_is_markup():
    assert (
        tag("p", "a<b", Markup("<b>c</b>"), None, 3, title='"<', class_=None)
        == '<p title="&quot;&lt;">a&lt;b<b>c</b>3</p>'
    )
    assert tag("line", x1=1.0, y1=2.345678, stroke_width=2) == '<line x1="1" y1="2.35" stroke-width="2"></line>'


@all_pages
def test_nothing_is_loaded(kind):
    text = PAGES[kind]()
    found = Reader(text)
    assert all(address.startswith("data:image/png;base64,") for address in found.attributes("src", "srcset", "poster"))
    assert all(address.startswith("#section") for address in found.attributes("href", "action"))
    assert not re.search(r"url\(|@import|https?:", text)
    assert text == PAGES[kind]()


@all_pages
def test_charts_can_be_heard_and_read_as_numbers(kind):
    text = PAGES[kind]()
    figures = [one for one in re.findall(r"<figure.*?</figure>", text) if "<svg" in one]
    assert len(figures) >= 2
    for figure in figures:
        start = re.search(r"<svg ([^>]*)><title>[^<]+</title><desc>[^<]+</desc>", figure)[1]
        assert 'role="img"' in start and re.search(r'aria-label="[^"]+"', start)
        assert "<figcaption>" in figure and "<details><summary>Numbers</summary>" in figure
    found = Reader(text)
    assert all(attributes["alt"] for name, attributes in found.elements if name == "img")
    assert all(attributes["scope"] for name, attributes in found.elements if name == "th")
    ids = found.attributes("id")
    assert len(ids) == len(set(ids)) and {f"#{one}" for one in ids} >= set(found.attributes("href"))


# ---- The commands ----------------------------------------------------------------------------------------------------


def test_profile_writes_the_page_of_what_it_prints(tmp_path, capsys):
    out = tmp_path / "profile.html"
    assert cli.main(["profile", str(MODEL), "--rounds", "1", "--json", "--html", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert out.read_text() == page.of_profile(found)
    assert found["nodes"][0]["shape"] == [50, 8, 8] and found["file"] == str(MODEL)


@pytest.mark.parametrize("out, error", [("none/a.html", "expected a folder to write a.html in, got none - at {}/none")])
def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys, out, error):
    assert cli.main(["profile", str(MODEL), "--html", str(tmp_path / out)]) == 2
    assert capsys.readouterr().err == f"qdeploy: error: {error.format(tmp_path)}\n"


# ---- In a browser ----------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: apt-get install chromium")
SCHEMES = ("dark", "light")  # their places are the numbers of --blink-settings=preferredColorScheme
WIDTHS = (400, 1400)
LOOK = """
const seen = {};
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, wide = frame.contentWindow.innerWidth;
  const texts = [...page.querySelectorAll("svg text")].map((one) => one.getBoundingClientRect().height);
  const elements = [...page.querySelectorAll("body *")].filter((one) => !one.closest(".scroll"));
  const loaded = frame.contentWindow.performance.getEntriesByType("resource").map((one) => one.name);
  seen[frame.id] = {
    window: wide,
    page: page.documentElement.scrollWidth,
    outside: elements.filter((one) => one.getBoundingClientRect().right > wide + 0.5).map((one) => one.outerHTML),
    small: texts.filter((height) => height < 11).length,
    title: page.title,
    loaded: loaded.filter((name) => !name.startsWith("data:")),
    paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
  };
}
document.body.replaceChildren(JSON.stringify(seen));
"""


def chromium(folder: Path, file: Path, scheme: str, *options: str) -> str:
    """What it prints; nothing is said on the console."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'chromium'}"]
    command += [f"--blink-settings=preferredColorScheme={SCHEMES.index(scheme)}", *options, file.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if "CONSOLE" in line] == []
    return result.stdout


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """By scheme, kind and width what a browser makes of a page in a frame. The page itself is as it is; a window of
    Chromium is not as narrow as a frame can be."""
    folder = tmp_path_factory.mktemp("pages")
    frames = [
        f'<iframe id="{kind} {width}" style="width: {width}px" srcdoc="{escape(make(HOSTILE))}"></iframe>'
        for kind, make in PAGES.items()
        for width in WIDTHS
    ]
    file = folder / "frames.html"
    file.write_text(f"<meta charset=utf-8>{''.join(frames)}<script>onload = () => {{ {LOOK} }};</script>")
    found = {}
    for scheme in SCHEMES:
        printed = chromium(folder, file, scheme, "--dump-dom")
        found[scheme] = json.loads(unescape(re.search(r"<body>(.*)</body>", printed, re.DOTALL)[1]))
    return found


@in_a_browser
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@all_pages
def test_a_page_fits_its_window_in_light_and_dark(seen, kind, width, scheme):
    found = seen[scheme][f"{kind} {width}"]
    assert (found["window"], found["page"], found["outside"], found["small"]) == (width, width, [], 0)
    assert found["loaded"] == []
    assert found["title"].endswith(f"qdeploy {kind}")
    color = colors(scheme)["paper"]
    assert found["paper"] == f"rgb({', '.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))})"


@in_a_browser
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_browser_draws_the_page(tmp_path, scheme):
    image = pytest.importorskip("PIL.Image", reason="Pillow reads it: pip install 'qdeploy[train]'")
    (tmp_path / "page.html").write_text(report_page())
    chromium(
        tmp_path, tmp_path / "page.html", scheme, "--window-size=1400,900", f"--screenshot={tmp_path / 'page.png'}"
    )
    with image.open(tmp_path / "page.png") as opened:
        drawn = {"#{:02x}{:02x}{:02x}".format(*color) for _, color in opened.convert("RGB").getcolors(2**24)}
    assert {colors(scheme)[name] for name in ("paper", "ink", "line", "accent")} <= drawn


def colors(scheme: str) -> dict[str, str]:
    style = (Path(document.__file__).parent / "style.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    return dict(re.findall(r"--(\w+): (#\w{6})", dark if scheme == "dark" else light))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_letters_and_marks_stand_out_from_the_paper(scheme):
    found = colors(scheme)
    for name, least in (("ink", 12), ("muted", 4.5), ("accent", 4.5)):
        for paper in ("paper", "raised"):
            assert contrast(found[name], found[paper]) >= least, (name, paper)


def contrast(one: str, other: str) -> float:
    """Of WCAG 2."""

    def luminance(color: str) -> float:
        levels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = (level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels)
        return float(np.dot((0.2126, 0.7152, 0.0722), tuple(linear)))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
