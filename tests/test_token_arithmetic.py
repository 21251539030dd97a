"""The ops of format version 3 in the reference, element by element against exact rational arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from builder import Builder, small_text, text_batch
from exact import code, exact_fma, exact_sqrt, round_to_f32
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import generators, texts

from qdeploy import reference
from qdeploy.format import dump, parse
from qdeploy.graph import Activation, Graph, Node
from qdeploy.ops import OPS

RANGES = {"u8": (0, 255), "s16": (-32767, 32767)}
ZERO_POINTS = st.sampled_from([0, 1, 128, 255])


def tensor(values: np.ndarray, zero_point: int = 0, scale: float = 0.5) -> Activation:
    """What holds these codes [N, ...]."""
    dtype = {"uint8": "u8", "int16": "s16", "int32": "i32"}[values.dtype.name]
    return Activation("x", values.shape[1:], dtype, scale, zero_point)


def result(
    op: str, values: list[np.ndarray], output: str | Activation, zero_points: tuple[int, ...] = (), **keys: object
) -> np.ndarray:
    """What a node of this op with these keys writes; its output is of this dtype, or this tensor."""
    clamp = keys.pop("clamp", (0, 255))
    constants = {key: keys.pop(key) for key in OPS[op].constants if keys.get(key) is not None}
    bits = keys.pop("bits", None)
    nulls = {key: None for key in OPS[op].nullable if key in OPS[op].attributes}
    node = Node(op, op, list(range(len(values))), len(values), nulls | keys, constants, bits)
    inputs = [tensor(x, z) for x, z in zip(values, zero_points or [0] * len(values), strict=True)]
    if isinstance(output, str):
        shape = OPS[op].shape(node, [x.shape for x in inputs])
        assert shape is not None
        output = Activation("y", shape, output)
    if output.dtype == "u8" and OPS[op].requantized:
        node.attributes["clamp"] = clamp
    written = reference.run_node(node, values, inputs, output)
    assert (written.shape[1:], written.dtype) == (output.shape, reference.NUMPY[output.dtype])
    return written


def codes(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, extreme: bool = False) -> np.ndarray:
    low, high = RANGES[dtype]
    values = rng.choice([low, high], shape) if extreme else rng.integers(low, high + 1, shape)
    return values.astype(reference.NUMPY[dtype])


def f32(value: float) -> float:
    return float(np.float32(value))


def floats(rng: np.random.Generator, shape: int | tuple[int, ...], size: float) -> np.ndarray:
    return (rng.standard_normal(shape) * size).astype(np.float32)


def written_as(r: float, dtype: str, clamp: tuple[int, int] = (0, 255)) -> float:
    return r if dtype == "f32" else code(r, *(clamp if dtype == "u8" else RANGES["s16"]))


# ---- norm ------------------------------------------------------------------------------------------------------------


def exact_norm(codes_of_group: list[int], q: int, epsilon: float, m: float, b: float) -> float:
    """r of one of the codes that share statistics."""
    n = len(codes_of_group)
    total = sum(codes_of_group)
    variance = n * sum(c * c for c in codes_of_group) - total**2
    assert 0 <= variance < 2**63 and abs(n * q - total) < 2**31
    width = exact_sqrt(round_to_f32(Fraction(round_to_f32(Fraction(variance))) + Fraction(epsilon)))
    inverse = round_to_f32(1 / Fraction(width))
    t = round_to_f32(Fraction(round_to_f32(Fraction(n * q - total))) * Fraction(inverse))
    assert abs(t) <= math.sqrt(n) * (1 + 2.0**-20)
    return exact_fma(t, m, b)


@settings(max_examples=60, deadline=None)
@given(
    generators(),
    st.integers(1, 12),
    st.integers(1, 20),
    st.sampled_from(["u8", "s16"]),
    st.sampled_from(["u8", "s16", "f32"]),
    st.booleans(),
    st.sampled_from([2.0**-60, 3.7, 2.0**40]),
)
def test_norm_of_rows_equals_exact_arithmetic(rng, rows, channels, read, write, extreme, epsilon):
    x = codes(rng, (2, rows, channels), read, extreme)
    m, b = floats(rng, channels, 100 if write == "u8" else 3000), floats(rng, channels, 100)
    y = result("norm", [x], write, (77 if read == "u8" else 0,), multiplier=m, bias=b, epsilon=epsilon, clamp=(9, 201))
    for at in np.ndindex(x.shape):
        row = [int(q) for q in x[at[:2]]]
        r = exact_norm(row, int(x[at]), f32(epsilon), float(m[at[2]]), float(b[at[2]]))
        assert y[at] == written_as(r, write, (9, 201))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("tokens", [False, True])
def test_norm_of_groups_equals_exact_arithmetic(groups, tokens):
    rng = np.random.default_rng(groups)
    x = codes(rng, (2, 6, 3, 5), "u8")
    m, b = floats(rng, 6, 60), floats(rng, 6, 100)
    given = x.reshape(2, 6, 15).swapaxes(1, 2) if tokens else x
    y = result("norm", [given], "f32", multiplier=m, bias=b, epsilon=0.25, groups=groups)
    y = y.swapaxes(1, 2).reshape(x.shape) if tokens else y
    for image, c, i, j in np.ndindex(x.shape):
        first = c // (6 // groups) * (6 // groups)
        group = x[image, first : first + 6 // groups].astype(int).ravel().tolist()
        assert y[image, c, i, j] == exact_norm(group, int(x[image, c, i, j]), 0.25, float(m[c]), float(b[c]))


@pytest.mark.parametrize("kind", ["alternating", "one apart", "equal", "random"])
def test_norm_at_its_largest(kind):
    """32,767 codes of s16: N*q - S and N*sum q^2 - S^2 are as large as they can be."""
    n = 32_767
    x = np.full(n, 32767, np.int16)
    if kind == "alternating":
        x[::2] = -32767
    elif kind == "one apart":
        x[5] = -32767
    elif kind == "random":
        x = codes(np.random.default_rng(1), (n,), "s16")
    m, b = np.linspace(-1000, 1000, n, dtype=np.float32), np.linspace(-3, 7, n, dtype=np.float32)
    y = result("norm", [x[None]], "s16", multiplier=m, bias=b, epsilon=2.0**-60)
    row = [int(q) for q in x]
    for i in (0, 1, 4, 5, 6, n // 2, n - 1):
        assert y[0, i] == written_as(exact_norm(row, row[i], 2.0**-60, float(m[i]), float(b[i])), "s16")
    if kind == "equal":
        assert np.array_equal(y[0], np.rint(b))  # no variance: the bias alone


def test_norm_of_the_most_u8_codes():
    """N*255 just below 2^31: the squares of a whole tensor of pixels."""
    x = np.full((1, 1, 3, 2_807_168), 255, np.uint8)
    x[..., ::3] = 0
    y = result("norm", [x], "f32", multiplier=np.float32([2.0]), bias=np.float32([1.0]), epsilon=1.0, groups=1)
    n, low = x.size, int((x == 0).sum())
    assert 255 * n < 2**31 <= 255 * (n + 3)
    total, squares = 255 * (n - low), 255**2 * (n - low)
    variance = n * squares - total**2
    inverse = 1 / math.sqrt(variance)
    for q in (0, 255):
        expected = 2 * (n * q - total) * inverse + 1
        assert y[x == q][0] == pytest.approx(expected, rel=1e-6)
        assert len(np.unique(y[x == q])) == 1


def test_norm_is_the_layer_norm_of_real_numbers():
    rng = np.random.default_rng(0)
    x, scale, eps = codes(rng, (4, 7, 96), "s16"), 0.0005, 1e-6
    gamma, beta = rng.standard_normal(96), rng.standard_normal(96)
    epsilon = f32(96**2 * eps / scale**2)
    y = result("norm", [x], "f32", multiplier=gamma.astype(np.float32), bias=beta.astype(np.float32), epsilon=epsilon)
    real = x * scale
    wanted = (real - real.mean(2, keepdims=True)) / np.sqrt(real.var(2, keepdims=True) + eps) * gamma + beta
    assert np.abs(y - wanted).max() < 1e-5


# ---- attention -------------------------------------------------------------------------------------------------------


def exact_weights(logits: list[float], peak: int) -> list[int]:
    c4, c3, c2, c1 = (float(c) for c in np.uint32([0x3C1D0166, 0x3D64FE23, 0x3E7601BC, 0x3F317096]).view(np.float32))
    weights = []
    for t in logits:
        d = max(round_to_f32(Fraction(t) - Fraction(max(logits))), -32.0)
        n = round(Fraction(d))
        y, f = c4, d - n
        for c in (c3, c2, c1, 1.0):
            y = exact_fma(y, f, c)
        scaled = Fraction(round_to_f32(Fraction(y) * peak)) * Fraction(2) ** n
        weights.append(round(scaled))
    assert max(weights) == peak
    return weights


def exact_attention(q, k, v, zero_points, keys, seen, bias) -> np.ndarray:
    """One text, f32; `seen[i][j]` says whether row i sees key j, `bias(head, i, j)` is the logit's."""
    zq, zk, zv = zero_points
    heads, m, b = keys["heads"], f32(keys["multiplier"]), f32(keys["bias"])
    depth, width = q.shape[1] // heads, v.shape[1] // heads
    r = np.zeros((len(q), v.shape[1]), np.float32)
    q, k, v = (x.astype(int).tolist() for x in (q, k, v))
    for h in range(heads):
        channels = range(h * depth, (h + 1) * depth)
        for i, row in enumerate(q):
            visible = [j for j in range(len(k)) if seen[i][j]]
            products = [sum((row[c] - zq) * (k[j][c] - zk) for c in channels) for j in visible]
            logits = [
                exact_fma(round_to_f32(Fraction(a)), f32(keys["logit_multiplier"]), bias(h, i, j))
                for a, j in zip(products, visible, strict=True)
            ]
            weights = exact_weights(logits, keys["peak"])
            divided = round_to_f32(Fraction(m) / Fraction(round_to_f32(Fraction(sum(weights)))))
            for c in range(h * width, (h + 1) * width):
                acc = sum(p * (v[j][c] - zv) for p, j in zip(weights, visible, strict=True))
                assert abs(acc) < 2**31
                r[i, c] = exact_fma(round_to_f32(Fraction(acc)), divided, b)
    return r


