"""Operators that only move elements: run on the numbers of the elements, whatever they are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdeploy.exporter.from_torch.attention import Scores, reshaped_scores
from qdeploy.exporter.from_torch.site import RIGHT_BEFORE, Site, float64
from qdeploy.exporter.layers import Layer, QuantizedWeight
from qdeploy.exporter.lowering import joined
from qdeploy.exporter.lowering.moved import (
    Moved,
    Value,
    index_of,
    layer_of,
    seen,
)


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
    missing = [0] * (len(site.sizes) - len(padding) // 2)
    before, after = (missing + [int(p) for p in padding[side::2]][::-1] for side in (0, 1))
    return joined.pad(site, x, before, after)


def concat(site: Site, tensors: list[Any], dim: int = 0) -> Value:
    constants = [x for x in tensors if isinstance(x, Tensor)]
    if not constants or len(tensors) == 1:
        return joined.concat(site, tensors, dim)
    prefix = tensors[: len(constants)]
    if (
        len(tensors) != len(constants) + 1
        or not all(isinstance(x, Tensor) for x in prefix)
        or dim % len(site.sizes) != len(site.sizes) - 2
    ):
        site.fail("a concatenation of activations, or of constant rows before tokens", "a constant elsewhere")
    return joined.behind(site, [float64(row) for row in constants], tensors[-1])


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
