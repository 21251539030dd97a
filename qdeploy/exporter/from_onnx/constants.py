"""What a file lets compute of constants alone: small functions of numpy by name, each within a limit of elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from qdeploy.checks import quoted
from qdeploy.exporter.from_onnx.functions import ARITHMETIC, FUNCTIONS
from qdeploy.exporter.from_onnx.model import array_of
from qdeploy.exporter.from_onnx.moves import MOVES
from qdeploy.exporter.from_onnx.quantized import CODES, along_axis, code_type
from qdeploy.exporter.from_onnx.site import Site

MOST_FILLED = 2**27  # elements that ConstantOfShape may have: as one number they take no memory
TYPES: dict[int, Any] = {
    **{1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64},
    **{9: np.bool_, 10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64},
}


def fold(site: Site, inputs: list[Any]) -> Any:
    """The outputs of a node whose inputs are all constants; one array where it has one."""
    op = site.node.op
    if op in FUNCTIONS or op in ARITHMETIC:
        return _elementwise(site, inputs)
    if op in MOVES:
        return MOVES[op](site, inputs[0], *inputs[1:])
    if op in FOLDED:
        return FOLDED[op](site, *inputs)
    site.fail("an operator that can be computed of constants", f"{op} of constants")


def _elementwise(site: Site, inputs: list[Any]) -> np.ndarray:
    arrays = [x for x in inputs if x is not None]
    site.computes(math.prod(np.broadcast_shapes(*(x.shape for x in arrays))), max(x.size for x in arrays))
    target = (FUNCTIONS | ARITHMETIC)[site.node.op]
    with np.errstate(all="ignore"):
        result = np.asarray(target(site, *inputs))
    kept = result.dtype.kind == "b" or arrays[0].dtype.kind != "f"
    return result if kept else result.astype(arrays[0].dtype)


def _filled(site: Site, shape: Any) -> np.ndarray:
    sizes = [int(d) for d in site.constant(shape, "a shape")]
    value = site.node.attributes.get("value")
    number = np.zeros(1, np.float32)
    if value is not None:
        number = array_of(value, None, f"node {quoted(site.name)}{site.detail}")
    count = math.prod(sizes)
    if number.size != 1 or min(sizes, default=0) < 0 or count > MOST_FILLED:
        site.fail(f"one number for at most {MOST_FILLED} elements", f"{number.size} for {count}")
    return np.broadcast_to(number.reshape(-1)[0], sizes)


def _cast(site: Site, x: np.ndarray) -> np.ndarray:
    to = TYPES.get(site.integer("to", 1))
    if to is None:
        site.fail("a cast to numbers of 8 bits or more", f"one to type {site.integer('to', 1)}")
    site.computes(x.size, x.size)
    return x.astype(to)


def _range(site: Site, start: np.ndarray, limit: np.ndarray, delta: np.ndarray) -> np.ndarray:
    a, b, c = (value.reshape(-1)[0] for value in (start, limit, delta))
    site.computes(max(0, math.ceil((float(b) - float(a)) / float(c))))
    return np.arange(a, b, c).astype(start.dtype)


def _concat(site: Site, *parts: np.ndarray) -> np.ndarray:
    count = sum(part.size for part in parts)
    site.computes(count, count)
    return np.concatenate(parts, site.integer("axis", 0))


def _reduced(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def fold(site: Site, x: np.ndarray, axes: Any = None) -> np.ndarray:
        found = site.axes(axes)
        site.computes(x.size, x.size)
        dims = None if found is None else tuple(found)
        return np.asarray(function(x, axis=dims, keepdims=bool(site.integer("keepdims", 1)))).astype(x.dtype)

    return fold


def quantized(site: Site, x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None) -> np.ndarray:
    """As QuantizeLinear of floats: rint(x / scale) + zero_point in f32, saturated."""
    name = code_type(site, zero_point)
    if name not in CODES:
        site.fail("codes of 8 bits or fewer", name)
    low, high = CODES[name]
    site.computes(x.size, x.size)
    step = np.broadcast_to(along_axis(site, scale, x.shape), x.shape)
    zero = 0 if zero_point is None else along_axis(site, zero_point.astype(np.int32), x.shape)
    with np.errstate(all="ignore"):
        codes = np.clip(np.nan_to_num(np.rint(x.astype(np.float32) / step.astype(np.float32))) + zero, low, high)
    return codes.astype(np.int8 if low < 0 else np.uint8)


FOLDED: dict[str, Callable[..., np.ndarray]] = {
    "ConstantOfShape": _filled,
    "Cast": _cast,
    "Range": _range,
    "Concat": _concat,
    "Shape": lambda site, x: np.array(x.shape, np.int64),
    "QuantizeLinear": quantized,
    "ReduceMean": _reduced(np.mean),
    "ReduceSum": _reduced(np.sum),
    "ReduceProd": _reduced(np.prod),
    "ReduceMax": _reduced(np.max),
    "ReduceMin": _reduced(np.min),
}
