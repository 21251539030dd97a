"""How the gradients of one update are made: at the weights, or at weights that were moved uphill first.

`training.methods.objectives` says of which loss. What a step leaves is `.grad` of every parameter that trains; the
optimizer does the rest. With several devices each backward pass averages gradients over them, so norms and moves are
those of the whole minibatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.training.attached_quantizers import step_parameters

Closure = Callable[[], Tensor]  # the loss of this update's minibatch, with the same random draws at every call
Backward = Callable[[Tensor], Any]


class Step(Protocol):
    """How the gradients of an update are made."""

    def gradients(self, closure: Closure) -> Tensor:
        """Leaves them in `.grad` and returns the loss at the weights as they are, detached, shape []."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on: tensors, numbers and None."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        return None


class Plain(Step):
    """The gradient at the weights: one forward and one backward pass.

    Args:
        net: the network itself, within whatever wraps it for training.
        backward: what is called with the loss; the trainer's, where devices or precision ask for more.
    """

    def __init__(self, net: nn.Module, *, backward: Backward = Tensor.backward):
        self.net, self._backward = net, backward

    def gradients(self, closure: Closure) -> Tensor:
        self.net.zero_grad()
        return self._add_gradients(closure)

    def _add_gradients(self, closure: Closure) -> Tensor:
        loss = closure()
        self._backward(loss)
        return loss.detach()


class SAM(Plain):
    """Sharpness-aware minimization (arXiv 2010.01412, equations 2 and 3): the gradient at w + rho G / ||G||.

    G is the gradient at w of the same minibatch. Twice the passes of `Plain`. Raises InputError for a rho below 0.
    """

    def __init__(self, net: nn.Module, rho: float = 0.05, *, backward: Backward = Tensor.backward):
        super().__init__(net, backward=backward)
        self.rho = _not_negative(rho, "rho")

    def gradients(self, closure: Closure) -> Tensor:
        loss = super().gradients(closure)
        with moved_uphill(self.net, self.rho):
            super().gradients(closure)
        return loss


class SAGM(SAM):
    """Sharpness-aware gradient matching (arXiv 2303.10353): minimizes L(w) + L(w + (rho / ||G|| - alpha) G).

    Leaves the mean of both gradients, (G + G') / 2. Raises InputError for a rho or an alpha below 0.
    """

    def __init__(self, net: nn.Module, rho: float = 0.05, alpha: float = 1e-3, *, backward: Backward = Tensor.backward):
        super().__init__(net, rho, backward=backward)
        self.alpha = _not_negative(alpha, "alpha")

    def gradients(self, closure: Closure) -> Tensor:
        loss = Plain.gradients(self, closure)
        self._average_with_uphill(closure)
        return loss

    def _average_with_uphill(self, closure: Closure) -> None:
        with moved_uphill(self.net, self.rho, self.alpha):
            self._add_gradients(closure)  # to those of the first pass
        torch._foreach_mul_([p.grad for p in self.net.parameters() if p.grad is not None], 0.5)


