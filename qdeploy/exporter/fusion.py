"""Layers into fewer layers: rules tried on each layer of a lowered network until none applies.

BatchNorm, scalars and constants go into scale and shift of the layer before them; additions, clamps and padding into
the convolution; functions of one tensor into one table. What is left over and is no operation of the engine is then
expressed by one that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from qdeploy.exporter.calibrate import leading_to_norms
from qdeploy.exporter.layers import (
    Add,
    Affine,
    Clamp,
    Codes,
    Conv2d,
    Embedding,
    Function,
    Image,
    InnerCodes,
    Layer,
    MaxPool2d,
    Mul,
    Network,
    Norm,
    Pad,
    Position,
    Quantize,
    Rescale,
    Reshape,
    Scaled,
    Table,
    Tokens,
    Weighted,
    composed,
    elementwise,
)
from qdeploy.exporter.moving import MOVES
from qdeploy.ops import OPS
from qdeploy.ops.op import channels_of


def fuse(network: Network) -> Network:
    """Rewrites the layers until no rule applies and each is an operation of the engine or a learned quantizer."""
    _remove_unused(network)
    while any([_rewrite(network, layer) for layer in list(network.layers)]):  # a list: each sweep visits every layer
        _remove_unused(network)
    for layer in list(network.layers):
        if layer.op in EXPRESSED:
            EXPRESSED[layer.op](network, layer)
    _end_in_float(network)
    _make_names_unique(network)
    return network


def _make_names_unique(network: Network) -> None:
    """Of a module used twice, or of two operators, the second is name#2. A move leaves the plain name to others."""
    taken: dict[str, int] = {}
    for layer in sorted(network.layers, key=_only_moves):
        taken[layer.name] = count = taken.get(layer.name, 0) + 1
        layer.name = layer.name if count == 1 else f"{layer.name}#{count}"


def _only_moves(layer: Layer) -> bool:
    return layer.same_grid and not (isinstance(layer, MaxPool2d) and layer.window["kernel"] != [1, 1])


def _remove_unused(network: Network) -> None:
    needed = {network.layers[0], *network.outputs}
    for layer in reversed(network.layers):
        if layer in needed:
            needed.update(layer.inputs)
    network.layers = [layer for layer in network.layers if layer in needed]


def _fold_affine(network: Network, affine: Affine) -> bool:
    """Into the layer before it, if nothing else reads that one. What has one scale takes one scale only."""
    x = affine.inputs[0]
    if network.only_user(x) is not affine or not isinstance(x, (Scaled, Add)):
        return False
    if x.clamped and not _keeps_clamp(x, affine):
        return False
    if len(x.shift) == 1 and not affine.uniform:
        return False
    if isinstance(x, Embedding):
        return False
    if isinstance(x, Weighted) and len(x.inputs) == 2 and np.ptp(affine.scale):  # a residual has one factor
        return False
    if isinstance(x, Weighted) and x.inner is not None and not affine.uniform:
        return False
    _scale_and_shift(x, affine)
    x.value = affine.value
    network.replace(affine, x)
    return True


def _scale_and_shift(x: Scaled | Add, affine: Affine) -> None:
    scale, shift = float(affine.scale[0]), float(affine.shift[0])
    if isinstance(x, Weighted):
        x.residual *= scale
        if x.inner is not None:
            x.inner = replace(x.inner, factor=x.inner.factor * scale, shift=x.inner.shift * scale + shift)
            return
    size = len(x.shift)
    x.shift = x.shift * affine.scale[:size] + affine.shift[:size]
    if isinstance(x, Add):
        x.factors = (x.factors[0] * scale, x.factors[1] * scale)
    else:
        x.scale = x.scale * affine.scale[:size]


def _keeps_clamp(x: Layer, affine: Affine) -> bool:
    """Whether factors > 0 alone are to go before a clamp at 0."""
    bounds = (x.low, x.high) in ((0.0, math.inf), (-math.inf, 0.0))
    return bounds and not affine.clamped and not affine.shift.any() and bool((affine.scale > 0).all())


