"""LSQ on a GPU: the formulas of `lsq.py` with its bits, one read of every operand.

A dense tensor is a row-major matrix [M, N] of its memory, whatever the order of its dimensions. With `outer` elements
before the axis of the channels and `inner` after it,

    step sizes by row     M = outer * channels, N = inner             that of an element: row % channels
    step sizes by column  M = outer,            N = channels * inner  that of an element: col // inner

and one step size for the whole tensor is one row. Forward moves 8 bytes per float32 element. Backward moves 12: it
reads value and gradient once, writes the gradient of the value, and one partial sum of dL/ds for each row or column of
its tile, which `_sum_partials` adds up. Shapes and types alone decide the order of every sum, so two runs give the same
bits. Terms are float32 and sums float64, so that other orders (of `lsq`, of `lsq_many`) agree in the float32 result;
in these kernels float64 takes no more registers than float32 (56 against 56 for one row, sm_80).

Tiles have 2048 elements for 128 threads: four 16-byte loads per operand and thread. 4096 take 95 registers.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdeploy.kernels.triton_math import cdiv, clamp, next_power_of_2, round_half_even

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def codes(v, s, qmin, qmax):
    """x = v / s and its integer code."""
    x = tl.div_rn(v, s)
    return x, round_half_even(clamp(x, qmin, qmax))


@triton.jit
def gradients(v, s, g, qmin, qmax):
    """dL/dv, and the float64 terms of dL/ds."""
    x, r = codes(v, s, qmin, qmax)
    inside = (x >= qmin) & (x <= qmax)
    term = tl.where(inside, r - x, r) * g.to(tl.float32)
    return tl.where(inside, g, 0.0).to(g.dtype), term.to(tl.float64)


@triton.jit
def float64_of_bits(bits):
    """A float64 from its bits: Triton passes Python floats as float32."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _tile(
    step_ptr,
    M,
    N_vec,
    channels,
    inner,
    tiles_n,
    BY_ROW: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where this program's tile lies: its start (int64), offsets from there (int32) and mask; and its step sizes."""
    pid = tl.program_id(0)
    N = tl.cast(N_vec, tl.int64) * VEC  # VEC shows the compiler that rows begin on 16 bytes
    row, col = (pid // tiles_n).to(tl.int64) * BLOCK_M, (pid % tiles_n).to(tl.int64) * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    mask_m = offs_m < tl.minimum(M - row, BLOCK_M).to(tl.int32)
    mask_n = offs_n < tl.minimum(N - col, BLOCK_N).to(tl.int32)
    if BY_ROW:
        s = tl.load(step_ptr + ((row % channels).to(tl.int32) + offs_m) % channels, mask=mask_m, other=1.0)
    else:
        s = tl.load(step_ptr + col // inner + ((col % inner).to(tl.int32) + offs_n) // inner, mask=mask_n, other=1.0)
    return row * N + col, offs_m * (N_vec * VEC) + offs_n, mask_m & mask_n, s


@triton.jit
def _forward(
    value_ptr,
    step_ptr,
    out_ptr,
    M,
    N_vec,
    channels,
    inner,
    tiles_n,
    qmin,
    qmax,
    BY_ROW: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """This program quantizes one tile."""
    start, offs, mask, s = _tile(step_ptr, M, N_vec, channels, inner, tiles_n, BY_ROW, VEC, BLOCK_M, BLOCK_N)
    v = tl.load(value_ptr + start + offs, mask=mask, other=0.0)
    _, r = codes(v.to(tl.float32), s, qmin, qmax)
    tl.store(out_ptr + start + offs, (r * s).to(v.dtype), mask=mask)


@triton.jit
def _backward(
    grad_ptr,
    value_ptr,
    step_ptr,
    grad_value_ptr,
    partial_ptr,
    M,
    N_vec,
    channels,
    inner,
    tiles_n,
    qmin,
    qmax,
    BY_ROW: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """This program takes one tile; it writes one partial sum for each of its rows or columns."""
    start, offs, mask, s = _tile(step_ptr, M, N_vec, channels, inner, tiles_n, BY_ROW, VEC, BLOCK_M, BLOCK_N)
    v = tl.load(value_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + start + offs, mask=mask, other=0.0, eviction_policy="evict_first")  # not read again
    grad_v, terms = gradients(v, s, g, qmin, qmax)
    tl.store(grad_value_ptr + start + offs, grad_v, mask=mask)
    pid = tl.program_id(0).to(tl.int64)
    if BY_ROW:
        rows = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(partial_ptr + rows * tiles_n + pid % tiles_n, tl.sum(terms, 1), mask=rows < M)
    else:
        cols = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        N = tl.cast(N_vec, tl.int64) * VEC
        tl.store(partial_ptr + pid // tiles_n * N + cols, tl.sum(terms, 0), mask=cols < N)


@triton.jit
def _sum_partials(
    partial_ptr, out_ptr, channels, A, B, chunks, scale_bits, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr
):
    """This program sums up to BLOCK_R of the A * B partials [A, channels, B] of each of BLOCK_C channels."""
    chunk = tl.program_id(0) % chunks
    c = (tl.program_id(0) // chunks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    offs = (r // B * channels + c[:, None]) * B + r % B
    mask = (c < channels)[:, None] & (r < A * B)
    total = tl.sum(tl.load(partial_ptr + offs, mask=mask, other=0.0), 1) * float64_of_bits(scale_bits)
    tl.store(out_ptr + c * chunks + chunk, total.to(out_ptr.dtype.element_ty), mask=c < channels)


def bits_of_float64(scale: float) -> int:
    return struct.unpack("q", struct.pack("d", scale))[0]


def _matrix(shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """(outer, channels, inner) of a dense tensor in the order of its memory."""
    if axis == -1 or shape[axis] == 1:
        return 1, 1, math.prod(shape)
    order = sorted(range(len(shape)), key=lambda i: -strides[i])
    sizes = [shape[i] for i in order]
    at = order.index(axis)
    return math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1 :])


@lru_cache(4096)  # 50 us under a profiler, on the host of an H100
def _geometry(
    shape: tuple[int, ...], strides: tuple[int, ...], element_size: int, axis: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """The arguments M, N_vec, channels, inner, tiles_n of a launch and its constexprs."""
    outer, channels, inner = _matrix(shape, strides, axis)
    # Backward writes a partial sum for each row of a tile by row, each column of one by column: the longer axis wins.
    by_row = inner >= min(8 * outer, 1024)
    M, N = (outer * channels, inner) if by_row else (outer, channels * inner)
    vec = math.gcd(N, 16 // element_size)
    tile = 2048 if vec > 1 else 1024  # scalar loads hold an address per element: 118 registers for 2048, 48 for 1024
    # The widest tile that wastes up to a tenth of its lanes; by column it is tall, for the sake of few partial sums.
    # Tiles of several rows span less than 2^31 elements, because offsets inside a tile are int32.
    block_n = 64 if not by_row and N < 2**25 else tile
    while block_n > min(32, next_power_of_2(N)) and 10 * block_n * cdiv(N, block_n) > 11 * N:
        block_n //= 2
    block_m = min(tile // block_n, next_power_of_2(M))
    constexprs = {"BY_ROW": by_row, "VEC": vec, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return (M, N // vec, channels, inner, cdiv(N, block_n)), constexprs


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, or a copy of it where its elements lie in another order than those of `like`."""
    if tensor.stride() == like.stride():
        return tensor
    same = all(n == 1 or a == b for n, a, b in zip(like.shape, tensor.stride(), like.stride(), strict=True))
    return tensor if same else torch.empty_like(like).copy_(tensor)


def forward(value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int) -> Tensor:
    """`lsq` of any value: 1-D grid of one program per tile."""
    out = torch.empty_like(value)
    if value.numel() == 0:
        return out
    value = laid_out_as(value, out)
    sizes, constexprs = _geometry(value.shape, value.stride(), value.element_size(), axis)
    grid = (sizes[-1] * cdiv(sizes[0], constexprs["BLOCK_M"]),)
    with torch.cuda.device_of(value):
        _forward[grid](value, _steps(step, value), out, *sizes, float(qmin), float(qmax), **constexprs, **OPTIONS)
    return out


def backward(
    grad: Tensor, value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float
) -> tuple[Tensor, Tensor]:
    """`lsq_backward` of any value: one pass over value and gradient, then the sums of the partials."""
    grad_value = torch.empty_like(value)
    if value.numel() == 0:
        return grad_value, torch.zeros_like(step)
    value, grad = laid_out_as(value, grad_value), laid_out_as(grad, grad_value)
    sizes, constexprs = _geometry(value.shape, value.stride(), value.element_size(), axis)
    M, _, channels, inner, tiles_n = sizes
    tiles_m = cdiv(M, constexprs["BLOCK_M"])
    A, B = (M // channels, tiles_n) if constexprs["BY_ROW"] else (tiles_m, inner)
    partial = torch.empty(A * channels * B, dtype=torch.float64, device=value.device)
    pointers = grad, value, _steps(step, value), grad_value, partial
    with torch.cuda.device_of(value):
        _backward[tiles_m * tiles_n,](*pointers, *sizes, float(qmin), float(qmax), **constexprs, **OPTIONS)
        total = _sum(partial, A, channels, B, grad_scale)
    return grad_value, total.to(step).reshape(step.shape)


def _sum(partial: Tensor, A: int, channels: int, B: int, scale: float) -> Tensor:
    """`scale` times the sums of partials [A, channels, B] over A and B: float32 [channels]."""
    # Up to 4096 partials a program, so one row of 2^30 elements takes two rounds; four neighbours fill 32 bytes.
    block_c = 1 if B >= 4 else min(4, next_power_of_2(channels))
    block_r = min(4096 // block_c, next_power_of_2(A * B))
    chunks = cdiv(A * B, block_r)
    last = chunks == 1
    out = torch.empty(channels * chunks, dtype=torch.float32 if last else torch.float64, device=partial.device)
    grid = (cdiv(channels, block_c) * chunks,)
    bits = bits_of_float64(scale if last else 1.0)
    _sum_partials[grid](partial, out, channels, A, B, chunks, bits, block_c, block_r, **OPTIONS | {"num_warps": 8})
    return out if last else _sum(out, 1, channels, chunks, scale)


def _steps(step: Tensor, value: Tensor) -> Tensor:
    return step.to(value.device, torch.float32).contiguous()
