"""Activations behind or beside each other, and with zeros around them."""

from __future__ import annotations

import math

import numpy as np

from qdeploy.exporter.elements import BATCH, channel_axis, with_channels
from qdeploy.exporter.layers import Concat, Layer, Pad, Position
from qdeploy.exporter.lowering.moved import (
    Moved,
    Value,
    arranged,
    can_have_channels,
    has_channels,
    image,
    index_of,
    layer_of,
    seen,
    settled,
    sizes_of,
)
from qdeploy.exporter.lowering.site import Site
from qdeploy.ops.op import channels_of

HOLE = np.iinfo(np.int64).min


def pad(site: Site, x: Value, before: list[int], after: list[int]) -> Value:
    """By zeros, of each dimension; less than none takes elements away."""
    sizes, batch = sizes_of(x), before[:1] + after[:1]
    if batch != [0, 0]:
        site.fail("padding of an image", "padding of the batch")
    if not any(before + after):
        return x
    if len(sizes) == 4 and not before[1] and not after[1] and min(before + after) >= 0 and has_channels(x, 1):
        picture, padding = image(site, x), [*before[2:], *after[2:]]
        height, width = (picture.shape[1 + i] + padding[i] + padding[2 + i] for i in (0, 1))
        return site.layer(Pad, [picture], (picture.shape[0], height, width), padding=padding)
    kept = tuple(slice(max(-a, 0), size - max(-b, 0)) for a, b, size in zip(before, after, sizes, strict=True))
    widths = [(max(a, 0), max(b, 0)) for a, b in zip(before, after, strict=True)]
    padded = np.pad(index_of(x)[kept], widths, constant_values=HOLE)
    zeros = np.broadcast_to(-1 - np.arange(BATCH).reshape(-1, *[1] * (padded.ndim - 1)), padded.shape)
    return Moved(layer_of(x), np.where(padded == HOLE, zeros, padded))


def concat(site: Site, tensors: list[Value], dim: int) -> Value:
    if len(tensors) == 1:
        return tensors[0]
    sizes = list(sizes_of(tensors[0]))
    rank = len(sizes)
    dim %= rank
    sizes[dim] = sum(sizes_of(x)[dim] for x in tensors)
    if dim == 0:
        site.fail("concatenation behind the batch", "dimension 0")
    layers = [x for x in tensors if isinstance(x, Layer)]
    if len(layers) == len(tensors) and (dim == 1 or rank == 3):
        return site.layer(Concat, layers, tuple(sizes[1:]))
    if sizes[0] == BATCH:
        return _beside(site, tensors, dim) if rank > 4 else _joined(site, tensors, dim)
    apart = [seen(layer_of(x), index_of(x).reshape(BATCH, -1, *index_of(x).shape[1:])) for x in tensors]  # of windows
    joined = _joined(site, apart, dim + 1)
    return seen(layer_of(joined), index_of(joined).reshape(sizes))


def _joined(site: Site, tensors: list[Value], dim: int) -> Value:
    """Of tensors that are no plain activations, or along rows. Their channels are the dimension behind the batch where
    that is so for all, else the last one."""
    whole_sizes = list(index_of(tensors[0]).shape)
    whole_sizes[dim] = sum(index_of(x).shape[dim] for x in tensors)
    rank, images = len(whole_sizes), all(len(layer_of(x).shape) == 3 for x in tensors)
    pictures = images and rank == 4 and dim == 1 and all(can_have_channels(x, 1) for x in tensors)
    axis = 1 if pictures or all(has_channels(x, 1) for x in tensors) else rank - 1
    by_channels = dim == axis
    pieces, placed, first = [], [], 0
    for x in tensors:
        sizes = index_of(x).shape
        lead = [size for i, size in enumerate(sizes) if i not in (0, axis)]
        shape = (
            (sizes[axis], *lead, 1)[:3] if images and by_channels and len(lead) < 3 else (math.prod(lead), sizes[axis])
        )
        piece, index = arranged(site, x, axis, shape if rank > 2 else (sizes[axis],))
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
        site.fail("a concatenation of activations of as many rows", f"{len(sizes_of(tensors[0]))} dimensions")
    placed, first = [], 0
    for (layer, index), width in zip(parts, widths, strict=True):
        row, column = np.divmod(index_of(seen(layer, index)), width)
        placed.append(row * sum(widths) + first + column)
        first += width
    whole = np.concatenate(placed, dim)
    return seen(site.layer(Concat, [layer for layer, _ in parts], shapes.pop(), whole), whole)


def behind(site: Site, constants: list[np.ndarray], x: Value) -> Value:
    """Constant rows before tokens, as a class token."""
    *_, count, width = index_of(x).shape
    tokens, index = arranged(site, x, -1, (count, width))
    rows = [np.broadcast_to(row, (BATCH, *row.shape[-2:])).astype(np.float64) for row in constants]
    if any((row != row[:1]).any() for row in rows):
        site.fail("the same constant for all images", "others")
    if not np.array_equal(index, np.arange(index.size).reshape(index.shape)):
        site.fail("tokens [N, T, D] behind constant rows", f"{list(index.shape)}")
    table = np.concatenate([*(row[0] for row in rows), np.zeros((count, width))])
    return site.layer(Position, [tokens], table.shape, rows=table)
