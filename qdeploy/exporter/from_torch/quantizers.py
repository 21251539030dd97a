"""Quantizers of a trace: of a weight its codes, of an activation its grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from qdeploy.exporter.from_torch.operators import DEQUANTIZE, LSQ, name_of, quantizer_arguments
from qdeploy.exporter.from_torch.site import Site, float64
from qdeploy.exporter.from_torch.trace import Trace
from qdeploy.exporter.grid import Grid
from qdeploy.exporter.layers import Quantize, QuantizedWeight, checked_step
from qdeploy.exporter.lowering.elementwise import each
from qdeploy.exporter.lowering.moved import Value, layer_of

BY_CHANNEL = "step sizes per output channel (axis {}) or per tensor"


# ---- Weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class InputFirst:
    """A weight of a transposed convolution, [I, O, ...], with step sizes by output channel."""

    turned: QuantizedWeight  # [O, I, ...]


def weight(node: fx.Node, trace: Trace) -> QuantizedWeight | InputFirst | Tensor:
    """What a quantizer of a constant makes: a weight, or a number as it is where 32 bits stand for it (biases)."""
    site = Site(node, trace, [])
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: trace.constants[n])
    own = quantizer_arguments(node.target, args, kwargs)
    step = torch.as_tensor(own["scale"], dtype=torch.float32)
    axis = own["axis"] if step.numel() > 1 else 0
    if axis not in (0, 1):
        site.fail(BY_CHANNEL.format(0), f"axis {axis}")
    found = trace.constants[node]
    value: Tensor = found[0] if isinstance(found, tuple) else found
    if name_of(node.target) in DEQUANTIZE and own["self"].dtype == torch.int32:
        return value
    if node.target is LSQ:
        held = own["self"].numpy().swapaxes(0, axis)
        made = QuantizedWeight(held, step.numpy(), own["quant_min"], own["quant_max"])
    else:
        steps = step.reshape(() if step.numel() == 1 else -1).numpy()
        made = _from_file(site, value.numpy().swapaxes(0, axis), steps)
    return InputFirst(made) if axis else made


def _from_file(site: Site, value: np.ndarray, step: np.ndarray) -> QuantizedWeight:
    """With as many bits as its codes need: a quantizer that leaves some of them out says so only by what it writes."""
    checked_step(step, f"weight of module `{site.name}`")
    codes = np.rint(value / step.reshape(-1, *[1] * (value.ndim - 1)))
    low, high = (float(end) for end in (codes.min(), codes.max()))
    if not -128 <= low <= high <= 127:  # neither of NaN
        expected = "weights whose codes minus zero point are within -128..127 (quantize with signed weights)"
        site.fail(expected, f"{low:g}..{high:g}")
    half = next(2**bits for bits in range(1, 8) if -(2**bits) <= low and high < 2**bits)
    return QuantizedWeight(value, step, -half, half - 1, origin="file")


# ---- Activations -----------------------------------------------------------------------------------------------------


def lsq(site: Site, x: Value, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float) -> Value:
    if step.numel() != 1:
        site.fail("one step size for a layer's input", f"{step.numel()}")
    if qmax - qmin > 255 or qmin > 0:
        site.fail("an activation quantizer of at most 8 bits that holds 0", f"codes {qmin}..{qmax}")
    scale = checked_step(step.numpy(), f"input quantizer of module `{site.name}`")[0]
    return each(site, x, Quantize, grid=Grid(float(scale), -qmin, 0, qmax - qmin))


def fake_quantize(site: Site, x: Value, *args: Any, **kwargs: Any) -> Value:
    grid = _grid(site, quantizer_arguments(site.target, (x, *args), kwargs))
    return each(site, x, Quantize, grid=grid, origin="file")


@dataclass(eq=False)
class Quantized:
    """The codes of an activation: only what makes real numbers of them may read them."""

    x: Value
    grid: Grid
    real: Value | None = None  # once they are made


def quantize(site: Site, x: Value, *args: Any, **kwargs: Any) -> Quantized:
    return Quantized(x, _grid(site, quantizer_arguments(site.target, (x, *args), kwargs)))


def dequantize(site: Site, codes: Any, *args: Any, **kwargs: Any) -> Value:
    grid = _grid(site, quantizer_arguments(site.target, (codes, *args), kwargs))
    if not isinstance(codes, Quantized) or codes.grid != grid:
        got = f"codes of {codes.grid}" if isinstance(codes, Quantized) else "real numbers"
        site.fail(f"codes of {grid}, as it dequantizes them", got)
    if codes.real is None:
        codes.real = each(site, codes.x, Quantize, grid=grid, origin="file")
        layer_of(codes.real).name = f"{site.name}.input"
    return codes.real


def _grid(site: Site, own: dict[str, Any]) -> Grid:
    """Signed codes are stored with 128 added, which changes no number that they stand for."""
    scales, zero_points = (_numbers(site, own[key]) for key in ("scale", "zero_point"))
    if scales.size != 1 or zero_points.size != 1:
        site.fail("one scale and zero point for an activation", f"{scales.size} (per channel)")
    dtype, low, high = own.get("dtype", torch.uint8), int(own["quant_min"]), int(own["quant_max"])
    if dtype.is_floating_point or not (0 <= low <= high <= 255 or -128 <= low <= high <= 127):
        got = str(dtype) if dtype.is_floating_point else f"codes {low}..{high}"
        site.fail("activations of 8 bits, codes within 0..255 or -128..127", got)
    scale, zero_point = float(np.float32(scales[0])), zero_points[0]
    if not (scale > 0 and math.isfinite(scale)):
        site.fail("a scale > 0 and finite", f"{scales[0]:g}")
    if not (low <= zero_point <= high and zero_point == np.rint(zero_point)):
        site.fail(f"a zero point within {low}..{high}", f"{zero_point:g}")
    up = 128 if low < 0 else 0
    return Grid(scale, int(zero_point) + up, low + up, high + up)


def _numbers(site: Site, value: Any) -> np.ndarray:
    """A scale or zero point, f64 [count]."""
    if not isinstance(value, (Tensor, float, int)):
        site.fail("static quantization (ranges that calibration found)", "a scale that depends on the input")
    return (float64(value) if isinstance(value, Tensor) else np.float64(value)).reshape(-1)
