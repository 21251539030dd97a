"""position, norm and mean: over the rows of a sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from qdeploy.checks import Facts, expect, integer
from qdeploy.graph import CODES, Activation, Node, Shape
from qdeploy.ops.op import (
    MAX_ATTRIBUTE,
    Op,
    Rows,
    attribute,
    channels_of,
    check_bound,
    check_shape,
    check_tokens,
    fixed_rows,
    floats,
    largest,
    largest_by_count,
    like_first,
    most,
    number_of,
    rows_of,
    same_rows,
)

MAX_NORM = 32_767  # s16 codes with the same statistics, and channels: n = N*q - S stays below 2^31
MAX_NORM_U8 = (2**31 - 1) // 255
MIN_EPSILON, MAX_EPSILON = 2.0**-60, 2.0**100  # so that neither sqrt nor 1/w leaves the normal numbers


# ---- position --------------------------------------------------------------------------------------------------------


def _position_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    return node.attributes["prefix"] + inputs[0][0], inputs[0][1]


def _check_position(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    check_tokens(inputs[0], "an input", at)
    value, place = attribute(node, "prefix", at)
    integer(value, 0, MAX_ATTRIBUTE, place)
    shape = _position_shape(node, [inputs[0].shape])
    check_shape(output, shape, at)
    rows = floats(node, "rows", shape, at, facts)
    check_bound(most(inputs[0]) * abs(number_of(node, "multiplier", at)) + facts.of(largest, rows), output, at)


def _position_rows(node: Node, inputs: Sequence[Activation], rows: Sequence[Rows], at: str) -> Rows:
    return None if rows[0] is None else rows[0] + node.attributes["prefix"]


# ---- norm ------------------------------------------------------------------------------------------------------------


def _check_norm(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    x = inputs[0]
    check_shape(output, x.shape, at)
    channels, count = channels_of(x.shape), channels_of(x.shape)
    groups, place = attribute(node, "groups", at)
    if groups is not None:
        integer(groups, 1, MAX_ATTRIBUTE, place)
        expect(channels % groups == 0, "groups that divide the channels", groups, at)
        count = channels // groups * rows_of(x.shape)
    expect(channels <= MAX_NORM, f"at most {MAX_NORM} channels", channels, at)
    limit = MAX_NORM if x.dtype == "s16" else MAX_NORM_U8
    expect(count <= limit, f"at most {limit} elements with the same statistics", count, at)
    epsilon = number_of(node, "epsilon", at)
    expect(MIN_EPSILON <= epsilon <= MAX_EPSILON, "an epsilon in [2^-60, 2^100]", f"{epsilon:.3g}", at)
    multiplier, bias = (floats(node, key, (channels,), at, facts).astype(np.float64) for key in ("multiplier", "bias"))
    bounds = math.sqrt(count) * np.abs(multiplier) * 1.001 + np.abs(bias)
    check_bound(float(bounds.max()), output, at)


def _norm_rows(node: Node, inputs: Sequence[Activation], rows: Sequence[Rows], at: str) -> Rows:
    return (same_rows if node.attributes["groups"] is None else fixed_rows)(node, inputs, rows, at)


# ---- mean ------------------------------------------------------------------------------------------------------------


def _mean_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    return inputs[0][1:]


def _check_mean(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    x = inputs[0]
    check_tokens(x, "an input", at)
    check_shape(output, x.shape[1:], at)
    expect(x.shape[0] * most(x) < 2**31, "a mean with sums below 2^31", f"{x.shape[0]} rows", at)
    multiplier = floats(node, "multiplier", x.shape[:1], at, facts)
    bound = most(x) * facts.of(largest_by_count, multiplier)
    check_bound(bound + abs(number_of(node, "bias", at)), output, at)


def _mean_rows(node: Node, inputs: Sequence[Activation], rows: Sequence[Rows], at: str) -> Rows:
    return None


OPS = {
    "position": Op(
        inputs=(1, 1),
        output="requantized",
        shape=_position_shape,
        check=_check_position,
        attributes={"multiplier": float, "prefix": int},
        constants=("rows",),
        reads=CODES,
        writes=CODES,
        rows=_position_rows,
        version=3,
    ),
    "norm": Op(
        inputs=(1, 1),
        output="requantized",
        shape=like_first,
        check=_check_norm,
        attributes={"groups": int, "epsilon": float},
        constants=("multiplier", "bias"),
        nullable=("groups",),
        reads=CODES,
        writes=(*CODES, "f32"),
        rows=_norm_rows,
        version=3,
    ),
    "mean": Op(
        inputs=(1, 1),
        output="requantized",
        shape=_mean_shape,
        check=_check_mean,
        attributes={"bias": float},
        constants=("multiplier",),
        reads=CODES,
        rows=_mean_rows,
        version=3,
    ),
}
