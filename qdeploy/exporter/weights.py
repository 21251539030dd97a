"""From real weights to integer codes: those of training where there is a learned quantizer, else rounded ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qdeploy.arguments import checked_bits
from qdeploy.errors import ExportError
from qdeploy.exporter.layers import Codes, Network, QuantizedWeight, Weighted, checked_step

CLASSIFIER_BITS = 8


@dataclass(frozen=True)
class Rounded:
    """A layer whose weight was rounded to nearest here, with what it was in float32."""

    layer: Weighted
    weight: np.ndarray  # f32
    scale: np.ndarray  # of the layer, without the step size
    bits: int


def quantize_weights(network: Network, fallback_bits: int | Mapping[str, int] | None) -> list[Rounded]:
    """Turns every weight into codes and multiplies its step size into the scale of its layer."""
    layers = [layer for layer in network.layers if isinstance(layer, Weighted)]
    fallback = _fallback(layers, network.classifier, fallback_bits)
    rounded = []
    for layer in layers:
        if isinstance(layer.weight, QuantizedWeight):
            codes, step = _codes(layer.weight, layer.name)
        elif isinstance(layer.weight, Codes):
            codes, step = layer.weight, np.ones(1)
        elif layer in fallback:
            bits = fallback[layer]
            rounded.append(Rounded(layer, layer.weight, layer.scale, bits))
            step = largest_step(layer.weight.reshape(len(layer.weight), -1), bits)
            codes = Codes(nearest_codes(layer.weight, step, bits), bits, "rounded")
        else:
            expected = "a learned quantizer (quantize_) or fallback_bits for it"
            raise ExportError(f"expected {expected}, got a float32 weight - at weight of module `{layer.name}`")
        layer.weight, layer.scale = codes, layer.scale * step
        _check(layer, codes)
    return rounded


def _check(layer: Weighted, codes: Codes) -> None:
    finite = np.isfinite(layer.scale) & np.isfinite(layer.shift)
    if not finite.all():
        got = f"NaN or infinity in channel {int(np.argmin(finite))}"
        raise ExportError(f"expected finite weights, bias and BatchNorm, got {got} - at module `{layer.name}`")
    depth, most = math.prod(codes.shape[1:]), (2**31 - 1) // (255 * 2 ** (codes.bits - 1))
    if depth > most:  # docs/format.md, bounds: accumulators of 32 bits
        expected = f"at most {most} weights of {codes.bits} bits per output channel"
        raise ExportError(f"expected {expected}, got {depth} - at module `{layer.name}`")


def _codes(weight: QuantizedWeight, name: str) -> tuple[Codes, np.ndarray]:
    """The codes and the step sizes, float64 [1] or [channels]."""
    step = checked_step(weight.step, f"weight of module `{name}`")
    bits = max((-weight.qmin - 1).bit_length(), weight.qmax.bit_length()) + 1
    if not 2 <= bits <= 8:
        got = f"{weight.qmin}..{weight.qmax}"
        raise ExportError(f"expected signed codes of 2 to 8 bits, got {got} - at weight of module `{name}`")
    value = weight.value
    scaled = value / _per_channel(step, value.ndim).astype(np.float32)  # one f32 division, as in training
    codes = np.rint(np.clip(scaled, weight.qmin, weight.qmax)).astype(np.int8)
    if weight.origin == "learned" and (step == 1).all() and value.any() and not codes.any():
        got = f"1.0 for all, as if never initialized: weights up to {np.abs(value).max():.3g} are all rounded to 0"
        raise ExportError(f"expected trained step sizes, got {got} - at weight of module `{name}`")
    return Codes(codes, bits, weight.origin), step


def largest_step(rows: np.ndarray, bits: int) -> np.ndarray:
    """Step sizes, float64 [rows], with the largest weight of each row on the largest code."""
    largest = np.abs(rows).max(1).astype(np.float64)
    return np.where(largest > 0, largest, 1) / (2 ** (bits - 1) - 1)


def nearest_codes(weight: np.ndarray, step: np.ndarray, bits: int) -> np.ndarray:
    """int8; step sizes are float64 [channels]."""
    scaled, half = weight.astype(np.float64) / _per_channel(step, weight.ndim), 2 ** (bits - 1)
    return np.rint(np.clip(scaled, -half, half - 1)).astype(np.int8)


def _per_channel(step: np.ndarray, ndim: int) -> np.ndarray:
    return step.reshape(-1, *[1] * (ndim - 1))


def _fallback(
    layers: list[Weighted], classifier: str | None, bits: int | Mapping[str, int] | None
) -> dict[Weighted, int]:
    """Of `layers` those that may do without a learned quantizer, and their bits."""
    plain = [layer for layer in layers if isinstance(layer.weight, np.ndarray)]

    def named(name: str) -> list[Weighted]:  # "fc.linear" where the class of `fc` is not one of PyTorch
        return [x for x in plain if x.name.split("#")[0] in (name, f"{name}.{x.op}".lstrip("."))]

    result = {} if classifier is None else dict.fromkeys(named(classifier), CLASSIFIER_BITS)
    if isinstance(bits, Mapping):
        for name, width in bits.items():
            if not named(name):
                names = ", ".join(layer.name for layer in plain) or "there is none"
                expected = f"the name of a module with a float32 weight ({names})"
                raise ExportError(f"expected {expected}, got {name!r} - at fallback_bits")
            result |= dict.fromkeys(named(name), checked_bits(width, "fallback_bits"))
    elif bits is not None:
        result = dict.fromkeys(plain, checked_bits(bits, "fallback_bits"))
    return result
