"""The table of a report that says how measures rank a pool of networks, against their generalization gap (QGen)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qdeploy.errors import InputError
from qdeploy.training.finished_runs import varied
from qdeploy.training.measures.ranking import ranking
from qdeploy.training.report_cells import measured
from qdeploy.training.report_runs import MEASURES, Result
from qdeploy.training.run_files import sound
from qdeploy.training.tables import RANKING, Column

_CLEAN = {"part": "target", "kind": "clean"}
GAP = Column("gap", value="gaps.gap", where=_CLEAN, percent=False, decimals=3)
# The gap of few bits is small because they train to a higher loss: both stand beside it.
LOSSES = (
    GAP,
    Column("training loss", value="gaps.train_loss", percent=False, decimals=3),
    Column("test loss", value="gaps.test_loss", where=_CLEAN, percent=False, decimals=3),
)
# Measures that are one number each; the bounds of pac-bayes and sharpness come with their readings.
_NUMBERS = (
    Column("norm of the weights", value="norms.norm_folded"),
    Column("distance from the initial weights", value="pac-bayes.distance"),
)
_BOUNDS = ("pac-bayes", "sharpness")
_BESIDE = ("seed", "split_seed", "test_domain")  # networks of a group share them, but nobody chooses by them
_NAME = "method"  # of a row of choices, each of which is a setting

Settings = Mapping[str, Sequence[str]]  # by name, of each network


def with_gap(results: Sequence[Result]) -> list[Result]:
    """The runs whose gap is measured. Raises InputError where they are fewer than two."""
    found = [one for one in results if one.kind is None and measured(one, GAP) is not None]
    if len(found) < 2:
        expected = "two runs or more with a gap (`qdeploy measure DIR --what gaps`)"
        raise InputError(f"expected {expected}, got {len(found)} - at --table {RANKING}")
    return found


def ranking_table(results: Sequence[Result]) -> dict[str, Any]:
    """Of runs that have a gap, as `report_data` returns a table: a row for each measure, with tau_b, Psi and the mean
    tau_b of each setting; the `n` of a cell is of networks, or of groups."""
    columns = _measures(results)
    if not columns:
        expected = f"runs that are measured (`qdeploy measure DIR --what {','.join(_BOUNDS)}`)"
        raise InputError(f"expected {expected}, got none - at --table {RANKING}")
    values = varied([one.config for one in results])
    known = {name: [json.dumps(value, sort_keys=True, default=str) for value in of] for name, of in values.items()}
    settings, following = _independent({name: of for name, of in known.items() if name not in (*_BESIDE, _NAME)})
    networks = [
        {column.label: measured(one, column) for column in (*columns, GAP)}
        | {name: of[i] for name, of in known.items()}
        for i, one in enumerate(results)
    ]
    beside = [name for name in _BESIDE if name in known]
    found = ranking(networks, [column.label for column in columns], settings, beside=beside)
    groups = {(row["measure"], row["setting"]): row for row in found["granulated"]}
    rows = []
    for row in found["table"]:
        of = [groups[row["measure"], setting] for setting in settings]
        cells = [_cell(row["tau"], row["networks"]), _cell(row["psi"], sum(one["tau"] is not None for one in of))]
        cells += [_cell(one["tau"], one["groups"], counted=True) for one in of]
        rows.append(_row(row["measure"], cells, row["networks"]))
    return {
        "name": RANKING,
        "title": f"How measures rank {len(results)} networks by their generalization gap",
        "columns": ["tau_b", "Psi", *settings],
        "decimals": [3] * (2 + len(settings)),
        "units": [""] * (2 + len(settings)),
        "rows": rows,
        "notes": [*_notes(settings, following), *_left_out(results, columns)],
    }


def _measures(results: Sequence[Result]) -> list[Column]:
    """What some run has of the measures that are compared, the bounds first."""
    found: dict[str, Column] = {}
    for one in results:
        for name in _BOUNDS:
            with sound(one.folder / MEASURES / f"{name}.json"):
                for row in one.measures.get(name, {"table": []})["table"]:
                    label, where = (
                        f"{row['measure']}, {row['reading']}",
                        {key: row[key] for key in ("measure", "reading")},
                    )
                    found.setdefault(label, Column(label, value=f"{name}.value", where=where))
    found |= {column.label: column for column in _NUMBERS}
    return [
        column for column in found.values() if any(column.value.partition(".")[0] in one.measures for one in results)
    ]


def _independent(settings: Settings) -> tuple[list[str], list[str]]:
    """Those that can differ alone, and those whose value follows from the others, as a rate does that an optimizer has
    of its own; of two that follow from each other the first one stays."""
    kept, following = dict(settings), []
    for name in reversed([*settings]):
        others = [*zip(*(of for other, of in kept.items() if other != name), strict=True)]
        if others and len({*zip(others, kept[name], strict=True)}) == len({*others}):
            following.append(name)
            del kept[name]
    return [*kept], [*reversed(following)]


def _cell(value: float | None, count: int, counted: bool = False) -> dict[str, Any] | None:
    return None if value is None else {"mean": value, "error": None, "n": count, "counted": counted}


def _row(label: str, cells: Sequence[Any], networks: int) -> dict[str, Any]:
    unknown = dict.fromkeys(("seeds", "bits", "size", "int8", "agreement", "file"))
    return {"label": label, "cells": [*cells], "networks": networks, **unknown}


def _notes(settings: Sequence[str], following: Sequence[str]) -> list[str]:
    notes = [
        "tau_b is of all networks; that of a setting is the mean over n groups that differ in it alone.",
        "Psi is the mean over the settings. A group in which measure or gap is the same for all does not count.",
    ]
    if not settings:
        notes.append("The networks differ in no setting, so that there is no Psi.")
    if following:
        notes.append(f"Without a column, as they follow from the others: {', '.join(following)}.")
    return notes


def _left_out(results: Sequence[Result], columns: Sequence[Column]) -> list[str]:
    """A sentence for each reason; by measure the networks that do not count."""
    reasons: dict[str, list[str]] = {}
    for column in columns:
        left = Counter(_reason(one, column) for one in results if measured(one, column) is None)
        for reason, count in left.items():
            reasons.setdefault(reason, []).append(f"{count} of {column.label}")
    return [f"Left out, {reason}: {'; '.join(places)}." for reason, places in reasons.items()]


def _reason(one: Result, column: Column) -> str:
    content = one.measures.get(column.value.partition(".")[0])
    if content is None:
        return "not measured"
    rows = [row for row in content["table"] if (column.where or {}).items() <= row.items()]
    return "the search was saturated" if any(row.get("saturated") for row in rows) else "no number"
