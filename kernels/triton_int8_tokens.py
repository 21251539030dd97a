"""Ops on the rows of an int8 model on a GPU, but for attention: docs/format.md section 4, bit for bit.

Activations are those of triton_pixels.py. Token ids are i32 [N, T + 1]: behind the T ids of a text is its length.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qdeploy.kernels.triton_math import cdiv, next_power_of_2
from qdeploy.kernels.triton_pixels import blocks_of, offsets, requantized


@triton.jit
def _gather_kernel(
    x_ptr,  # u8 or s16 [N, x_rows, x_stride]
    index_ptr,  # i32 [out_rows] or [C]; -1: the zero point
    out_ptr,  # of the type of x [pixels, out_stride]
    pixels,
    C,
    x_rows,
    out_rows,
    x_stride,
    out_stride,
    zero_point,
    ROWS: tl.constexpr,  # the index is one of rows, else of channels
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program moves BLOCK_P rows of BLOCK_C channels."""
    pixel, channel = offsets(C, BLOCK_P, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    if ROWS:
        index = tl.load(index_ptr + pixel % out_rows)
        real = mask & (index >= 0)[:, None]
        offs = ((pixel // out_rows * x_rows + index) * x_stride)[:, None] + channel[None, :]
    else:
        index = tl.load(index_ptr + channel, mask=channel < C, other=-1)
        real = mask & (index >= 0)[None, :]
        offs = (pixel * x_stride)[:, None] + index[None, :]
    q = tl.load(x_ptr + offs, mask=real, other=0).to(tl.int32)
    value = tl.where(real, q, zero_point).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pixel[:, None] * out_stride + channel[None, :], value, mask=mask)


@triton.jit
def _position_kernel(
    x_ptr,  # u8 or s16 [N, rows - prefix, x_stride]
    rows_ptr,  # f32 [rows, C]
    out_ptr,  # u8 or s16 [pixels, out_stride]
    pixels,
    C,
    rows,
    prefix,
    x_stride,
    out_stride,
    multiplier,
    low,
    high,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program adds the positions of BLOCK_P tokens of BLOCK_C channels, and puts the prefix before them."""
    pixel, channel = offsets(C, BLOCK_P, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    row = pixel % rows
    offs = ((pixel // rows * (rows - prefix) + row - prefix) * x_stride)[:, None] + channel[None, :]
    q = tl.load(x_ptr + offs, mask=mask & (row >= prefix)[:, None], other=0).to(tl.float32)
    position = tl.load(rows_ptr + row[:, None] * C + channel[None, :], mask=mask, other=0.0)
    result = tl.fma(q, tl.zeros((BLOCK_P, BLOCK_C), tl.float32) + multiplier, position)
    value = requantized(result, low, high, out_ptr.dtype.element_ty)
    tl.store(out_ptr + pixel[:, None] * out_stride + channel[None, :], value, mask=mask)


@triton.jit
def _embedding_kernel(
    ids_ptr,  # i32 [N, rows + 1]
    weight_ptr,  # s8 [V, C]
    multiplier_ptr,  # f32 [V] or [1]
    rows_ptr,  # f32 [rows, C]
    out_ptr,  # u8 or s16 [pixels, out_stride]
    pixels,
    C,
    rows,
    out_stride,
    low,
    high,
    BY_ID: tl.constexpr,  # a multiplier for each id
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program looks BLOCK_P tokens of BLOCK_C channels up."""
    pixel, channel = offsets(C, BLOCK_P, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    row = pixel % rows
    token = tl.load(ids_ptr + pixel + pixel // rows, mask=pixel < pixels, other=0)
    offs = token.to(tl.int64)[:, None] * C + channel[None, :]  # of a table that may have more than 2^31 codes
    code = tl.load(weight_ptr + offs, mask=mask, other=0).to(tl.float32)
    if BY_ID:
        multiplier = tl.load(multiplier_ptr + token)
    else:
        multiplier = tl.zeros((BLOCK_P,), tl.float32) + tl.load(multiplier_ptr)
    position = tl.load(rows_ptr + row[:, None] * C + channel[None, :], mask=mask, other=0.0)
    result = tl.fma(code, tl.broadcast_to(multiplier[:, None], (BLOCK_P, BLOCK_C)), position)
    value = requantized(result, low, high, out_ptr.dtype.element_ty)
    tl.store(out_ptr + pixel[:, None] * out_stride + channel[None, :], value, mask=mask)


@triton.jit
def _mean_kernel(
    x_ptr,  # u8 or s16 [N, T, x_stride]
    multiplier_ptr,  # f32 [T]
    ids_ptr,  # i32 [N, ids_stride], read where lengths VARY
    out_ptr,  # u8 or f32 [N, out_stride]
    C,
    T,
    ids_stride,
    more,  # rows than the text has tokens
    x_stride,
    out_stride,
    zero_point,
    bias,
    low,
    high,
    VARY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program averages BLOCK_C channels of one text, BLOCK_T rows at a time."""
    blocks = tl.cdiv(C, BLOCK_C)
    image, channel = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.load(ids_ptr + image * ids_stride + ids_stride - 1) + more if VARY else T
    acc = tl.zeros((BLOCK_C,), tl.int32)
    for first in range(0, count, BLOCK_T):
        row = first + tl.arange(0, BLOCK_T)
        mask = (row < count)[:, None] & (channel < C)[None, :]
        q = tl.load(x_ptr + (image * T + row)[:, None] * x_stride + channel[None, :], mask=mask, other=0)
        acc += tl.sum(q.to(tl.int32), 0)
    zeros = tl.zeros((BLOCK_C,), tl.float32)
    multiplier = tl.load(multiplier_ptr + count - 1)
    result = tl.fma((acc - count * zero_point).to(tl.float32), zeros + multiplier, zeros + bias)
    value = requantized(result, low, high, out_ptr.dtype.element_ty)
    tl.store(out_ptr + image * out_stride + channel, value, mask=channel < C)


@triton.jit
def _norm_kernel(
    x_ptr,  # u8 or s16 [pixels, x_stride]
    multiplier_ptr,  # f32 [groups * C]
    bias_ptr,  # f32 [groups * C]
    out_ptr,  # u8, s16 or f32 [pixels, out_stride]
    sets,
    groups,
    rows,  # of a set
    C,  # channels of a group
    x_stride,
    out_stride,
    epsilon,
    low,
    high,
    GROUPED: tl.constexpr,  # else a set is one row of all channels
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """This program normalises BLOCK_S sets of elements that share their statistics, BLOCK_E of each at a time."""
    index = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    first_row, first_channel = index // groups * rows, index % groups * C
    count = rows * C
    total = tl.zeros((BLOCK_S,), tl.int32)
    squares = tl.zeros((BLOCK_S,), tl.int64)
    for first in range(0, count, BLOCK_E):
        element = first + tl.arange(0, BLOCK_E)
        mask = (index < sets)[:, None] & (element < count)[None, :]
        row, channel = _places(element, C, first_row, first_channel, GROUPED)
        q = tl.load(x_ptr + row * x_stride + channel, mask=mask, other=0).to(tl.int32)
        total += tl.sum(q, 1)
        squares += tl.sum((q * q).to(tl.int64), 1)
    variance = squares * count - total.to(tl.int64) * total  # of count times the codes
    inverse = tl.div_rn(tl.full((BLOCK_S,), 1.0, tl.float32), tl.sqrt_rn(variance.to(tl.float32) + epsilon))
    for first in range(0, count, BLOCK_E):
        element = first + tl.arange(0, BLOCK_E)
        mask = (index < sets)[:, None] & (element < count)[None, :]
        row, channel = _places(element, C, first_row, first_channel, GROUPED)
        q = tl.load(x_ptr + row * x_stride + channel, mask=mask, other=0).to(tl.int32)
        t = (q * count - total[:, None]).to(tl.float32) * inverse[:, None]
        multiplier = tl.load(multiplier_ptr + channel, mask=mask, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=mask, other=0.0)
        value = requantized(tl.fma(t, multiplier, bias), low, high, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * out_stride + channel, value, mask=mask)


@triton.jit
def _places(element, C, first_row, first_channel, GROUPED: tl.constexpr):
    """Row and channel of each element of each set."""
    if GROUPED:
        row, channel = element // C, element % C
    else:
        row, channel = element * 0, element
    return first_row[:, None] + row[None, :], first_channel[:, None] + channel[None, :]


def gather(x: Tensor, index: Tensor, out: Tensor, channels: int, zero_point: int, rows: bool) -> None:
    """Rows (else channels) of [N, H, W, stride] by an index, i32; -1 is the zero point."""
    n, h, w, out_stride = out.shape
    grid, blocks = blocks_of(n * h * w, channels)
    x_rows = x.shape[1] * x.shape[2]
    _gather_kernel[grid](
        x, index, out, n * h * w, channels, x_rows, h * w, x.shape[3], out_stride, zero_point, ROWS=rows, **blocks
    )


def position(x: Tensor, rows: Tensor, out: Tensor, prefix: int, multiplier: float, clamp: tuple[int, int]) -> None:
    """[N, T, 1, stride] with positions, f32 [prefix + T, D], whose first `prefix` come before its tokens."""
    n, count, _, out_stride = out.shape
    grid, blocks = blocks_of(n * count, rows.shape[1])
    sizes = n * count, rows.shape[1], count, prefix, x.shape[3], out_stride
    _position_kernel[grid](x, rows, out, *sizes, multiplier, float(clamp[0]), float(clamp[1]), **blocks)


def embedding(
    ids: Tensor, weight: Tensor, multiplier: Tensor, rows: Tensor, out: Tensor, clamp: tuple[int, int]
) -> None:
    """The rows of weight, s8 [V, D], of ids, i32 [N, T + 1], with positions, f32 [T, D]."""
    n, count, _, out_stride = out.shape
    grid, blocks = blocks_of(n * count, rows.shape[1])
    sizes, limits = (n * count, rows.shape[1], count, out_stride), (float(clamp[0]), float(clamp[1]))
    by_id = multiplier.numel() > 1
    _embedding_kernel[grid](ids, weight, multiplier, rows, out, *sizes, *limits, BY_ID=by_id, **blocks)


def mean(
    x: Tensor,
    multiplier: Tensor,
    out: Tensor,
    channels: int,
    zero_point: int,
    bias: float,
    clamp: tuple[int, int],
    ids: Tensor | None,
    more: int,
) -> None:
    """Over the T rows of [N, T, 1, stride], or, with token ids, over `more` rows than the text has tokens."""
    n, count, _, x_stride = x.shape
    block_c = min(next_power_of_2(channels), 128)
    _mean_kernel[(n * cdiv(channels, block_c),)](
        x,
        multiplier,
        x if ids is None else ids,
        out,
        channels,
        count,
        0 if ids is None else ids.shape[-1],
        more,
        x_stride,
        out.shape[3],
        zero_point,
        bias,
        float(clamp[0]),
        float(clamp[1]),
        VARY=ids is not None,
        BLOCK_T=min(next_power_of_2(count), 32),
        BLOCK_C=block_c,
        enable_fp_fusion=False,
    )


def norm(
    x: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    out: Tensor,
    groups: int | None,
    epsilon: float,
    clamp: tuple[int, int],
) -> None:
    """Of each row of [N, H, W, stride], or of each group of channels over all rows; multiplier, bias: f32 [C]."""
    n, h, w, x_stride = x.shape
    rows, channels = (h * w if groups else 1), multiplier.numel() // (groups or 1)
    sets = n * h * w // rows * (groups or 1)
    block_e = min(next_power_of_2(rows * channels), 1024)
    block_s = min(next_power_of_2(max(sets, 1)), max(1, 2048 // block_e))
    _norm_kernel[(cdiv(sets, block_s),)](
        x,
        multiplier,
        bias,
        out,
        sets,
        groups or 1,
        rows,
        channels,
        x_stride,
        out.shape[3],
        epsilon,
        float(clamp[0]),
        float(clamp[1]),
        GROUPED=groups is not None,
        BLOCK_S=block_s,
        BLOCK_E=block_e,
        enable_fp_fusion=False,
    )
