"""Pools and reductions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qdeploy.exporter import elements
from qdeploy.exporter.elements import numbered
from qdeploy.exporter.from_onnx.quantized import Coded
from qdeploy.exporter.from_onnx.site import Site
from qdeploy.exporter.from_onnx.weighted import WINDOW, padding, spatial
from qdeploy.exporter.layers import AvgPool2d, Layer
from qdeploy.exporter.lowering import windows
from qdeploy.exporter.lowering.moved import Value, image, seen, sizes_of

LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True, eq=False)
class Padded:
    """An activation with the least number around it, which a max pool alone may read: it pads by nothing else."""

    inside: Value
    widths: list[int]  # before height and width (or length), then behind


def max_pool(site: Site, x: Any) -> Any:
    if isinstance(x, Coded):
        return replace(x, before=max_pool(site, x.before))
    x, around = (x.inside, x.widths) if isinstance(x, Padded) else (x, [0] * 2 * (len(sizes_of(x)) - 2))
    if site.integer("storage_order", 0) or len(list(filter(None, site.node.outputs))) > 1:
        site.fail("a max pool without indices", "one with them")
    picture, window = _window(site, x, around)
    return _as(x, windows.max_pool(site, picture, window))


def average_pool(site: Site, x: Value) -> Value:
    picture, window = _window(site, x, [0] * 2 * (len(sizes_of(x)) - 2))
    if window.pop("dilation") != [1, 1]:
        site.fail("an average pool without dilation", "one with it")
    counts, whole = _counts(picture, window, [0] * 4), _counts(picture, window, _declared(site, picture, window))
    divisors = whole if site.integer("count_include_pad", 0) else counts
    return _as(x, windows.average(site, picture, window, counts.reshape(-1), divisors.reshape(-1)))


def by_place(site: Site, pool: AvgPool2d, factors: np.ndarray) -> AvgPool2d | None:
    """The average pool times a number for each place, [H, W], as to_onnx writes one whose border has factors of its
    own. None where these are other factors, or the number of elements in a window does not say which it is."""
    places = pool.shape[1:]
    if factors.size == 1 or factors.shape[-2:] != places or factors.size != np.prod(places):
        return None
    counts = _counts(pool.inputs[0], pool.window, [0] * 4).astype(int)
    before = pool.divisors[counts - 1] if pool.divisors.size > 1 else pool.divisors
    divisors = np.ones(int(np.prod(pool.window["kernel"])))
    with np.errstate(divide="ignore"):  # a factor of 0
        wanted = before / factors.reshape(places)
    divisors[counts - 1] = wanted
    if not np.array_equal(divisors[counts - 1], wanted):
        return None
    weighted = replace(pool, inputs=list(pool.inputs), value=elements.Value(site.tensor), divisors=divisors)
    site.layers.append(weighted)
    return weighted


def _as(x: Value, pooled: Layer) -> Value:
    """[N, C, L] again, where x is that."""
    return pooled if len(sizes_of(x)) == 4 else seen(pooled, numbered(pooled.shape)[..., 0])


def _window(site: Site, x: Value, around: list[int]) -> tuple[Layer, dict[str, list[int]]]:
    """Of two dimensions; `around` x is padding already. Ceil mode is more behind: as much as the last window needs."""
    count = len(sizes_of(x)) - 2
    if count not in (1, 2):
        site.fail(WINDOW, f"{count}")
    kernel = spatial(site, "kernel_shape", count, 0)
    if 0 in kernel:
        site.fail("a kernel_shape", "none")
    stride, gaps = spatial(site, "strides", count, 1), spatial(site, "dilations", count, 1)
    sizes = tuple(size + sum(around[i::count]) for i, size in enumerate(sizes_of(x)[2:]))
    pads = padding(site, sizes, kernel, stride, gaps)
    for i in range(count if site.integer("ceil_mode", 0) else 0):
        reach = gaps[i] * (kernel[i] - 1) + 1
        steps = -(-(sizes[i] + pads[i] + pads[count + i] - reach) // stride[i])
        if steps * stride[i] >= sizes[i] + pads[i]:  # a window that begins behind all elements is none
            steps -= 1
        pads[count + i] += max(0, steps * stride[i] + reach - sizes[i] - pads[i] - pads[count + i])
    pads = [a + b for a, b in zip(pads, around, strict=True)]
    one, none = [1] * (2 - count), [0] * (2 - count)
    before, behind = pads[:count] + none, pads[count:] + none
    window = {"kernel": kernel + one, "stride": stride + one, "padding": before + behind, "dilation": gaps + one}
    return image(site, x), window


def _declared(site: Site, x: Layer, window: dict[str, list[int]]) -> list[int]:
    """The padding that counts as elements: not what ceil mode added."""
    count = len(site.integers("kernel_shape") or [])
    pads = padding(site, x.shape[1 : 1 + count], window["kernel"][:count], window["stride"][:count], [1] * count)
    none = [0] * (2 - count)
    return pads[:count] + none + pads[count:] + none


def _counts(x: Layer, window: dict[str, list[int]], counted: list[int]) -> np.ndarray:
    """How many elements each window holds, f64 [H, W], with `counted` padding."""
    axes = []
    for i in (0, 1):
        starts = np.arange(windows.pooled(x, window)[1 + i]) * window["stride"][i] - window["padding"][i]
        ends = np.minimum(starts + window["kernel"][i], x.shape[1 + i] + counted[2 + i])
        axes.append(ends - np.maximum(starts, -counted[i]))
    return (axes[0][:, None] * axes[1]).astype(np.float64)


def whole_image(kind: str) -> Any:
    """GlobalAveragePool and GlobalMaxPool."""

    def rule(site: Site, x: Any) -> Any:
        if isinstance(x, Coded):
            return replace(x, before=rule(site, x.before))
        return windows.reduce(site, x, range(2, len(sizes_of(x))), True, kind)

    return rule


def reduction(kind: str) -> Any:
    """ReduceMean, ReduceSum and ReduceMax, whose axes are an attribute or an input."""

    def rule(site: Site, x: Value, axes: Any = None) -> Value:
        found = site.axes(axes)
        if not found:
            if site.integer("noop_with_empty_axes", 0):
                return x
            site.fail("a reduction over height, width or both", "one over everything")
        found = [site.dimension(axis, len(sizes_of(x))) for axis in found]
        return windows.reduce(site, x, found, bool(site.integer("keepdims", 1)), kind)

    return rule
