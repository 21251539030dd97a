"""Sums, products and functions of activations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qdeploy.exporter.from_onnx.functions import FUNCTIONS
from qdeploy.exporter.from_onnx.quantized import Coded, Stored, clip, offset
from qdeploy.exporter.from_onnx.site import Site
from qdeploy.exporter.from_onnx.weighted import is_constant, real
from qdeploy.exporter.from_onnx.windows import by_place
from qdeploy.exporter.layers import AvgPool2d
from qdeploy.exporter.lowering import elementwise, norms
from qdeploy.exporter.lowering.moved import Value, sizes_of


def add(site: Site, a: Any, b: Any) -> Any:
    if any(isinstance(x, Coded) for x in (a, b)):
        return offset(site, a, b)
    if is_constant(b):
        return elementwise.affine(site, a, 1.0, real(b))
    if is_constant(a):
        return elementwise.affine(site, b, 1.0, real(a))
    return elementwise.total(site, a, b)


def total(site: Site, *values: Any) -> Value:
    """Sum of one or two, which qoperator makes of several."""
    return add(site, *values) if len(values) > 1 else values[0]


def subtract(site: Site, a: Any, b: Any) -> Value:
    if is_constant(b):
        return elementwise.affine(site, a, 1.0, -real(b))
    if is_constant(a):
        return elementwise.affine(site, b, -1.0, real(a))
    return elementwise.total(site, a, b, -1.0)


def multiply(site: Site, a: Any, b: Any) -> Value:
    if is_constant(a):
        a, b = b, a
    if not is_constant(b):
        return elementwise.product(site, a, b)
    factors = real(b)
    weighted = by_place(site, a, factors) if isinstance(a, AvgPool2d) else None
    return elementwise.affine(site, a, factors, 0.0) if weighted is None else weighted


def divide(site: Site, a: Any, b: Any) -> Value:
    if is_constant(b):
        divisor = real(b)
        if not divisor.all():
            site.fail("a divisor that is not 0", "one that is")
        return elementwise.affine(site, a, 1 / divisor, 0.0)
    if is_constant(a):
        return elementwise.function(site, lambda v: _one_number(site, a) / v, b)
    return elementwise.function(site, np.divide, a, b)


def negate(site: Site, x: Value) -> Value:
    return elementwise.affine(site, x, -1.0, 0.0)


def relu(site: Site, x: Any) -> Any:
    if isinstance(x, Coded):
        site.fail("Relu of real numbers", "Relu of codes")
    return elementwise.clamp(site, x, 0.0, math.inf)


def clamp(site: Site, x: Any, low: Any = None, high: Any = None) -> Any:
    """Its bounds are attributes up to opset 10."""
    if isinstance(x, Coded):
        return clip(site, x, low, high)
    bounds = [
        site.number(key, default) if value is None else _one_number(site, value)
        for value, key, default in ((low, "min", -math.inf), (high, "max", math.inf))
    ]
    return elementwise.clamp(site, x, *bounds)


def _one_number(site: Site, value: Any) -> float:
    if not is_constant(value) or real(value).size != 1:
        site.fail("one number for the whole tensor", "another constant" if is_constant(value) else "an activation")
    return float(real(value).reshape(()))


def prelu(site: Site, x: Value, slope: Any) -> Value:
    """One slope, or one for each channel."""
    if not is_constant(slope) or real(slope).size == 1:
        return function(site, x, slope)
    return elementwise.prelu(site, x, real(slope))


def function(site: Site, *operands: Any) -> Value:
    """An operator of FUNCTIONS: a table of the codes of the one tensor that its operands are functions of."""
    target = FUNCTIONS[site.node.op]
    numbers = [np.float64(_one_number(site, x)) if is_constant(x) else None for x in operands]

    def computed(*arrays: np.ndarray) -> np.ndarray:
        own = iter(arrays)
        return np.asarray(target(site, *(next(own) if x is None else x for x in numbers)), np.float64)

    activations = [x for x in operands if not is_constant(x)]
    with np.errstate(all="ignore"):  # of inputs or attributes that the operator lacks it fails here, at its node
        computed(*[np.zeros(1)] * len(activations))
    return elementwise.function(site, computed, *activations)


def _numbers(site: Site, value: Any, what: str) -> np.ndarray:
    """A constant in float64, which a file may hold as codes."""
    return real(value if isinstance(value, Stored) else site.constant(value, what))


def batch_norm(site: Site, x: Value, gamma: Any, beta: Any, mean: Any, variance: Any) -> Value:
    if site.integer("training_mode", 0) or not site.integer("spatial", 1):
        site.fail("BatchNormalization by running statistics of channels", "another one")
    fields = [_numbers(site, value, "a parameter").reshape(-1) for value in (gamma, beta, mean, variance)]
    if any(values.size != sizes_of(x)[1] for values in fields):
        site.fail(f"parameters for {sizes_of(x)[1]} channels", f"{[values.size for values in fields]}")
    scale, shift, means, variances = fields
    return elementwise.batch_norm(site, x, scale, shift, means, variances, site.number("epsilon", 1e-5))


def layer_norm(site: Site, x: Value, gain: Any, shift: Any = None) -> Value:
    dims = len(sizes_of(x)) - site.dimension(site.integer("axis", -1), len(sizes_of(x)))
    own = [None if value is None else _numbers(site, value, "a gain") for value in (gain, shift)]
    return norms.layer_norm(site, x, dims, own[0], own[1], site.number("epsilon", 1e-5))


def instance_norm(site: Site, x: Value, gain: Any, shift: Any) -> Value:
    own = [_numbers(site, value, "a gain").reshape(-1) for value in (gain, shift)]
    return norms.group_norm(site, x, sizes_of(x)[1], own[0], own[1], site.number("epsilon", 1e-5))


def group_norm(site: Site, x: Value, gain: Any, shift: Any) -> Value:
    """The gain is by group up to opset 20, then by channel."""
    channels, groups = sizes_of(x)[1], site.integer("num_groups", 1)
    own = [_numbers(site, value, "a gain").reshape(-1) for value in (gain, shift)]
    own = [np.repeat(value, channels // groups) if value.size == groups and groups else value for value in own]
    return norms.group_norm(site, x, groups, own[0], own[1], site.number("epsilon", 1e-5))
