"""From layers, their codes and their grids to the integer graph: EMIT has one function for each operation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from qdeploy.errors import ExportError
from qdeploy.exporter.grid import Grid
from qdeploy.exporter.layers import (
    Add,
    Attention,
    AvgPool2d,
    Concat,
    Conv2d,
    Embedding,
    Gather,
    Input,
    Layer,
    MaxPool2d,
    Mean,
    Mul,
    Network,
    Norm,
    Position,
    Quantize,
    Rescale,
    Resize,
    Table,
    Weighted,
)
from qdeploy.graph import Activation, Member, Node
from qdeploy.ops import OPS
from qdeploy.ops.attention import MAX_PEAK
from qdeploy.ops.op import channels_of, rows_of
from qdeploy.ops.tokens import MAX_EPSILON, MIN_EPSILON

IDS = Grid(1.0, 0)  # in place of the grid of token ids


def emit(name: str, network: Network, grids: dict[Layer, Grid]) -> Member:
    """The integer graph of one network, whose weights are codes; `grids` are those of all layers but the outputs."""
    for quantize in [layer for layer in network.layers if isinstance(layer, Quantize)]:
        if grids[quantize].same_steps(quantize.grid) and quantize.grid.includes(grids[quantize.inputs[0]]):
            network.replace(quantize, quantize.inputs[0])
    grids = {**grids, **dict.fromkeys(network.outputs, Grid(1.0, 0))}
    names = {layer: layer.name for layer in network.layers}
    names |= {layer: name for layer, name in zip(network.outputs, network.names, strict=False) if name}
    ids = {layer: i for i, layer in enumerate(network.layers)}
    tensors, nodes = [], []
    for layer in network.layers:
        if isinstance(layer, Input) and network.ids:
            tensors.append(Activation(layer.name, layer.shape, "i32"))
            continue
        out, is_float = grids[layer], layer in network.outputs
        dtype = "f32" if is_float else out.dtype
        tensors.append(Activation(names[layer], layer.shape, dtype, out.scale, out.zero_point))
        if isinstance(layer, Input):
            continue
        op = "table" if isinstance(layer, Quantize) else layer.op
        node = Node(op, layer.name, [ids[x] for x in layer.inputs], ids[layer])
        EMIT[op](node, layer, [grids.get(x, IDS) for x in layer.inputs], out, is_float)
        if OPS[op].requantized and not is_float and out.dtype == "u8":
            node.attributes["clamp"] = [int(code) for code in out.codes(np.array([layer.low, layer.high]))]
        nodes.append(node)
    several = [ids[layer] for layer in network.outputs] if len(network.outputs) > 1 else None
    return Member(name, tensors, nodes, outputs=several)


def check_shapes(network: Network) -> None:
    """Raises ExportError for an activation that the engine cannot hold."""
    for layer in network.layers:
        if len(layer.shape) > 3:
            got = f"[N, {', '.join(map(str, layer.shape))}]"
            expected = "tensors [N, C, H, W], [N, T, D] or [N, F] between operators"
            raise ExportError(f"expected {expected}, got {got} - at module `{layer.name}`")


def _f32(value: np.ndarray | float) -> np.ndarray:
    """Rounds to f32; subnormal numbers, which some processors take for 0, become 0."""
    value = np.asarray(value, np.float64)
    with np.errstate(over="ignore"):  # infinity is refused by _check_bound
        return np.where(np.abs(value) < 2.0**-126, 0.0, value).astype(np.float32)


def _emit_weighted(node: Node, layer: Weighted, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    """r = fma(acc, m, b), with a residual fma(q_res, m_res, r), in codes of the output; its zero point is in b. Inner
    codes have a zero point of their own, and theirs is the first of two roundings."""
    inner, residual, offset = layer.inner, 0.0, 0.0
    if len(inputs) == 2:
        residual = float(_f32(layer.residual * inputs[1].scale / out.scale))
        offset = residual * inputs[1].zero_point
        node.attributes["residual_multiplier"] = residual
    of_residual = abs(residual) * inputs[-1].most
    if inner is not None:
        factor = float(_f32(inner.factor * inner.grid.scale / out.scale))
        shift = inner.shift / out.scale + out.zero_point - offset - factor * inner.grid.zero_point
        node.attributes |= {"inner_multiplier": factor, "inner_bias": float(_f32(shift))}
        node.attributes["inner_clamp"] = [inner.grid.low, inner.grid.high]
        _check_bound(layer, np.array([255 * abs(factor) + abs(shift) + of_residual]), is_float)
        out, is_float, offset, of_residual = inner.grid, False, 0.0, 0.0
    multiplier = _f32(layer.scale * inputs[0].scale / out.scale)
    bias = layer.shift / out.scale + out.zero_point - offset
    if isinstance(layer, Conv2d):
        node.attributes |= layer.window
    codes = layer.codes.values
    magnitude = np.abs(codes.reshape(len(codes), -1).astype(np.int64)).sum(1)
    reach = 255 * magnitude * np.abs(multiplier, dtype=np.float64) + of_residual
    if not is_float:  # what is dead or saturated whatever the input stays so with a bias within the format's bounds
        bias = np.clip(bias, -1.01 * reach - out.most - 1, 1.01 * reach + out.most + 1)
    node.bits = layer.codes.bits
    node.constants = {"weight": codes, "multiplier": multiplier, "bias": _f32(bias)}
    _check_bound(layer, reach + np.abs(bias), is_float)


def _check_bound(layer: Layer, largest: np.ndarray, is_float: bool) -> None:
    """docs/format.md, bounds that a reader checks; told here with the module's name."""
    limit = 100 if is_float else 30
    worst = int(np.argmax(largest))
    if not largest[worst] < 2.0**limit:
        expected = f"results below 2^{limit} times the output's scale"
        got = f"up to {largest[worst]:.3g} in channel {worst} (a scale or BatchNorm far from its data)"
        raise ExportError(f"expected {expected}, got {got} - at module `{layer.name}`")


