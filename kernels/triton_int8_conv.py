"""Convolutions and linear layers as int8 products on the tensor cores of a GPU: docs/format.md section 4, bit for bit.

Groups and depthwise too are one implicit product, pixels [M] by outputs [N] over cells and channels [K]:

    acc[m, n] = sum_k (q[m, k] - 128) * w[n, k]  +  (128 - zero_point) * sum_k w[n, k]

Tensor cores take signed bytes of both sides; q - 128 is q with its top bit flipped, and the second term is a constant
of the output. Padding counts as q = zero_point, so it takes part in both sums and drops out. Integer sums are exact in
any order, so no tile shape can change a bit; requantization is one conversion and one or two fma in float32.

Groups: as many groups as fill 32 input channels form a superblock, whose weights are block-diagonal (ResNeXt's 4
channels a group: 8 groups; depthwise: 32). The zeros cost products that tensor cores have to spare.

Activations are those of triton_pixels.py.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qdeploy.kernels.int8_tiles import Tile
from qdeploy.kernels.int8_weights import PackedConv
from qdeploy.kernels.triton_math import cdiv, clamp, round_half_even
from qdeploy.kernels.triton_pixels import requantized


class InnerCodes(NamedTuple):
    """What a residual is added to: rint(r) within [low, high], by `multiplier`, and `bias`."""

    low: float
    high: float
    multiplier: float
    bias: float


@triton.jit
def _inside(h, w, H, W):
    """As unsigned numbers, negative ones are beyond the end too."""
    return (h.to(tl.uint32) < tl.cast(H, tl.uint32)) & (w.to(tl.uint32) < tl.cast(W, tl.uint32))


@triton.jit
def _conv_kernel(
    x_ptr,  # u8 [N, H, W, x_stride]
    padding_ptr,  # u8 [BLOCK_K]: what is read beside the image
    w_ptr,  # s8 [rows, w_stride]
    compensation_ptr,  # i32 [rows]
    multiplier_ptr,  # f32 [rows]
    bias_ptr,  # f32 [rows]
    residual_ptr,  # u8 or s16 [M, residual_stride]
    out_ptr,  # u8, s16 or f32 [M, out_stride]
    M,
    H,
    W,
    OH,
    OW,
    x_stride,
    w_stride,
    residual_stride,
    out_stride,
    stride_h,
    stride_w,
    top,
    left,
    dilation_h,
    dilation_w,
    k_blocks,  # K tiles of one cell; FLAT: of all cells
    x_superblock,  # channels from one superblock's first input to the next one's
    out_superblock,  # outputs of a superblock
    outputs,  # of all
    tiles_n,  # tiles of a superblock
    grid_n,  # tiles of all superblocks
    residual_multiplier,
    inner_low,
    inner_high,
    inner_multiplier,
    inner_bias,
    low,
    high,
    KH: tl.constexpr,
    KW: tl.constexpr,
    FLAT: tl.constexpr,  # x_stride where it is below a K tile, else 0
    POINTWISE: tl.constexpr,  # 1x1, stride 1, no padding: pixel m of the output is pixel m of x
    PADDED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    INNER: tl.constexpr,  # the residual is added to inner codes
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """This program computes BLOCK_M pixels of BLOCK_N outputs."""
    pid = tl.program_id(0)
    pid_n = pid % grid_n  # neighbours share the pixels: they are read from DRAM once
    offs_m = (pid // grid_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    m = tl.minimum(offs_m, M - 1)  # rows past the end repeat the last one: no mask in the loop
    superblock = pid_n // tiles_n
    rows = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)

    if POINTWISE:
        x_pixel = m
    else:
        line = m // OW
        h0 = line % OH * stride_h - top
        w0 = m % OW * stride_w - left
        x_pixel = (line // OH * H + h0) * W + w0
    w_ptrs = w_ptr + rows[:, None] * w_stride + offs_k[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if FLAT:
        x_offs = x_pixel * FLAT
        for step in range(k_blocks):
            k = step * BLOCK_K + offs_k
            cell = k // FLAT
            h = cell // KW * dilation_h
            w = cell % KW * dilation_w
            inside = _inside(h0[:, None] + h[None, :], w0[:, None] + w[None, :], H, W)
            offs = x_offs[:, None] + ((h * W + w) * FLAT + k % FLAT)[None, :]
            a = tl.load(tl.where(inside, x_ptr + offs, padding_ptr + (k % FLAT)[None, :]))
            b = tl.load(w_ptrs + step * BLOCK_K)
            acc = tl.dot((a ^ 0x80).to(tl.int8, bitcast=True), tl.trans(b), acc, out_dtype=tl.int32)
    else:
        x_offs = x_pixel * x_stride + superblock * x_superblock
        for step in range(KH * KW * k_blocks):
            cell = step // k_blocks
            h = cell // KW * dilation_h
            w = cell % KW * dilation_w
            offs = (x_offs + ((h * W + w) * x_stride + (step % k_blocks) * BLOCK_K))[:, None] + offs_k[None, :]
            x_ptrs = x_ptr + offs
            if PADDED:  # an address and no mask: with another `other` than 0 each byte is selected by itself
                inside = _inside(h0 + h, w0 + w, H, W)
                x_ptrs = tl.where(inside[:, None], x_ptrs, padding_ptr + offs_k[None, :])
            a = tl.load(x_ptrs)
            b = tl.load(w_ptrs + step * BLOCK_K)
            acc = tl.dot((a ^ 0x80).to(tl.int8, bitcast=True), tl.trans(b), acc, out_dtype=tl.int32)

    acc += tl.load(compensation_ptr + rows)[None, :]
    multiplier = tl.broadcast_to(tl.load(multiplier_ptr + rows)[None, :], (BLOCK_M, BLOCK_N))
    bias = tl.broadcast_to(tl.load(bias_ptr + rows)[None, :], (BLOCK_M, BLOCK_N))
    result = tl.fma(acc.to(tl.float32), multiplier, bias)
    local = pid_n % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = superblock * out_superblock + local
    mask = mask_m[:, None] & ((local < out_superblock) & (channel < outputs))[None, :]
    if RESIDUAL:
        q = tl.load(residual_ptr + m[:, None] * residual_stride + channel[None, :], mask=mask, other=0).to(tl.float32)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if INNER:
            codes = round_half_even(clamp(result, inner_low, inner_high))
            result = tl.fma(codes, zeros + inner_multiplier, tl.fma(q, zeros + residual_multiplier, zeros + inner_bias))
        else:
            result = tl.fma(q, zeros + residual_multiplier, result)
    value = requantized(result, low, high, out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[:, None] * out_stride + channel[None, :], value, mask=mask)


def conv(
    x: Tensor,
    packed: PackedConv,
    out: Tensor,
    tile: Tile,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    clamp: tuple[int, int] = (0, 255),
    residual: Tensor | None = None,
    residual_multiplier: float = 0.0,
    inner: InnerCodes | None = None,
) -> None:
    """Convolution or linear layer (then H = W = 1) with its requantization.

    x: u8 [N, H, W, stride]; out: u8, s16 (clamped) or f32 [N, OH, OW, stride].
    residual: u8 or s16 [N, OH, OW, stride], or None; inner: the codes to which it is added, None where it is numbers.
    padding: top, left, bottom, right.
    """
    n, h, w, x_stride = x.shape
    _, oh, ow, out_stride = out.shape
    k = packed.codes.shape[1]
    tiles_n = packed.rows_per_superblock // tile.block_n
    grid_n = tiles_n * packed.superblocks
    plain = (packed.kh, packed.kw, *stride, *padding) == (1, 1, 1, 1, 0, 0, 0, 0)
    pixels = n * oh * ow
    _conv_kernel[(cdiv(pixels, tile.block_m) * grid_n,)](
        x,
        packed.padding,
        packed.codes,
        packed.compensation,
        packed.multiplier,
        packed.bias,
        x if residual is None else residual,
        out,
        pixels,
        h,
        w,
        oh,
        ow,
        x_stride,
        k,
        0 if residual is None else residual.shape[3],
        out_stride,
        *stride,
        *padding[:2],
        *dilation,
        k // tile.block_k if packed.flat else k // (packed.kh * packed.kw * tile.block_k),
        packed.inputs_per_superblock,
        packed.outputs_per_superblock,
        packed.outputs,
        tiles_n,
        grid_n,
        residual_multiplier,
        *(inner or InnerCodes(0.0, 0.0, 0.0, 0.0)),
        float(clamp[0]),
        float(clamp[1]),
        KH=packed.kh,
        KW=packed.kw,
        FLAT=x_stride if packed.flat else 0,
        POINTWISE=plain and not packed.flat,
        PADDED=any(padding),
        RESIDUAL=residual is not None,
        INNER=inner is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )
