"""A report as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from typing import Any

from qdeploy.terminal import printable

Table = Mapping[str, Any]  # one of "tables" of `report_data`


def markdown(data: Mapping[str, Any]) -> str:
    """Tables with `ours (published)` in a cell, `-` where there is none."""
    return "\n".join([f"# {data['title']}", *map(_section, data["tables"])])


def _section(table: Table) -> str:
    beside = [(header, of) for header, of in _BESIDE.items() if any(of(row) != "-" for row in table["rows"])]
    header = ["", *_headers(table), *(name for name, _ in beside)]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for row in table["rows"]:
        cells = [
            cell_text(one, digits, only)
            for one, digits, only in zip(row["cells"], table["decimals"], _only_published(table), strict=True)
        ]
        lines.append(_line([row["label"], *cells, *(of(row) for _, of in beside)]))
    notes = [f"- {_escaped(note)}" for note in table["notes"]]
    return "\n".join(["", f"## {_escaped(table['name'])}: {_escaped(table['title'])}", "", *lines, "", *notes, ""])


def _headers(table: Table) -> list[str]:
    alone = zip(table["columns"], _only_published(table), strict=True)
    return [f"({label})" if only else label for label, only in alone]


def _only_published(table: Table) -> list[bool]:
    """By column, whether no row has a result there."""
    columns = zip(*(row["cells"] for row in table["rows"]), strict=True)
    return [all(cell is None or cell["mean"] is None for cell in cells) for cells in columns]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """Names of rows, folders and domains are strangers' texts."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


def cell_text(cell: Mapping[str, Any] | None, decimals: int, only_published: bool = False) -> str:
    """`ours (published)` of a cell, each `mean ± error`; or the published figure alone, in brackets. Of a `counted` one
    `ours, n 16`."""
    if cell is None:
        return "-"
    ours = number(cell["mean"], cell["error"], decimals)
    if cell.get("counted"):
        return f"{ours}, n {cell['n']}"
    if cell.get("published") is None:
        return ours
    published = f"({number(cell['published'], cell['published_error'], decimals)})"
    return published if only_published else f"{ours} {published}"


def number(mean: float | None, error: float | None, decimals: int) -> str:
    if mean is None:
        return "-"
    return f"{mean:.{decimals}f}" + ("" if error is None else f" ± {error:.{decimals}f}")


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


# What stands beside the columns of a table, where a row has it.
_BESIDE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "seeds": lambda row: _or_dash(row["seeds"]),
    "networks": lambda row: _or_dash(row["networks"]) if (row["networks"] or 1) > 1 else "-",
    "bits": lambda row: _or_dash(row["bits"]),
    "file, bytes": lambda row: "-" if row["size"] is None else f"{row['size']:,}",
    "int8 engine": lambda row: cell_text(row["int8"], 1),
    "agreement": lambda row: "-" if row["agreement"] is None else f"{row['agreement']:.2f} %",
}

_FIELDS = ("mean", "error", "n", "published", "published_error")
_OF_ROW = ("networks", "bits", "size", "agreement")


def csv_text(data: Mapping[str, Any]) -> str:
    """A line for each cell; the accuracy of the engine is a column `int8 engine`. What is not known is empty."""
    lines = io.StringIO()
    written = csv.writer(lines, lineterminator="\n")
    written.writerow(["table", "row", "column", *_FIELDS, *_OF_ROW])
    for table in data["tables"]:
        for row in table["rows"]:
            cells = {**dict(zip(table["columns"], row["cells"], strict=True)), "int8 engine": row["int8"]}
            for column, cell in cells.items():
                values = [(cell or {}).get(field) for field in _FIELDS]
                if cell is not None or column != "int8 engine":
                    written.writerow([table["name"], row["label"], column, *values, *(row[key] for key in _OF_ROW)])
    return lines.getvalue()
