"""attention: from queries, keys and values to the weighted values, in one op."""

from __future__ import annotations

from collections.abc import Sequence

from qdeploy.checks import Facts, expect, integer, shape_text
from qdeploy.graph import Activation, Node, Shape
from qdeploy.ops.op import (
    MAX_ATTRIBUTE,
    Op,
    Rows,
    attribute,
    check_bound,
    check_shape,
    check_tokens,
    fixed_rows,
    floats,
    indices,
    largest,
    number_of,
)

MAX_PEAK = 32_767


def _shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    return inputs[0][0], inputs[2][1]


def _check(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    for tensor, what in zip(inputs, ("queries", "keys", "values"), strict=True):
        check_tokens(tensor, what, at)
    (queries, width), (keys, k_width), (v_keys, v_width) = (tensor.shape for tensor in inputs)
    expect(k_width == width, f"keys of {width} channels", shape_text(inputs[1].shape), at)
    expect(v_keys == keys, f"values of {keys} rows", shape_text(inputs[2].shape), at)
    check_shape(output, (queries, v_width), at)
    value, place = attribute(node, "heads", at)
    heads = integer(value, 1, MAX_ATTRIBUTE, place)
    expect(width % heads == 0 == v_width % heads, "heads that divide the channels", heads, at)
    queries, keys = _check_segments(node, queries, keys, at)
    _check_bounds(node, heads, queries, keys, width // heads, output, at, facts)


def _check_segments(node: Node, queries: int, keys: int, at: str) -> tuple[int, int]:
    """The largest numbers of queries and of keys that see each other."""
    block, place = attribute(node, "block", at)
    if block is not None or "regions" in node.constants:
        expect(queries == keys, f"as many queries as keys, {keys}", queries, at)
    if "regions" in node.constants:
        indices(node, "regions", (keys,), at)
    if block is None:
        return queries, keys
    integer(block, 1, keys, place)
    expect(keys % block == 0, f"a block that divides {keys} rows", block, at)
    return block, block


def _check_bounds(
    node: Node, heads: int, queries: int, keys: int, depth: int, output: Activation, at: str, facts: Facts
) -> None:
    value, place = attribute(node, "peak", at)
    peak = integer(value, 1, MAX_PEAK, place)
    expect(peak * 255 * keys < 2**31, "sums of weights below 2^31", f"a peak of {peak} over {keys} keys", at)
    expect(depth * 255 * 255 < 2**31, "products below 2^31", f"heads of {depth} channels", at)
    logit_bias = 0.0
    if "logit_bias" in node.constants:
        logit_bias = facts.of(largest, floats(node, "logit_bias", (heads, queries, keys), at, facts))
    logits = abs(number_of(node, "logit_multiplier", at)) * depth * 65025 + logit_bias
    expect(logits < 2.0**100, "logits below 2^100", f"up to {logits:.3g}", at)
    multiplier, bias = (abs(number_of(node, key, at)) for key in ("multiplier", "bias"))
    check_bound(255.0 * multiplier * 1.001 + bias, output, at)


def _rows(node: Node, inputs: Sequence[Activation], rows: Sequence[Rows], at: str) -> Rows:
    if node.attributes["block"] is not None or "regions" in node.constants:
        return fixed_rows(node, inputs, rows, at)
    expect(rows[1] == rows[2], "keys and values of one length for every text", "others", at)
    return rows[0]


OPS = {
    "attention": Op(
        inputs=(3, 3),
        output="requantized",
        shape=_shape,
        check=_check,
        attributes={
            "heads": int,
            "logit_multiplier": float,
            "multiplier": float,
            "bias": float,
            "peak": int,
            "block": int,
        },
        constants=("logit_bias", "regions"),
        nullable=("block", "logit_bias", "regions"),
        writes=("u8",),
        rows=_rows,
        version=3,
    ),
}
