"""The first step sizes, and the factor on their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from qdeploy.kernels import cpu_lsq

MIN_STEP = 1e-8


def training_scale(numel: int, numel_per_step: int, qmax: int, mode: str) -> float:
    """The factor g on the gradient of a step size (LSQ section 2.2); `mode` as `grad_scale` of `quantize_`."""
    counts = {"tensor": numel * qmax, "channel": numel_per_step * qmax, "none": 1}
    return counts[mode] ** -0.5


@torch.no_grad()
def initial_step(rows: Tensor, qmin: int, qmax: int, method: str) -> Tensor:
    """First step sizes, [rows], for float32 values [rows, n]; `method` as `init` of `quantize_`. At least 1e-8."""
    if method == "lsq":
        step = 2 * rows.abs().mean(1) / qmax**0.5
    else:
        low = rows.amin(1) / qmin if qmin else torch.zeros_like(rows[:, 0])
        step = torch.maximum(rows.amax(1) / qmax, low)
        if method == "mse":
            step = _least_squares_step(rows, step.clamp(min=MIN_STEP), qmin, qmax)
    return step.clamp(min=MIN_STEP)


def _least_squares_step(rows: Tensor, largest: Tensor, qmin: int, qmax: int) -> Tensor:
    """argmin_s ||v - Q(v; s)||^2 for each row: a grid of eighths of an octave, then golden section.

    The grid spans largest * 2^-6, for a row whose largest value is far from the others, to largest * 2^0.5: a signed
    range has one code more below zero, so a step that clips nothing may be too small for the negative values (-1.05
    many times and 1 once have their optimum in 2 bits at 1.05).
    """

    def error(step: Tensor) -> Tensor:
        if cpu_lsq.takes(rows, step, 0):
            return cpu_lsq.errors(rows, step, qmin, qmax)
        s = step[:, None]
        return rows.div(s).clamp_(qmin, qmax).round_().mul_(s).sub_(rows).square_().sum(1, dtype=torch.float64)

    best, best_error = largest, error(largest)

    def keep_better(step: Tensor, err: Tensor) -> None:
        nonlocal best, best_error
        better = err < best_error
        best, best_error = torch.where(better, step, best), torch.where(better, err, best_error)

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
        low, high = torch.where(to_left, low, left), torch.where(to_left, right, high)
    return best
