"""What all pictures share: ink, lines that differ without colors, panels, and the caption under them.

Places are numbers: matplotlib's own layouts now and then find others for the same picture.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qdeploy.training.figures import Measured
from qdeploy.training.pictures import STYLE

Numbers = Sequence[float] | np.ndarray

OF_PAPERS: dict[Any, Any] = STYLE | {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "legend.handlelength": 3.2,  # a pattern of dashes needs two periods to be seen
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "hatch.linewidth": 0.6,
}

# Dashes, marker and color, one of each for a label. Colors differ in brightness, too (Okabe and Ito's, darkest first).
LINES: list[tuple[Any, str, str]] = [
    ("-", "o", "#000000"),
    ("--", "s", "#0072b2"),
    ("-.", "^", "#d55e00"),
    (":", "D", "#009e73"),
    ((0, (6, 1, 1, 1, 1, 1)), "v", "#cc79a7"),
    ((0, (1, 2)), "P", "#e69f00"),
    ((0, (8, 2)), "X", "#56b4e9"),
    ((0, (3, 1, 1, 1)), "*", "#777777"),
]
HATCHES = ["", "////", "....", "xxxx", "\\\\\\\\", "++++"]
GRAYS = ["#4d4d4d", "#c8c8c8", "#8c8c8c", "#e6e6e6"]

LEFT, RIGHT, TOP, BOTTOM, BETWEEN = 0.62, 0.18, 0.3, 0.45, 0.62  # inches around and between panels
LETTERS, LINE = 18.5, 0.145  # of the caption: letters an inch, inches a line


def panels(
    rows: int,
    columns: int,
    caption: str,
    *,
    width: float = 2.9,
    height: float = 1.9,
    legend: float = 0.0,
    gap: float = BETWEEN,
    bottom: float = BOTTOM,
    **options: Any,
) -> tuple[Figure, np.ndarray]:
    """A figure with panels of `width` x `height` inches, [rows, columns] of Axes, the caption below and `legend` inches
    for a legend above."""
    wide = LEFT + columns * width + (columns - 1) * gap + RIGHT
    lines = textwrap.wrap(caption, int(wide * LETTERS))
    below = 0.1 + LINE * len(lines)
    high = TOP + legend + rows * height + (rows - 1) * gap + bottom + below
    figure = Figure(figsize=(wide, high))
    places = {
        "left": LEFT / wide,
        "right": 1 - RIGHT / wide,
        "top": 1 - (TOP + legend) / high,
        "bottom": (bottom + below) / high,
        "wspace": gap / width,
        "hspace": gap / height,
    }
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=places, **options)
    figure.text(0.1 / wide, 0.06 / high, "\n".join(lines), fontsize=7, linespacing=1.3, va="bottom")
    return figure, axes


def plain_log(axes: Axes) -> None:
    """A logarithmic y axis with numbers as they are: those with exponents need fonts that are not everywhere."""
    axes.set_yscale("log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(lambda value, place: f"{value:g}" if f"{value:e}"[0] in "125" else "")


def legend_above(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """The labels of one panel for all."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=min(columns, len(labels)), borderaxespad=0.3)


def line(axes: Axes, number: int, x: Numbers, y: Numbers, label: str) -> None:
    """Line `number` of a legend; a marker at every so many points."""
    dashes, marker, color = LINES[number % len(LINES)]
    step = max(1, len(x) // 12)
    # Markers of lines that lie on each other stand beside each other.
    axes.plot(x, y, linestyle=dashes, color=color, marker=marker, markevery=(number % step, step), label=label)


def band(axes: Axes, number: int, x: Numbers, low: np.ndarray, high: np.ndarray) -> None:
    axes.fill_between(x, low, high, color=LINES[number % len(LINES)][2], alpha=0.18, linewidth=0)


def by_label(measured: Sequence[Measured], panel: str | None = None) -> dict[str, list[Measured]]:
    """In the order given; of one panel, or of all."""
    found: dict[str, list[Measured]] = {}
    for one in measured:
        if panel is None or one.panel == panel:
            found.setdefault(one.label, []).append(one)
    return found


def panel_names(measured: Sequence[Measured]) -> list[str]:
    return [*dict.fromkeys(one.panel for one in measured)]


def mean_and_error(curves: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Of curves over seeds: the mean and its standard error, which is 0 of one seed."""
    table = np.array(curves, float)
    error = table.std(0, ddof=1) / len(table) ** 0.5 if len(table) > 1 else np.zeros(table.shape[1])
    return table.mean(0), error


def caption(text: str, measured: Sequence[Measured], show: Sequence[str] = ()) -> str:
    """`text`, the seeds behind it, n, and the settings named in `show` with which it was measured."""
    seeds = {one.label: sorted({each.seed for each in of if each.seed is not None}) for one, of in _groups(measured)}
    lists = {tuple(each) for each in seeds.values() if each}
    words = []
    if len(lists) == 1:
        (numbers,) = lists
        words.append(f"{'Seed' if len(numbers) == 1 else 'Seeds'} {_list(numbers)} (n = {len(numbers)}).")
    elif lists:
        each = [f"{label} {_list(numbers)} (n = {len(numbers)})" for label, numbers in seeds.items()]
        words.append(f"Seeds: {', '.join(each)}.")
    settings: Mapping[str, Any] = measured[0].found.get("settings", {})
    named = [f"{key} {settings[key]:,}" for key in show if settings.get(key) is not None]
    return " ".join([text, *words, *([f"Measured with {', '.join(named)}."] if named else [])])


def _groups(measured: Sequence[Measured]) -> list[tuple[Measured, list[Measured]]]:
    return [(of[0], of) for of in by_label(measured).values()]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def curve(one: Measured, column: str, where: Callable[[Mapping[str, Any]], bool] = lambda row: True) -> list[float]:
    """A column of the measure's table, of the rows `where`."""
    return [row[column] for row in one.found["table"] if where(row)]
