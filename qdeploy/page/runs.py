"""Runs of a report in the groups that are drawn together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]


def of_one_cell(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """The seeds by row and held-out domain."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["row"], str(run["target"])), []).append(run)
    return groups


def first_seeds(runs: Sequence[Run], measure: str) -> dict[str, tuple[Run, Mapping[str, Any]]]:
    """By a title, of each row and held-out domain the first run that has `measure`, and what it says."""
    having = [run for run in runs if measure in run["measures"]]
    return {title_of(group[0]): (group[0], group[0]["measures"][measure]) for group in of_one_cell(having).values()}


def title_of(run: Run) -> str:
    return f"{run['row']}, {run['target']}, seed {run['seed']}"
