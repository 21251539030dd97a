"""Averages of the networks that training passes through: what is evaluated, selected and exported in their place.

Averaged are parameters and float buffers: of a quantized network the latent weights and the step sizes, so that it is
quantized once, after the mean. Where the tensors of the network change, because quantizers were attached, an average
begins anew: latent weights before the switch have no step sizes to be averaged with.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from qdeploy.errors import InputError
from qdeploy.training.methods.mean import Mean, averaged_tensors
from qdeploy.training.methods.valley import AuthorsValley, Valley


class Average(Protocol):
    """What a run keeps of the networks after its updates."""

    goes_by_losses: bool = False  # whether it has to be told the losses of the network that trains, by `record`

    def begin(self, net: nn.Module) -> None:
        """Before update 0, with the network that the run begins with."""

    def update(self, net: nn.Module, t: int) -> None:
        """After update `t` (from 0), with the network that it made."""

    def record(self, t: int, losses: Sequence[float]) -> None:
        """At an evaluation after update `t`, before `network`: the cross-entropies of the network that trains, on the
        validation images of each source domain."""

    def network(self, net: nn.Module) -> nn.Module:
        """The averaged network: a copy of `net`, the network of now, or `net` itself where nothing is averaged yet."""
        return net

    def eligible(self, t: int) -> bool:
        """Whether the network of the evaluation after update `t` may be selected."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """All that the coming updates depend on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""


class NoAverage(Average):
    """The network after the last update."""


class OneMean(Average):
    """An average that is the mean of some of the networks."""

    def __init__(self) -> None:
        self.mean = Mean()

    def network(self, net: nn.Module) -> nn.Module:
        return self.mean.network(net)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean.load_state_dict(state["mean"])


class SMA(OneMean):
    """Simple moving average (Ensemble of Averages, arXiv 2110.10832, section 3; SMA there).

    With updates counted from 1: a_t = w_t before `first`, then a_t = (n a_{t-1} + w_t) / (n + 1), n = t - first + 1.
    After the switch it begins with the first quantized network, a = w.
    """

    def __init__(self, first: int = 100):
        super().__init__()
        self.first = first

    def update(self, net: nn.Module, t: int) -> None:
        if t + 1 >= self.first - 1:  # before it a_t is the network itself
            self.mean.add(averaged_tensors(net))


class SWA(OneMean):
    """Stochastic weight averaging (arXiv 1803.05407): the mean of the networks at the evaluations of the last quarter.

    Every network counts the same; the learning rate stays what it is. `updates` are those of the whole run, evaluated
    after every update that `every` divides.
    """

    def __init__(self, updates: int, every: int):
        super().__init__()
        self.updates, self.every = updates, every
        if not any(self.eligible(t) for t in range(0, updates, every)):
            got = f"none in {updates} updates, with one every {every}"
            raise InputError(f"expected an evaluation in the last quarter of the run, got {got} - at SWA")

    def update(self, net: nn.Module, t: int) -> None:
        if self.eligible(t) and t % self.every == 0:
            self.mean.add(averaged_tensors(net))

    def eligible(self, t: int) -> bool:
        return t >= 0.75 * self.updates


class SWAD(Average):
    """Stochastic weight averaging densely (arXiv 2102.08604): the mean over a valley of the validation loss.

    A segment is the mean of the networks after every update between two evaluations, its loss the mean over the source
    domains at its end; `Valley` says which segments are in. One network of a run is SWAD's: that of the last
    evaluation. Beside the segment that is not complete it holds `patience` + 1 networks, on the CPU. `compat` has the
    valley of the authors' code. `start`: the update at whose start the run is quantized, or 0.
    """

    goes_by_losses = True

    def __init__(
        self,
        start: int,
        updates: int,
        every: int,
        converge: int = 3,
        patience: int = 6,
        tolerance: float = 0.3,
        compat: bool = False,
    ):
        evaluations = len([t for t in range(0, updates, every) if t >= start])
        if not 2 <= converge <= patience:
            got = f"{converge} and {patience}"
            raise InputError(f"expected 2 <= converge <= patience, got {got} - at SWAD")
        if evaluations < converge:
            expected = f"{converge} evaluations or more of the network that is averaged"
            raise InputError(f"expected {expected}, got {evaluations} - at SWAD")
        self.last = (updates - 1) // every * every
        kind = AuthorsValley if compat else Valley
        self.segment, self.valley = Mean(), kind(converge, patience, tolerance)

    def update(self, net: nn.Module, t: int) -> None:
        tensors = averaged_tensors(net)
        if self.valley.of_others(tensors):
            self.valley.clear()
        if not self.valley.ended:
            self.segment.add(tensors)

    def record(self, t: int, losses: Sequence[float]) -> None:
        if not self.valley.ended:
            segment = {name: tensor.cpu() for name, tensor in self.segment.tensors.items()}
            self.valley.add(statistics.fmean(losses), segment)
            self.segment = Mean()

    def network(self, net: nn.Module) -> nn.Module:
        return self.valley.mean().network(net)

    def eligible(self, t: int) -> bool:
        return t >= self.last

    def state_dict(self) -> dict[str, Any]:
        return {"segment": self.segment.state_dict(), "valley": self.valley.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.segment.load_state_dict(state["segment"])
        self.valley.load_state_dict(state["valley"])
