"""How long a call takes: the median of many calls, and how far apart they lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, and the number of calls that were timed. `spread`: see the function of that name."""

    median: float
    minimum: float
    spread: float
    calls: int

    @classmethod
    def of(cls, ms: Sequence[float] | np.ndarray, calls: int) -> Timing:
        """`ms`: of each call, or the mean of each turn of some calls."""
        return cls(float(np.median(ms)), float(np.min(ms)), spread(ms), calls)

    def over(self, other: Timing) -> tuple[float, float]:
        """The ratio of the medians, and its spread, which follows from the relative spreads of the two."""
        ratio = self.median / other.median
        return ratio, ratio * math.hypot(self.spread / self.median, other.spread / other.median)


def spread(values: Sequence[float] | np.ndarray) -> float:
    """Half the distance between the quartiles."""
    low, high = np.percentile(values, (25, 75))
    return float(high - low) / 2
