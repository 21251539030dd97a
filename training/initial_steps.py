"""The first step sizes, and the factor on their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from qdeploy.exporter.least_squares import least_squares_step
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
    def error(step: Tensor) -> Tensor:
        if cpu_lsq.takes(rows, step, 0):
            return cpu_lsq.errors(rows, step, qmin, qmax)
        s = step[:, None]
        return rows.div(s).clamp_(qmin, qmax).round_().mul_(s).sub_(rows).square_().sum(1, dtype=torch.float64)

    return least_squares_step(error, largest)
