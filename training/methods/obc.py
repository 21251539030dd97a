"""Optimal Brain Compression (arXiv 2208.11580): weights rounded one at a time, the others making up for each error.

A layer's error is measured on its own inputs X, as |W X - Q X|^2, whose second derivative with respect to a row of W is
H = 2 X X^T. All rows of a layer (of a group of a grouped convolution) have the same H and are independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qdeploy.training.initial_steps import MIN_STEP
from qdeploy.training.untouched import undisturbed

ROWS_AT_ONCE = 32  # each has an inverse of its own: 0.4 GB at 1,200 columns
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


def quantize_rows(weight: Tensor, hessian: Tensor, bits: int, natural_order: bool = False) -> tuple[Tensor, Tensor]:
    """Integer codes, float32 of the shape of `weight`, and a step size for each output channel, float32 [channels].

    weight: float32, output channels first. hessian: as `hessians` gives it.
    natural_order: columns from first to last (GPTQ, arXiv 2210.17323), for layers too wide to choose the order.
    """
    rows = weight.detach().double().flatten(1)
    step = grid_step(rows, bits).float()
    scale, low, high = step.double(), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = []
    of_groups = zip(rows.chunk(len(hessian)), scale.chunk(len(hessian)), hessian, strict=True)
    for some, scales, h in of_groups:
        dead = h.diagonal() == 0  # inputs that are always 0
        inverse = _inverse(h + torch.diag(dead.to(h.dtype)))
        some = some.masked_fill(dead, 0)
        if natural_order:
            groups.append(_in_order(some, inverse, scales, low, high))
        else:
            parts = zip(some.split(ROWS_AT_ONCE), scales.split(ROWS_AT_ONCE), strict=True)
            groups += [_greedy(part, inverse, of_part, low, high) for part, of_part in parts]
    return torch.cat(groups).reshape(weight.shape).float(), step


def grid_step(rows: Tensor, bits: int) -> Tensor:
    """A step size for each row: of GRID times the largest |w| on half of the codes, that of least |w - Q(w)|^2.4."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    largest = (2 * rows.abs().amax(1) / (2**bits - 1)).clamp(min=MIN_STEP)
    best, best_error = largest, torch.full_like(largest, torch.inf)
    for part in GRID:
        step = part * largest
        error = (_rounded(rows, step[:, None], qmin, qmax) * step[:, None] - rows).abs().pow(2.4).sum(1)
        best = torch.where(error < best_error, step, best)
        best_error = torch.minimum(error, best_error)
    return best.clamp(min=MIN_STEP)


def _rounded(value: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    return (value / step).clamp(qmin, qmax).round()


def _inverse(hessian: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:  # inputs that depend on each other
        factor = torch.linalg.cholesky(hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device))
    return torch.cholesky_inverse(factor)


def _greedy(rows: Tensor, inverse: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    """Codes of `rows` [R, n]; in each row the weight goes next whose rounding costs the least, (w - q)^2 / H^-1_pp.

    A weight that the others have pushed beyond the range, more than half a step from its code, goes before: it would
    be pushed further.
    """
    rows, at = rows.clone(), torch.arange(len(rows), device=rows.device)
    inverse = inverse.repeat(len(rows), 1, 1)
    codes, done = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
    for _ in range(rows.shape[1]):
        error = (rows - _rounded(rows, step[:, None], qmin, qmax) * step[:, None]).square()
        cost = torch.where(error > step[:, None].square() / 4, -error, error / inverse.diagonal(dim1=1, dim2=2))
        p = cost.masked_fill_(done, torch.inf).argmin(1)
        code = _rounded(rows[at, p], step, qmin, qmax)
        column, pivot = inverse[at, :, p], inverse[at, p, p]
        rows -= ((rows[at, p] - code * step) / pivot)[:, None] * column
        inverse.baddbmm_(column[:, :, None], (column / pivot[:, None])[:, None, :], alpha=-1)
        codes[at, p], done[at, p] = code, True
    return codes


def _in_order(rows: Tensor, inverse: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    """Codes of `rows` [R, n], columns from first to last: the inverses of all steps are rows of one Cholesky factor."""
    rows, codes = rows.clone(), torch.zeros_like(rows)
    factor = torch.linalg.cholesky(inverse, upper=True)
    for p in range(rows.shape[1]):
        codes[:, p] = _rounded(rows[:, p], step, qmin, qmax)
        error = (rows[:, p] - codes[:, p] * step) / factor[p, p]
        rows[:, p:] -= error[:, None] * factor[p, p:]
    return codes
