"""The table of accuracies that ends `qdeploy train` and `qdeploy combine`."""

from __future__ import annotations

import statistics
from typing import Any

from qdeploy.terminal import write
from qdeploy.training.config import IN_DOMAIN

_CHOSEN = {
    "validation": "the evaluation chosen by training-domain validation",
    "oracle": "the evaluation chosen by images of these domains (oracle)",
    "last": "the last evaluation",
    "lowest-train-loss": "the evaluation with the lowest training loss",
}


def show_results(summary: dict[str, Any]) -> None:
    """Prints, in percent, each of "members" and their mean, what there is of "ensemble" by its rules, "average" and
    "file"."""
    test, members = summary["config"]["test_domain"], summary["members"]
    if test == IN_DOMAIN:
        measured = "20% of each domain"
    else:
        measured = f"the held-out domain{'s' if len(members[0]['tests']) > 1 else ''} {test}"
    write(f"Accuracy on {measured}, at {_CHOSEN[summary['config']['selection']]}")
    rows = [_columns(member["tests"], member["test"]) for member in members]
    write(f"{'seed':>8} {'update':>6} {'validation':>11}" + "".join(f" {name:>11}" for name in rows[0]))
    for member, row in zip(members, rows, strict=True):
        write(f"{member['seed']:>8} {member['update']:>6} {member['validation']:>11.2%}" + _cells(row))
    if len(members) > 1:
        means = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
        error = statistics.stdev(member["test"] for member in members) / len(members) ** 0.5
        write(f"{'mean':>8} {'':>6} {'':>11}{_cells(means)} +- {error:.2%} (standard error)")
    for rule, accuracy in summary.get("ensemble", {}).items():
        write(f"ensemble, {rule:<17}" + _cells(_columns(summary["ensemble_tests"][rule], accuracy)))
    if "average" in summary:
        average = summary["average"]
        row = _columns(average["tests"], average["test"])
        write(f"{'average':>8} {'':>6} {average['validation']:>11.2%}" + _cells(row))
    if "file" in summary:
        file = summary["file"]
        write(f"{file['path']}: {file['bytes']:,} bytes")
        write(f"int8 engine {file['test']:.2%}, the same class as the trained network in {file['agreement']:.2%}")


def _columns(tests: dict[str, float], mean: float) -> dict[str, float]:
    """The accuracy of each domain, and their mean where there are several."""
    return tests if len(tests) == 1 else {**tests, "mean": mean}


def _cells(row: dict[str, float]) -> str:
    return "".join(f" {accuracy:>{max(11, len(name))}.2%}" for name, accuracy in row.items())
