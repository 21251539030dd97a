"""Figures of the papers: files that are whole and always the same, lines of the right values that need no colors."""

from __future__ import annotations

import itertools
import os
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib draws them: pip install 'qdeploy[plots]'")


from matplotlib.collections import PathCollection  # noqa: E402

from qdeploy.errors import InputError  # noqa: E402
from qdeploy.training.figures import FIGURES, Measured, draw  # noqa: E402
from qdeploy.training.figures.drawing import GRAYS, HATCHES, LINES, caption, mean_and_error  # noqa: E402
from qdeploy.training.figures.gaqat import gaqat_figure_2, gaqat_figure_3  # noqa: E402
from qdeploy.training.figures.qgen import qgen_figure_1  # noqa: E402
from qdeploy.training.figures.qt_dog import (  # noqa: E402
    qt_dog_figure_1,
    qt_dog_figure_2,
    qt_dog_figure_3,
    qt_dog_figure_4,
    qt_dog_figure_5,
    qt_dog_figure_6,
)
from qdeploy.training.figures.surfaces import gaqat_figure_6  # noqa: E402

LABELS = ("ERM", "QT-DoG")


def flatness(label, seed):
    rise = [0.0, 1.0 + seed, 30.0, 900.0]
    rows = [
        {
            "part": part,
            "kind": kind,
            "gamma": g,
            "gamma_relative": g / 50,
            "mean": y,
            "std": y,
            "standard_error": y / 10,
        }
        for part, kind in itertools.product(("source", "target"), ("absolute", "relative"))
        for g, y in zip((0.0, 5.0, 10.0, 15.0), rise, strict=True)
    ]
    return {"norm": 50.0, "settings": {"directions": 100, "subset": 2000}, "table": rows}


def surface(label, seed):
    values = np.linspace(-1, 1, 5).tolist()
    rows = [{"a": a, "b": b, "loss": 0.5 + 20 * a * a + b * b} for a in values for b in values]
    return {"points": 5, "loss": 0.5, "table": rows}


def noise(label, seed):
    histogram = {"low": -1.0, "high": 1.0, "counts": [1, 5, 9, 5]}
    curves = {"weights": histogram, "noise": histogram, "symmetry": {"lower": [3.0, 1.0], "upper": [2.5, 1.0]}}
    row = {"bits": 7, "kl": 0.01, "kl_of_uniform": 0.002, "kl_in_steps": 0.003, "asymmetry_ks": 0.1}
    rows = [{"layer": f"layer{i}", "weights": 10 * (3 - abs(i - 3)), **row} for i in range(6)]
    return {"table": rows, "curves": {row["layer"]: curves for row in rows}}


def stability(label, seed):
    rows = [{"update": 100 * i, "validation": 0.5 + 0.02 * i, "test": 0.4 + 0.01 * (i + seed)} for i in range(5)]
    return {"switch": 200 if label == "QT-DoG" else None, "table": rows}


def widths(label, seed):
    return {"table": [{"layer": f"layer{i}", "step": 0.01 * (i + 1)} for i in range(4)]}


def gradcam(label, seed):
    pixels = np.arange(192, dtype=np.uint8).reshape(3, 8, 8).tolist()
    images = [{"pixels": pixels, "map": heat} for heat in (np.eye(8).tolist(), np.zeros((8, 8)).tolist())]
    rows = [{"domain": "art", "label": i, "predicted": 0} for i in range(2)]
    return {"stage": "layer4", "classes": ["dog", "cat"], "images": images, "table": rows}


def scales(label, seed):
    names = [f"layer{i}.weight" for i in range(11)]
    rows = [
        {"step": 350 * t, "scale": name, "sum_task": 1.0 * t, "sum_smooth": -0.5 * i, "frozen": int(t == 2)}
        | {"disorder_task": 0.1 * t, "disorder_smooth": 0.3}
        for t in (1, 2, 3)
        for i, name in enumerate(names)
    ]
    return {"table": rows, "scales": [{"scale": name, "opposed": 0.1 * (i % 10)} for i, name in enumerate(names)]}


def measured(measure, panels=("art",), seeds=(0, 1, 2)):
    return [Measured(label, measure(label, s), s, panel) for panel in panels for label in LABELS for s in seeds]


