"""F_gamma: how the loss rises at a distance from the weights (QT-DoG, equation 5, after SWAD).

    F_gamma(w) = E_d [ L(w + gamma d) - L(w) ],  d = z / ||z||,  z ~ N(0, I)

One direction runs over all parameters together, biases and norms included, and is followed through all radii. L is the
mean over domains of the mean cross-entropy. A distance means little across networks of other sizes or scales:
multiples of ||w|| are measured as well.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.training.measures.draws import Draws, all_of, anew
from qdeploy.training.measures.losses import Domains, mean_cross_entropy
from qdeploy.training.measures.measured_run import MeasuredRun
from qdeploy.training.measures.weights import Place, bare, channels_last, normal
from qdeploy.training.seeds import seed_hash

RADII = tuple(range(5, 61, 5))  # of a ResNet-50 in QT-DoG's figure 3
RELATIVE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of ||w||


def flatness(
    net: nn.Module,
    parts: Mapping[str, Domains],
    *,
    radii: Sequence[float] = RADII,
    relative: Sequence[float] = RELATIVE,
    directions: int = 100,
    latent: bool = False,
    seed: int = 0,
    draws: Draws = anew,
) -> dict[str, Any]:
    """The curve of F_gamma for each of `parts`, such as source and target domains.

    Args:
        net: in float or quantized; it is not changed.
        radii: gamma, distances; relative: gamma / ||w||. 0 is measured without being asked for: F is 0 there.
        latent: moves the weights that train, with the quantizers on and their steps as they are, in place of the
            weights that these make. Most of a small distance then disappears in rounding.
        seed: of the directions; the same for all networks with the same parameters.

    Returns {"norm": ||w||, "parameters": their number, "loss": {part: L(w)}, "table"} with a row {"part", "kind":
    "absolute" or "relative", "gamma", "gamma_relative", "mean", "std", "standard_error"} for each radius, over the
    directions; std and standard_error are None for one direction. Raises InputError for less than one.
    """
    if directions < 1:
        raise InputError(f"expected a direction or more, got {directions} - at flatness")
    place = Place(copy.deepcopy(net).eval() if latent else bare(net))
    parts = {part: {name: channels_last([*one]) for name, one in domains.items()} for part, domains in parts.items()}
    norm = float(place.center.double().norm())
    steps = [("absolute", float(radius)) for radius in radii] + [("relative", share * norm) for share in relative]
    start = draws("at the weights", lambda: _losses(place, parts, place.center))

    def followed(number: int) -> list[list[float]]:
        direction = normal(len(place.center), seed_hash(seed, "direction", number))
        direction = (direction.double() / direction.double().norm()).to(place.center)
        return [_losses(place, parts, place.center + gamma * direction) for _, gamma in steps]

    found = all_of(draws, "direction", directions, followed)
    table = []
    for index, part in enumerate(parts):
        for kind in ("absolute", "relative"):
            table.append(_row(part, kind, 0.0, norm, [0.0] * directions))
            for step, (of_kind, gamma) in enumerate(steps):
                if of_kind == kind:
                    rises = [losses[step][index] - start[index] for losses in found]
                    table.append(_row(part, kind, gamma, norm, rises))
    loss = dict(zip(parts, start, strict=True))
    return {"norm": norm, "parameters": len(place.center), "loss": loss, "table": table}


def _losses(place: Place, parts: Mapping[str, Domains], vector: Tensor) -> list[float]:
    place.move(vector)
    return [mean_cross_entropy(place.net, domains) for domains in parts.values()]


def _row(part: str, kind: str, gamma: float, norm: float, rises: list[float]) -> dict[str, Any]:
    finite = all(map(math.isfinite, rises))  # a loss may be beyond float32
    std = None if len(rises) < 2 else statistics.stdev(rises) if finite else math.nan
    row = {"part": part, "kind": kind, "gamma": gamma, "gamma_relative": gamma / norm}
    error = None if std is None else std / len(rises) ** 0.5
    return row | {"mean": statistics.fmean(rises), "std": std, "standard_error": error}


def of_run(
    run: MeasuredRun, draws: Draws, *, directions: int = 100, latent: bool = False, seed: int = 0
) -> dict[str, Any]:
    """On training images of the source domains, and on the target."""
    parts = {"source": run.training, "target": run.target}
    return flatness(run.net, parts, directions=directions, latent=latent, seed=seed, draws=draws)
