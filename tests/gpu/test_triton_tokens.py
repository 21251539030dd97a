"""Norm and attention on the kernels for GPUs against numpy, bit for bit, up to the bounds of the format."""

from __future__ import annotations

import norm_attention_oracle as oracle
import numpy as np
import pytest

pytest.importorskip("triton_on_cpu", reason="the kernels for GPUs need Triton", exc_type=ImportError)
import torch
from test_norm_attention import attention_case, clamp_of, codes, most_peak
from triton_on_cpu import warps_in_any_order

from qdeploy.kernels import triton_int8_attention, triton_int8_tokens
from qdeploy.kernels.int8_weights import channel_stride

f32 = np.float32


def activation(x: np.ndarray) -> torch.Tensor:
    """[N, T, C] in memory, with something behind the channels."""
    n, rows, channels = x.shape
    memory = np.full((n, rows, 1, channel_stride(channels)), 0x5A, x.dtype)
    memory[:, :, 0, :channels] = x
    return torch.from_numpy(memory)


def empty(x: torch.Tensor, channels: int, dtype: type) -> torch.Tensor:
    stride = channels if dtype == f32 else channel_stride(channels)
    return torch.from_numpy(np.full((*x.shape[:3], stride), 77, dtype))


def assert_norm(x: np.ndarray, groups: int | None, dtype: type, rng: np.random.Generator, epsilon: float) -> None:
    channels = x.shape[2]
    multiplier = (rng.normal(size=channels) * (300 if dtype == np.int16 else 40)).astype(f32)
    bias, clamp = rng.normal(128, 60, channels).astype(f32), clamp_of(rng)
    on_gpu = activation(x)
    out = empty(on_gpu, channels, dtype)
    limits = clamp if dtype == np.uint8 else (-32767, 32767)
    factors = torch.from_numpy(multiplier), torch.from_numpy(bias)
    triton_int8_tokens.norm(on_gpu, *factors, out, groups, float(f32(epsilon)), limits)
    expected = [oracle.norm(rows, groups or 0, multiplier, bias, epsilon, clamp, dtype) for rows in x]
    assert np.array_equal(out[:, :, 0, :channels].numpy(), np.stack(expected))


