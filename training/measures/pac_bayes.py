"""PAC-Bayes measures: how much noise on the weights costs a tenth of training accuracy.

    pac-init      ||W-W0||^2 / (4 sigma^2) + log(m/delta) + 10
    pac-orig      ||W||^2    / (4 sigma^2) + log(m/delta) + 10
    pac-mag-init  1/4 sum_i log( (eps^2 + (sigma'^2 + 1) ||W-W0||^2/omega)
                                 / (eps^2 + sigma'^2 d_i^2) ) + log(m/delta) + 10
    pac-mag-orig  with ||W||^2 in place of ||W-W0||^2

sigma is found with noise N(0, sigma^2), sigma' with N(0, sigma'^2 w_i^2 + eps^2), on all parameters. That is the
reading "exact". The code behind QGen's table 3 hands these variances over as standard deviations: reading "rgm".
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from torch import nn

from qdeploy.training.measures.bisection import DRAWS
from qdeploy.training.measures.bounds import Denominator, Prepared, Weights, confidence, magnitude_aware, measured
from qdeploy.training.measures.draws import Draws, all_of, anew
from qdeploy.training.measures.losses import Batch
from qdeploy.training.measures.measured_run import MeasuredRun
from qdeploy.training.measures.weights import normal
from qdeploy.training.seeds import seed_hash

READINGS = ("exact", "rgm")


def pac_bayes(
    net: nn.Module,
    initial: nn.Module,
    batches: Iterable[Batch],
    *,
    m: int,
    orig_denominator: Denominator = "d",
    seed: int = 0,
    draws: Draws = anew,
) -> dict[str, Any]:
    """The four measures in both readings.

    Args:
        net, initial: the network, in float or quantized, and the one it began with, in float; they are not changed.
        batches: training images for the search; m: how many train in all.
        orig_denominator: "d", as printed, or "w": d_i or w_i in the denominator of pac-mag-orig.
        seed: of the noise. Draw i is the same at every sigma, so that accuracy changes with sigma alone.

    Returns {"accuracy", "omega", "norm": ||W||, "distance": ||W-W0||, "m", "table"} with a row {"measure", "reading",
    "value", "searched": sigma or sigma', "accuracy" there, "steps", "change" of accuracy, "saturated"} for each.
    Raises InputError for networks that do not go together, or without images.
    """
    prepared = Prepared.of(net, initial, batches)
    count = len(prepared.place.center)

    def accuracy_at(reading: str, aware: bool, sigma: float) -> float:
        deviation = prepared.deviation(sigma, aware)
        if reading == "rgm":
            deviation = deviation**2

        def of_draw(number: int) -> float:
            noise = normal(count, seed_hash(seed, "noise", number)).to(prepared.place.center)
            return prepared.accuracy_at(noise * deviation)

        name = f"{reading}{', magnitude-aware' if aware else ''}, sigma {sigma!r}, draw"
        return statistics.fmean(all_of(draws, name, DRAWS, of_draw))

    def bound(name: str, sigma: float) -> float:
        return pac_bayes_bound(prepared.weights, name, sigma, m, orig_denominator)

    return measured(prepared, "pac", READINGS, accuracy_at, bound, m)


def pac_bayes_bound(weights: Weights, name: str, sigma: float, m: int, orig_denominator: Denominator = "d") -> float:
    """The bound of a measure by its name, before it is divided by m."""
    origin = name.rpartition("-")[2]
    if "mag" not in name:
        return weights.squared_norm(origin) / (4 * sigma**2) + confidence(m)
    return magnitude_aware(weights, origin, sigma**2 + 1, sigma, orig_denominator) + confidence(m)


def of_run(run: MeasuredRun, draws: Draws, *, orig_denominator: Denominator = "d", seed: int = 0) -> dict[str, Any]:
    """On training images of the source domains, all together."""
    options: dict[str, Any] = {"orig_denominator": orig_denominator, "seed": seed, "draws": draws}
    return pac_bayes(run.net, run.initial, run.all_training, m=run.training_count, **options)
