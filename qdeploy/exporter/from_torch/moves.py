"""Operators that only move elements: run on the numbers of the elements, whatever they are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdeploy.exporter.elements import BATCH, channel_axis, with_channels
from qdeploy.exporter.from_torch.attention import Scores, reshaped_scores
from qdeploy.exporter.from_torch.moved import (
    Moved,
    Value,
    arranged,
    has_channels,
    image,
    index_of,
    layer_of,
    seen,
    settled,
)
from qdeploy.exporter.from_torch.site import RIGHT_BEFORE, Site, float64
from qdeploy.exporter.layers import Concat, Layer, Pad, Position, QuantizedWeight
from qdeploy.ops.op import channels_of

HOLE = np.iinfo(np.int64).min


def same(site: Site, x: Any, *_: Any, **__: Any) -> Any:
    dtype = site.node.meta["val"].dtype
    if dtype != torch.float32:
        site.fail("float32 throughout", str(dtype))
    return x


def filled(site: Site, x: Value, *args: Any, **kwargs: Any) -> Tensor:
    """One number everywhere: of x it takes the sizes at most."""
    return site.target(torch.empty(index_of(x).shape), *args, **kwargs | {"device": torch.device("cpu")})


def getitem(site: Site, x: Any, index: int) -> Any:
    """BatchNorm and pools with indices return tuples; only their first element is a value."""
    if isinstance(x, (tuple, list)):  # of a split
        return x[index]
    if isinstance(x, QuantizedWeight):  # fake quantization may tell what it clipped, too
        return x
    if index:
        site.fail("only the first result of the operator to be read", f"result {index}")
    x.value = type(x.value)(site.node)
    return x


def move(site: Site, x: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(x, QuantizedWeight):
        return _moved_weight(site, x, *args, **kwargs)
    if isinstance(x, Scores):
        return reshaped_scores(site, x)
    layer = layer_of(x)
    args = tuple(torch.empty(site.sizes) if isinstance(a, (Layer, Moved)) else a for a in args)  # expand_as
    moved = site.target(torch.from_numpy(index_of(x).copy()), *args, **kwargs)
    if isinstance(moved, Tensor):
        return seen(layer, moved.numpy())
    return tuple(seen(layer, part.numpy()) for part in moved)


def move_in_float(site: Site, x: Value, *args: Any, **kwargs: Any) -> Value:
    """An operator that torch has for floats alone: numbers below 2^53 are exact."""
    moved = site.target(torch.from_numpy(index_of(x).astype(np.float64)), *args, **kwargs)
    return seen(layer_of(x), moved.numpy().astype(np.int64))


def _moved_weight(site: Site, weight: QuantizedWeight, *args: Any, **kwargs: Any) -> Any:
    """Its output channels, all or some of them, in another shape."""
    moved = site.target(torch.arange(weight.value.size).reshape(weight.shape), *args, **kwargs)
    if isinstance(moved, Tensor):
        return _channels_of(site, weight, moved)
    return tuple(_channels_of(site, weight, part) for part in moved)


def _channels_of(site: Site, weight: QuantizedWeight, elements: Tensor) -> QuantizedWeight:
    width = math.prod(weight.shape[1:])
    rows = elements.reshape(len(elements), -1)
    channels = rows[:, 0] // width
    whole = rows.shape[1] == width and torch.equal(rows, channels[:, None] * width + torch.arange(width))
    if weight.step.size > 1 and not whole:
        site.fail(RIGHT_BEFORE, "weight standardization or another function of all weights after it")
    if whole:
        return weight[channels.numpy()].reshape(elements.shape)
    return replace(weight, value=weight.value.reshape(-1)[elements.numpy()])


def pad(site: Site, x: Value, padding: list[int], mode: str = "constant", value: float | None = None) -> Value:
    """`padding` begins with the last dimension, as in torch: left, right, top, bottom."""
    if mode != "constant":
        return move_in_float(site, x, padding, mode)
    if value not in (None, 0):
        site.fail("padding by the constant 0", f"padding by {value}")
    left, right, top, bottom, *rest = [int(p) for p in padding] + [0] * (4 - len(padding))
    if not any(padding):
        return x
    if len(site.sizes) == 4 and not any(rest) and min(left, right, top, bottom) >= 0 and has_channels(x, 1):
        return site.layer(Pad, [image(site, x)], padding=[top, left, bottom, right])
    padded = torch.nn.functional.pad(torch.from_numpy(index_of(x).copy()), padding, value=HOLE).numpy()
    if padded.shape[0] != BATCH:
        site.fail("padding of an image", "padding of the batch")
    zeros = np.broadcast_to(-1 - np.arange(BATCH).reshape(-1, *[1] * (padded.ndim - 1)), padded.shape)
    return Moved(layer_of(x), np.where(padded == HOLE, zeros, padded))


def concat(site: Site, tensors: list[Any], dim: int = 0) -> Value:
    if len(tensors) == 1:
        return tensors[0]
    rank = len(site.sizes)
    dim %= rank
    constants = [x for x in tensors if isinstance(x, Tensor)]
    if dim == 0:
        site.fail("concatenation behind the batch", "dimension 0")
    if constants:
        return _behind(site, constants, tensors, dim)
    if all(isinstance(x, Layer) for x in tensors) and (dim == 1 or rank == 3):
        return site.layer(Concat, list(tensors))
    if site.sizes[0] == BATCH:
        return _beside(site, tensors, dim) if rank > 4 else _joined(site, tensors, dim)
    apart = [seen(layer_of(x), index_of(x).reshape(BATCH, -1, *index_of(x).shape[1:])) for x in tensors]  # of windows
    joined = _joined(site, apart, dim + 1)
    return seen(layer_of(joined), index_of(joined).reshape(site.sizes))


def _joined(site: Site, tensors: list[Value], dim: int) -> Value:
    """Of tensors that are no plain activations, or along rows. Their channels are the dimension behind the batch where
    that is so for all, else the last one."""
    whole_sizes = list(index_of(tensors[0]).shape)
    whole_sizes[dim] = sum(index_of(x).shape[dim] for x in tensors)
    rank, images = len(whole_sizes), all(len(layer_of(x).shape) == 3 for x in tensors)
    axis = 1 if all(has_channels(x, 1) for x in tensors) else rank - 1
    by_channels = dim == axis
    pieces, placed, first = [], [], 0
    for x in tensors:
        sizes = index_of(x).shape
        lead = [size for i, size in enumerate(sizes) if i not in (0, axis)]
        shape = (
            (sizes[axis], *lead, 1)[:3] if images and by_channels and len(lead) < 3 else (math.prod(lead), sizes[axis])
        )
        piece, index = arranged(site, x, axis, shape if rank > 2 else shape[-1:])
        pieces.append(piece)
        b, local = np.divmod(index, math.prod(shape))
        width = whole_sizes[axis]
        row, column = np.divmod(local, sizes[axis])
        row, column = (row, column + first) if by_channels else (row + first, column)
        placed.append(b * (math.prod(whole_sizes) // BATCH) + row * width + column)
        first += sizes[axis] if by_channels else math.prod(lead)
    index = np.concatenate(placed, dim)
    whole = list(pieces[0].shape)
    place = channel_axis(whole) if by_channels else 0
    whole[place] = sum(piece.shape[place] for piece in pieces)
    return seen(site.layer(Concat, pieces, tuple(whole), index), index)


def _beside(site: Site, tensors: list[Value], dim: int) -> Value:
    """Of more dimensions than an activation has: the channels of one beside those of the other, wherever they go."""
    parts = [settled(site, x) for x in tensors]
    widths = [channels_of(layer.shape) for layer, _ in parts]
    shapes = {with_channels(layer.shape, sum(widths)) for layer, _ in parts}
    if len(shapes) > 1:
        site.fail("a concatenation of activations of as many rows", f"{len(site.sizes)} dimensions")
    placed, first = [], 0
    for (layer, index), width in zip(parts, widths, strict=True):
        row, column = np.divmod(index_of(seen(layer, index)), width)
        placed.append(row * sum(widths) + first + column)
        first += width
    whole = np.concatenate(placed, dim)
    return seen(site.layer(Concat, [layer for layer, _ in parts], shapes.pop(), whole), whole)


def _behind(site: Site, constants: list[Tensor], tensors: list[Any], dim: int) -> Value:
    """Constant rows before tokens, as a class token."""
    prefix = tensors[: len(constants)]
    if (
        len(tensors) != len(constants) + 1
        or not all(isinstance(x, Tensor) for x in prefix)
        or dim != len(site.sizes) - 2
    ):
        site.fail("a concatenation of activations, or of constant rows before tokens", "a constant elsewhere")
    x = tensors[-1]
    *_, count, width = index_of(x).shape
    tokens, index = arranged(site, x, -1, (count, width))
    rows = [float64(torch.broadcast_to(row, (BATCH, *row.shape[-2:]))) for row in prefix]
    if any((row != row[:1]).any() for row in rows):
        site.fail("the same constant for all images", "others")
    if not np.array_equal(index, np.arange(index.size).reshape(index.shape)):
        site.fail("tokens [N, T, D] behind constant rows", f"{list(index.shape)}")
    table = np.concatenate([*(row[0] for row in rows), np.zeros((count, width))])
    return site.layer(Position, [tokens], table.shape, rows=table)


def stack(site: Site, tensors: list[Any], dim: int = 0) -> Value:
    if any(isinstance(x, Tensor) for x in tensors):
        site.fail("a stack of activations", "one with a constant")
    return concat(site, [seen(layer_of(x), np.expand_dims(index_of(x), dim)) for x in tensors], dim)


def index(site: Site, x: Value, indices: list[Any]) -> Value:
    """By constant indices."""
    if any(not (i is None or isinstance(i, Tensor)) for i in indices):
        site.fail("indices that are constants", "others")
    picked = tuple(slice(None) if i is None else i for i in indices)
    return seen(layer_of(x), torch.from_numpy(index_of(x).copy())[picked].numpy())
