"""Norm and attention of every instruction set against numpy, bit for bit."""

from __future__ import annotations

import norm_attention_oracle as oracle
import numpy as np
import pytest

from qdeploy import _engine
from qdeploy.errors import InputError

f32 = np.float32
ISAS = pytest.mark.parametrize("isa", _engine.isas())
DTYPES = (np.uint8, np.int16)


def codes(rng, shape, dtype):
    """Uniform, extreme, clustered or equal codes."""
    low, high = (0, 255) if dtype == np.uint8 else (-32767, 32767)
    kind = rng.integers(0, 4)
    if kind == 0:
        return rng.integers(low, high + 1, shape).astype(dtype)
    if kind == 1:
        return rng.choice([low, high], shape).astype(dtype)
    if kind == 2:
        return np.clip(rng.normal((low + high) / 2, (high - low) / 9, shape), low, high).astype(dtype)
    return np.full(shape, rng.integers(low, high + 1), dtype)


def clamp_of(rng):
    return [(0, 255), (10, 200), (77, 77), (0, 1)][rng.integers(0, 4)]


def zero_point(rng):
    return int(rng.choice([0, 3, 128, 255]))


# ---- Norm ------------------------------------------------------------------------------------------------------------


def assert_norm(a, groups, out, rng, isa, epsilon, threads=1):
    channels = a.shape[1]
    spread = 300 if out == np.int16 else 40
    multiplier = (rng.normal(size=channels) * spread).astype(f32)
    bias = np.where(rng.random(channels) < 0.3, rng.integers(-9, 260, channels) + 0.5, rng.normal(128, 60, channels))
    bias, clamp, result = bias.astype(f32), clamp_of(rng), np.empty(a.shape, out)
    _engine.norm(a, groups, multiplier, bias, epsilon, *clamp, result, threads, isa)
    expected = oracle.norm(a, groups, multiplier, bias, epsilon, clamp, out)
    assert result.tobytes() == expected.tobytes()
    return result


@ISAS
@pytest.mark.parametrize("by_group", [False, True])
def test_norm_has_the_bits_of_the_formulas(isa, by_group):
    rng = np.random.default_rng(by_group)
    for case in range(60):
        groups = int(rng.integers(1, 7)) if by_group else 0
        channels = max(groups, 1) * int(rng.integers(1, 40))
        a = codes(rng, (int(rng.integers(1, 40)), channels), DTYPES[case % 2])
        out = (np.uint8, np.int16, f32)[case % 3]
        assert_norm(a, groups, out, rng, isa, 10.0 ** rng.uniform(-15, 8), threads=1 + case % 3)


@ISAS
@pytest.mark.parametrize("kind", ["largest", "both", "one apart", "equal", "zero"])
@pytest.mark.parametrize("groups", [0, 1])
def test_norm_of_the_most_elements(isa, kind, groups):
    """32,767 codes: the sum of squares, N times it and N*q - S are as large as the types hold."""
    a = np.full(32767, 32767, np.int16)
    if kind == "both":
        a[::2] = -32767
    if kind == "one apart":
        a[12345] = -32767
    if kind == "equal":
        a[:] = 123
    if kind == "zero":
        a[:] = 0
    for out in (np.uint8, np.int16, f32):
        rng = np.random.default_rng(0)
        assert_norm(a.reshape((1, -1) if groups == 0 else (151, 217)), groups, out, rng, isa, 2.0**-60)


@ISAS
def test_norm_of_equal_codes_is_the_bias(isa):
    bias = np.linspace(-3, 260, 50, dtype=f32)
    for dtype in DTYPES:
        result = np.empty((4, 50), f32)
        _engine.norm(np.full((4, 50), 99, dtype), 0, np.full(50, 7, f32), bias, 2.0**-60, 0, 255, result, 1, isa)
        assert (result == bias).all()


