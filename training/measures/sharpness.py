"""Sharpness measures: how far the weights can go uphill until a tenth of training accuracy is gone.

    sharp-init      ||W-W0||^2 log(2 omega) / (4 alpha^2) + log(m/delta) + 10
    sharp-orig      ||W||^2    log(2 omega) / (4 alpha^2) + log(m/delta) + 10
    sharp-mag-init  1/4 sum_i log( (eps^2 + (alpha'^2 + 4 log(2 omega/delta)) ||W-W0||^2/omega)
                                   / (eps^2 + alpha'^2 d_i^2) ) + log(m/delta) + 10
    sharp-mag-orig  with ||W||^2 in place of ||W-W0||^2

alpha is found with 20 steps of ascent on the loss, a minibatch each, in the box |u_i| <= alpha around the weights, and
alpha' in |u_i| <= alpha' |w_i| + eps; on all parameters. The first of 10 draws begins at the weights, the others
anywhere in the box. Reading "mean" takes their mean accuracy, as QGen does, "min" the lowest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qdeploy.training.measures.bisection import DRAWS
from qdeploy.training.measures.bounds import (
    DELTA,
    EPSILON,
    Denominator,
    Prepared,
    Weights,
    confidence,
    magnitude_aware,
    measured,
)
from qdeploy.training.measures.draws import Draws, all_of, anew
from qdeploy.training.measures.losses import Batch
from qdeploy.training.measures.measured_run import MeasuredRun
from qdeploy.training.measures.weights import uniform
from qdeploy.training.seeds import seed_hash

READINGS: dict[str, Callable[[Sequence[float]], float]] = {"mean": statistics.fmean, "min": min}
ASCENT, MINIBATCH = 20, 128  # steps of a draw; images of a step, as in QGen's training
AscentRate = float | Literal["auto"]


def sharpness(
    net: nn.Module,
    initial: nn.Module,
    batches: Iterable[Batch],
    *,
    m: int,
    orig_denominator: Denominator = "d",
    ascent_lr: AscentRate = 1e-4,
    seed: int = 0,
    draws: Draws = anew,
) -> dict[str, Any]:
    """The four measures in both readings.

    Args:
        net, initial, batches, m, orig_denominator: as for `pac_bayes`.
        ascent_lr: of a step of SGD; "auto": a tenth of the box on the signs of the gradient, which reaches its sides.
        seed: of starts and minibatches. Those of draw i are the same at every alpha.

    Returns and raises as `pac_bayes`; "searched" is alpha or alpha'.
    """
    prepared = Prepared.of(net, initial, batches)
    climb = _Climb(prepared, ascent_lr, seed)

    @cache  # both readings begin with the same values
    def accuracies(aware: bool, alpha: float) -> list[float]:
        name = f"{'magnitude-aware, ' if aware else ''}alpha {alpha!r}, draw"
        return all_of(draws, name, DRAWS, partial(climb.accuracy, aware, alpha))

    def accuracy_at(reading: str, aware: bool, alpha: float) -> float:
        return READINGS[reading](accuracies(aware, alpha))

    def bound(name: str, alpha: float) -> float:
        return sharpness_bound(prepared.weights, name, alpha, m, orig_denominator)

    return measured(prepared, "sharp", READINGS, accuracy_at, bound, m)


def sharpness_bound(weights: Weights, name: str, alpha: float, m: int, orig_denominator: Denominator = "d") -> float:
    """The bound of a measure by its name, before it is divided by m."""
    origin, omega = name.rpartition("-")[2], len(weights.final)
    if "mag" not in name:
        return weights.squared_norm(origin) * math.log(2 * omega) / (4 * alpha**2) + confidence(m)
    numerator = alpha**2 + 4 * math.log(2 * omega / DELTA)
    return magnitude_aware(weights, origin, numerator, alpha, orig_denominator) + confidence(m)


class _Climb:
    """The ascent of a draw."""

    def __init__(self, prepared: Prepared, ascent_lr: AscentRate, seed: int):
        self._prepared, self._lr, self._seed = prepared, ascent_lr, seed
        self._inputs = torch.cat([inputs for inputs, _ in prepared.batches])
        self._labels = torch.cat([labels for _, labels in prepared.batches])

    def accuracy(self, aware: bool, alpha: float, number: int) -> float:
        """After the last step."""
        center = self._prepared.place.center
        box = center.abs() * alpha + EPSILON if aware else torch.full_like(center, alpha)
        moved = torch.zeros_like(center)
        if number:
            moved = uniform(len(center), seed_hash(self._seed, "start", number)).to(center) * box
        for inputs, labels in self._minibatches(number):
            gradient = self._gradient(center + moved, inputs, labels)
            step = gradient.sign() * box / 10 if self._lr == "auto" else gradient * self._lr
            moved = torch.minimum(torch.maximum(moved + step, -box), box)
        return self._prepared.accuracy_at(moved)

    def _gradient(self, vector: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        place = self._prepared.place
        place.move(vector)
        with torch.enable_grad():
            return place.gradient(functional.cross_entropy(place.net(inputs).float(), labels))

    def _minibatches(self, number: int) -> list[Batch]:
        """Of the images in an order of their own, which begins anew where they are too few."""
        generator = torch.Generator().manual_seed(seed_hash(self._seed, "minibatches", number))
        size = min(MINIBATCH, len(self._labels))
        order = torch.randperm(len(self._labels), generator=generator).repeat(-(-ASCENT * size // len(self._labels)))
        parts = order[: ASCENT * size].to(self._labels.device).split(size)
        return [(self._inputs[part], self._labels[part]) for part in parts]


def of_run(
    run: MeasuredRun,
    draws: Draws,
    *,
    orig_denominator: Denominator = "d",
    ascent_lr: AscentRate = 1e-4,
    seed: int = 0,
) -> dict[str, Any]:
    """On training images of the source domains, all together."""
    options: dict[str, Any] = {"orig_denominator": orig_denominator, "ascent_lr": ascent_lr, "seed": seed}
    return sharpness(run.net, run.initial, run.all_training, m=run.training_count, draws=draws, **options)
