"""LSQ, learned step size quantization (Esser et al., ICLR 2020; QT-DoG section 3.1), as one PyTorch operator.

    x  = v / s                           IEEE division
    r  = rint(min(max(x, qmin), qmax))   the integer code, ties to even
    vq = r * s                           the fake-quantized value

    dL/dv = G where qmin <= x <= qmax, else 0                     (straight-through, bounds included)
    dL/ds = grad_scale * sum G * (r - x where qmin <= x <= qmax, else r)

The bounds are inside: where min-max or MSE initialization puts the largest weight exactly on qmax, that weight keeps
its gradient. Everything is computed in float32 whatever the type of the value; the sum of dL/ds runs in float64,
because its terms cancel (|r - x| <= 1/2 with either sign).

This file is the definition in plain PyTorch. The kernels of `cpu_lsq.py` and, on a GPU, of `triton_lsq.py` compute the
same bits. `lsq` and its gradient are opaque custom operators, so a network exported by torch.export holds exactly one
`torch.ops.qdeploy.lsq.default` node per quantizer. `fake_quantize` is what a network calls: the same, with less
overhead, and in torch.func too.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qdeploy.errors import InputError
from qdeploy.kernels import cpu_lsq

if TYPE_CHECKING:
    from qdeploy.kernels.triton_lsq_many import Tables

# qmin, qmax and grad_scale of many values
Constants = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]

ONE, MANY = "triton_lsq", "triton_lsq_many"  # modules with kernels


def on_gpu(value: Tensor) -> bool:
    return value.is_cuda


def _kernels(module: str) -> ModuleType:
    """The Triton kernels, imported where a GPU needs them: on a CPU there may be no Triton."""
    try:
        return import_module(f"qdeploy.kernels.{module}")
    except ModuleNotFoundError as error:
        raise InputError(
            "expected triton for a network on a GPU, got none: pip install 'qdeploy[train]' - at qdeploy::lsq"
        ) from error


def _aligned(step: Tensor, value: Tensor, axis: int) -> Tensor:
    """The step sizes as float32, shaped to broadcast against the value; raises InputError where they do not fit."""
    if axis == -1:
        if step.numel() != 1:
            raise InputError(
                f"expected one step size for the whole tensor, got shape {list(step.shape)} - at qdeploy::lsq"
            )
        return step.float().reshape(())
    if not 0 <= axis < value.dim() or step.shape != (value.shape[axis],):
        raise InputError(
            f"expected one step size per element of axis {axis} of a value of shape {list(value.shape)}, "
            f"got shape {list(step.shape)} - at qdeploy::lsq"
        )
    return step.float().reshape([-1 if i == axis else 1 for i in range(value.dim())])


def _rounded(value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int) -> tuple[Tensor, Tensor]:
    """The codes as float32, and the step sizes that broadcast against them."""
    s = _aligned(step, value, axis)
    return value.float().div(s).clamp_(qmin, qmax).round_(), s


def _quantized(value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int) -> Tensor:
    """`lsq` by the kernels of the device, where it has some for this value."""
    if on_gpu(value):
        _aligned(step, value, axis)
        return _kernels(ONE).forward(value, step, qmin, qmax, axis)
    if cpu_lsq.takes(value, step, axis):
        _aligned(step, value, axis)
        return cpu_lsq.forward(value, step, qmin, qmax)
    codes, s = _rounded(value, step, qmin, qmax, axis)
    return codes.mul_(s).to(value.dtype)


def _gradients(
    grad: Tensor, value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float
) -> tuple[Tensor, Tensor]:
    """`lsq_backward` likewise."""
    if on_gpu(value):
        return _kernels(ONE).backward(grad, value, step, qmin, qmax, axis, grad_scale)
    if cpu_lsq.takes(value, step, axis):
        return cpu_lsq.backward(grad, value, step, qmin, qmax, grad_scale)
    x = value.float() / _aligned(step, value, axis)
    inside = (x >= qmin) & (x <= qmax)
    grad_value = torch.where(inside, grad, 0)
    codes = x.clamp(qmin, qmax).round_()
    terms = torch.where(inside, codes - x, codes).mul_(grad)
    rest = [i for i in range(value.dim()) if i != axis]
    total = terms.sum(dim=rest, dtype=torch.float64) if rest else terms.double()
    return grad_value, total.mul_(grad_scale).to(step.dtype).reshape(step.shape)


@torch.library.custom_op("qdeploy::lsq", mutates_args=())
def lsq(value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float) -> Tensor:
    """Fake-quantizes `value` with learned step sizes.

    Args:
        value: any shape; float32, bfloat16 or float16. The result has its shape and type.
        step: the step sizes, > 0: shape [] or [1] when `axis` is -1, else [value.shape[axis]].
        qmin, qmax: the integer range, e.g. -64 and 63 for 7 signed bits, 0 and 255 for 8 unsigned bits.
        axis: the axis along which every slice has its own step size, or -1 for one step size.
        grad_scale: factor on the gradient of the step sizes (training_scale in `qdeploy.training.initial_steps`).

    Raises:
        InputError: the step sizes do not fit the value and the axis.
    """
    return _quantized(value, step, qmin, qmax, axis)


@lsq.register_fake
def _(value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float) -> Tensor:
    _aligned(step, value, axis)
    return torch.empty_like(value)


@torch.library.custom_op("qdeploy::lsq_backward", mutates_args=())
def lsq_backward(
    grad: Tensor, value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `lsq` for `value` and `step`, given that of its result."""
    _aligned(step, value, axis)
    return _gradients(grad, value, step, qmin, qmax, axis, grad_scale)


