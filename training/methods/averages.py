"""Averages of the networks that training passes through: what is evaluated, selected and exported in their place.

Averaged are parameters and float buffers: of a quantized network the latent weights and the step sizes, so that it is
quantized once, after the mean. Where the tensors of the network change, because quantizers were attached, an average
begins anew: latent weights before the switch have no step sizes to be averaged with.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qdeploy.errors import InputError


class Average(Protocol):
    """What a run keeps of the networks after its updates."""

    goes_by_losses = False  # whether it has to be told the losses of the network that trains, by `record`

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


class _OneMean(Average):
    """An average that is the mean of some of the networks."""

    def __init__(self) -> None:
        self.mean = Mean()

    def network(self, net: nn.Module) -> nn.Module:
        return self.mean.network(net)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean.load_state_dict(state["mean"])


class SMA(_OneMean):
    """Simple moving average (Ensemble of Averages, arXiv 2110.10832, section 3; SMA there).

    With updates counted from 1: a_t = w_t before `first`, then a_t = (n a_{t-1} + w_t) / (n + 1), n = t - first + 1.
    After the switch it begins with the first quantized network, a = w.
    """

    def __init__(self, first: int = 100):
        super().__init__()
        self.first = first

    def update(self, net: nn.Module, t: int) -> None:
        if t + 1 < self.first:
            self.mean.clear()
        self.mean.add(averaged_tensors(net))


class SWA(_OneMean):
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
    evaluation. Beside the segment that is not complete it holds `patience` + 1 networks, on the CPU.
    """

    goes_by_losses = True

    def __init__(
        self, start: int, updates: int, every: int, converge: int = 3, patience: int = 6, tolerance: float = 0.3
    ):
        """`start`: the update at whose start the run is quantized, or 0; `updates` and `every` as for SWA."""
        evaluations = len([t for t in range(0, updates, every) if t >= start])
        if not 2 <= converge <= patience:
            got = f"{converge} and {patience}"
            raise InputError(f"expected 2 <= converge <= patience, got {got} - at SWAD")
        if evaluations < converge:
            expected = f"{converge} evaluations or more of the network that is averaged"
            raise InputError(f"expected {expected}, got {evaluations} - at SWAD")
        self.last = (updates - 1) // every * every
        self.segment, self.valley = Mean(), Valley(converge, patience, tolerance)

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


Segment = tuple[float, dict[str, Tensor]]  # its loss, and the mean of its networks


class Valley:
    """LossValley of SWAD, from segments that come one after the other.

    The run has converged at the oldest of `converge` segments whose loss is below those of all others of them; the
    threshold is the mean of these losses times 1 + `tolerance`. In are this segment, those right before it, `patience`
    - `converge` at most, that are not above the threshold, and each one after it, in order, as long as it or one of the
    `patience` - 1 that follow it is not above the threshold. Each counts once, and as much as any other. (In the
    authors' code the first of the valley does not count, the oldest one counts twice, and equal losses converge.)
    """

    def __init__(self, converge: int, patience: int, tolerance: float):
        self.converge, self.patience, self.tolerance = converge, patience, tolerance
        self.clear()

    def clear(self) -> None:
        self.inside = Mean()  # the segments that are in for good
        self.queue: list[Segment] = []  # those that are not judged yet
        self.threshold: float | None = None  # once it has converged
        self.ended = False

    def of_others(self, tensors: dict[str, Tensor]) -> bool:
        """Whether the segments have tensors of other names."""
        return self.inside.of_others(tensors) or any(segment.keys() != tensors.keys() for _, segment in self.queue[:1])

    def add(self, loss: float, segment: dict[str, Tensor]) -> None:
        self.queue.append((loss, segment))
        if self.threshold is None:
            self._look_for_convergence()
        elif len(self.queue) == self.patience:
            if self._goes_on(self.queue):
                self.inside.add(self.queue.pop(0)[1])
            else:
                self.ended, self.queue = True, []

    def _look_for_convergence(self) -> None:
        window = [loss for loss, _ in self.queue[-self.converge :]]
        if len(window) == self.converge and window[0] < min(window[1:]):
            self.threshold = statistics.fmean(window) * (1 + self.tolerance)
            oldest = first = len(self.queue) - self.converge
            while first and self.queue[first - 1][0] <= self.threshold:
                first -= 1
            for _, segment in self.queue[first : oldest + 1]:
                self.inside.add(segment)
            self.queue = self.queue[oldest + 1 :]
        elif len(self.queue) == self.patience:
            del self.queue[0]

    def _goes_on(self, queue: list[Segment]) -> bool:
        assert self.threshold is not None
        return min(loss for loss, _ in queue) <= self.threshold

    def mean(self) -> Mean:
        """As if no segment came any more; that of the last one where the run has not converged."""
        mean, waiting = self.inside.copy(), list(self.queue)
        if self.threshold is None:
            for _, segment in waiting[-1:]:
                mean.add(segment)
        else:
            while waiting and self._goes_on(waiting):
                mean.add(waiting.pop(0)[1])
        return mean

    def state_dict(self) -> dict[str, Any]:
        inside = self.inside.state_dict()
        return {"inside": inside, "queue": [*self.queue], "threshold": self.threshold, "ended": self.ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inside.load_state_dict(state["inside"])
        self.queue, self.threshold, self.ended = [*state["queue"]], state["threshold"], state["ended"]


class Mean:
    """The mean of tensors by name, each counted once; it lies where the first ones did."""

    def __init__(self) -> None:
        self.count, self.tensors = 0, dict[str, Tensor]()

    def clear(self) -> None:
        self.count, self.tensors = 0, {}

    def of_others(self, tensors: dict[str, Tensor]) -> bool:
        """Whether it is the mean of tensors of other names."""
        return bool(self.tensors) and self.tensors.keys() != tensors.keys()

    @torch.no_grad()
    def add(self, tensors: dict[str, Tensor]) -> None:
        """Counts `tensors`; those of other names than before begin anew."""
        if self.of_others(tensors):
            self.clear()
        if not self.count:
            self.tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        else:
            # A checkpoint may have been loaded on another device. A step from the mean so far, not a sum over the
            # count: the mean of equal tensors is that tensor, to the bit.
            self.tensors = {name: tensor.to(tensors[name].device) for name, tensor in self.tensors.items()}
            torch._foreach_lerp_([*self.tensors.values()], [*tensors.values()], 1 / (self.count + 1))
        self.count += 1

    @torch.no_grad()
    def network(self, net: nn.Module) -> nn.Module:
        """A copy of `net` with this mean, or `net` itself where it is a mean of nothing, or of other tensors."""
        if not self.count or self.of_others(averaged_tensors(net)):
            return net
        net = copy.deepcopy(net)
        for name, tensor in averaged_tensors(net).items():
            tensor.copy_(self.tensors[name])
        return net

    def copy(self) -> Mean:
        other = Mean()
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "tensors": {name: tensor.clone() for name, tensor in self.tensors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.tensors = {name: tensor.clone() for name, tensor in state["tensors"].items()}


def averaged_tensors(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and float buffers by name, shared ones once."""
    tensors = dict(net.named_parameters())
    return tensors | {name: buffer for name, buffer in net.named_buffers() if buffer.is_floating_point()}