class GAQAT(SAGM):
    """Gradient-adaptive quantization-aware training (arXiv 2412.05551, equation 1 and algorithm 1).

    SAGM, but the step size s of a quantizer gets ((1 - frozen) g_task + g_smooth) / 2. Of the gradients, g_task is the
    one at w and g_smooth the one uphill. A step size is frozen where g_task seldom changed its sign: where its
    disorder over the last K updates was below r. Where there is one step size a channel, each has its own mask.

    Args:
        r: the disorder below which a step size is frozen, 0 to 1; the defaults are the paper's for PACS at 4 bits.
        K: updates between two decisions, 2 or more. Update 0 is the first with step sizes; K makes the first decision.
        reverse: freezes where the disorder is r or more.
        no_unfreeze: what is frozen stays so.
        rho, alpha: those of `SAGM`.

    Raises InputError for r, K, rho or alpha out of range.
    """

    def __init__(
        self,
        net: nn.Module,
        r: float = 0.3,
        K: int = 350,
        rho: float = 0.05,
        alpha: float = 1e-3,
        *,
        reverse: bool = False,
        no_unfreeze: bool = False,
        backward: Backward = Tensor.backward,
    ):
        super().__init__(net, rho, alpha, backward=backward)
        if not 0 <= r <= 1:
            raise InputError(f"expected r from 0 to 1, got {r} - at GAQAT")
        self.r, self.reverse, self.no_unfreeze = r, reverse, no_unfreeze
        self.disorder = Disorder(K)
        self.frozen: Tensor | None = None  # bool [S]: of all step sizes of the network, one after the other

    def gradients(self, closure: Closure) -> Tensor:
        scales = step_parameters(self.net)
        if not scales:
            return super().gradients(closure)
        loss = Plain.gradients(self, closure)
        task = _taken(scales)
        self._average_with_uphill(closure)
        self._add_task(scales, task)
        self._decide(self.disorder.add(task))
        return loss

    def _add_task(self, scales: list[nn.Parameter], task: Tensor) -> None:
        kept = task if self.frozen is None else task.masked_fill(self.frozen, 0)
        for scale, part in zip(scales, (kept / 2).split([scale.numel() for scale in scales]), strict=True):
            part = part.view_as(scale)
            scale.grad = part if scale.grad is None else scale.grad + part

    def _decide(self, disorder: Tensor | None) -> None:
        if disorder is None:
            return
        frozen = disorder >= self.r if self.reverse else disorder < self.r
        self.frozen = frozen | self.frozen if self.no_unfreeze and self.frozen is not None else frozen

    def state_dict(self) -> dict[str, Any]:
        return {"frozen": self.frozen, **self.disorder.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(self.net.parameters()).device
        state = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in state.items()}
        self.frozen = state.pop("frozen")
        self.disorder.load_state_dict(state)


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

    def add(self, gradient: Tensor) -> Tensor | None:
        """Counts one update's gradients [S]; returns the disorder, float64 [S], where they end a window."""
        signs, place = gradient.sign(), self.updates % self.K
        if self.changes is None or self.signs is None or place == 1:  # the first of a window
            self.changes = torch.zeros_like(signs, dtype=torch.int64)
        else:
            self.changes = self.changes + (signs != self.signs)
        self.signs = signs
        self.updates += 1
        return self.changes.double() / self.K if place == 0 and self.updates > 1 else None

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {"updates": self.updates, "signs": self.signs, "changes": self.changes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.updates, self.signs, self.changes = state["updates"], state["signs"], state["changes"]


@contextmanager
def moved_uphill(net: nn.Module, rho: float, alpha: float = 0.0) -> Iterator[None]:
    """Within the block the network is at w + (rho / ||G|| - alpha) G, G being in `.grad`; then back at w, to the bit.

    The norm is one over all parameters with a gradient but the step sizes, which do not move either: the papers
    perturb latent weights. Buffers are put back as well: running statistics are those of the passes at w alone.
    """
    scales = {id(scale) for scale in step_parameters(net)}
    weights: list[Tensor] = [p for p in net.parameters() if p.grad is not None and id(p) not in scales]
    held = [*weights, *net.buffers()]
    before = [tensor.detach().clone() for tensor in held]
    try:
        _move_uphill(weights, rho, alpha)
        yield
    finally:
        with torch.no_grad():  # copied, not subtracted: w + e - e is not w
            torch._foreach_copy_(held, before)


@torch.no_grad()
def _move_uphill(weights: list[Tensor], rho: float, alpha: float) -> None:
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    torch._foreach_add_(weights, gradients, alpha=rho / (norm + 1e-12) - alpha)


def _taken(scales: list[nn.Parameter]) -> Tensor:
    """The gradients of all step sizes in one vector [S]; takes them off. One without a gradient counts as 0."""
    parts = [torch.zeros_like(scale) if scale.grad is None else scale.grad for scale in scales]
    for scale in scales:
        scale.grad = None
    return torch.cat([part.flatten() for part in parts])


def _not_negative(value: float, name: str) -> float:
    if not 0 <= value < math.inf:
        raise InputError(f"expected {name} of 0 or more, got {value} - at the step of a method")
    return value
