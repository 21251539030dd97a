"""LSQ on a GPU: the formulas of `lsq.py` with its bits, one read of every operand.

A dense tensor is a row-major matrix [M, N] of its memory, whatever the order of its dimensions. With `outer` elements
before the axis of the channels and `inner` after it,

    steps by row     M = outer * channels, N = inner             step of an element: row % channels
    steps by column  M = outer,            N = channels * inner  step of an element: col // inner

and one step for the whole tensor is one row. Forward moves 8 bytes per float32 element. Backward moves 12: it reads
value and gradient once, writes the gradient of the value, and one partial sum of dL/ds for each row or column of its
tile, which `_sum_partials` adds up. Shapes and types alone decide the order of every sum, so two runs give the same
bits. Terms are float32 and sums float64, so that other orders (of `lsq`, of `lsq_many`) agree in the float32 result;
in these kernels float64 takes no more registers than float32 (56 against 56 for one row, sm_80).

`lsq_many` takes all weights of a network in one launch: tables on the device tell each program its tensor (`Tables`).

Tiles have 2048 elements for 128 threads: four 16-byte loads per operand and thread. 4096 take 95 registers.
"""

from __future__ import annotations

import math
import struct
import weakref
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdeploy.kernels.lsq import Constants, flat_views, one_launch
from qdeploy.kernels.triton_math import clamp, round_half_even

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
PIECE = tl.constexpr(64)  # elements of a row; every convolution of ResNet-50 but the first has rows of whole pieces


@triton.jit
def _codes(v, s, qmin, qmax):
    """x = v / s and its integer code."""
    x = tl.div_rn(v, s)
    return x, round_half_even(clamp(x, qmin, qmax))


@triton.jit
def _gradients(v, s, g, qmin, qmax):
    """dL/dv, and the float64 terms of dL/ds."""
    x, r = _codes(v, s, qmin, qmax)
    inside = (x >= qmin) & (x <= qmax)
    term = tl.where(inside, r - x, r) * g.to(tl.float32)
    return tl.where(inside, g, 0.0).to(g.dtype), term.to(tl.float64)


@triton.jit
def _float64(bits):
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
    """Where this program's tile lies: its start (int64), offsets from there (int32) and mask; and its steps."""
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
    _, r = _codes(v.to(tl.float32), s, qmin, qmax)
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
    grad_v, terms = _gradients(v, s, g, qmin, qmax)
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
    total = tl.sum(tl.load(partial_ptr + offs, mask=mask, other=0.0), 1) * _float64(scale_bits)
    tl.store(out_ptr + c * chunks + chunk, total.to(out_ptr.dtype.element_ty), mask=c < channels)


def _bits(scale: float) -> int:
    return struct.unpack("q", struct.pack("d", scale))[0]


def _matrix(value: Tensor, axis: int) -> tuple[int, int, int]:
    """(outer, channels, inner) of a dense tensor in the order of its memory."""
    if axis == -1 or value.shape[axis] == 1:
        return 1, 1, value.numel()
    order = sorted(range(value.dim()), key=lambda i: -value.stride(i))
    sizes = [value.shape[i] for i in order]
    at = order.index(axis)
    return math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1 :])