METHODS = [
    {"method": "ERM", "accuracy": 0.634, "error": 0.002, "size": 1, "trained": 1, "seeds": 3, "quantized": False},
    {"method": "EoQ", "accuracy": 0.684, "error": None, "size": 1.1, "trained": 5, "seeds": 3, "quantized": True},
]
GAINS = [
    {"dataset": dataset, "bits": bits, "gain": 0.01 * (bits - 6), "error": 0.002, "seeds": 3}
    for dataset in ("PACS", "TerraInc")
    for bits in (8, 7, 6, 5)
]
DATA = {
    "qt_dog_figure_1": METHODS,
    "qt_dog_figure_2": measured(noise),
    "qt_dog_figure_3": measured(flatness),
    "qt_dog_figure_4": measured(stability, ("L46", "L100")),
    "qt_dog_figure_5": GAINS,
    "qt_dog_figure_6": measured(gradcam, seeds=(0,)),
    "qt_dog_figure_8": measured(noise),
    **{f"gaqat_figure_{i}": measured(scales) for i in (2, 3, 4, 5)},
    "gaqat_figure_6": measured(surface, ("art", "photo"))[:-3],  # a cell is missing
    "qgen_figure_1": measured(widths, ("NiN", "ResNet-18"), (0,)),
    "qgen_figure_2": measured(surface),
}


def words(figure) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts)


def test_all_are_drawn_here():
    assert {*DATA} == {*FIGURES}


# ---- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_is_a_png_and_an_svg(name, tmp_path):
    png, svg = draw(name, DATA[name], tmp_path / "figures")
    assert [*sorted((tmp_path / "figures").iterdir())] == [png, svg]
    assert (png.name, svg.name) == (f"{name}.png", f"{name}.svg")
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    root = ET.fromstring(svg.read_text())
    assert root.tag.endswith("svg") and not re.search(r"<dc:date>|https?://matplotlib", svg.read_text())