@lsq_backward.register_fake
def _(
    grad: Tensor, value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(step)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, step, *ctx.constants = inputs
    ctx.save_for_backward(value, step)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *lsq_backward(grad, *ctx.saved_tensors, *ctx.constants), None, None, None, None


def _change(
    value: Tensor, step: Tensor, of_value: Tensor, of_step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float
) -> Tensor:
    """By how much `lsq` changes with changes of value and step, by the derivatives above.

    Straight-through, r - x is no function of value and step: `lsq` is linear in both until a value leaves the range,
    and its own second derivatives are zero. So those of a loss are what this linear map brings from behind it.
    """
    value, step = value.detach(), step.detach()
    x = value.float() / _aligned(step, value, axis)
    inside = (x >= qmin) & (x <= qmax)
    codes = x.clamp(qmin, qmax).round()
    slope = torch.where(inside, codes - x, codes) * grad_scale
    return (torch.where(inside, of_value, 0) + slope * _aligned(of_step, value, axis)).to(value.dtype)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, value, step, *ctx.constants = inputs
    ctx.save_for_backward(value, step)


def _second_backward(ctx: Any, of_value: Tensor, of_step: Tensor) -> tuple[Tensor | None, ...]:
    value, step = ctx.saved_tensors
    return _change(value, step, of_value, of_step, *ctx.constants), *[None] * 6


lsq.register_autograd(_backward, setup_context=_save)
lsq_backward.register_autograd(_second_backward, setup_context=_save_backward)


class _Direct(torch.autograd.Function):
    """`lsq` past the operator, whose two dispatches take 0.1 ms of a CPU, as long as 100,000 weights."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, step: Tensor, *constants: Any) -> Tensor:
        ctx.constants = constants
        ctx.save_for_backward(value, step)
        return _quantized(value, step, *constants[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # With gradients enabled, these will be differentiated.
        gradients = lsq_backward if torch.is_grad_enabled() else _gradients
        return *gradients(grad, *ctx.saved_tensors, *ctx.constants), *[None] * 4


def fake_quantize(value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float) -> Tensor:
    """`lsq`, wherever it is called: in torch.func, traced, compiled, or plainly on a CPU or GPU."""
    if torch.compiler.is_compiling():
        return lsq(value, step, qmin, qmax, axis, grad_scale)
    if torch._C._are_functorch_transforms_active():  # which know operators of torch alone
        return _lsq_in_func(value, step, qmin, qmax, axis, grad_scale)
    plain = type(value) in _PLAIN and type(step) in _PLAIN and torch._C._len_torch_dispatch_stack() == 0
    return (_Direct.apply if plain else lsq)(value, step, qmin, qmax, axis, grad_scale)


_PLAIN = (Tensor, torch.nn.Parameter)  # no fake tensors and the like, which are there to see the operator


def _lsq_in_func(value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float) -> Tensor:
    """`lsq` with its bits and derivatives of every order, for torch.func: vmap, grad, jvp and what is made of them."""
    s = _aligned(step.detach(), value, axis)
    codes = (value.detach().float() / s).clamp(qmin, qmax).round()
    change = _change(value, step, value, step, qmin, qmax, axis, grad_scale)
    return (codes * s).to(value.dtype) + (change - change.detach())  # zero, but for its derivatives


View = tuple[Sequence[int], Sequence[int], int]


def flat_views(values: Sequence[Tensor]) -> tuple[list[View], int]:
    """Shape, strides and first element of each value in one flat buffer, on 128 bytes of float32; and its elements."""
    views: list[View] = []
    size = 0
    for value in values:
        views.append((value.shape, value.stride(), size))
        size += (value.numel() + 31) // 32 * 32
    return views, size


# The tables of triton_lsq_many.py outlive a call, which memory of a CUDA graph of torch.compile may not.
_UNSAFE = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("qdeploy::lsq_many", mutates_args=(), tags=_UNSAFE)
def _lsq_many(
    values: Sequence[Tensor],
    steps: Sequence[Tensor],
    qmins: Sequence[int],
    qmaxs: Sequence[int],
    grad_scales: Sequence[float],
) -> Tensor:
    """`lsq_many` in a flat buffer."""
    kernels = _kernels(MANY)
    return kernels.forward_many(kernels.Tables(values, steps, (tuple(qmins), tuple(qmaxs), tuple(grad_scales))))[0]


@_lsq_many.register_fake
def _(
    values: Sequence[Tensor],
    steps: Sequence[Tensor],
    qmins: Sequence[int],
    qmaxs: Sequence[int],
    grad_scales: Sequence[float],
) -> Tensor:
    return values[0].new_empty(flat_views(values)[1])


@torch.library.custom_op("qdeploy::lsq_many_backward", mutates_args=(), tags=_UNSAFE)
def _lsq_many_backward(
    grads: Sequence[Tensor],
    values: Sequence[Tensor],
    steps: Sequence[Tensor],
    qmins: Sequence[int],
    qmaxs: Sequence[int],
    grad_scales: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The gradients of values and of step sizes in two flat buffers, the second without gaps."""
    kernels = _kernels(MANY)
    tables = kernels.Tables(values, steps, (tuple(qmins), tuple(qmaxs), tuple(grad_scales)))
    counters = torch.zeros(tables.layout.groups, dtype=torch.int32, device=values[0].device)
    return kernels.backward_many(grads, values, tables, counters)


@_lsq_many_backward.register_fake
def _(
    grads: Sequence[Tensor],
    values: Sequence[Tensor],
    steps: Sequence[Tensor],
    qmins: Sequence[int],
    qmaxs: Sequence[int],
    grad_scales: Sequence[float],
) -> tuple[Tensor, Tensor]:
    return values[0].new_empty(flat_views(values)[1]), values[0].new_empty(sum(step.numel() for step in steps))


def _save_many_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, values, steps, *ctx.constants = inputs
    ctx.save_for_backward(*values, *steps)


def _second_backward_of_many(ctx: Any, of_values: Tensor, of_steps: Tensor) -> tuple[Any, ...]:
    values, steps = _halves(ctx.saved_tensors)
    rest = zip(*ctx.constants, strict=True)
    parts = of_steps.split([step.numel() for step in steps])
    found = []
    for value, step, view, part, (qmin, qmax, scale) in zip(
        values, steps, flat_views(values)[0], parts, rest, strict=True
    ):
        axis = 0 if step.dim() else -1
        found.append(_change(value, step, of_values.as_strided(*view), part, qmin, qmax, axis, scale))
    none = [None] * len(found)
    return found, none, none, None, None, None


_lsq_many_backward.register_autograd(_second_backward_of_many, setup_context=_save_many_backward)


class _LsqMany(torch.autograd.Function):
    """`lsq_many` on a GPU. The operators are for torch.compile (then `tables` is None) and for a second
    differentiation; otherwise the kernels are called past them, which saves 0.1 ms for 53 weights."""

    @staticmethod
    def forward(ctx: Any, tables: Tables | None, constants: Constants, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.tables, ctx.constants = tables, constants
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        if tables is None:
            values, steps = _halves(tensors)
            flat, views = _lsq_many(values, steps, *constants), flat_views(values)[0]
        else:
            (flat, ctx.counters), views = _kernels(MANY).forward_many(tables), tables.layout.views
        return tuple([flat.as_strided(*view) for view in views])

    @staticmethod
    def backward(ctx: Any, *found: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, tables = ctx.saved_tensors, ctx.tables
        values, steps = _halves(tensors)
        grads = [torch.zeros_like(value) if grad is None else grad for grad, value in zip(found, values, strict=True)]
        if tables is None or torch.is_grad_enabled() or not tables.point_to(tensors):
            of_values, of_steps = _lsq_many_backward(grads, values, steps, *ctx.constants)
            views = flat_views(values)[0]
        else:
            of_values, of_steps = _kernels(MANY).backward_many(grads, values, tables, ctx.counters)
            views = tables.layout.views
        of_values = [of_values.as_strided(*view) for view in views]
        of_steps = of_steps.split([step.numel() for step in steps])
        of_steps = [grad if step.dim() else grad.reshape(()) for grad, step in zip(of_steps, steps, strict=True)]
        # A weight that the network did not use has no gradient, not one of zeros, which weight decay would add to.
        used = [grad is not None for grad in found] * 2
        return None, None, *[grad if use else None for grad, use in zip([*of_values, *of_steps], used, strict=True)]


def _halves(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Values and step sizes."""
    return tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]


def lsq_many(
    values: Sequence[Tensor],
    steps: Sequence[Tensor],
    ranges: Sequence[tuple[int, int]],
    grad_scales: Sequence[float],
) -> list[Tensor]:
    """`lsq` of many values; on a GPU in one launch, and in another all gradients.

    The one launch is for float32 on one device, contiguous or channels_last; other lists are quantized one by one.

    Args:
        values: the weights of a network, say.
        steps: for each value one step size, shape [], or one for each slice along its axis 0.
        ranges: qmin and qmax of each.
        grad_scales: the factor on the gradient of the step sizes of each.

    Raises:
        InputError: step sizes that do not fit their value.
    """
    if values and on_gpu(values[0]):
        constants = (*zip(*ranges, strict=True), tuple(grad_scales))
        traced = torch.compiler.is_compiling()
        tables = None if traced else _kernels(MANY).tables_of(values, steps, constants)
        if tables is not None or (traced and one_launch(values, steps)):
            return list(_LsqMany.apply(tables, constants, *values, *steps))
    arguments = zip(values, steps, ranges, grad_scales, strict=True)
    return [fake_quantize(v, s, qmin, qmax, 0 if s.dim() else -1, scale) for v, s, (qmin, qmax), scale in arguments]


def one_launch(values: Sequence[Tensor], steps: Sequence[Tensor]) -> bool:
    """Are all float32 on one device, each slice with a step size of its own one row of memory?"""
    tensors = [*values, *steps]
    return (
        {tensor.dtype for tensor in tensors} == {torch.float32}
        and {tensor.device for tensor in tensors} == {values[0].device}
        and all([s.dim() == 0 or s.shape == v.shape[:1] for v, s in zip(values, steps, strict=True)])
        and all([v.is_contiguous() or v.is_contiguous(memory_format=torch.channels_last) for v in values])
        and all([s.is_contiguous() for s in steps])
        and all([0 < v.numel() < 2**31 for v in values])
    )


@torch.no_grad()
def lsq_codes(value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int) -> Tensor:
    """The integer codes that `lsq` multiplies by the step sizes: int8, or uint8 when `qmin` is not negative."""
    codes, _ = _rounded(value, step, qmin, qmax, axis)
    return codes.to(torch.int8 if qmin < 0 else torch.uint8)
