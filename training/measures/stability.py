"""How steady a network's accuracy on the target is while it trains (QT-DoG, figure 4)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from qdeploy.errors import InputError
from qdeploy.training.measures.draws import Draws
from qdeploy.training.measures.measured_run import MeasuredRun
from qdeploy.training.run_files import LOG, check_record, sound

LAST = 10  # records


def stability(records: Sequence[Mapping[str, Any]], selected: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's evaluations in order, as log.jsonl has them, and of the selected one.

    Returns {"switch": the update of the first record of a quantized network (None: there is none), "last_records",
    "std_of_last": the standard deviation (over n) of the target's accuracy in the last 10 records, "selected": that of
    the selected record, "best": the best of the records that could be selected, "best_minus_selected", "table": rows of
    "update", "validation", "test", "quantized", "eligible"}. Accuracies are shares. Raises InputError for no records.
    """
    if not records:
        raise InputError("expected the records of a run, got none - at stability")
    keys = ("update", "validation", "test", "quantized", "eligible")
    table = [{key: record[key] for key in keys} for record in records]
    last = [row["test"] for row in table[-LAST:]]
    best = max([row["test"] for row in table if row["eligible"]], default=selected["test"])
    return {
        "switch": next((row["update"] for row in table if row["quantized"]), None),
        "last_records": len(last),
        "std_of_last": statistics.pstdev(last),
        "selected": selected["test"],
        "selected_update": selected["update"],
        "best": best,
        "best_minus_selected": best - selected["test"],
        "table": table,
    }


def of_run(run: MeasuredRun, draws: Draws) -> dict[str, Any]:
    """From its log.jsonl."""
    path = run.folder / LOG
    with sound(path):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            check_record(record)
    return stability(records, run.done.selected)
