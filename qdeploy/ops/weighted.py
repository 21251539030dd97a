"""conv2d, linear and embedding: the ops with weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from qdeploy.checks import Facts, array, expect, integer, key_of, number, shape_text
from qdeploy.graph import CODES, Activation, Node, Shape
from qdeploy.ops.op import (
    MAX_ATTRIBUTE,
    Op,
    attribute,
    check_bound,
    check_clamp,
    check_power,
    check_shape,
    check_tokens,
    floats,
    largest,
    limit,
    most,
    number_of,
    same_rows,
    value_range,
)
from qdeploy.ops.windows import WINDOW, check_window, spatial

INNER_CODES = 4  # the first format version that has them


def _weight(node: Node, rank: int, layout: str, at: str) -> np.ndarray:
    weight, place = node.constants["weight"], key_of("weight", at)
    array(weight, np.int8, (-1,) * weight.ndim if isinstance(weight, np.ndarray) else (), place)
    expect(weight.ndim == rank and weight.size > 0, f"a weight of shape {layout}", shape_text(weight.shape), place)
    return weight


def _check_weight_shape(weight: np.ndarray, expected: Shape, at: str) -> None:
    place = key_of("weight", at)
    expect(weight.shape == expected, f"a weight of shape {shape_text(expected)}", shape_text(weight.shape), place)


def _check_codes(weight: np.ndarray, half: int, at: str, facts: Facts) -> None:
    low, high = facts.of(value_range, weight)
    bits = half.bit_length()
    expect(-half <= low and high < half, f"codes of {bits} bits", f"codes from {low} to {high}", at)


def _half(node: Node, at: str) -> int:
    """Codes are at least -half and below half."""
    return 2 ** (integer(node.bits, 2, 8, key_of("bits", key_of("weight", at))) - 1)


# ---- conv2d, linear --------------------------------------------------------------------------------------------------


def _check_weighted(
    node: Node, expected: Shape, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts
) -> None:
    """What conv2d and linear share: codes, multiplier, bias, residual and the bound of the accumulators."""
    weight = node.constants["weight"]
    _check_weight_shape(weight, expected, at)
    half, depth = _half(node, at), math.prod(weight.shape[1:])
    got = f"weight {shape_text(weight.shape)} of {half.bit_length()} bits"
    expect(depth * 255 * half < 2**31, "accumulators below 2^31", got, at)
    _check_codes(weight, half, at, facts)
    for key in ("multiplier", "bias"):
        floats(node, key, weight.shape[:1], at, facts)
    if len(inputs) == 2:
        shape = shape_text(output.shape)
        expect(inputs[1].shape == output.shape, f"a residual of shape {shape}", shape_text(inputs[1].shape), at)
        number_of(node, "residual_multiplier", at)
        if "inner_clamp" in node.attributes:
            _check_inner_codes(node, inputs, output, at)


def _check_weighted_bound(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    """The bound on the results; it comes last because the engine finds it when it packs the weights."""
    bound = facts.of(_weighted_bound, *(node.constants[key] for key in ("weight", "multiplier", "bias")))
    inner = "inner_clamp" in node.attributes  # codes whatever the output is; the sum has a bound of its own
    power, residual = (30, 0.0) if inner else (limit(output), _residual_bound(node, inputs, at))
    if not facts.of(np.max, bound) + residual < 2.0**power:
        channel = int(np.argmax(~(bound + residual < 2.0**power)))  # the first
        check_power(float(bound[channel]) + residual, power, f"channel {channel} of {at}")


def _check_inner_codes(node: Node, inputs: Sequence[Activation], output: Activation, at: str) -> None:
    check_clamp(node, "inner_clamp", at)
    factor, shift = (abs(number_of(node, key, at)) for key in ("inner_multiplier", "inner_bias"))
    check_bound(255.0 * factor + shift + _residual_bound(node, inputs, at), output, at)


def _residual_bound(node: Node, inputs: Sequence[Activation], at: str) -> float:
    return most(inputs[-1]) * abs(number(node.attributes.get("residual_multiplier", 0.0), at))


def _weighted_since(node: Node, inputs: Sequence[Activation]) -> int:
    return INNER_CODES if "inner_clamp" in node.attributes else 1


def _weighted_bound(weight: np.ndarray, multiplier: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Of each channel, without a residual."""
    magnitude = np.abs(weight.reshape(weight.shape[0], -1).astype(np.int16)).sum(axis=1, dtype=np.int64)
    return 255.0 * magnitude * np.abs(multiplier.astype(np.float64)) + np.abs(bias.astype(np.float64))


