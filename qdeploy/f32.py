"""Arithmetic in f32, one rounding at a time, in numpy: what docs/format.md section 4 says beside sums of integers."""

from __future__ import annotations

import numpy as np

Numbers = np.ndarray | np.float32


def fma32(a: Numbers, b: Numbers, c: Numbers) -> np.ndarray:
    """a*b + c in f32 with ONE rounding, for f32 arrays (or f32 scalars) that broadcast.

    The product of two f32 is exact in f64. The f64 sum is rounded to odd: where it is inexact (its error `e` is exact
    by Knuth's TwoSum) and its last bit is even, it moves one step towards the true sum. An f64 rounded to odd has more
    than 24 + 2 bits, so rounding it to f32 gives what rounding the true sum would give, ties and subnormals included.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        c64 = np.asarray(c, np.float64)
        p = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        s = np.asarray(p + c64)
        t = s - p
        e = (p - (s - t)) + (c64 - t)
        bits = s.view(np.int64)
        step = np.where((e > 0) == (s > 0), 1, -1)
        odd = np.where((np.abs(e) > 0) & (bits & 1 == 0), bits + step, bits)
        return odd.view(np.float64).astype(np.float32)


def to_f32(acc: np.ndarray) -> np.ndarray:
    """Integers held in f64 to f32, half to even; by way of int64, because f64 products can leave a -0."""
    return acc.astype(np.int64).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, f32 to f32. The sum is one of integers, so that no order of summation changes a bit."""
    e = exp32(x - x.max(axis=-1, keepdims=True)) * np.float32(2**30)
    total = np.rint(e).astype(np.int64).sum(axis=-1, keepdims=True)
    return e / total.astype(np.float32)


def exp32(d: np.ndarray) -> np.ndarray:
    """exp(d) of f32 d <= 0 by range reduction d = n*ln 2 + f and a polynomial of degree 6; 0 below -87."""
    log2_e, ln2_high, ln2_low = np.array([0x3FB8AA3B, 0x3F317200, 0x35BFBE8E], np.uint32).view(np.float32)
    in_range = np.maximum(d, np.float32(-87))
    n = np.rint(in_range * log2_e)
    f = fma32(n, -ln2_low, fma32(n, -ln2_high, in_range))
    result: Numbers = np.float32(1 / 720)
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1, 1):
        result = fma32(result, f, np.float32(coefficient))
    return np.where(d < -87, np.float32(0), np.ldexp(result, n.astype(np.int32)))


def power_weights(d: np.ndarray, peak: int) -> np.ndarray:
    """rint(peak * 2^d) of f32 d <= 0, as integers held in f64: 2^(d - rint d) by a polynomial of degree 4."""
    c4, c3, c2, c1 = np.array([0x3C1D0166, 0x3D64FE23, 0x3E7601BC, 0x3F317096], np.uint32).view(np.float32)
    in_range = np.maximum(d, np.float32(-32))
    n = np.rint(in_range)
    f = in_range - n
    y: Numbers = c4
    for coefficient in (c3, c2, c1, np.float32(1)):
        y = fma32(y, f, coefficient)
    return np.rint(np.ldexp(y * np.float32(peak), n.astype(np.int32))).astype(np.float64)
