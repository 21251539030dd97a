"""Norms over the elements of an activation itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from qdeploy.exporter.elements import numbered
from qdeploy.exporter.from_torch.elementwise import batch_norm
from qdeploy.exporter.from_torch.moved import Value, image, seen, sizes_of
from qdeploy.exporter.from_torch.site import Site, float64
from qdeploy.exporter.from_torch.weighted import by_rows
from qdeploy.exporter.layers import Layer, Norm
from qdeploy.graph import Shape

MOST = 32_767  # elements with the same statistics, of s16 codes


def layer_norm(
    site: Site,
    x: Value,
    sizes: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Value:
    if len(sizes) != 1:
        return _whole(site, x, sizes, weight, bias, eps)
    channels = sizes[0]
    _check(site, channels)
    fields = _gain(channels, weight, bias) | {"groups": None, "epsilon": float(eps)}

    def make(layer: Layer, shape: Shape, index: np.ndarray | None) -> Layer:
        return site.layer(Norm, [layer], shape, index, **fields)

    return by_rows(site, x, make, channels)


def _whole(site: Site, x: Value, sizes: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Value:
    """Over channels and rows, [C, H, W]: a group norm of one group, where it has one gain for all."""
    if sizes_of(x)[1:] != tuple(sizes) or any(t is not None and t.min() != t.max() for t in (weight, bias)):
        site.fail("LayerNorm over channels, or over [C, H, W] with one gain for all", f"one over {sizes}")
    gains = [None if t is None else t.reshape(-1)[:1].expand(sizes[0]) for t in (weight, bias)]
    return group_norm(site, x, 1, gains[0], gains[1], eps)


def group_norm(
    site: Site,
    x: Value,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Value:
    layer = image(site, x)
    _check(site, math.prod(layer.shape) // groups)
    index = numbered(layer.shape)[..., 0] if len(sizes_of(x)) == 3 else None
    gain = _gain(layer.shape[0], weight, bias)
    normed = site.layer(Norm, [layer], layer.shape, index, groups=groups, epsilon=float(eps), **gain)
    return seen(normed, index)


def instance_norm(
    site: Site,
    x: Value,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    use_input: bool,
    momentum: float,
    eps: float,
    cudnn: bool = False,
) -> Value:
    """With running statistics it is a BatchNorm."""
    if not use_input:
        return batch_norm(site, x, weight, bias, mean, variance, False, momentum, eps)
    return group_norm(site, x, sizes_of(x)[1], weight, bias, eps)


def _gain(channels: int, weight: Tensor | None, bias: Tensor | None) -> dict[str, np.ndarray]:
    scale = np.ones(channels) if weight is None else float64(weight)
    return {"scale": scale, "shift": np.zeros(channels) if bias is None else float64(bias)}


def _check(site: Site, count: int) -> None:
    if count > MOST:
        site.fail(f"a norm over at most {MOST} elements", str(count))
