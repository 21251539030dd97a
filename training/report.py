"""What `qdeploy report` says: tables of finished runs, those of the papers with published figures beside."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdeploy.errors import InputError
from qdeploy.training.config import plain
from qdeploy.training.report_cells import Cell, bits, cell, check_row, check_table, held_out, of_files
from qdeploy.training.report_ranking import LOSSES, ranking_table, with_gap
from qdeploy.training.report_rows import labelled, plainest
from qdeploy.training.report_runs import Missing, Result, find
from qdeploy.training.tables import RANKING, Column, Row, Table, matches, table

SELECTIONS = {
    "validation": "training-domain validation",
    "oracle": "images of the held-out domains (oracle)",
    "last": "the last evaluation",
    "lowest-train-loss": "the lowest training loss",
}
NAMED_ROWS, NAMED_RUNS = 12, 4  # of those that a table does not have, or a row
Domains = Mapping[str, Sequence[str]]  # those held out, by data set


def report_data(folders: Sequence[Path], names: Sequence[str] = ()) -> dict[str, Any]:
    """All that a report says, for JSON: the tables `names`, or without any one of all that is in `folders`. Of the name
    "ranking" there are two: how measures rank the runs, and the losses of their rows.

    Returns {"title", "tables": [table], "runs": [{"row", "target", "seed", "folder", "records", "config", "measures"}]}

    A table is {"name", "title", "columns": [label], "decimals": [digits by column], "units": ["%" or "" by column],
    "rows", "notes": [sentence]}.
    A row is {"label", "cells", "seeds": text, "networks": how many an ensemble has, "bits": text, "size": bytes,
    "int8": cell, "agreement", "file": {"path", "layers"}}, a cell None or {"mean", "error", "n", "published",
    "published_error"}, by column; of a ranking {"mean", "error", "n", "counted": whether n stands beside}.
    Accuracies are in percent, as the papers print them; an error is the standard error over n seeds. What is not known
    is None.

    Raises InputError for a table that is not known, for folders without runs, damaged files and files of a newer
    version, and for runs that must not be averaged.
    """
    chosen = {name: table(name) for name in names if name != RANKING}  # an unknown name first
    results, missing = find(folders)
    tables = []
    for name in names:
        tables += _of_pool(results) if name == RANKING else [_of_paper(chosen[name], results)]
    tables = tables or [_of_all(results, missing)]
    for one in tables:
        one["notes"] += _missing(missing)
    runs = [_run(one, label) for label, group in labelled(results).items() for one in group if one.kind is None]
    return {"title": f"Runs in {', '.join(map(str, folders))}", "tables": tables, "runs": runs}


def _run(one: Result, label: str) -> dict[str, Any]:
    about = {"row": label, "target": one.config.test_domain, "seed": one.config.seed, "folder": str(one.folder)}
    return {**about, "records": [*one.records], "config": plain(one.config), "measures": {**one.measures}}


def _missing(runs: Sequence[Missing]) -> list[str]:
    """A sentence for each run, but those of a row of a sweep that are in one state share one, and so do rows that lack
    the same ones."""
    found: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        key = (str(run.folder), run.state) if run.row is None else (run.row, run.state)
        seed = "" if run.seed is None else f" seed {run.seed}"
        found.setdefault(key, []).append(f"{run.target or run.folder}{seed}")
    alike: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for (what, state), places in found.items():
        alike.setdefault((tuple(places), state), []).append(what)
    return [f"Missing: {_places(names, places)}: {state}." for (places, state), names in alike.items()]


def _places(names: Sequence[str], places: Sequence[str]) -> str:
    """Where each of the `names` is missing; a run of no row has its place for a name."""
    if list(names) == list(places):
        return names[0]
    number = f"{len(places)} runs{' each' if len(names) > 1 else ''}"
    return f"{'; '.join(names)} ({', '.join(places) if len(places) <= NAMED_RUNS else number})"


# ---- The columns and rows of a table -------------------------------------------------------------------------------


def _of_all(results: Sequence[Result], missing: Sequence[Missing]) -> dict[str, Any]:
    """A row for each row of a sweep and for the model file of its seeds, or for each set of settings; a column for each
    domain that is held out."""
    for one in results:
        if one.data != results[0].data:
            expected = f"runs of one data set, {results[0].data} as in {results[0].folder}"
            got = f"{one.data}: give --table, or report each alone"
            raise InputError(f"expected {expected}, got {got} - at {one.folder}")
    groups = labelled([one for one in results if one.row is None or not one.of_seeds or one.file])
    groups |= {run.row: [] for run in missing if run.row is not None and run.row not in groups}
    columns = [column for data, domains in held_out(results).items() for column in _columns(data, domains)]
    rows = [Row(label, [(None, None)] * len(columns), {}) for label in groups]
    title = f"All runs of {results[0].data}" if results else "No run is finished"
    return {"name": "all", "title": title, **_filled(columns, rows, [*groups.values()])}


def _of_pool(results: Sequence[Result]) -> list[dict[str, Any]]:
    pool = with_gap(results)
    groups = labelled(pool)
    rows = [Row(label, [(None, None)] * len(LOSSES), {}) for label in groups]
    ranked, left = ranking_table(pool), sum(one.kind is None for one in results) - len(pool)
    if left:
        ranked["notes"].append(f"{left} of {len(pool) + left} runs have no gap and are left out.")
    losses = {"name": f"{RANKING}/gaps", "title": "The gaps, and the losses of which they are the difference"}
    return [ranked, losses | _filled(LOSSES, rows, [*groups.values()])]


def _columns(data: str, domains: Sequence[str], decimals: int = 1, validation: bool = True) -> list[Column]:
    """Each domain, their mean, and the accuracy on the validation images of the source domains."""
    columns = [Column(name, data, target=name, decimals=decimals) for name in domains]
    columns += [Column("mean", data, decimals=decimals)] if len(domains) > 1 else []
    return columns + [Column("validation", data, value="validation", decimals=decimals)] * validation


def _of_paper(one: Table, results: Sequence[Result]) -> dict[str, Any]:
    """Its rows and columns; runs of data that it does not have get columns of their own."""
    asked = [run for run in results if run.row is None or not run.of_seeds]
    groups = [plainest([run for run in asked if matches(row, run.config, run.data, run.kind)]) for row in one.rows]
    added = _added(one.columns, held_out([run for group in groups for run in group]))
    rows = [replace(row, published=[*[(None, None)] * len(added), *row.published]) for row in one.rows]
    found = _filled([*added, *one.columns], rows, groups, one.varies)
    found["notes"] += [f"In brackets the published figures: {one.source}.", *one.notes]
    used = {run.folder for group in groups for run in group}
    if any(run.config.selection != one.selection for group in groups for run in group):
        found["notes"].append(f"The published ones were selected by another rule: {SELECTIONS[one.selection]}.")
    if left := [label for label, group in labelled(asked).items() if not any(run.folder in used for run in group)]:
        more = f" and {len(left) - NAMED_ROWS} more" if len(left) > NAMED_ROWS else ""
        found["notes"].append(f"In no row of this table: {'; '.join(left[:NAMED_ROWS])}{more}.")
    return {"name": one.name, "title": one.title, **found}


def _added(columns: Sequence[Column], domains: Domains) -> list[Column]:
    """Columns for the data sets that `columns`, where they are of data sets, do not have."""
    if any(column.data is None and not column.mean_of for column in columns):
        return []
    of_paper = {column.data for column in columns}
    decimals, validation = max(column.decimals for column in columns), any(c.value == "validation" for c in columns)
    return [
        replace(column, label=f"{data} {column.label}")
        for data, names in domains.items()
        if data not in of_paper
        for column in _columns(data, names, decimals, validation)
    ]


# ---- Its cells -----------------------------------------------------------------------------------------------------


def _filled(
    columns: Sequence[Column], rows: Sequence[Row], groups: Sequence[Sequence[Result]], varies: Sequence[str] = ()
) -> dict[str, Any]:
    """{"columns", "decimals", "units", "rows", "notes"} of a table whose rows have these results."""
    used = [one for group in groups for one in group]
    check_table(used)
    for group in groups:
        for data in dict.fromkeys(one.data for one in group):
            check_row([one for one in group if one.data == data], varies)
    domains = held_out(used)
    filled = [_row(row, group, columns, domains, varies) for row, group in zip(rows, groups, strict=True)]
    notes = []
    if used:
        rule, split = SELECTIONS[used[0].config.selection], used[0].config.split_seed
        notes.append(f"Mean and standard error over seeds; selection: {rule}; split {split}.")
        notes.append("A mean is over all held-out domains, or it is missing.")
    labels, decimals = [column.label for column in columns], [column.decimals for column in columns]
    units = ["%" if column.percent else "" for column in columns]
    return {"columns": labels, "decimals": decimals, "units": units, "rows": filled, "notes": notes}


def _row(
    row: Row, group: Sequence[Result], columns: Sequence[Column], domains: Domains, varies: Sequence[str]
) -> dict[str, Any]:
    cells: dict[str, Cell | None] = {}
    for column in columns:
        mean = _mean([cells[label] for label in column.mean_of])
        cells[column.label] = mean if column.mean_of else _ours(group, column, domains, varies)
    counts = sorted({one["n"] for one in cells.values() if one is not None and group[0].kind is None})
    about = {
        "label": row.label,
        "cells": [_beside(ours, *published) for ours, published in zip(cells.values(), row.published, strict=True)],
        "seeds": " to ".join(str(count) for count in dict.fromkeys([*counts[:1], *counts[-1:]])) or None,
        "networks": max((one.members for one in group), default=None),
        "bits": bits(group[0].config) if group else None,
    }
    return about | of_files(group, domains)


def _ours(group: Sequence[Result], column: Column, domains: Domains, varies: Sequence[str]) -> Cell | None:
    found = [one for one in group if column.data in (None, one.data)]
    if not found:
        return None
    return cell(found, column, [column.target] if column.target else domains[found[0].data], varies)


def _mean(cells: Sequence[Cell | None]) -> Cell | None:
    """Of columns of several data sets: no seed is common to them, so there is no error."""
    found = [one for one in cells if one is not None]
    if not found or len(found) < len(cells):
        return None
    return {"mean": statistics.fmean(one["mean"] for one in found), "error": None, "n": min(one["n"] for one in found)}


def _beside(ours: Cell | None, published: float | None, error: float | None) -> Cell | None:
    if ours is None and published is None:
        return None
    return {**(ours or {"mean": None, "error": None, "n": 0}), "published": published, "published_error": error}
