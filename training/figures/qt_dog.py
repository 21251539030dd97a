"""The figures of QT-DoG (ICML 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qdeploy.training.figures import Measured
from qdeploy.training.figures.drawing import (
    GRAYS,
    HATCHES,
    LINES,
    band,
    by_label,
    caption,
    curve,
    legend_above,
    line,
    mean_and_error,
    panel_names,
    panels,
)

GROUPS = ("one model", "several models")
AREA = 90.0  # square points of the marker of one network in float32
CUT = 10.0  # nats; a network that is that wrong is destroyed
RELATIVE = "distance gamma / ||w||"


def qt_dog_figure_1(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy of methods that train one network and of those that train several; the area of a marker is the size.

    rows: "method", "accuracy" (a share), "error" (its standard error), "size" (float32 = 1), "trained" (networks),
    "seeds" (how many), "quantized".
    """
    sizes = [row["size"] for row in rows]
    text = f"Bars: standard error, n = {_counts(rows)} seeds. The area of a marker is the size of the file, from"
    shown = f"{text} {min(sizes):.2g} to {max(sizes):.2g} times that of one network in float32; filled: quantized."
    figure, axes = panels(1, 1, shown, width=5.6, height=2.8)
    for group, several in enumerate((False, True)):
        _methods(axes[0, 0], group, sorted((r for r in rows if (r["trained"] > 1) == several), key=_accuracy))
    axes[0, 0].set_xticks(range(len(GROUPS)), GROUPS)
    axes[0, 0].set_xlim(-0.5, 1.5)
    axes[0, 0].margins(y=0.15)
    axes[0, 0].set_ylabel("accuracy on unseen domains [%]")
    return figure


def _accuracy(row: Mapping[str, Any]) -> float:
    return row["accuracy"]


def _methods(axes: Axes, group: int, rows: Sequence[Mapping[str, Any]]) -> None:
    for i, row in enumerate(rows):
        x = group - 0.45 + 0.9 * (i + 0.5) / len(rows)
        y = 100 * row["accuracy"]
        axes.errorbar(x, y, 100 * (row["error"] or 0), color=GRAYS[0], linewidth=0.8, capsize=2)
        face = LINES[1][2] if row["quantized"] else "white"
        axes.scatter(x, y, AREA * row["size"], color=face, edgecolors="black", linewidths=0.8, zorder=3)
        radius = (AREA * row["size"] / math.pi) ** 0.5
        options: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 7}
        axes.annotate(row["method"], (x, y + 100 * (row["error"] or 0)), (0, max(3, radius)), **options)


def qt_dog_figure_2(measured: Sequence[Measured]) -> Figure:
    """Weights, noise of rounding and symmetry of the largest layer. Of quantization-noise, the first run."""
    rows = measured[0].found["table"]
    return _noise(measured[:1], [max(rows, key=lambda row: row["weights"])])


def qt_dog_figure_8(measured: Sequence[Measured]) -> Figure:
    """As figure 2 of four layers from the first to the last."""
    rows = measured[0].found["table"]
    places = sorted({*np.linspace(0, len(rows) - 1, min(4, len(rows))).round().astype(int).tolist()})
    return _noise(measured[:1], [rows[place] for place in places])


def _noise(measured: Sequence[Measured], rows: Sequence[Mapping[str, Any]]) -> Figure:
    text = (
        f"{measured[0].label}. Noise: w - Q(w) of weights within the range; dashed: uniform noise. KL divergence of "
        "noise from it; of the noise in units of each channel's step, which differ; and of as many uniform draws on "
        "average. Symmetry: how far weights of equal rank lie from the median; on the dashed line they are symmetric."
    )
    figure, axes = panels(len(rows), 3, caption(text, measured), width=2.1, height=1.5)
    for (left, middle, right), row in zip(axes, rows, strict=True):
        curves = measured[0].found["curves"][row["layer"]]
        _histogram(left, curves["weights"])
        left.set(title=f"{row['layer']}: {row['weights']:,} weights", xlabel="weight", ylabel="weights in a bin")
        _histogram(middle, curves["noise"])
        middle.axhline(np.mean(curves["noise"]["counts"]), linestyle="--", color="black", linewidth=1)
        title = "all the same" if row["kl"] is None else _divergences(row)
        middle.set(xlabel="noise", ylabel="weights in a bin")
        middle.set_title(f"{row['bits']} bits, {title}", fontsize=7)
        lower, upper = curves["symmetry"]["lower"], curves["symmetry"]["upper"]
        right.plot([0, max(lower[0], upper[0])], [0, max(lower[0], upper[0])], "--", color="black", linewidth=1)
        right.plot(lower, upper, "o", color=LINES[1][2], markersize=2.5)
        distance = "" if row["asymmetry_ks"] is None else f"KS distance {row['asymmetry_ks']:.2g}"
        right.set(title=distance, xlabel="below the median", ylabel="above the median")
    return figure


