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

from qdeploy.checks import array, expect, f32, integers
from qdeploy.graph import MAX_NODES, Node, Shape, Tensor

MAX_ATTRIBUTE = 65_535  # strides, paddings, dilations, groups, kernels


@dataclass(frozen=True)
class Op:
    """The facts of one operation.

    inputs: fewest and most.
    output: "requantized" is a number r that becomes clamp(rint(r), lo, hi) as u8, or stays itself as f32; "same_grid"
        are codes of the inputs, whose scale and zero point the output shares; "table" is an entry, u8 or f32.
    shape: of the output for the shapes of the inputs; None where only the output tensor says it. The node must have
        passed `check`, or be as well formed as that asks.
    check: raises ModelError for attributes, constants and inputs that do not fit. That the keys are there, the numbers
        of the inputs and what follows from `output` are checked before.
    attributes: numbers in the graph's JSON, and whether they are integers or f32.
    constants: arrays, which are tensors of the file.
    residual: the last input may be left out; with it comes the attribute residual_multiplier.
    version: the first format version that has it.
    """

    inputs: tuple[int, int]
    output: Literal["requantized", "same_grid", "table"]
    shape: Callable[[Node, Sequence[Shape]], Shape | None]
    check: Callable[[Node, Sequence[Tensor], Tensor, str], None]
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

    def attribute_types(self, node: Node, output: Tensor) -> dict[str, type[int] | type[float]]:
        """Exactly the attributes that `node` has: those of its op, and what its residual and its output bring."""
        types = dict(self.attributes)
        if self.requantized and output.dtype == "u8":
            types["clamp"] = int
        if self.residual and len(node.inputs) == self.inputs[1]:
            types["residual_multiplier"] = float
        return types


# ---- What ops share --------------------------------------------------------------------------------------------------


def check_bound(bound: float | np.ndarray, output: Tensor, at: str) -> None:
    """So that no accumulated result leaves the range of the conversion to an integer (u8) or of f32."""
    limit = 30 if output.dtype == "u8" else 100
    largest = float(np.max(bound))
    expect(largest < 2.0**limit, f"results below 2^{limit} from these constants", largest, at)


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


def _check_window(node: Node, x: Tensor, kernel: Sequence[int], dilation: Sequence[int], at: str) -> None:
    expect(len(x.shape) == 3, "an input of shape [C, H, W]", x.shape, at)
    integers(node.attributes["stride"], 2, 1, MAX_ATTRIBUTE, "stride", at)
    integers(node.attributes["padding"], 4, 0, MAX_ATTRIBUTE, "padding", at)
    sizes = _spatial(node, x.shape, kernel, dilation)
    expect(min(sizes) >= 1, "a window that fits the padded input", f"output size {sizes}", at)


def _constant(node: Node, key: str, dtype: type, ndim: int, at: str) -> np.ndarray:
    return array(node.constants[key], key, dtype, ndim, at)


# ---- conv2d, linear --------------------------------------------------------------------------------------------------


def _check_weighted(node: Node, ndim: int, inputs: Sequence[Tensor], output: Tensor, at: str) -> np.ndarray:
    """What conv2d and linear share: codes, multiplier, bias, residual and the bounds; returns the weight."""
    weight = _constant(node, "weight", np.int8, ndim, at)
    expect(weight.size > 0, "a weight with elements", weight.shape, at)
    (bits,) = integers([node.bits], 1, 2, 8, "bits", at)
    codes = (int(weight.min()), int(weight.max()))
    half = 2 ** (bits - 1)
    expect(-half <= codes[0] and codes[1] < half, f"codes of {bits} bits in {-half}..{half - 1}", codes, at)
    depth = math.prod(weight.shape[1:])
    expect(depth * 255 * half < 2**31, "K*255*2^(b-1) < 2^31", f"K = {depth}, b = {bits}", at)
    constants = [_constant(node, key, np.float32, 1, at) for key in ("multiplier", "bias")]
    for key, value in zip(("multiplier", "bias"), constants, strict=True):
        expect(value.shape == weight.shape[:1], f"'{key}' of shape {weight.shape[:1]}", value.shape, at)
    multiplier, bias = (np.abs(value.astype(np.float64)) for value in constants)
    residual = 0.0
    if len(inputs) == 2:
        residual = abs(f32(node.attributes["residual_multiplier"], "residual_multiplier", at))
        expect(inputs[1].shape == output.shape, f"a residual of shape {output.shape}", inputs[1].shape, at)
    magnitude = np.abs(weight.reshape(weight.shape[0], -1).astype(np.int16)).sum(axis=1, dtype=np.int64)
    check_bound(255.0 * magnitude * multiplier + bias + 255.0 * residual, output, at)
    return weight


def _conv2d_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    out_channels, _, *kernel = node.constants["weight"].shape
    return (out_channels, *_spatial(node, inputs[0], kernel, node.attributes["dilation"]))


