"""The codes of a tensor, u8 or s16: `real = scale * (code - zero_point)`.

Real 0 is always exact: it is what padding and ReLU produce. A tensor that is never negative gets zero point 0 and all
256 codes for its positive side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

S16 = 32_767
HEAD_ROOM = 1.5  # of s16 streams: a sum beyond calibration's largest costs nothing, a saturated one does


@dataclass(frozen=True)
class Grid:
    """The codes of one tensor; `low` and `high` are the codes it may take (a 4-bit activation has 0..15)."""

    scale: float  # an f32 greater than 0
    zero_point: int
    low: int = 0
    high: int = 255

    @property
    def dtype(self) -> str:
        return "s16" if self.high > 255 else "u8"

    @property
    def most(self) -> int:
        """The largest magnitude of a code of its type."""
        return S16 if self.dtype == "s16" else 255

    def same_steps(self, other: Grid) -> bool:
        """Whether a code that both have is the same number."""
        return (self.scale, self.zero_point, self.dtype) == (other.scale, other.zero_point, other.dtype)

    def includes(self, other: Grid) -> bool:
        """Whether rounding what has the codes of `other` changes nothing."""
        return self.same_steps(other) and self.low <= other.low and other.high <= self.high

    def codes(self, real: ArrayLike) -> np.ndarray:
        """Nearest codes of `real`, in float64 and clamped: what tables of the file are made of."""
        return np.clip(np.rint(np.asarray(real, np.float64) / self.scale) + self.zero_point, self.low, self.high)

    def real(self, codes: ArrayLike) -> np.ndarray:
        """The real numbers (float64) that `codes` stand for."""
        return self.scale * (np.asarray(codes, np.float64) - self.zero_point)

    def covers(self, low: float, high: float) -> bool:
        """Whether every real number from `low` to `high` is at most half a scale away from a code."""
        half = self.scale / 2
        return bool(self.real(self.low) - half <= low and high <= self.real(self.high) + half)


def grid_of_range(low: float, high: float) -> Grid:
    """The finest grid that holds [low, high] and 0. All zeros (a dead layer) get scale 1: any grid is exact."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if high - low < 1e-20:
        return Grid(1.0, 0)
    exact = -low / (high - low) * 255
    scale, zero_point = min((_least_scale(low, high, z), z) for z in (int(exact), min(int(exact) + 1, 255)))
    return Grid(float(np.float32(scale)), zero_point)


def stream_grid(low: float, high: float) -> Grid:
    """s16 codes of a residual stream."""
    largest = max(-low, high)
    scale = float(np.float32(HEAD_ROOM * largest / S16)) if largest > 1e-20 else 1.0
    return Grid(scale, 0, -S16, S16)


def _least_scale(low: float, high: float, zero_point: int) -> float:
    """The least scale with which both ends have a code. An end on a side without codes is half of it from 0 at most."""
    below = -low / zero_point if zero_point else 2 * -low
    above = high / (255 - zero_point) if zero_point < 255 else 2 * high
    return max(below, above)
