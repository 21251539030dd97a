"""What measures found, as numbers: a table for each measure, a row for each row of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from qdeploy.page.document import Column, table
from qdeploy.page.markup import Markup, tag, together
from qdeploy.page.runs import Run

LEFT_OUT = ("version", "points")  # no findings
Numbers = Mapping[str, float | str | None]


def tables_of(runs: Sequence[Run]) -> Markup | None:
    names = dict.fromkeys(name for run in runs for name in run["measures"])
    found = [(name, _table(name, [run for run in runs if name in run["measures"]])) for name in names]
    shown = [together(tag("h3", name), content) for name, content in found if content is not None]
    return together(tag("p", "Means over the runs of a row."), *shown) if shown else None


def _table(name: str, runs: Sequence[Run]) -> Markup | None:
    groups: dict[str, list[Numbers]] = {}
    for run in runs:
        groups.setdefault(run["row"], []).append(_numbers(run["measures"][name]))
    keys = [*dict.fromkeys(key for group in groups.values() for numbers in group for key in numbers)]
    rows = [
        (row, len(group), *(_mean([one.get(key) for one in group]) for key in keys)) for row, group in groups.items()
    ]
    columns: list[Column] = [("", ""), ("runs", ",d")]
    columns += [(key.replace("_", " "), _spec([row[2 + i] for row in rows])) for i, key in enumerate(keys)]
    return table(name, columns, rows) if keys else None


def _numbers(measure: Mapping[str, Any]) -> Numbers:
    """The values of a run, and of the rows of its table those that are a measure of their own."""
    numbers: dict[str, float | str | None] = {
        key: value for key, value in measure.items() if isinstance(value, (int, float)) and key not in LEFT_OUT
    }
    for row in measure.get("table", []):
        if {"measure", "reading", "value", "saturated"} <= {*row}:
            numbers[f"{row['measure']}, {row['reading']}"] = "saturated" if row["saturated"] else row["value"]
    return numbers


def _mean(values: Sequence[float | str | None]) -> float | str | None:
    """None where one is not known; a text where one is a text: that of a saturated search says nothing."""
    texts = [value for value in values if isinstance(value, str)]
    numbers = [value for value in values if isinstance(value, (int, float))]
    if texts:
        return texts[0]
    return fmean(numbers) if len(numbers) == len(values) else None


def _spec(values: Sequence[float | str | None]) -> str:
    numbers = [abs(value) for value in values if isinstance(value, (int, float))]
    return ",.0f" if numbers and min(numbers) >= 1000 else ",.4g"
