"""Pools, reductions and resizes."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from qdeploy.exporter.elements import numbered
from qdeploy.exporter.layers import AvgPool2d, Band, Codes, Conv2d, Layer, MaxPool2d, Mean, Resize
from qdeploy.exporter.lowering.moved import Value, arranged, batch_axis, image, index_of, layer_of, seen, sizes_of
from qdeploy.exporter.lowering.site import Site

RESIZE_BITS = 11  # of each axis: 255*2048*2048 < 2^31


def max_pool(site: Site, x: Layer, window: dict[str, list[int]]) -> Layer:
    return site.layer(MaxPool2d, [x], pooled(x, window), window=window)


def pooled(x: Layer, window: dict[str, list[int]]) -> tuple[int, ...]:
    """The shape of what windows with kernel, stride, padding and maybe dilation make of x."""
    sizes = []
    for i in (0, 1):
        reach = window.get("dilation", [1, 1])[i] * (window["kernel"][i] - 1) + 1
        whole = x.shape[1 + i] + window["padding"][i] + window["padding"][2 + i]
        sizes.append((whole - reach) // window["stride"][i] + 1)
    return (x.shape[0], *sizes)


def average(site: Site, x: Layer, window: dict[str, list[int]], counts: np.ndarray, divisors: np.ndarray) -> Layer:
    """`counts` real elements are in each window, whose sum is divided by `divisors`: the engine divides by a function
    of the count."""
    by_count = np.ones(math.prod(window["kernel"]))
    for count, value in set(zip(counts.tolist(), divisors.tolist(), strict=True)):
        by_count[int(count) - 1] = value
    if not np.array_equal(by_count[counts.astype(int) - 1], divisors):
        site.fail(
            "windows of as many elements to be divided by one number",
            "ceil_mode with count_include_pad; set one to False",
        )
    used = np.unique(divisors)
    divisors = used if len(used) == 1 else by_count
    return site.layer(AvgPool2d, [x], pooled(x, window), window=window, divisors=divisors)


def averages(size: int, target: int) -> tuple[np.ndarray, float]:
    """An axis of an adaptive pool as integers, exact, and the number that makes averages of the sums."""
    windows = [(i * size // target, -(-(i + 1) * size // target)) for i in range(target)]
    common = math.lcm(*(stop - start for start, stop in windows))
    matrix = np.zeros((target, size), np.int64)
    for i, (start, stop) in enumerate(windows):
        matrix[i, start:stop] = common // (stop - start)
    return matrix, 1 / common


# ---- Resize ----------------------------------------------------------------------------------------------------------


def in_bits(matrix: np.ndarray) -> np.ndarray:
    """Weights in integers whose rows have the sum that they had: the largest takes what rounding left."""
    scaled = matrix * 2**RESIZE_BITS
    whole = np.rint(scaled).astype(np.int64)
    rest = np.rint(scaled.sum(1)).astype(np.int64) - whole.sum(1)
    whole[np.arange(len(whole)), np.abs(whole).argmax(1)] += rest
    return whole


def resize(site: Site, x: Layer, rows: tuple[np.ndarray, float], columns: tuple[np.ndarray, float]) -> Layer:
    bands = _band(rows[0]), _band(columns[0])
    most = [int(np.abs(band.weight).sum(1).max()) for band in bands]
    if 255 * most[0] * most[1] >= 2**31:
        site.fail("windows whose weights have sums below 2^31", f"255*{most[0]}*{most[1]}")
    shape = (x.shape[0], len(rows[0]), len(columns[0]))
    return site.layer(Resize, [x], shape, rows=bands[0], columns=bands[1], scale=np.array([rows[1] * columns[1]]))


def _band(matrix: np.ndarray) -> Band:
    used = matrix != 0
    first = used.argmax(1)
    width = int((matrix.shape[1] - used[:, ::-1].argmax(1) - first).max())
    start = np.minimum(first, matrix.shape[1] - width)
    weight = np.take_along_axis(matrix, start[:, None] + np.arange(width), 1)
    return Band(start.astype(np.int32), weight.astype(np.int32))


# ---- Reductions ------------------------------------------------------------------------------------------------------


def reduce(site: Site, x: Value, dims: Collection[int], keep: bool, kind: str) -> Value:
    """`kind` is amax, sum or mean: of height, width or both, of tokens, or (no maximum) of the channels of an image."""
    rank = len(sizes_of(x))
    reduced = {d % rank for d in dims}
    if (batch := batch_axis(x)) > 0:  # [T, N, D]
        first = seen(layer_of(x), np.moveaxis(index_of(x), batch, 0))
        result = reduce(site, first, [0 if d == batch else d + (d < batch) for d in reduced], keep, kind)
        behind = batch if keep else batch - sum(d < batch for d in reduced)
        return seen(layer_of(result), np.moveaxis(index_of(result), 0, behind))
    free = [d for d in range(1, rank) if d not in reduced]
    if not reduced or 0 in reduced or rank not in (3, 4):
        site.fail("a reduction over height, width or both", f"one over dimensions {sorted(reduced) or 'all'} of {rank}")
    if not free or rank == 4 and reduced == {1}:
        return _of_channels(site, x, reduced, keep, kind)
    if rank == 3 and free == [2] and len(layer_of(x).shape) == 2:
        return _of_tokens(site, x, keep, kind)
    return _of_pixels(site, x, reduced, free[0] if rank == 3 or free[0] == 1 else free[-1], keep, kind)


def _of_tokens(site: Site, x: Value, keep: bool, kind: str) -> Value:
    if kind == "amax":
        site.fail("a mean or sum over tokens", "a maximum")
    count, width = sizes_of(x)[1:]
    tokens, _ = arranged(site, x, 2, (count, width))
    divisors = np.arange(1.0, count + 1) if kind == "mean" else np.ones(count)
    pooled = site.layer(Mean, [tokens], (width,), divisors=divisors)
    return seen(pooled, np.expand_dims(numbered(pooled.shape), 1) if keep else None)


def _of_pixels(site: Site, x: Value, reduced: set[int], axis: int, keep: bool, kind: str) -> Value:
    """One pool, where dimension `axis` is the channels."""
    sizes = sizes_of(x)
    lead = [d for d in range(1, len(sizes)) if d != axis]
    picture = _picture(site, x, axis, (sizes[axis], *(sizes[d] for d in lead), 1)[:3])
    kernel = [sizes[d] if d in reduced else 1 for d in lead] + [1] * (2 - len(lead))
    shape = (sizes[axis], *(size // k for size, k in zip(picture.shape[1:], kernel, strict=True)))
    window = {"kernel": kernel, "stride": kernel, "padding": [0] * 4}
    index = numbered(shape) if len(lead) == 2 else numbered(shape)[..., 0]
    index = np.moveaxis(index, 1, axis)
    index = index if keep else index.reshape([s for d, s in enumerate(index.shape) if d not in reduced])
    if kind == "amax":
        return seen(site.layer(MaxPool2d, [picture], shape, index, window=window | {"dilation": [1, 1]}), index)
    divisors = np.array([float(math.prod(kernel)) if kind == "mean" else 1.0])
    return seen(site.layer(AvgPool2d, [picture], shape, index, window=window, divisors=divisors), index)


def _picture(site: Site, x: Value, axis: int, shape: tuple[int, ...]) -> Layer:
    return x if isinstance(x, Layer) and x.shape == shape and axis == 1 else arranged(site, x, axis, shape)[0]


def _of_channels(site: Site, x: Value, reduced: set[int], keep: bool, kind: str) -> Value:
    """A convolution by ones."""
    if reduced != {1} or kind == "amax":
        what = "a maximum" if kind == "amax" else "one"
        site.fail(
            "a reduction over height, width or both", f"{what} over dimensions {sorted(reduced)} of {len(sizes_of(x))}"
        )
    picture = image(site, x)
    channels, height, width = picture.shape
    scale = np.array([1 / channels if kind == "mean" else 1.0])
    index = numbered((1, height, width))
    index = index if keep else index[:, 0]
    window = {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1}
    ones = Codes(np.ones((1, channels, 1, 1), np.int8), 2)
    fields = {"weight": ones, "scale": scale, "shift": np.zeros(1), "window": window}
    return seen(site.layer(Conv2d, [picture], (1, height, width), index, **fields), index)