@pytest.mark.parametrize("name", ["qt_dog_figure_6", "qgen_figure_2"])
def test_the_same_data_give_the_same_bytes(name, tmp_path):
    first, second = (draw(name, DATA[name], tmp_path / folder) for folder in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_full_disk_leaves_the_old_picture(tmp_path, monkeypatch):
    paths = draw("qt_dog_figure_5", GAINS, tmp_path)
    before = [path.read_bytes() for path in paths]

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        draw("qt_dog_figure_5", GAINS[:4], tmp_path)
    assert [path.read_bytes() for path in paths] == before and len([*tmp_path.iterdir()]) == 2


def test_bad_requests(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="^expected one of qt_dog_figure_1, .*, got 'figure_1' - at the figure$"):
        draw("figure_1", METHODS, tmp_path)
    with pytest.raises(InputError, match="^expected something to draw, got nothing - at qgen_figure_1$"):
        draw("qgen_figure_1", [], tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    expected = r"^expected matplotlib \(pip install 'qdeploy\[plots\]'\), got none - at qgen_figure_1$"
    with pytest.raises(InputError, match=expected):
        draw("qgen_figure_1", DATA["qgen_figure_1"], tmp_path)
    assert not [*tmp_path.iterdir()]


# ---- What they show -------------------------------------------------------------------------------------------------


def test_lines_differ_without_colors():
    assert len({str(dashes) for dashes, _, _ in LINES}) == len({marker for _, marker, _ in LINES}) == len(LINES)
    assert len(set(HATCHES)) == len(HATCHES) and len(set(GRAYS)) == len(GRAYS)


def test_the_mean_of_seeds_and_its_standard_error():
    mean, error = mean_and_error([[1.0, 2.0], [3.0, 2.0], [8.0, 2.0]])
    assert mean.tolist() == [4, 2] and error.tolist() == pytest.approx([np.std([1, 3, 8], ddof=1) / 3**0.5, 0])
    assert mean_and_error([[1.0, 2.0]])[1].tolist() == [0, 0]


def test_captions_say_seeds_and_settings():
    runs = measured(flatness)
    assert caption("F.", runs, ("directions", "subset")) == (
        "F. Seeds 0, 1, 2 (n = 3). Measured with directions 100, subset 2,000."
    )
    assert caption("F.", runs[:1]) == "F. Seed 0 (n = 1)."
    assert caption("F.", runs[:4]) == "F. Seeds: ERM 0, 1, 2 (n = 3), QT-DoG 0 (n = 1)."
    assert caption("F.", [replace(runs[0], seed=None)]) == "F."


def test_flatness_is_cut_where_a_network_is_destroyed():
    figure = qt_dog_figure_3(measured(flatness))
    above, below = figure.axes[0], figure.axes[2]
    assert above.lines[0].get_xdata().tolist() == [0, 5, 10, 15]
    assert above.lines[0].get_ydata().tolist() == [0, 2, 30, 900]
    assert above.get_ylim()[1] == 10 and above.get_xlim()[1] == pytest.approx(10.3)
    assert below.lines[0].get_xdata().tolist() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [text.get_text() for text in figure.legends[0].texts] == ["ERM (||w|| = 50)", "QT-DoG (||w|| = 50)"]
    assert "Seeds 0, 1, 2 (n = 3). Measured with directions 100, subset 2,000." in words(figure)


def test_stability_marks_the_switch():
    figure = qt_dog_figure_4(measured(stability, ("L46", "L100")))
    assert [axes.get_title() for axes in figure.axes] == ["L46", "L100", "", ""]
    target = figure.axes[2]
    assert target.lines[0].get_ydata() == pytest.approx([41, 42, 43, 44, 45])
    assert [*target.lines[2].get_xdata()] == [200, 200] and len(target.lines) == 3


def test_noise_of_the_largest_layer():
    figure = qt_dog_figure_2(measured(noise))
    assert figure.axes[0].get_title() == "layer3: 30 weights"
    assert figure.axes[1].get_title() == "7 bits, KL 0.01; in steps 0.003; uniform 0.002"
    assert figure.axes[1].lines[0].get_ydata()[0] == 5
    assert figure.axes[2].lines[1].get_xdata().tolist() == [3, 1]


def test_windows_of_the_step_sizes_that_are_opposed_most():
    figure = gaqat_figure_2(measured(scales))
    titles = [axes.get_title(loc="right") for axes in figure.axes if axes.get_visible()]
    assert titles == [f"layer{i}.weight ({i % 10}0%)" for i in range(1, 10)]
    task, smooth = (one.get_ydata().tolist() for one in figure.axes[0].lines[:2])
    assert task == [1, 2, 3] and smooth == [-0.5] * 3
    assert "each window of 350 updates" in words(figure) and "9 of 11 step sizes" in words(figure)
    (gray,) = figure.axes[0].patches
    assert (gray.get_x(), gray.get_width()) == (700, 350)  # from the end of the window that froze it
    assert gaqat_figure_3(measured(scales)).axes[0].lines[0].get_ydata() == pytest.approx([0.1, 0.2, 0.3])


def test_surfaces_share_one_scale():
    figure = gaqat_figure_6(DATA["gaqat_figure_6"])
    assert [axes.get_title() for axes in figure.axes[:3]] == [
        f"{name}\nloss 0.5, near it 20%" for name in ("ERM, art", "ERM, photo", "QT-DoG, art")
    ]
    assert [axes.get_zlim() for axes in figure.axes[:3]] == [(0, 10)] * 3 and not figure.axes[3].axison


def test_bars_of_gains_and_points_of_methods():
    figure = qt_dog_figure_5(GAINS)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx([2, 1, 0, -1] * 2)
    assert [bar.get_hatch() for bar in figure.axes[0].patches] == [*[""] * 4, *["////"] * 4]
    points = qt_dog_figure_1(METHODS).axes[0]
    assert [text.get_text() for text in points.texts] == ["ERM", "EoQ"]
    faces = [one.get_facecolor()[0].tolist() for one in points.collections if isinstance(one, PathCollection)]
    assert faces[0] == [1, 1, 1, 1] and faces[1] != faces[0]
    with pytest.raises(KeyError):
        qt_dog_figure_1([{"method": "ERM"}])


def test_maps_stand_under_their_images():
    figure = qt_dog_figure_6(DATA["qt_dog_figure_6"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["art: dog", "art: cat", *["dog (right)", "dog (wrong)"] * 2]
    assert [figure.axes[i].get_ylabel() for i in (0, 2, 4)] == ["image", "ERM", "QT-DoG"]


def test_widths_by_layer():
    figure = qgen_figure_1(measured(widths, ("NiN",), (0,)))
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert [*figure.axes[0].lines[0].get_xdata()] == [1, 2, 3, 4]