def _divergences(row: Mapping[str, Any]) -> str:
    return f"KL {row['kl']:.2g}; in steps {row['kl_in_steps']:.2g}; uniform {row['kl_of_uniform']:.2g}"


def _histogram(axes: Axes, found: Mapping[str, Any]) -> None:
    edges = np.linspace(found["low"], found["high"], len(found["counts"]) + 1)
    axes.stairs(found["counts"], edges, fill=True, color=GRAYS[1], edgecolor=GRAYS[0], linewidth=0.6)
    axes.locator_params(axis="x", nbins=4)


def qt_dog_figure_3(measured: Sequence[Measured]) -> Figure:
    """F_gamma of methods on source domains and on the target. Of flatness."""
    text = (
        "Rise of the cross-entropy at a distance from the weights: gamma, and below gamma / ||w||, which is comparable "
        f"across networks. Band: standard error over seeds, or over directions where there is one. Cut at {CUT:g} nats."
    )
    shown = caption(text, measured, ("directions", "subset"))
    figure, axes = panels(2, 2, shown, legend=0.3, height=1.6)
    kinds = {"absolute": ("gamma", "distance gamma, in units of the weights"), "relative": ("gamma_relative", RELATIVE)}
    for row, (kind, (column, words)) in zip(axes, kinds.items(), strict=True):
        for panel, part, title in zip(row, ("source", "target"), ("source domains", "target domain"), strict=True):
            for number, runs in enumerate(by_label(measured).values()):
                _rise(panel, number, runs, [_rows(one, part, kind) for one in runs], column)
            panel.set(title=title, xlabel=words, ylabel="F [nats]")
            _cut(panel)
            panel.axhline(0, color=GRAYS[2], linewidth=0.6)
    legend_above(figure, axes[0, 0], 3)
    return figure


def _cut(axes: Axes) -> None:
    """Shows lines up to CUT, and no radii at which all are above it."""
    curves = [(np.asarray(one.get_xdata()), np.asarray(one.get_ydata())) for one in axes.lines]
    highest = min(CUT, 1.05 * max(y.max() for _, y in curves))
    axes.set_ylim(min(-0.04 * highest, 1.1 * min(y.min() for _, y in curves)), highest)
    right = max(x[min(int((y <= CUT).sum()), len(x) - 1)] for x, y in curves)
    axes.set_xlim(-0.03 * right, 1.03 * right)


def _rows(one: Measured, part: str, kind: str) -> list[Mapping[str, Any]]:
    return [row for row in one.found["table"] if (row["part"], row["kind"]) == (part, kind)]


def _rise(
    axes: Axes, number: int, runs: Sequence[Measured], rows: Sequence[Sequence[Mapping[str, Any]]], column: str
) -> None:
    mean, error = mean_and_error([[row["mean"] for row in of] for of in rows])
    if len(rows) == 1:
        error = np.array([row["standard_error"] or 0 for row in rows[0]])
    norm = np.mean([one.found["norm"] for one in runs])
    radii = np.mean([[row[column] for row in of] for of in rows], 0)
    line(axes, number, radii, mean, f"{runs[0].label} (||w|| = {norm:.3g})")
    band(axes, number, radii, mean - error, mean + error)


def qt_dog_figure_4(measured: Sequence[Measured]) -> Figure:
    """Accuracy over updates, on validation images above, on the target below; a column a held-out domain. Of
    stability."""
    text = "Accuracy at each evaluation; band: standard error over seeds; vertical line: quantized from there on."
    columns = panel_names(measured)
    width = 4.2 if len(columns) == 1 else 2.9
    shown = caption(text, measured)
    figure, axes = panels(2, len(columns), shown, width=width, height=1.5, legend=0.3, gap=0.5, sharex="col")
    for column, name in zip(axes.T, columns, strict=True):
        for number, (label, runs) in enumerate(by_label(measured, name).items()):
            for panel, key in zip(column, ("validation", "test"), strict=True):
                updates = curve(runs[0], "update")
                mean, error = mean_and_error([[100 * value for value in curve(one, key)] for one in runs])
                line(panel, number, updates, mean, label)
                band(panel, number, updates, mean - error, mean + error)
                if (switch := runs[0].found["switch"]) is not None and switch > updates[0]:
                    panel.axvline(switch, color=LINES[number][2], linestyle=LINES[number][0], linewidth=0.8)
        column[0].set(title=name, ylabel="validation [%]")
        column[1].set(xlabel="update", ylabel="target [%]")
    legend_above(figure, axes[0, 0])
    return figure


