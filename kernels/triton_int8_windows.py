"""Pools and resizing of an int8 model on a GPU: docs/format.md section 4, bit for bit.

Activations are those of triton_pixels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qdeploy.kernels.triton_math import cdiv, next_power_of_2
from qdeploy.kernels.triton_pixels import blocks_of, offsets, requantized

MOST_UNROLLED = 16  # elements of a window


@triton.jit
def _pool_kernel(
    x_ptr,  # u8, for the average also s16 [N, H, W, x_stride]
    multiplier_ptr,  # f32 [1] or [KH * KW]; not read by max
    out_ptr,  # u8, s16 or f32 [pixels, out_stride]
    pixels,
    C,
    H,
    W,
    OH,
    OW,
    x_stride,
    out_stride,
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
    KW: tl.constexpr,
    CELLS: tl.constexpr,
    MAX: tl.constexpr,
    BY_COUNT: tl.constexpr,  # one multiplier for each number of real elements
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program pools BLOCK_P windows of BLOCK_C channels, BLOCK_T elements of each window at a time."""
    pixel, channel = offsets(C, BLOCK_P, BLOCK_C)
    line = pixel // OW
    h0, w0 = line % OH * stride_h - top, pixel % OW * stride_w - left
    image = line // OH * H
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.int32)
    count = tl.zeros((BLOCK_P,), tl.int32)
    if BLOCK_T == 1:
        for cell in tl.static_range(CELLS):
            h, w = h0 + cell // KW * dilation_h, w0 + cell % KW * dilation_w
            real = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (pixel < pixels)
            offs = (((image + h) * W + w) * x_stride)[:, None] + channel[None, :]
            q = tl.load(x_ptr + offs, mask=real[:, None] & (channel < C)[None, :], other=0).to(tl.int32)
            if MAX:
                total = tl.maximum(total, q)
            else:
                total += q
                count += real.to(tl.int32)
    else:
        for first in range(0, CELLS, BLOCK_T):
            cell = (first + tl.arange(0, BLOCK_T))[None, :]
            h, w = h0[:, None] + cell // KW * dilation_h, w0[:, None] + cell % KW * dilation_w
            real = (cell < CELLS) & (h >= 0) & (h < H) & (w >= 0) & (w < W) & (pixel < pixels)[:, None]
            offs = (((image[:, None] + h) * W + w) * x_stride)[:, :, None] + channel[None, None, :]
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
        result = requantized(result, low, high, out_ptr.dtype.element_ty)
    tl.store(out_ptr + pixel[:, None] * out_stride + channel[None, :], result, mask=mask)


@triton.jit
def _resize_kernel(
    x_ptr,  # u8 [N, H, W, x_stride]
    row_start_ptr,  # i32 [OH]
    row_weight_ptr,  # i32 [OH, KH]
    column_start_ptr,  # i32 [OW]
    column_weight_ptr,  # i32 [OW, KW]
    out_ptr,  # u8 or f32 [pixels, out_stride]
    pixels,
    C,
    H,
    W,
    OH,
    OW,
    KH,
    KW,
    x_stride,
    out_stride,
    zero_point,
    multiplier,
    bias,
    low,
    high,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program sums up the weighted windows of BLOCK_P pixels of BLOCK_C channels."""
    pixel, channel = offsets(C, BLOCK_P, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    line, column = pixel // OW, pixel % OW
    row = line % OH
    first = (line // OH * H + tl.load(row_start_ptr + row)) * W + tl.load(column_start_ptr + column)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.int32)
    for cell in range(KH * KW):
        i, j = cell // KW, cell % KW
        weight = tl.load(row_weight_ptr + row * KH + i) * tl.load(column_weight_ptr + column * KW + j)
        offs = (first + i * W + j)[:, None] * x_stride + channel[None, :]
        q = tl.load(x_ptr + offs, mask=mask, other=0).to(tl.int32)
        acc += weight[:, None] * (q - zero_point)
    zeros = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    result = tl.fma(acc.to(tl.float32), zeros + multiplier, zeros + bias)
    value = requantized(result, low, high, out_ptr.dtype.element_ty)
    tl.store(out_ptr + pixel[:, None] * out_stride + channel[None, :], value, mask=mask)


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
    # The elements of a small window one after the other: its values then stay with the thread that loaded them. 32 at a
    # time go through shared memory, and took 24 times as long as the memory for the 3x3 pool of ResNet-50 (an H100).
    block_t = 1 if cells <= MOST_UNROLLED else 32
    block_c = min(next_power_of_2(channels), 64)
    block_p = max(1, 2048 // (block_t * block_c))  # 4096 take 96 registers, with Triton 3.9 more than there are
    grid = (cdiv(n * oh * ow, block_p) * cdiv(channels, block_c),)
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
        *stride,
        *padding[:2],
        *dilation,
        zero_point,
        bias,
        float(clamp[0]),
        float(clamp[1]),
        KW=kernel[1],
        CELLS=cells,
        MAX=multiplier is None,
        BY_COUNT=multiplier is not None and multiplier.numel() > 1,
        BLOCK_P=block_p,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        enable_fp_fusion=False,
    )


def resize(
    x: Tensor,
    out: Tensor,
    channels: int,
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor],
    zero_point: int,
    multiplier: float,
    bias: float,
    clamp: tuple[int, int],
) -> None:
    """Each axis of u8 [N, H, W, stride] by its windows: their starts, i32 [O], and weights, i32 [O, K]."""
    n, oh, ow, out_stride = out.shape
    _, h, w, x_stride = x.shape
    grid, blocks = blocks_of(n * oh * ow, channels)
    _resize_kernel[grid](
        x,
        *rows,
        *columns,
        out,
        n * oh * ow,
        channels,
        h,
        w,
        oh,
        ow,
        rows[1].shape[1],
        columns[1].shape[1],
        x_stride,
        out_stride,
        zero_point,
        multiplier,
        bias,
        float(clamp[0]),
        float(clamp[1]),
        **blocks,
    )
