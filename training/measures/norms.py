"""The L2 norm of the weights, as one vector, with BatchNorm as it is and folded into the layers (QGen, table 2).

Flatness depends on it: a distance in the space of weights means less where they are large.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qdeploy.training.measures.draws import Draws
from qdeploy.training.measures.measured_run import MeasuredRun
from qdeploy.training.measures.weights import bare, folded, weights


def norms(net: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """Of the weights as layers compute with them: quantized ones of what the grid made of them.

    inputs: a part of a batch; a forward pass of it shows which BatchNorms are folded where.

    Returns {"weights": how many, "norm", "norm_folded", "table": {"layer", "weights", "norm", "norm_folded"} of each
    weight}. Raises InputError as `folded` does.
    """
    plain, without = (_squares(one) for one in (bare(net), folded(net, inputs)))
    counts = {name: weight.numel() for name, weight in weights(net).items()}
    table = [
        {"layer": name, "weights": counts[name], "norm": square**0.5, "norm_folded": without[name] ** 0.5}
        for name, square in plain.items()
    ]
    total, total_folded = sum(plain.values()) ** 0.5, sum(without.values()) ** 0.5
    return {"weights": sum(counts.values()), "norm": total, "norm_folded": total_folded, "table": table}


def _squares(net: nn.Module) -> dict[str, float]:
    return {name: float(weight.detach().double().square().sum()) for name, weight in weights(net).items()}


def of_run(run: MeasuredRun, draws: Draws) -> dict[str, Any]:
    """Of the selected network."""
    inputs, _ = next(iter(run.training.values()))[0]
    return norms(run.net, inputs[:2])
