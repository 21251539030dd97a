"""Convolutions that standardize their weight within forward: those of timm's BiT and NFNets, and of transformers' BiT.

A quantizer of their parameter would come before the standardization, and what the convolution multiplies with would be
on no grid. Here the standardization becomes a parametrization, as a weight norm is one, and the quantizer comes last.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qdeploy.training.untouched import undisturbed


class Standardization(nn.Module):
    """Each output channel of a weight with mean 0 and variance 1, times its gain and the scale where there are some."""

    def __init__(self, eps: float, gain: Tensor | None, scale: float):
        super().__init__()
        self.eps, self.gain, self.scale = eps, gain, scale

    def forward(self, weight: Tensor) -> Tensor:
        gain = None if self.gain is None else (self.gain * self.scale).view(-1)
        channels = weight.reshape(1, len(weight), -1)
        return F.batch_norm(channels, None, None, gain, training=True, eps=self.eps).reshape_as(weight)

    def extra_repr(self) -> str:
        return f"eps={self.eps}" + (f", scale={self.scale}" if self.gain is not None else "")


class StandardizedConv2d(nn.Conv2d):
    """What is left of such a convolution: its weight is standardized already."""

    same_size: bool  # pads for ceil(size / stride) rows and columns, whatever the size; else by `padding`

    def forward(self, input: Tensor) -> Tensor:
        if self.same_size:
            left, right = self._margins(input, 1)
            input = F.pad(input, [left, right, *self._margins(input, 0)])
        return super().forward(input)

    def _margins(self, input: Tensor, axis: int) -> tuple[int, int]:
        """Before and behind; of an odd number the last one is behind."""
        size, stride = input.shape[2 + axis], self.stride[axis]
        span = (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
        total = max((-(-size // stride) - 1) * stride + span - size, 0)
        return total // 2, total - total // 2


def standardizes(layer: nn.Module) -> bool:
    """Whether the layer is a convolution that standardizes its weight within forward."""
    return _same_size(layer) is not None


def parametrize_standardized(layers: Iterable[nn.Module]) -> None:
    """Makes the standardization of those `layers` that have one a parametrization of the weight, in place.

    They compute what they did, bit by bit. Parameters stay the same objects; a gain belongs to the standardization
    now. Layers that share weight and gain share the standardization.
    """
    made: dict[tuple, Standardization] = {}
    for layer in layers:
        same_size = _same_size(layer)
        if same_size is None:
            continue
        found = _standardization(layer)
        found = made.setdefault((id(layer.weight), id(found.gain), found.eps, found.scale), found)
        layer.__class__ = StandardizedConv2d
        vars(layer)["same_size"] = same_size
        layer._parameters.pop("gain", None)
        parametrize.register_parametrization(layer, "weight", found)


def _standardization(layer: Any) -> Standardization:
    gain = layer._parameters.get("gain")
    return Standardization(layer.eps, gain, 1.0 if gain is None else layer.scale)


def _same_size(layer: nn.Module) -> bool | None:
    """How a convolution that standardizes its weight pads; None of any other layer.

    Its forward is tried with numbers for parameters that are small, so that eps matters, and on an input whose sizes
    are of two kinds to the stride. What it says depends on the class and its settings alone, not on trained weights.
    """
    if not isinstance(layer, nn.Conv2d) or parametrize.is_parametrized(layer):
        return None
    if type(layer).forward is nn.Conv2d.forward or not isinstance(getattr(layer, "eps", None), float):
        return None
    drawn = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.rand(shape, generator=drawn, dtype=torch.float64)

    parameters = {name: 1e-3 * numbers(*p.shape) for name, p in layer._parameters.items() if p is not None}
    sizes = [(k - 1) * d + s for k, d, s in zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)]
    images = numbers(1, layer.in_channels, sizes[0] + 1, sizes[1] + 2)
    try:
        with undisturbed(layer):
            own = _twin(layer, type(layer), parameters)
            expected = own.forward(images)
            parameters["weight"] = _standardization(own)(parameters["weight"])
            for same_size in (False, True):
                got = _twin(layer, StandardizedConv2d, parameters, same_size=same_size).forward(images)
                if got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-9, atol=1e-12):
                    return same_size
    except Exception:  # whatever its forward needs, it is another one
        return None
    return None


def _twin(layer: nn.Module, kind: type[nn.Conv2d], parameters: dict[str, Tensor], **more: Any) -> nn.Conv2d:
    """A layer of the class `kind` with the settings of this one, and other parameters."""
    twin = kind.__new__(kind)
    vars(twin).update(vars(layer), _parameters={"bias": None, **parameters}, **more)
    return twin
