"""What PAC-Bayes and sharpness bounds have in common (QGen, equations 15 to 22, as they are printed).

W is the vector of the weights, W0 that at initialization, d_i = w_i - w0_i, omega their number, m that of all training
images, eps = 1e-3 and delta = 0.1. BatchNorm is folded in both networks. A measure is sqrt(bound / m).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.training.measures.bisection import bisected
from qdeploy.training.measures.losses import Batch, accuracy
from qdeploy.training.measures.weights import Place, channels_last, flat, folded, weights

EPSILON, DELTA = 1e-3, 0.1
NORMS = {"norm": "orig", "distance": "init"}

Denominator = Literal["d", "w"]


@dataclass(frozen=True)
class Weights:
    """W and W0, f64 [omega]."""

    final: Tensor
    initial: Tensor

    @property
    def distance(self) -> Tensor:
        return self.final - self.initial

    def squared_norm(self, origin: str) -> float:
        """||W - W0||^2 for "init", ||W||^2 for "orig"."""
        return float((self.distance if origin == "init" else self.final).square().sum())

    def spread(self, origin: str, denominator: Denominator) -> Tensor:
        """What stands below the fraction of the magnitude-aware measures: d_i, as printed, or w_i in those of "orig"
        (`denominator`), as their derivation has it."""
        return self.final if origin == "orig" and denominator == "w" else self.distance


def measure(bound: float, m: int) -> float:
    """sqrt(bound / m); no number where a bound is negative, which the printed "orig" forms can be."""
    return math.sqrt(bound / m) if bound >= 0 else math.nan


def confidence(m: int) -> float:
    return math.log(m / DELTA) + 10


def magnitude_aware(weights: Weights, origin: str, numerator: float, moved: float, denominator: Denominator) -> float:
    """1/4 sum_i log( (eps^2 + numerator R / omega) / (eps^2 + moved^2 d_i^2) )."""
    above = EPSILON**2 + numerator * weights.squared_norm(origin) / len(weights.final)
    below = EPSILON**2 + moved**2 * weights.spread(origin, denominator).square()
    return float((math.log(above) - below.log()).sum()) / 4


@dataclass
class Prepared:
    """A network and its images as the searches take them."""

    place: Place
    batches: list[Batch]
    weights: Weights
    accuracy: float = field(init=False)  # of the weights as they are

    def __post_init__(self) -> None:
        self.accuracy = accuracy(self.place.net, self.batches)

    @classmethod
    def of(cls, net: nn.Module, initial: nn.Module, batches: Iterable[Batch]) -> Prepared:
        """Raises InputError where there are no images, or where the networks have other weights."""
        batches = channels_last([*batches])
        if not batches:
            raise InputError("expected training images, got none - at the measure")
        shown = batches[0][0][:2]
        net, initial = folded(net, shown), folded(initial, shown)
        was, now = weights(initial), weights(net)
        if [(name, one.shape) for name, one in was.items()] != [(name, one.shape) for name, one in now.items()]:
            raise InputError("expected the weights that the network began with, got others - at the initial network")
        vectors = Weights(flat(now.values()).double(), flat(was.values()).double())
        return cls(Place(net), batches, vectors)

    def accuracy_at(self, moved: Tensor) -> float:
        """Of the weights moved by `moved`."""
        self.place.move(self.place.center + moved)
        return accuracy(self.place.net, self.batches)

    def deviation(self, size: float, aware: bool) -> Tensor | float:
        """sqrt(size^2 w_i^2 + eps^2) for each parameter, or `size` for all."""
        return (self.place.center.square() * size**2 + EPSILON**2).sqrt() if aware else size


def measured(
    prepared: Prepared,
    kind: str,
    readings: Iterable[str],
    accuracy_at: Callable[[str, bool, float], float],
    bound: Callable[[str, float], float],
    m: int,
) -> dict[str, Any]:
    """The four measures of a kind, "pac" or "sharp", in each reading; as `pac_bayes` returns them.

    accuracy_at(reading, magnitude-aware, sigma or alpha): what is searched; bound(name, what is found): of a measure.
    """
    table = []
    for reading in readings:
        for aware in (False, True):
            found = bisected(partial(accuracy_at, reading, aware), prepared.accuracy)
            for origin in ("init", "orig"):
                name = f"{kind}-{'mag-' if aware else ''}{origin}"
                row = {"measure": name, "reading": reading, "value": measure(bound(name, found.value), m)}
                row |= {"searched": found.value, "accuracy": found.accuracy, "steps": found.steps}
                table.append(row | {"change": found.accuracy - prepared.accuracy, "saturated": found.saturated})
    norms = {name: math.sqrt(prepared.weights.squared_norm(origin)) for name, origin in NORMS.items()}
    return {"accuracy": prepared.accuracy, "omega": len(prepared.weights.final), **norms, "m": m, "table": table}
