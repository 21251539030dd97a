"""Input, and ops on element after element, of an int8 model on a GPU: docs/format.md section 4, bit for bit.

Activations are those of triton_pixels.py.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from qdeploy.kernels.triton_math import clamp, round_to_u8
from qdeploy.kernels.triton_pixels import blocks_of, offsets, requantized


@triton.jit
def _quantize_kernel(
    x_ptr,  # f32 [N, C, HW]
    out_ptr,  # u8 [N * HW, STRIDE]
    bad_ptr,  # i32 [1]
    pixels,
    HW,
    C,
    inverse_scale,
    zero_point,
    STRIDE: tl.constexpr,  # a number known to the compiler, or a pixel of 4 bytes takes 4 stores
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program quantizes BLOCK_P pixels of BLOCK_C channels, and sets `bad` where a number is not finite."""
    pixel, channel = offsets(STRIDE, BLOCK_P, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    offs = (pixel // HW * C * HW + pixel % HW)[:, None] + (channel * HW)[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    bad = tl.max(tl.max(((x != x) | (tl.abs(x) > 3.4028234663852886e38)).to(tl.int32), 1), 0)
    if bad != 0:
        tl.store(bad_ptr, 1)
    scale = tl.zeros((BLOCK_P, BLOCK_C), tl.float32) + inverse_scale
    q = tl.fma(x, scale, tl.zeros((BLOCK_P, BLOCK_C), tl.float32) + zero_point)
    codes = round_to_u8(clamp(q, 0.0, 255.0))
    inside = (pixel < pixels)[:, None] & (channel < STRIDE)[None, :]
    tl.store(out_ptr + pixel[:, None] * STRIDE + channel[None, :], codes, mask=inside)


@triton.jit
def _lookup_kernel(
    x_ptr,  # u8 [pixels, x_stride]
    table_ptr,  # u8 or f32, [256] or [C, 256]
    out_ptr,  # of the table's type, [pixels, out_stride]
    pixels,
    C,
    x_stride,
    out_stride,
    table_stride,  # 0: one table for all channels
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program maps BLOCK_P pixels of BLOCK_C channels through a table."""
    pixel, channel = offsets(C, BLOCK_P, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    q = tl.load(x_ptr + pixel[:, None] * x_stride + channel[None, :], mask=mask, other=0)
    value = tl.load(table_ptr + (channel * table_stride)[None, :] + q.to(tl.int32), mask=mask, other=0)
    tl.store(out_ptr + pixel[:, None] * out_stride + channel[None, :], value, mask=mask)


@triton.jit
def _add_kernel(
    a_ptr,  # u8 or s16 [pixels, a_stride]
    b_ptr,  # u8 or s16 [pixels, b_stride]
    out_ptr,  # u8, s16 or f32 [pixels, out_stride]
    pixels,
    C,
    a_stride,
    b_stride,
    out_stride,
    a_multiplier,
    b_multiplier,
    bias,
    low,
    high,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program adds BLOCK_P pixels of BLOCK_C channels."""
    pixel, channel = offsets(C, BLOCK_P, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    a = tl.load(a_ptr + pixel[:, None] * a_stride + channel[None, :], mask=mask, other=0).to(tl.float32)
    b = tl.load(b_ptr + pixel[:, None] * b_stride + channel[None, :], mask=mask, other=0).to(tl.float32)
    zeros = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    result = tl.fma(a, zeros + a_multiplier, tl.fma(b, zeros + b_multiplier, zeros + bias))
    value = requantized(result, low, high, out_ptr.dtype.element_ty)
    tl.store(out_ptr + pixel[:, None] * out_stride + channel[None, :], value, mask=mask)


@triton.jit
def _rescale_kernel(
    x_ptr,  # u8 or s16 [pixels, x_stride]
    out_ptr,  # u8, s16 or f32 [pixels, out_stride]
    pixels,
    C,
    x_stride,
    out_stride,
    multiplier,
    bias,
    low,
    high,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program brings BLOCK_P pixels of BLOCK_C channels to another grid."""
    pixel, channel = offsets(C, BLOCK_P, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    q = tl.load(x_ptr + pixel[:, None] * x_stride + channel[None, :], mask=mask, other=0).to(tl.float32)
    zeros = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    value = requantized(tl.fma(q, zeros + multiplier, zeros + bias), low, high, out_ptr.dtype.element_ty)
    tl.store(out_ptr + pixel[:, None] * out_stride + channel[None, :], value, mask=mask)


@triton.jit
def _mul_kernel(
    a_ptr,  # u8 [pixels, a_stride]
    b_ptr,  # u8 [pixels / repeat, b_stride]
    out_ptr,  # u8 or f32 [pixels, out_stride]
    pixels,
    C,
    a_stride,
    b_stride,
    out_stride,
    repeat,  # pixels that share one of b: 1, or those of an image where b is a gate of the channels
    a_zero_point,
    b_zero_point,
    multiplier,
    bias,
    low,
    high,
    ONE_CHANNEL: tl.constexpr,  # of b, for all of a
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program multiplies BLOCK_P pixels of BLOCK_C channels."""
    pixel, channel = offsets(C, BLOCK_P, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    a = tl.load(a_ptr + pixel[:, None] * a_stride + channel[None, :], mask=mask, other=0).to(tl.int32)
    b_channel = channel * 0 if ONE_CHANNEL else channel
    b = tl.load(b_ptr + (pixel // repeat)[:, None] * b_stride + b_channel[None, :], mask=mask, other=0).to(tl.int32)
    acc = ((a - a_zero_point) * (b - b_zero_point)).to(tl.float32)
    zeros = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    result = tl.fma(acc, zeros + multiplier, zeros + bias)
    value = requantized(result, low, high, out_ptr.dtype.element_ty)
    tl.store(out_ptr + pixel[:, None] * out_stride + channel[None, :], value, mask=mask)


def quantize(x: Tensor, out: Tensor, scale: float, zero_point: int, bad: Tensor) -> None:
    """f32 [N, C, H, W], [N, T, D] or [N, F] to codes, u8 [N, H, W, stride]; sets bad (i32 [1]) at NaN or infinity."""
    n, h, w, stride = out.shape
    grid, blocks = blocks_of(n * h * w, stride)
    inverse = float(np.float32(1) / np.float32(scale))  # one f32 division
    plane, channels = (1, x.shape[2]) if x.dim() == 3 else (h * w, x.shape[1])  # tokens have their channels last
    _quantize_kernel[grid](x, out, bad, n * h * w, plane, channels, inverse, float(zero_point), STRIDE=stride, **blocks)


def lookup(x: Tensor, table: Tensor, out: Tensor, channels: int) -> None:
    """out = table[x] for the first `channels` of u8 [N, H, W, stride]; table [256], or [channels, 256]: one each."""
    n, h, w, x_stride = x.shape
    grid, blocks = blocks_of(n * h * w, channels)
    table_stride = 256 if table.dim() == 2 else 0
    _lookup_kernel[grid](x, table, out, n * h * w, channels, x_stride, out.shape[3], table_stride, **blocks)


def add(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    channels: int,
    multipliers: tuple[float, float],
    bias: float,
    clamp: tuple[int, int],
) -> None:
    """The requantized sum of two [N, H, W, stride]."""
    n, h, w, out_stride = out.shape
    grid, blocks = blocks_of(n * h * w, channels)
    _add_kernel[grid](
        a,
        b,
        out,
        n * h * w,
        channels,
        a.shape[3],
        b.shape[3],
        out_stride,
        *multipliers,
        bias,
        float(clamp[0]),
        float(clamp[1]),
        **blocks,
    )


def rescale(x: Tensor, out: Tensor, channels: int, multiplier: float, bias: float, clamp: tuple[int, int]) -> None:
    """[N, H, W, stride] on another grid."""
    n, h, w, out_stride = out.shape
    grid, blocks = blocks_of(n * h * w, channels)
    limits = float(clamp[0]), float(clamp[1])
    _rescale_kernel[grid](x, out, n * h * w, channels, x.shape[3], out_stride, multiplier, bias, *limits, **blocks)


def mul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    channels: int,
    zero_points: tuple[int, int],
    multiplier: float,
    bias: float,
    clamp: tuple[int, int],
    one_channel: bool = False,
) -> None:
    """The requantized product of two u8 [N, H, W, stride]; b may be a gate [N, 1, 1, stride], or have `one_channel`."""
    n, h, w, out_stride = out.shape
    grid, blocks = blocks_of(n * h * w, channels)
    _mul_kernel[grid](
        a,
        b,
        out,
        n * h * w,
        channels,
        a.shape[3],
        b.shape[3],
        out_stride,
        h * w // (b.shape[1] * b.shape[2]),
        *zero_points,
        multiplier,
        bias,
        float(clamp[0]),
        float(clamp[1]),
        ONE_CHANNEL=one_channel,
        **blocks,
    )
