"""Which step sizes GAQAT freezes: those whose gradients seldom changed their signs in a window of K updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdeploy.errors import InputError


@dataclass(frozen=True)
class Window:
    """Of all step sizes of a network, one after the other, at the end of a window: each float64 [S], on the CPU."""

    s: Tensor
    sum_task: Tensor  # of the gradients at w, over the K updates
    sum_smooth: Tensor  # of those uphill
    disorder_task: Tensor
    disorder_smooth: Tensor
    frozen: Tensor  # 1 where it is frozen from the next update on, else 0


class Freezing:
    """Algorithm 1 of GAQAT (arXiv 2412.05551): frozen is where the disorder of g_task in the last window is below r.

    With `reverse`, where it is r or more; with `no_unfreeze` what is frozen stays so. Raises InputError for r outside
    0 to 1.
    """

    def __init__(self, r: float, K: int, reverse: bool = False, no_unfreeze: bool = False):
        if not 0 <= r <= 1:
            raise InputError(f"expected r from 0 to 1, got {r} - at GAQAT")
        self.r, self.reverse, self.no_unfreeze = r, reverse, no_unfreeze
        self.disorder = Disorder(K)  # of g_task and g_smooth
        self.frozen: Tensor | None = None  # bool [S]; nothing is frozen before the first decision

    def kept(self, task: Tensor) -> Tensor:
        """g_task [S], 0 where it is frozen."""
        return task if self.frozen is None else task.masked_fill(self.frozen, 0)

    def add(self, task: Tensor, smooth: Tensor, scales: Sequence[Tensor]) -> Window | None:
        """Counts one update's gradients [S] of the step sizes `scales`; decides anew where they end a window."""
        disorder = self.disorder.add(torch.stack([task, smooth]))
        if disorder is None:
            return None
        frozen = disorder[0] >= self.r if self.reverse else disorder[0] < self.r
        self.frozen = frozen | self.frozen if self.no_unfreeze and self.frozen is not None else frozen
        assert self.disorder.sums is not None
        s = torch.cat([scale.detach().flatten() for scale in scales])
        return Window(*torch.stack([s, *self.disorder.sums, *disorder, self.frozen]).cpu())

    def state_dict(self) -> dict[str, Any]:
        """All that the next updates depend on."""
        return {"frozen": self.frozen, **self.disorder.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continues from `state_dict`."""
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in state.items()}
        self.frozen = moved["frozen"]
        self.disorder.load_state_dict(moved)


class Disorder:
    """Gradient disorder (arXiv 2412.05551, definition 3.1): how often the signs of gradients change.

    Of K updates in a row the share 1/K sum_j [sgn g_j != sgn g_(j+1)], (K - 1)/K at most. The sign 0 differs from both
    others. Windows are the updates 1 to K, K + 1 to 2K and so on, update 0 before them; the change from one window to
    the next counts in neither. Raises InputError for a K below 2.
    """

    def __init__(self, K: int):
        if K < 2:
            raise InputError(f"expected K of 2 updates or more, got {K} - at GAQAT")
        self.K, self.updates = K, 0
        self.signs: Tensor | None = None
        self.changes: Tensor | None = None
        self.sums: Tensor | None = None  # of the gradients in this window

    def add(self, gradients: Tensor) -> Tensor | None:
        """Counts one update's gradients; returns the disorder, float64 of their shape, where they end a window, whose
        `sums` are there until the next update."""
        signs, place = gradients.sign(), self.updates % self.K
        if self.signs is None or self.changes is None or self.sums is None or place == 1:  # the first of a window
            self.changes = torch.zeros_like(signs, dtype=torch.int64)
            self.sums = gradients.double()
        else:
            self.changes = self.changes + (signs != self.signs)
            self.sums = self.sums + gradients
        self.signs = signs
        self.updates += 1
        return self.changes.double() / self.K if place == 0 and self.updates > 1 else None

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {"updates": self.updates, "signs": self.signs, "changes": self.changes, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.updates, self.signs = state["updates"], state["signs"]
        self.changes, self.sums = state["changes"], state["sums"]