def _emit_add(node: Node, layer: Add, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    multipliers = [float(_f32(f * grid.scale / out.scale)) for f, grid in zip(layer.factors, inputs, strict=True)]
    bias = layer.shift[0] / out.scale + out.zero_point
    bias -= sum(m * grid.zero_point for m, grid in zip(multipliers, inputs, strict=True))
    node.attributes |= {"multipliers": multipliers, "bias": float(_f32(bias))}
    reach = sum(grid.most * abs(m) for m, grid in zip(multipliers, inputs, strict=True))
    _check_bound(layer, np.array([reach + abs(bias)]), is_float)


def _emit_rescale(node: Node, layer: Rescale, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    multiplier = float(_f32(layer.scale[0] * inputs[0].scale / out.scale))
    bias = layer.shift[0] / out.scale + out.zero_point - multiplier * inputs[0].zero_point
    node.attributes |= {"multiplier": multiplier, "bias": float(_f32(bias))}
    _check_bound(layer, np.array([inputs[0].most * abs(multiplier) + abs(bias)]), is_float)


def _emit_mul(node: Node, layer: Mul, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    multiplier = float(_f32(layer.scale[0] * inputs[0].scale * inputs[1].scale / out.scale))
    bias = layer.shift[0] / out.scale + out.zero_point
    node.attributes |= {"multiplier": multiplier, "bias": float(_f32(bias))}
    _check_bound(layer, np.array([255 * 255 * abs(multiplier) + abs(bias)]), is_float)


def _emit_avg_pool2d(node: Node, layer: AvgPool2d, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    bias = layer.shift[0] / out.scale + out.zero_point
    multiplier = _f32(layer.scale[0] * inputs[0].scale / (layer.divisors * out.scale))
    node.attributes |= layer.window | {"bias": float(_f32(bias))}
    node.constants = {"multiplier": multiplier}
    elements = math.prod(layer.window["kernel"])
    counts = elements if multiplier.size == 1 else np.arange(1, elements + 1)
    _check_bound(layer, inputs[0].most * counts * np.abs(multiplier, dtype=np.float64) + abs(bias), is_float)


def _emit_max_pool2d(node: Node, layer: MaxPool2d, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    node.attributes |= layer.window


def _emit_table(node: Node, layer: Table | Quantize, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    real = inputs[0].real(np.arange(256))
    if isinstance(layer, Table) and layer.by_channel:
        real = np.broadcast_to(real, (channels_of(layer.shape), 256))
    try:
        with np.errstate(all="ignore"):  # what is infinite or no number is looked at below
            values = np.broadcast_to(np.asarray(layer.function(real), np.float64), real.shape)
    except RecursionError:  # sums of sums of functions of one tensor; chains are no calls within calls (Composed)
        expected = "a function of one tensor, of some hundred sums and products at most"
        raise ExportError(f"expected {expected}, got more - at module `{layer.name}`") from None
    reached = slice(inputs[0].low, inputs[0].high + 1)
    used = values[..., reached]
    if np.isnan(used).any() or is_float and np.isinf(used).any():
        wrong = float(real[..., reached][~np.isfinite(used)][0])
        expected = "a function that is finite on the range of its input"
        raise ExportError(f"expected {expected}, got none at {wrong:.4g} - at module `{layer.name}`")
    values = np.nan_to_num(values) if is_float else np.where(np.isnan(values), 0, values)
    node.constants = {"table": _f32(values) if is_float else out.codes(values).astype(np.uint8)}


def _emit_resize(node: Node, layer: Resize, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    multiplier = float(_f32(layer.scale[0] * inputs[0].scale / out.scale))
    bias = layer.shift[0] / out.scale + out.zero_point
    node.attributes |= {"multiplier": multiplier, "bias": float(_f32(bias))}
    for axis, band in (("row", layer.rows), ("column", layer.columns)):
        node.constants |= {f"{axis}_start": band.start, f"{axis}_weight": band.weight}
    sums = [np.abs(band.weight).sum(1).max() for band in (layer.rows, layer.columns)]
    _check_bound(layer, np.array([255.0 * sums[0] * sums[1] * abs(multiplier) + abs(bias)]), is_float)


def _emit_embedding(node: Node, layer: Embedding, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    node.bits = layer.codes.bits
    multiplier = _f32(layer.scale / out.scale)
    if np.ptp(multiplier) == 0:
        multiplier = multiplier[:1]
    rows = _f32(layer.rows / out.scale + out.zero_point)
    node.constants = {"weight": layer.codes.values, "multiplier": multiplier, "rows": rows}
    reach = 2.0 ** (node.bits - 1) * np.abs(multiplier).max() + np.abs(rows).max()
    _check_bound(layer, np.array([reach]), is_float)


def _emit_position(node: Node, layer: Position, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    multiplier = float(_f32(layer.factor * inputs[0].scale / out.scale))
    rows = layer.rows / out.scale + out.zero_point
    prefix = layer.shape[0] - layer.inputs[0].shape[0]
    rows[prefix:] -= multiplier * inputs[0].zero_point
    node.attributes |= {"multiplier": multiplier, "prefix": prefix}
    node.constants = {"rows": _f32(rows)}
    _check_bound(layer, np.array([inputs[0].most * abs(multiplier) + np.abs(rows).max()]), is_float)


def _emit_norm(node: Node, layer: Norm, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    """E = N*N*eps/s^2, s the scale of the input; its zero point cancels."""
    channels = channels_of(layer.shape)
    count = channels if layer.groups is None else channels // layer.groups * rows_of(layer.shape)
    epsilon = np.clip(count * count * layer.epsilon / inputs[0].scale ** 2, MIN_EPSILON, MAX_EPSILON)
    multiplier, bias = _f32(layer.scale / out.scale), _f32(layer.shift / out.scale + out.zero_point)
    node.attributes |= {"groups": layer.groups, "epsilon": float(_f32(epsilon))}
    node.constants = {"multiplier": multiplier, "bias": bias}
    _check_bound(layer, np.sqrt(count) * np.abs(multiplier.astype(np.float64)) * 1.001 + np.abs(bias), is_float)


def _emit_mean(node: Node, layer: Mean, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    multiplier = _f32(layer.scale[0] * inputs[0].scale / (layer.divisors * out.scale))
    bias = layer.shift[0] / out.scale + out.zero_point
    node.attributes["bias"] = float(_f32(bias))
    node.constants = {"multiplier": multiplier}
    counts = np.arange(1, len(multiplier) + 1)
    _check_bound(layer, inputs[0].most * counts * np.abs(multiplier, dtype=np.float64) + abs(bias), is_float)


def _emit_attention(node: Node, layer: Attention, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    """The weights are powers of two: log2 e goes into the logits."""
    q, k, v = inputs
    keys = layer.block or layer.inputs[1].shape[0]
    multiplier, bias = float(_f32(layer.scale[0] * v.scale / out.scale)), layer.shift[0] / out.scale + out.zero_point
    node.attributes |= {
        "heads": layer.heads,
        "logit_multiplier": float(_f32(q.scale * k.scale * layer.factor * math.log2(math.e))),
        "multiplier": multiplier,
        "bias": float(_f32(bias)),
        "peak": min(MAX_PEAK, (2**31 - 1) // (255 * keys)),
        "block": layer.block,
    }
    if layer.bias is not None:
        node.constants["logit_bias"] = _f32(layer.bias * math.log2(math.e))
    if layer.regions is not None:
        node.constants["regions"] = layer.regions
    _check_bound(layer, np.array([255 * abs(multiplier) * 1.001 + abs(bias)]), is_float)


def _emit_gather(node: Node, layer: Gather, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    node.attributes["axis"] = layer.axis
    node.constants = {"index": layer.index.astype(np.int32)}


def _emit_concat(node: Node, layer: Concat, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    if len(layer.shape) == 2:
        node.attributes["axis"] = "channels" if layer.along_channels else "rows"


def _emit_move(node: Node, layer: Layer, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    """Inputs and shapes say it all."""


EMIT: dict[str, Callable[[Node, Any, list[Grid], Grid, bool], None]] = {
    "conv2d": _emit_weighted,
    "linear": _emit_weighted,
    "add": _emit_add,
    "mul": _emit_mul,
    "rescale": _emit_rescale,
    "avg_pool2d": _emit_avg_pool2d,
    "max_pool2d": _emit_max_pool2d,
    "table": _emit_table,
    "resize": _emit_resize,
    "embedding": _emit_embedding,
    "position": _emit_position,
    "norm": _emit_norm,
    "mean": _emit_mean,
    "attention": _emit_attention,
    "gather": _emit_gather,
    "concat": _emit_concat,
    "reshape": _emit_move,
    "tokens": _emit_move,
    "image": _emit_move,
}
