"""Operators that do the same to every element, or to two elements at one place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdeploy.exporter.from_torch.attention import Scores, biased, scaled
from qdeploy.exporter.from_torch.site import Site, aten, float64
from qdeploy.exporter.layers import Mul
from qdeploy.exporter.lowering import elementwise as rules
from qdeploy.exporter.lowering.moved import Value, seen, settled

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
    gamma, beta = (default if t is None else float64(t) for t, default in ((weight, 1.0), (bias, 0.0)))
    return rules.batch_norm(site, x, gamma, beta, float64(mean), float64(variance), eps)


def batch_norm_functional(
    site: Site, x: Value, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, eps: float
) -> Value:
    return batch_norm(site, x, weight, bias, mean, variance, False, momentum, eps)


def affine(site: Site, x: Value, scale: Any, shift: Any) -> Value:
    return rules.affine(site, x, _array(scale), _array(shift))


def _array(constant: Any) -> Any:
    return float64(constant) if isinstance(constant, Tensor) else constant


# ---- Sums and products -----------------------------------------------------------------------------------------------


def add(site: Site, a: Any, b: Any, alpha: float = 1) -> Any:
    if isinstance(a, Scores) or isinstance(b, Scores):
        return biased(site, a, b) if alpha == 1 else site.fail("attention scores plus a constant", f"alpha {alpha}")
    if not _is_value(b):
        return affine(site, a, 1.0, torch.as_tensor(b) * alpha)
    if not _is_value(a):
        return affine(site, b, alpha, a)
    return rules.total(site, a, b, float(alpha))


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
    return rules.product(site, a, b)


def _by_constant(site: Site, x: Value, constant: Any, place: int) -> Value:
    """Argument number `place` by one number, or one for each channel; of another for each place of the tensor, as in
    rotary embeddings, an activation is made."""
    layer, index = settled(site, x)
    factors = rules.by_element(site, _array(constant), layer, index)
    if len(factors) == 1:
        return affine(site, x, constant, 0.0)
    graph = site.trace.module.graph
    with graph.inserting_before(site.node):
        spread = graph.call_function(aten.expand_as.default, (site.argument(1 - place), site.argument(place)))
    spread.meta = site.node.meta
    filled = rules.position(Site(spread, site.trace, site.layers), layer, index, 0.0, factors)
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


# ---- Functions of one tensor -----------------------------------------------------------------------------------------


def clamp(site: Site, x: Value, low: Any = None, high: Any = None) -> Value:
    bounds = [default if v is None else float(v) for v, default in ((low, -math.inf), (high, math.inf))]
    return rules.clamp(site, x, *bounds)


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
    arguments = [None if _is_value(x) else (_scalar(site, x),) for x in args]

    def target(*arrays: np.ndarray) -> np.ndarray:
        own = iter(map(torch.as_tensor, arrays))
        return site.target(*(next(own) if x is None else x[0] for x in arguments), **kwargs).numpy()

    return rules.function(site, target, *values)


def _scalar(site: Site, constant: Any) -> Any:
    if isinstance(constant, Tensor):
        if constant.numel() != 1:
            site.fail("one number for the whole tensor", f"a constant of shape {list(constant.shape)}")
        return constant.reshape(()).double() if constant.is_floating_point() else constant.reshape(())
    return constant
