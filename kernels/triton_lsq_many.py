"""LSQ of all weights of a network in one launch on a GPU, and all their gradients in another: `lsq_many` of lsq.py.

A weight is cut into pieces of up to 64 elements of a row; tables on the device tell each program its tensor and its
first piece. The arithmetic is that of triton_lsq.py, with its bits. Tables are made again only where a weight or a
gradient has moved: results lie in one buffer, so they need no addresses.

The programs of a few rows form a group. In the backward pass each writes its partial sums and counts itself; the one
that finds all others of its group counted adds the partial sums up, in an order that the shapes alone decide. What
makes it see them, in the terms of PTX ISA 8.7 section 8: a barrier orders all stores of a program before its one
`atom.acq_rel.gpu`, which releases them and acquires those of the programs before it, and another barrier orders this
before the loads, which pass by the first-level cache (.cg).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdeploy.kernels.lsq import Constants, flat_views, one_launch
from qdeploy.kernels.triton_lsq import OPTIONS, bits_of_float64, codes, float64_of_bits, gradients, laid_out_as
from qdeploy.kernels.triton_math import cdiv

PIECE = tl.constexpr(64)  # elements of a row; every convolution of ResNet-50 but the first has rows of whole pieces

# The row of a tensor in `Tables.facts`, int64.
VALUE = tl.constexpr(0)  # address
STEP = tl.constexpr(1)  # address
ROWS = tl.constexpr(2)  # slices with a step size of their own
LENGTH = tl.constexpr(3)  # elements of a row
ALIGNED = tl.constexpr(4)  # do all rows begin on 16 bytes?
QMIN = tl.constexpr(5)
QMAX = tl.constexpr(6)
START = tl.constexpr(7)  # first element in the flat buffer of values
STEP_START = tl.constexpr(8)  # the same of step sizes
PARTIAL_START = tl.constexpr(9)  # the same of partial sums
GROUP_ROWS = tl.constexpr(10)  # rows whose programs form a group
GROUP_START = tl.constexpr(11)  # first group of the tensor among all
SCALE = tl.constexpr(12)  # bits of the float64 factor on the gradient of the step sizes
FACTS = tl.constexpr(13)


@triton.jit
def _group(facts, first):
    """The group of the program that begins with piece `first`: its number in the tensor, first row and end."""
    rows = tl.load(facts + GROUP_ROWS).to(tl.int32)
    number = first // (rows * tl.cdiv(tl.load(facts + LENGTH).to(tl.int32), PIECE))
    return number, number * rows, tl.minimum((number + 1) * rows, tl.load(facts + ROWS).to(tl.int32))


@triton.jit
def _pieces(facts, first, end_row, VEC: tl.constexpr, COUNT: tl.constexpr):
    """Offsets of COUNT pieces of a tensor from piece `first`, mask, values, step sizes and range."""
    length = tl.load(facts + LENGTH).to(tl.int32) // VEC * VEC  # shows the compiler that rows begin on 16 bytes
    per_row = tl.cdiv(length, PIECE)
    piece = first + tl.arange(0, COUNT)[:, None]
    row, col = piece // per_row, piece % per_row * PIECE + tl.arange(0, PIECE)[None, :]
    inside = row < end_row
    offs, mask = row * length + col, inside & (col < length)
    # A hint counts where it stands right on the cast: on the result of a function, loads have 4 bytes.
    value_ptr = tl.multiple_of(tl.load(facts + VALUE).to(tl.pointer_type(tl.float32)), 4 * VEC)
    step_ptr = tl.load(facts + STEP).to(tl.pointer_type(tl.float32))
    v = tl.load(value_ptr + offs, mask=mask, other=0.0)
    s = tl.load(step_ptr + row, mask=inside, other=1.0)
    qmin, qmax = tl.load(facts + QMIN).to(tl.float32), tl.load(facts + QMAX).to(tl.float32)
    return offs, mask, v, s, qmin, qmax


@triton.jit
def _forward_pieces(facts, first, out_ptr, counter_ptr, VEC: tl.constexpr, COUNT: tl.constexpr):
    number, _, end_row = _group(facts, first)
    tl.store(counter_ptr + tl.load(facts + GROUP_START) + number, 0)  # for the backward pass
    offs, mask, v, s, qmin, qmax = _pieces(facts, first, end_row, VEC, COUNT)
    _, r = codes(v, s, qmin, qmax)
    tl.store(tl.multiple_of(out_ptr + tl.load(facts + START), 4 * VEC) + offs, r * s, mask=mask)


@triton.jit
def _backward_pieces(
    facts,
    first,
    grad,
    grad_value_ptr,
    partial_ptr,
    counter_ptr,
    grad_step_ptr,
    VEC: tl.constexpr,
    COUNT: tl.constexpr,
):
    number, start_row, end_row = _group(facts, first)
    offs, mask, v, s, qmin, qmax = _pieces(facts, first, end_row, VEC, COUNT)
    grad_ptr = tl.multiple_of(grad.to(tl.pointer_type(tl.float32)), 4 * VEC)
    g = tl.load(grad_ptr + offs, mask=mask, other=0.0, eviction_policy="evict_first")
    grad_v, terms = gradients(v, s, g, qmin, qmax)
    tl.store(tl.multiple_of(grad_value_ptr + tl.load(facts + START), 4 * VEC) + offs, grad_v, mask=mask)

    sums = tl.sum(terms, 1)
    per_row = tl.cdiv(tl.load(facts + LENGTH).to(tl.int32), PIECE)
    programs = tl.cdiv((end_row - start_row) * per_row, COUNT)
    partial_ptr += tl.load(facts + PARTIAL_START)
    one_row = tl.load(facts + GROUP_ROWS) == 1
    if one_row:
        tl.store(partial_ptr + start_row * programs + (first - start_row * per_row) // COUNT, tl.sum(sums, 0))
    else:
        piece = first + tl.arange(0, COUNT)
        tl.store(partial_ptr + piece, sums, mask=piece < end_row * per_row)
    counter_ptr += tl.load(facts + GROUP_START) + number
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.store(counter_ptr, 0)  # for another backward pass
        if one_row:
            _sum_rows(facts, start_row, end_row, programs, partial_ptr, grad_step_ptr, 1, 512)
        else:
            _sum_rows(facts, start_row, end_row, per_row, partial_ptr, grad_step_ptr, COUNT, 512 // COUNT)


@triton.jit
def _sum_rows(
    facts, start_row, end_row, partials, partial_ptr, grad_step_ptr, COUNT: tl.constexpr, WIDTH: tl.constexpr
):
    """The gradients of the step sizes of up to COUNT rows, each from so many partial sums."""
    row = start_row + tl.arange(0, COUNT)
    mask = row < end_row
    total = tl.zeros((COUNT, WIDTH), tl.float64)
    for start in range(0, partials, WIDTH):
        col = start + tl.arange(0, WIDTH)[None, :]
        inside = mask[:, None] & (col < partials)
        total += tl.load(partial_ptr + row[:, None] * partials + col, inside, other=0.0, cache_modifier=".cg")
    grad = tl.sum(total, 1) * float64_of_bits(tl.load(facts + SCALE))
    tl.store(grad_step_ptr + tl.load(facts + STEP_START) + row, grad.to(tl.float32), mask=mask)


@triton.jit
def _forward_many(facts_ptr, blocks_ptr, out_ptr, counter_ptr):
    """This program quantizes 32 pieces of one tensor, or 16 where 16-byte loads are not possible."""
    block = blocks_ptr + 2 * tl.program_id(0)
    facts, first = facts_ptr + tl.load(block) * FACTS, tl.load(block + 1)
    if tl.load(facts + ALIGNED) != 0:
        _forward_pieces(facts, first, out_ptr, counter_ptr, 4, 32)
    else:
        _forward_pieces(facts, first, out_ptr, counter_ptr, 1, 16)


@triton.jit
def _backward_many(facts_ptr, blocks_ptr, grads_ptr, grad_value_ptr, partial_ptr, counter_ptr, grad_step_ptr):
    """This program takes 32 or 16 pieces of one tensor; it writes a partial sum for each, or one for a single row."""
    block = blocks_ptr + 2 * tl.program_id(0)
    tensor, first = tl.load(block), tl.load(block + 1)
    facts, grad = facts_ptr + tensor * FACTS, tl.load(grads_ptr + tensor)
    if tl.load(facts + ALIGNED) != 0:
        _backward_pieces(facts, first, grad, grad_value_ptr, partial_ptr, counter_ptr, grad_step_ptr, 4, 32)
    else:
        _backward_pieces(facts, first, grad, grad_value_ptr, partial_ptr, counter_ptr, grad_step_ptr, 1, 16)


def group_rows(rows: int, per_row: int, count: int) -> int:
    """The fewest rows, a power of two up to `count`, whose programs waste at most a tenth of their `count` pieces."""
    group = 1
    while group < min(count, rows) and 10 * count * cdiv(group * per_row, count) > 11 * group * per_row:
        group *= 2
    return group


class Layout:
    """What the kernels read about one list of tensors but for their addresses: rows of facts, and on the device by
    program a tensor and its first piece."""

    def __init__(self, values: Sequence[Tensor], steps: Sequence[Tensor], constants: Constants):
        facts, blocks = [], []
        self.steps = self.partials = self.groups = 0
        self.views, self.size = flat_views(values)
        for i, (value, step, *range_, scale, view) in enumerate(
            zip(values, steps, *constants, self.views, strict=True)
        ):
            rows, length = step.numel(), value.numel() // step.numel()
            aligned = length % 4 == 0 and value.data_ptr() % 16 == 0
            count, per_row = 32 if aligned else 16, cdiv(length, PIECE.value)
            group = group_rows(rows, per_row, count)
            facts.append(
                [0, 0, rows, length, aligned, *range_, view[2]]
                + [self.steps, self.partials, group, self.groups, bits_of_float64(scale)]
            )
            for start in range(0, rows, group):
                end = min(start + group, rows)
                blocks += [(i, piece) for piece in range(start * per_row, end * per_row, count)]
            self.steps += rows
            self.partials += rows * (per_row if group > 1 else cdiv(per_row, count))
            self.groups += cdiv(rows, group)
        self.device = values[0].device
        self.facts = torch.tensor(facts, dtype=torch.int64, device="cpu")
        self.blocks = _upload(blocks, torch.int32, self.device)


class Tables:
    """A layout, and on the device its facts with the addresses of these tensors."""

    def __init__(self, values: Sequence[Tensor], steps: Sequence[Tensor], constants: Constants):
        self.layout = layout_of(values, steps, constants)
        self._addresses = _addresses((*values, *steps))
        facts = self.layout.facts.clone()
        facts[:, [VALUE.value, STEP.value]] = torch.tensor(self._addresses, device="cpu").view(2, -1).T
        self.facts = _upload(facts, torch.int64, self.layout.device)
        self._constants = constants
        self._layouts = [(weakref.ref(value), value.shape, value.stride()) for value in values]

    def hold(self, values: Sequence[Tensor], steps: Sequence[Tensor], constants: Constants) -> bool:
        """Are these the tensors that the tables describe? 75 us for 53 weights."""
        layouts = zip(values, self._layouts, strict=True)
        return (
            self.point_to((*values, *steps))
            and constants == self._constants
            and all(
                [known() is t and t.shape == shape and t.stride() == stride for t, (known, shape, stride) in layouts]
            )
        )

    def point_to(self, tensors: Sequence[Tensor]) -> bool:
        """Is the memory of values and step sizes where it was?"""
        return _addresses(tensors) == self._addresses


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([tensor.data_ptr() for tensor in tensors])


T = TypeVar("T")
MAX_TABLES = 64  # 0.1 MB each for ResNet-50
_tables: dict[tuple, Any] = {}  # the ones used last, oldest first
_of_graphs: list[Any] = []  # what a captured CUDA graph reads whenever it runs; kept for ever


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _upload(rows: Sequence[Any] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table on the device, by a copy that the host does not wait for."""
    host = torch.as_tensor(rows, dtype=dtype, device="cpu")  # whatever the default device
    if device.type == "cpu":
        return host
    host = host.pin_memory()
    if _capturing():
        _of_graphs.append(host)
    return host.to(device, non_blocking=True)