def _check_conv2d(node: Node, inputs: Sequence[Tensor], output: Tensor, at: str) -> None:
    weight = _check_weighted(node, 4, inputs, output, at)
    dilation = integers(node.attributes["dilation"], 2, 1, MAX_ATTRIBUTE, "dilation", at)
    kernel = integers(weight.shape[2:], 2, 1, MAX_ATTRIBUTE, "kernel", at)
    (groups,) = integers([node.attributes["groups"]], 1, 1, MAX_ATTRIBUTE, "groups", at)
    _check_window(node, inputs[0], kernel, dilation, at)
    channels = weight.shape[1] * groups
    expect(inputs[0].shape[0] == channels, f"an input of {channels} channels", inputs[0].shape, at)
    expect(weight.shape[0] % groups == 0, f"output channels divisible by {groups} groups", weight.shape[0], at)


def _linear_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    return (node.constants["weight"].shape[0],)


def _check_linear(node: Node, inputs: Sequence[Tensor], output: Tensor, at: str) -> None:
    weight = _check_weighted(node, 2, inputs, output, at)
    expect(inputs[0].shape == weight.shape[1:], f"an input of shape {weight.shape[1:]}", inputs[0].shape, at)


# ---- Pools -----------------------------------------------------------------------------------------------------------


def _pool_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    dilation = node.attributes.get("dilation", (1, 1))
    return (inputs[0][0], *_spatial(node, inputs[0], node.attributes["kernel"], dilation))


def _check_pool(node: Node, x: Tensor, dilation: Sequence[int], at: str) -> list[int]:
    """Every window must hold a real element: with padding below the extent, only a dilated one can miss them all."""
    kernel = integers(node.attributes["kernel"], 2, 1, MAX_ATTRIBUTE, "kernel", at)
    _check_window(node, x, kernel, dilation, at)
    padding = node.attributes["padding"]
    for axis in (0, 1):
        before, after, step = padding[axis], padding[axis + 2], dilation[axis]
        extent = step * (kernel[axis] - 1) + 1
        expect(before < extent and after < extent, f"padding below the window's extent {extent}", padding, at)
        starts = range(-before, 0, node.attributes["stride"][axis])
        real = all(start % step < x.shape[1 + axis] for start in starts)
        expect(real, "a real element in every window", f"dilation {step} over size {x.shape[1 + axis]}", at)
    return kernel


def _check_max_pool2d(node: Node, inputs: Sequence[Tensor], output: Tensor, at: str) -> None:
    _check_pool(node, inputs[0], integers(node.attributes["dilation"], 2, 1, MAX_ATTRIBUTE, "dilation", at), at)


def _check_avg_pool2d(node: Node, inputs: Sequence[Tensor], output: Tensor, at: str) -> None:
    kernel = _check_pool(node, inputs[0], [1, 1], at)
    window = math.prod(kernel)
    expect(window * 255 < 2**31, "KH*KW*255 < 2^31", kernel, at)
    multiplier = _constant(node, "multiplier", np.float32, 1, at)
    expect(multiplier.size in (1, window), f"'multiplier' of 1 or {window} elements", multiplier.size, at)
    counts = np.arange(1, window + 1) if multiplier.size == window else window
    bias = abs(f32(node.attributes["bias"], "bias", at))
    check_bound(255.0 * counts * np.abs(multiplier.astype(np.float64)) + bias, output, at)


# ---- Elementwise -----------------------------------------------------------------------------------------------------


def _check_add(node: Node, inputs: Sequence[Tensor], output: Tensor, at: str) -> None:
    multipliers: Any = node.attributes["multipliers"]
    pair = isinstance(multipliers, (list, tuple)) and len(multipliers) == 2
    expect(pair, "multipliers [ma, mb]", multipliers, at)
    ma, mb = (abs(f32(m, "multipliers", at)) for m in multipliers)
    bias = abs(f32(node.attributes["bias"], "bias", at))
    expect(inputs[0].shape == inputs[1].shape, f"a second input of shape {inputs[0].shape}", inputs[1].shape, at)
    check_bound(255.0 * ma + 255.0 * mb + bias, output, at)


def _check_table(node: Node, inputs: Sequence[Tensor], output: Tensor, at: str) -> None:
    table = _constant(node, "table", np.uint8 if output.dtype == "u8" else np.float32, 1, at)
    expect(table.size == 256, "a table of 256 entries", table.size, at)
    if output.dtype == "f32":
        check_bound(np.abs(table), output, at)


# ---- Moves -----------------------------------------------------------------------------------------------------------


def _concat_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    return (sum(shape[0] for shape in inputs), *inputs[0][1:])


def _check_concat(node: Node, inputs: Sequence[Tensor], output: Tensor, at: str) -> None:
    first = inputs[0].shape
    for tensor in inputs[1:]:
        same = len(tensor.shape) == len(first) and tensor.shape[1:] == first[1:]
        expect(same, f"inputs like {first} but for dimension 0", tensor.shape, at)


def _check_reshape(node: Node, inputs: Sequence[Tensor], output: Tensor, at: str) -> None:
    elements = math.prod(inputs[0].shape)
    expect(math.prod(output.shape) == elements, f"an output of {elements} elements", output.shape, at)


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
    "table": Op(inputs=(1, 1), output="table", shape=_like_first, check=_check_table, constants=("table",)),
    "concat": Op(inputs=(2, MAX_NODES), output="same_grid", shape=_concat_shape, check=_check_concat),
    "reshape": Op(inputs=(1, 1), output="same_grid", shape=lambda node, inputs: None, check=_check_reshape),
}
