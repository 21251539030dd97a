"""A tensor that is an activation with its elements elsewhere, and how it becomes an activation itself.

What only moves elements is no layer: `view`, `permute`, `roll` and all the others are run on element numbers. A layer
for the whole chain is made where something reads the result in a form of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qdeploy.exporter.elements import BATCH, around_batch, channel_axis, in_order_of_torch, numbered, with_channels
from qdeploy.exporter.layers import Concat, Gather, Image, Layer, MaxPool2d, Reshape, Tokens
from qdeploy.exporter.lowering.site import Site
from qdeploy.graph import Shape
from qdeploy.ops.op import channels_of, rows_of

MOST_PARTS = 64  # of one activation, joined again in another order


@dataclass(frozen=True, eq=False)
class Moved:
    """Place p of the tensor, of BATCH images, holds element number index[p] of `layer`; -1 - b is 0 in image b."""

    layer: Layer
    index: np.ndarray


Value = Layer | Moved


def index_of(x: Value) -> np.ndarray:
    return x.index if isinstance(x, Moved) else numbered(x.shape)


def sizes_of(x: Value) -> tuple[int, ...]:
    return x.index.shape if isinstance(x, Moved) else (BATCH, *x.shape)


def layer_of(x: Value) -> Layer:
    return x.layer if isinstance(x, Moved) else x


def seen(layer: Layer, index: np.ndarray | None) -> Value:
    """The layer itself where `index` moves nothing."""
    plain = index is None or index.shape == (BATCH, *layer.shape) and np.array_equal(index, numbered(layer.shape))
    return layer if plain or index is None else Moved(layer, index)


def is_bijective(index: np.ndarray, layer: Layer) -> bool:
    count = BATCH * math.prod(layer.shape)
    if index.size != count or index.min() < 0:
        return False
    return bool((np.bincount(index.reshape(-1), minlength=count) == 1).all())


def batch_axis(x: Value) -> int:
    """The dimension that is the batch, or -1 where none is it alone."""
    if isinstance(x, Layer):
        return 0
    sizes, around = x.index.shape, around_batch(x.index.reshape(-1) // math.prod(x.layer.shape))
    found = [d for d, size in enumerate(sizes) if around and size == BATCH and math.prod(sizes[:d]) == around[0]]
    return found[-1] if found else -1


# ---- As an activation ------------------------------------------------------------------------------------------------


def image(site: Site, x: Value) -> Layer:
    """[N, C, H, W], or [N, C, L] as [C, L, 1]."""
    if isinstance(x, Layer) and len(x.shape) == 3:
        return x
    shape = index_of(x).shape
    if len(shape) not in (3, 4) or shape[0] != BATCH:
        got = f"one of {len(shape)} dimensions" if shape[0] == BATCH else "one that has more in dimension 0"
        site.fail("a tensor [N, C, H, W] or [N, C, L]", got)
    return arranged(site, x, 1, (*shape[1:], 1)[:3])[0]


def vector(site: Site, x: Value) -> Layer:
    """[N, F]."""
    if isinstance(x, Layer) and len(x.shape) == 1:
        return x
    index = index_of(x)
    return arranged(site, x, 1, index.shape[1:])[0]


def settled(site: Site, x: Value) -> tuple[Layer, np.ndarray | None]:
    """An activation with all elements of x, each once, and where they are in x: None for those of a plain layer."""
    if isinstance(x, Layer):
        return x, None
    if is_bijective(x.index, x.layer):
        return x.layer, x.index
    return natural(site, x)


def natural(site: Site, x: Moved) -> tuple[Layer, np.ndarray]:
    """The rows and channels of the layer that x has, in the layer's order; and where they are in x. As `arranged`, by
    the dimension that costs least, where x has zeros, or a part of the rows in other channels than another part."""
    count = math.prod(x.layer.shape)
    used = np.unique(x.index[x.index < count])
    row, column = (np.unique(part) for part in np.divmod(used, channels_of(x.layer.shape)))
    if x.index.min() < 0 or used.size != row.size * column.size:
        return _by_dimension(site, x)
    rows = row[:, None] * channels_of(x.layer.shape) + column
    layer = regrouped(site, x.layer, rows, _part(x.layer.shape, row, len(column)))
    images, local = np.divmod(x.index, count)
    return layer, images * used.size + np.searchsorted(used, local)


def _part(shape: Shape, row: np.ndarray, channels: int) -> Shape:
    """Of these rows of an activation: an image where they are whole rows and columns of pixels."""
    if len(shape) == 1:
        return (channels,)
    if len(shape) == 3:
        height, width = (np.unique(part) for part in np.divmod(row, shape[2]))
        if len(height) * len(width) == len(row):
            return (channels, len(height), len(width))
    return (len(row), channels)


def _by_dimension(site: Site, x: Moved) -> tuple[Layer, np.ndarray]:
    rank = x.index.ndim
    axes = [1, *range(rank - 1, 1, -1)] if len(x.layer.shape) == 3 else [*range(rank - 1, 0, -1)]
    whole = [axis for axis in axes if has_channels(x, axis)]
    made = [axis for axis in axes if can_have_channels(x, axis)]
    axis = next(iter((*whole, *made)), axes[0])
    lead = [size for i, size in enumerate(x.index.shape) if i not in (0, axis)]
    channels = x.index.shape[axis]
    shape: Shape = (math.prod(lead), channels)[-min(rank - 1, 2) :]
    if len(x.layer.shape) == 3 and 0 < len(lead) <= 2:
        shape = (channels, *lead, *[1] * (2 - len(lead)))
    return arranged(site, x, axis, shape)


def plain(site: Site, x: Value) -> Layer:
    """The layer whose output is x as the engine returns it: [N, F], [N, T, D] or [N, C, H, W]."""
    if isinstance(x, Layer):
        return x
    rank = x.index.ndim
    if rank == 1:  # one number an image is [N] in torch and [N, 1] in the file
        return vector(site, Moved(x.layer, x.index[:, None]))
    if rank == 2:
        return vector(site, x)
    if rank > 4:
        site.fail("an output [N, F], [N, T, D] or [N, C, H, W]", f"[N, {', '.join(map(str, x.index.shape[1:]))}]")
    if rank == 4 or rank == 3 and len(x.layer.shape) == 3:
        return image(site, x)
    return arranged(site, x, -1, x.index.shape[1:])[0]


def has_channels(x: Value, axis: int) -> bool:
    """Whether dimension `axis` of the tensor is channels of the activation."""
    return _is_made(x, axis, (_separated,))


def can_have_channels(x: Value, axis: int) -> bool:
    """Also by parts of rows, or by rows behind each other."""
    return _is_made(x, axis, (_separated, _split, _merged))


def _is_made(x: Value, axis: int, forms: Sequence[Callable[[np.ndarray, int], object]]) -> bool:
    """Whether the tensor is, or one of these gathers makes it, an activation whose channels are dimension `axis`."""
    if isinstance(x, Layer):
        return axis == (1 if len(x.shape) != 2 else 2)
    found, channels = _by_rows(x, axis), channels_of(x.layer.shape)
    return found is not None and any(form(found[0], channels) is not None for form in forms)


def _by_rows(x: Value, axis: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The elements of one image, [rows, channels] with -1 for 0, where dimension `axis` is the channels; and in which
    order of all rows those of the first image come, then those of the next. None where images are not alike."""
    index, size = np.moveaxis(index_of(x), axis, -1), math.prod(layer_of(x).shape)
    flat = index.reshape(-1, index.shape[-1])
    images = np.where(flat < 0, -1 - flat, flat // size)
    order = np.argsort(images[:, 0], kind="stable")
    if (images != images[:, :1]).any() or around_batch(images[:, 0]) is None:
        return None
    local = np.where(flat < 0, -1, flat % size)[order].reshape(BATCH, -1, flat.shape[1])
    return (local[0], order) if (local == local[0]).all() else None


def arranged(site: Site, x: Value, axis: int, shape: Shape) -> tuple[Layer, np.ndarray]:
    """x as an activation of this shape whose channels are dimension `axis` of x; and where its elements are in x."""
    found = _by_rows(x, axis)
    if found is None:
        site.fail("an operator that keeps the images of a batch apart", "one that mixes them")
    rows, order = found
    layer = regrouped(site, layer_of(x), rows, shape)
    fresh = np.empty((len(order), rows.shape[1]), np.int64)
    fresh[order] = np.arange(fresh.size).reshape(fresh.shape)
    lead = np.moveaxis(index_of(x), axis, -1).shape
    return layer, np.moveaxis(fresh.reshape(lead), -1, axis)


# ---- Layers that move ------------------------------------------------------------------------------------------------


def regrouped(site: Site, layer: Layer, rows: np.ndarray, shape: Shape) -> Layer:
    """The layer of this shape with these elements of `layer`, [rows, channels]; -1 is 0."""
    own = numbered(layer.shape)[0].reshape(-1)
    if rows.size == own.size:
        if rows.shape[1] == channels_of(layer.shape) and (rows.reshape(-1) == np.arange(own.size)).all():
            return _viewed(site, layer, shape)
        if np.array_equal(in_order_of_torch(rows, shape).reshape(-1), own):
            return site.layer(Reshape, [layer], shape)
    separated = _separated(rows, channels_of(layer.shape))
    if separated is not None:
        return _gathered(site, layer, *separated, shape)
    turned = _separated(rows.T, channels_of(layer.shape))
    if turned is not None:
        return _viewed(site, _turned(site, _gathered(site, layer, *turned, rows.shape[::-1])), shape)
    column = _channels_of_reshaped(layer.shape, rows, shape)
    if column is not None:
        whole = with_channels(shape, math.prod(layer.shape) // len(rows))
        return _take_channels(site, site.layer(Reshape, [layer], whole), column)
    if (split := _split(rows, channels_of(layer.shape))) is not None:
        return _depth_to_space(site, layer, *split, shape)
    if (merged := _merged(rows, channels_of(layer.shape))) is not None:
        return _space_to_depth(site, layer, *merged, shape)
    for along, axis in ((1, "channels"), (0, "rows")):
        parts = _alike(rows, channels_of(layer.shape), along)
        if parts is not None:
            return _joined(site, layer, rows, parts, axis, shape)
    site.fail("a move of whole rows (pixels, tokens) or whole channels", "one that takes rows into channels")


def _joined(site: Site, layer: Layer, rows: np.ndarray, parts: list[np.ndarray], axis: str, shape: Shape) -> Layer:
    """Parts that are separated, one behind the other, and then in their order."""
    if axis == "channels":
        pieces = [regrouped(site, layer, rows[:, part], with_channels(shape, len(part))) for part in parts]
        joined = site.layer(Concat, pieces, shape)
    else:
        pieces = [regrouped(site, layer, rows[part], (len(part), rows.shape[1])) for part in parts]
        joined = site.layer(Concat, pieces, rows.shape)
    order = np.argsort(np.concatenate(parts))
    if axis == "channels":
        return _take_channels(site, joined, order)
    return _viewed(
        site, joined if np.array_equal(order, np.arange(len(order))) else _take_rows(site, joined, order, shape), shape
    )


def _turned(site: Site, layer: Layer) -> Layer:
    """Tokens whose rows are the channels of `layer`: an image in the order [C, H, W] has one row after the other."""
    return site.layer(Reshape, [_viewed(site, layer, (*layer.shape[::-1], 1))], layer.shape[::-1])


def _viewed(site: Site, layer: Layer, shape: Shape) -> Layer:
    """The same rows and channels."""
    if layer.shape == shape:
        return layer
    kinds: dict[tuple[int, int], type[Layer]] = {(3, 2): Tokens, (2, 3): Image}
    return site.layer(kinds.get((len(layer.shape), len(shape)), Reshape), [layer], shape)


def _separated(rows: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Which rows and which channels make [rows, channels], if it is all of these in all of those."""
    row = np.where(rows < 0, -1, rows // channels).max(1)
    column = np.where(rows < 0, -1, rows % channels).max(0)
    made = np.where((row[:, None] < 0) | (column < 0), -1, row[:, None] * channels + column)
    return (row, column) if np.array_equal(made, rows) else None


def _split(rows: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Which channels are the parts of a row, [parts, channels of each], and which part of all rows' parts is each row
    of [rows, channels]; if each is a part of one row, and no two parts share a channel."""
    row = np.where(rows < 0, -1, rows // channels)
    if (row != row[:, :1]).any():
        return None
    index, real = row[:, 0].copy(), row[:, 0] >= 0
    column = rows[real] % channels
    _, example, part = np.unique(column[:, 0], return_index=True, return_inverse=True)  # of each part
    parts = column[example]
    if len(np.unique(parts)) < parts.size or (column != parts[part.reshape(-1)]).any():
        return None
    index[real] = index[real] * len(parts) + part.reshape(-1)
    return parts, index


def _merged(rows: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Which rows, [rows, parts], make each row when each gives these channels, and in which order all channels are then
    taken; if [rows, channels] is made so."""
    row = np.where(rows < 0, -1, rows // channels)
    column = np.where(rows < 0, -1, rows % channels).max(0)
    if (np.where(row < 0, -1, row * channels + column) != rows).any():
        return None
    taken, part = np.unique(row, axis=1, return_inverse=True)
    order = np.lexsort((column, part.reshape(-1)))
    if len(order) % taken.shape[1]:
        return None
    columns = column[order].reshape(taken.shape[1], -1)
    return (taken, columns[0], np.argsort(order)) if (columns == columns[0]).all() else None


def _depth_to_space(site: Site, layer: Layer, parts: np.ndarray, index: np.ndarray, shape: Shape) -> Layer:
    """Parts of rows are rows of fewer channels, the same in memory."""
    layer = _take_channels(site, layer, parts.reshape(-1))
    tokens = _viewed(site, layer, (rows_of(layer.shape), parts.size))
    narrow = site.layer(Reshape, [tokens], (rows_of(layer.shape) * len(parts), parts.shape[1]))
    return _gathered(site, narrow, index, np.arange(parts.shape[1]), shape)


def _space_to_depth(
    site: Site, layer: Layer, taken: np.ndarray, column: np.ndarray, order: np.ndarray, shape: Shape
) -> Layer:
    """Rows behind each other are one row of more channels, the same in memory."""
    narrow = _gathered(site, layer, taken.reshape(-1), column, (taken.size, len(column)))
    wide = site.layer(Reshape, [narrow], (len(taken), len(order)))
    return _take_channels(site, _viewed(site, wide, shape), order)


def _alike(rows: np.ndarray, channels: int, along: int) -> list[np.ndarray] | None:
    """Groups of columns (rows) of one pattern, each of which is separated; None where that are too many."""
    pattern = np.where(rows < 0, -1, rows // channels if along == 1 else rows % channels)
    kinds, first, group = np.unique(pattern, axis=along, return_index=True, return_inverse=True)
    if kinds.shape[along] > MOST_PARTS:
        return None
    parts = [np.flatnonzero(group.reshape(-1) == i) for i in np.argsort(first)]
    pieces = [rows[:, part] if along == 1 else rows[part] for part in parts]
    return parts if all(_separated(piece, channels) is not None for piece in pieces) else None


def _gathered(site: Site, layer: Layer, row: np.ndarray, column: np.ndarray, shape: Shape) -> Layer:
    if len(column) < channels_of(layer.shape):
        layer = _take_channels(site, layer, column)
        column = np.arange(len(column))
    if not np.array_equal(row, np.arange(rows_of(layer.shape))):
        layer = _take_rows(site, layer, row, with_channels(shape, channels_of(layer.shape)))
    return _viewed(site, _take_channels(site, layer, column), shape)


def _take_channels(site: Site, layer: Layer, column: np.ndarray) -> Layer:
    if np.array_equal(column, np.arange(channels_of(layer.shape))):
        return layer
    return site.layer(Gather, [layer], with_channels(layer.shape, len(column)), axis="channels", index=column)


def _channels_of_reshaped(own: Shape, rows: np.ndarray, shape: Shape) -> np.ndarray | None:
    """Which channels make [rows, channels], if these are channels of the layer reshaped in the order of torch."""
    count = math.prod(own)
    if count % len(rows):
        return None
    whole = numbered(own)[0].reshape(with_channels(shape, count // len(rows)))
    whole = np.moveaxis(whole, channel_axis(shape), -1).reshape(len(rows), -1)
    channel = np.full(count + 1, -1)  # of the elements of the first row
    channel[whole[0]] = np.arange(whole.shape[1])
    column = channel[rows[0]]
    made = np.where(column < 0, -1, whole[:, column])
    return column if np.array_equal(made, rows) else None


def _take_rows(site: Site, layer: Layer, row: np.ndarray, shape: Shape) -> Layer:
    if (stride := _stride(layer.shape, row, shape)) is not None:
        window = {"kernel": [1, 1], "stride": stride, "padding": [0] * 4, "dilation": [1, 1]}
        return site.layer(MaxPool2d, [layer], shape, window=window)
    if len(layer.shape) == 1:
        layer = _viewed(site, layer, (1, *layer.shape))
    shape = shape if len(shape) > 1 else (len(row), *shape)
    return site.layer(Gather, [layer], shape, axis="rows", index=row)


def _stride(shape: Shape, row: np.ndarray, result: Shape) -> list[int] | None:
    """Of every step-th row and column from the first on: a max pool of 1x1 windows, which every version has."""
    if len(shape) != 3 or len(result) != 3:
        return None
    stride = [-(-size // kept) for size, kept in zip(shape[1:], result[1:], strict=True)]
    height, width = (np.arange(0, size, step) for size, step in zip(shape[1:], stride, strict=True))
    return stride if np.array_equal(row, (height[:, None] * shape[2] + width).reshape(-1)) else None
