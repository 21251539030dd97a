"""The oracle against exact rational arithmetic and plain Python integers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from builder import Builder, batch
from exact import exact_fma, round_to_f32
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_graphs import ensembles, generators, graphs

from qdeploy import reference
from qdeploy.errors import InputError
from qdeploy.graph import Activation, Graph

LARGEST = float(np.finfo(np.float32).max)
LEAST = 2.0**-149
F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def fma(a: float, b: float, c: float) -> float:
    return float(reference.fma32(np.float32(a), np.float32(b), np.float32(c)))


@settings(max_examples=600, deadline=None)
@given(F32, F32, F32)
@example(LARGEST, 1.0, 2.0**103)  # exactly between the largest f32 and 2^128: to even, infinity
@example(LARGEST, 1.0, 2.0**102)
@example(2.0**-75, 2.0**-75, 0.0)  # half the least subnormal: to even, zero
@example(2.0**-75, 3 * 2.0**-75, LEAST)
@example(2.0**-75, 2.0**-75, 2.0**-149)
@example(LEAST, LEAST, 1.0)
@example(LEAST, -LEAST, 2.0**-126)
def test_fma_equals_exact_arithmetic(a, b, c):
    assert fma(a, b, c) == exact_fma(a, b, c)


@settings(max_examples=250, deadline=None)
@given(
    st.integers(3 * 2**10, 2**12 - 1).map(lambda n: n | 1),
    st.integers(3 * 2**11, 2**13 - 1).map(lambda n: n | 1),
    st.integers(-80, 60),
    st.integers(35, 65),
    st.sampled_from([-1, 1]),
    st.sampled_from([-1, 1]),
)
def test_fma_does_not_round_twice(a, b, exponent, distance, sign, side):
    """a*b has 25 bits and its last is 1: it lies between two f32. A tiny c decides, which f64 alone cannot see."""
    a, b = math.ldexp(sign * a, exponent // 2), math.ldexp(b, exponent - exponent // 2)
    c = math.ldexp(side, exponent - distance)
    assert fma(a, b, c) == exact_fma(a, b, c)


def test_double_rounding_would_be_noticed():
    """f64 arithmetic rounded to f32 fails where fma32 does not: the test above tests something."""
    a, b, c = 3073.0, 6145.0, 2.0**-40
    assert float(np.float32(a * b + c)) == 18883584.0
    assert fma(a, b, c) == exact_fma(a, b, c) == 18883586.0


def test_fma_of_infinite_and_nan_operands():
    assert fma(math.inf, 1, 1) == math.inf
    assert fma(LARGEST, LARGEST, 0) == math.inf
    assert math.isnan(fma(math.inf, 0, 1))


def test_inputs_are_rounded_half_to_even_and_clamped():
    x = np.array([0.5, 1.5, 2.5, -0.5, -7, 254.5, 255.5, 3e38, -3e38], np.float32)
    assert reference.quantize(x, Activation("x", (9,), "u8", 1.0, 0)).tolist() == [0, 2, 2, 0, 0, 254, 255, 255, 0]
    assert reference.quantize(x, Activation("x", (9,), "u8", 0.5, 3)).tolist() == [4, 6, 8, 2, 0, 255, 255, 255, 0]
    assert reference.quantize(np.float32([3e38]), Activation("x", (1,), "u8", 2.0**-126, 0)).tolist() == [255]


def test_preprocess_table_is_the_quantized_pixel():
    activation = Activation("x", (2, 1, 1), "u8", 0.018, 117)
    table = reference.preprocess_table({"mean": [0.485, 0.5], "std": [0.229, 0.25]}, activation)
    assert (table.shape, table.dtype) == ((2, 256), np.uint8)
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.5, 0.25)]):
        for v in (0, 1, 100, 255):
            x = (np.float32(v) / np.float32(255) - np.float32(mean)) / np.float32(std)
            assert table[channel, v] == reference.quantize(x, activation)


def plain_result(node, acc: int, channel: int, residual: int | None) -> float:
    m, b = (float(node.constants[key][channel]) for key in ("multiplier", "bias"))
    r = exact_fma(round_to_f32(Fraction(acc)), m, b)
    if residual is None:
        return r
    factor = np.float32(node.attributes["residual_multiplier"]).item()
    if "inner_clamp" not in node.attributes:
        return exact_fma(residual, factor, r)
    low, high = node.attributes["inner_clamp"]
    m, b = (np.float32(node.attributes[key]).item() for key in ("inner_multiplier", "inner_bias"))
    return exact_fma(min(max(round(Fraction(r)), low), high), m, exact_fma(residual, factor, b))


def plain_conv2d(node, x: np.ndarray, zero_point: int, residual: np.ndarray | None, shape) -> np.ndarray:
    """One image by loops over Python integers; u8 output."""
    weight, groups = node.constants["weight"].tolist(), node.attributes["groups"]
    (top, left, _, _), (sh, sw), (dh, dw) = (node.attributes[key] for key in ("padding", "stride", "dilation"))
    lo, hi = node.attributes["clamp"]
    out_channels, (channels, height, width) = len(weight), x.shape
    result = np.zeros(shape, np.uint8)
    for o, i, j in np.ndindex(shape):
        first = o // (out_channels // groups) * (channels // groups)
        acc = 0
        for c, plane in enumerate(weight[o]):
            for ky, row in enumerate(plane):
                for kx, w in enumerate(row):
                    y, z = i * sh - top + ky * dh, j * sw - left + kx * dw
                    if 0 <= y < height and 0 <= z < width:
                        acc += (int(x[first + c, y, z]) - zero_point) * w
        r = plain_result(node, acc, o, None if residual is None else int(residual[o, i, j]))
        result[o, i, j] = min(max(round(Fraction(r)), lo), hi)
    return result


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("residual", ["", "residual", "inner codes"])
@pytest.mark.parametrize("exact", [False, True])
def test_conv2d_equals_plain_integers(groups, residual, exact):
    with_residual, inner = residual != "", residual == "inner codes"
    rng = np.random.default_rng(groups + 10 * with_residual + 100 * exact)
    builder = Builder(rng, (4, 7, 5), (0.25, 131))
    shape = {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0, 2, 1), "dilation": (1, 2), "groups": groups}
    added = builder.conv2d(0, 8, **shape, exact=exact) if with_residual else None
    builder.conv2d(0, 8, **shape, bits=5, residual=added, inner=inner, clamp=(3, 250), exact=exact)
    graph = Graph([builder.member()])
    x = batch(graph, 2, rng)
    names = [node.name for node in builder.nodes]
    output, taps = reference.run(graph, x, taps=names)
    codes = reference.quantize(x, builder.tensors[0])
    for image in range(2):
        tap = taps[names[0]][image] if with_residual else None
        node = builder.nodes[-1]
        assert np.array_equal(output[image], plain_conv2d(node, codes[image], 131, tap, builder.shape(node.output)))


def test_linear_add_and_pools_equal_plain_integers():
    rng = np.random.default_rng(5)
    builder = Builder(rng, (3, 5, 4), (0.25, 100))
    pool = builder.max_pool2d(0, (3, 2), (2, 1), (1, 1, 0, 0), (1, 2))
    mean = builder.avg_pool2d(0, (2, 3), (1, 2), (1, 2, 0, 1), exact=True)
    total = builder.add(mean, mean, clamp=(1, 254), exact=True)
    flat = builder.reshape(total, (math.prod(builder.shape(total)),))
    builder.linear(flat, 4, bits=3, dtype="f32")
    graph = Graph([builder.member()])
    x = batch(graph, 1, rng)
    output, taps = reference.run(graph, x, [node.name for node in builder.nodes])
    values = {0: reference.quantize(x, builder.tensors[0])[0]}
    values |= {node.output: taps[node.name][0] for node in builder.nodes}
    q = values[0].astype(int)
    for c, i, j in np.ndindex(builder.shape(pool)):
        taken = [q[c, y, z] for y in range(2 * i - 1, 2 * i + 2) for z in (j - 1, j + 1) if 0 <= y < 5 and 0 <= z < 4]
        assert values[pool][c, i, j] == max(taken)
    node = builder.nodes[1]
    for c, i, j in np.ndindex(builder.shape(mean)):
        rows, columns = range(i - 1, i + 1), range(2 * j - 2, 2 * j + 1)
        taken = [int(q[c, y, z]) - 100 for y in rows for z in columns if 0 <= y < 5 and 0 <= z < 4]
        r = exact_fma(sum(taken), node.constants["multiplier"][len(taken) - 1].item(), float(node.attributes["bias"]))
        assert values[mean][c, i, j] == min(max(round(Fraction(r)), 0), 255)
    node = builder.nodes[2]
    ma, mb = (np.float32(m).item() for m in node.attributes["multipliers"])
    for code in np.unique(values[mean]).tolist():
        r = exact_fma(code, ma, exact_fma(code, mb, float(node.attributes["bias"])))
        assert (values[total][values[mean] == code] == min(max(round(Fraction(r)), 1), 254)).all()
    node, zero_point = builder.nodes[4], builder.tensors[flat].zero_point
    for o, row in enumerate(node.constants["weight"].tolist()):
        acc = sum((int(code) - zero_point) * w for code, w in zip(values[flat], row, strict=True))
        assert output[0, o] == plain_result(node, acc, o, None)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dtype", ["u8", "f32"])
def test_mul_equals_plain_integers(gate, dtype):
    rng = np.random.default_rng(7)
    builder = Builder(rng, (5, 4, 3), (0.25, 100))
    other = builder.avg_pool2d(0, (4, 3), (1, 1), (0, 0, 0, 0)) if gate else builder.table(0)
    builder.mul(0, other, dtype, clamp=(3, 250), exact=True)
    graph = Graph([builder.member()])
    x = batch(graph, 2, rng)
    output, taps = reference.run(graph, x, [builder.nodes[0].name])
    node, a = builder.nodes[1], reference.quantize(x, builder.tensors[0])
    b = np.broadcast_to(taps[builder.nodes[0].name], a.shape)
    m, bias = (np.float32(node.attributes[key]).item() for key in ("multiplier", "bias"))
    for at in np.ndindex(a.shape):
        r = exact_fma((int(a[at]) - 100) * (int(b[at]) - builder.tensors[other].zero_point), m, bias)
        assert output[at] == (r if dtype == "f32" else min(max(round(Fraction(r)), 3), 250))


def test_the_two_rules_of_an_ensemble_differ_as_they_should():
    logits = [np.array([row], np.float32) for row in ([10, 0, 9], [0, 3, 0.5], [0, 3, 0.5])]
    assert [reference.combine(logits, rule)[1].argmax() for rule in ("logits", "probs")] == [0, 1]


def test_the_class_is_decided_before_the_softmax_can_lose_it():
    output, scores = reference.combine([np.array([[1e-9, 2e-9]], np.float32)] * 2, "logits")
    assert output.tolist() == [[0.5, 0.5]]
    assert scores.argmax() == 1


@settings(max_examples=150, deadline=None)
@given(generators(), st.integers(1, 50), st.sampled_from([0.1, 3.0, 30.0, 1e4]))
def test_softmax_against_float64(rng, classes, spread):
    """x - max is rounded to f32, so an error of |x - max|*2^-24 is inherent; 8 more such units cover the polynomial,
    the division and the sum; the integer sum adds half a unit of 2^-30 per class. Below exp(-87) the result is 0."""
    x = (rng.standard_normal((20, classes)) * spread).astype(np.float32)
    p = reference.softmax(x)
    d = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    exact = np.exp(d) / np.exp(d).sum(axis=1, keepdims=True)
    assert p.dtype == np.float32
    bound = exact * ((np.abs(d) + 8) * 2.0**-24 + classes * 2.0**-31) + 2.0**-149
    assert (np.abs(p - exact) <= np.where(d < -86.99, math.exp(-86.9), bound)).all()
    order = rng.permutation(classes)
    assert np.array_equal(reference.softmax(x[:, order]), p[:, order])


@settings(max_examples=40, deadline=None)
@given(st.one_of(graphs(), ensembles()), generators())
def test_an_image_does_not_depend_on_its_batch(graph, rng):
    x = batch(graph, 3, rng)
    together = reference.run(graph, x)
    assert np.array_equal(together, np.concatenate([reference.run(graph, x[i : i + 1]) for i in range(3)]))
    empty = reference.run(graph, x[:0])
    assert (empty.shape, empty.dtype) == ((0, *together.shape[1:]), together.dtype)


def test_taps_of_an_unknown_node():
    builder = Builder(np.random.default_rng(0), (2,), (1.0, 0))
    builder.linear(0, 3)
    with pytest.raises(InputError, match="expected the name of a node, got 'fc' - at taps"):
        reference.run(Graph([builder.member()]), np.zeros((1, 2), np.float32), ["fc"])
