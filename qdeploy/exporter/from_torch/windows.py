"""Pools, reductions and resizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from qdeploy.exporter.elements import numbered
from qdeploy.exporter.from_torch.site import Site
from qdeploy.exporter.from_torch.weighted import pairs
from qdeploy.exporter.layers import Layer
from qdeploy.exporter.lowering import windows as rules
from qdeploy.exporter.lowering.moved import Value, image, seen


def _pool_window(site: Site, x: Layer, kernel: Any, stride: Any, padding: Any, dilation: Any) -> dict[str, list[int]]:
    """Ceil mode is more padding at the bottom and the right: as much as the last window needs."""
    kernel, padding, dilation = pairs(kernel), pairs(padding), pairs(dilation)
    stride = pairs(stride) if stride else kernel
    after = []
    for i in (0, 1):
        reach = (site.shape[1 + i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
        after.append(max(0, reach - x.shape[1 + i] - padding[i]))
    return {"kernel": kernel, "stride": stride, "padding": padding + after, "dilation": dilation}


def max_pool2d(
    site: Site, x: Value, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> Layer:
    x = image(site, x)
    return rules.max_pool(site, x, _pool_window(site, x, kernel, stride, padding, dilation))


def avg_pool2d(
    site: Site,
    x: Value,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Layer:
    x = image(site, x)
    window = _pool_window(site, x, kernel, stride, padding, 1)
    del window["dilation"]
    # What torch divides each window by, asked of torch itself: the engine divides by a function of the number of real
    # elements.
    ones = torch.ones(1, *x.shape[1:], dtype=torch.float64)
    arguments = (window["kernel"], window["stride"], window["padding"][:2], ceil, count_include_pad)
    counts = functional.avg_pool2d(ones, *arguments, 1).reshape(-1)
    divisors = counts / functional.avg_pool2d(ones, *arguments, divisor).reshape(-1)
    return rules.average(site, x, window, counts.numpy(), divisors.numpy())


def adaptive_avg_pool2d(site: Site, x: Value, size: Any) -> Layer:
    """Windows of one size are a pool; of several sizes, a resize by 1/n."""
    x = image(site, x)
    target = _adaptive_size(x, size)
    kernel = _adaptive_kernel(x, target)
    if kernel is not None:
        return x if kernel == [1, 1] else avg_pool2d(site, x, kernel)
    rows, columns = (rules.averages(a, b) for a, b in zip(x.shape[1:], target, strict=True))
    return rules.resize(site, x, rows, columns)


def adaptive_avg_pool1d(site: Site, x: Value, size: Any) -> Value:
    if site.sizes[-1] == 1:
        return _reduced(site, x, 2, True, "mean")
    x = image(site, x)
    rows, columns = rules.averages(x.shape[1], site.sizes[-1]), rules.averages(1, 1)
    pooled = rules.resize(site, x, rows, columns)
    return seen(pooled, numbered(pooled.shape)[..., 0])


def adaptive_max_pool2d(site: Site, x: Value, size: Any) -> Layer:
    x = image(site, x)
    target = _adaptive_size(x, size)
    kernel = _adaptive_kernel(x, target)
    if kernel is None:
        site.fail("an adaptive max pool to sizes that divide the input's", f"{list(x.shape[1:])} to {target}")
    return x if kernel == [1, 1] else max_pool2d(site, x, kernel)


def _adaptive_size(x: Layer, size: Any) -> list[int]:
    return [x.shape[1 + i] if s is None else int(s) for i, s in enumerate(pairs(size))]


def _adaptive_kernel(x: Layer, target: list[int]) -> list[int] | None:
    """The window of an adaptive pool; None where windows differ."""
    if any(x.shape[1 + i] % s for i, s in enumerate(target)):
        return None
    return [x.shape[1] // target[0], x.shape[2] // target[1]]


# ---- Resize ----------------------------------------------------------------------------------------------------------


def upsample(site: Site, x: Value, size: Any, *options: Any) -> Layer:
    """Bilinear or bicubic: torch itself says with which weights, by resizing unit vectors along one axis."""
    x = image(site, x)
    *_, height, width = site.sizes
    target, (align, *factors) = site.target, options

    def axis(of: int, to: int, place: int) -> tuple[np.ndarray, float]:
        units = torch.eye(of, dtype=torch.float64).reshape((1, of, of, 1) if place == 0 else (1, of, 1, of))
        units = units.expand(1, of, of, of).contiguous()
        if factors and factors[0] is not None:
            resized = target(units, None, align, [float(factors[0][place]) if i == place else 1.0 for i in (0, 1)])
        else:
            resized = target(units, [to if i == place else of for i in (0, 1)], align, None)
        real = resized[0].select(2 - place, 0).numpy().T
        return rules.in_bits(real), 2.0**-rules.RESIZE_BITS

    return rules.resize(site, x, axis(x.shape[1], height, 0), axis(x.shape[2], width, 1))


# ---- Reductions ------------------------------------------------------------------------------------------------------


def _reduced(site: Site, x: Value, dims: Any, keep: bool, kind: str) -> Value:
    given = dims if isinstance(dims, (list, tuple)) else [dims]
    return rules.reduce(site, x, [d for d in given if d is not None], keep, kind)


def mean(site: Site, x: Value, dims: Any = None, keepdim: bool = False, **_: Any) -> Value:
    return _reduced(site, x, dims, keepdim, "mean")


def total(site: Site, x: Value, dims: Any = None, keepdim: bool = False, **_: Any) -> Value:
    return _reduced(site, x, dims, keepdim, "sum")


def maximum_over(site: Site, x: Value, dims: Any = (), keepdim: bool = False) -> Value:
    return _reduced(site, x, dims, keepdim, "amax")
