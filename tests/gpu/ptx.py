"""An NVIDIA GPU in numpy: runs the PTX of a kernel on a CPU, all threads of a launch side by side.

It shows what no interpreter of the source can: which instructions the compiler chose (a division of 2 ulp, a contracted
multiplication and addition), what it concluded from hints (an address that is not on 16 bytes is an error here, as on
a GPU), and in which order warps may run. Every access outside of the memory that it was given is an error. The rest of
the way, from PTX to the instructions of one chip, keeps the meaning of every instruction, which the PTX ISA defines.

It knows what Triton emits for the kernels of this project; another instruction is an error. What it cannot show:
speed, and effects of weakly ordered memory, because its memory is sequentially consistent. Asynchronous copies arrive
when they are waited for.
"""

from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from qdeploy.reference import fma32

WARP = 32


class PtxError(Exception):
    """What would be an error on a GPU, or what this emulator does not know."""


class Address(NamedTuple):
    base: Operand
    offset: int


class Instruction(NamedTuple):
    text: str
    guard: str | None  # a predicate, "!" before it where it is negated
    parts: tuple[str, ...]  # of the opcode
    operands: tuple[Operand, ...]


class Kernel(NamedTuple):
    """A parsed entry; a label is a place in `code`."""

    code: tuple[Instruction, ...]
    labels: dict[str, int]
    widths: dict[str, int]  # bytes of the registers by their prefix; 0 for predicates


Operand = str | int | list | Address


# ---- Text ------------------------------------------------------------------------------------------------------------


@cache
def parse(text: str) -> Kernel:
    """The one entry in the text of a module."""
    body = text[text.index("\n{") : text.index("\n}")]
    code, labels, widths = [], {}, {}
    for line in re.sub(r"//.*", "", body).splitlines():
        for statement in line.strip(" \t{").rstrip("}").split(";"):
            statement = statement.strip()
            if label := re.match(r"(\$\w+):", statement):
                labels[label[1]] = len(code)
            elif register := re.match(r"\.reg \.(pred|b\d+)\s+%(\w+)<", statement):
                widths[register[2]] = 0 if register[1] == "pred" else int(register[1][1:]) // 8
            elif statement and statement[0] != "." and not statement.startswith("$"):
                code.append(_instruction(statement))
    return Kernel(tuple(code), labels, widths)


def _instruction(text: str) -> Instruction:
    guard, opcode, rest = re.fullmatch(r"(?:@(\S+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL).groups()
    operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^\s,{}\[\]]+", rest)
    return Instruction(text, guard, tuple(opcode.split(".")), tuple(map(_operand, operands)))


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return [_operand(part.strip()) for part in text[1:-1].split(",")]
    if text[0] == "[":
        base, _, offset = text[1:-1].partition("+")
        return Address(_operand(base.strip()), int(offset or 0))
    if number := re.fullmatch(r"0[fd]([0-9A-F]+)|(-?)0x([0-9a-fA-F]+)U?|(-?\d+)", text):
        bits, sign, hexadecimal, decimal = number.groups()
        return int(bits, 16) if bits else int(decimal) if decimal else int(sign + hexadecimal, 16)
    return text


# ---- Memory ----------------------------------------------------------------------------------------------------------


class Memory:
    """Memory of this process, of which `intervals` (start, end) may be used."""

    def __init__(self, intervals: Sequence[tuple[int, int]]):
        merged: list[tuple[int, int]] = []
        for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
            if merged and start < merged[-1][1]:
                start, end = merged[-1][0], max(end, merged.pop()[1])
            merged.append((start, end))
        self._starts, self._ends = np.array(merged, np.int64).reshape(-1, 2).T
        self._base = int(self._starts[0]) // 16 * 16
        size = (int(self._ends[-1]) - self._base + 15) // 16 * 16
        self.bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(self._base), np.uint8)

    def at(self, address: np.ndarray, width: int, block: np.ndarray) -> np.ndarray:
        """Indices into `bytes` of accesses of `width` bytes."""
        address = address.astype(np.int64)
        near = np.maximum(np.searchsorted(self._starts, address, "right") - 1, 0)
        if ((address < self._starts[near]) | (address + width > self._ends[near])).any():
            raise PtxError("access outside of all tensors")
        return address - self._base


