"""QuantizeLinear and DequantizeLinear: grids of activations, codes of constants.

Between the two an activation is Coded: what it was before, and the grid. The layer `quantize` is made where it becomes
real again; all that may stand between (a max pool, a clip, moves) commutes with rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qdeploy.exporter.elements import numbered
from qdeploy.exporter.from_onnx.moves import MOVES
from qdeploy.exporter.from_onnx.site import Site
from qdeploy.exporter.grid import Grid
from qdeploy.exporter.layers import Layer, Quantize, QuantizedWeight, Table
from qdeploy.exporter.lowering import elementwise, joined
from qdeploy.exporter.lowering.moved import Value, plain, seen, settled, sizes_of

CODES = {"uint8": (0, 255), "int8": (-128, 127), "uint4": (0, 15), "int4": (-8, 7), "uint2": (0, 3), "int2": (-2, 1)}
OFFSETS = {"uint8": 0, "int8": 128}  # from codes of an activation to u8
REAL = "real numbers (DequantizeLinear before it)"
STATIC = "a scale that is a constant (quantize with static ranges)"


@dataclass(frozen=True, eq=False)
class Stored:
    """What a file holds as codes and scale: `codes * scale`."""

    codes: np.ndarray  # integers, without the zero point
    scale: np.ndarray  # f32, of the same shape

    @property
    def real(self) -> np.ndarray:
        return self.codes * self.scale.astype(np.float64)

    def moved(self, site: Site, *constants: Any) -> Any:
        codes, scale = (MOVES[site.node.op](site, array, *constants) for array in (self.codes, self.scale))
        if isinstance(codes, tuple):
            return tuple(Stored(*pair) for pair in zip(codes, scale, strict=True))
        assert not isinstance(scale, tuple)
        return Stored(codes, scale)


@dataclass(frozen=True, eq=False)
class Coded:
    """An activation between QuantizeLinear and DequantizeLinear."""

    before: Value
    grid: Grid  # of u8: of s8 both codes and zero point are 128 more
    dtype: str
    name: str  # of its QuantizeLinear
    source: str  # the tensor that this rounds


@dataclass(frozen=True, eq=False)
class Offset:
    """Codes of an activation and, of each channel, what is added to them: where its table begins in one of all."""

    real: Value
    grid: Grid  # of `real`
    first: np.ndarray  # int64 [C]


def code_type(site: Site, zero_point: np.ndarray | None) -> str:
    if zero_point is not None:
        return zero_point.dtype.name
    names = {0: "uint8", 2: "uint8", 3: "int8", 21: "uint4", 22: "int4"}
    kind = site.integer("output_dtype", 0)
    return names.get(kind, f"type {kind}")


def along_axis(site: Site, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A scale or zero point, so that it fits an array of this shape."""
    if site.integer("block_size", 0):
        site.fail("a scale per tensor or per channel", "one per block")
    if values.size == 1:
        return values.reshape(())
    axis = site.integer("axis", 1)
    if not -len(shape) <= axis < len(shape) or values.ndim != 1 or values.size != shape[axis]:
        site.fail(f"a scale per channel of a tensor {list(shape)}", f"{list(values.shape)} along axis {axis}")
    return values.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


def _scales(site: Site, scale: Any) -> np.ndarray:
    """f32, each > 0 and finite."""
    found = site.constant(scale, STATIC)
    values = found.astype(np.float32).reshape(found.shape)
    wrong = values[~(np.isfinite(values) & (values > 0))]
    if wrong.size or not values.size:
        site.fail("a scale > 0 and finite", f"{wrong[0]}" if wrong.size else "none")
    return values


# ---- Constants -------------------------------------------------------------------------------------------------------


