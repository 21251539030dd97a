"""What Optimal Brain Compression (arXiv 2208.11580) needs of a network: H of each layer's inputs, and step sizes.

The rounding itself is that of `qdeploy.exporter.obc`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qdeploy.exporter.obc import quantize_rows
from qdeploy.training.initial_steps import MIN_STEP
from qdeploy.training.untouched import undisturbed

GRID = [1 - i / 100 for i in range(80)]  # of the step that clips nothing


def hessians(net: nn.Module, layers: Mapping[str, list[nn.Module]], images: Iterable[Tensor]) -> dict[str, Tensor]:
    """H of each weight, the mean over all images: float64 [groups, columns, columns].

    layers: those that have the weight, by its name; what they see is added up. One that sees nothing is left out.
    images: batches that `net` takes; it sees them as it is, in eval mode, and stays as it was.
    """
    found: dict[str, Tensor] = {}
    count = 0

    def observer(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            for sample in _columns(layer, args[0] if args else kwargs["input"]):
                outer = 2 * sample @ sample.mT
                found[name] = outer if name not in found else found[name].add_(outer)

        return hook

    pairs = [(name, layer) for name, those in layers.items() for layer in those]
    handles = [layer.register_forward_pre_hook(observer(name), with_kwargs=True) for name, layer in pairs]
    try:
        with undisturbed(net):
            for batch in images:
                net(batch)
                count += len(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / count for name, total in found.items()}


def _columns(layer: Any, value: Tensor) -> Iterable[Tensor]:
    """What a row of the weight is multiplied with, for each sample: float64 [groups, columns, positions]."""
    if isinstance(layer, nn.Linear):
        return (sample.reshape(-1, layer.in_features).T[None].double() for sample in value)
    if isinstance(layer, nn.Conv1d):  # as a convolution of images of one row
        value, kernel, stride, dilation = value[:, :, None], *((1, *of) for of in _windows(layer))
    else:
        kernel, stride, dilation = _windows(layer)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(value, layer._reversed_padding_repeated_twice, mode)
    unfolded = functional.unfold(padded, kernel, dilation, 0, stride)
    return (sample.reshape(layer.groups, -1, sample.shape[-1]).double() for sample in unfolded)


def _windows(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return layer.kernel_size, layer.stride, layer.dilation


def codes_and_step(weight: Tensor, hessian: Tensor, bits: int, natural_order: bool = False) -> tuple[Tensor, Tensor]:
    """Integer codes, float32 of the shape of `weight`, and a step size for each output channel, float32 [channels].

    weight: float32, output channels first. hessian: as `hessians` gives it. natural_order: as for `quantize_rows`.
    """
    step = grid_step(weight.detach().double().flatten(1), bits).float()
    rows, steps, h = (tensor.detach().cpu().numpy() for tensor in (weight, step, hessian))
    codes = torch.from_numpy(quantize_rows(rows, steps, h, bits, natural_order))
    return codes.to(weight.device).float(), step


def grid_step(rows: Tensor, bits: int) -> Tensor:
    """A step size for each row: of GRID times the largest |w| on half of the codes, that of least |w - Q(w)|^2.4."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    largest = (2 * rows.abs().amax(1) / (2**bits - 1)).clamp(min=MIN_STEP)
    best, best_error = largest, torch.full_like(largest, torch.inf)
    for part in GRID:
        step = part * largest
        rounded = (rows / step[:, None]).clamp(qmin, qmax).round() * step[:, None]
        error = (rounded - rows).abs().pow(2.4).sum(1)
        best = torch.where(error < best_error, step, best)
        best_error = torch.minimum(error, best_error)
    return best.clamp(min=MIN_STEP)
