"""LSQ, learned step size quantization (Esser et al., ICLR 2020; QT-DoG section 3.1), as one PyTorch operator.

    x  = v / s                           IEEE division
    r  = rint(min(max(x, qmin), qmax))   the integer code, ties to even
    vq = r * s                           the fake-quantized value

    dL/dv = G where qmin <= x <= qmax, else 0                     (straight-through, bounds included)
    dL/ds = grad_scale * sum G * (r - x where qmin <= x <= qmax, else r)

The bounds are inside: where min-max or MSE initialization puts the largest weight exactly on qmax, that weight keeps
its gradient. Everything is computed in float32 whatever the type of the value; the sum of dL/ds runs in float64,
because its terms cancel (|r - x| <= 1/2 with either sign).

This file is the definition in plain PyTorch, for any device. `lsq` and its gradient are opaque custom operators, so a
network exported by torch.export holds exactly one `torch.ops.qdeploy.lsq.default` node per quantizer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdeploy.errors import InputError


def _aligned(step: Tensor, value: Tensor, axis: int) -> Tensor:
    """The steps as float32, shaped to broadcast against the value; raises InputError where they do not fit."""
    if axis == -1:
        if step.numel() != 1:
            raise InputError(f"expected one step for the whole tensor, got shape {list(step.shape)} - at qdeploy::lsq")
        return step.float().reshape(())
    if not 0 <= axis < value.dim() or step.shape != (value.shape[axis],):
        raise InputError(
            f"expected one step per element of axis {axis} of a value of shape {list(value.shape)}, "
            f"got shape {list(step.shape)} - at qdeploy::lsq"
        )
    return step.float().reshape([-1 if i == axis else 1 for i in range(value.dim())])


def _rounded(value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int) -> tuple[Tensor, Tensor]:
    """The codes as float32, and the steps that broadcast against them."""
    s = _aligned(step, value, axis)
    return value.float().div(s).clamp_(qmin, qmax).round_(), s


@torch.library.custom_op("qdeploy::lsq", mutates_args=())
def lsq(value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float) -> Tensor:
    """Fake-quantizes `value` with learned steps.

    Args:
        value: any shape; float32, bfloat16 or float16. The result has its shape and type.
        step: the step sizes, > 0: shape [] or [1] when `axis` is -1, else [value.shape[axis]].
        qmin, qmax: the integer range, e.g. -64 and 63 for 7 signed bits, 0 and 255 for 8 unsigned bits.
        axis: the axis along which every slice has its own step, or -1 for one step.
        grad_scale: factor on the gradient of the steps (training_scale in `qdeploy.training.quantize`).

    Raises:
        InputError: the steps do not fit the value and the axis.
    """
    codes, s = _rounded(value, step, qmin, qmax, axis)
    return codes.mul_(s).to(value.dtype)


@lsq.register_fake
def _(value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float) -> Tensor:
    _aligned(step, value, axis)
    return torch.empty_like(value)


@torch.library.custom_op("qdeploy::lsq_backward", mutates_args=())
def lsq_backward(
    grad: Tensor, value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `lsq` for `value` and `step`, given that of its result."""
    s = _aligned(step, value, axis)
    x = value.float() / s
    inside = (x >= qmin) & (x <= qmax)
    grad_value = torch.where(inside, grad, 0)
    codes = x.clamp(qmin, qmax).round_()
    terms = torch.where(inside, codes - x, codes).mul_(grad)
    rest = [i for i in range(value.dim()) if i != axis]
    total = terms.sum(dim=rest, dtype=torch.float64) if rest else terms.double()
    return grad_value, total.mul_(grad_scale).to(step.dtype).reshape(step.shape)


@lsq_backward.register_fake
def _(
    grad: Tensor, value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(step)


def _save(ctx, inputs, output) -> None:
    value, step, *ctx.constants = inputs
    ctx.save_for_backward(value, step)


def _backward(ctx, grad: Tensor):
    return *lsq_backward(grad, *ctx.saved_tensors, *ctx.constants), None, None, None, None


lsq.register_autograd(_backward, setup_context=_save)


@torch.no_grad()
def lsq_codes(value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int) -> Tensor:
    """The integer codes that `lsq` multiplies by the steps: int8, or uint8 when `qmin` is not negative."""
    codes, _ = _rounded(value, step, qmin, qmax, axis)
    return codes.to(torch.int8 if qmin < 0 else torch.uint8)
