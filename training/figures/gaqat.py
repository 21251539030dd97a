"""The figures of GAQAT (arXiv 2412.05551): two objectives and their step sizes. Figure 6 is in surfaces.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qdeploy.training.figures import Measured
from qdeploy.training.figures.drawing import GRAYS, caption, legend_above, line, panels

SHOWN = 9  # step sizes
COLUMNS = 3


def gaqat_figure_2(measured: Sequence[Measured]) -> Figure:
    """Sums of both gradients of a step size in each window. Of scales, the first run; the nine step sizes whose
    objectives are opposed most often."""
    return _windows(measured[:1], "sum_task", "sum_smooth", "sum of gradients")


def gaqat_figure_3(measured: Sequence[Measured]) -> Figure:
    """How often both gradients change their sign in a window."""
    return _windows(measured[:1], "disorder_task", "disorder_smooth", "disorder")


def gaqat_figure_4(measured: Sequence[Measured]) -> Figure:
    """As figure 2, of a run whose frozen step sizes stay frozen."""
    return _windows(measured[:1], "sum_task", "sum_smooth", "sum of gradients")


def gaqat_figure_5(measured: Sequence[Measured]) -> Figure:
    """As figure 2, at 3 bits."""
    return _windows(measured[:1], "sum_task", "sum_smooth", "sum of gradients")


def _windows(measured: Sequence[Measured], task: str, smooth: str, quantity: str) -> Figure:
    found = measured[0].found
    by_scale: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["table"]:
        by_scale.setdefault(row["scale"], []).append(row)
    opposed = {row["scale"]: row["opposed"] for row in found["scales"]}
    most = sorted(by_scale, key=lambda name: -opposed[name])[:SHOWN]
    shown = [name for name in by_scale if name in most]  # in order of the network
    steps = [row["step"] for row in by_scale[shown[0]]]
    window = steps[1] - steps[0] if len(steps) > 1 else steps[0]
    text = f"{measured[0].label}. The {quantity} of a step size over each window of {window:,} updates, at its end"
    rest = f"{len(shown)} of {len(by_scale)} step sizes, those most often opposed (share of windows in brackets)"
    words = f"{text}; {rest}. Gray: frozen, no gradient of the task from there on."
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = panels(rows, columns, caption(words, measured), width=2.0, height=1.15, legend=0.25, sharex=True)
    for panel, name in zip(axes.flat, shown, strict=False):
        of = by_scale[name]
        line(panel, 0, steps, [row[task] for row in of], "task")
        line(panel, 1, steps, [row[smooth] for row in of], "smoothness")
        _frozen(panel, of, window)
        panel.set_title(f"{name} ({opposed[name]:.0%})", fontsize=7, loc="right")
        if task == "sum_task":
            panel.axhline(0, color=GRAYS[2], linewidth=0.6)
            panel.ticklabel_format(axis="y", style="sci", scilimits=(-1, 3))
    for panel in axes.flat[len(shown) :]:
        panel.set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel(quantity)
    for i, panel in enumerate(axes.flat[: len(shown)]):
        if i + columns >= len(shown):
            panel.set_xlabel("update")
            panel.tick_params(labelbottom=True)
    legend_above(figure, axes[0, 0])
    return figure


def _frozen(axes: Axes, rows: Sequence[Mapping[str, Any]], window: int) -> None:
    """Gray where the step size is frozen: from the end of a window that froze it to that of the next one."""
    for row in rows:
        if row["frozen"]:
            axes.axvspan(row["step"], row["step"] + window, color=GRAYS[3], linewidth=0, zorder=0)
    axes.set_xlim(0, rows[-1]["step"] + window)