@settings(max_examples=50, deadline=None)
@given(
    generators(),
    st.integers(1, 6),
    st.integers(1, 6),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    st.tuples(ZERO_POINTS, ZERO_POINTS, ZERO_POINTS),
    st.booleans(),
    st.sampled_from([0.0, 1e-5, 3e-4, -1e-2]),
    st.booleans(),
)
def test_attention_equals_exact_arithmetic(rng, queries, n_keys, sizes, zero_points, extreme, logit, biased):
    heads, depth, width = sizes
    shapes = [(2, queries, heads * depth), (2, n_keys, heads * depth), (2, n_keys, heads * width)]
    values = [codes(rng, shape, "u8", extreme) for shape in shapes]
    keys = {"heads": heads, "logit_multiplier": f32(logit), "multiplier": 0.7, "bias": 101.3, "peak": 32767}
    logit_bias = floats(rng, (heads, queries, n_keys), 2) if biased else None
    y = result("attention", values, "u8", zero_points, logit_bias=logit_bias, clamp=(20, 240), **keys)
    seen = np.ones((queries, n_keys), bool)
    for text in range(2):
        q, k, v = (x[text] for x in values)
        bias = lambda h, i, j: 0.0 if logit_bias is None else float(logit_bias[h, i, j])  # noqa: E731
        r = exact_attention(q, k, v, zero_points, keys, seen, bias)
        assert y[text].tolist() == [[code(float(a), 20, 240) for a in row] for row in r]


