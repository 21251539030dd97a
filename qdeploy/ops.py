"""The operations of docs/format.md, one row each: all facts of an op, its shape and its checks.

What else follows from the row stands nowhere: whether an output is clamped, may be f32, or has the grid of its inputs
is its `output` kind. `_engine.ops()` is the same table in C++; tests/test_ops.py compares them, and every phase that
must know all ops: the reference, the export, ONNX, GPU programs, the random graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from qdeploy.checks import array, expect, integer, integers, key_of, number, numbers, shape_text
from qdeploy.graph import MAX_NODES, Activation, Node, Shape

MAX_ATTRIBUTE = 65_535  # strides, paddings, dilations, groups, kernels


@dataclass(frozen=True)
class Op:
    """The facts of one operation.

    inputs: fewest and most.
    output: "requantized" is a number r that becomes clamp(rint(r), lo, hi) as u8, or stays itself as f32; "same_grid"
        are codes of the inputs, whose scale and zero point the output shares; "table" is an entry, u8 or f32.
    shape: of the output for the shapes of the inputs; None where only the output tensor says it. The node must have
        passed `check`, or be as well formed as that asks.
    check: raises ModelError for attributes, constants, inputs and an output that do not fit. That the keys are there
        and the numbers of the inputs are checked before; what follows from `output` is checked elsewhere.
    attributes: numbers in the graph's JSON, and whether they are integers or f32.
    constants: arrays, which are tensors of the file.
    residual: the last input may be left out; with it comes the attribute residual_multiplier.
    version: the first format version that has it.
    """

    inputs: tuple[int, int]
    output: Literal["requantized", "same_grid", "table"]
    shape: Callable[[Node, Sequence[Shape]], Shape | None]
    check: Callable[[Node, Sequence[Activation], Activation, str], None]
    attributes: Mapping[str, type[int] | type[float]] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    residual: bool = False
    version: int = 1

    @property
    def requantized(self) -> bool:
        return self.output == "requantized"

    @property
    def same_grid(self) -> bool:
        return self.output == "same_grid"

    @property
    def may_be_f32(self) -> bool:
        """As the output of the last node."""
        return not self.same_grid

    @property
    def may_be_flat(self) -> bool:
        """Scores by global pooling: an f32 output [C, 1, 1] of a window may be declared [C]."""
        return self.requantized and "stride" in self.attributes

    @property
    def has_weight(self) -> bool:
        return "weight" in self.constants

    def attribute_types(self, node: Node, output: Activation) -> dict[str, type[int] | type[float]]:
        """Exactly the attributes that `node` has: those of its op, and what its residual and its output bring."""
        types = dict(self.attributes)
        if self.requantized and output.dtype == "u8":
            types["clamp"] = int
        if self.residual and len(node.inputs) == self.inputs[1]:
            types["residual_multiplier"] = float
        return types


# ---- What ops share --------------------------------------------------------------------------------------------------


def _attribute(node: Node, key: str, at: str) -> tuple[Any, str]:
    return node.attributes[key], key_of(key, at)


def _constant(node: Node, key: str, dtype: type, shape: Sequence[int], at: str) -> np.ndarray:
    return array(node.constants[key], dtype, shape, key_of(key, at))


def check_bound(bound: float | np.ndarray, output: Activation, at: str, by_channel: bool = False) -> None:
    """So that no result leaves the range of the conversion to an integer (u8) or of sums over members (f32)."""
    limit = 30 if output.dtype == "u8" else 100
    for channel in np.flatnonzero(~(np.atleast_1d(bound) < 2.0**limit))[:1]:
        place = f"channel {channel} of {at}" if by_channel else at
        expect(False, f"results below 2^{limit}", f"up to {np.atleast_1d(bound)[channel]:.3g}", place)


def _like_first(node: Node, inputs: Sequence[Shape]) -> Shape:
    return inputs[0]


def _spatial(node: Node, x: Shape, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    top, left, bottom, right = node.attributes["padding"]
    sizes = [
        (size + padding - d * (k - 1) - 1) // stride + 1
        for size, padding, k, d, stride in zip(
            x[1:], (top + bottom, left + right), kernel, dilation, node.attributes["stride"], strict=True
        )
    ]
    return sizes[0], sizes[1]


def _check_shape(output: Activation, shape: Shape, at: str) -> None:
    expect(output.shape == shape, f"an output of shape {shape_text(shape)}", shape_text(output.shape), at)


def _check_window(node: Node, x: Activation, kernel: Sequence[int], channels: int, output: Activation, at: str) -> None:
    """Stride, padding and dilation, that the window fits the image, and the shape of the output."""
    dilation = integers(*_pair(node, "dilation", at)) if "dilation" in node.attributes else [1, 1]
    integers(*_pair(node, "stride", at))
    value, place = _attribute(node, "padding", at)
    padding = integers(value, 4, 4, 0, MAX_ATTRIBUTE, place)
    expect(len(x.shape) == 3, "an input of shape [C, H, W]", shape_text(x.shape), at)
    for axis in (0, 1):
        extent, padded = dilation[axis] * (kernel[axis] - 1) + 1, x.shape[1 + axis] + padding[axis] + padding[axis + 2]
        expect(extent <= padded, "a window that fits the padded input", f"{extent} over {padded}", at)
    shape: Shape = (channels, *_spatial(node, x.shape, kernel, dilation))
    is_flat = output.dtype == "f32" and shape[1:] == (1, 1) and len(output.shape) == 1  # scores by global pooling
    _check_shape(output, shape[:1] if is_flat else shape, at)


def _pair(node: Node, key: str, at: str) -> tuple[Any, int, int, int, int, str]:
    value, place = _attribute(node, key, at)
    return value, 2, 2, 1, MAX_ATTRIBUTE, place


# ---- conv2d, linear --------------------------------------------------------------------------------------------------


def _weight(node: Node, rank: int, layout: str, at: str) -> np.ndarray:
    weight, place = node.constants["weight"], key_of("weight", at)
    array(weight, np.int8, (-1,) * weight.ndim if isinstance(weight, np.ndarray) else (), place)
    expect(weight.ndim == rank and weight.size > 0, f"a weight of shape {layout}", shape_text(weight.shape), place)
    return weight


def _check_weighted(node: Node, expected: Shape, inputs: Sequence[Activation], output: Activation, at: str) -> None:
    """What conv2d and linear share: codes, multiplier, bias, residual and the bound of the accumulators."""
    weight, weight_at = node.constants["weight"], key_of("weight", at)
    expect(weight.shape == expected, f"a weight of shape {shape_text(expected)}", shape_text(weight.shape), weight_at)
    bits = integer(node.bits, 2, 8, key_of("bits", weight_at))
    depth, half = math.prod(weight.shape[1:]), 2 ** (bits - 1)
    got = f"weight {shape_text(weight.shape)} of {bits} bits"
    expect(depth * 255 * half < 2**31, "accumulators below 2^31", got, at)
    codes = (int(weight.min()), int(weight.max()))
    expect(-half <= codes[0] and codes[1] < half, f"codes of {bits} bits", f"codes from {codes[0]} to {codes[1]}", at)
    for key in ("multiplier", "bias"):
        _constant(node, key, np.float32, weight.shape[:1], at)
    if len(inputs) == 2:
        shape = shape_text(output.shape)
        expect(inputs[1].shape == output.shape, f"a residual of shape {shape}", shape_text(inputs[1].shape), at)
        number(*_attribute(node, "residual_multiplier", at))


def check_weighted_bound(node: Node, output: Activation, at: str) -> None:
    """The bound on the results of a conv2d or linear that has passed `check`."""
    weight = node.constants["weight"]
    multiplier, bias = (np.abs(node.constants[key].astype(np.float64)) for key in ("multiplier", "bias"))
    residual = abs(number(node.attributes.get("residual_multiplier", 0.0), at))
    magnitude = np.abs(weight.reshape(weight.shape[0], -1).astype(np.int16)).sum(axis=1, dtype=np.int64)
    check_bound(255.0 * magnitude * multiplier + bias + 255.0 * residual, output, at, by_channel=True)


def _conv2d_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    out_channels, _, *kernel = node.constants["weight"].shape
    return (out_channels, *_spatial(node, inputs[0], kernel, node.attributes["dilation"]))


def _check_conv2d(node: Node, inputs: Sequence[Activation], output: Activation, at: str) -> None:
    weight = _weight(node, 4, "[O, C/groups, KH, KW]", at)
    _check_window(node, inputs[0], weight.shape[2:], output.shape[0], output, at)
    value, place = _attribute(node, "groups", at)
    groups = integer(value, 1, MAX_ATTRIBUTE, place)
    channels, outputs = inputs[0].shape[0], output.shape[0]
    expect(channels % groups == 0 == outputs % groups, "groups that divide the channels", groups, at)
    _check_weighted(node, (outputs, channels // groups, *weight.shape[2:]), inputs, output, at)


def _linear_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    return (node.constants["weight"].shape[0],)


def _check_linear(node: Node, inputs: Sequence[Activation], output: Activation, at: str) -> None:
    _weight(node, 2, "[O, F]", at)
    for tensor, what in ((inputs[0], "input"), (output, "output")):
        expect(len(tensor.shape) == 1, f"an {what} of shape [F]", shape_text(tensor.shape), at)
    _check_weighted(node, (output.shape[0], inputs[0].shape[0]), inputs, output, at)


# ---- Pools -----------------------------------------------------------------------------------------------------------


def _pool_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    dilation = node.attributes.get("dilation", (1, 1))
    return (inputs[0][0], *_spatial(node, inputs[0], node.attributes["kernel"], dilation))


def _check_pool(node: Node, x: Activation, output: Activation, at: str) -> None:
    """Every window must hold a real element: with padding below the extent, only a dilated one can miss them all."""
    kernel = integers(*_pair(node, "kernel", at))
    _check_window(node, x, kernel, x.shape[0], output, at)
    padding, stride, dilation = (node.attributes.get(key, (1, 1)) for key in ("padding", "stride", "dilation"))
    for axis, windows in enumerate(_spatial(node, x.shape, kernel, dilation)):
        before, after, step = padding[axis], padding[axis + 2], dilation[axis]
        extent, size = step * (kernel[axis] - 1) + 1, x.shape[1 + axis]
        starts = range(-before, 0, stride[axis])[:windows]
        real = max(before, after) < extent and all(start % step < size for start in starts)
        expect(real, "a real element in every window of the pool", f"padding {before} and {after} on {size}", at)


def _check_max_pool2d(node: Node, inputs: Sequence[Activation], output: Activation, at: str) -> None:
    _check_pool(node, inputs[0], output, at)


def _check_avg_pool2d(node: Node, inputs: Sequence[Activation], output: Activation, at: str) -> None:
    _check_pool(node, inputs[0], output, at)
    window = math.prod(node.attributes["kernel"])
    expect(window * 255 < 2**31, "a window with sums below 2^31", f"{window} elements", at)
    multiplier = _constant(node, "multiplier", np.float32, (-1,), at)
    expect(multiplier.size in (1, window), f"1 or {window} multipliers", multiplier.size, at)
    counts = np.arange(1, window + 1) if multiplier.size == window else window
    bias = abs(number(*_attribute(node, "bias", at)))
    check_bound(255.0 * counts * np.abs(multiplier.astype(np.float64)) + bias, output, at)


# ---- Elementwise -----------------------------------------------------------------------------------------------------


def _check_add(node: Node, inputs: Sequence[Activation], output: Activation, at: str) -> None:
    a, b = (tensor.shape for tensor in inputs)
    expect(a == b, f"a second input of shape {shape_text(a)}", shape_text(b), at)
    _check_shape(output, a, at)
    value, place = _attribute(node, "multipliers", at)
    ma, mb = (abs(m) for m in numbers(value, 2, place))
    bias = abs(number(*_attribute(node, "bias", at)))
    check_bound(255.0 * ma + 255.0 * mb + bias, output, at)


def _check_mul(node: Node, inputs: Sequence[Activation], output: Activation, at: str) -> None:
    a, b = (tensor.shape for tensor in inputs)
    gate = (a[0], 1, 1) if len(a) == 3 else a
    expected = shape_text(a) if gate == a else f"{shape_text(a)} or {shape_text(gate)}"
    expect(b in (a, gate), f"a second input of shape {expected}", shape_text(b), at)
    _check_shape(output, a, at)
    multiplier, bias = (abs(number(*_attribute(node, key, at))) for key in ("multiplier", "bias"))
    check_bound(255.0 * 255.0 * multiplier + bias, output, at)


def _check_table(node: Node, inputs: Sequence[Activation], output: Activation, at: str) -> None:
    _check_shape(output, inputs[0].shape, at)
    table = _constant(node, "table", np.uint8 if output.dtype == "u8" else np.float32, (256,), at)
    if output.dtype == "f32":
        check_bound(np.abs(table.astype(np.float64)), output, at)


# ---- Moves -----------------------------------------------------------------------------------------------------------


def _concat_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    return (sum(shape[0] for shape in inputs), *inputs[0][1:])


def _check_concat(node: Node, inputs: Sequence[Activation], output: Activation, at: str) -> None:
    first = inputs[0].shape
    for tensor in inputs[1:]:
        same = len(tensor.shape) == len(first) and tensor.shape[1:] == first[1:]
        expect(same, "inputs that differ in dimension 0 only", shape_text(tensor.shape), at)
    _check_shape(output, _concat_shape(node, [tensor.shape for tensor in inputs]), at)


def _check_reshape(node: Node, inputs: Sequence[Activation], output: Activation, at: str) -> None:
    same = math.prod(inputs[0].shape) == math.prod(output.shape)
    got = f"{shape_text(inputs[0].shape)} to {shape_text(output.shape)}"
    expect(same, "an output with as many elements", got, at)


WINDOW: dict[str, type[int] | type[float]] = {"stride": int, "padding": int}
OPS: dict[str, Op] = {
    "conv2d": Op(
        inputs=(1, 2),
        output="requantized",
        shape=_conv2d_shape,
        check=_check_conv2d,
        attributes=WINDOW | {"dilation": int, "groups": int},
        constants=("weight", "multiplier", "bias"),
        residual=True,
    ),
    "linear": Op(
        inputs=(1, 2),
        output="requantized",
        shape=_linear_shape,
        check=_check_linear,
        constants=("weight", "multiplier", "bias"),
        residual=True,
    ),
    "max_pool2d": Op(
        inputs=(1, 1),
        output="same_grid",
        shape=_pool_shape,
        check=_check_max_pool2d,
        attributes=WINDOW | {"kernel": int, "dilation": int},
    ),
    "avg_pool2d": Op(
        inputs=(1, 1),
        output="requantized",
        shape=_pool_shape,
        check=_check_avg_pool2d,
        attributes=WINDOW | {"kernel": int, "bias": float},
        constants=("multiplier",),
    ),
    "add": Op(
        inputs=(2, 2),
        output="requantized",
        shape=_like_first,
        check=_check_add,
        attributes={"multipliers": float, "bias": float},
    ),
    "mul": Op(
        inputs=(2, 2),
        output="requantized",
        shape=_like_first,
        check=_check_mul,
        attributes={"multiplier": float, "bias": float},
        version=2,
    ),
    "table": Op(inputs=(1, 1), output="table", shape=_like_first, check=_check_table, constants=("table",)),
    "concat": Op(inputs=(2, MAX_NODES), output="same_grid", shape=_concat_shape, check=_check_concat),
    "reshape": Op(inputs=(1, 1), output="same_grid", shape=lambda node, inputs: None, check=_check_reshape),
}
