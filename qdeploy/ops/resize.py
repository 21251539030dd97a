"""resize: each axis of an image by a banded matrix of integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qdeploy.checks import Facts, expect, key_of, shape_text
from qdeploy.graph import Activation, Node, Shape
from qdeploy.ops.op import Op, check_bound, check_shape, indices, number_of, value_range

MAX_WEIGHT = 32_767  # so that products of codes and weights can be taken in pairs of 16 bits


def _shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    return inputs[0][0], node.constants["row_start"].size, node.constants["column_start"].size


def _check(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    x = inputs[0].shape
    expect(len(x) == 3, "an input of shape [C, H, W]", shape_text(x), at)
    most = [_check_axis(node, axis, size, at, facts) for axis, size in zip(("row", "column"), x[1:], strict=True)]
    check_shape(output, _shape(node, [x]), at)
    sums = 255 * most[0] * most[1]
    expect(sums < 2**31, "sums below 2^31", f"up to {sums}", at)
    multiplier, bias = (abs(number_of(node, key, at)) for key in ("multiplier", "bias"))
    check_bound(float(sums) * multiplier + bias, output, at)


def _check_axis(node: Node, axis: str, size: int, at: str, facts: Facts) -> int:
    """The largest sum of magnitudes of the weights of one output row (column)."""
    start = indices(node, f"{axis}_start", (-1,), at)
    weight = indices(node, f"{axis}_weight", (start.size, -1), at)
    low, high = facts.of(value_range, start)
    last = size - weight.shape[1]
    expect(0 <= low and high <= last, f"{axis}s from 0 to {last}", f"{low} to {high}", key_of(f"{axis}_start", at))
    low, high = facts.of(value_range, weight)
    fits = -MAX_WEIGHT <= low and high <= MAX_WEIGHT
    expect(fits, f"weights in [-{MAX_WEIGHT}, {MAX_WEIGHT}]", f"{low} to {high}", key_of(f"{axis}_weight", at))
    return facts.of(_largest_sum, weight)


def _largest_sum(weight: np.ndarray) -> int:
    return int(np.abs(weight.astype(np.int64)).sum(axis=1).max())


OPS = {
    "resize": Op(
        inputs=(1, 1),
        output="requantized",
        shape=_shape,
        check=_check,
        attributes={"multiplier": float, "bias": float},
        constants=("row_start", "row_weight", "column_start", "column_weight"),
        version=3,
    ),
}