def qt_dog_figure_5(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What quantization to some bits adds to the accuracy on the target, against the same training in float.

    rows: "dataset", "bits", "gain" (of the accuracy, a share), "error" (its standard error), "seeds" (how many).
    """
    datasets = [*dict.fromkeys(row["dataset"] for row in rows)]
    bits = sorted({row["bits"] for row in rows}, reverse=True)
    text = f"Against the same training in float32, mean over domains; bars: standard error, n = {_counts(rows)} seeds."
    figure, axes = panels(1, 1, text, width=5.0, height=2.2, legend=0.25)
    width = 0.8 / len(datasets)
    for i, dataset in enumerate(datasets):
        of = [row for row in rows if row["dataset"] == dataset]
        places = [bits.index(row["bits"]) + (i - (len(datasets) - 1) / 2) * width for row in of]
        gains, errors = ([100 * (row[key] or 0) for row in of] for key in ("gain", "error"))
        options = {"color": GRAYS[i % len(GRAYS)], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "black"}
        axes[0, 0].bar(places, gains, 0.9 * width, yerr=errors, capsize=2, label=dataset, linewidth=0.6, **options)
        for place, gain, error in zip(places, gains, errors, strict=True):
            above = gain >= 0
            y = gain + error if above else gain - error
            offset, va = (0, 2 if above else -2), "bottom" if above else "top"
            number: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": va, "fontsize": 7}
            axes[0, 0].annotate(f"{gain:+.1f}", (place, y), offset, **number)
    axes[0, 0].axhline(0, color="black", linewidth=0.8)
    axes[0, 0].margins(y=0.15)
    axes[0, 0].set_xticks(range(len(bits)), [f"{b} bits" for b in bits])
    axes[0, 0].set_ylabel("gain in accuracy [points]")
    legend_above(figure, axes[0, 0])
    return figure


def _counts(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(map(str, sorted({row["seeds"] for row in rows})))


def qt_dog_figure_6(measured: Sequence[Measured]) -> Figure:
    """Images of the target in the first row, and below where each method looks at. Of gradcam, of the same images."""
    runs = [of[0] for of in by_label(measured).values()]
    images, names = runs[0].found["images"], runs[0].found["classes"]
    stages = ", ".join(dict.fromkeys(one.found["stage"] for one in runs))
    text = f"GradCAM at {stages} of the class that the network predicts, which stands above; bright: speaks for it,"
    shown = caption(f"{text} contour: half of the most.", runs)
    figure, axes = panels(1 + len(runs), len(images), shown, width=0.95, height=0.95, gap=0.25, bottom=0.1)
    for column, image in enumerate(images):
        pixels = np.array(image["pixels"], np.uint8).transpose(1, 2, 0)
        gray = pixels.mean(2)
        _image(axes[0, column], pixels if pixels.shape[2] == 3 else pixels[..., 0])
        row = runs[0].found["table"][column]
        axes[0, column].set_title(f"{row['domain']}: {names[row['label']]}", fontsize=7, pad=2)
        for panel, one in zip(axes[1:, column], runs, strict=True):
            heat, found = np.array(one.found["images"][column]["map"]), one.found["table"][column]
            _image(panel, gray)
            panel.imshow(heat, cmap="inferno", alpha=0.6, vmin=0, vmax=1)
            if heat.max() > 0.5 > heat.min():
                panel.contour(heat, [0.5], colors="white", linewidths=0.8)
            right = "right" if found["predicted"] == found["label"] else "wrong"
            panel.set_title(f"{names[found['predicted']]} ({right})", fontsize=7, pad=2)
    for panel, name in zip(axes[:, 0], ["image", *(one.label for one in runs)], strict=True):
        panel.set_ylabel(name, fontsize=7)
    return figure


def _image(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
