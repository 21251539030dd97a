"""Norms over the elements of an activation itself."""

from __future__ import annotations

import math

import numpy as np

from qdeploy.exporter.elements import numbered
from qdeploy.exporter.layers import Layer, Norm
from qdeploy.exporter.lowering.moved import Value, image, seen, sizes_of
from qdeploy.exporter.lowering.site import Site
from qdeploy.exporter.lowering.weighted import by_rows
from qdeploy.graph import Shape

MOST = 32_767  # elements with the same statistics, of s16 codes
Gain = np.ndarray | None  # float64, of each channel


def layer_norm(site: Site, x: Value, dims: int, weight: Gain, bias: Gain, epsilon: float) -> Value:
    """Over the last `dims` dimensions."""
    sizes = list(sizes_of(x)[-dims:])
    if dims != 1:
        return _whole(site, x, sizes, weight, bias, epsilon)
    channels = sizes[0]
    _check(site, channels)
    fields = _gain(site, channels, weight, bias) | {"groups": None, "epsilon": epsilon}

    def make(layer: Layer, shape: Shape, index: np.ndarray | None) -> Layer:
        return site.layer(Norm, [layer], shape, index, **fields)

    return by_rows(site, x, make, channels)


def _whole(site: Site, x: Value, sizes: list[int], weight: Gain, bias: Gain, epsilon: float) -> Value:
    """Over channels and rows, [C, H, W]: a group norm of one group, where it has one gain for all."""
    if list(sizes_of(x)[1:]) != sizes or any(t is not None and t.min() != t.max() for t in (weight, bias)):
        site.fail("LayerNorm over channels, or over [C, H, W] with one gain for all", f"one over {sizes}")
    gains = [None if t is None else np.full(sizes[0], t.reshape(-1)[0]) for t in (weight, bias)]
    return group_norm(site, x, 1, gains[0], gains[1], epsilon)


def group_norm(site: Site, x: Value, groups: int, weight: Gain, bias: Gain, epsilon: float) -> Value:
    layer = image(site, x)
    if groups < 1 or layer.shape[0] % groups:
        site.fail(f"groups that divide {layer.shape[0]} channels", str(groups))
    _check(site, math.prod(layer.shape) // groups)
    index = numbered(layer.shape)[..., 0] if len(sizes_of(x)) == 3 else None
    gain = _gain(site, layer.shape[0], weight, bias)
    normed = site.layer(Norm, [layer], layer.shape, index, groups=groups, epsilon=epsilon, **gain)
    return seen(normed, index)


def _gain(site: Site, channels: int, weight: Gain, bias: Gain) -> dict[str, np.ndarray]:
    """Of each channel, in a file maybe one number for all."""
    found = {}
    for name, values, default in (("scale", weight, 1.0), ("shift", bias, 0.0)):
        values = np.full(1, default) if values is None else values.reshape(-1)
        if values.size not in (1, channels):
            site.fail(f"a gain and a shift for each of {channels} channels", str(values.size))
        found[name] = np.broadcast_to(values, channels).copy()
    return found


def _check(site: Site, count: int) -> None:
    if count > MOST:
        site.fail(f"a norm over at most {MOST} elements", str(count))
