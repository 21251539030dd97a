"""What measures found, as numbers: a table for each measure, a row a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdeploy.page.document import Column, table
from qdeploy.page.markup import Markup, tag, together
from qdeploy.page.runs import Run, title_of

LEFT_OUT = ("version", "points")  # no findings


def tables_of(runs: Sequence[Run]) -> Markup | None:
    names = dict.fromkeys(name for run in runs for name in run["measures"])
    found = [(name, _table(name, [run for run in runs if name in run["measures"]])) for name in names]
    shown = [together(tag("h3", name), content) for name, content in found if content is not None]
    return together(*shown) if shown else None


def _table(name: str, runs: Sequence[Run]) -> Markup | None:
    found = [_numbers(run["measures"][name]) for run in runs]
    keys = [*dict.fromkeys(key for numbers in found for key in numbers)]
    columns: list[Column] = [("run", ""), *((key.replace("_", " "), ",.4g") for key in keys)]
    rows = [[title_of(run), *map(numbers.get, keys)] for run, numbers in zip(runs, found, strict=True)]
    return table(name, columns, rows) if keys else None


def _numbers(measure: Mapping[str, Any]) -> dict[str, object]:
    """The values of a run, and of the rows of its table those that are a measure of their own."""
    numbers: dict[str, object] = {
        key: value for key, value in measure.items() if isinstance(value, (int, float)) and key not in LEFT_OUT
    }
    for row in measure.get("table", []):
        if {"measure", "reading", "value", "saturated"} <= {*row}:
            numbers[f"{row['measure']}, {row['reading']}"] = "saturated" if row["saturated"] else row["value"]
    return numbers
