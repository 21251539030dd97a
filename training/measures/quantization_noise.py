"""What rounding adds to the weights of a layer, and how near that is to uniform noise (QT-DoG, figures 2 and 8).

    KL(p || u) = sum over bins p log(p B)

p are the shares of the noise w - Q(w) of weights within the range in B bins from its least to its largest value, u is
uniform there. Of n draws from u itself this is (B - 1) / 2n on average: a layer of few weights cannot have less.

Where channels have steps of their own the noise is a mixture of several widths, and KL grows by that alone. The noise
in units of each weight's step has no such share: `kl_in_steps`.

Symmetry of the weights x around their median m: m - x_(i) against x_(n+1-i) - m of the sorted ones, i <= n / 2.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from qdeploy.arguments import integer
from qdeploy.training.attached_quantizers import weight_before
from qdeploy.training.measures.draws import Draws
from qdeploy.training.measures.measured_run import MeasuredRun
from qdeploy.training.measures.quantized_layers import quantized_layers
from qdeploy.training.quantizer import Quantizer

BINS = 100
POINTS = 200  # of the curve of symmetry that are kept


def quantization_noise(net: nn.Module, *, bins: int = BINS) -> dict[str, Any]:
    """Of each layer whose weight is quantized.

    Returns {"bins", "table", "curves"}. A row of the table has "layer", "bits", "weights" (how many), "step" (median),
    "clipped" (share out of range, which does not count as noise), "kl", "kl_of_uniform" (as above), "kl_in_steps",
    "asymmetry", mean |upper - lower| / std, and "asymmetry_ks", the Kolmogorov-Smirnov distance of the two sides; None
    where no two weights differ. "curves" has for each layer histograms of "weights" and "noise", {"low", "high",
    "counts"}, and "symmetry", {"lower", "upper"}: 200 points or fewer.

    Raises InputError for a network in float and for less than 2 bins.
    """
    bins = integer(bins, 2, 2**20, "bins")
    table, curves = [], {}
    for name, (layer, quantizer) in quantized_layers(net).items():
        row, curves[name] = _of_layer(layer, quantizer, bins)
        table.append({"layer": name, **row})
    return {"bins": bins, "table": table, "curves": curves}


@torch.no_grad()
def _of_layer(layer: nn.Module, quantizer: Quantizer, bins: int) -> tuple[dict[str, Any], dict[str, Any]]:
    weight = weight_before(layer, quantizer).float()
    step = quantizer.step.reshape(-1, *[1] * (weight.dim() - 1)).expand_as(weight)
    inside = (weight / step >= quantizer.qmin) & (weight / step <= quantizer.qmax)
    noise = (weight.double() - quantizer(weight).double())[inside].cpu().numpy()
    steps, values = step[inside].double().cpu().numpy(), weight.double().flatten().cpu().numpy()
    lower, upper = sides(values)
    spread = values.std()
    row = {
        "bits": quantizer.bits,
        "weights": len(values),
        "step": quantizer.step.median().item(),
        "clipped": 1 - len(noise) / len(values),
        "kl": kl_to_uniform(noise, bins),
        "kl_of_uniform": (bins - 1) / (2 * len(noise)) if len(noise) else None,
        "kl_in_steps": kl_to_uniform(noise / steps, bins),
        "asymmetry": float(np.abs(upper - lower).mean() / spread) if spread else None,
        "asymmetry_ks": ks_distance(lower, upper) if spread else None,
    }
    kept = np.unique(np.linspace(0, len(lower) - 1, min(POINTS, len(lower))).round().astype(int))
    symmetry = {"lower": lower[kept].tolist(), "upper": upper[kept].tolist()}
    return row, {"weights": _histogram(values, bins), "noise": _histogram(noise, bins), "symmetry": symmetry}


def kl_to_uniform(noise: np.ndarray, bins: int) -> float | None:
    """Of the histogram of [n] between its least and largest value to the uniform one; None where these are the same."""
    if not len(noise) or noise.min() == noise.max():
        return None
    counts, _ = np.histogram(noise, bins, (noise.min(), noise.max()))
    shares = counts[counts > 0] / len(noise)
    return float((shares * np.log(shares * bins)).sum())


def sides(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the lower and the upper half of [n] are from the median: two of [n // 2], the farthest first."""
    ordered, median, half = np.sort(values), np.median(values), len(values) // 2
    return median - ordered[:half], (ordered[::-1] - median)[:half]


def ks_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The largest difference of the two empirical distribution functions."""
    places = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(one), places, side="right") / len(one) for one in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def _histogram(values: np.ndarray, bins: int) -> dict[str, Any]:
    low, high = (float(values.min()), float(values.max())) if len(values) else (math.nan, math.nan)
    counts = np.histogram(values, bins, (low, high))[0] if len(values) else np.zeros(bins, int)
    return {"low": low, "high": high, "counts": counts.tolist()}


def of_run(run: MeasuredRun, draws: Draws, *, bins: int = BINS) -> dict[str, Any]:
    """Of the selected network."""
    return quantization_noise(run.net, bins=bins)