def _geometry(value: Tensor, axis: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """The arguments M, N_vec, channels, inner, tiles_n of a launch and its constexprs."""
    outer, channels, inner = _matrix(value, axis)
    # Backward writes a partial sum for each row of a tile by row, each column of one by column: the longer axis wins.
    by_row = inner >= min(8 * outer, 1024)
    M, N = (outer * channels, inner) if by_row else (outer, channels * inner)
    vec = math.gcd(N, 16 // value.element_size())
    tile = 2048 if vec > 1 else 1024  # scalar loads hold an address per element: 118 registers for 2048, 48 for 1024
    # The widest tile that wastes up to a tenth of its lanes; by column it is tall, for the sake of few partial sums.
    # Tiles of several rows span less than 2^31 elements, because offsets inside a tile are int32.
    block_n = 64 if not by_row and N < 2**25 else tile
    while block_n > min(32, triton.next_power_of_2(N)) and 10 * block_n * triton.cdiv(N, block_n) > 11 * N:
        block_n //= 2
    block_m = min(tile // block_n, triton.next_power_of_2(M))
    constexprs = {"BY_ROW": by_row, "VEC": vec, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return (M, N // vec, channels, inner, triton.cdiv(N, block_n)), constexprs


def _laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
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
    value = _laid_out_as(value, out)
    sizes, constexprs = _geometry(value, axis)
    grid = (sizes[-1] * triton.cdiv(sizes[0], constexprs["BLOCK_M"]),)
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
    value, grad = _laid_out_as(value, grad_value), _laid_out_as(grad, grad_value)
    sizes, constexprs = _geometry(value, axis)
    M, _, channels, inner, tiles_n = sizes
    tiles_m = triton.cdiv(M, constexprs["BLOCK_M"])
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
    block_c = 1 if B >= 4 else min(4, triton.next_power_of_2(channels))
    block_r = min(4096 // block_c, triton.next_power_of_2(A * B))
    chunks = triton.cdiv(A * B, block_r)
    last = chunks == 1
    out = torch.empty(channels * chunks, dtype=torch.float32 if last else torch.float64, device=partial.device)
    grid = (triton.cdiv(channels, block_c) * chunks,)
    bits = _bits(scale if last else 1.0)
    _sum_partials[grid](partial, out, channels, A, B, chunks, bits, block_c, block_r, **OPTIONS | {"num_warps": 8})
    return out if last else _sum(out, 1, channels, chunks, scale)


def _steps(step: Tensor, value: Tensor) -> Tensor:
    return step.to(value.device, torch.float32).contiguous()


# The row of a tensor in `Tables.facts`, int64.
VALUE = tl.constexpr(0)  # address
STEP = tl.constexpr(1)  # address
ROWS = tl.constexpr(2)  # slices with a step of their own
LENGTH = tl.constexpr(3)  # elements of a row
ALIGNED = tl.constexpr(4)  # do all rows begin on 16 bytes?
QMIN = tl.constexpr(5)
QMAX = tl.constexpr(6)
START = tl.constexpr(7)  # first element in the flat buffer of values
STEP_START = tl.constexpr(8)  # the same of steps
PARTIAL_START = tl.constexpr(9)  # the same of partial sums
PARTIALS = tl.constexpr(10)  # partial sums of a row
SCALE = tl.constexpr(11)  # bits of the float64 factor on the gradient of the steps
FACTS = tl.constexpr(12)


@triton.jit
def _pieces(facts, first, VEC: tl.constexpr, COUNT: tl.constexpr):
    """Offsets of COUNT pieces of a tensor from piece `first`, mask, values, steps and range."""
    length = tl.load(facts + LENGTH).to(tl.int32) // VEC * VEC  # shows the compiler that rows begin on 16 bytes
    per_row = tl.cdiv(length, PIECE)
    piece = first + tl.arange(0, COUNT)[:, None]
    row, col = piece // per_row, piece % per_row * PIECE + tl.arange(0, PIECE)[None, :]
    inside = row < tl.load(facts + ROWS).to(tl.int32)
    offs, mask = row * length + col, inside & (col < length)
    # A hint counts where it stands right on the cast: on the result of a function, loads have 4 bytes.
    value_ptr = tl.multiple_of(tl.load(facts + VALUE).to(tl.pointer_type(tl.float32)), 4 * VEC)
    step_ptr = tl.load(facts + STEP).to(tl.pointer_type(tl.float32))
    v = tl.load(value_ptr + offs, mask=mask, other=0.0)
    s = tl.load(step_ptr + row, mask=inside, other=1.0)
    qmin, qmax = tl.load(facts + QMIN).to(tl.float32), tl.load(facts + QMAX).to(tl.float32)
    return offs, mask, v, s, qmin, qmax


@triton.jit
def _forward_pieces(facts, first, out_ptr, VEC: tl.constexpr, COUNT: tl.constexpr):
    offs, mask, v, s, qmin, qmax = _pieces(facts, first, VEC, COUNT)
    _, r = _codes(v, s, qmin, qmax)
    tl.store(tl.multiple_of(out_ptr + tl.load(facts + START), 4 * VEC) + offs, r * s, mask=mask)


@triton.jit
def _backward_pieces(facts, first, grad, grad_value_ptr, partial_ptr, VEC: tl.constexpr, COUNT: tl.constexpr):
    offs, mask, v, s, qmin, qmax = _pieces(facts, first, VEC, COUNT)
    grad_ptr = tl.multiple_of(grad.to(tl.pointer_type(tl.float32)), 4 * VEC)
    g = tl.load(grad_ptr + offs, mask=mask, other=0.0, eviction_policy="evict_first")
    grad_v, terms = _gradients(v, s, g, qmin, qmax)
    tl.store(tl.multiple_of(grad_value_ptr + tl.load(facts + START), 4 * VEC) + offs, grad_v, mask=mask)
    partial_ptr += tl.load(facts + PARTIAL_START)
    sums = tl.sum(terms, 1)
    if tl.load(facts + ROWS) == 1:
        tl.store(partial_ptr + first // COUNT, tl.sum(sums, 0))
    else:
        piece = first + tl.arange(0, COUNT)
        tl.store(partial_ptr + piece, sums, mask=piece < tl.load(facts + ROWS) * tl.load(facts + PARTIALS))


@triton.jit
def _forward_many(facts_ptr, blocks_ptr, out_ptr):
    """This program quantizes 32 pieces of one tensor, or 16 where 16-byte loads are not possible."""
    block = blocks_ptr + 2 * tl.program_id(0)
    facts, first = facts_ptr + tl.load(block) * FACTS, tl.load(block + 1)
    if tl.load(facts + ALIGNED) != 0:
        _forward_pieces(facts, first, out_ptr, 4, 32)
    else:
        _forward_pieces(facts, first, out_ptr, 1, 16)


@triton.jit
def _backward_many(facts_ptr, blocks_ptr, grads_ptr, grad_value_ptr, partial_ptr):
    """This program takes 32 or 16 pieces of one tensor; it writes a partial sum for each, or one for a single step."""
    block = blocks_ptr + 2 * tl.program_id(0)
    tensor, first = tl.load(block), tl.load(block + 1)
    facts, grad = facts_ptr + tensor * FACTS, tl.load(grads_ptr + tensor)
    if tl.load(facts + ALIGNED) != 0:
        _backward_pieces(facts, first, grad, grad_value_ptr, partial_ptr, 4, 32)
    else:
        _backward_pieces(facts, first, grad, grad_value_ptr, partial_ptr, 1, 16)


@triton.jit
def _sum_rows(facts, first, partial_ptr, grad_step_ptr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    row = first + tl.arange(0, COUNT)
    mask = row < tl.load(facts + ROWS)
    partials = tl.load(facts + PARTIALS).to(tl.int32)
    total = tl.zeros((COUNT, WIDTH), tl.float64)
    for start in range(0, partials, WIDTH):
        col = start + tl.arange(0, WIDTH)[None, :]
        offs = tl.load(facts + PARTIAL_START) + row[:, None] * partials + col
        total += tl.load(partial_ptr + offs, mask=mask[:, None] & (col < partials), other=0.0)
    grad = tl.sum(total, 1) * _float64(tl.load(facts + SCALE))
    tl.store(grad_step_ptr + tl.load(facts + STEP_START) + row, grad.to(tl.float32), mask=mask)


@triton.jit
def _sum_partials_many(facts_ptr, blocks_ptr, partial_ptr, grad_step_ptr):
    """This program sums the partials of the one step, or of 16 of the steps, of one tensor."""
    block = blocks_ptr + 2 * tl.program_id(0)
    facts, first = facts_ptr + tl.load(block) * FACTS, tl.load(block + 1)
    if tl.load(facts + ROWS) == 1:
        _sum_rows(facts, first, partial_ptr, grad_step_ptr, 1, 1024)
    else:
        _sum_rows(facts, first, partial_ptr, grad_step_ptr, 16, 64)


class Tables:
    """What the kernels read about one list of tensors: rows of facts, and by program a tensor and its first piece."""

    def __init__(self, values: Sequence[Tensor], steps: Sequence[Tensor], constants: Constants):
        facts, blocks, row_blocks = [], [], []
        self.steps = self.partials = 0
        self.views, self.size = flat_views(values)
        for i, (value, step, *range_, scale, view) in enumerate(
            zip(values, steps, *constants, self.views, strict=True)
        ):
            rows, length = step.numel(), value.numel() // step.numel()
            aligned = length % 4 == 0 and value.data_ptr() % 16 == 0
            count, pieces = 32 if aligned else 16, rows * triton.cdiv(length, PIECE.value)
            partials = pieces // rows if rows > 1 else triton.cdiv(pieces, count)
            facts.append(
                [value.data_ptr(), step.data_ptr(), rows, length, aligned, *range_, view[2]]
                + [self.steps, self.partials, partials, _bits(scale)]
            )
            blocks += [(i, piece) for piece in range(0, pieces, count)]
            row_blocks += [(i, row) for row in range(0, rows, 16)]
            self.steps += rows
            self.partials += rows * partials
        self.device = values[0].device
        self.facts = _upload(facts, torch.int64, self.device)
        self.blocks = _upload(blocks, torch.int32, self.device)
        self.row_blocks = _upload(row_blocks, torch.int32, self.device)
        self._constants = constants
        self._layouts = [(weakref.ref(value), value.shape, value.stride()) for value in values]
        self._addresses = _addresses((*values, *steps))

    def hold(self, values: Sequence[Tensor], steps: Sequence[Tensor], constants: Constants) -> bool:
        """Are these the tensors that the tables describe? 40 us for 53 weights; new tables take 6 ms."""
        layouts = zip(values, self._layouts, strict=True)
        return (
            self.point_to((*values, *steps))
            and constants == self._constants
            and all(
                [known() is t and t.shape == shape and t.stride() == stride for t, (known, shape, stride) in layouts]
            )
        )

    def point_to(self, tensors: Sequence[Tensor]) -> bool:
        """Is the memory of values and steps where it was?"""
        return _addresses(tensors) == self._addresses


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([tensor.data_ptr() for tensor in tensors])


MAX_TABLES = 64  # 0.1 MB each for ResNet-50
_tables: dict[tuple, Tables | Tensor] = {}  # the ones used last, oldest first
_of_graphs: list[Tables | Tensor] = []  # what a captured CUDA graph reads whenever it runs; kept for ever


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _upload(rows: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table on the device, by a copy that the host does not wait for."""
    host = torch.tensor(rows, dtype=dtype, device="cpu")  # whatever the default device
    if device.type == "cpu":
        return host
    host = host.pin_memory()
    if _capturing():
        _of_graphs.append(host)
    return host.to(device, non_blocking=True)


def _cached(
    key: tuple,
    make: Callable[[], Tables | Tensor | None],
    device: torch.device,
    good: Callable[[Tables | Tensor], bool] = lambda table: True,
) -> Tables | Tensor | None:
    """What `make` returns; made once for a key, and again where it is not `good` any more."""
    if device.type == "cuda":
        key = torch.cuda.current_stream(device).cuda_stream, *key  # the copy is done for this stream alone
    known = _tables.pop(key, None)
    if known is not None and not good(known):
        known = None
    table = make() if known is None else known
    if _capturing():
        _of_graphs.append(table)
    if known is not None or not _capturing():  # a table made in a capture is empty until the graph runs
        _tables[key] = table
        if len(_tables) > MAX_TABLES:
            _tables.pop(next(iter(_tables)), None)  # another thread may have been here
    return table


def tables_of(values: Sequence[Tensor], steps: Sequence[Tensor], constants: Constants) -> Tables | None:
    """Tables for these tensors; the same ones again as long as neither the tensors nor their memory change.

    None where the tensors do not fit one launch, which is asked before new tables are made: it takes 80 us to tell.
    """
    return _cached(
        tuple(map(id, (*values, *steps))),
        lambda: Tables(values, steps, constants) if one_launch(values, steps) else None,
        values[0].device,
        lambda tables: tables is not None and tables.hold(values, steps, constants),
    )


def forward_many(tables: Tables) -> Tensor:
    """The flat buffer of `lsq_many`: 1-D grid of one program per 32 or 16 pieces."""
    with torch.cuda.device(tables.device.index if tables.device.type == "cuda" else -1):
        flat = torch.empty(tables.size, device=tables.device)
        _forward_many[len(tables.blocks),](tables.facts, tables.blocks, flat, **OPTIONS)
    return flat


def backward_many(grads: Sequence[Tensor], values: Sequence[Tensor], tables: Tables) -> tuple[Tensor, Tensor]:
    """The flat buffers of the gradients of values and of steps: one pass, then the sums of the partials."""
    device = tables.device
    with torch.cuda.device(device.index if device.type == "cuda" else -1):
        if _capturing():
            _of_graphs.append(tables)
        grads = [_laid_out_as(grad, value) for grad, value in zip(grads, values, strict=True)]
        addresses = _addresses(grads)
        if any([address % 16 for address in addresses]):
            grads = [grad if grad.data_ptr() % 16 == 0 else grad.clone() for grad in grads]
            addresses = _addresses(grads)
        grads_table = _cached(addresses, lambda: _upload(addresses, torch.int64, device), device)
        grad_values, grad_steps = torch.empty(tables.size, device=device), torch.empty(tables.steps, device=device)
        partials = torch.empty(tables.partials, dtype=torch.float64, device=device)
        _backward_many[len(tables.blocks),](tables.facts, tables.blocks, grads_table, grad_values, partials, **OPTIONS)
        _sum_partials_many[len(tables.row_blocks),](tables.facts, tables.row_blocks, partials, grad_steps, **OPTIONS)
    return grad_values, grad_steps
