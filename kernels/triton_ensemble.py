"""Softmax average of an ensemble on a GPU: the formulas of docs/format.md, "Ensembles", to the last bit.

Every float32 operation of the definition is one here, in the same order. The sum of a softmax runs over integers, so
the order in which threads add cannot change a bit of it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdeploy.errors import InputError
from qdeploy.graph import COMBINE
from qdeploy.kernels.ensemble import check_logits
from qdeploy.kernels.triton_math import cdiv, next_power_of_2

LOG2_E = tl.constexpr(float.fromhex("0x1.715476p+0"))
LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e4p-1"))  # short, so that n * LN2_HIGH is exact
LN2_LOW = tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))

# A row of up to this many classes stays in registers. Twice as many need 1024 threads, whose 64 registers spill.
IN_REGISTERS = 8192
CHUNK = 2048  # classes per program where a row is split


@triton.jit
def _scaled_exp(d):
    """exp(d) * 2^30 of float32 d <= 0; 0 for d < -87 and for NaN."""
    inside = d >= -87.0
    d = tl.where(inside, d, 0.0)
    shifted = d * LOG2_E + 12582912.0  # 1.5 * 2^23 leaves no bits for a fraction: rounds half to even
    n = shifted - 12582912.0
    f = tl.fma(n, -LN2_LOW, tl.fma(n, -LN2_HIGH, d))
    p = tl.fma(f, 1 / 720, 1 / 120)
    p = tl.fma(p, f, 1 / 24)
    p = tl.fma(p, f, 1 / 6)
    p = tl.fma(p, f, 1 / 2)
    p = tl.fma(p, f, 1.0)
    p = tl.fma(p, f, 1.0)
    # The low bits of `shifted` hold n. Moved to the exponent, with 30 and the bias 127, they are 2^(n + 30).
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + (157 << 23)).to(tl.float32, bitcast=True)
    return tl.where(inside, p * power, 0.0)


@triton.jit
def _integer(e):
    """rint(e) as int64 of float32 e within 0..2^30; from 2^23 on a float32 is an integer."""
    return tl.where(e < 8388608.0, (e + 8388608.0) - 8388608.0, e).to(tl.int32).to(tl.int64)


@triton.jit
def _scores(x, mask):
    """NaN of x as +inf, because a maximum drops NaN and keeps inf; -inf outside the mask."""
    return tl.where(mask, tl.where(x == x, x, float("inf")), float("-inf"))


@triton.jit
def _softmax(scores):
    """Softmax of the rows of scores [R, K]. Where the largest is not finite, all e and the total are 0: NaN."""
    largest = tl.max(scores, 1, keep_dims=True)
    e = _scaled_exp(scores - largest)
    total = tl.sum(_integer(e), 1, keep_dims=True).to(tl.float32)
    return tl.div_rn(e, tl.broadcast_to(total, e.shape))


@triton.jit
def _average_kernel(
    logits_ptr,
    members,
    rows,
    stride_e,
    stride_n,
    VECTOR: tl.constexpr,
    probabilities_ptr,
    classes_ptr,
    share,
    K: tl.constexpr,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """This program processes ROWS rows of all members; each logit is read once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(row, rows - 1)  # programs past the end repeat the last row: masks are of columns alone
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    mask = offs_k < K
    offs = tl.multiple_of(row * stride_n, VECTOR)[:, None] + offs_k
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for member in range(members):
        start = tl.multiple_of(tl.cast(member, tl.int64) * stride_e, VECTOR)
        x = tl.load(logits_ptr + start + offs, mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if RULE == "probs":
            x = _softmax(_scores(x, mask))
        total += x
    mean = total * share
    scores = _scores(mean, mask)
    probabilities = _softmax(scores) if RULE == "logits" else mean
    tl.store(probabilities_ptr + (row * K)[:, None] + offs_k, probabilities, mask)
    first = tl.where(scores == tl.max(scores, 1, keep_dims=True), offs_k, K - 1)
    tl.store(classes_ptr + row, tl.min(first, 1).to(tl.int64))


@triton.jit
def _largest_kernel(
    logits_ptr,
    members,
    rows,
    stride_e,
    stride_n,
    VECTOR: tl.constexpr,
    mean_ptr,
    largest_ptr,
    share,
    K: tl.constexpr,
    RULE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """This program processes one chunk of one row: its mean over the members, or each member's largest logit."""
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = offs_k < K
    partial_ptr = largest_ptr + row * tl.num_programs(1) + tl.program_id(1)
    total = tl.zeros((CHUNK,), tl.float32)
    for member in range(members):
        start = tl.multiple_of(tl.cast(member, tl.int64) * stride_e + row * stride_n, VECTOR)
        x = tl.load(logits_ptr + start + offs_k, mask, other=0.0).to(tl.float32)
        if RULE == "probs":
            tl.store(partial_ptr + tl.cast(member, tl.int64) * rows * tl.num_programs(1), tl.max(_scores(x, mask), 0))
        else:
            total += x
    if RULE == "logits":
        mean = total * share
        tl.store(mean_ptr + row * K + offs_k, mean, mask)
        tl.store(partial_ptr, tl.max(_scores(mean, mask), 0))


@triton.jit
def _total_kernel(
    logits_ptr,
    rows,
    stride_e,
    stride_n,
    VECTOR: tl.constexpr,
    largest_ptr,
    total_ptr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """This program processes one chunk of one row of one member: the sum of its exponentials as an integer."""
    row, member = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = offs_k < K
    start = tl.multiple_of(member * stride_e + row * stride_n, VECTOR)
    x = tl.load(logits_ptr + start + offs_k, mask, other=float("-inf")).to(tl.float32)
    row = member * rows + row
    e = _scaled_exp(x - tl.load(largest_ptr + row))
    tl.store(total_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.sum(_integer(e), 0))


@triton.jit
def _normalise_kernel(
    logits_ptr,
    members,
    rows,
    stride_e,
    stride_n,
    VECTOR: tl.constexpr,
    largest_ptr,
    total_ptr,
    probabilities_ptr,
    share,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """This program processes one chunk of one row of all members: the mean of their probabilities."""
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = offs_k < K
    mean = tl.zeros((CHUNK,), tl.float32)
    for member in range(members):
        start = tl.multiple_of(tl.cast(member, tl.int64) * stride_e + row * stride_n, VECTOR)
        x = tl.load(logits_ptr + start + offs_k, mask, other=float("-inf")).to(tl.float32)
        e = _scaled_exp(x - tl.load(largest_ptr + member * rows + row))
        mean += tl.div_rn(e, tl.broadcast_to(tl.load(total_ptr + member * rows + row), (CHUNK,)))
    tl.store(probabilities_ptr + row * K + offs_k, mean * share, mask)


def average(logits: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Combines the members of an ensemble, with the bits of `qdeploy.reference.combine`.

    Args:
        logits: [E, N, K] float32, bfloat16 or float16, computed in float32. The classes lie side by side, else a copy
            is made; members and images may have any stride.
        rule: "logits", softmax of the mean logit, or "probs", mean of the softmaxes.

    Returns:
        The probabilities, float32 [N, K], and the class of the largest mean logit or mean probability, the first of
        equals, int64 [N]. An image with a NaN, a +inf or nothing but -inf in what the softmax sees has NaN for all its
        probabilities and any class of 0..K-1. Another -inf is the logit of a class with probability 0.

    Raises:
        InputError: another rule, shape or type.
    """
    if rule not in COMBINE:
        raise InputError(f"expected rule {' or '.join(COMBINE)}, got {rule!r} - at ensemble average")
    check_logits(logits)
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    _, rows, k = logits.shape
    probabilities = torch.empty(rows, k, dtype=torch.float32, device=logits.device)
    classes = torch.empty(rows, dtype=torch.int64, device=logits.device)
    with torch.cuda.device_of(logits):
        launch = _average_in_registers if k <= IN_REGISTERS else _average_in_chunks
        launch(logits, rule, probabilities, classes)
    return probabilities, classes


def _strides(logits: Tensor) -> tuple[int, int, int]:
    """Of members and rows, and the power of two, at most 16 bytes of elements, that divides every row's offset."""
    stride_e, stride_n, _ = logits.stride()
    return stride_e, stride_n, math.gcd(stride_e, stride_n, logits.shape[2], 16 // logits.element_size())


def _average_in_registers(logits: Tensor, rule: str, probabilities: Tensor, classes: Tensor) -> None:
    """`average` in one launch: a grid of programs that process one row, or several short ones, of all members."""
    members, rows, k = logits.shape
    block_k = next_power_of_2(k)
    rows_per_program = max(1, 256 // block_k)  # 64 registers for 7 classes; twice as many rows take 118
    _average_kernel[(cdiv(rows, rows_per_program),)](
        logits,
        members,
        rows,
        *_strides(logits),
        probabilities,
        classes,
        1 / members,
        K=k,
        RULE=rule,
        ROWS=rows_per_program,
        BLOCK_K=block_k,
        num_warps=max(1, block_k // 512),  # up to 512 classes a row is one warp's, which reduces without barriers
        enable_fp_fusion=False,
    )


def _average_in_chunks(logits: Tensor, rule: str, probabilities: Tensor, classes: Tensor) -> None:
    """`average` of rows too long for one program: largest logits, sums and quotients, each in a launch of its own.

    Rule "logits" reads the logits once: their mean waits in `probabilities`, and the other two launches see it as an
    ensemble of one. Rule "probs" reads them three times; batches of rows that stay in the L2 cache would make two of
    these cheap, but cost three launches for every 16 MB or so, which take 5 to 8 us to read.
    """
    members, rows, k = logits.shape
    grid = (rows, cdiv(k, CHUNK))
    softmaxes = members if rule == "probs" else 1
    options = {"K": k, "CHUNK": CHUNK, "num_warps": CHUNK // 256, "enable_fp_fusion": False}

    partial = torch.empty(softmaxes, *grid, dtype=torch.float32, device=logits.device)
    _largest_kernel[grid](
        logits, members, rows, *_strides(logits), probabilities, partial, 1 / members, RULE=rule, **options
    )
    largest = partial.amax(-1)
    if rule == "logits":
        torch.argmax(probabilities, -1, out=classes)
        logits = probabilities[None]

    sums = torch.empty(softmaxes, *grid, dtype=torch.int64, device=logits.device)
    _total_kernel[grid + (softmaxes,)](logits, rows, *_strides(logits), largest, sums, **options)
    total = sums.sum(-1).float()
    _normalise_kernel[grid](
        logits, softmaxes, rows, *_strides(logits), largest, total, probabilities, 1 / softmaxes, **options
    )
    if rule == "probs":
        torch.argmax(probabilities, -1, out=classes)
