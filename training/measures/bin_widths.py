"""The width of the quantization bins of each layer, which is the step size s (QGen, figure 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qdeploy.training.attached_quantizers import weight_before
from qdeploy.training.measures.draws import Draws
from qdeploy.training.measures.measured_run import MeasuredRun
from qdeploy.training.measures.quantized_layers import quantized_layers


@torch.no_grad()
def bin_widths(net: nn.Module) -> dict[str, Any]:
    """Of each layer whose weight is quantized: {"table": rows of "layer", "bits", "steps" (how many), "step" (median),
    "smallest", "largest", and "relative", the median step over the standard deviation of the layer's weights}. Raises
    InputError for a network in float."""
    table = []
    for name, (layer, quantizer) in quantized_layers(net).items():
        step, spread = quantizer.step.double(), weight_before(layer, quantizer).double().std(correction=0).item()
        row: dict[str, Any] = {"layer": name, "bits": quantizer.bits, "steps": step.numel()}
        row["step"] = step.median().item()
        row |= {"smallest": step.min().item(), "largest": step.max().item()}
        table.append({**row, "relative": row["step"] / spread if spread else None})
    return {"table": table}


def of_run(run: MeasuredRun, draws: Draws) -> dict[str, Any]:
    """Of the selected network."""
    return bin_widths(run.net)