@ISAS
def test_norm_of_many_bytes(isa):
    """A group of 3 million u8 codes: N times the sum of squares needs 60 bits."""
    rng = np.random.default_rng(0)
    a = rng.choice(np.uint8([0, 1, 254, 255]), (200_000, 30))
    assert_norm(a, 2, np.uint8, rng, isa, 1e-3, threads=2)


def test_norm_refuses_what_does_not_agree():
    a, ones, out = np.zeros((3, 8), np.int16), np.ones(8, f32), np.empty((3, 8), np.uint8)
    with pytest.raises(InputError, match=r"expected a result of shape \[3, 8\], two sizes, got \[3, 7\] - at norm"):
        _engine.norm(a, 0, ones, ones, 1, 0, 255, np.empty((3, 7), np.uint8), 1)
    with pytest.raises(InputError, match="expected groups that divide 8 channels, got 3 - at norm"):
        _engine.norm(a, 3, ones, ones, 1, 0, 255, out, 1)
    with pytest.raises(InputError, match="expected uint8 or int16, got int32 - at norm"):
        _engine.norm(a.astype(np.int32), 0, ones, ones, 1, 0, 255, out, 1)
    with pytest.raises(InputError, match="expected 8 multipliers and biases, got 8 and 1 - at norm"):
        _engine.norm(a, 0, ones, ones[:1], 1, 0, 255, out, 1)


# ---- Attention -------------------------------------------------------------------------------------------------------