def _cached(
    key: tuple,
    make: Callable[[], T],
    device: torch.device,
    good: Callable[[T], bool] = lambda table: True,
) -> T:
    """What `make` returns; made once for a key, and again where it is not `good` any more."""
    if device.type == "cuda":
        key = torch.cuda.current_stream(device).cuda_stream, *key  # the copy is done for this stream alone
    known: T | None = _tables.pop(key, None)
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


def layout_of(values: Sequence[Tensor], steps: Sequence[Tensor], constants: Constants) -> Layout:
    """The layout of such tensors; the same one again wherever they lie, as in a network of torch.compile, which copies
    its weights to other memory in every update: a new one takes 4 ms for 53 weights."""
    key = tuple([(v.shape, v.stride(), v.data_ptr() % 16 == 0, s.numel()) for v, s in zip(values, steps, strict=True)])
    device = values[0].device
    return _cached((device, constants, key), lambda: Layout(values, steps, constants), device)


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


def forward_many(tables: Tables) -> tuple[Tensor, Tensor]:
    """The flat buffer of `lsq_many`, and counters for its backward pass: 1-D grid of one program per block."""
    layout = tables.layout
    with _on(layout.device):
        flat = torch.empty(layout.size, device=layout.device)
        counters = torch.empty(layout.groups, dtype=torch.int32, device=layout.device)
        _forward_many[len(layout.blocks),](tables.facts, layout.blocks, flat, counters, **OPTIONS)
    return flat, counters


