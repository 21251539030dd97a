"""Operators that do the same to every element, or to two elements at one place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdeploy.exporter.elements import BATCH, channel_axis
from qdeploy.exporter.from_torch.attention import Scores, biased, scaled
from qdeploy.exporter.from_torch.moved import Value, index_of, is_bijective, layer_of, regrouped, seen, settled
from qdeploy.exporter.from_torch.site import Site, aten, float64
from qdeploy.exporter.layers import (
    Add,
    Affine,
    Clamp,
    Function,
    Image,
    Layer,
    Mul,
    Position,
    Table,
    Tokens,
    elementwise,
)
from qdeploy.ops.op import channels_of, rows_of

FUNCTION = "an elementwise operator on functions of one tensor, a sum or a product"


def each(site: Site, x: Value, kind: type[Layer], **fields: Any) -> Value:
    layer, index = settled(site, x)
    return seen(site.layer(kind, [layer], layer.shape, index, **fields), index)


# ---- With constants --------------------------------------------------------------------------------------------------


def batch_norm(
    site: Site,
    x: Value,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool = False,
) -> Value:
    if training or mean is None or variance is None:
        expected = "BatchNorm with running statistics (in eval mode, with track_running_stats)"
        site.fail(expected, "statistics of the batch")
    gamma, beta = (default if t is None else t.double() for t, default in ((weight, 1.0), (bias, 0.0)))
    scale = gamma / (variance.double() + eps).sqrt()
    shift = beta - mean.double() * scale
    behind = [1] * (len(site.sizes) - 2)
    return affine(site, x, scale.reshape(1, -1, *behind), shift.reshape(1, -1, *behind))


def batch_norm_functional(
    site: Site, x: Value, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, eps: float
) -> Value:
    return batch_norm(site, x, weight, bias, mean, variance, False, momentum, eps)


def affine(site: Site, x: Value, scale: Any, shift: Any) -> Value:
    """`scale * x + shift` with constants: one number, one per channel, or in `shift` one per row and channel."""
    layer, index = settled(site, x)
    factors, terms = (_by_element(site, constant, layer, index) for constant in (scale, shift))
    if len(factors) > 1:
        expected = "a factor that is one number or one per channel"
        site.fail(expected, f"one of shape {list(torch.as_tensor(scale).shape)}")
    if len(terms) == 1:
        return seen(site.layer(Affine, [layer], layer.shape, index, scale=factors[0], shift=terms[0]), index)
    if np.ptp(factors):
        site.fail("one number that goes with a constant for each place", "one per channel")
    return seen(_position(site, layer, index, float(factors[0, 0]), terms), index)


def _position(site: Site, layer: Layer, index: np.ndarray | None, factor: float, rows: np.ndarray) -> Layer:
    if len(layer.shape) == 2:
        return site.layer(Position, [layer], layer.shape, index, factor=factor, rows=rows)
    shape = (rows_of(layer.shape), channels_of(layer.shape))
    places = index_of(seen(layer, index))
    tokens = site.layer(Tokens, [layer], shape, places)
    return site.layer(
        Image, [site.layer(Position, [tokens], shape, places, factor=factor, rows=rows)], layer.shape, places
    )


def _by_element(site: Site, constant: Any, layer: Layer, index: np.ndarray | None) -> np.ndarray:
    """The constant for each row and channel of the layer, f64 [1 or rows, channels]."""
    value = float64(torch.as_tensor(constant))
    channels = channels_of(layer.shape)
    if value.size == 1:
        return np.full((1, channels), value.reshape(-1)[0])
    own = (BATCH, *layer.shape) if index is None else index.shape
    if value.ndim > len(own) or any(a not in (1, b) for a, b in zip(value.shape[::-1], own[::-1], strict=False)):
        site.fail("a constant that fits the tensor", f"shape {list(value.shape)} and {list(own)}")
    axis = 1 + channel_axis(layer.shape)
    aligned = (1,) * (len(own) - value.ndim) + value.shape
    if index is None and all(size == 1 for i, size in enumerate(aligned) if i != axis):
        return value.reshape(1, channels)
    spread = np.empty(BATCH * math.prod(layer.shape))
    spread[index_of(seen(layer, index)).reshape(-1)] = np.broadcast_to(value, own).reshape(-1)
    by_image = spread.reshape(BATCH, -1, channels)
    if not np.array_equal(by_image[0], by_image[1], equal_nan=True):
        site.fail("the same constant for all images", "others")
    return by_image[0, :1] if (by_image[0] == by_image[0, 0]).all() else by_image[0]


# ---- Sums and products -----------------------------------------------------------------------------------------------


def add(site: Site, a: Any, b: Any, alpha: float = 1) -> Any:
    if isinstance(a, Scores) or isinstance(b, Scores):
        return biased(site, a, b) if alpha == 1 else site.fail("attention scores plus a constant", f"alpha {alpha}")
    if not _is_value(b):
        return affine(site, a, 1.0, torch.as_tensor(b) * alpha)
    if not _is_value(a):
        return affine(site, b, alpha, a)
    a, b, index, swapped = _pair(site, a, b)
    if _ancestor([a, b]) is not None:
        return _function(site, torch.add, index, *((b, a) if swapped else (a, b)), alpha=alpha)
    factors = (float(alpha), 1.0) if swapped else (1.0, float(alpha))
    return seen(site.layer(Add, [a, b], a.shape, index, factors=factors), index)


def subtract(site: Site, a: Any, b: Any, alpha: float = 1) -> Any:
    return add(site, a, b, alpha=-alpha) if _is_value(b) else add(site, a, torch.as_tensor(b) * -alpha)


def subtract_reversed(site: Site, a: Any, b: Any, alpha: float = 1) -> Any:
    return affine(site, a, -alpha, b) if not _is_value(b) else add(site, b, a, alpha=-alpha)


def multiply(site: Site, a: Any, b: Any) -> Any:
    if isinstance(a, Scores) or isinstance(b, Scores):
        return scaled(site, a, b)
    if not _is_value(a):
        return _by_constant(site, b, a, 1)
    if not _is_value(b):
        return _by_constant(site, a, b, 0)
    a, b, index, _ = _pair(site, a, b, gate=True)
    if a.shape == b.shape and _ancestor([a, b]) is not None:
        return _function(site, torch.mul, index, a, b)
    return seen(site.layer(Mul, [a, b], a.shape, index), index)


def _by_constant(site: Site, x: Value, constant: Any, place: int) -> Value:
    """Argument number `place` by one number, or one for each channel; of another for each place of the tensor, as in
    rotary embeddings, an activation is made."""
    layer, index = settled(site, x)
    factors = _by_element(site, constant, layer, index)
    if len(factors) == 1:
        return affine(site, x, constant, 0.0)
    graph = site.trace.module.graph
    with graph.inserting_before(site.node):
        spread = graph.call_function(aten.expand_as.default, (site.argument(1 - place), site.argument(place)))
    spread.meta = site.node.meta
    filled = _position(Site(spread, site.trace, site.layers), layer, index, 0.0, factors)
    return seen(site.layer(Mul, [layer, filled], layer.shape, index), index)


def divide(site: Site, a: Any, b: Any, **kwargs: Any) -> Any:
    if kwargs or _is_value(b):
        return table(site, a, b, **kwargs)
    inverse = torch.as_tensor(b).double().reciprocal()
    return scaled(site, a, inverse) if isinstance(a, Scores) else affine(site, a, inverse, 0.0)


def negate(site: Site, x: Value) -> Value:
    return affine(site, x, -1.0, 0.0)


def _is_value(x: Any) -> bool:
    return not isinstance(x, (Tensor, int, float, bool)) and x is not None


def _pair(site: Site, a: Value, b: Value, gate: bool = False) -> tuple[Layer, Layer, np.ndarray | None, bool]:
    """Two activations of one shape, where their elements are in the result, and whether they are b and a. The second of
    a product may be a gate: one number for all rows, or of an image one for all channels."""
    if isinstance(a, Layer) and isinstance(b, Layer):
        if a.shape == b.shape:
            return a, b, None, False
        if gate and len(a.shape) == len(b.shape) == 3:
            x, other = (a, b) if (BATCH, *a.shape) == site.sizes else (b, a)
            if (BATCH, *x.shape) == site.sizes and other.shape in ((x.shape[0], 1, 1), (1, *x.shape[1:])):
                return x, other, None, x is b
    whole = [index_of(x).shape == site.sizes for x in (a, b)]
    swapped = not whole[0] or whole[1] and not is_bijective(index_of(a), layer_of(a))
    if swapped:
        a, b = b, a
    if not any(whole):
        got = " and ".join(str([*index_of(x).shape[1:]]) for x in (a, b))
        site.fail("two tensors of one shape, or one that the other fits", got)
    x, index = settled(site, a)
    places = index_of(seen(x, index))
    if layer_of(b).shape == x.shape and np.array_equal(index_of(b), places):
        return x, layer_of(b), index, swapped
    elements = np.empty(places.size, np.int64)
    elements[places.reshape(-1)] = np.broadcast_to(index_of(b), site.sizes).reshape(-1)
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


# ---- Functions of one tensor -----------------------------------------------------------------------------------------


def clamp(site: Site, x: Value, low: Any = None, high: Any = None) -> Value:
    bounds = [default if v is None else float(v) for v, default in ((low, -math.inf), (high, math.inf))]
    return each(site, x, Clamp, low=min(bounds), high=bounds[1])


def clamp_max(site: Site, x: Value, high: Any) -> Value:
    return clamp(site, x, None, high)


def relu(site: Site, x: Value) -> Value:
    return clamp(site, x, 0.0, None)


def hardtanh(site: Site, x: Value, low: float = -1.0, high: float = 1.0) -> Value:
    return clamp(site, x, low, high)


def relu6(site: Site, x: Value) -> Value:
    return clamp(site, x, 0.0, 6.0)


def table(site: Site, *args: Any, **kwargs: Any) -> Value:
    """An elementwise operator whose tensors are all functions of one tensor: a table of that tensor's codes."""
    if site.target._overloadname == "dim":
        site.fail("an elementwise operator", f"aten.{site.operator} along a dimension")
    values = [x for x in args if _is_value(x)]
    if not values or any(isinstance(x, Scores) for x in values):
        site.fail("an elementwise operator of activations", "one of attention scores")
    first, index = settled(site, values[0])
    layers = [first]
    for x in values[1:]:
        if index_of(x).shape != index_of(values[0]).shape:
            site.fail(
                "an elementwise operator on functions of one tensor, a sum or a product", "two tensors of two shapes"
            )
        first, other, index, _ = _pair(site, first if index is None else seen(first, index), x)
        layers.append(other)
    own = iter([first, *layers[1:]])
    return _function(site, site.target, index, *(next(own) if _is_value(x) else x for x in args), **kwargs)


