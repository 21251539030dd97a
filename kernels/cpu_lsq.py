"""LSQ on a CPU by the engine's kernels (csrc/lsq.cc): one pass over memory forward and one backward, on torch's number
of threads. Values and their gradients have the bits of the definition in `lsq.py`; the gradient of a step size is the
rounding of a sum in float64 in another order.

Both passes on 2.36 M weights with steps per channel are 8 to 9 times as fast as autograd on the formulas as plain
tensors, on one thread of an Emerald Rapids; on 2,500 weights 1.4 times (bench/test_training.py).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qdeploy import _engine

# Where only the numpy side of qdeploy is at hand, as on a machine that has a GPU and no compiler, there is no engine.
HAS_ENGINE = hasattr(_engine, "lsq_forward")


def takes(value: Tensor, step: Tensor, axis: int) -> bool:
    """Whether the kernels compute this: float32 on a CPU, with one step size or one for each slice along axis 0, whose
    slices are rows of memory."""
    return (
        HAS_ENGINE
        and axis <= 0
        and value.dtype == step.dtype == torch.float32
        and value.device.type == step.device.type == "cpu"
        and value.numel() > 0
        and step.is_contiguous()
        and (value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last))
    )


def _flat(tensor: Tensor) -> np.ndarray:
    """Its numbers as they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).numpy()


def forward(value: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    """`lsq` of what `takes` accepts."""
    result = torch.empty_like(value)
    _engine.lsq_forward(_flat(value), _flat(step), qmin, qmax, _flat(result), torch.get_num_threads())
    return result


def backward(
    grad: Tensor, value: Tensor, step: Tensor, qmin: int, qmax: int, grad_scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of value and step, given that of the result, in whatever layout."""
    of_value, of_step = torch.empty_like(value), torch.empty_like(step)
    if grad.stride() != value.stride() or grad.dtype != torch.float32:
        grad = of_value.copy_(grad)
    results, threads = (_flat(of_value), _flat(of_step)), torch.get_num_threads()
    _engine.lsq_backward(_flat(grad), _flat(value), _flat(step), qmin, qmax, grad_scale, *results, threads)
    return of_value, of_step


def errors(rows: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    """The sum of the squared errors of each row, float64 [rows], for a value [rows, n] that `takes` accepts."""
    found = np.empty(len(rows))
    _engine.lsq_errors(_flat(rows), _flat(step), qmin, qmax, found, torch.get_num_threads())
    return torch.from_numpy(found)
