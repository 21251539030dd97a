"""How far weights can be moved until training accuracy has changed by a tenth (Dziugaite et al. 2020; QGen, B.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

HIGHEST, CHANGE, TOLERANCE, STEPS, DRAWS = 2.0, 0.1, 0.01, 15, 10
SATURATED = 1.99  # above it the search has run into HIGHEST: the value says nothing of the network


@dataclass(frozen=True)
class Found:
    """What `bisected` ended with: the value, the accuracy there, and the number of values that were tried."""

    value: float
    accuracy: float
    steps: int

    @property
    def saturated(self) -> bool:
        return self.value > SATURATED


def bisected(accuracy_at: Callable[[float], float], accuracy: float) -> Found:
    """The value in 0 to HIGHEST at which `accuracy_at` is 0.1 away from `accuracy`, to 0.01 or after 15 steps."""
    low, high, steps = 0.0, HIGHEST, 0
    while steps < STEPS:
        steps += 1
        value = (low + high) / 2
        found = accuracy_at(value)
        change = abs(found - accuracy)
        if abs(change - CHANGE) < TOLERANCE:
            break
        low, high = (low, value) if change > CHANGE else (value, high)
    return Found(value, found, steps)
