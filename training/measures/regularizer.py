"""Quantization as a regularizer, and whether it is one to first order (QGen, equations 4 to 7).

    L(w) = E || f(x, w) - y ||^2,   L(w + D) ~ L(w) + E || J D ||^2 + 2 E < f - y, J D > = L(w) + R + cross

with D = Q(w) - w and J D the derivative of the network's outputs f along D. The paper drops the cross term, because it
takes D for noise of mean zero that knows nothing of J. y is 1 of the right class, 0 of the others.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional

from qdeploy.networks.quantizable import weight_name
from qdeploy.training.attached_quantizers import weight_before, weight_quantizer
from qdeploy.training.measures.draws import Draws, anew
from qdeploy.training.measures.losses import Batch
from qdeploy.training.measures.measured_run import MeasuredRun
from qdeploy.training.measures.weights import bare
from qdeploy.training.quantize import quantize_

BITS = (8, 4, 2)


def regularizer(
    net: nn.Module, batches: Iterable[Batch], *, bits: Sequence[int] = BITS, draws: Draws = anew
) -> dict[str, Any]:
    """R at the weights of `net` in float: those that train, of a quantized network.

    Args:
        net: any; it is not changed. Quantized inputs of layers stay quantized, their derivative is LSQ's.
        batches: that can be read several times.
        bits: each weight but the classifier's is rounded to these, with one step of LSQ's initial size for a layer.

    Returns {"loss": L(w), "table"} with rows of "steps", "bits", "loss_quantized" (L(w + D)), "regularizer" (R),
    "cross", "predicted" (L(w) + R, the paper's) and "first_order" (L(w) + R + cross). The rows of `bits` have "initial"
    steps; before them comes, of a quantized network, its own with "trained" ones, whose bits are None where layers have
    different ones.
    """
    plain = _in_float(net)
    grids: dict[tuple[str, int | None], nn.Module] = {}
    own = {quantizer.bits for layer in net.modules() if (quantizer := weight_quantizer(layer)) is not None}
    if own:
        grids["trained", own.pop() if len(own) == 1 else None] = bare(net)
    grids |= {("initial", each): _rounded(plain, each) for each in bits}
    loss = draws("at the weights", lambda: _squared_error(plain, batches))
    table = []
    for (steps, each), grid in grids.items():
        found = draws(f"{steps} steps, {each} bits", partial(_terms, plain, grid, batches))
        row = {"steps": steps, "bits": each, **found, "predicted": loss + found["regularizer"]}
        table.append({**row, "first_order": row["predicted"] + found["cross"]})
    return {"loss": loss, "table": table}


@torch.no_grad()
def _in_float(net: nn.Module) -> nn.Module:
    """A `bare` copy with the weights as they were before their quantizers."""
    plain = bare(net)
    for path, layer in net.named_modules():
        if (quantizer := weight_quantizer(layer)) is not None:
            getattr(plain.get_submodule(path), weight_name(layer)).copy_(weight_before(layer, quantizer))
    return plain


def _rounded(plain: nn.Module, bits: int) -> nn.Module:
    rounded = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be exported
        quantize_(rounded, bits, per_channel=False, allow_float=["*"])
    return bare(rounded)


def _terms(plain: nn.Module, grid: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """R, the cross term and the loss on the grid: means over all inputs."""
    where = {name: one.detach() for name, one in plain.named_parameters()}
    grid_values = dict(grid.named_parameters())
    change = {name: grid_values[name].detach() - value for name, value in where.items()}
    square, cross, count = 0.0, 0.0, 0
    for inputs, labels in batches:
        outputs, along = _derivative(plain, inputs, where, change)
        along, rest = along.double(), outputs.double() - _targets(outputs, labels)
        square += float(along.square().sum())
        cross += float(2 * (rest * along).sum())
        count += len(labels)
    return {"loss_quantized": _squared_error(grid, batches), "regularizer": square / count, "cross": cross / count}


def _derivative(
    net: nn.Module, inputs: Tensor, where: dict[str, Tensor], change: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The outputs of `net` with the parameters `where`, and their derivative along `change`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, in torch's own decompositions
        found: Any = jvp(lambda moved: functional_call(net, moved, (inputs,)), (where,), (change,))
    return found[0], found[1]


@torch.no_grad()
def _squared_error(net: nn.Module, batches: Iterable[Batch]) -> float:
    found, count = 0.0, 0
    for inputs, labels in batches:
        outputs = net(inputs)
        found += float((outputs.double() - _targets(outputs, labels)).square().sum())
        count += len(labels)
    return found / count


def _targets(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.one_hot(labels, outputs.shape[1]).double()


def of_run(run: MeasuredRun, draws: Draws) -> dict[str, Any]:
    """On training images of all source domains."""
    return regularizer(run.net, [batch for batches in run.training.values() for batch in batches], draws=draws)
