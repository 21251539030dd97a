"""Input, tables, sums and pools of an int8 model on a GPU: docs/format.md section 4, bit for bit.

An activation is uint8 [N, H, W, stride]: NHWC with `channel_stride` bytes a pixel, so that loads of 16 bytes are
aligned. What lies in the bytes after the last channel does not matter: their weights are 0.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from qdeploy.kernels.triton_math import clamp, round_to_u8


@triton.jit
def _offsets(channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The pixels and channels of this program; programs of the same pixels follow each other."""
    blocks = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    return pid // blocks * BLOCK_P + tl.arange(0, BLOCK_P), pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


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
    pixel, channel = _offsets(STRIDE, BLOCK_P, BLOCK_C)
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
    pixel, channel = _offsets(C, BLOCK_P, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    q = tl.load(x_ptr + pixel[:, None] * x_stride + channel[None, :], mask=mask, other=0)
    value = tl.load(table_ptr + (channel * table_stride)[None, :] + q.to(tl.int32), mask=mask, other=0)
    tl.store(out_ptr + pixel[:, None] * out_stride + channel[None, :], value, mask=mask)


@triton.jit
def _add_kernel(
    a_ptr,  # u8 [pixels, a_stride]
    b_ptr,  # u8 [pixels, b_stride]
    out_ptr,  # u8 or f32 [pixels, out_stride]
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
    CODES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program adds BLOCK_P pixels of BLOCK_C channels."""
    pixel, channel = _offsets(C, BLOCK_P, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    a = tl.load(a_ptr + pixel[:, None] * a_stride + channel[None, :], mask=mask, other=0).to(tl.float32)
    b = tl.load(b_ptr + pixel[:, None] * b_stride + channel[None, :], mask=mask, other=0).to(tl.float32)
    zeros = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    result = tl.fma(a, zeros + a_multiplier, tl.fma(b, zeros + b_multiplier, zeros + bias))
    if CODES:
        result = round_to_u8(clamp(result, low, high))
    tl.store(out_ptr + pixel[:, None] * out_stride + channel[None, :], result, mask=mask)


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
    repeat,  # pixels that share one of b: 1, or those of an image where b is a gate
    a_zero_point,
    b_zero_point,
    multiplier,
    bias,
    low,
    high,
    CODES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program multiplies BLOCK_P pixels of BLOCK_C channels."""
    pixel, channel = _offsets(C, BLOCK_P, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    a = tl.load(a_ptr + pixel[:, None] * a_stride + channel[None, :], mask=mask, other=0).to(tl.int32)
    b = tl.load(b_ptr + (pixel // repeat)[:, None] * b_stride + channel[None, :], mask=mask, other=0).to(tl.int32)
    acc = ((a - a_zero_point) * (b - b_zero_point)).to(tl.float32)
    zeros = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    result = tl.fma(acc, zeros + multiplier, zeros + bias)
    if CODES:
        result = round_to_u8(clamp(result, low, high))
    tl.store(out_ptr + pixel[:, None] * out_stride + channel[None, :], result, mask=mask)


@triton.jit
def _pool_kernel(
    x_ptr,  # u8 [N, H, W, x_stride]
    multiplier_ptr,  # f32 [1] or [KH * KW]; not read by max
    out_ptr,  # u8 or f32 [pixels, out_stride]
    pixels,
    C,
    H,
    W,
    OH,
    OW,
    x_stride,
    out_stride,
    KW,
    cells,
    stride_h,
    stride_w,
    top,
    left,
    dilation_h,
    dilation_w,
    zero_point,
    bias,
    low,
    high,
    MAX: tl.constexpr,
    BY_COUNT: tl.constexpr,  # one multiplier for each number of real elements
    CODES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program pools BLOCK_P windows of BLOCK_C channels, BLOCK_T elements of each window at a time."""
    pixel, channel = _offsets(C, BLOCK_P, BLOCK_C)
    line = pixel // OW
    h0 = (line % OH * stride_h - top)[:, None]
    w0 = (pixel % OW * stride_w - left)[:, None]
    image = (line // OH * H)[:, None]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.int32)
    count = tl.zeros((BLOCK_P,), tl.int32)
    for first in range(0, cells, BLOCK_T):
        cell = (first + tl.arange(0, BLOCK_T))[None, :]
        h = h0 + cell // KW * dilation_h
        w = w0 + cell % KW * dilation_w
        real = (cell < cells) & (h >= 0) & (h < H) & (w >= 0) & (w < W) & (pixel < pixels)[:, None]
        offs = (((image + h) * W + w) * x_stride)[:, :, None] + channel[None, None, :]
        q = tl.load(x_ptr + offs, mask=real[:, :, None] & (channel < C)[None, None, :], other=0).to(tl.int32)
        if MAX:
            total = tl.maximum(total, tl.max(q, 1))
        else:
            total += tl.sum(q, 1)
            count += tl.sum(real.to(tl.int32), 1)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    if MAX:
        result = total.to(tl.uint8)
    else:
        if BY_COUNT:
            multiplier = tl.load(multiplier_ptr + tl.maximum(count - 1, 0))
        else:
            multiplier = tl.zeros((BLOCK_P,), tl.float32) + tl.load(multiplier_ptr)
        acc = (total - (count * zero_point)[:, None]).to(tl.float32)
        zeros = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        result = tl.fma(acc, tl.broadcast_to(multiplier[:, None], (BLOCK_P, BLOCK_C)), zeros + bias)
        if CODES:
            result = round_to_u8(clamp(result, low, high))
    tl.store(out_ptr + pixel[:, None] * out_stride + channel[None, :], result, mask=mask)


def quantize(x: Tensor, out: Tensor, scale: float, zero_point: int, bad: Tensor) -> None:
    """f32 [N, C, H, W] or [N, F] to codes, u8 [N, H, W, stride]; sets bad (i32 [1]) where x has NaN or infinity."""
    n, h, w, stride = out.shape
    grid, blocks = _elementwise(n * h * w, stride)
    inverse = float(np.float32(1) / np.float32(scale))  # one f32 division
    _quantize_kernel[grid](
        x, out, bad, n * h * w, h * w, x.shape[1], inverse, float(zero_point), STRIDE=stride, **blocks
    )


def lookup(x: Tensor, table: Tensor, out: Tensor, channels: int) -> None:
    """out = table[x] for the first `channels` of u8 [N, H, W, stride]; table [256], or [channels, 256]: one each."""
    n, h, w, x_stride = x.shape
    grid, blocks = _elementwise(n * h * w, channels)
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
    """The requantized sum of two u8 [N, H, W, stride]."""
    n, h, w, out_stride = out.shape
    grid, blocks = _elementwise(n * h * w, channels)
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
        CODES=out.dtype.itemsize == 1,
        **blocks,
    )


def mul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    channels: int,
    zero_points: tuple[int, int],
    multiplier: float,
    bias: float,
    clamp: tuple[int, int],
) -> None:
    """The requantized product of two u8 [N, H, W, stride]; b may be a gate [N, 1, 1, stride]."""
    n, h, w, out_stride = out.shape
    grid, blocks = _elementwise(n * h * w, channels)
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
        CODES=out.dtype.itemsize == 1,
        **blocks,
    )


def pool(
    x: Tensor,
    out: Tensor,
    channels: int,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
    multiplier: Tensor | None = None,
    zero_point: int = 0,
    bias: float = 0.0,
    clamp: tuple[int, int] = (0, 255),
) -> None:
    """Maximum of the codes (multiplier None), or their requantized average; shapes as for `conv`."""
    n, oh, ow, out_stride = out.shape
    _, h, w, x_stride = x.shape
    cells = kernel[0] * kernel[1]
    block_t = min(triton.next_power_of_2(cells), 32)
    block_c = min(triton.next_power_of_2(channels), 64)
    block_p = max(1, 2048 // (block_t * block_c))  # 4096 take 96 registers, with Triton 3.9 more than there are
    grid = (triton.cdiv(n * oh * ow, block_p) * triton.cdiv(channels, block_c),)
    _pool_kernel[grid](
        x,
        x if multiplier is None else multiplier,
        out,
        n * oh * ow,
        channels,
        h,
        w,
        oh,
        ow,
        x_stride,
        out_stride,
        kernel[1],
        cells,
        *stride,
        *padding[:2],
        *dilation,
        zero_point,
        bias,
        float(clamp[0]),
        float(clamp[1]),
        MAX=multiplier is None,
        BY_COUNT=multiplier is not None and multiplier.numel() > 1,
        CODES=out.dtype.itemsize == 1,
        BLOCK_P=block_p,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        enable_fp_fusion=False,
    )


def _elementwise(pixels: int, channels: int) -> tuple[tuple[int], dict]:
    """Grid and blocks of 4096 elements, 32 for each thread of 4 warps: up to 128 channels, more of few pixels."""
    block_c = min(triton.next_power_of_2(channels), max(128, 4096 // triton.next_power_of_2(max(pixels, 1))))
    block_p = 4096 // block_c
    grid = (triton.cdiv(pixels, block_p) * triton.cdiv(channels, block_c),)
    return grid, {"BLOCK_P": block_p, "BLOCK_C": block_c, "enable_fp_fusion": False}
