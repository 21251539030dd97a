"""Tables of accuracies with published figures beside ours, and their main column as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qdeploy.page.axes import linear, logarithmic
from qdeploy.page.charts import Compared, Point, dots, scatter
from qdeploy.page.document import Column, chart, charts, number, table
from qdeploy.page.markup import Markup, tag, together

MEANS = ("mean", "avg.")  # how the labels of the column end that says it in one number
Row = Mapping[str, Any]
Cell = Mapping[str, Any]


def section_of(content: Mapping[str, Any]) -> Markup:
    """The table, its notes, and the main column: ours beside the published ones, against size and against latency."""
    notes = [tag("li", note) for note in content["notes"]]
    drawn = _drawn(content)
    return together(
        _table(content), tag("ul", *notes, class_="notes") if notes else None, charts(*drawn) if drawn else None
    )


# ---- The table -----------------------------------------------------------------------------------------------------

# What stands beside the columns, where a row has it: key, header and how it is written.
BESIDE: tuple[tuple[str, str, Callable[[Any], object]], ...] = (
    ("seeds", "seeds", str),
    ("networks", "networks", lambda count: count if count > 1 else None),
    ("bits", "bits", str),
    ("size", "bytes", lambda size: size),
    ("milliseconds", "ms here", lambda time: f"{time:,.3f}"),
    ("int8", "int8 engine", lambda cell: _cell(cell, 1)),
    ("agreement", "agreement", lambda share: f"{share:.2f}%"),
)


def _table(content: Mapping[str, Any]) -> Markup:
    columns: list[Column] = [("", ""), *((label, "n") for label in content["columns"])]
    rows = [[row["label"], *map(_cell, row["cells"], content["decimals"])] for row in content["rows"]]
    for key, title, written in BESIDE:
        known = [row.get(key) for row in content["rows"]]
        values = [None if value is None else written(value) for value in known]
        if any(value is not None for value in values):
            columns.append((title, ",d"))
            for row, value in zip(rows, values, strict=True):
                row.append(value)
    return table(content["title"], columns, rows)


def _cell(cell: Cell | None, decimals: int) -> object:
    """Ours, and the published one in brackets below it, or the n of a `counted` one; None where there is neither."""
    if cell is None:
        return None
    ours = _figure(cell["mean"], cell["error"], decimals)
    if cell.get("counted"):
        return together(ours, tag("span", f"n {cell['n']}", class_="published"))
    if cell.get("published") is None:
        return ours
    published = _figure(cell["published"], cell["published_error"], decimals)
    return together(ours, tag("span", "(", published, ")", class_="published"))


def _figure(mean: float | None, error: float | None, decimals: int) -> Markup:
    spec = f".{decimals}f"
    beside = None if error is None or mean is None else tag("span", f" \u00b1 {error:{spec}}", class_="muted")
    return together(tag("span", "-", class_="muted") if mean is None else number(mean, spec), beside)


# ---- The pictures --------------------------------------------------------------------------------------------------


def _drawn(content: Mapping[str, Any]) -> list[Markup]:
    column = _main_column(content)
    if column is None:
        return []
    label, spec = content["columns"][column], f",.{content['decimals'][column]}f"
    label += f", {content['units'][column]}" if content["units"][column] else ""
    rows = [(row, row["cells"][column]) for row in content["rows"] if row["cells"][column] is not None]
    compared = _comparison(rows, label, spec) if len(rows) > 1 else None
    size = _against(rows, "size", "size", (1e-6, "MB"), (1e-3, "kB"), label, spec)
    time = _against(rows, "milliseconds", "time of an input", (1, "ms"), (1e3, "us"), label, spec)
    return [drawing for drawing in (compared, size, time) if drawing is not None]


def _main_column(content: Mapping[str, Any]) -> int | None:
    """The mean, or else the column with most of our figures; None without any."""
    counts = [
        sum((row["cells"][i] or {}).get("mean") is not None for row in content["rows"])
        for i in range(len(content["columns"]))
    ]
    for i, label in enumerate(content["columns"]):
        if label.lower().endswith(MEANS) and counts[i]:
            return i
    return counts.index(max(counts)) if any(counts) else None


def _comparison(rows: Sequence[tuple[Row, Cell]], label: str, spec: str) -> Markup:
    found = [
        Compared(row["label"], cell["mean"], cell["error"], cell.get("published"), cell.get("published_error"))
        for row, cell in rows
    ]
    found.sort(key=lambda row: -_shown(row))
    values = [value for row in found for value in _ends(row.value, row.error) + _ends(row.other, row.other_error)]
    best = next((row for row in found if row.value is not None), found[0])
    drawing = dots(
        f"{label} by row",
        f"The highest of ours is {best.label}: {number(best.value, spec)}.",
        found,
        linear(label, values, ",g"),
    )
    beside = any(row.other is not None for row in found)
    caption = together(tag("strong", label), ": filled with its standard error")
    columns: list[Column] = [("", ""), ("ours", spec), ("error", spec), ("published", spec), ("its error", spec)]
    numbers = [(row.label, row.value, row.error, row.other, row.other_error) for row in found]
    return chart(drawing, together(caption, ", hollow as published." if beside else "."), columns, numbers)


def _shown(row: Compared) -> float:
    return next((value for value in (row.value, row.other) if value is not None), 0.0)


def _ends(value: float | None, error: float | None) -> list[float]:
    return [] if value is None else [value - (error or 0.0), value + (error or 0.0)]


Unit = tuple[float, str]  # a factor, and the name of what comes out


def _against(
    rows: Sequence[tuple[Row, Cell]], key: str, what: str, large: Unit, small: Unit, label: str, spec: str
) -> Markup | None:
    """Rows that no other beats in both are named. In `small` units where all are below a large one."""
    shown = [(row["label"], row[key], cell) for row, cell in rows if row.get(key) and cell["mean"] is not None]
    if len(shown) < 2:
        return None
    factor, unit = small if large[0] * max(value for _, value, _ in shown) < 1 else large
    title = f"{what}, {unit}"
    known = [(name, factor * value, cell["mean"], cell["error"]) for name, value, cell in shown]
    points = [
        Point(name, x, y, error, named=not any(_is_better(other[1:3], (x, y)) for other in known))
        for name, x, y, error in known
    ]
    x = logarithmic(title, [point.x for point in points])
    y = linear(label, [end for point in points for end in _ends(point.y, point.error)])
    text = f"Not beaten in both: {', '.join(point.label for point in points if point.named)}."
    caption = together(tag("strong", f"{label} against {title}"), ". Named: no other row is better in both.")
    columns: list[Column] = [("", ""), (title, ",.3f"), (label, spec), ("error", spec)]
    return chart(scatter(f"{label} against {title}", text, points, x, y), caption, columns, known)


def _is_better(other: Sequence[float], one: Sequence[float]) -> bool:
    return other[0] <= one[0] and other[1] >= one[1] and tuple(other) != tuple(one)
