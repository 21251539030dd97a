"""What does the same to every element, or to two elements at one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import takewhile, zip_longest
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from qdeploy.exporter.elements import BATCH, channel_axis
from qdeploy.exporter.layers import (
    Add,
    Affine,
    Clamp,
    Composed,
    Function,
    Image,
    Layer,
    Mul,
    Position,
    Table,
    Tokens,
    elementwise,
)
from qdeploy.exporter.lowering.moved import Value, index_of, is_bijective, layer_of, regrouped, seen, settled, sizes_of
from qdeploy.exporter.lowering.site import Site
from qdeploy.ops.op import channels_of, rows_of

FUNCTION = "an elementwise operator on functions of one tensor, a sum or a product"


def each(site: Site, x: Value, kind: type[Layer], **fields: Any) -> Value:
    """A layer of this kind, wherever the elements are."""
    layer, index = settled(site, x)
    return seen(site.layer(kind, [layer], layer.shape, index, **fields), index)


# ---- With constants --------------------------------------------------------------------------------------------------


def affine(site: Site, x: Value, scale: ArrayLike, shift: ArrayLike) -> Value:
    """`scale * x + shift` with constants: one number, one per channel, or in `shift` one per row and channel."""
    layer, index = settled(site, x)
    factors, terms = (by_element(site, constant, layer, index) for constant in (scale, shift))
    if len(factors) > 1:
        expected = "a factor that is one number or one per channel"
        site.fail(expected, f"one of shape {list(np.shape(scale))}")
    if len(terms) == 1:
        return seen(site.layer(Affine, [layer], layer.shape, index, scale=factors[0], shift=terms[0]), index)
    if np.ptp(factors):
        site.fail("one number that goes with a constant for each place", "one per channel")
    return seen(position(site, layer, index, float(factors[0, 0]), terms), index)


def batch_norm(
    site: Site, x: Value, gamma: ArrayLike, beta: ArrayLike, mean: np.ndarray, variance: np.ndarray, epsilon: float
) -> Value:
    """All float64: one number, or one per channel, the dimension behind the batch."""
    scale = np.asarray(gamma) / np.sqrt(variance + epsilon)
    shift = np.asarray(beta) - mean * scale
    behind = [1] * (len(sizes_of(x)) - 2)
    return affine(site, x, scale.reshape(1, -1, *behind), shift.reshape(1, -1, *behind))


def position(site: Site, layer: Layer, index: np.ndarray | None, factor: float, rows: np.ndarray) -> Layer:
    """`factor * x + rows`, one row for each row of x."""
    if len(layer.shape) == 2:
        return site.layer(Position, [layer], layer.shape, index, factor=factor, rows=rows)
    shape = (rows_of(layer.shape), channels_of(layer.shape))
    places = index_of(seen(layer, index))
    tokens = site.layer(Tokens, [layer], shape, places)
    return site.layer(
        Image, [site.layer(Position, [tokens], shape, places, factor=factor, rows=rows)], layer.shape, places
    )


def by_element(site: Site, constant: ArrayLike, layer: Layer, index: np.ndarray | None) -> np.ndarray:
    """The constant for each row and channel of the layer, f64 [1 or rows, channels]."""
    value = np.asarray(constant)
    channels = channels_of(layer.shape)
    if value.size == 1:
        return np.full((1, channels), value.reshape(-1)[0], np.float64)
    own = (BATCH, *layer.shape) if index is None else index.shape
    if value.ndim > len(own) or any(a not in (1, b) for a, b in zip(value.shape[::-1], own[::-1], strict=False)):
        site.fail("a constant that fits the tensor", f"shape {list(value.shape)} and {list(own)}")
    axis = 1 + channel_axis(layer.shape)
    aligned = (1,) * (len(own) - value.ndim) + value.shape
    if index is None and all(size == 1 for i, size in enumerate(aligned) if i != axis):
        return value.reshape(1, channels).astype(np.float64)
    spread = np.empty(BATCH * math.prod(layer.shape))
    spread[index_of(seen(layer, index)).reshape(-1)] = np.broadcast_to(value, own).reshape(-1)
    by_image = spread.reshape(BATCH, -1, channels)
    if not np.array_equal(by_image[0], by_image[1], equal_nan=True):
        site.fail("the same constant for all images", "others")
    return by_image[0, :1] if (by_image[0] == by_image[0, 0]).all() else by_image[0]


def prelu(site: Site, x: Value, slope: ArrayLike) -> Value:
    """`x` above 0, `slope * x` below it; the slope is one number, or one per channel."""
    layer, index = settled(site, x)
    slopes = by_element(site, slope, layer, index)
    if len(slopes) > 1:
        site.fail("a slope that is one number or one per channel", f"one of shape {list(np.shape(slope))}")
    own = slopes.reshape(-1, 1) if np.ptp(slopes) else slopes[0, :1]

    def function(v: np.ndarray) -> np.ndarray:
        return np.where(v < 0, own * v, v)

    return seen(site.layer(Table, [layer], layer.shape, index, function=function, by_channel=len(own) > 1), index)


def clamp(site: Site, x: Value, low: float, high: float) -> Value:
    """The upper bound holds where they cross."""
    return each(site, x, Clamp, low=min(low, high), high=high)


# ---- Sums and products -----------------------------------------------------------------------------------------------


def total(site: Site, a: Value, b: Value, factor: float = 1.0) -> Value:
    """`a + factor * b`."""
    first, second, index, swapped = pair(site, a, b)
    factors = (factor, 1.0) if swapped else (1.0, factor)
    if ancestor([first, second]) is not None:
        return _table(site, lambda u, v: factors[0] * u + factors[1] * v, index, [first, second])
    return seen(site.layer(Add, [first, second], first.shape, index, factors=factors), index)


def product(site: Site, a: Value, b: Value) -> Value:
    first, second, index, _ = pair(site, a, b, gate=True)
    if first.shape == second.shape and ancestor([first, second]) is not None:
        return _table(site, np.multiply, index, [first, second])
    return seen(site.layer(Mul, [first, second], first.shape, index), index)


def pair(site: Site, a: Value, b: Value, gate: bool = False) -> tuple[Layer, Layer, np.ndarray | None, bool]:
    """Two activations of one shape, where their elements are in the result, and whether they are b and a. The second of
    a product may be a gate: one number for all rows, or of an image one for all channels."""
    try:
        sizes = np.broadcast_shapes(sizes_of(a), sizes_of(b))
    except ValueError:
        _unlike(site, a, b)
    if isinstance(a, Layer) and isinstance(b, Layer):
        if a.shape == b.shape:
            return a, b, None, False
        if gate and len(a.shape) == len(b.shape) == 3:
            x, other = (a, b) if (BATCH, *a.shape) == sizes else (b, a)
            if (BATCH, *x.shape) == sizes and other.shape in ((x.shape[0], 1, 1), (1, *x.shape[1:])):
                return x, other, None, x is b
    whole = [sizes_of(x) == sizes for x in (a, b)]
    swapped = not whole[0] or whole[1] and not is_bijective(index_of(a), layer_of(a))
    if swapped:
        a, b = b, a
    if not any(whole):
        _unlike(site, a, b)
    x, index = settled(site, a)
    places = index_of(seen(x, index))
    if layer_of(b).shape == x.shape and np.array_equal(index_of(b), places):
        return x, layer_of(b), index, swapped
    elements = np.empty(places.size, np.int64)
    elements[places.reshape(-1)] = np.broadcast_to(index_of(b), sizes).reshape(-1)
    size = math.prod(layer_of(b).shape)
    by_image = elements.reshape(BATCH, rows_of(x.shape), channels_of(x.shape))
    local = np.where(by_image < 0, -1, by_image % size)
    if (local != local[:1]).any() or (by_image[0] >= size).any():
        site.fail("an operator that keeps the images of a batch apart", "one that mixes them")
    rows, shape = local[0], x.shape
    if gate and len(rows) > 1 and (rows == rows[:1]).all() and len(shape) > 1:
        rows, shape = rows[:1], (shape[0], 1, 1) if len(shape) == 3 else (1, shape[1])
    elif gate and len(shape) == 3 and shape[0] > 1 and (rows == rows[:, :1]).all():
        rows, shape = rows[:, :1], (1, *shape[1:])
    return x, regrouped(site, layer_of(b), rows, shape), index, swapped


def _unlike(site: Site, a: Value, b: Value) -> NoReturn:
    got = " and ".join(str([*sizes_of(x)[1:]]) for x in (a, b))
    site.fail("two tensors of one shape, or one that the other fits", got)


# ---- Functions of one tensor -----------------------------------------------------------------------------------------


def function(site: Site, target: Callable[..., np.ndarray], *values: Value) -> Value:
    """An elementwise function of tensors that are all functions of one tensor: a table of that tensor's codes."""
    first, index = settled(site, values[0])
    layers = [first]
    for x in values[1:]:
        if sizes_of(x) != sizes_of(values[0]):
            site.fail(FUNCTION, "two tensors of two shapes")
        first, other, index, _ = pair(site, seen(first, index), x)
        layers.append(other)
    return _table(site, target, index, [first, *layers[1:]])