def dequantize_constant(site: Site, codes: np.ndarray, scale: Any, zero_point: Any = None) -> Stored:
    values = _scales(site, scale)
    if codes.dtype.kind not in "iu" and "int" not in codes.dtype.name:
        site.fail("codes that are integers", codes.dtype.name)
    site.writes_out(codes)
    wide = codes.astype(np.int32 if codes.dtype.itemsize > 1 else np.int16)
    if zero_point is not None:
        zero = along_axis(site, site.constant(zero_point, "a zero point"), codes.shape)
        if zero.any():
            wide = wide - zero.astype(wide.dtype)
    return Stored(wide, np.broadcast_to(along_axis(site, values, codes.shape), codes.shape))


def weight(site: Site, value: Any, order: tuple[int, ...]) -> QuantizedWeight | np.ndarray:
    """What a layer holds of a constant whose dimensions, output channels first, are `order`."""
    if isinstance(value, np.ndarray):
        site.writes_out(value)
        return np.ascontiguousarray(value.transpose(order), np.float32)
    if not isinstance(value, Stored):
        site.fail("a weight that is a constant", "none" if value is None else "one that depends on the input")
    codes, scale = value.codes.transpose(order), value.scale.transpose(order)
    step = scale.reshape(len(scale), -1)
    if not step.size:
        site.fail("a weight", f"one of shape {list(codes.shape)}")
    if (step != step[:, :1]).any():
        site.fail("one weight scale per output channel, or one for all", "scales along another dimension")
    bits = max(-int(codes.min()) - 1, int(codes.max()), 1).bit_length() + 1
    if bits > 9:
        site.fail("a weight of 8 bits or fewer", f"codes {codes.min()}..{codes.max()}")
    used = codes.reshape(len(codes), -1).any(axis=1)  # the scale of other channels says nothing
    steps = np.where(used, step[:, 0], np.float32(1))
    return QuantizedWeight(codes.astype(np.float32) * scale, steps, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, "file")


def parts(weight: QuantizedWeight) -> tuple[QuantizedWeight, int]:
    """Codes beyond s8 (of u8 less a zero point) as sums of codes: of as many copies of the input channels."""
    step = weight.step.reshape(-1, *[1] * (weight.value.ndim - 1))
    rest, found = np.rint(weight.value / step), []
    while rest.any():
        found.append(np.clip(rest, -128, 127))
        rest = rest - found[-1]
    return replace(weight, value=np.concatenate(found, 1).astype(np.float32) * step, qmin=-128, qmax=127), len(found)


# ---- Activations -----------------------------------------------------------------------------------------------------


def quantize(site: Site, x: Value, scale: Any, zero_point: Any = None) -> Coded:
    values = _scales(site, scale)
    zero = None if zero_point is None else site.constant(zero_point, "a zero point")
    name = code_type(site, zero)
    if name not in OFFSETS or site.integer("block_size", 0):
        got = "a scale per block" if site.integer("block_size", 0) else name
        site.fail("activations of 8 bits, u8 or s8, with one scale", got)
    zeros = np.zeros(1, np.int64) if zero is None else zero.reshape(-1).astype(np.int64)
    if zeros.size == 0 or np.ptp(zeros):
        site.fail("one zero point for a tensor", f"{zeros.size}, {zeros[:4]}")
    grid = Grid(float(values.max()), int(zeros[0]) + OFFSETS[name])
    if values.size > 1:  # channels.py has rewritten those that can be
        site.fail("one scale for a tensor", f"{values.size}")
    return Coded(x, grid, name, site.name, site.node.inputs[0])


def offset(site: Site, a: Any, b: Any) -> Offset:
    """Add of codes and integers, one for each channel."""
    x, constant = (a, b) if isinstance(a, Coded) else (b, a)
    if not isinstance(x, Coded) or x.dtype != "uint8" or not isinstance(constant, np.ndarray):
        site.fail(REAL, "Add of codes")
    rounded = _rounded(site, x)
    first = elementwise.by_element(site, constant, *settled(site, rounded))
    if constant.dtype.kind not in "iu" or len(first) > 1:
        site.fail("integers to add to codes, one for each channel", f"{constant.dtype.name} {list(constant.shape)}")
    return Offset(rounded, x.grid, first[0].astype(np.int64))