def _function(site: Site, target: Callable[..., Tensor], index: np.ndarray | None, *args: Any, **kwargs: Any) -> Value:
    root = _ancestor([a for a in args if isinstance(a, Layer)])
    if root is None:
        site.fail(FUNCTION, "two tensors")
    functions = [_path(root, a) if isinstance(a, Layer) else _scalar(site, a) for a in args]

    def function(v: np.ndarray) -> np.ndarray:
        return target(*(torch.as_tensor(f(v)) if callable(f) else f for f in functions), **kwargs).numpy()

    return seen(site.layer(Table, [root], root.shape, index, function=function), index)


def _scalar(site: Site, constant: Any) -> Any:
    if isinstance(constant, Tensor):
        if constant.numel() != 1:
            site.fail("one number for the whole tensor", f"a constant of shape {list(constant.shape)}")
        return constant.reshape(()).double() if constant.is_floating_point() else constant.reshape(())
    return constant


def _ancestry(layer: Layer) -> list[Layer]:
    """The layer and the tensors that it is an elementwise function of, nearest first."""
    chain = [layer]
    while elementwise(chain[-1]) is not None:
        chain.append(chain[-1].inputs[0])
    return chain


def _ancestor(layers: list[Layer]) -> Layer | None:
    chains = [_ancestry(layer) for layer in layers]
    return next((layer for layer in chains[0] if all(layer in chain for chain in chains)), None)


def _path(root: Layer, layer: Layer) -> Function:
    """The function that leads from `root` to `layer`."""
    chain = _ancestry(layer)
    functions = [function for step in chain[: chain.index(root)] if (function := elementwise(step))]

    def composed(v: np.ndarray) -> np.ndarray:
        for function in reversed(functions):
            v = function(v)
        return v

    return composed
