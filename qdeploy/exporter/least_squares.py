"""The step size with which rounding is off the least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def least_squares_step(error: Callable[[Any], Any], largest: Any) -> Any:
    """argmin of `error` for each row: a grid of eighths of an octave, then golden section.

    error: from step sizes [rows] to the squared error of each row; of numpy or of torch, as `largest` is.
    largest: step sizes that clip nothing. The grid spans largest * 2^-6, for a row whose largest value is far from the
        others, to largest * 2^0.5: a signed range has one code more below zero, so a step that clips nothing may be too
        small for the negative values (-1.05 many times and 1 once have their optimum in 2 bits at 1.05).
    """
    best, least = largest + 0, error(largest)

    def keep_better(step: Any, found: Any) -> None:
        better = found < least
        best[better], least[better] = step[better], found[better]

    for j in (*range(-4, 0), *range(1, 49)):
        step = largest * 2 ** (-j / 8)
        keep_better(step, error(step))
    # Between the neighbours of the best, 0.17 of it apart: 16 cuts by 0.618 reach 1e-4 of it.
    low, high = best * 2**-0.125, best * 2**0.125
    for _ in range(16):
        left, right = high - 0.618 * (high - low), low + 0.618 * (high - low)
        left_error, right_error = error(left), error(right)
        keep_better(left, left_error)
        keep_better(right, right_error)
        to_left = left_error < right_error
        high[to_left], low[~to_left] = right[to_left], left[~to_left]
    return best
