"""The figures of QGen (arXiv 2404.11769). Figure 2 is in surfaces.py."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from qdeploy.training.figures import Measured
from qdeploy.training.figures.drawing import (
    by_label,
    caption,
    curve,
    legend_above,
    line,
    panel_names,
    panels,
    plain_log,
)


def qgen_figure_1(measured: Sequence[Measured]) -> Figure:
    """The width of the quantization bins of each layer, a line a width in bits, a panel a network. Of bin-widths."""
    names = panel_names(measured)
    text = "Width of the quantization bin, the step size (median over channels where each has one), by layer from the"
    shown = caption(f"{text} input on; logarithmic axis.", measured)
    figure, axes = panels(1, len(names), shown, legend=0.25)
    for panel, name in zip(axes[0], names, strict=True):
        for number, (label, runs) in enumerate(by_label(measured, name).items()):
            steps = curve(runs[0], "step")
            line(panel, number, range(1, len(steps) + 1), steps, label)
        plain_log(panel)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set(title=name, xlabel="layer", ylabel="bin width, in units of the weights")
    legend_above(figure, axes[0, 0])
    return figure
