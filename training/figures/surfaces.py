"""Loss surfaces on a plane of filter-normalized directions: figure 6 of GAQAT and figure 2 of QGen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qdeploy.training.figures import Measured
from qdeploy.training.figures.drawing import by_label, caption, panel_names, panels

CLIPPED = 10.0  # nats; above, a surface says nothing more, and hides what is below
NEAR = 1.0  # nat


def gaqat_figure_6(measured: Sequence[Measured]) -> Figure:
    """A row for each method, a column for each held-out domain. Of surface, the first seed of each."""
    columns, rows = panel_names(measured), [*by_label(measured)]
    first = {(one.label, one.panel): one for one in reversed(measured)}
    grid = [[first.get((label, name)) for name in columns] for label in rows]
    return _surfaces(grid, [[f"{label}, {name}" if name else label for name in columns] for label in rows])


def qgen_figure_2(measured: Sequence[Measured]) -> Figure:
    """The float network and quantized ones beside each other. Of surface, the first seed of each."""
    runs = [of[0] for of in by_label(measured).values()]
    return _surfaces([runs], [[one.label for one in runs]])


def _surfaces(grid: Sequence[Sequence[Measured | None]], titles: Sequence[Sequence[str]]) -> Figure:
    runs = [one for row in grid for one in row if one is not None]
    text = "Cross-entropy on the plane of two filter-normalized random directions, the same for all; dot: the network."
    words = f"{text} Near it: the share of the plane up to {NEAR:g} nat above its loss. Cut at {CLIPPED:g} nats."
    options: dict[str, Any] = {"subplot_kw": {"projection": "3d"}, "width": 2.1, "height": 1.8, "bottom": 0.1}
    figure, axes = panels(len(grid), len(grid[0]), caption(words, runs, ("points", "images")), **options)
    top = min(CLIPPED, max(row["loss"] for one in runs for row in one.found["table"]))
    for panel, one, title in zip(axes.flat, sum(map(list, grid), []), sum(map(list, titles), []), strict=True):
        if one is None:
            panel.set_axis_off()
            continue
        _surface(panel, one.found, top)
        panel.set_title(f"{title}\nloss {one.found['loss']:.3g}, near it {_near(one.found):.0%}", fontsize=7, pad=0)
    return figure


def _near(found: Mapping[str, Any]) -> float:
    """The share of the plane where the loss is at most `NEAR` above that of the network."""
    return float(np.mean([row["loss"] <= found["loss"] + NEAR for row in found["table"]]))


def _surface(panel: Any, found: Mapping[str, Any], top: float) -> None:
    points = found["points"]
    a, b, loss = (np.array([row[key] for row in found["table"]]).reshape(points, points) for key in ("a", "b", "loss"))
    shown = np.minimum(loss, top)
    panel.plot_surface(
        a, b, shown, cmap="gray", vmin=0, vmax=top, linewidth=0.25, edgecolor="black", rcount=21, ccount=21
    )
    panel.plot([0], [0], [found["loss"]], "o", color="#d55e00", markersize=3, zorder=10)
    panel.set(xlabel="a", ylabel="b", zlabel="loss [nats]", zlim=(0, top), xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    panel.tick_params(labelsize=6, pad=-2)
    for axis in (panel.xaxis, panel.yaxis, panel.zaxis):
        axis.labelpad = -8
