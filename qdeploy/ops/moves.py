"""concat, reshape, gather, tokens and image: codes that go elsewhere unchanged."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qdeploy.checks import Facts, expect, shape_text
from qdeploy.graph import CODES, MAX_NODES, Activation, Node, Shape
from qdeploy.ops.op import (
    Op,
    Rows,
    channels_of,
    check_shape,
    check_tokens,
    choice_of,
    fixed_rows,
    indices,
    rows_of,
    same_rows,
    value_range,
)

AXES = ("rows", "channels")  # rows are tokens or pixels


# ---- concat ----------------------------------------------------------------------------------------------------------


def _concat_axis(node: Node) -> int:
    return int(node.attributes.get("axis") == "channels")


def _concat_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    axis = _concat_axis(node)
    return (*inputs[0][:axis], sum(shape[axis] for shape in inputs), *inputs[0][axis + 1 :])


def _check_concat(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    if "axis" in node.attributes:
        choice_of(node, "axis", AXES, at)
    axis, first = _concat_axis(node), inputs[0].shape
    for tensor in inputs[1:]:
        same = len(tensor.shape) == len(first) and _without(tensor.shape, axis) == _without(first, axis)
        expect(same, f"inputs that differ in dimension {axis} only", shape_text(tensor.shape), at)
    expect(len(output.shape) == len(first), f"an output of {len(first)} dimensions", shape_text(output.shape), at)
    check_shape(output, _concat_shape(node, [tensor.shape for tensor in inputs]), at)


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])


def _concat_rows(node: Node, inputs: Sequence[Activation], rows: Sequence[Rows], at: str) -> Rows:
    return (same_rows if _concat_axis(node) else fixed_rows)(node, inputs, rows, at)


# ---- gather ----------------------------------------------------------------------------------------------------------


def _gather_shape(node: Node, inputs: Sequence[Shape]) -> Shape | None:
    if node.attributes["axis"] == "rows":
        return None
    count = node.constants["index"].size
    return (count, *inputs[0][1:]) if len(inputs[0]) == 3 else (*inputs[0][:-1], count)


def _check_gather(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    x, axis = inputs[0].shape, choice_of(node, "axis", AXES, at)
    index = indices(node, "index", (-1,), at)
    low, high = facts.of(value_range, index)
    last = (rows_of(x) if axis == "rows" else channels_of(x)) - 1
    expect(-1 <= low and high <= last, f"indices from -1 to {last}", f"{low} to {high}", at)
    if axis == "channels":
        shape = _gather_shape(node, [x])
        assert shape is not None
        check_shape(output, shape, at)
        return
    fits = (rows_of(output.shape), channels_of(output.shape)) == (index.size, channels_of(x))
    expect(fits, f"an output of {index.size} rows of {channels_of(x)} channels", shape_text(output.shape), at)


def _gather_rows(node: Node, inputs: Sequence[Activation], rows: Sequence[Rows], at: str) -> Rows:
    """Of a text: rows that every text has, such as the first token's."""
    if node.attributes["axis"] == "channels" or rows[0] is None:
        return rows[0]
    last = int(node.constants["index"].max())
    expect(last <= rows[0], f"rows that the shortest text has, 0 to {rows[0]}", last, at)
    return None


# ---- reshape, tokens, image ------------------------------------------------------------------------------------------


def _output_says(node: Node, inputs: Sequence[Shape]) -> Shape | None:
    return None


def _check_reshape(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    same = math.prod(inputs[0].shape) == math.prod(output.shape)
    got = f"{shape_text(inputs[0].shape)} to {shape_text(output.shape)}"
    expect(same, "an output with as many elements", got, at)


def _tokens_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    return rows_of(inputs[0]), inputs[0][0]


def _check_tokens(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    expect(len(inputs[0].shape) == 3, "an input of shape [C, H, W]", shape_text(inputs[0].shape), at)
    check_shape(output, _tokens_shape(node, [inputs[0].shape]), at)


def _check_image(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    check_tokens(inputs[0], "an input", at)
    rows, channels = inputs[0].shape
    fits = len(output.shape) == 3 and (rows_of(output.shape), output.shape[0]) == (rows, channels)
    expect(fits, f"an output [C, H, W] of {rows} pixels of {channels} channels", shape_text(output.shape), at)


OPS = {
    "concat": Op(
        inputs=(2, MAX_NODES),
        output="same_grid",
        shape=_concat_shape,
        check=_check_concat,
        token_attributes={"axis": str},
        reads=CODES,
        writes=CODES,
        rows=_concat_rows,
    ),
    "reshape": Op(inputs=(1, 1), output="same_grid", shape=_output_says, check=_check_reshape, writes=("u8",)),
    "gather": Op(
        inputs=(1, 1),
        output="same_grid",
        shape=_gather_shape,
        check=_check_gather,
        attributes={"axis": str},
        constants=("index",),
        reads=CODES,
        writes=CODES,
        rows=_gather_rows,
        version=3,
    ),
    "tokens": Op(
        inputs=(1, 1),
        output="same_grid",
        shape=_tokens_shape,
        check=_check_tokens,
        reads=CODES,
        writes=CODES,
        version=3,
    ),
    "image": Op(
        inputs=(1, 1),
        output="same_grid",
        shape=_output_says,
        check=_check_image,
        reads=CODES,
        writes=CODES,
        version=3,
    ),
}
