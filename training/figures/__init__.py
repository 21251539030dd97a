"""The figures of the papers, drawn from what `qdeploy.training.measures` returns. matplotlib is imported to draw alone.

GAQAT's figure 1 is an illustration without data. QT-DoG's figures 7 and 9 to 12 are figure 6 of other images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from qdeploy.errors import InputError
from qdeploy.files import atomic_file
from qdeploy.training.pictures import FORMATS, encoded

# The module of each function of this name. It takes a list of `Measured`, or, of *rows*, the rows of a table.
FIGURES = {
    "qt_dog_figure_1": "qt_dog",  # rows: accuracy of methods, by size
    "qt_dog_figure_2": "qt_dog",  # quantization-noise
    "qt_dog_figure_3": "qt_dog",  # flatness
    "qt_dog_figure_4": "qt_dog",  # stability
    "qt_dog_figure_5": "qt_dog",  # rows: gain by bits
    "qt_dog_figure_6": "qt_dog",  # gradcam
    "qt_dog_figure_8": "qt_dog",  # quantization-noise
    "gaqat_figure_2": "gaqat",  # scales
    "gaqat_figure_3": "gaqat",  # scales
    "gaqat_figure_4": "gaqat",  # scales, of a run whose frozen steps stay so
    "gaqat_figure_5": "gaqat",  # scales, at 3 bits
    "gaqat_figure_6": "surfaces",  # surface
    "qgen_figure_1": "qgen",  # bin-widths
    "qgen_figure_2": "surfaces",  # surface
}


@dataclass(frozen=True)
class Measured:
    """What a measure returned for one run. Runs that share label and panel differ in their seeds: of these a picture
    shows the mean. panel: what has axes of its own, such as the held-out domain."""

    label: str
    found: Mapping[str, Any]
    seed: int | None = None
    panel: str = ""


def check_matplotlib(at: str) -> None:
    """Raises InputError where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(f"expected matplotlib (pip install 'qdeploy[plots]'), got none - at {at}") from None


def draw(name: str, data: Sequence[Any], folder: Path) -> list[Path]:
    """Writes folder/NAME.png and folder/NAME.svg, each whole or not at all; the same data give the same bytes.

    name: one of FIGURES. data: of several runs, in the order of the legend. Returns the paths. Raises InputError where
    there is no such figure, nothing to draw, or no matplotlib.
    """
    if name not in FIGURES:
        raise InputError(f"expected one of {', '.join(FIGURES)}, got {name!r} - at the figure")
    if not data:
        raise InputError(f"expected something to draw, got nothing - at {name}")
    check_matplotlib(name)
    from matplotlib import rc_context

    from qdeploy.training.figures.drawing import OF_PAPERS

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with rc_context(OF_PAPERS):
        figure = getattr(import_module(f"{__name__}.{FIGURES[name]}"), name)(data)
        for kind in FORMATS:
            paths.append(folder / f"{name}.{kind}")
            with atomic_file(paths[-1]) as file:
                file.write(encoded(figure, kind))
    return paths
