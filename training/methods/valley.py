"""The valley of SWAD: which parts of a run are averaged, by the validation losses at their ends."""

from __future__ import annotations

import statistics
from typing import Any

from torch import Tensor

from qdeploy.training.methods.mean import Mean

Segment = tuple[float, dict[str, Tensor]]  # its loss, and the mean of its networks


class Valley:
    """LossValley of SWAD, from segments that come one after the other.

    The run has converged at the oldest of `converge` segments whose loss is below those of all others of them; the
    threshold is the mean of these losses times 1 + `tolerance`. In are this segment, those right before it, `patience`
    - `converge` at most, that are not above the threshold, and each one after it, in order, as long as it or one of the
    `patience` - 1 that follow it is not above the threshold. Each counts once, and as much as any other.
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


class AuthorsValley(Valley):
    """The valley of the code that was published with SWAD, which differs from its description.

    Equal losses converge. When a run converges, the oldest `patience` - `converge` + 1 segments of the last `patience`
    are looked at: of those behind the last one that is above the threshold, the first does not count. (Where fewer than
    `patience` came until then, segments behind the converged one are among these.) From then on the oldest of the last
    `patience` counts at every evaluation, unless it is older than the converged one, which therefore counts anew. At
    the end the oldest is left out, whatever it is, and those behind it count as long as one left is not above the
    threshold. Where nothing has counted, the network is that of the converged segment.

    (Buffers are not averaged there; they are either frozen or made anew afterwards, as `reestimate_` does.)
    """

    def clear(self) -> None:
        super().clear()
        self.older = 0  # segments of the queue before the converged one
        self.converged: dict[str, Tensor] | None = None  # that one, until another has counted

    def add(self, loss: float, segment: dict[str, Tensor]) -> None:
        self.queue.append((loss, segment))
        if len(self.queue) > self.patience:
            del self.queue[0]
            self.older = max(self.older - 1, 0)
        if self.threshold is None:
            self._look_for_convergence()
        elif not self.older:
            if self._goes_on(self.queue):
                self._count(self.queue[0][1])
            else:
                self.inside, self.ended, self.queue = self.mean(), True, []

    def _look_for_convergence(self) -> None:
        window = [loss for loss, _ in self.queue[-self.converge :]]
        if len(window) < self.converge or window[0] > min(window):
            return
        self.threshold = statistics.fmean(window) * (1 + self.tolerance)
        self.older, self.converged = len(self.queue) - self.converge, self.queue[-self.converge][1]
        seen = self.queue[: self.patience - self.converge + 1] if self.patience > self.converge else []
        above = [place for place, (loss, _) in enumerate(seen, 1) if loss > self.threshold]
        for _, segment in seen[max(above, default=0) + 1 :]:
            self._count(segment)

    def _count(self, segment: dict[str, Tensor]) -> None:
        self.inside.add(segment)
        self.converged = None

    def mean(self) -> Mean:
        if self.threshold is None:
            return super().mean()
        mean, waiting = self.inside.copy(), self.queue[1:]
        while waiting and self._goes_on(waiting):
            mean.add(waiting.pop(0)[1])
        if not mean.total and self.converged is not None:
            mean.add(self.converged)
        return mean

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"older": self.older, "converged": self.converged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.older, self.converged = state["older"], state["converged"]
