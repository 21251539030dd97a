"""What layers with weights read on calibration data: mean, mean square and mean products of their columns.

A column is one weight of each output channel. It sees one number at each position of the output, and 0 where that
number is padding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from qdeploy import reference
from qdeploy.exporter.calibrate import Observers, check_finite
from qdeploy.exporter.emit import EMIT, IDS
from qdeploy.exporter.layers import Conv2d, Layer, Linear, MaxPool2d
from qdeploy.graph import Activation, Node

POSITIONS = 64  # of each image, for products: neighbours see nearly the same


class Columns:
    """What the columns of one layer have seen so far. `products`: whether those of all pairs are wanted."""

    def __init__(self, layer: Conv2d | Linear, products: bool):
        self.layer, self.images = layer, 0
        self.groups = layer.window["groups"] if isinstance(layer, Conv2d) else 1
        self.total = np.zeros(layer.inputs[0].shape)  # of all images
        self.squares = np.zeros(layer.inputs[0].shape)
        count = math.prod(layer.weight.shape[1:])
        self._outer = np.zeros((self.groups, count, count) if products else 0, np.float32)
        self._positions, self._random = 0, np.random.default_rng(0)
        self._sources = _sources(layer.inputs[0])
        self._held: dict[Layer, np.ndarray] = {}

    def observers(self) -> Observers:
        return {source: functools.partial(self._take, source) for source in self._sources}

    def _take(self, source: Layer, values: np.ndarray) -> None:
        check_finite(source, values)
        self._held[source] = values
        if len(self._held) == len(self._sources):
            self._add(_moved(self.layer.inputs[0], self._held))
            self._held = {}

    def _add(self, x: np.ndarray) -> None:
        self.images += len(x)
        self.total += x.sum(0, dtype=np.float64)
        self.squares += np.square(x, dtype=np.float64).sum(0)
        if self._outer.size:
            seen = self._seen(x)
            self._positions += seen.shape[1]
            self._outer += seen.swapaxes(1, 2) @ seen

    def means(self) -> np.ndarray:
        """Over all positions of all images, float64 [groups, columns]."""
        return self._by_column(self.total) / self.images

    def mean_squares(self) -> np.ndarray:
        return self._by_column(self.squares) / self.images

    def mean_products(self) -> np.ndarray:
        """[groups, columns, columns]; of POSITIONS of each image, drawn at random."""
        return self._outer.astype(np.float64) / self._positions

    def _by_column(self, image: np.ndarray) -> np.ndarray:
        if not isinstance(self.layer, Conv2d):
            return image.reshape(-1, image.shape[-1]).mean(0)[None]
        return _windows(image[None], self.layer, self.layer.weight.shape[2:])[0].mean((1, 2)).reshape(self.groups, -1)

    def _seen(self, x: np.ndarray) -> np.ndarray:
        """[groups, N * positions, columns]."""
        if not isinstance(self.layer, Conv2d):
            tokens = x.reshape(len(x), -1, x.shape[-1])
            return tokens[:, self._drawn(tokens.shape[1])].reshape(1, -1, x.shape[-1])
        windows = _windows(x, self.layer, self.layer.weight.shape[2:])
        n, channels, height, width, *kernel = windows.shape
        rows, columns = np.divmod(self._drawn(height * width), width)
        seen = windows[:, :, rows, columns].reshape(n, self.groups, channels // self.groups, len(rows), *kernel)
        return seen.transpose(1, 0, 3, 2, 4, 5).reshape(self.groups, n * len(rows), -1)

    def _drawn(self, count: int) -> np.ndarray:
        return self._random.permutation(count)[:POSITIONS]


def columns_of(layers: Sequence[Conv2d | Linear], products: bool) -> dict[Layer, Columns]:
    """Those of each layer; layers that read the same share them."""
    found: dict[tuple, Columns] = {}
    result: dict[Layer, Columns] = {}
    for layer in layers:
        window = str(layer.window) if isinstance(layer, Conv2d) else ""
        key = (layer.inputs[0], layer.weight.shape[1:], window)
        if key not in found:
            found[key] = Columns(layer, products)
        result[layer] = found[key]
    return result


def _sources(layer: Layer) -> list[Layer]:
    """The layers of whose outputs `layer` is made by moves alone: the float network may have no tensor for a move."""
    if not layer.same_grid:
        return [layer]
    return list(dict.fromkeys(source for x in layer.inputs for source in _sources(x)))


def _moved(layer: Layer, values: dict[Layer, np.ndarray]) -> np.ndarray:
    """The output of `layer`, from those of its sources."""
    if layer in values:
        return values[layer]
    inputs = [_moved(x, values) for x in layer.inputs]
    if isinstance(layer, MaxPool2d):
        lowest = inputs[0].min()  # in front of all that is padded with 0
        windows = _windows(inputs[0] - lowest, layer, layer.window["kernel"])
        return functools.reduce(np.maximum, (windows[..., i, j] for i, j in np.ndindex(*windows.shape[4:]))) + lowest
    node, real = Node(layer.op, layer.name, [], 0), Activation(layer.name, layer.shape, "f32")
    EMIT[layer.op](node, layer, [IDS] * len(inputs), IDS, False)
    return reference.OPS[layer.op](node, inputs, [real] * len(inputs), real)


def _windows(x: np.ndarray, layer: Conv2d | MaxPool2d, kernel: Sequence[int]) -> np.ndarray:
    node = Node(layer.op, layer.name, [], 0, attributes=layer.window)
    return reference.windows(x, node, (kernel[0], kernel[1]), layer.window["dilation"])