def most_peak(keys):
    return min(32767, (2**31 - 1) // (255 * keys))


def run(q, k, v, zero_points, heads, constants, clamp, peak, isa, most=None, threads=1, **segments):
    result = np.empty((len(q), v.shape[1]), np.uint8)
    block, logit_bias, regions = (segments.get(key) for key in ("block", "logit_bias", "regions"))
    _engine.attention(
        *(
            q,
            k,
            v,
            zero_points,
            heads,
            *constants,
            *clamp,
            peak,
            *(most or (len(q), len(k))),
            block or 0,
            logit_bias,
            regions,
        ),
        *(result, threads, isa),
    )
    return result


def attention_case(rng, rows, keys):
    heads, depth, width = (int(x) for x in rng.integers(1, (4, 70, 70)))
    q, k, v = (codes(rng, (n, heads * size), np.uint8) for n, size in ((rows, depth), (keys, depth), (keys, width)))
    logit_multiplier = f32(10 ** rng.uniform(-6, -1) * rng.choice([-1, 1]))
    multiplier = f32(rng.uniform(0.3, 1.5) * rng.choice([-1, 1]))
    bias = f32(rng.integers(0, 256) + rng.choice([0, 0.5]))
    zero_points = tuple(zero_point(rng) for _ in range(3))
    return q, k, v, zero_points, heads, (logit_multiplier, multiplier, bias), clamp_of(rng)


def assert_attention(case, peak, isa, segments=None, **how):
    segments = segments or {}
    found = run(*case, peak, isa, **segments, **how)
    *operands, constants, clamp = case
    assert np.array_equal(found, oracle.attention(*operands, *constants, clamp, peak, **segments))


@ISAS
def test_attention_has_the_bits_of_the_formulas(isa):
    rng = np.random.default_rng(0)
    for i in range(60):
        rows = int(rng.integers(1, 60))
        keys = rows if i % 2 else int(rng.integers(1, 300))
        peak = most_peak(keys) if i % 5 else 1
        assert_attention(attention_case(rng, rows, keys), peak, isa, threads=1 + i % 3)


@ISAS
def test_attention_in_blocks_with_bias_and_regions(isa):
    rng = np.random.default_rng(1)
    for i in range(40):
        block, blocks = int(rng.integers(1, 60)), int(rng.integers(1, 5))
        case = attention_case(rng, block * blocks, block * blocks)
        heads = case[4]
        segments = {"block": block}
        if i % 2:
            segments["logit_bias"] = rng.normal(0, 3, (heads, block, block)).astype(f32)
        if i % 3:
            segments["regions"] = rng.integers(-1, 3, block * blocks).astype(np.int32)
        assert_attention(case, most_peak(block), isa, segments, threads=1 + i % 4)


@ISAS
def test_attention_with_bias_of_a_longer_text(isa):
    rng = np.random.default_rng(5)
    for i in range(20):
        rows, keys, more = (int(x) for x in rng.integers(1, (60, 100, 30)))
        case = attention_case(rng, rows, keys)
        most = rows + more, keys + more % 7
        segments = {"logit_bias": rng.normal(0, 3, (case[4], *most)).astype(f32)}
        assert_attention(case, most_peak(most[1]), isa, segments, most=most, threads=1 + i % 3)


@ISAS
@pytest.mark.parametrize("keys", [257, 258, 1024])
def test_attention_of_the_most_keys(isa, keys):
    """Equal logits and values of 255 beside a zero point of 0: acc is as large as the loader lets it be."""
    peak = most_peak(keys)
    assert peak == 32767 or (peak + 1) * 255 * keys >= 2**31
    q, k = np.full((7, 256), 255, np.uint8), np.full((keys, 256), 255, np.uint8)
    for v, zero in ((255, 0), (0, 255)):
        case = q, k, np.full((keys, 16), v, np.uint8), (0, 0, zero), 1, (f32(1e-4), f32(0.5), f32(100.5)), (0, 255)
        assert_attention(case, peak, isa)


@ISAS
def test_one_key_is_its_value(isa):
    """The weight of a single key is the peak, and peak * v / peak the value, whatever the logit."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.integers(0, 256, (n, 40)).astype(np.uint8) for n in (5, 1, 1))
    found = run(q, k, v, (128, 3, 128), 4, (f32(0.1), f32(1), f32(128)), (0, 255), 32767, isa)
    assert np.array_equal(found, np.broadcast_to(v, (5, 40)))


@ISAS
def test_a_shorter_text_has_the_bits_it_has_alone(isa):
    """The declared length gives the peak; no memory of it is read beyond the text's own rows."""
    rng = np.random.default_rng(3)
    for length in (1, 5, 31, 32, 33, 64):
        case = attention_case(rng, length, length)
        assert_attention(case, most_peak(300), isa, most=(300, 300), threads=2)


@ISAS
def test_weights_of_far_keys_are_zero(isa):
    """32 and more powers of two below the largest logit: no weight at all, so that values there do not matter."""
    q, k = np.full((1, 8), 255, np.uint8), np.zeros((40, 8), np.uint8)
    k[17] = 255
    v = np.random.default_rng(4).integers(0, 256, (40, 8)).astype(np.uint8)
    found = run(q, k, v, (0, 0, 0), 1, (f32(1), f32(1), f32(0)), (0, 255), 32767, isa)
    assert np.array_equal(found, v[17:18])


def test_attention_refuses_what_does_not_agree():
    q, v = np.zeros((6, 8), np.uint8), np.zeros((6, 4), np.uint8)
    constants, clamp = (f32(1), f32(1), f32(0)), (0, 255)
    with pytest.raises(InputError, match=r"expected q, k, v and a result that agree, got \[6, 8\], \[5, 8\], \[6, 4\]"):
        run(q, q[:5].copy(), v, (0, 0, 0), 2, constants, clamp, 100, "")
    with pytest.raises(InputError, match="expected heads that divide the channels, got 3 - at attention"):
        run(q, q, v, (0, 0, 0), 3, constants, clamp, 100, "")
    with pytest.raises(InputError, match="expected a block that divides the rows, got 4 - at attention"):
        run(q, q, v, (0, 0, 0), 2, constants, clamp, 100, "", block=4)
    with pytest.raises(InputError, match="expected 18 of logit_bias, got another number - at attention"):
        run(q, q, v, (0, 0, 0), 2, constants, clamp, 100, "", block=3, logit_bias=np.zeros(5, f32))
