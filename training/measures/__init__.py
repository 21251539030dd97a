"""What papers measure of a finished network, by the name that `qdeploy measure --what` takes. Imports no torch.

A measure is a module with plain functions of networks and batches, which know neither runs nor files, and with

    of_run(run: MeasuredRun, draws: Draws, *, option: type = default, ...) -> dict[str, Any]

which calls them for a finished run. What it returns can be written as JSON, and holds a `table`: the rows of the csv
file, {column: value} each. Its keyword parameters are the options of the measure on the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Measure:
    """One of MEASURES: where it is, what it says in a few words, and the function of `qdeploy.training.figures` that
    draws it (None: there is none)."""

    module: str
    text: str
    figure: str | None = None

    @property
    def of_run(self) -> Callable[..., dict[str, Any]]:
        """As above; imports torch."""
        found: Callable[..., dict[str, Any]] = import_module(f"{__name__}.{self.module}").of_run
        return found


MEASURES: dict[str, Measure] = {
    "flatness": Measure("flatness", "how the loss rises at a distance from the weights", "qt_dog_figure_3"),
    "pac-bayes": Measure("pac_bayes", "four PAC-Bayes measures, in two readings"),
    "sharpness": Measure("sharpness", "four sharpness measures, in two readings"),
    "surface": Measure("surface", "the loss on a filter-normalized plane around the weights", "qgen_figure_2"),
    "quantization-noise": Measure("quantization_noise", "what rounding adds to each weight", "qt_dog_figure_2"),
    "regularizer": Measure("regularizer", "quantization as a regularizer, to first order"),
    "norms": Measure("norms", "the L2 norm of the weights"),
    "bin-widths": Measure("bin_widths", "the step sizes of each layer", "qgen_figure_1"),
    "gaps": Measure("gaps", "losses on images that do not train, clean and corrupted"),
    "scales": Measure("scales", "GAQAT's two objectives and their step sizes", "gaqat_figure_2"),
    "stability": Measure("stability", "the accuracy on the target over updates", "qt_dog_figure_4"),
    "gradcam": Measure("gradcam", "where in images the network looks", "qt_dog_figure_6"),
}
