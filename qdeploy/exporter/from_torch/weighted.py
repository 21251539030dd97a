"""conv1d, conv2d, their transposed forms, linear and embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdeploy.exporter.elements import BATCH
from qdeploy.exporter.from_torch.quantizers import BY_CHANNEL, InputFirst
from qdeploy.exporter.from_torch.site import OPERATOR, Site, dequantized, float64
from qdeploy.exporter.layers import Embedding, Input, Layer, QuantizedWeight
from qdeploy.exporter.lowering import weighted as rules
from qdeploy.exporter.lowering.moved import Value


def pairs(value: Any) -> list[int]:
    values = [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return values * 2 if len(values) == 1 else values


def convolution(
    site: Site,
    x: Value,
    weight: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    """conv1d and conv2d."""
    held = _held(site, weight)
    count = len(held.shape) - 2
    dilation = _each(dilation, count)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, held.shape[2:], strict=True)]
        padding = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        padding = [0] * 2 * count if padding == "valid" else _each(padding, count) * 2
    window = {"stride": _each(stride, count), "padding": padding, "dilation": dilation, "groups": groups}
    return rules.convolution(site, x, held, _shift(held, bias), window)


def transposed_convolution(
    site: Site,
    x: Value,
    weight: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Value:
    """conv_transpose1d and conv_transpose2d, whose weight is [I, O, ...]."""
    held = _output_first(site, weight)
    count = len(held.shape) - 2
    window = {
        "stride": _each(stride, count),
        "padding": _each(padding, count) * 2,
        "dilation": _each(dilation, count),
        "groups": groups,
    }
    return rules.transposed_convolution(site, x, held, _shift(held, bias), window, _each(output_padding, count))


def _output_first(site: Site, weight: Any) -> rules.Weight:
    if isinstance(weight, InputFirst):
        return weight.turned
    held = _held(site, weight)
    if not isinstance(held, QuantizedWeight):
        return held.swapaxes(0, 1)
    if held.step.size > 1:
        site.fail(BY_CHANNEL.format(1), "axis 0")
    return replace(held, value=held.value.swapaxes(0, 1))


def _each(value: Any, count: int) -> list[int]:
    """For each of `count` dimensions."""
    return pairs(value)[:count]


def linear(site: Site, x: Value, weight: Any, bias: Tensor | None = None) -> Value:
    held = _held(site, weight)
    return rules.linear(site, x, held, _shift(held, bias))


def _shift(weight: rules.Weight, bias: Tensor | None) -> np.ndarray:
    return np.zeros(weight.shape[0]) if bias is None else float64(bias)


def _held(site: Site, weight: Any) -> rules.Weight:
    """As a layer holds it."""
    if not isinstance(weight, (QuantizedWeight, Tensor)):
        site.fail("a weight that does not depend on the input", "one that does")
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
    return site.layer(Embedding, [ids], shape, weight=_held(site, weight), scale=ones, shift=np.zeros(1), rows=rows)


def no_padding(site: Site, ids: Any, padding: Any) -> Tensor:
    """Whether tokens are no padding (RoBERTa counts positions by it): texts of the engine have none."""
    if not isinstance(ids, Input) or isinstance(padding, Layer) or site.sizes != (BATCH, *ids.shape):
        site.fail(OPERATOR, "aten.ne")
    return torch.ones(site.sizes, dtype=torch.bool)
