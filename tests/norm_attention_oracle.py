"""Norm and attention in numpy: whole matrices, integers in int64, one correctly rounded f32 operation at a time."""

from __future__ import annotations

import numpy as np

f32 = np.float32
POLYNOMIAL = np.array([0x3F317096, 0x3E7601BC, 0x3D64FE23, 0x3C1D0166], np.uint32).view(f32)  # of 2^f - 1


def fma(a, b, c):
    """a*b + c rounded once, for results that are no subnormal numbers.

    The product is exact in float64 and the sum is not: it is rounded to 53 bits and then to 24. That goes wrong only
    where the 53 bits lie halfway between two f32 and the exact sum does not. So such a sum moves towards it, one step.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + np.float64(c)
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = np.atleast_1d(total).view(np.int64).reshape(np.shape(total))
    halfway = (bits & 0x1FFFFFFF) == 0x10000000
    nudged = np.nextafter(total, np.copysign(np.inf, error))
    return np.where(halfway & (error != 0), nudged, total).astype(f32)


def requantized(r, dtype, clamp):
    if dtype == f32:
        return r
    low, high = clamp if dtype == np.uint8 else (-32767, 32767)
    return np.clip(np.rint(r), low, high).astype(dtype)


def norm(a, groups, multiplier, bias, epsilon, clamp, dtype):
    """a [rows, channels]: each row for itself (groups 0), or all rows by groups of channels."""
    rows, channels = a.shape
    q = a.astype(np.int64).reshape((rows, 1, channels) if groups == 0 else (1, rows, groups, channels // groups))
    axes = (2,) if groups == 0 else (1, 3)
    count = np.prod([q.shape[axis] for axis in axes])
    s = q.sum(axis=axes, keepdims=True)
    variance = count * (q * q).sum(axis=axes, keepdims=True) - s * s
    assert variance.min() >= 0
    root = np.sqrt(variance.astype(f32) + f32(epsilon))
    difference = count * q - s
    assert np.abs(difference).max() < 2**31
    t = difference.astype(f32) * (f32(1) / root)
    return requantized(fma(t.reshape(rows, channels), multiplier, bias), dtype, clamp)


def weights(logits, peak):
    """Integers 0..peak; -inf marks a key that is left out."""
    d = np.maximum(logits - logits.max(axis=-1, keepdims=True), f32(-32))
    n = np.rint(d)
    y = POLYNOMIAL[3]
    for coefficient in (*POLYNOMIAL[2::-1], f32(1)):
        y = fma(y, d - n, coefficient)
    return np.rint(np.ldexp(y * f32(peak), n.astype(int))).astype(np.int64)


def attention(
    q, k, v, zero_points, heads, logit_multiplier, multiplier, bias, clamp, peak, block=0, logit_bias=None, regions=None
):
    """q [T, D], k [S, D], v [S, E], u8; logit_bias [heads, block, block] or [heads, T.., S..]; regions [T]."""
    q, k, v = (
        np.stack(np.split(x.astype(np.int64) - zero_point, heads, axis=1))
        for x, zero_point in zip((q, k, v), zero_points, strict=True)
    )
    rows, keys = q.shape[1], k.shape[1]
    added = np.zeros((heads, rows, keys), f32)
    if logit_bias is not None:
        added = np.tile(logit_bias, (rows // block, keys // block)) if block else logit_bias[:, :rows, :keys]
    logits = fma((q @ k.transpose(0, 2, 1)).astype(f32), f32(logit_multiplier), added)
    if block:
        logits[:, np.arange(rows)[:, None] // block != np.arange(keys) // block] = -np.inf
    if regions is not None:
        logits[:, regions[:, None] != regions] = -np.inf
    p = weights(logits, peak)
    acc = p @ v
    assert np.abs(acc).max() < 2**31
    scale = f32(multiplier) / p.sum(axis=-1, keepdims=True).astype(f32)
    r = fma(acc.astype(f32), np.broadcast_to(scale, acc.shape), f32(bias))
    return requantized(np.concatenate(list(r), axis=1), np.uint8, clamp)