@pytest.mark.parametrize("regions", [None, [0, 0, 1, 7, 7, -3]])
@pytest.mark.parametrize("block", [None, 1, 2, 3, 6])
def test_attention_of_segments_equals_exact_arithmetic(block, regions):
    rng = np.random.default_rng(3)
    q, k, v = (codes(rng, (1, 6, 4), "u8") for _ in range(3))
    size = block or 6
    logit_bias = floats(rng, (2, size, size), 2)
    keys = {"heads": 2, "logit_multiplier": 2e-4, "multiplier": 0.9, "bias": 3.0, "peak": 30000}
    constants = {"logit_bias": logit_bias, "regions": None if regions is None else np.int32(regions)}
    y = result("attention", [q, k, v], "u8", (9, 200, 128), block=block, **constants, **keys)
    region = regions or [0] * 6
    seen = [[i // size == j // size and region[i] == region[j] for j in range(6)] for i in range(6)]
    bias = lambda h, i, j: float(logit_bias[h, i % size, j % size])  # noqa: E731
    r = exact_attention(q[0], k[0], v[0], (9, 200, 128), keys, seen, bias)
    assert y[0].tolist() == [[code(float(a), 0, 255) for a in row] for row in r]


@pytest.mark.parametrize(("rows", "peak"), [(1, 32767), (257, 32767), (512, 16448), (1024, 8224)])
def test_attention_at_its_largest_sums(rows, peak):
    """All keys alike and all values 255: acc is peak*255*S, and the result 255 times the multiplier."""
    assert peak == min(32767, (2**31 - 1) // (255 * rows))
    q, k, v = (np.full((1, rows, 2), 255, np.uint8) for _ in range(3))
    keys = {"heads": 1, "logit_multiplier": 0.25, "peak": peak}
    y = result("attention", [q, k, v], "u8", multiplier=0.5, bias=1.0, **keys)
    assert np.unique(y).tolist() == [code(255 * 0.5 + 1, 0, 255)]
    y = result("attention", [q, k, v], "u8", (0, 0, 0), multiplier=-0.5, bias=200.0, clamp=(73, 73), **keys)
    assert np.unique(y).tolist() == [73]


def test_attention_is_the_softmax_of_real_numbers():
    rng = np.random.default_rng(0)
    values = [codes(rng, (1, 257, 24), "u8") for _ in range(3)]
    scale = 3 / (75**2 * math.sqrt(8))
    keys = {"heads": 3, "logit_multiplier": f32(scale * math.log2(math.e)), "peak": 32767}
    node = Node("attention", "a", [0, 1, 2], 3, {"block": None, "multiplier": 1.0, "bias": 0.0, **keys})
    r = reference.attention(node, values, [tensor(x, 128) for x in values], tensor(values[0]))
    q, k, v = (x[0].reshape(257, 3, 8).swapaxes(0, 1) - 128.0 for x in values)
    logits = q @ k.swapaxes(1, 2) * scale
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    wanted = (weights / weights.sum(axis=2, keepdims=True) @ v).swapaxes(0, 1).reshape(257, 24)
    assert np.abs(r[0] - wanted).max() < 128 * 257 * 0.5 / 32767  # half a step of every weight, all the same way


# ---- Element by element ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["u8", "s16"])
@pytest.mark.parametrize("write", ["u8", "s16", "f32"])
def test_rescale_equals_exact_arithmetic(read, write):
    x = np.array([[*range(*RANGES["u8"]), 255]] if read == "u8" else [[-32767, -1, 0, 1, 2, 3, 32767]])
    x = x.astype(reference.NUMPY[read])
    for m, b in [(0.5, 0.0), (-0.25, 128.5), (1.0, -3.5), (1e4, 0.0)]:
        y = result("rescale", [x], write, multiplier=m, bias=b)
        assert y[0].tolist() == [written_as(exact_fma(int(q), m, b), write) for q in x[0]]


@pytest.mark.parametrize("write", ["u8", "s16", "f32"])
@pytest.mark.parametrize("reads", [("u8", "s16"), ("s16", "s16"), ("s16", "u8")])
def test_add_of_s16_equals_exact_arithmetic(reads, write):
    rng = np.random.default_rng(4)
    a, b = (codes(rng, (2, 5, 3), dtype) for dtype in reads)
    ma, mb, bias = f32(0.37), f32(-0.011), 7.5
    y = result("add", [a, b], write, (9, 0) if reads[0] == "u8" else (0, 0), multipliers=(ma, mb), bias=bias)
    for at in np.ndindex(a.shape):
        assert y[at] == written_as(exact_fma(int(a[at]), ma, exact_fma(int(b[at]), mb, bias)), write)


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [((3, 4, 2), (1, 4, 2)), ((3, 4, 2), (3, 1, 1)), ((3, 4, 2), (3, 4, 2)), ((5, 3), (1, 3)), ((5, 3), (5, 3))],
)
def test_mul_by_gates_equals_exact_arithmetic(a_shape, b_shape):
    rng = np.random.default_rng(5)
    a, b = codes(rng, (2, *a_shape), "u8"), codes(rng, (2, *b_shape), "u8")
    m, bias = f32(-0.0123), f32(99.7)
    y = result("mul", [a, b], "u8", (128, 3), multiplier=m, bias=bias)
    for at in np.ndindex(a.shape):
        gate = tuple(0 if size == 1 else i for i, size in zip(at[1:], b_shape, strict=True))
        acc = (int(a[at]) - 128) * (int(b[(at[0], *gate)]) - 3)
        assert y[at] == code(exact_fma(acc, m, bias), 0, 255)


@pytest.mark.parametrize("residual", [None, "u8", "s16"])
@pytest.mark.parametrize("write", ["u8", "s16", "f32"])
def test_linear_of_tokens_equals_exact_arithmetic(residual, write):
    rng = np.random.default_rng(6)
    x, weight = codes(rng, (2, 4, 6), "u8"), rng.integers(-8, 8, (5, 6)).astype(np.int8)
    m, b = floats(rng, 5, 1 if write == "u8" else 30), floats(rng, 5, 50)
    values, keys = [x], {"weight": weight, "multiplier": m, "bias": b, "bits": 4}
    if residual:
        values.append(codes(rng, (2, 4, 5), residual))
        keys["residual_multiplier"] = f32(0.3)
    y = result("linear", values, write, (40, 200)[: len(values)], **keys)
    for n, t, o in np.ndindex(y.shape):
        acc = sum((int(q) - 40) * int(w) for q, w in zip(x[n, t], weight[o], strict=True))
        r = exact_fma(acc, float(m[o]), float(b[o]))
        r = exact_fma(int(values[1][n, t, o]), f32(0.3), r) if residual else r
        assert y[n, t, o] == written_as(r, write)


@pytest.mark.parametrize("residual", [False, True])
def test_conv2d_of_one_dimension_equals_exact_arithmetic(residual):
    """A conv1d is a conv2d of height 1; here it adds to a stream of s16."""
    rng = np.random.default_rng(7)
    x, weight = codes(rng, (1, 3, 1, 9), "u8"), rng.integers(-8, 8, (2, 3, 1, 3)).astype(np.int8)
    m, b = floats(rng, 2, 20), floats(rng, 2, 50)
    window = {"stride": (1, 2), "padding": (0, 1, 0, 1), "dilation": (1, 1), "groups": 1}
    keys = {"weight": weight, "multiplier": m, "bias": b, "bits": 4, **window}
    stream = codes(rng, (1, 2, 1, 5), "s16")
    values = [x, stream] if residual else [x]
    y = result(
        "conv2d", values, "s16", (90, 0)[: len(values)], **keys, **{"residual_multiplier": 0.5} if residual else {}
    )
    for o, i in np.ndindex(2, 5):
        taps = [(c, k) for c in range(3) for k in range(3) if 0 <= 2 * i - 1 + k < 9]
        acc = sum((int(x[0, c, 0, 2 * i - 1 + k]) - 90) * int(weight[o, c, 0, k]) for c, k in taps)
        r = exact_fma(acc, float(m[o]), float(b[o]))
        r = exact_fma(int(stream[0, o, 0, i]), 0.5, r) if residual else r
        assert y[0, o, 0, i] == code(r, *RANGES["s16"])


@pytest.mark.parametrize("per_count", [False, True])
def test_avg_pool2d_of_s16_equals_exact_arithmetic(per_count):
    rng = np.random.default_rng(8)
    x = codes(rng, (1, 2, 4, 5), "s16", extreme=True)
    m = floats(rng, 6 if per_count else 1, 0.3)
    window = {"kernel": (2, 3), "stride": (2, 1), "padding": (1, 1, 1, 1)}
    y = result("avg_pool2d", [x], "s16", multiplier=m, bias=f32(0.3), **window)
    for c, i, j in np.ndindex(y.shape[1:]):
        part = x[0, c, max(0, 2 * i - 1) : 2 * i + 1, max(0, j - 1) : j + 2].astype(int)
        r = exact_fma(round_to_f32(Fraction(int(part.sum()))), float(m[part.size - 1 if per_count else 0]), f32(0.3))
        assert y[0, c, i, j] == code(r, *RANGES["s16"])


@pytest.mark.parametrize("read", ["u8", "s16"])
@pytest.mark.parametrize("write", ["u8", "s16"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_position_equals_exact_arithmetic(read, write, prefix):
    rng = np.random.default_rng(9)
    x, rows = codes(rng, (2, 4, 3), read), floats(rng, (prefix + 6, 3), 200)  # the rows of a longer text
    y = result("position", [x], write, rows=rows, multiplier=f32(0.7), prefix=prefix)
    for n, t, d in np.ndindex(y.shape):
        row = float(rows[t, d])
        r = row if t < prefix else exact_fma(int(x[n, t - prefix, d]), f32(0.7), row)
        assert y[n, t, d] == written_as(r, write)


@pytest.mark.parametrize("write", ["u8", "s16"])
@pytest.mark.parametrize("per_row", [False, True])
def test_embedding_equals_exact_arithmetic(write, per_row):
    rng = np.random.default_rng(10)
    ids, weight = np.int32([[0, 6, 6], [3, 2, 1]]), rng.integers(-16, 16, (7, 4)).astype(np.int8)
    m, rows = floats(rng, 7 if per_row else 1, 10), floats(rng, (5, 4), 100)
    y = result("embedding", [ids], write, weight=weight, multiplier=m, rows=rows, bits=5)
    for n, t, d in np.ndindex(y.shape):
        i = ids[n, t]
        r = exact_fma(int(weight[i, d]), float(m[i if per_row else 0]), float(rows[t, d]))
        assert y[n, t, d] == written_as(r, write)


@pytest.mark.parametrize("read", ["u8", "s16"])
@pytest.mark.parametrize("write", ["u8", "f32"])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_mean_equals_exact_arithmetic(read, write, rows):
    rng = np.random.default_rng(11)
    x, m, zero_point = codes(rng, (2, rows, 3), read, extreme=True), floats(rng, 5, 0.2), 100 if read == "u8" else 0
    y = result("mean", [x], write, (zero_point,), multiplier=m, bias=12.5)
    for n, d in np.ndindex(y.shape):
        acc = sum(int(q) - zero_point for q in x[n, :, d])
        assert y[n, d] == written_as(exact_fma(round_to_f32(Fraction(acc)), float(m[rows - 1]), 12.5), write)


# ---- Moves -----------------------------------------------------------------------------------------------------------


def moved(x: np.ndarray, index: object, shape: tuple[int, ...], axis: str = "rows", zero_point: int = 0) -> np.ndarray:
    output = Activation("y", shape, tensor(x).dtype, 0.5, zero_point)
    return result("gather", [x], output, (zero_point,), axis=axis, index=np.asarray(index, np.int32).ravel())


@pytest.mark.parametrize("dtype", ["u8", "s16"])
def test_gather_of_rows_and_channels(dtype):
    rng, zero_point = np.random.default_rng(12), 7 if dtype == "u8" else 0
    x = codes(rng, (2, 5, 3), dtype)
    y = moved(x, [4, -1, 0, 0], (4, 3), zero_point=zero_point)
    assert np.array_equal(y, np.stack([x[:, 4], np.full((2, 3), zero_point), x[:, 0], x[:, 0]], axis=1))
    y = moved(x, [2, -1], (5, 2), "channels", zero_point)
    assert np.array_equal(y, np.stack([x[:, :, 2], np.full((2, 5), zero_point)], axis=2))
    assert np.array_equal(moved(x, [3], (3,)), x[:, 3])  # one row as a vector
    x = codes(rng, (2, 6), dtype)
    assert np.array_equal(moved(x, [5, 1], (2,), "channels"), x[:, [5, 1]])
    assert np.array_equal(moved(x, [0, 0], (2, 6)), np.stack([x, x], axis=1))


def test_what_networks_do_with_images_is_a_gather():
    rng = np.random.default_rng(13)
    x = codes(rng, (2, 6, 4, 8), "u8")
    pixels = np.arange(32).reshape(4, 8)
    mirrored = np.pad(pixels, ((1, 2), (3, 0)), mode="reflect")
    assert np.array_equal(moved(x, mirrored, (6, 7, 11)), np.pad(x, ((0, 0), (0, 0), (1, 2), (3, 0)), mode="reflect"))
    edge = np.pad(pixels, 1, mode="edge")
    assert np.array_equal(moved(x, edge, (6, 6, 10)), np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge"))
    outside = np.pad(pixels, 1, constant_values=-1)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=5)
    assert np.array_equal(moved(x, outside, (6, 6, 10), zero_point=5), padded)
    nearest = pixels.repeat(2, axis=0).repeat(3, axis=1)
    assert np.array_equal(moved(x, nearest, (6, 8, 24)), x.repeat(2, axis=2).repeat(3, axis=3))
    rolled = np.roll(pixels, (-1, 2), (0, 1))
    assert np.array_equal(moved(x, rolled, (6, 4, 8)), np.roll(x, (-1, 2), (2, 3)))
    shuffled = np.arange(6).reshape(2, 3).T
    assert np.array_equal(
        moved(x, shuffled, (6, 4, 8), "channels"), x.reshape(2, 2, 3, 4, 8).swapaxes(1, 2).reshape(x.shape)
    )
    windows = pixels.reshape(2, 2, 2, 4).swapaxes(1, 2)  # of 2 x 4 pixels, one after the other
    tokens = x.reshape(2, 6, 2, 2, 2, 4).transpose(0, 2, 4, 3, 5, 1).reshape(2, 32, 6)
    assert np.array_equal(moved(x, windows, (32, 6)), tokens)
    assert np.array_equal(moved(x, pixels[::2, 1::2], (6, 2, 4)), x[:, :, ::2, 1::2])


@pytest.mark.parametrize("dtype", ["u8", "s16"])
def test_tokens_and_images_are_each_other(dtype):
    x = codes(np.random.default_rng(14), (2, 3, 4, 5), dtype)
    tokens = result("tokens", [x], dtype)
    assert np.array_equal(tokens, x.reshape(2, 3, 20).swapaxes(1, 2))
    assert np.array_equal(result("image", [tokens], Activation("y", (3, 4, 5), dtype)), x)


@pytest.mark.parametrize(("axis", "dimension"), [("rows", 1), ("channels", 2)])
def test_concat_of_tokens(axis, dimension):
    x = codes(np.random.default_rng(15), (2, 3, 4), "s16")
    y = result("concat", [x, x[:, ::-1]], "s16", axis=axis)
    assert np.array_equal(y, np.concatenate([x, x[:, ::-1]], axis=dimension))


def test_reshape_of_tokens():
    x = codes(np.random.default_rng(16), (2, 3, 4), "u8")
    assert np.array_equal(result("reshape", [x], Activation("y", (12,))), x.reshape(2, 12))


# ---- resize ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(generators(), st.tuples(*[st.integers(1, 5)] * 6), ZERO_POINTS, st.sampled_from(["u8", "f32"]))
def test_resize_equals_exact_arithmetic(rng, sizes, zero_point, write):
    height, width, oh, ow, kh, kw = sizes
    kh, kw = min(kh, height), min(kw, width)
    x = codes(rng, (1, 2, height, width), "u8", extreme=True)
    axes = {}
    for axis, outputs, inputs, k in (("row", oh, height, kh), ("column", ow, width, kw)):
        axes[f"{axis}_start"] = rng.integers(0, inputs - k + 1, outputs).astype(np.int32)
        axes[f"{axis}_weight"] = rng.integers(-300, 577, (outputs, k)).astype(np.int32)
    m, b = f32(1.3e-6), f32(90.2)
    y = result("resize", [x], write, (zero_point,), multiplier=m, bias=b, **axes)
    q = x.astype(int) - zero_point
    for c, i, j in np.ndindex(2, oh, ow):
        acc = 0
        for s, t in np.ndindex(kh, kw):
            weight = int(axes["row_weight"][i, s]) * int(axes["column_weight"][j, t])
            acc += weight * int(q[0, c, axes["row_start"][i] + s, axes["column_start"][j] + t])
        assert y[0, c, i, j] == written_as(exact_fma(round_to_f32(Fraction(acc)), m, b), write)


def bilinear(size: int, outputs: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and weights of one axis, pixels as squares (align_corners=False)."""
    at = np.clip((np.arange(outputs) + 0.5) * size / outputs - 0.5, 0, size - 1)
    start = np.minimum(at.astype(int), size - 2)
    second = np.rint((at - start) * 2**bits)
    return start.astype(np.int32), np.stack([2**bits - second, second], axis=1).astype(np.int32)


def test_resize_is_bilinear_interpolation():
    torch = pytest.importorskip("torch")
    x = codes(np.random.default_rng(17), (2, 3, 7, 5), "u8")
    (row_start, row_weight), (column_start, column_weight) = bilinear(7, 12, 11), bilinear(5, 15, 11)
    axes = {"row_start": row_start, "row_weight": row_weight, "column_start": column_start}
    y = result("resize", [x], "f32", column_weight=column_weight, multiplier=2.0**-22, bias=0.0, **axes)
    wanted = torch.nn.functional.interpolate(torch.tensor(x, dtype=torch.float64), size=(12, 15), mode="bilinear")
    assert np.abs(y - wanted.numpy()).max() < 2 * 255 * 2.0**-12


def test_resize_is_an_adaptive_average_pool_to_the_last_bit():
    """13 pixels to 5: windows of 3 and of 4 pixels; by 1/12 and 1/9 of the least common multiples."""
    torch = pytest.importorskip("torch")
    x = codes(np.random.default_rng(18), (2, 3, 13, 7), "u8")
    axes = {}
    for axis, size, outputs in (("row", 13, 5), ("column", 7, 4)):
        start = np.arange(outputs) * size // outputs
        counts = -(-(np.arange(outputs) + 1) * size // outputs) - start
        total, k = math.lcm(*counts.tolist()), counts.max()
        first = np.minimum(start, size - k)  # a window of k pixels that holds those that count
        inside = np.arange(k) + (first - start)[:, None]
        weight = np.where((inside >= 0) & (inside < counts[:, None]), total // counts[:, None], 0)
        axes |= {f"{axis}_start": first.astype(np.int32), f"{axis}_weight": weight.astype(np.int32)}
        assert (weight.sum(axis=1) == total).all()
    totals = int(axes["row_weight"].sum(axis=1)[0] * axes["column_weight"].sum(axis=1)[0])
    y = result("resize", [x], "f32", multiplier=1.0, bias=0.0, **axes)
    wanted = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(x, dtype=torch.float64), (5, 4))
    assert np.array_equal(y, np.rint(wanted.numpy() * totals))


# ---- Texts -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(texts(), generators())
def test_a_text_does_not_depend_on_padding_and_neighbours(graph, rng):
    ids, mask = text_batch(graph, 4, rng)
    names = [node.name for node in graph.members[0].nodes]
    output, taps = reference.run(graph, ids, names, mask)
    for i in range(4):
        length = ids.shape[1] if mask is None else mask[i].sum()
        alone, alone_taps = reference.run(graph, ids[i : i + 1, :length], names)
        for together, single in [(output, alone), *((taps[name], alone_taps[name]) for name in names)]:
            rows = single.shape[1]
            assert np.array_equal(together[i, :rows], single[0])
            assert not together[i, rows:].any()
    empty = reference.run(graph, ids[:0], mask=None if mask is None else mask[:0])
    assert (empty.shape, empty.dtype) == ((0, *output.shape[1:]), output.dtype)


def test_an_ensemble_of_texts():
    members = [small_text().members[0], replace(small_text().members[0], name="other")]
    members[1].nodes[-1] = replace(members[1].nodes[-1], constants=dict(members[1].nodes[-1].constants))
    members[1].nodes[-1].constants["bias"] = members[1].nodes[-1].constants["bias"] + np.float32(400)
    graph = parse(dump(Graph(members, "logits", vocabulary=11, variable=True)), "m")
    ids, mask = text_batch(graph, 5, np.random.default_rng(0))
    output, taps = reference.run(graph, ids, ["net/linear.17", "other/linear.17"], mask)
    assert np.array_equal(output, reference.combine(list(taps.values()), "logits")[0])
    assert not np.array_equal(*taps.values())


def test_the_class_of_a_text():
    ids, mask = text_batch(small_text(), 5, np.random.default_rng(0))
    graph = small_text()
    assert reference.predict(graph, ids, mask).tolist() == reference.run(graph, ids, mask=mask).argmax(axis=1).tolist()


IDS = np.array([[1, 2, 3], [4, 5, 6]])


def test_texts_of_one_length():
    net = Builder(np.random.default_rng(0), (3,), None)
    net.linear(net.mean(net.embedding(7, 4)), 2, dtype="f32")
    graph = Graph([net.member()], vocabulary=7)
    assert reference.run(graph, IDS).shape == (2, 2)
