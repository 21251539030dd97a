"""max_pool2d and avg_pool2d, and the window that conv2d has as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qdeploy.checks import Facts, expect, integers, shape_text
from qdeploy.graph import CODES, Activation, Node, Shape
from qdeploy.ops.op import (
    MAX_ATTRIBUTE,
    Kind,
    Op,
    attribute,
    check_bound,
    check_shape,
    floats,
    largest_by_count,
    most,
    number_of,
)

WINDOW: dict[str, Kind] = {"stride": int, "padding": int}


def spatial(node: Node, x: Shape, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    """[OH, OW]."""
    top, left, bottom, right = node.attributes["padding"]
    sizes = [
        (size + padding - d * (k - 1) - 1) // stride + 1
        for size, padding, k, d, stride in zip(
            x[1:], (top + bottom, left + right), kernel, dilation, node.attributes["stride"], strict=True
        )
    ]
    return sizes[0], sizes[1]


def check_window(node: Node, x: Activation, kernel: Sequence[int], channels: int, output: Activation, at: str) -> None:
    """Stride, padding and dilation, that the window fits the image, and the shape of the output."""
    dilation = integers(*_pair(node, "dilation", at)) if "dilation" in node.attributes else [1, 1]
    integers(*_pair(node, "stride", at))
    value, place = attribute(node, "padding", at)
    padding = integers(value, 4, 4, 0, MAX_ATTRIBUTE, place)
    expect(len(x.shape) == 3, "an input of shape [C, H, W]", shape_text(x.shape), at)
    for axis in (0, 1):
        extent, padded = dilation[axis] * (kernel[axis] - 1) + 1, x.shape[1 + axis] + padding[axis] + padding[axis + 2]
        expect(extent <= padded, "a window that fits the padded input", f"{extent} over {padded}", at)
    shape: Shape = (channels, *spatial(node, x.shape, kernel, dilation))
    is_flat = output.dtype == "f32" and shape[1:] == (1, 1) and len(output.shape) == 1  # scores by global pooling
    check_shape(output, shape[:1] if is_flat else shape, at)


def _pair(node: Node, key: str, at: str) -> tuple[Any, int, int, int, int, str]:
    value, place = attribute(node, key, at)
    return value, 2, 2, 1, MAX_ATTRIBUTE, place


def _pool_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    dilation = node.attributes.get("dilation", (1, 1))
    return (inputs[0][0], *spatial(node, inputs[0], node.attributes["kernel"], dilation))


def _check_pool(node: Node, x: Activation, output: Activation, at: str) -> None:
    """Every window must hold a real element: with padding below the extent, only a dilated one can miss them all."""
    kernel = integers(*_pair(node, "kernel", at))
    check_window(node, x, kernel, x.shape[0], output, at)
    padding, stride, dilation = (node.attributes.get(key, (1, 1)) for key in ("padding", "stride", "dilation"))
    for axis, windows in enumerate(spatial(node, x.shape, kernel, dilation)):
        before, after, step = padding[axis], padding[axis + 2], dilation[axis]
        extent, size = step * (kernel[axis] - 1) + 1, x.shape[1 + axis]
        in_padding, first = min(windows, -(-before // stride[axis])), -before % step
        # of residues r of the step, (r + step - size) // step is 1 for those that reach no element
        floors = [_sum_of_floors(in_padding, first + d, stride[axis], step) for d in (max(0, step - size), 0)]
        real = max(before, after) < extent and floors[0] == floors[1]
        expect(real, "a real element in every window of the pool", f"padding {before} and {after} on {size}", at)


def _sum_of_floors(n: int, a: int, step: int, m: int) -> int:
    """The sum of (a + i*step) // m over i < n: points below a line, row by row, then column by column."""
    whole, end = n * (a // m) + n * (n - 1) // 2 * (step // m), a % m + step % m * n
    return whole if end < m else whole + _sum_of_floors(end // m, end % m, m, step % m)


def _check_max_pool2d(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    _check_pool(node, inputs[0], output, at)


def _check_avg_pool2d(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    _check_pool(node, inputs[0], output, at)
    window = math.prod(node.attributes["kernel"])
    expect(window * most(inputs[0]) < 2**31, "a window with sums below 2^31", f"{window} elements", at)
    multiplier = floats(node, "multiplier", (-1,), at, facts)
    expect(multiplier.size in (1, window), f"1 or {window} multipliers", multiplier.size, at)
    factor = facts.of(largest_by_count, multiplier) * (window if multiplier.size == 1 else 1)
    check_bound(most(inputs[0]) * factor + abs(number_of(node, "bias", at)), output, at)


OPS = {
    "max_pool2d": Op(
        inputs=(1, 1),
        output="same_grid",
        shape=_pool_shape,
        check=_check_max_pool2d,
        attributes=WINDOW | {"kernel": int, "dilation": int},
        writes=("u8",),
    ),
    "avg_pool2d": Op(
        inputs=(1, 1),
        output="requantized",
        shape=_pool_shape,
        check=_check_avg_pool2d,
        attributes=WINDOW | {"kernel": int, "bias": float},
        constants=("multiplier",),
        reads=CODES,
        writes=(*CODES, "f32"),
    ),
}
