"""Attention of an int8 model on the tensor cores of a GPU: docs/format.md section 4, bit for bit.

Tensor cores take signed bytes. With q' = q - 128 (the top bit flipped), and k', v' likewise,

    sum (q - zq)*(k - zk) = sum (q' + 128 - zq)*(k' + 128 - zk)
    sum p*(v - zv) = 256 * sum (p >> 8)*v'  +  sum ((p & 255) - 128)*v'  +  128 * sum v'  +  (128 - zv) * sum p

where p has 15 bits, so that both of its parts are signed bytes. A weight is relative to the largest logit of its row,
before which no weight is known to its last bit: the logits are computed twice, and nothing of them is stored.

Activations are those of triton_pixels.py, token ids those of triton_int8_tokens.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qdeploy.kernels.triton_math import cdiv, next_power_of_2
from qdeploy.kernels.triton_pixels import requantized


@triton.jit
def _signed(q):
    return (q ^ 0x80).to(tl.int8, bitcast=True)


@triton.jit
def _weights(d, peak):
    """rint(peak * 2^d) of float32 d <= 0 as int32. Added to 1.5 * 2^23, a number has its rint in its lowest bits."""
    d = tl.maximum(d, -32.0)
    shifted = d + 12582912.0
    f = d - (shifted - 12582912.0)
    y = tl.full(d.shape, 0.009582852944731712, tl.float32)  # 0x3c1d0166
    y = tl.fma(y, f, tl.full(d.shape, 0.055906426161527634, tl.float32))  # 0x3d64fe23
    y = tl.fma(y, f, tl.full(d.shape, 0.24024099111557007, tl.float32))  # 0x3e7601bc
    y = tl.fma(y, f, tl.full(d.shape, 0.6931241750717163, tl.float32))  # 0x3f317096
    y = tl.fma(y, f, tl.full(d.shape, 1.0, tl.float32))
    power = ((shifted.to(tl.int32, bitcast=True) - 0x4B400000 + 127) << 23).to(tl.float32, bitcast=True)
    return ((y * peak) * power + 12582912.0).to(tl.int32, bitcast=True) & 0xFFFF


@triton.jit
def _logits(
    q_ptrs,  # [BLOCK_Q] of the first channel of the head
    k_ptr,  # of the first channel of the head of the first key of the segment
    row,  # [BLOCK_Q] in the segment
    first,  # key of this tile
    present,  # keys of the segment
    segment_row,  # of the first key of the segment, in regions
    k_stride,
    depth,
    q_offset,  # 128 - zero point
    k_offset,
    constant,  # what the padded channels add to the products, and 128 - zero point of both for every channel
    multiplier,
    logit_bias_ptr,  # of the head
    bias_keys,
    regions_ptr,
    BIAS: tl.constexpr,
    REGIONS: tl.constexpr,
    D_BLOCKS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """f32 [BLOCK_Q, BLOCK_K]; -inf where a row does not see a key."""
    index = first + tl.arange(0, BLOCK_K)
    key = tl.minimum(index, present - 1)  # keys past the end repeat the last one: no mask in the loop
    k_ptrs = k_ptr + key * k_stride
    acc = tl.zeros((BLOCK_Q, BLOCK_K), tl.int32)
    for block in range(D_BLOCKS):
        channel = block * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = (channel < depth)[None, :]
        q = _signed(tl.load(q_ptrs[:, None] + channel[None, :], mask=mask, other=0))
        k = _signed(tl.load(k_ptrs[:, None] + channel[None, :], mask=mask, other=0))
        acc = tl.dot(q, tl.trans(k), acc, out_dtype=tl.int32)
        acc += (tl.sum(q.to(tl.int32), 1) * k_offset)[:, None] + (tl.sum(k.to(tl.int32), 1) * q_offset)[None, :]
    zeros = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    added = zeros
    if BIAS:
        added = tl.load(logit_bias_ptr + row.to(tl.int64)[:, None] * bias_keys + key[None, :])
    logits = tl.fma((acc + constant).to(tl.float32), zeros + multiplier, added)
    seen = (index < present)[None, :]
    if REGIONS:
        own, other = tl.load(regions_ptr + segment_row + row), tl.load(regions_ptr + segment_row + key)
        seen = seen & (own[:, None] == other[None, :])
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _attention_kernel(
    q_ptr,  # u8 [N * blocks, queries, q_stride]
    k_ptr,  # u8 [N * blocks, keys, k_stride]
    v_ptr,  # u8 [N * blocks, keys, v_stride]
    logit_bias_ptr,  # f32 [heads, bias_queries, bias_keys], as many and more
    regions_ptr,  # i32 [blocks * keys]
    ids_ptr,  # i32 [N, ids_stride], read where lengths VARY
    out_ptr,  # u8 [N * blocks, queries, out_stride]
    blocks,  # segments of a sequence
    queries,
    keys,
    heads,
    bias_queries,
    bias_keys,
    depth,  # channels of a head of q and k
    width,  # channels of a head of v
    ids_stride,
    more,  # keys than the text has tokens
    q_stride,
    k_stride,
    v_stride,
    out_stride,
    q_offset,  # 128 - zero point
    k_offset,
    v_offset,
    constant,  # of _logits
    logit_multiplier,
    peak,
    multiplier,
    bias,
    low,
    high,
    VARY: tl.constexpr,
    BIAS: tl.constexpr,
    REGIONS: tl.constexpr,
    D_BLOCKS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """This program computes BLOCK_Q rows of BLOCK_E channels of one head of one segment."""
    pid = tl.program_id(0)
    tiles, tiles_e = tl.cdiv(queries, BLOCK_Q), tl.cdiv(width, BLOCK_E)
    index = pid % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)  # neighbours share keys and values
    channel = pid // tiles % tiles_e * BLOCK_E + tl.arange(0, BLOCK_E)
    segment, head = pid // tiles // tiles_e // heads, pid // tiles // tiles_e % heads
    row = tl.minimum(index, queries - 1)
    present = tl.load(ids_ptr + segment * ids_stride + ids_stride - 1) + more if VARY else keys
    q_ptrs = q_ptr + (segment * queries + row) * q_stride + head * depth
    k_ptr += segment * keys * k_stride + head * depth
    logit_bias_ptr += head.to(tl.int64) * bias_queries * bias_keys
    segment_row = segment % blocks * keys

    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    for first in range(0, present, BLOCK_K):
        t = _logits(
            q_ptrs, k_ptr, row, first, present, segment_row, k_stride, depth, q_offset, k_offset, constant,
            logit_multiplier, logit_bias_ptr, bias_keys, regions_ptr, BIAS, REGIONS,
            D_BLOCKS, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(t, 1))

    v_ptr += segment * keys * v_stride + head * width
    total = tl.zeros((BLOCK_Q,), tl.int32)
    acc = tl.zeros((BLOCK_Q, BLOCK_E), tl.int32)
    for first in range(0, present, BLOCK_K):
        t = _logits(
            q_ptrs, k_ptr, row, first, present, segment_row, k_stride, depth, q_offset, k_offset, constant,
            logit_multiplier, logit_bias_ptr, bias_keys, regions_ptr, BIAS, REGIONS,
            D_BLOCKS, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        p = _weights(t - largest[:, None], peak)
        total += tl.sum(p, 1)
        key = tl.minimum(first + tl.arange(0, BLOCK_K), present - 1)
        v = _signed(
            tl.load(v_ptr + key[:, None] * v_stride + channel[None, :], mask=(channel < width)[None, :], other=0)
        )
        upper, lower = (p >> 8).to(tl.int8), (p ^ 0x80).to(tl.int8)  # the low byte, its top bit flipped
        acc += tl.dot(upper, v, out_dtype=tl.int32) * 256 + tl.dot(lower, v, out_dtype=tl.int32)
        acc += (tl.sum(v.to(tl.int32), 0) * 128)[None, :]
    acc += (total * v_offset)[:, None]
    factor = tl.div_rn(tl.zeros((BLOCK_Q,), tl.float32) + multiplier, total.to(tl.float32))
    shape: tl.constexpr = (BLOCK_Q, BLOCK_E)
    result = tl.fma(acc.to(tl.float32), tl.broadcast_to(factor[:, None], shape), tl.zeros(shape, tl.float32) + bias)
    offs = ((segment * queries + index) * out_stride + head * width)[:, None] + channel[None, :]
    mask = (index < queries)[:, None] & (channel < width)[None, :]
    tl.store(out_ptr + offs, requantized(result, low, high, out_ptr.dtype.element_ty), mask=mask)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    heads: int,
    channels: tuple[int, int],
    block: int | None,
    zero_points: tuple[int, int, int],
    logit_multiplier: float,
    peak: int,
    multiplier: float,
    bias: float,
    clamp: tuple[int, int],
    logit_bias: Tensor | None,
    regions: Tensor | None,
    ids: Tensor | None,
    more: int,
) -> None:
    """u8 q and out [N, T, 1, stride], k and v [N, S, 1, stride].

    channels: of q and k, and of v and the output. ids: token ids of texts of any length, which have `more` keys than
    tokens. block, logit_bias (f32 [heads, T, S] of the longest segment) and regions (i32 [S]) are those of the format.
    """
    n, rows, _, out_stride = out.shape
    queries, keys = block or rows, block or k.shape[1]
    depth, width = (count // heads for count in channels)
    block_d = min(max(next_power_of_2(depth), 32), 128)
    block_e = min(max(next_power_of_2(width), 16), 64)
    block_q = min(max(next_power_of_2(queries), 16), 64)
    padded = cdiv(depth, block_d) * block_d
    (zq, zk, zv), blocks = zero_points, rows // queries
    tiles = cdiv(queries, block_q) * cdiv(width, block_e)
    _attention_kernel[(tiles * n * blocks * heads,)](
        q,
        k,
        v,
        q if logit_bias is None else logit_bias,
        q if regions is None else regions,
        q if ids is None else ids,
        out,
        blocks,
        queries,
        keys,
        heads,
        *((0, 0) if logit_bias is None else logit_bias.shape[1:]),
        depth,
        width,
        0 if ids is None else ids.shape[-1],
        more,
        q.shape[3],
        k.shape[3],
        v.shape[3],
        out_stride,
        128 - zq,
        128 - zk,
        128 - zv,
        padded * (128 - zq) * (128 - zk) - (padded - depth) * zq * zk,
        logit_multiplier,
        float(peak),
        multiplier,
        bias,
        float(clamp[0]),
        float(clamp[1]),
        VARY=ids is not None,
        BIAS=logit_bias is not None,
        REGIONS=regions is not None,
        D_BLOCKS=padded // block_d,
        BLOCK_Q=block_q,
        BLOCK_K=min(max(next_power_of_2(keys), 32), 64),
        BLOCK_D=block_d,
        BLOCK_E=block_e,
        enable_fp_fusion=False,
    )