def backward_many(
    grads: Sequence[Tensor], values: Sequence[Tensor], tables: Tables, counters: Tensor
) -> tuple[Tensor, Tensor]:
    """Flat buffers of the gradients of values and of step sizes. `counters` are zeros, int32 [groups], and stay so."""
    layout, device = tables.layout, tables.layout.device
    with _on(device):
        if _capturing():
            _of_graphs.append(tables)
        grads = [laid_out_as(grad, value) for grad, value in zip(grads, values, strict=True)]
        addresses = _addresses(grads)
        if any([address % 16 for address in addresses]):
            grads = [grad if grad.data_ptr() % 16 == 0 else grad.clone() for grad in grads]
            addresses = _addresses(grads)
        grads_table = _cached(addresses, lambda: _upload(addresses, torch.int64, device), device)
        grad_values, grad_steps = torch.empty(layout.size, device=device), torch.empty(layout.steps, device=device)
        partials = torch.empty(layout.partials, dtype=torch.float64, device=device)
        arguments = tables.facts, layout.blocks, grads_table, grad_values, partials, counters, grad_steps
        _backward_many[len(layout.blocks),](*arguments, **OPTIONS)
    return grad_values, grad_steps


def _on(device: torch.device) -> torch.cuda.device:
    """Launches go to it; of a CPU, for the interpreter, to none."""
    return torch.cuda.device(device.index if device.type == "cuda" else -1)