class Shared:
    """Shared memory: `size` bytes for each of `blocks` blocks."""

    def __init__(self, blocks: int, size: int):
        self._size, self._stride = size, (size + 15) // 16 * 16
        self.bytes = np.full(blocks * self._stride, 0xA5, np.uint8)  # whatever was there

    def at(self, address: np.ndarray, width: int, block: np.ndarray) -> np.ndarray:
        address = address.astype(np.int64)
        if ((address < 0) | (address + width > self._size)).any():
            raise PtxError(f"access outside of {self._size} bytes of shared memory")
        return address + block * self._stride


# ---- Launch ----------------------------------------------------------------------------------------------------------


def launch(
    text: str,
    arguments: Sequence[int | float],
    grid: Sequence[int],
    warps: int,
    shared: int,
    memory: Memory,
    seed: int | None = None,
) -> None:
    """Runs a kernel to its end.

    Args:
        text: PTX of a module with one entry.
        arguments: of the entry: integers, addresses and floats, as the parameters want them.
        grid: blocks, up to 3 dimensions.
        warps, shared: warps and bytes of shared memory of a block.
        memory: global memory.
        seed: None runs all threads in step; a number runs warp by warp, in an order drawn from it, some blocks far
            ahead of others.

    Raises:
        PtxError: with the instruction; see the module.
    """
    run = _Launch(parse(text), arguments, (*grid, 1, 1)[:3], warps, shared, memory)
    with np.errstate(all="ignore"):
        run.to_the_end(random.Random(seed) if seed is not None else None)


