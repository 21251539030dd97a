"""A report as a picture: a point with its error for every cell, a panel for every column, published figures beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qdeploy.training.pictures import STYLE, encoded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PALE = "#1f2328", "#d0d7de"
OF_REPORT: dict[Any, Any] = STYLE | {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.left": False,
    "xtick.color": INK,
    "ytick.color": INK,
}
ROW, HEAD, FOOT = 0.24, 0.75, 0.55  # inches: of a row, above the panels of a table and below them
PANEL, WIDEST, LABEL = 1.75, 3.5, 0.075  # inches: of a panel, of one with room beside, of a letter of a row's label


def draw(data: Mapping[str, Any], kind: str) -> bytes:
    """The picture of the rows and columns that have a result, all tables below one another, as `png` or `svg`."""
    import matplotlib

    with matplotlib.rc_context(OF_REPORT):
        return encoded(_picture(data), kind)


def _picture(data: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    tables = [table for table in data["tables"] if _rows(table)]
    if not tables:
        figure = Figure(figsize=(6.5, 0.6))
        figure.text(0.02, 0.4, "No run is finished.")
        return figure
    heights = [HEAD + FOOT + ROW * len(_rows(table)) for table in tables]
    left = 0.3 + LABEL * max(len(_short(row["label"])) for table in tables for row in _rows(table))
    width = max(left + PANEL * max(len(_columns(table)) for table in tables), 6.5)
    figure = Figure(figsize=(width, sum(heights)))
    top = sum(heights)
    for table, height in zip(tables, heights, strict=True):
        _draw(figure, table, left, top, top - height)
        top -= height
    return figure


def _rows(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in table["rows"] if any(_has_mean(cell) for cell in row["cells"])]


def _columns(table: Mapping[str, Any]) -> list[int]:
    """The places of the columns with a result."""
    places = range(len(table["columns"]))
    return [place for place in places if any(_has_mean(row["cells"][place]) for row in table["rows"])]


def _has_mean(cell: Mapping[str, Any] | None) -> bool:
    return cell is not None and cell["mean"] is not None


def _draw(figure: Figure, table: Mapping[str, Any], left: float, top: float, bottom: float) -> None:
    """A table between two heights, in inches."""
    width, height = figure.get_size_inches()
    rows, columns = _rows(table), _columns(table)
    right = min(width - 0.15, left + WIDEST * len(columns))
    place = {"left": left / width, "right": right / width, "wspace": 0.16}
    place |= {"top": (top - HEAD) / height, "bottom": (bottom + FOOT) / height}
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False, gridspec_kw=place)[0]
    for axes, column in zip(panels, columns, strict=True):
        _panel(axes, [row["cells"][column] for row in rows])
        unit = table["units"][column]
        axes.set_title(_short(table["columns"][column]) + (f", {unit}" if unit else ""), fontsize=9)
    panels[0].set_yticks(range(len(rows)), [_short(row["label"]) for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    has_published = any((row["cells"][column] or {}).get("published") is not None for row in rows for column in columns)
    seeds = " or ".join(sorted({row["seeds"] for row in rows if row["seeds"] is not None}))
    legend = "filled: here" + (f", mean and standard error over {seeds} seeds" if seeds else "")
    legend += "; open: published" if has_published else ""
    figure.text(0.1 / width, (top - 0.2) / height, f"{table['name']}: {table['title']}", fontsize=10, weight="bold")
    figure.text(0.1 / width, (top - 0.38) / height, legend, fontsize=8)


def _panel(axes: Axes, cells: list[Mapping[str, Any] | None]) -> None:
    for place, cell in enumerate(cells):
        axes.axhline(place, color=PALE, linewidth=0.6, zorder=0)
        if cell is None:
            continue
        if _has_mean(cell):
            axes.errorbar(cell["mean"], place, xerr=cell["error"], fmt="o", color=INK, markersize=4.5, capsize=2)
        if cell.get("published") is not None:
            error = cell["published_error"]
            axes.errorbar(
                *(cell["published"], place + 0.28), xerr=error, fmt="s", color=INK, mfc="white", markersize=4, lw=0.7
            )
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    axes.locator_params(axis="x", nbins=3)


def _short(text: str) -> str:
    return text if len(text) <= 44 else f"{text[:43]}…"
