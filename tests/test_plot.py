"""The pictures in docs/ are those of the committed results."""

import importlib.util
import re
from pathlib import Path

import pytest

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib draws them: pip install 'qdeploy[bench]'")

ROOT = Path(__file__).resolve().parent.parent


def load_plot():
    spec = importlib.util.spec_from_file_location("plot", ROOT / "bench/plot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plot = load_plot()


def pinned(package: str) -> str:
    return re.search(rf"^{package}==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize("name", plot.PICTURES)
def test_pictures_are_those_of_the_results(tmp_path, name):
    if matplotlib.__version__ != pinned("matplotlib"):
        pytest.skip(f"drawn with matplotlib {pinned('matplotlib')}, other versions place letters elsewhere")
    path = tmp_path / "picture.svg"
    plot.draw(name, path)
    assert is_same(path.read_text(), (ROOT / name).read_text()), f"python bench/plot.py draws another {name}"


def is_same(picture: str, other: str) -> bool:
    """No coordinate is a hundredth of a point away: logarithms of CPUs differ in the last digit."""
    number = re.compile(r"-?\d+\.\d+")
    places, others = (list(map(float, number.findall(text))) for text in (picture, other))
    alike = number.sub("", picture) == number.sub("", other) and len(places) == len(others)
    return alike and all(abs(a - b) < 0.01 for a, b in zip(places, others, strict=True))


def test_a_picture_of_other_figures_is_another(tmp_path, monkeypatch):
    monkeypatch.setitem(plot.BARS, "best FP32", (plot.BARS["best FP32"][0], ("torch eager float32",)))
    plot.draw("docs/latency.svg", tmp_path / "picture.svg")
    assert not is_same((tmp_path / "picture.svg").read_text(), (ROOT / "docs/latency.svg").read_text())


@pytest.mark.parametrize("name", plot.PICTURES)
def test_pictures_show_on_light_and_dark_pages(name):
    text = (ROOT / name).read_text()
    assert re.search(r'<g id="patch_1">\s*<path [^>]*style="fill: none"', text)  # the background
    colors = set(re.findall(r"(?:fill|stroke): (#\w+)", text))
    assert colors <= {plot.INK, *(color for color, _ in plot.BARS.values())}  # all of middle brightness
