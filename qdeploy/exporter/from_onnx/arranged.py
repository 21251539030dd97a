"""What moves the elements of an activation, joins activations, or puts zeros around them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qdeploy.exporter.elements import BATCH
from qdeploy.exporter.from_onnx import quantized
from qdeploy.exporter.from_onnx.constants import TYPES
from qdeploy.exporter.from_onnx.model import Node
from qdeploy.exporter.from_onnx.moves import MOVES
from qdeploy.exporter.from_onnx.quantized import Coded, Offset
from qdeploy.exporter.from_onnx.site import Site
from qdeploy.exporter.from_onnx.weighted import is_constant, real
from qdeploy.exporter.from_onnx.windows import LOWEST, Padded
from qdeploy.exporter.lowering import joined
from qdeploy.exporter.lowering.moved import Value, index_of, layer_of, seen, sizes_of

PADDING = "padding by 0, reflect, edge or wrap, or by the least number before a max pool"


def move(site: Site, x: Any, *constants: Any) -> Any:
    """An operator of MOVES, run on the numbers of the elements."""
    if site.node.op == "Gather" and isinstance(x, np.ndarray) and isinstance(constants[0], (Coded, Offset)):
        return quantized.look_up(site, x, *constants)
    if isinstance(x, Coded):
        result = move(site, x.before, *constants)
        return tuple(replace(x, before=part) for part in (result if isinstance(result, tuple) else (result,)))
    if site.node.op == "Reshape" and constants:
        constants = (_shape_of_batch(site, x, site.constant(constants[0], "a shape")),)
    if site.node.op in ("Identity", "Dropout"):
        return x
    moved = MOVES[site.node.op](site, index_of(x), *constants)
    if isinstance(moved, tuple):
        return tuple(seen(layer_of(x), np.ascontiguousarray(part)) for part in moved)
    return seen(layer_of(x), np.ascontiguousarray(moved))


def _shape_of_batch(site: Site, x: Value, shape: np.ndarray) -> np.ndarray:
    """The batch that the file fixes stands for ours."""
    target = shape.reshape(-1).astype(np.int64).copy()
    if site.state.file.batch is not None and target.size and target[0] == site.state.file.batch:
        target[0] = BATCH
    if target.size and target[0] not in (-1, 0, BATCH):
        sizes = ", ".join(map(str, sizes_of(x)[1:]))
        site.fail("a reshape that keeps the batch", f"one of [N, {sizes}] to {target.tolist()}")
    if target.size and target[0] == -1 and (target[1:] > 0).all():  # as many images as there are
        target[0] = BATCH if int(np.prod(target[1:])) * BATCH == index_size(x) else -1
    return target


def index_size(x: Value) -> int:
    return int(np.prod(sizes_of(x)))


def shape(site: Site, x: Any) -> np.ndarray:
    """Of a batch of BATCH images."""
    sizes = sizes_of(x.before if isinstance(x, Coded) else x)
    first, last = site.integer("start", 0), site.node.attributes.get("end", len(sizes))
    return np.array(sizes, np.int64)[first:last]


def cast(site: Site, x: Any) -> Any:
    """Nothing: of real numbers to real numbers, of codes to integers that hold them."""
    to = TYPES.get(site.integer("to", 1))
    wanted = "iu" if isinstance(x, Coded) else "f"
    if to is None or np.dtype(to).kind not in wanted or to is np.float16:
        site.fail("float32 throughout", f"a cast to type {site.integer('to', 1)}")
    return x


def concat(site: Site, *values: Any) -> Any:
    first = next(x for x in values if not is_constant(x))
    axis = site.dimension(site.integer("axis", 1), len(sizes_of(first.before if isinstance(first, Coded) else first)))
    if any(isinstance(x, Coded) for x in values):
        return quantized.concat(site, list(values), axis)
    constants = [x for x in values if is_constant(x)]
    if not constants:
        return joined.concat(site, list(values), axis)
    x = values[-1]
    if len(values) != len(constants) + 1 or is_constant(x) or axis != len(sizes_of(x)) - 2:
        site.fail("a concatenation of activations, or of constant rows before tokens", "a constant elsewhere")
    return joined.behind(site, [real(row) for row in constants], x)


def pad(site: Site, x: Any, pads: Any = None, value: Any = None, axes: Any = None) -> Any:
    """Attributes up to opset 10."""
    if isinstance(x, Coded):
        site.fail("padding of real numbers", "padding of codes")
    mode, rank = site.text("mode", "constant"), len(sizes_of(x))
    widths = site.axes(pads, "pads") or []
    number = site.number("value", 0.0) if value is None else float(real(site.constant(value, "a value")).reshape(-1)[0])
    chosen = range(rank) if axes is None else [site.dimension(a, rank) for a in site.axes(axes) or []]
    before, behind = [0] * rank, [0] * rank
    for i, axis in enumerate(chosen):
        before[axis], behind[axis] = widths[i], widths[len(widths) // 2 + i]
    if mode == "constant" and number == 0:
        return joined.pad(site, x, before, behind)
    if mode == "constant" and number <= LOWEST and not any(before[:2] + behind[:2]) and min(before + behind) >= 0:
        return Padded(x, before[2:] + behind[2:])
    if mode == "constant" or mode not in ("reflect", "edge", "wrap") or min(before + behind) < 0:
        site.fail(PADDING, f"{mode} by {number:g}")
    site.computes(sum(before + behind) * index_size(x) + index_size(x), index_size(x))
    return seen(layer_of(x), np.pad(index_of(x), list(zip(before, behind, strict=True)), mode))  # type: ignore[call-overload]


def is_read_as_rows(state_nodes: list[Node], name: str) -> bool:
    """Whether the input is [N, H, W, C]: the first move after it makes it [N, C, H, W]."""
    while True:
        readers = [node for node in state_nodes if name in node.inputs]
        if len(readers) != 1:
            return False
        if readers[0].op == "Transpose":
            return list(readers[0].attributes.get("perm", [])) == [0, 3, 1, 2]
        if readers[0].op not in ("QuantizeLinear", "DequantizeLinear", "Cast", "Identity"):
            return False
        name = readers[0].outputs[0]