class _Launch:
    """Threads are numbered by block, then by their place in it; `now` are those that execute an instruction."""

    def __init__(self, kernel: Kernel, arguments, grid, warps: int, shared: int, memory: Memory):
        self.kernel, self.arguments = kernel, arguments
        blocks, per_block = int(np.prod(grid)), warps * WARP
        self.threads = np.arange(blocks * per_block)
        self.block = self.threads // per_block
        self.spaces = {"global": memory, "shared": Shared(blocks, shared)}
        self.spaces["shared::cta"] = self.spaces["shared"]
        x, y, z = grid
        special = {
            "%tid.x": self.threads % per_block,
            "%laneid": self.threads % WARP,
            "%ctaid.x": self.block % x,
            "%ctaid.y": self.block // x % y,
            "%ctaid.z": self.block // x // y,
            "%nctaid.x": np.full_like(self.threads, x),
            "%nctaid.y": np.full_like(self.threads, y),
            "%nctaid.z": np.full_like(self.threads, z),
            "global_smem": np.zeros_like(self.threads),  # the start of a block's shared memory
        }
        self.registers = {name: value.astype(np.uint32) for name, value in special.items()}
        self.now: slice | np.ndarray = slice(None)
        self.copies: list[list[tuple]] = []  # asynchronous copies under way, by group

    # ---- Order -------------------------------------------------------------------------------------------------------

    def to_the_end(self, order: random.Random | None) -> None:
        """Teams wait for each other at barriers: all threads are one; with an `order`, the warps of a block are."""
        if order is None:
            self._run_team([_Strand(self, self.threads)], random.Random(0), None)
            return
        per_block = np.count_nonzero(self.block == 0)
        teams = [
            [_Strand(self, warp) for warp in block.reshape(-1, WARP)] for block in self.threads.reshape(-1, per_block)
        ]
        eager = {id(team): order.random() ** 8 for team in teams}
        while teams:
            team = order.choices(teams, [eager[id(team)] + 1e-9 for team in teams])[0]
            if not self._run_team(team, order, 3):
                teams.remove(team)

    def _run_team(self, team: list[_Strand], order: random.Random, steps: int | None) -> bool:
        """Up to `steps` basic blocks of random strands of a team; false at its end."""
        while steps is None or steps > 0:
            runnable = [strand for strand in team if strand.at]
            if not runnable:
                if not any([strand.waiting for strand in team]):
                    return False
                for strand in team:  # the barrier opens
                    strand.at, strand.waiting = strand.waiting, {}
                continue
            order.choice(runnable).step()
            steps = steps and steps - 1
        return True

    # ---- Operands ----------------------------------------------------------------------------------------------------

    def read(self, operand: Operand, kind: str) -> np.ndarray:
        """The operand of the threads `now`, as numbers of a PTX type."""
        if isinstance(operand, int):
            bits = np.array(operand & (2**64 - 1), np.uint64)
        elif operand[0] == "!":
            return ~self.read(operand[1:], kind)
        elif operand not in self.registers:  # something: the compiler knows that it does not matter
            bits = np.array(0x5A5A5A5A5A5A5A5A, np.uint64)
        else:
            bits = self.registers[operand][self.now]
        return from_bits(bits, kind)

    def write(self, register: str, value: np.ndarray, kind: str) -> None:
        if register == "_":
            return
        bits = to_bits(np.asarray(value), kind)
        width = self.kernel.widths[re.match(r"%([a-z]+)", register)[1]]
        bits = bits.astype(bool) if width == 0 else bits.astype(f"u{width}")  # a copy, which extends signed numbers
        if isinstance(self.now, slice):
            self.registers[register] = np.broadcast_to(bits, self.threads.shape).copy() if bits.ndim == 0 else bits
        else:
            self.registers.setdefault(register, np.zeros(len(self.threads), bits.dtype))[self.now] = bits

    def address(self, space: str, operand: Address, width: int) -> np.ndarray:
        """Indices of an access of the threads `now` into the bytes of a space."""
        base = self.read(operand.base, "u64" if space == "global" else "u32").astype(np.int64) + operand.offset
        base = np.broadcast_to(base, self.threads[self.now].shape)
        if (base % width).any():
            raise PtxError(f"address that is not a multiple of {width}")
        return self.spaces[space].at(base, width, self.block[self.now])

    def load(self, space: str, index: np.ndarray, kind: str) -> np.ndarray:
        dtype = unsigned(kind)
        return from_bits(self.spaces[space].bytes.view(dtype)[index // dtype.itemsize], kind)

    def store(self, space: str, index: np.ndarray, value: np.ndarray, kind: str) -> None:
        dtype = unsigned(kind)
        self.spaces[space].bytes.view(dtype)[index // dtype.itemsize] = to_bits(value, kind).astype(dtype)

    def whole_warps(self) -> np.ndarray:
        """The threads `now` as warps [W, 32]: what a .sync instruction needs."""
        threads = self.threads[self.now]
        if len(threads) % WARP or (threads.reshape(-1, WARP) % WARP != np.arange(WARP)).any():
            raise PtxError("part of a warp")
        return threads.reshape(-1, WARP)


class _Strand:
    """Threads that execute together where they can: at the lowest of the places where they are."""

    def __init__(self, run: _Launch, threads: np.ndarray):
        self._run = run
        self.at: dict[int, np.ndarray] = {0: threads}
        self.waiting: dict[int, np.ndarray] = {}
        self.copies: list[list[tuple]] = [[]]

    def _go(self, places: dict[int, np.ndarray], place: int, threads: np.ndarray) -> None:
        if len(threads):
            here = places.get(place)
            places[place] = threads if here is None else np.sort(np.concatenate([here, threads]))

    def step(self) -> None:
        """From the lowest place to the next branch, barrier or place where other threads are."""
        run, code = self._run, self._run.kernel.code
        place = min(self.at)
        threads = self.at.pop(place)
        run.copies = self.copies
        run.now = everyone = slice(None) if len(threads) == len(run.threads) else threads
        while True:
            if place in self.at:
                return self._go(self.at, place, threads)
            instruction = code[place]
            name, place = instruction.parts[0], place + 1
            chosen = None
            if instruction.guard:
                chosen = np.broadcast_to(run.read(instruction.guard, "pred"), threads.shape)
            if name == "bra":
                target = run.kernel.labels[instruction.operands[0]]
                if chosen is None:
                    return self._go(self.at, target, threads)
                self._go(self.at, place, threads[~chosen])
                return self._go(self.at, target, threads[chosen])
            if name == "ret":
                return self._go(self.at, place, threads[:0] if chosen is None else threads[~chosen])
            if instruction.parts[:2] == ("bar", "sync"):
                return self._go(self.waiting, place, threads)
            if chosen is not None and not chosen.all():
                run.now = threads[chosen]
            if chosen is None or chosen.any():
                execute(run, instruction)
            run.now = everyone


def execute(run: _Launch, instruction: Instruction) -> None:
    name = instruction.parts[0]
    try:
        if name in NO_EFFECT or ".".join(instruction.parts[:2]) in NO_EFFECT:
            return
        (OTHER.get(name) or _arithmetic)(run, instruction)
    except (PtxError, KeyError, ValueError, TypeError, IndexError) as error:
        reason = error if isinstance(error, PtxError) else f"unknown here: {error!r}"
        raise PtxError(f"{reason} - at {instruction.text}") from error


NO_EFFECT = {"createpolicy", "fence", "membar", "bar.warp", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"}


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@cache
def dtype_of(kind: str) -> np.dtype:
    """Of a PTX type, but for bf16."""
    return np.dtype(bool if kind == "pred" else f"{kind[0].translate(str.maketrans('bs', 'ui'))}{int(kind[1:]) // 8}")


@cache
def unsigned(kind: str) -> np.dtype:
    return np.dtype(f"u{int(re.search('[0-9]+', kind)[0]) // 8}")


def halves(bits: np.ndarray, kind: str) -> list[np.ndarray]:
    """The lower and the upper number of a pair, f16x2 or bf16x2."""
    return [from_bits(bits >> np.uint32(shift) & np.uint32(0xFFFF), kind.removesuffix("x2")) for shift in (0, 16)]


def from_bits(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "pred":
        return bits.astype(bool)
    bits = bits.astype(unsigned(kind), copy=False)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(dtype_of(kind))


def to_bits(value: np.ndarray, kind: str) -> np.ndarray:
    """The bits; of a signed number the number itself, for a register of more bits."""
    if kind == "pred" or kind[0] in "su":
        return value.astype(dtype_of(kind), copy=False)
    if kind == "bf16":
        rounded = torch.from_numpy(np.ascontiguousarray(value)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return np.ascontiguousarray(value.astype(dtype_of(kind), copy=False)).reshape(value.shape).view(unsigned(kind))


def wide(kind: str) -> str:
    return kind[0] + str(2 * int(kind[1:]))


def _extreme(number: Callable, bits: Callable) -> Callable:
    """min or max: of a NaN and a number the number, and -0 is below 0."""

    def of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if a.dtype.kind != "f":
            return number(a, b)
        kind = f"u{a.dtype.itemsize}"
        return np.where(a == b, bits(a.view(kind), b.view(kind)).view(a.dtype), number(a, b))

    return of


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; of a division by 0 all bits are ones."""
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    floor = a // safe
    inexact = (floor * safe != a) & ((a < 0) != (safe < 0))
    return np.where(b == 0, np.array(-1).astype(a.dtype), floor + inexact.astype(a.dtype))


def _shift(a: np.ndarray, by: np.ndarray, shift: Callable) -> np.ndarray:
    """By the width of the number or more, all bits go out."""
    last = 8 * a.dtype.itemsize - 1
    near = shift(a, np.minimum(by, last).astype(a.dtype))
    far = near if shift is np.right_shift and a.dtype.kind == "i" else np.zeros_like(near)
    return np.where(by > last, far, near)


def _field(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe of a field that lies within the number."""
    last = 8 * a.dtype.itemsize
    if ((start + length > last) | (length == 0)).any():
        raise PtxError("a field that is not in the number")
    return a << (last - start - length).astype(a.dtype) >> (last - length).astype(a.dtype)


def _inserted(a: np.ndarray, b: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfi: the lowest bits of a in the place of those of b."""
    mask = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << start.astype(np.uint64)
    return ((a.astype(np.uint64) << start.astype(np.uint64) & mask) | (b.astype(np.uint64) & ~mask)).astype(a.dtype)


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: any four of the eight bytes of b and a, or eight times the sign of one."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(a.shape, np.uint32)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> (8 * (pick & 7)).astype(np.uint64)).astype(np.uint8)
        byte = np.where(pick >= 8, (byte.view(np.int8) >> 7).view(np.uint8), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def _bits_set(a: np.ndarray) -> np.ndarray:
    """popc"""
    return np.unpackbits(np.ascontiguousarray(a)[..., None].view(np.uint8), axis=-1).sum(-1, dtype=np.uint32)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    if a.dtype != np.float32:
        raise PtxError("fma of another type than f32")
    return fma32(a, b, c)


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    more = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return (a.astype(more) * b.astype(more) >> more.type(bits)).astype(a.dtype)


COMPARE = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "neu": np.not_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}

# By the opcode without its types: the function, the types of the sources (t: the one of the instruction, w: of twice
# its width), and that of the result.
ARITHMETIC = {
    "add": (np.add, "tt", "t"),
    "sub": (np.subtract, "tt", "t"),
    "mul": (np.multiply, "tt", "t"),
    "mul.lo": (np.multiply, "tt", "t"),
    "mul.hi": (_high, "tt", "t"),
    "mul.wide": (lambda a, b: a.astype(np.int64) * b.astype(np.int64), "tt", "w"),
    "mad.lo": (lambda a, b, c: a * b + c, "ttt", "t"),
    "mad.wide": (lambda a, b, c: (a.astype(np.int64) * b.astype(np.int64)).astype(c.dtype) + c, "ttw", "w"),
    "fma": (_fma, "ttt", "t"),
    "div": (_quotient, "tt", "t"),
    "rem": (lambda a, b: a - _quotient(a, b) * b, "tt", "t"),
    "min": (_extreme(np.fmin, np.bitwise_or), "tt", "t"),
    "max": (_extreme(np.fmax, np.bitwise_and), "tt", "t"),
    "min.NaN": (_extreme(np.minimum, np.bitwise_or), "tt", "t"),
    "max.NaN": (_extreme(np.maximum, np.bitwise_and), "tt", "t"),
    "abs": (np.abs, "t", "t"),
    "sqrt": (np.sqrt, "t", "t"),
    "neg": (np.negative, "t", "t"),
    "not": (np.invert, "t", "t"),
    "popc": (_bits_set, "t", "u32"),
    "and": (np.bitwise_and, "tt", "t"),
    "or": (np.bitwise_or, "tt", "t"),
    "xor": (np.bitwise_xor, "tt", "t"),
    "shl": (lambda a, by: _shift(a, by, np.left_shift), ("t", "u32"), "t"),
    "shr": (lambda a, by: _shift(a, by, np.right_shift), ("t", "u32"), "t"),
    "bfe": (_field, ("t", "u32", "u32"), "t"),
    "bfi": (_inserted, ("t", "t", "u32", "u32"), "t"),
    "prmt": (_permuted, "ttt", "t"),
    "selp": (lambda a, b, p: np.where(p, a, b), ("t", "t", "pred"), "t"),
}


def _setp(run: _Launch, instruction: Instruction) -> None:
    _, comparison, kind = instruction.parts
    targets, *operands = instruction.operands
    if kind.endswith("x2"):
        pairs = zip(*[halves(run.read(operand, "b32"), kind) for operand in operands], strict=True)
    else:
        pairs = [[run.read(operand, kind) for operand in operands]]
    for target, (a, b) in zip(targets.split("|"), pairs, strict=True):
        run.write(target, COMPARE[comparison](a, b), "pred")


def _arithmetic(run: _Launch, instruction: Instruction) -> None:
    name, *rounding, kind = instruction.parts
    if rounding and rounding[0] in ("lo", "hi", "wide", "NaN"):
        name = f"{name}.{rounding.pop(0)}"
    # Without .rn the assembler may contract a multiplication and an addition; .approx, .full, .ftz: inexact.
    exact = name in ("add", "sub", "mul", "fma", "div", "sqrt") and "f" in kind
    if rounding != ["rn"] * exact:
        raise PtxError("expected the rounding .rn" if exact else "unknown here")
    if kind in ("s16x2", "u16x2"):
        return _pairwise(run, instruction, ARITHMETIC[name][0], kind)
    function, sources, result = ARITHMETIC[name]
    *sources, result = [kind if k == "t" else wide(kind) if k == "w" else k for k in (*sources, result)]
    first, *operands = instruction.operands
    values = [run.read(operand, k) for operand, k in zip(operands, sources, strict=True)]
    run.write(first, function(*values), result)


def _pairwise(run: _Launch, instruction: Instruction, function: Callable, kind: str) -> None:
    """Of the lower and of the upper half of 32 bits."""
    target, *operands = instruction.operands
    pairs = zip(*[halves(run.read(operand, "b32"), kind) for operand in operands], strict=True)
    low, high = (function(*pair).astype(np.uint16).astype(np.uint32) for pair in pairs)
    run.write(target, high << np.uint32(16) | low, "b32")


def _mov(run: _Launch, instruction: Instruction) -> None:
    kind, (target, source) = instruction.parts[-1], instruction.operands
    if isinstance(target, list):  # pieces of one number, the lowest first
        bits = int(kind[1:]) // len(target)
        whole = run.read(source, kind)
        for i, piece in enumerate(target):
            run.write(piece, whole >> whole.dtype.type(i * bits), f"b{bits}")
    elif isinstance(source, list):
        bits = int(kind[1:]) // len(source)
        pieces = [run.read(piece, f"b{bits}").astype(unsigned(kind)) for piece in source]
        run.write(target, sum(piece << piece.dtype.type(i * bits) for i, piece in enumerate(pieces)), kind)
    else:
        run.write(target, run.read(source, kind), kind)


def _cvt(run: _Launch, instruction: Instruction) -> None:
    _, *modes, target, source = instruction.parts
    first, *operands = instruction.operands
    values = [run.read(operand, source) for operand in operands]
    if target in ("bf16x2", "f16x2"):  # the first source is the upper half
        high, low = (to_bits(value, target[:-2]).astype(np.uint32) for value in values)
        return run.write(first, high << np.uint32(16) | low, "b32")
    (value,) = values
    if source[0] in "fb" and target[0] in "us":
        rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[modes.pop()](
            value.astype(np.float64)
        )
        limits = np.iinfo(dtype_of(target))
        if target.endswith("64"):
            raise PtxError("unknown here")
        value = np.clip(np.nan_to_num(rounded, nan=0.0), limits.min, limits.max)
    elif modes == ["rn"]:
        modes.pop()
    if modes:
        raise PtxError("unknown here")
    run.write(first, value if target == "bf16" else value.astype(dtype_of(target)), target)


def _ld(run: _Launch, instruction: Instruction) -> None:
    _, space, *modes, kind = instruction.parts
    targets, address, *_ = instruction.operands
    targets = targets if isinstance(targets, list) else [targets]
    if space == "param":
        value = run.arguments[int(address.base.rpartition("_")[2])]
        number = np.float32(value) if isinstance(value, float) else np.array(value & (2**64 - 1), np.uint64)
        return run.write(targets[0], from_bits(number.view(f"u{number.itemsize}"), kind), kind)
    size = unsigned(kind).itemsize
    index = run.address(space, address, size * len(targets))
    for i, target in enumerate(targets):
        run.write(target, run.load(space, index + i * size, kind), kind)


def _st(run: _Launch, instruction: Instruction) -> None:
    _, space, *_, kind = instruction.parts
    address, sources, *_ = instruction.operands
    sources = sources if isinstance(sources, list) else [sources]
    size = unsigned(kind).itemsize
    index = run.address(space, address, size * len(sources))
    for i, source in enumerate(sources):
        run.store(space, index + i * size, run.read(source, kind), kind)


def _atom(run: _Launch, instruction: Instruction) -> None:
    """One thread after the other."""
    _, space, *_, operation, kind = instruction.parts
    target, address, operand = instruction.operands
    index = run.address(space, address, unsigned(kind).itemsize)
    values = np.broadcast_to(run.read(operand, kind), index.shape)
    function = {"add": np.add, "max": np.maximum, "min": np.minimum, "exch": lambda old, new: new}[operation]
    before = []
    for i in range(len(index)):
        before.append(run.load(space, index[i : i + 1], kind))
        run.store(space, index[i : i + 1], function(before[-1], values[i : i + 1]), kind)
    run.write(target, np.concatenate(before), kind)


def _cp(run: _Launch, instruction: Instruction) -> None:
    """cp.async: what lies beyond the size of the source is zeros; it arrives when it is waited for."""
    what = instruction.parts[2]
    if what == "commit_group":
        run.copies.append([])
    elif what == "wait_group":
        (groups,) = instruction.operands
        while len(run.copies) > groups + 1:
            for index, byte in run.copies.pop(0):
                run.spaces["shared"].bytes[index] = byte
    else:
        target, source, size, *present = instruction.operands
        index = run.address("shared", target, size)
        present = np.broadcast_to(run.read(present[0], "u32") if present else size, index.shape)
        data = np.zeros((len(index), size), np.uint8)
        everyone, run.now = run.now, run.threads[run.now][present > 0]
        if ((present != 0) & (present != size)).any():
            raise PtxError("part of a copy")
        start = run.address("global", source, size)
        run.now = everyone
        data[present > 0] = run.spaces["global"].bytes[start[:, None] + np.arange(size)]
        run.copies[-1].append((index[:, None] + np.arange(size), data))


# ---- Warps -----------------------------------------------------------------------------------------------------------


def _shfl(run: _Launch, instruction: Instruction) -> None:
    """Of whole warps."""
    mode = instruction.parts[2]
    target, source, operand, clamp, _ = instruction.operands
    lanes = np.arange(WARP)
    warps = run.whole_warps()
    value = np.broadcast_to(run.read(source, "b32"), warps.size).reshape(-1, WARP)
    operand = np.broadcast_to(run.read(operand, "u32"), warps.size).reshape(-1, WARP).astype(np.int64)
    if clamp != WARP - 1 or mode not in ("bfly", "idx"):
        raise PtxError("unknown here")
    partner = lanes ^ operand if mode == "bfly" else operand
    run.write(target, np.take_along_axis(value, partner & (WARP - 1), 1).ravel(), "b32")


def _redux(run: _Launch, instruction: Instruction) -> None:
    """Of whole warps."""
    *_, operation, kind = instruction.parts
    target, source, _ = instruction.operands
    warps = run.whole_warps()
    value = np.broadcast_to(run.read(source, kind), warps.size).reshape(-1, WARP)
    reduce = {"add": np.add, "min": np.minimum, "max": np.maximum}[operation].reduce
    run.write(target, reduce(value, axis=1, dtype=value.dtype).repeat(WARP), kind)


def _matrices(run: _Launch, instruction: Instruction, address: Address, count: int) -> np.ndarray:
    """Where the 4 bytes lie that each thread holds of each of `count` matrices of 8 rows of 16 bytes [count, threads].

    Thread 8 i + r has the address of row r of matrix i; thread t holds bytes t % 4 * 4.. of row t // 4.
    """
    if "trans" in instruction.parts:
        raise PtxError("unknown here")
    run.whole_warps()
    lanes = np.arange(WARP)
    rows = run.address("shared", address, 16).reshape(-1, WARP)
    return np.stack([(rows[:, 8 * i + lanes // 4] + lanes % 4 * 4).ravel() for i in range(count)])


def _ldmatrix(run: _Launch, instruction: Instruction) -> None:
    targets, address = instruction.operands
    for target, index in zip(targets, _matrices(run, instruction, address, len(targets)), strict=True):
        run.write(target, run.load("shared", index, "b32"), "b32")


def _stmatrix(run: _Launch, instruction: Instruction) -> None:
    address, sources = instruction.operands
    for source, index in zip(sources, _matrices(run, instruction, address, len(sources)), strict=True):
        run.store("shared", index, np.broadcast_to(run.read(source, "b32"), index.shape), "b32")


def _fragment(run: _Launch, registers: list[str]) -> np.ndarray:
    """Four signed bytes for each register and thread [warps, 8 groups of lanes, 4 lanes, registers, 4]."""
    threads = run.threads[run.now].size
    values = [np.broadcast_to(run.read(register, "b32"), threads) for register in registers]
    return np.stack(values, -1).view(np.int8).reshape(-1, 8, 4, len(registers), 4)


def _left(run: _Launch, registers: list[str]) -> np.ndarray:
    """A of 16 x 32 s8 [warps, 16, 32]: lane (g, t) has rows g and g + 8, columns 4 t.. and 16 + 4 t..."""
    fragment = _fragment(run, registers).reshape(-1, 8, 4, 2, 2, 4)  # g, t, half of columns, half of rows, column
    return fragment.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 32)


def _accumulate(run: _Launch, registers: list[str], product: np.ndarray, before: np.ndarray | None) -> None:
    """Adds [warps, 16, n] to s32 registers: lane (g, t) has rows g and g + 8, columns 8 j + 2 t and 2 t + 1."""
    warps, _, n = product.shape
    parts = product.reshape(warps, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)  # j, half of rows, column, lanes
    for register, part in zip(registers, parts.reshape(-1, warps * WARP), strict=True):
        total = part.astype(np.int64)
        if before is not None:
            total = total + run.read(before[registers.index(register)], "s32")
        run.write(register, np.clip(total, -(2**31), 2**31 - 1), "s32")


def _mma(run: _Launch, instruction: Instruction) -> None:
    """m16n8k32 of s8 with saturation."""
    if instruction.parts[1:] != ("sync", "aligned", "m16n8k32", "row", "col", "satfinite", "s32", "s8", "s8", "s32"):
        raise PtxError("unknown here")
    run.whole_warps()
    d, a, b, c = instruction.operands
    right = _fragment(run, b).transpose(0, 3, 2, 4, 1).reshape(-1, 32, 8)  # lane (g, t): column g, rows as A's columns
    _accumulate(run, d, _product(_left(run, a), right), c)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of s8 matrices, exact: 32 products of 2^14 fit a float32."""
    return left.astype(np.float32) @ right.astype(np.float32)


def _wgmma(run: _Launch, instruction: Instruction) -> None:
    """wgmma of s8, A in registers: four warps have 16 rows each; B lies in shared memory."""
    _, operation, _, _, shape, *kinds = instruction.parts
    n = int(re.fullmatch(r"m64n(\d+)k32", shape)[1])
    d, a, descriptor, scale = instruction.operands
    if operation != "mma_async" or kinds != ["s32", "s8", "s8"] or not isinstance(a, list):
        raise PtxError("unknown here")
    groups = run.whole_warps().reshape(-1, 4 * WARP)
    right = _described(run, np.broadcast_to(run.read(descriptor, "u64"), groups.size)[:: 4 * WARP], groups[:, 0], n)
    adds = np.broadcast_to(run.read(scale, "pred"), groups.size)
    if adds.any() != adds.all():
        raise PtxError("unknown here")
    _accumulate(run, d, _product(_left(run, a), right.repeat(4, axis=0).swapaxes(1, 2)), d if adds.all() else None)


def _described(run: _Launch, descriptor: np.ndarray, threads: np.ndarray, rows: int) -> np.ndarray:
    """The s8 [groups, rows, 32] in shared memory that a matrix descriptor means, K-major.

    Groups of 8 rows lie `stride` bytes apart; rows lie side by side, as long as the swizzle, which moves 16-byte units
    within a row by the row's number: bits 4.. of an address change by its bits 7...
    """
    start, stride, mode = (
        (descriptor >> np.uint64(shift) & np.uint64(mask)).astype(np.int64) << up
        for shift, mask, up in [(0, 0x3FFF, 4), (32, 0x3FFF, 4), (62, 3, 0)]
    )
    if (mode != mode[0]).any() or mode[0] == 0:
        raise PtxError("unknown here")
    units = {1: 8, 2: 4, 3: 2}[int(mode[0])]  # of 16 bytes in a row
    row = np.arange(rows)[:, None]
    address = start[:, None, None] + row // 8 * stride[:, None, None] + row % 8 * 16 * units + np.arange(32)
    address ^= (address >> 7 & (units - 1)) << 4
    block = np.broadcast_to(run.block[threads][:, None, None], address.shape)
    shared = run.spaces["shared"]
    return shared.bytes[shared.at(address, 1, block)].view(np.int8)


OTHER = {
    "setp": _setp,
    "mov": _mov,
    "cvt": _cvt,
    "ld": _ld,
    "st": _st,
    "atom": _atom,
    "cp": _cp,
    "shfl": _shfl,
    "redux": _redux,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
    "mma": _mma,
    "wgmma": _wgmma,
}
