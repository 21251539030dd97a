"""Draws docs/latency.svg from bench/results/ and docs/size_accuracy.svg from docs/size_accuracy.json.

    python bench/plot.py

The same JSON gives the same picture, so that a test can tell whether it is that of the results. Places are numbers for
that: the solver of matplotlib's constrained layout now and then finds others.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager

ROOT = Path(__file__).resolve().parent.parent
INK = "#7a828a"  # of text and axes: a contrast of 4 and more on white and on the black of a dark page
# matplotlib's own: a system may have another edition of the same name, whose letters have other numbers.
FONT = "DejaVu Sans of matplotlib"
OWN = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
fontManager.ttflist.append(FontEntry(fname=OWN, name=FONT, size="scalable"))
STYLE = {
    "svg.hashsalt": "qdeploy",  # else ids are random
    "svg.fonttype": "path",  # the same letters whatever fonts a reader has
    "font.family": FONT,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}

# Each machine with its words, and the reports that are drawn: key of the report, label of its bars.
MACHINES = {
    "zen5_avx512vnni": (
        "EPYC, Zen 5 generation (AVX512-VNNI)",
        {
            "ResNet-50, 1 thread(s)": "ResNet-50",
            "ResNet-18, 1 thread(s)": "ResNet-18",
            "ResNeXt-50 32x4d, 1 thread(s)": "ResNeXt-50",
            "MobileNetV2, 1 thread(s)": "MobileNetV2",
            "DenseNet-121, 1 thread(s)": "DenseNet-121",
            "VGG-16-bn, 1 thread(s)": "VGG-16",
        },
    ),
    "zen3_avx2": ("EPYC, Zen 3 (AVX2)", {"ResNet-50, 1 thread(s)": "ResNet-50"}),
}
BARS = {  # label: color, and the runtimes of which the fastest is drawn
    "best FP32": ("#8c959f", ("openvino float32", "onnxruntime float32", "MNN float32", "torch eager float32")),
    "int8 onnxruntime": ("#bf8700", ("onnxruntime int8",)),
    "int8 OpenVINO": ("#8957e5", ("openvino int8",)),
    "int8 qdeploy": ("#2f81f7", ("qdeploy int8",)),
}
WIDTH = 0.2  # of a bar, where groups are 1 apart


def latency() -> Figure:
    """Bars of times relative to qdeploy's, with their milliseconds: one group a network, one panel a machine."""
    groups = [len(reports) for _, reports in MACHINES.values()]
    figure = Figure(figsize=(9.6, 3.3))
    places = {"left": 0.06, "right": 0.99, "bottom": 0.08, "top": 0.76, "wspace": 0.04}
    panels = figure.subplots(1, len(MACHINES), sharey=True, gridspec_kw={"width_ratios": groups} | places)
    for axes, (machine, (title, reports)) in zip(panels, MACHINES.items(), strict=True):
        measured = json.loads((ROOT / "bench/results" / f"{machine}.json").read_text())["reports"]
        for place, report in enumerate(reports):
            _group(axes, place, {row["runtime"]: row["median_ms"] for row in measured[report]["results"]})
        axes.set_title(title, fontsize=9)
        axes.margins(y=0.1)  # for the label of the highest bar
        axes.set_xticks(range(len(reports)), reports.values())
        axes.tick_params(axis="x", length=0)
    panels[0].set_ylabel("time of one image, qdeploy = 1")
    handles, labels = panels[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    title = "1 thread, 224 x 224, 7-bit weights; numbers are milliseconds, less is better"
    figure.legend(unique.values(), unique, loc="upper center", ncols=len(BARS), frameon=False, title=title)
    return figure


def _group(axes: Axes, place: int, ms: dict[str, float]) -> None:
    """The bars of one network, side by side and centred at `place`."""
    drawn = [
        (label, color, min(ms[name] for name in runtimes if name in ms))
        for label, (color, runtimes) in BARS.items()
        if any(name in ms for name in runtimes)
    ]
    for i, (label, color, time) in enumerate(drawn):
        bar = axes.bar(
            place + (i - (len(drawn) - 1) / 2) * WIDTH, time / ms["qdeploy int8"], 0.9 * WIDTH, color=color, label=label
        )
        axes.bar_label(bar, [f"{time:#.3g}".rstrip(".")], fontsize=7, padding=1)


def size_accuracy() -> Figure:
    """Accuracy against size, one point a method."""
    data = json.loads((ROOT / "docs/size_accuracy.json").read_text())
    figure = Figure(figsize=(7.2, 3.3))
    axes = figure.subplots(gridspec_kw={"left": 0.08, "right": 0.99, "bottom": 0.15, "top": 0.92})
    for method in data["methods"]:
        color = BARS["int8 qdeploy" if method["quantized"] else "best FP32"][0]
        axes.plot(method["size"], method["accuracy"], "o", color=color, markersize=8)
        trained = f", {method['trained']} trained" if method["trained"] > 1 else ""
        label, at = f"{method['name']}{trained}", (method["size"], method["accuracy"])
        axes.annotate(label, at, (9, 0), textcoords="offset points", va="center")
    axes.set_xscale("log")
    axes.set_xlim(0.17, 30)
    axes.set_ylim(63, 69.3)
    ticks = [0.22, 1, 2, 6]
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("size, one ResNet-50 in float32 = 1x")
    axes.set_ylabel("accuracy on unseen domains, %")
    axes.set_title(f"blue: 7 bits, grey: float32; mean of five DomainBed sets; {data['source']}", fontsize=8)
    return figure


PICTURES = {"docs/latency.svg": latency, "docs/size_accuracy.svg": size_accuracy}


def draw(name: str, path: Path) -> None:
    """Write the picture `name` of PICTURES to `path` in the format of its suffix."""
    with matplotlib.rc_context(STYLE):
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None  # nothing that changes
        PICTURES[name]().savefig(path, transparent=True, metadata=metadata)


if __name__ == "__main__":
    for name in PICTURES:
        draw(name, ROOT / name)
        print(f"wrote {name}")