@pytest.mark.parametrize("groups", [None, 1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_norm_has_the_bits_of_the_formulas(groups, dtype):
    rng = np.random.default_rng(groups or 0)
    for out in (np.uint8, np.int16, f32):
        x = codes(rng, (2, int(rng.integers(1, 40)), (groups or 1) * int(rng.integers(1, 60))), dtype)
        assert_norm(x, groups, out, rng, 10.0 ** rng.uniform(-15, 8))


@pytest.mark.parametrize("kind", ["both", "one apart", "equal"])
@pytest.mark.parametrize("groups", [None, 1])
def test_norm_of_the_most_elements(kind, groups):
    """32,767 codes: the sum of squares, N times it and N*q - S are as large as the types hold."""
    x = np.full(32767, 32767, np.int16)
    if kind == "both":
        x[::2] = -32767
    if kind == "one apart":
        x[12345] = -32767
    assert_norm(x.reshape((1, 151, 217) if groups else (1, 1, -1)), groups, f32, np.random.default_rng(0), 2.0**-60)


def assert_attention(
    case: tuple, peak: int, block: int = 0, logit_bias=None, regions=None, lengths: list[int] | None = None
) -> None:
    """The case twice, as two images; with `lengths`, of which images have so many keys, and 3 tokens fewer."""
    q, k, v, zero_points, heads, (logit_multiplier, multiplier, bias), clamp = case
    queries, keys, values = (activation(np.stack([x, x])) for x in (q, k, v))
    out = empty(queries, v.shape[1], np.uint8)
    ids = None
    if lengths is not None:
        ids = torch.full((2, 1, 1, 9), 1 << 30, dtype=torch.int32)
        ids[:, 0, 0, -1] = torch.tensor(lengths) - 3
    triton_int8_attention.attention(
        queries,
        keys,
        values,
        out,
        heads=heads,
        channels=(q.shape[1], v.shape[1]),
        block=block or None,
        zero_points=zero_points,
        logit_multiplier=float(logit_multiplier),
        peak=peak,
        multiplier=float(multiplier),
        bias=float(bias),
        clamp=clamp,
        logit_bias=None if logit_bias is None else torch.from_numpy(logit_bias),
        regions=None if regions is None else torch.from_numpy(regions),
        ids=ids,
        more=3,
    )
    for image, count in enumerate(lengths or [len(k), len(k)]):
        few = q, k[:count], v[:count], zero_points, heads, logit_multiplier, multiplier, bias, clamp, peak
        expected = oracle.attention(*few, block, logit_bias, regions)
        assert np.array_equal(out[image, :, 0, : v.shape[1]].numpy(), expected)


def test_attention_has_the_bits_of_the_formulas():
    rng = np.random.default_rng(0)
    for i in range(5):
        rows = int(rng.integers(1, 100))
        keys = rows if i % 2 else int(rng.integers(1, 200))
        case = attention_case(rng, rows, keys)
        logit_bias = rng.normal(0, 3, (case[4], rows, keys)).astype(f32) if i % 3 else None
        assert_attention(case, most_peak(keys) if i != 4 else 1, logit_bias=logit_bias)


@pytest.mark.parametrize("block", [7, 65])
def test_attention_in_blocks_with_bias_and_regions(block):
    rng = np.random.default_rng(block)
    case = attention_case(rng, 2 * block, 2 * block)
    logit_bias = rng.normal(0, 3, (case[4], block, block)).astype(f32)
    assert_attention(case, most_peak(block), block, logit_bias, rng.integers(-1, 3, 2 * block).astype(np.int32))


def test_attention_of_texts_sees_their_own_keys():
    rng = np.random.default_rng(3)
    case = attention_case(rng, 70, 70)
    logit_bias = rng.normal(0, 3, (case[4], 75, 80)).astype(f32)  # of longer texts
    for lengths in ([4, 70], [64, 65]):
        assert_attention(case, most_peak(70), logit_bias=logit_bias, lengths=lengths)


@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_warps_changes_no_bit(seed):
    """What a warp reads of shared memory, others have written before."""
    rng = np.random.default_rng(seed)
    case = attention_case(rng, 20, 70)
    with warps_in_any_order(seed):
        assert_attention(case, most_peak(70))
        assert_norm(codes(rng, (2, 5, 60), np.int16), 2, np.uint8, rng, 1.0)


@pytest.mark.parametrize(("keys", "depth", "width"), [(257, 300, 70), (1024, 64, 16)])
def test_attention_of_the_most_keys(keys, depth, width):
    """Equal logits and values of 255 beside a zero point of 0: the sums are as large as the loader lets them be."""
    q, k = np.full((7, depth), 255, np.uint8), np.full((keys, depth), 255, np.uint8)
    for v, zero in ((255, 0), (0, 255)):
        case = q, k, np.full((keys, width), v, np.uint8), (0, 0, zero), 1, (f32(1e-4), f32(0.5), f32(100.5)), (0, 255)
        assert_attention(case, most_peak(keys))


def test_attention_of_heads_wider_than_a_tile():
    rng = np.random.default_rng(9)
    q, k, v = (rng.integers(0, 256, (n, 2 * size)).astype(np.uint8) for n, size in ((5, 200), (9, 200), (9, 130)))
    case = q, k, v, (3, 255, 128), 2, (f32(2e-5), f32(0.7), f32(100.5)), (0, 255)
    assert_attention(case, most_peak(9))


def test_weights_of_far_keys_are_zero():
    """32 and more powers of two below the largest logit: no weight at all, so that values there do not matter."""
    q, k = np.full((1, 8), 255, np.uint8), np.zeros((40, 8), np.uint8)
    k[17] = 255
    v = np.random.default_rng(4).integers(0, 256, (40, 8)).astype(np.uint8)
    assert_attention((q, k, v, (0, 0, 0), 1, (f32(1), f32(1), f32(0)), (0, 255)), 32767)
