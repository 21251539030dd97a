"""Convolutions and linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from qdeploy.exporter.elements import BATCH, numbered, with_channels
from qdeploy.exporter.layers import Conv2d, Layer, Linear, QuantizedWeight
from qdeploy.exporter.lowering.moved import Value, arranged, image, index_of, layer_of, seen, sizes_of, vector
from qdeploy.exporter.lowering.site import Site
from qdeploy.graph import Shape
from qdeploy.ops.op import channels_of

Make = Callable[[Layer, Shape, np.ndarray | None], Layer]  # from an input, and the shape and index of the output
Weight = QuantizedWeight | np.ndarray


def convolution(site: Site, x: Value, weight: Weight, shift: np.ndarray, window: dict[str, Any]) -> Value:
    """Of [N, C, H, W], or of [N, C, L] as [C, L, 1] by a kernel [K, 1]. `window`: stride, padding and dilation of one
    or two dimensions, and groups; padding is that before each dimension, then that behind each."""
    own = image(site, x)
    if len(sizes_of(x)) == 4:
        return site.layer(Conv2d, [own], _convolved(own, weight, window), **_fields(weight, shift, window))
    tall = weight.reshape((*weight.shape, 1))
    before, behind = window["padding"]
    window = window | {
        "stride": [*window["stride"], 1],
        "padding": [before, 0, behind, 0],
        "dilation": [*window["dilation"], 1],
    }
    shape = _convolved(own, tall, window)
    index = numbered(shape)[..., 0]
    return seen(site.layer(Conv2d, [own], shape, index, **_fields(tall, shift, window)), index)


def transposed_convolution(
    site: Site, x: Value, weight: Weight, shift: np.ndarray, window: dict[str, Any], more: list[int]
) -> Value:
    """Of [N, C, H, W] or [N, C, L], by a weight with the output channels first. `more`: output_padding.

    Where the kernel is the stride, each pixel alone makes kernel x kernel pixels: a 1x1 convolution with the channels
    (kh, kw, o), whose parts are pixels of their own.
    """
    channels, kernel = weight.shape[0], list(weight.shape[2:])
    plain = {"stride": kernel, "padding": [0] * 2 * len(kernel), "dilation": [1] * len(kernel), "groups": 1}
    wrong = [f"{key} {window[key]}" for key in plain if window[key] != plain[key]]
    wrong += [f"output_padding {more}"] if any(more) else []
    if wrong:
        expected = f"a transposed convolution by its kernel {kernel} as stride, without padding, dilation and groups"
        site.fail(expected, ", ".join(wrong))
    own = image(site, x)
    by_place = _by_place(weight)
    shape = (by_place.shape[0], *own.shape[1:])
    index = _spread(shape, channels, (*kernel, 1)[:2])
    index = index.reshape(index.shape[: len(sizes_of(x))])
    fields = _fields(by_place, np.tile(shift, math.prod(kernel)), one_pixel())
    return seen(site.layer(Conv2d, [own], shape, index, **fields), index)


def _spread(shape: Shape, channels: int, kernel: tuple[int, ...]) -> np.ndarray:
    """The elements of [kh*kw*O, H, W] as [BATCH, O, kh*H, kw*W]."""
    (_, height, width), (kh, kw) = shape, kernel
    numbers = numbered(shape).reshape(BATCH, kh, kw, channels, height, width)
    return numbers.transpose(0, 3, 4, 1, 5, 2).reshape(BATCH, channels, height * kh, width * kw)


def _by_place(weight: Weight) -> Weight:
    """[O, I, kh, kw] as [kh*kw*O, I, 1, 1]."""
    value = weight.value if isinstance(weight, QuantizedWeight) else weight
    turned = np.moveaxis(value, (0, 1), (-2, -1)).reshape(-1, value.shape[1], 1, 1)
    if not isinstance(weight, QuantizedWeight):
        return turned
    step = np.tile(weight.step, len(turned) // len(value)) if weight.step.ndim else weight.step
    return replace(weight, value=turned, step=step)


def one_pixel() -> dict[str, Any]:
    """The window of a 1x1 convolution."""
    return {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1}


def _fields(weight: Weight, shift: np.ndarray, window: dict[str, Any]) -> dict[str, Any]:
    return {"weight": weight, "scale": np.ones(weight.shape[0]), "shift": shift, "window": window}


def _convolved(x: Layer, weight: Weight, window: dict[str, Any]) -> Shape:
    kernel, padding = weight.shape[2:], window["padding"]
    sizes = [
        (x.shape[1 + i] + padding[i] + padding[2 + i] - window["dilation"][i] * (kernel[i] - 1) - 1)
        // window["stride"][i]
        + 1
        for i in (0, 1)
    ]
    return (weight.shape[0], *sizes)


def linear(site: Site, x: Value, weight: Weight, shift: np.ndarray) -> Value:
    """By a weight [O, I], of the last dimension of x."""
    fields = {"weight": weight, "scale": np.ones(weight.shape[0]), "shift": shift}

    def make(layer: Layer, shape: Shape, index: np.ndarray | None) -> Layer:
        return row_by_row(site, layer, shape, index, **fields)

    return by_rows(site, x, make, weight.shape[0])


def row_by_row(site: Site, layer: Layer, shape: Shape, index: np.ndarray | None, **fields: Any) -> Layer:
    """A linear layer of each row: of an image a 1x1 convolution."""
    if len(layer.shape) < 3:
        return site.layer(Linear, [layer], shape, index, **fields)
    weight = fields["weight"].reshape((*fields["weight"].shape, 1, 1))
    return site.layer(Conv2d, [layer], shape, index, window=one_pixel(), **fields | {"weight": weight})


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
