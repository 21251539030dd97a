"""The learning rate of each update, as a share of the first one. A run that goes on asks for the next: no state."""

from __future__ import annotations

import math
from typing import Protocol

from qdeploy.errors import InputError


class Schedule(Protocol):
    """How learning rates change; those of all groups of an optimizer do so together."""

    def factor(self, t: int) -> float:
        """Of the initial learning rate, at update `t` (from 0). It follows from `t` alone."""
        ...


class Constant(Schedule):
    """The initial learning rate throughout, as DomainBed has it."""

    def factor(self, t: int) -> float:
        return 1.0


class MultiStep(Schedule):
    """Times `gamma` from each milestone on, a share of the run: share * updates, rounded, is the first such update.

    QGen (arXiv 2404.11769) has 1/3 and 2/3 for NiN, 0.4 and 0.8 for ResNet on CIFAR, and 0.25, 0.5 and 0.75 on
    ImageNet. Raises InputError for a share outside 0 to 1, or a gamma that is not above 0.
    """

    def __init__(self, milestones: tuple[float, ...] = (0.5, 0.75), gamma: float = 0.1, *, updates: int):
        if wrong := [share for share in milestones if not 0 <= share <= 1]:
            raise InputError(f"expected milestones from 0 to 1, shares of the run, got {wrong[0]} - at MultiStep")
        if not 0 < gamma < math.inf:
            raise InputError(f"expected gamma above 0, got {gamma} - at MultiStep")
        self.gamma, self.firsts = gamma, [round(share * updates) for share in milestones]

    def factor(self, t: int) -> float:
        return self.gamma ** sum(t >= first for first in self.firsts)


class Cosine(Schedule):
    """Half a cosine (arXiv 1608.03983, equation 5, no restarts): 1 at update 0, 0 where update `updates` would be."""

    def __init__(self, *, updates: int):
        self.updates = updates

    def factor(self, t: int) -> float:
        return (1 + math.cos(math.pi * t / self.updates)) / 2


class Linear(Schedule):
    """A line from 1 down to 0 where update `updates` would be, as WILDS trains DistilBERT; before it, over the share
    `warmup` of the run, one from 0 up to 1. Raises InputError for a share outside 0 to below 1."""

    def __init__(self, warmup: float = 0.0, *, updates: int):
        if not 0 <= warmup < 1:
            raise InputError(f"expected a share of the run from 0 to below 1, got {warmup} - at Linear")
        self.updates, self.warmup = updates, round(warmup * updates)

    def factor(self, t: int) -> float:
        return t / self.warmup if t < self.warmup else (self.updates - t) / (self.updates - self.warmup)
