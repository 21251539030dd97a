"""The loss around the weights on a plane of two random directions, filter-normalized (Li et al., NeurIPS 2018).

Every slice along the first axis of a weight, a filter or the row of a matrix, has in a direction the norm that it has
in the network. Biases and norms do not move.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.training.measures.draws import Draws, all_of, anew
from qdeploy.training.measures.losses import Domains, mean_cross_entropy
from qdeploy.training.measures.measured_run import MeasuredRun, first_of
from qdeploy.training.measures.weights import Place, bare, channels_last, flat, normal
from qdeploy.training.seeds import seed_hash

AXES = 2


def surface(
    net: nn.Module, domains: Domains, *, points: int = 21, seed: int = 0, draws: Draws = anew
) -> dict[str, Any]:
    """L(w + a d1 + b d2) for `points` values of a and of b, from -1 to 1; L is the mean over domains.

    net: in float or quantized, whose quantizers do not round the moved weights again; it is not changed.

    Returns {"points", "loss": L(w), "table": [{"a", "b", "loss"}, ...]}, a in the outer order. Raises InputError for
    less than 2 points.
    """
    if points < 2:
        raise InputError(f"expected 2 points or more along an axis, got {points} - at surface")
    place = Place(bare(net))
    batches = {name: channels_last([*one]) for name, one in domains.items()}
    first, second = (filter_normalized(place.parameters, seed_hash(seed, "surface", i)) for i in range(AXES))
    values = [-1 + 2 * i / (points - 1) for i in range(points)]
    grid = [(a, b) for a in values for b in values]
    at_center = draws("at the weights", lambda: mean_cross_entropy(place.net, batches))

    def loss(number: int) -> float:
        a, b = grid[number]
        place.move(place.center + a * first + b * second)
        return mean_cross_entropy(place.net, batches)

    losses = all_of(draws, "point", len(grid), loss)
    table = [{"a": a, "b": b, "loss": loss} for (a, b), loss in zip(grid, losses, strict=True)]
    return {"points": points, "loss": at_center, "table": table}


def filter_normalized(parameters: list[nn.Parameter], seed: int) -> Tensor:
    """One direction over `parameters`, as a vector: each slice along axis 0 of those with two or more dimensions has
    the norm of the parameter's slice, all else is 0."""
    noise = normal(sum(parameter.numel() for parameter in parameters), seed)
    parts = noise.split([parameter.numel() for parameter in parameters])
    return flat(_normalized(part, parameter) for part, parameter in zip(parts, parameters, strict=True))


def _normalized(noise: Tensor, parameter: nn.Parameter) -> Tensor:
    if parameter.dim() < 2:
        return torch.zeros_like(parameter)
    slices = noise.to(parameter).reshape(len(parameter), -1)
    norms = parameter.detach().reshape(len(parameter), -1).norm(dim=1, keepdim=True)
    return slices * (norms / (slices.norm(dim=1, keepdim=True) + 1e-10))


def of_run(run: MeasuredRun, draws: Draws, *, points: int = 21, images: int = 1000, seed: int = 0) -> dict[str, Any]:
    """On at most `images` of the training images of the source domains, as many of each."""
    return surface(run.net, first_of(run.training, images), points=points, seed=seed, draws=draws)
