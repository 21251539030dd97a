"""Gaps: how much larger the loss is on images that do not train, clean and corrupted (QGen, tables 1, 4 and 5).

    gap = L_test - L_train(clean)

Both losses stand beside every gap: few bits make it smaller by a higher L_train as well, which helps nobody.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qdeploy.training.corruptions import SEVERITIES, available, corrupt
from qdeploy.training.inputs import Images
from qdeploy.training.measures.draws import Draws, anew
from qdeploy.training.measures.losses import Batch, Domains, loss_and_accuracy
from qdeploy.training.measures.measured_run import MeasuredRun
from qdeploy.training.parallel import parallel_map

CHUNK = 32  # images that a worker corrupts at once

Corrupted = Callable[[str, int], Domains]  # by kind and severity


def gaps(
    net: nn.Module,
    training: Domains,
    tests: Mapping[str, Domains],
    corrupted: Corrupted | None = None,
    kinds: tuple[str, ...] = (),
    *,
    draws: Draws = anew,
) -> dict[str, Any]:
    """Losses are means over domains of the mean cross-entropy, accuracies are shares.

    Args:
        training: clean images that train, by domain.
        tests: clean images by part, such as "validation" and "target", and by domain.
        corrupted: the images of the part that "target" names, corrupted; asked for each of `kinds` at severity 1 to 5.

    Returns {"train_loss", "train_accuracy", "kinds", "table": rows of "part", "kind" ("clean" or one of `kinds`),
    "severity" (0: clean), "train_loss", "test_loss", "gap" and "test_accuracy"; "corruption_gap", the mean over kinds
    and severities, and "corruption_gaps", {severity: the mean over kinds}, where there are kinds}.
    """
    train_loss, train_accuracy = draws("training images", lambda: loss_and_accuracy(net, training))
    table = []

    def add(part: str, kind: str, severity: int, domains: Callable[[], Domains]) -> None:
        name = f"{part}, {kind} {severity}"
        loss, accuracy = draws(name, lambda: loss_and_accuracy(net, domains()))
        row = {"part": part, "kind": kind, "severity": severity, "train_loss": train_loss, "test_loss": loss}
        table.append({**row, "gap": loss - train_loss, "test_accuracy": accuracy})

    for part, domains in tests.items():
        add(part, "clean", 0, partial(dict, domains))
    if corrupted is not None:
        for kind in kinds:
            for severity in range(1, SEVERITIES + 1):
                add("target", kind, severity, partial(corrupted, kind, severity))
    found = {"train_loss": train_loss, "train_accuracy": train_accuracy, "kinds": [*kinds], "table": table}
    return found | (_means(table) if kinds else {})


def _means(table: list[dict[str, Any]]) -> dict[str, Any]:
    of = {s: [row["gap"] for row in table if row["severity"] == s] for s in range(1, SEVERITIES + 1)}
    means = {str(severity): statistics.fmean(found) for severity, found in of.items()}
    return {"corruption_gap": statistics.fmean(means.values()), "corruption_gaps": means}


def corrupted_images(
    images: np.ndarray, numbers: np.ndarray, kind: str, severity: int, *, frost: Path | None = None, workers: int = 1
) -> np.ndarray:
    """Of u8 [n, C, H, W] and their n numbers, as `corrupt` takes them: u8 [n, C, H, W]."""
    starts = range(0, len(images), CHUNK)
    jobs = [(images[i : i + CHUNK], numbers[i : i + CHUNK], kind, severity, frost) for i in starts]
    with parallel_map(workers) as run:
        return np.concatenate([*run(_corrupted_chunk, jobs)])


def _corrupted_chunk(job: tuple[np.ndarray, np.ndarray, str, int, Path | None]) -> np.ndarray:
    images, numbers, kind, severity, frost = job
    last = images.transpose(0, 2, 3, 1)
    found = [corrupt(x, kind, severity, int(number), frost=frost) for x, number in zip(last, numbers, strict=True)]
    return np.stack(found).transpose(0, 3, 1, 2)


def of_run(run: MeasuredRun, draws: Draws, *, frost: str = "") -> dict[str, Any]:
    """On training, validation and target images; these corrupted, too, if they are images: in 14 kinds, or in 15 with a
    folder of photographs of `frost`. The number of an image is its position in its domain."""
    tests = {"validation": run.validation, "target": run.target}
    if not isinstance(run.benchmark.inputs, Images):
        return gaps(run.net, run.training, tests, draws=draws)
    folder = Path(frost) if frost else None
    pixels = {name: run.benchmark.domains[i].batch(where).numpy() for name, (i, where) in run.target_part.items()}

    def batches(name: str, kind: str, severity: int) -> list[Batch]:
        (_, where), clean = run.target_part[name], run.target[name]
        workers = max(1, run.config.workers)
        made = corrupted_images(pixels[name], where, kind, severity, frost=folder, workers=workers)
        parts = torch.from_numpy(made).split([len(labels) for _, labels in clean])
        inputs = [run.benchmark.inputs.for_network(part.to(run.device)) for part in parts]
        return [(one, labels) for one, (_, labels) in zip(inputs, clean, strict=True)]

    def corrupted(kind: str, severity: int) -> Domains:
        return {name: batches(name, kind, severity) for name in pixels}

    return gaps(run.net, run.training, tests, corrupted, available(folder), draws=draws)