def _table(site: Site, target: Callable[..., np.ndarray], index: np.ndarray | None, layers: list[Layer]) -> Value:
    root = ancestor(layers)
    if root is None:
        site.fail(FUNCTION, "two tensors")
    functions = [_path(root, layer) for layer in layers]

    def composed(v: np.ndarray) -> np.ndarray:
        return target(*(f(v) for f in functions))

    return seen(site.layer(Table, [root], root.shape, index, function=composed), index)


def ancestor(layers: list[Layer]) -> Layer | None:
    """The nearest tensor of which all these are elementwise functions."""
    ways = [_ancestry(layer) for layer in layers]
    seen: list[set[Layer]] = [set() for _ in ways]
    for step in zip_longest(*ways):  # side by side: of a chain of a thousand functions only as much as it takes
        for layer, known in zip(step, seen, strict=True):
            known.add(layer)
        for layer in step:
            if layer is not None and all(layer in known for known in seen):
                return layer
    return None


def _ancestry(layer: Layer) -> Iterator[Layer]:
    """The layer and the tensors that it is an elementwise function of, nearest first."""
    yield layer
    while elementwise(layer) is not None:
        layer = layer.inputs[0]
        yield layer


def _path(root: Layer, layer: Layer) -> Function:
    """The function that leads from `root` to `layer`."""
    steps = takewhile(lambda step: step is not root, _ancestry(layer))
    functions = [function for step in steps if (function := elementwise(step))]
    return Composed(tuple(reversed(functions)))