def look_up(site: Site, table: np.ndarray, x: Coded | Offset) -> Value:
    """Gather of 256 real numbers by the codes of an activation; of as many for each channel."""
    is_table = table.ndim == 1 and table.dtype.kind == "f" and not site.integer("axis", 0)
    by_channel = isinstance(x, Offset)
    if isinstance(x, Offset):
        is_table = is_table and x.first.min() >= 0 and x.first.max() + 256 <= table.size
    else:
        is_table = is_table and table.size == 256 and x.dtype == "uint8"
    if not is_table:
        got = f"{table.dtype.name} {list(table.shape)}" + ("" if isinstance(x, Offset) else f" for {x.dtype}")
        site.fail(f"a table of 256 real numbers for u8 codes{' of each channel' if by_channel else ''}", got)
    entries, grid = table.astype(np.float64), replace(x.grid, low=0, high=255)
    first = x.first[:, None] if isinstance(x, Offset) else 0

    def function(v: np.ndarray) -> np.ndarray:
        return entries[first + grid.codes(v).astype(np.int64)]

    real = x.real if isinstance(x, Offset) else _rounded(site, x)
    return elementwise.each(site, real, Table, function=function, by_channel=by_channel)


def _rounded(site: Site, x: Coded) -> Value:
    """The layer `quantize`; a second one of the same tensor is the first."""
    key = (x.before, x.grid)
    if key not in site.state.quantized:
        moving = _named(site, x.source)
        before = seen(*settled(moving, _reshaped(moving, x.before)))
        rounding = _named(site, x.name)
        site.state.quantized[key] = elementwise.each(rounding, before, Quantize, grid=x.grid, origin="file")
    return site.state.quantized[key]


def _named(site: Site, name: str) -> Site:
    return replace(site, node=replace(site.node, name=name))


def _reshaped(site: Site, x: Value) -> Value:
    """A vector or an image that is another activation in order, as an activation of its own: the file rounds it there,
    and what reads it need not be moved back."""
    if isinstance(x, Layer) or len(sizes_of(x)) not in (2, 4):
        return x
    in_order = np.array_equal(x.index.reshape(-1), numbered(x.layer.shape).reshape(-1))
    return plain(site, x) if in_order else x


def dequantize(site: Site, x: Coded, scale: Any, zero_point: Any = None) -> Value:
    values = _scales(site, scale)
    zero = None if zero_point is None else site.constant(zero_point, "a zero point").reshape(-1)[:1]
    offset = OFFSETS[x.dtype] + (0 if zero is None else int(zero[0]))
    if np.float32(values.max()) != np.float32(x.grid.scale) or offset != x.grid.zero_point:
        site.fail("the scale and zero point of its QuantizeLinear", "others")
    return _rounded(site, x)


def clip(site: Site, x: Coded, low: Any = None, high: Any = None) -> Coded:
    """Fewer codes."""
    offset, grid = OFFSETS[x.dtype], x.grid
    bounds = [None if v is None else int(site.constant(v, "a bound").reshape(-1)[0]) + offset for v in (low, high)]
    least, most = (default if v is None else v for v, default in zip(bounds, (grid.low, grid.high), strict=True))
    least, most = max(least, grid.low), min(most, grid.high)
    if least > most:
        site.fail("bounds with codes between", f"{least - offset}..{most - offset}")
    return replace(x, grid=replace(grid, low=least, high=most))


def concat(site: Site, parts: list[Any], axis: int) -> Coded:
    first = parts[0]
    if not all(isinstance(x, Coded) and (x.grid, x.dtype) == (first.grid, first.dtype) for x in parts):
        site.fail("codes of one scale and zero point", "others")
    return replace(first, before=joined.concat(site, [x.before for x in parts], axis))
