"""add, mul, rescale and table: element by element."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qdeploy.checks import Facts, alternatives, array, expect, key_of, numbers, shape_text
from qdeploy.graph import CODES, Activation, Node, Shape
from qdeploy.ops.op import (
    Op,
    Rows,
    attribute,
    channels_of,
    check_bound,
    check_shape,
    floats,
    largest,
    like_first,
    most,
    number_of,
    same_rows,
)

TABLE_BY_CHANNEL = 4  # the first format version that has one


def _check_add(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    a, b = inputs
    expect(a.shape == b.shape, f"a second input of shape {shape_text(a.shape)}", shape_text(b.shape), at)
    check_shape(output, a.shape, at)
    value, place = attribute(node, "multipliers", at)
    ma, mb = (abs(m) for m in numbers(value, 2, place))
    bias = abs(number_of(node, "bias", at))
    check_bound(most(a) * ma + most(b) * mb + bias, output, at)


def _gates(a: Shape, version: int) -> list[Shape]:
    """Which shapes b may have beside that of a: one number for all pixels (tokens), or one for all channels."""
    if len(a) == 2:
        return [(1, a[1])]
    if len(a) == 3:
        return [(a[0], 1, 1), (1, *a[1:])] if version >= 3 else [(a[0], 1, 1)]
    return []


def _mul_since(node: Node, inputs: Sequence[Activation]) -> int:
    a, b = (tensor.shape for tensor in inputs)
    return 1 if b in (a, *_gates(a, 1)) else 3


def _check_mul(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    a, b = (tensor.shape for tensor in inputs)
    shapes = list(dict.fromkeys([a, *_gates(a, facts.version)]))
    expect(b in shapes, f"a second input of shape {alternatives(list(map(shape_text, shapes)))}", shape_text(b), at)
    check_shape(output, a, at)
    multiplier, bias = (abs(number_of(node, key, at)) for key in ("multiplier", "bias"))
    check_bound(255.0 * 255.0 * multiplier + bias, output, at)


def _mul_rows(node: Node, inputs: Sequence[Activation], rows: Sequence[Rows], at: str) -> Rows:
    """A gate [1, D] is the same for all tokens."""
    is_gate = rows[1] is None and len(inputs[1].shape) == 2 and inputs[1].shape[0] == 1
    return same_rows(node, inputs, rows[:1] if is_gate else rows, at)


def _check_rescale(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    check_shape(output, inputs[0].shape, at)
    multiplier, bias = (abs(number_of(node, key, at)) for key in ("multiplier", "bias"))
    check_bound(most(inputs[0]) * multiplier + bias, output, at)


def _check_table(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    check_shape(output, inputs[0].shape, at)
    by_channel = facts.version >= TABLE_BY_CHANNEL and np.ndim(node.constants["table"]) == 2
    shape = (channels_of(inputs[0].shape), 256) if by_channel else (256,)
    if output.dtype == "u8":
        array(node.constants["table"], np.uint8, shape, key_of("table", at))
        return
    check_bound(largest(floats(node, "table", shape, at, facts)), output, at)


def _table_since(node: Node, inputs: Sequence[Activation]) -> int:
    return TABLE_BY_CHANNEL if node.constants["table"].ndim == 2 else 1


OPS = {
    "add": Op(
        inputs=(2, 2),
        output="requantized",
        shape=like_first,
        check=_check_add,
        attributes={"multipliers": float, "bias": float},
        reads=CODES,
        writes=(*CODES, "f32"),
        rows=same_rows,
    ),
    "mul": Op(
        inputs=(2, 2),
        output="requantized",
        shape=like_first,
        check=_check_mul,
        attributes={"multiplier": float, "bias": float},
        rows=_mul_rows,
        version=2,
        variant_since=_mul_since,
    ),
    "rescale": Op(
        inputs=(1, 1),
        output="requantized",
        shape=like_first,
        check=_check_rescale,
        attributes={"multiplier": float, "bias": float},
        reads=CODES,
        writes=(*CODES, "f32"),
        rows=same_rows,
        version=3,
    ),
    "table": Op(
        inputs=(1, 1),
        output="table",
        shape=like_first,
        check=_check_table,
        constants=("table",),
        rows=same_rows,
        variant_since=_table_since,
    ),
}