def _conv2d_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    out_channels, _, *kernel = node.constants["weight"].shape
    return (out_channels, *spatial(node, inputs[0], kernel, node.attributes["dilation"]))


def _check_conv2d(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    weight = _weight(node, 4, "[O, C/groups, KH, KW]", at)
    check_window(node, inputs[0], weight.shape[2:], output.shape[0], output, at)
    value, place = attribute(node, "groups", at)
    groups = integer(value, 1, MAX_ATTRIBUTE, place)
    channels, outputs = inputs[0].shape[0], output.shape[0]
    expect(channels % groups == 0 == outputs % groups, "groups that divide the channels", groups, at)
    _check_weighted(node, (outputs, channels // groups, *weight.shape[2:]), inputs, output, at, facts)


def _linear_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    return (*inputs[0][:-1], node.constants["weight"].shape[0])


def _check_linear(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    _weight(node, 2, "[O, F]", at)
    shape = "[F]" if facts.version < 3 else "[F] or [T, F]"
    for tensor, what in ((inputs[0], "input"), (output, "output")):
        expect(len(tensor.shape) < 3, f"an {what} of shape {shape}", shape_text(tensor.shape), at)
    check_shape(output, (*inputs[0].shape[:-1], output.shape[-1]), at)
    _check_weighted(node, (output.shape[-1], inputs[0].shape[-1]), inputs, output, at, facts)


# ---- embedding -------------------------------------------------------------------------------------------------------


def _embedding_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    return (*inputs[0], node.constants["weight"].shape[1])


def _check_embedding(node: Node, inputs: Sequence[Activation], output: Activation, at: str, facts: Facts) -> None:
    weight = _weight(node, 2, "[V, D]", at)
    check_tokens(output, "an output", at)
    check_shape(output, (*inputs[0].shape, output.shape[1]), at)
    _check_weight_shape(weight, (facts.vocabulary or 0, output.shape[1]), at)
    half = _half(node, at)
    _check_codes(weight, half, at, facts)
    multiplier = floats(node, "multiplier", (-1,), at, facts)
    fits = multiplier.size in (1, weight.shape[0])
    expect(fits, f"1 or {weight.shape[0]} multipliers", multiplier.size, key_of("multiplier", at))
    rows = floats(node, "rows", output.shape, at, facts)
    check_bound(half * facts.of(largest, multiplier) + facts.of(largest, rows), output, at)


OPS = {
    "conv2d": Op(
        inputs=(1, 2),
        output="requantized",
        shape=_conv2d_shape,
        check=_check_conv2d,
        attributes=WINDOW | {"dilation": int, "groups": int},
        constants=("weight", "multiplier", "bias"),
        residual=True,
        writes=(*CODES, "f32"),
        bound=_check_weighted_bound,
        variant_since=_weighted_since,
    ),
    "linear": Op(
        inputs=(1, 2),
        output="requantized",
        shape=_linear_shape,
        check=_check_linear,
        constants=("weight", "multiplier", "bias"),
        residual=True,
        writes=(*CODES, "f32"),
        rows=same_rows,
        bound=_check_weighted_bound,
        variant_since=_weighted_since,
    ),
    "embedding": Op(
        inputs=(1, 1),
        output="requantized",
        shape=_embedding_shape,
        check=_check_embedding,
        constants=("weight", "multiplier", "rows"),
        reads=("i32",),
        writes=CODES,
        rows=same_rows,
        version=3,
    ),
}
