"""What the two objectives of GAQAT do to step sizes (figures 2 to 5), and whether these are where they should be
(table 1): a network with one of its step sizes changed is judged anew.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from qdeploy.errors import InputError
from qdeploy.training.attached_quantizers import quantizers
from qdeploy.training.csv_files import csv_rows
from qdeploy.training.measures.draws import Draws, anew
from qdeploy.training.measures.losses import Domains, loss_and_accuracy
from qdeploy.training.measures.measured_run import MeasuredRun
from qdeploy.training.methods.scales import COLUMNS, SCALES
from qdeploy.training.quantizer import Quantizer
from qdeploy.training.run_files import sound

FACTORS = (0.8, 0.9, 1.1, 1.2)


def scales(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the rows of scales.csv, in order: a step size at the end of a window each, numbers or their text.

    Returns {"windows", "table": the rows as numbers, with "agreement", the cosine of the two sums: 1 (same sign), -1
    (they pull against each other) or 0; "scales": rows of "scale", "opposed" and "frozen" (shares of windows),
    "disorder_task_first" and "disorder_task_last"}. Raises InputError for no rows.
    """
    table = [_row(row) for row in rows]
    if not table:
        raise InputError("expected windows of step sizes, got none - at scales")
    by_scale: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        by_scale.setdefault(row["scale"], []).append(row)
    summary = [
        {
            "scale": scale,
            "opposed": statistics.fmean(row["agreement"] < 0 for row in found),
            "frozen": statistics.fmean(row["frozen"] for row in found),
            "disorder_task_first": found[0]["disorder_task"],
            "disorder_task_last": found[-1]["disorder_task"],
        }
        for scale, found in by_scale.items()
    ]
    return {"windows": len({row["step"] for row in table}), "scales": summary, "table": table}


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    numbers: dict[str, Any] = {key: float(row[key]) for key in COLUMNS if key != "scale"}
    numbers |= {"step": int(row["step"]), "scale": row["scale"], "frozen": int(row["frozen"])}
    product = numbers["sum_task"] * numbers["sum_smooth"]
    return {key: numbers[key] for key in COLUMNS} | {"agreement": (product > 0) - (product < 0)}


@torch.no_grad()
def perturbed(
    net: nn.Module, parts: Mapping[str, Domains], factors: Sequence[float] = FACTORS, *, draws: Draws = anew
) -> list[dict[str, Any]]:
    """`net` judged with the steps of one quantizer at a time multiplied by a factor; afterwards it is as it was.

    parts: images by part, such as "validation" and "target", and by domain. Returns rows of "scale", "factor", "part",
    "loss", "accuracy" and "change", of the accuracy. The first are of the network as it is: scale None, factor 1.
    Raises InputError for a network in float.
    """
    found: dict[int, tuple[str, Quantizer]] = {}
    for name, quantizer in quantizers(net).items():
        found.setdefault(id(quantizer), (name, quantizer))  # a shared one once
    if not found:
        raise InputError("expected a network with quantizers, got one in float - at scales")
    judged = {part: draws(f"{part} as it is", partial(loss_and_accuracy, net, one)) for part, one in parts.items()}
    rows = [_judged(None, 1.0, part, outcome, outcome) for part, outcome in judged.items()]
    for name, quantizer in found.values():
        step = quantizer.step.detach().clone()
        for factor in factors:
            try:
                quantizer.step.mul_(factor)
                for part, domains in parts.items():
                    at = f"{name} x {factor}, {part}"
                    outcome = draws(at, partial(loss_and_accuracy, net, domains))
                    rows.append(_judged(name, factor, part, outcome, judged[part]))
            finally:
                quantizer.step.copy_(step)
    return rows


def _judged(
    scale: str | None, factor: float, part: str, outcome: Sequence[float], as_it_is: Sequence[float]
) -> dict[str, Any]:
    (loss, accuracy), (_, before) = outcome, as_it_is
    row = {"scale": scale, "factor": factor, "part": part, "loss": loss, "accuracy": accuracy}
    return {**row, "change": accuracy - before}


def of_run(run: MeasuredRun, draws: Draws, *, factors: tuple[float, ...] = FACTORS) -> dict[str, Any]:
    """From scales.csv of the run; "perturbed" on its validation and target images."""
    path = run.folder / SCALES
    if not path.exists():
        raise InputError(f"expected a run of GAQAT, which writes {SCALES}, got none - at {path}")
    with sound(path):
        found = scales(csv_rows(path, COLUMNS))
    parts = {"validation": run.validation, "target": run.target}
    return found | {"perturbed": perturbed(run.net, parts, factors, draws=draws)}
