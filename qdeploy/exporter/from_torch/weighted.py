"""conv1d, conv2d, linear and embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdeploy.exporter.elements import BATCH, numbered, with_channels
from qdeploy.exporter.from_torch.moved import Value, arranged, image, index_of, layer_of, seen, vector
from qdeploy.exporter.from_torch.site import OPERATOR, Site, dequantized, float64
from qdeploy.exporter.layers import Conv2d, Embedding, Input, Layer, Linear, QuantizedWeight
from qdeploy.graph import Shape
from qdeploy.ops.op import channels_of

Make = Callable[[Layer, Shape, np.ndarray | None], Layer]  # from an input, and the shape and index of the output


def pairs(value: Any) -> list[int]:
    values = [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return values * 2 if len(values) == 1 else values


def conv2d(
    site: Site,
    x: Value,
    weight: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Layer:
    return _conv(site, image(site, x), site.shape, weight, bias, stride, padding, dilation, groups, None)


def conv1d(
    site: Site,
    x: Value,
    weight: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    """As a convolution of [C, L, 1] by a kernel [K, 1]."""
    tall = weight.reshape((*weight.shape, 1))
    beside = padding if isinstance(padding, str) else [*_one(padding), 0]
    channels, length = site.shape
    tiles, gaps = [*_one(stride), 1], [*_one(dilation), 1]
    shape = (channels, length, 1)
    index = numbered(shape)[..., 0]
    return seen(_conv(site, image(site, x), shape, tall, bias, tiles, beside, gaps, groups, index), index)


def _one(value: Any) -> list[int]:
    return [int(value[0])] if isinstance(value, (list, tuple)) else [int(value)]


def _conv(
    site: Site,
    x: Layer,
    shape: Shape,
    weight: Any,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    index: np.ndarray | None,
) -> Layer:
    dilation = pairs(dilation)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = [total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2]
    else:
        padding = [0, 0] * 2 if padding == "valid" else pairs(padding) * 2
    window = {"stride": pairs(stride), "padding": padding, "dilation": dilation, "groups": groups}
    return site.layer(Conv2d, [x], shape, index, window=window, **_weighted(site, weight, bias))


def linear(site: Site, x: Value, weight: Any, bias: Tensor | None = None) -> Value:
    fields = _weighted(site, weight, bias)

    def make(layer: Layer, shape: Shape, index: np.ndarray | None) -> Layer:
        return row_by_row(site, layer, shape, index, **fields)

    return by_rows(site, x, make, fields["weight"].shape[0])


def row_by_row(site: Site, layer: Layer, shape: Shape, index: np.ndarray | None, **fields: Any) -> Layer:
    """A linear layer of each row: of an image a 1x1 convolution."""
    if len(layer.shape) < 3:
        return site.layer(Linear, [layer], shape, index, **fields)
    window = {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1}
    weight = fields["weight"].reshape((*fields["weight"].shape, 1, 1))
    return site.layer(Conv2d, [layer], shape, index, window=window, **fields | {"weight": weight})


def by_rows(site: Site, x: Value, make: Make, channels: int) -> Value:
    """What `make` does to the last dimension, [..., D] to [..., channels], wherever the rows are."""
    if index_of(x).ndim == 2 and index_of(x).shape[0] == BATCH:
        return make(vector(site, x), (channels,), None)
    layer, index = layer_of(x), index_of(x)
    width = channels_of(layer.shape)
    first = index[..., 0]
    whole = width == index.shape[-1] and np.array_equal(index, first[..., None] + np.arange(width))
    count = BATCH * math.prod(layer.shape) // width
    if not whole or first.min() < 0 or (first % width).any() or len(np.unique(first)) < count:
        rows = math.prod(index.shape[:-1]) // BATCH
        layer, index = arranged(site, x, -1, (rows, index.shape[-1]))
        width = index.shape[-1]
        first = index[..., 0]
    index = first[..., None] // width * channels + np.arange(channels)
    shape = with_channels(layer.shape, channels)
    return seen(make(layer, shape, index), index)


def _weighted(site: Site, weight: Any, bias: Tensor | None) -> dict[str, Any]:
    """The fields that conv2d and linear share."""
    if not isinstance(weight, (QuantizedWeight, Tensor)):
        site.fail("a weight that does not depend on the input", "one that does")
    channels = weight.shape[0]
    shift = np.zeros(channels) if bias is None else float64(bias)
    return {"weight": _held(weight), "scale": np.ones(channels), "shift": shift}


def _held(weight: QuantizedWeight | Tensor) -> QuantizedWeight | np.ndarray:
    """As a layer holds it."""
    return weight if isinstance(weight, QuantizedWeight) else weight.numpy()


def embedding(site: Site, weight: Any, ids: Any, *_: Any, **__: Any) -> Any:
    """Of the network's input; of constant ids it is a constant."""
    if isinstance(ids, Tensor):
        table = dequantized(weight) if isinstance(weight, QuantizedWeight) else weight
        return torch.nn.functional.embedding(ids, table)
    if not isinstance(ids, Input):
        site.fail("token ids that are the network's input", "others")
    shape = (*ids.shape, weight.shape[1])
    ones = np.ones(weight.shape[0])
    rows = np.zeros(shape)
    return site.layer(Embedding, [ids], shape, weight=_held(weight), scale=ones, shift=np.zeros(1), rows=rows)


def no_padding(site: Site, ids: Any, padding: Any) -> Tensor:
    """Whether tokens are no padding (RoBERTa counts positions by it): texts of the engine have none."""
    if not isinstance(ids, Input) or isinstance(padding, Layer) or site.sizes != (BATCH, *ids.shape):
        site.fail(OPERATOR, "aten.ne")
    return torch.ones(site.sizes, dtype=torch.bool)