def _fold_factors(network: Network, conv: Conv2d) -> bool:
    """Factors of the channels that a depthwise convolution reads go into it: what it pads with is 0 all the same."""
    x = conv.inputs[0]
    if not isinstance(x, Affine) or x.clamped or x.shift.any() or conv.window["groups"] != x.shape[0]:
        return False
    conv.scale = conv.scale * np.repeat(x.scale, conv.channels // x.shape[0])
    conv.inputs[0] = x.inputs[0]
    return True


def _fold_into_copy(network: Network, affine: Affine) -> bool:
    """A norm that others read as it is (a residual, in 16 bits) is written a second time with factors of its channels;
    layers that read it with the same factors read one copy."""
    x = affine.inputs[0]
    if not isinstance(x, Norm) or x.clamped or affine.uniform:
        return False
    scale, shift = x.scale * affine.scale, x.shift * affine.scale + affine.shift
    for other in network.users(x.inputs[0]):
        if isinstance(other, Norm) and (other.groups, other.epsilon) == (x.groups, x.epsilon) and not other.clamped:
            if np.array_equal(other.scale, scale) and np.array_equal(other.shift, shift):
                network.replace(affine, other)
                return True
    copy = replace(x, inputs=[*x.inputs], value=affine.value, scale=scale, shift=shift)
    copy.low, copy.high = affine.low, affine.high
    network.replace(affine, copy)
    return True


def _fold_into_rows(network: Network, affine: Affine) -> bool:
    """What a position table or an embedding adds to each row takes constants per channel, too."""
    x = affine.inputs[0]
    if not isinstance(x, (Position, Embedding)) or x.clamped or network.only_user(x) is not affine:
        return False
    if np.ptp(affine.scale):
        return False
    _scale_rows(x, affine.scale[0])
    x.rows, x.value = x.rows + affine.shift, affine.value
    network.replace(affine, x)
    return True


def _scale_rows(x: Position | Embedding, factor: float) -> None:
    x.rows = x.rows * factor
    if isinstance(x, Embedding):
        x.scale = x.scale * factor
    else:
        x.factor *= factor


def _merge_positions(network: Network, position: Position) -> bool:
    """A table added to an embedding, or to tokens to which one is added already, is one table."""
    x = position.inputs[0]
    if not isinstance(x, (Position, Embedding)) or x.clamped or network.only_user(x) is not position:
        return False
    prefix = len(position.rows) - len(x.rows)
    if isinstance(x, Embedding) and prefix:
        return False
    _scale_rows(x, position.factor)
    x.rows = np.concatenate([position.rows[:prefix], x.rows + position.rows[prefix:]])
    x.value, x.shape = position.value, position.shape
    network.replace(position, x)
    return True


def _fold_pad(network: Network, conv: Conv2d) -> bool:
    pad = conv.inputs[0]
    if not isinstance(pad, Pad):
        return False
    conv.inputs[0] = pad.inputs[0]
    conv.window["padding"] = [a + b for a, b in zip(conv.window["padding"], pad.padding, strict=True)]
    return True


def _fold_factor(network: Network, add: Add) -> bool:
    """A uniform affine map of an operand is a factor of the addition."""
    for i, x in enumerate(add.inputs):
        if isinstance(x, Affine) and x.uniform and not x.clamped:
            factors = list(add.factors)
            add.shift = add.shift + factors[i] * x.shift[0]
            factors[i] *= float(x.scale[0])
            add.factors = (factors[0], factors[1])
            add.inputs[i] = x.inputs[0]
            return True
    return False


def _fold_scale(network: Network, mul: Mul) -> bool:
    """A number times an operand is a number times the product."""
    for i, x in enumerate(mul.inputs):
        if isinstance(x, Affine) and x.uniform and not x.clamped and x.shift[0] == 0:
            mul.scale = mul.scale * x.scale[0]
            mul.inputs[i] = x.inputs[0]
            return True
    return False


def _fuse_add(network: Network, add: Add) -> bool:
    """The convolution whose result only the addition reads adds by itself, before anything is rounded to 8 bits."""
    for i, conv in enumerate(add.inputs):
        if isinstance(conv, Weighted) and _is_plain(conv) and network.only_user(conv) is add:
            factor = add.factors[i]
            conv.scale, conv.shift = conv.scale * factor, conv.shift * factor + add.shift
            _add_by_itself(network, conv, add, i)
            return True
    return False


def _fuse_rounded_add(network: Network, add: Add) -> bool:
    """So it does where a quantizer stands between: with both roundings, and without a pass over the codes."""
    for i, quantize in enumerate(add.inputs):
        if isinstance(quantize, Quantize) and quantize.grid.dtype == "u8" and network.only_user(quantize) is add:
            conv = quantize.inputs[0]
            if isinstance(conv, Weighted) and len(conv.inputs) == 1 and network.only_user(conv) is quantize:
                low, high = (int(code) for code in quantize.grid.codes([conv.low, conv.high]))
                grid = replace(quantize.grid, low=low, high=high)
                conv.inner = InnerCodes(grid, add.factors[i], float(add.shift[0]))
                network.layers.remove(quantize)
                _add_by_itself(network, conv, add, i)
                return True
    return False


def _add_by_itself(network: Network, conv: Weighted, add: Add, operand: int) -> None:
    """In place of the addition, of which it is this operand."""
    conv.residual, conv.value, conv.low, conv.high = add.factors[1 - operand], add.value, add.low, add.high
    conv.inputs.append(add.inputs[1 - operand])
    network.layers.remove(conv)  # it runs where the addition stood: by then the residual is there
    network.layers.insert(network.layers.index(add), conv)
    network.replace(add, conv)


def _is_plain(layer: Layer) -> bool:
    return len(layer.inputs) == 1 and not layer.clamped


def _fuse_clamp(network: Network, clamp: Clamp) -> bool:
    x = clamp.inputs[0]
    if network.only_user(x) is not clamp:
        return False
    if isinstance(x, (MaxPool2d, Reshape)) and network.only_user(x.inputs[0]) is x:
        # A clamp of the larger tensor is free once it is in the layer before; pool and clamp commute, both being
        # monotonic.
        clamp.inputs, clamp.shape, clamp.value = x.inputs, x.inputs[0].shape, x.inputs[0].value
        position = network.layers.index(x)
        network.layers.remove(clamp)
        network.layers.insert(position, clamp)
        for user in network.users(clamp):
            user.inputs = [x if source is clamp else source for source in user.inputs]
        network.end_in(x, clamp)
        x.inputs = [clamp]
        return True
    if not isinstance(x, (Scaled, Add, Clamp)):
        return False
    x.low, x.high = (float(np.clip(bound, clamp.low, clamp.high)) for bound in (x.low, x.high))
    network.replace(clamp, x)
    return True


def _merge_table(network: Network, layer: Layer) -> bool:
    """A function of a function is one table, when nothing else reads the inner one."""
    x = layer.inputs[0]
    by_channel = [isinstance(one, Table) and one.by_channel for one in (x, layer)]
    inner, outer = (_function(one) for one in (x, layer))
    if not isinstance(x, Table) and not isinstance(layer, Table):
        return False
    if inner is None or outer is None or network.only_user(x) is not layer:
        return False
    network.replace(layer, _table(layer, composed(inner, outer), x.inputs, any(by_channel)))
    network.layers.remove(x)
    return True


def _function(layer: Layer) -> Function | None:
    return layer.function if isinstance(layer, Table) else elementwise(layer)


def _table(layer: Layer, function: Function, inputs: list[Layer], by_channel: bool = False) -> Table:
    """In place of `layer`."""
    own = (layer.name, inputs, layer.shape, layer.value, layer.low, layer.high)
    return Table(*own, function=function, by_channel=by_channel)


def _merge_reshape(network: Network, reshape: Reshape) -> bool:
    x = reshape.inputs[0]
    if isinstance(x, Reshape):
        reshape.inputs = x.inputs
        return True
    if x.shape == reshape.shape:
        network.replace(reshape, x)
        return True
    return False


def _rewrite(network: Network, layer: Layer) -> bool:
    return layer in network.layers and any(rule(network, layer) for rule in REWRITES.get(layer.op, ()))


REWRITES: dict[str, tuple[Callable[[Network, Any], bool], ...]] = {
    "affine": (_fold_affine, _fold_into_copy, _fold_into_rows, _merge_table),
    "clamp": (_fuse_clamp, _merge_table),
    "conv2d": (_fold_pad, _fold_factors),
    "linear": (),
    "embedding": (),
    "max_pool2d": (),
    "avg_pool2d": (),
    "add": (_fold_factor, _fuse_add, _fuse_rounded_add),
    "mul": (_fold_scale,),
    "table": (_merge_table,),
    "resize": (),
    "rescale": (),
    "norm": (),
    "attention": (),
    "mean": (),
    "position": (_merge_positions,),
    "concat": (),
    "reshape": (_merge_reshape,),
    **MOVES,
}


def _express_function(network: Network, layer: Layer) -> None:
    function = elementwise(layer)
    assert function is not None  # of a clamp and of a uniform affine map
    network.replace(layer, _table(layer, function, layer.inputs))


def _express_affine(network: Network, layer: Affine) -> None:
    """A table where it is one function; else a 1x1 depthwise convolution, whose multipliers do it."""
    if layer.uniform and _leads_to_norm(network, layer):
        own = (layer.name, layer.inputs, layer.shape, layer.value, layer.low, layer.high)
        network.replace(layer, Rescale(*own, scale=layer.scale[:1], shift=layer.shift[:1]))
        return
    if layer.uniform:
        _express_function(network, layer)
        return
    conv = _depthwise(layer, layer.scale, layer.shift, [0] * 4)
    if len(layer.shape) == 3:
        network.replace(layer, conv)
        return
    kinds: tuple[type[Layer], type[Layer]] = (Image, Tokens) if len(layer.shape) == 2 else (Reshape, Reshape)
    conv.shape = (layer.shape[-1], math.prod(layer.shape[:-1]), 1)
    before = kinds[0](layer.name, layer.inputs, conv.shape, layer.inputs[0].value)
    after = kinds[1](layer.name, [conv], layer.shape, layer.value)
    conv.inputs = [before]
    network.replace(layer, after)
    place = network.layers.index(after)
    network.layers[place:place] = [before, conv]


def _leads_to_norm(network: Network, layer: Layer) -> bool:
    users = network.users(layer)
    return any(isinstance(x, (Norm, Position)) or x.same_grid and _leads_to_norm(network, x) for x in users)


def _express_pad(network: Network, layer: Pad) -> None:
    channels = layer.shape[0]
    network.replace(layer, _depthwise(layer, np.ones(channels), np.zeros(channels), layer.padding))


def _depthwise(layer: Layer, scale: np.ndarray, shift: np.ndarray, padding: list[int]) -> Conv2d:
    """In place of `layer` the 1x1 depthwise convolution by the code 1: with scale and shift it is exactly an affine map
    per channel."""
    channels = channels_of(layer.shape)
    return Conv2d(
        *(layer.name, layer.inputs, layer.shape, layer.value, layer.low, layer.high),
        weight=Codes(np.ones((channels, 1, 1, 1), np.int8), 2),
        scale=scale,
        shift=shift,
        window={"stride": [1, 1], "padding": padding, "dilation": [1, 1], "groups": channels},
    )


EXPRESSED: dict[str, Callable[[Network, Any], None]] = {
    "affine": _express_affine,
    "clamp": _express_function,
    "pad": _express_pad,
}


def _end_in_float(network: Network) -> None:
    """Makes each output a layer that writes f32 and that nothing reads: what ends in codes, is read or is an output a
    second time gets a layer from codes to real numbers."""
    for i, output in enumerate(network.outputs):
        if network.users(output) or network.outputs.count(output) > 1:
            network.outputs[i] = _from_codes(network, output)
            continue
        if isinstance(output, Reshape):
            source = output.inputs[0]
            if _may_flatten(source) and network.only_user(source) is output and output.shape == source.shape[:1]:
                source.shape = output.shape  # [C, 1, 1] may be written as [C]
                network.replace(output, source)
                output = source
        if not _may_be_f32(output):
            network.outputs[i] = _from_codes(network, output)


def _from_codes(network: Network, layer: Layer) -> Layer:
    own = ("output", [layer], layer.shape, layer.value, layer.low, layer.high)
    real: Layer = Table(*own, function=lambda v: v)
    if layer in leading_to_norms(network):  # its codes may have 16 bits, which no table reads
        real = Rescale(*own[:4], scale=np.ones(1), shift=np.zeros(1))
    network.layers.append(real)
    return real


def _may_be_f32(layer: Layer) -> bool:
    """An f32 output is not clamped: of a table the entries are."""
    return layer.op in OPS and OPS[layer.op].may_be_f32 and not (OPS[layer.op].requantized and layer.clamped)


def _may_flatten(layer: Layer) -> bool:
    return layer.op in OPS and OPS[layer.op].may_be_flat and _is_plain(layer)
