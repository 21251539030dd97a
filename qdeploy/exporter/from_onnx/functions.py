"""Elementwise operators as functions of numpy: of constants, in their own type, and of activations, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from qdeploy.exporter.from_onnx.site import Site

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def _gelu(site: Site, x: np.ndarray) -> np.ndarray:
    if site.text("approximate", "none") == "tanh":
        return _fast_gelu(site, x)
    return x * 0.5 * (1 + _erf(x / math.sqrt(2)))


def _fast_gelu(site: Site, x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _elu(x: np.ndarray, alpha: float) -> np.ndarray:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _celu(site: Site, x: np.ndarray) -> np.ndarray:
    alpha = site.number("alpha", 1.0)
    return np.maximum(x, 0) + np.minimum(0, alpha * np.expm1(np.minimum(x, 0) / alpha))


def _selu(site: Site, x: np.ndarray) -> np.ndarray:
    alpha, gamma = site.number("alpha", 1.67326319217681884765625), site.number("gamma", 1.05070102214813232421875)
    return gamma * _elu(x, alpha)


def _hard_sigmoid(site: Site, x: np.ndarray) -> np.ndarray:
    return np.clip(site.number("alpha", 0.2) * x + site.number("beta", 0.5), 0, 1)


def _leaky(x: np.ndarray, slope: Any) -> np.ndarray:
    return np.where(x < 0, slope * x, x)


def _thresholded(site: Site, x: np.ndarray) -> np.ndarray:
    return np.where(x > site.number("alpha", 1.0), x, 0)


def _shrink(site: Site, x: np.ndarray) -> np.ndarray:
    bias, bound = site.number("bias", 0.0), site.number("lambd", 0.5)
    return np.where(x < -bound, x + bias, np.where(x > bound, x - bias, 0))


def _divide(site: Site, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind in "iu" and np.asarray(b).dtype.kind in "iu":
        return a // np.where(b == 0, 1, b)
    return a / b


def _clip(site: Site, x: np.ndarray, low: Any = None, high: Any = None) -> np.ndarray:
    """The bounds are attributes up to opset 10."""
    low = site.number("min", -math.inf) if low is None and "min" in site.node.attributes else low
    high = site.number("max", math.inf) if high is None and "max" in site.node.attributes else high
    x = x if low is None else np.maximum(x, np.asarray(low).reshape(()))
    return x if high is None else np.minimum(x, np.asarray(high).reshape(()))


def _least(site: Site, *values: np.ndarray) -> np.ndarray:
    result = values[0]
    for value in values[1:]:
        result = np.minimum(result, value)
    return result


def _largest(site: Site, *values: np.ndarray) -> np.ndarray:
    result = values[0]
    for value in values[1:]:
        result = np.maximum(result, value)
    return result


def _sum(site: Site, *values: np.ndarray) -> np.ndarray:
    return sum(values[1:], start=values[0])


Function = Callable[..., np.ndarray]  # of a site and the operands


def _plain(function: Callable[..., Any]) -> Function:
    return lambda site, *operands: function(*operands)


# Of activations and of constants.
FUNCTIONS: dict[str, Function] = {
    "Sigmoid": _plain(_sigmoid),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    "Tanh": _plain(np.tanh),
    "Erf": _plain(_erf),
    "Softplus": _plain(_softplus),
    "Softsign": _plain(lambda x: x / (1 + np.abs(x))),
    "Mish": _plain(lambda x: x * np.tanh(_softplus(x))),
    "Swish": lambda site, x: x * _sigmoid(site.number("alpha", 1.0) * x),
    "Gelu": _gelu,
    "com.microsoft.Gelu": _gelu,
    "com.microsoft.FastGelu": _fast_gelu,
    "com.microsoft.QuickGelu": lambda site, x: x * _sigmoid(site.number("alpha", 1.702) * x),
    "Elu": lambda site, x: _elu(x, site.number("alpha", 1.0)),
    "Selu": _selu,
    "Celu": _celu,
    "LeakyRelu": lambda site, x: _leaky(x, site.number("alpha", 0.01)),
    "PRelu": _plain(_leaky),
    "ThresholdedRelu": _thresholded,
    "Shrink": _shrink,
    "Exp": _plain(np.exp),
    "Log": _plain(np.log),
    "Sqrt": _plain(np.sqrt),
    "Reciprocal": _plain(lambda x: 1 / x),
    "Pow": _plain(lambda x, y: np.power(x, y).astype(x.dtype)),
    "Abs": _plain(np.abs),
    "Sign": _plain(np.sign),
    "Floor": _plain(np.floor),
    "Ceil": _plain(np.ceil),
    "Round": _plain(np.rint),
    "Sin": _plain(np.sin),
    "Cos": _plain(np.cos),
    "Atan": _plain(np.arctan),
    "Min": _least,
    "Max": _largest,
}
# Of constants; of activations they are layers of their own.
ARITHMETIC: dict[str, Function] = {
    "Add": _plain(np.add),
    "Sub": _plain(np.subtract),
    "Mul": _plain(np.multiply),
    "Div": _divide,
    "Neg": _plain(np.negative),
    "Sum": _sum,
    "Clip": _clip,
    "Relu": _plain(lambda x: np.maximum(x, 0)),
    "Equal": _plain(np.equal),
    "Less": _plain(np.less),
    "LessOrEqual": _plain(np.less_equal),
    "Greater": _plain(np.greater),
    "GreaterOrEqual": _plain(np.greater_equal),
    "Not": _plain(np.logical_not),
    "And": _plain(np.logical_and),
    "Or": _plain(np.logical_or),
    "Where": _plain(np.where),
}
