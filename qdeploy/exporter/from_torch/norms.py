"""Norms over the elements of an activation itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from qdeploy.exporter.from_torch.elementwise import batch_norm
from qdeploy.exporter.from_torch.site import Site, float64
from qdeploy.exporter.lowering import norms as rules
from qdeploy.exporter.lowering.moved import Value, sizes_of


def layer_norm(
    site: Site,
    x: Value,
    sizes: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Value:
    return rules.layer_norm(site, x, len(sizes), _array(weight), _array(bias), float(eps))


def group_norm(
    site: Site,
    x: Value,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Value:
    return rules.group_norm(site, x, groups, _array(weight), _array(bias), float(eps))


def instance_norm(
    site: Site,
    x: Value,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    use_input: bool,
    momentum: float,
    eps: float,
    cudnn: bool = False,
) -> Value:
    """With running statistics it is a BatchNorm."""
    if not use_input:
        return batch_norm(site, x, weight, bias, mean, variance, False, momentum, eps)
    return group_norm(site, x, sizes_of(x)[1], weight, bias, eps)


def _array(gain: Tensor | None) -> np.ndarray | None:
    return None if gain is None else float64(gain)
