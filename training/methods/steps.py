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
from qdeploy.training.methods.freezing import Freezing, Window

Closure = Callable[[], Tensor]  # the loss of this update's minibatch, with the same random draws at every call
Backward = Callable[[Tensor], Any]


class Step(Protocol):
    """How the gradients of an update are made."""

    has_windows: bool = False  # whether there is something to record after some updates
    window: Window | None = None  # what there is after this one

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
    After an update that ends K of them `window` holds what the figures of the paper show.

    Args:
        r: the disorder below which a step size is frozen, 0 to 1; the defaults are the paper's for PACS at 4 bits.
        K: updates between two decisions, 2 or more. Update 0 is the first with step sizes; K makes the first decision.
        reverse: freezes where the disorder is r or more.
        no_unfreeze: what is frozen stays so.
        rho, alpha: those of `SAGM`.

    Raises InputError for r, K, rho or alpha out of range.
    """

    has_windows = True

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
        self.freezing = Freezing(r, K, reverse, no_unfreeze)

    def gradients(self, closure: Closure) -> Tensor:
        self.window, scales = None, step_parameters(self.net)
        if not scales:
            return super().gradients(closure)
        loss = Plain.gradients(self, closure)
        task = _gradients_of(scales)
        for scale in scales:
            scale.grad = None
        self._average_with_uphill(closure)
        smooth = _gradients_of(scales)  # half of it
        _set_gradients(scales, self.freezing.kept(task) / 2 + smooth)
        self.window = self.freezing.add(task, 2 * smooth, scales)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return self.freezing.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.freezing.load_state_dict(state, next(self.net.parameters()).device)


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


def _gradients_of(scales: list[nn.Parameter]) -> Tensor:
    """Of all step sizes in one vector [S]. One without a gradient counts as 0."""
    return torch.cat([(torch.zeros_like(s) if s.grad is None else s.grad).flatten() for s in scales])


def _set_gradients(scales: list[nn.Parameter], gradients: Tensor) -> None:
    for scale, part in zip(scales, gradients.split([scale.numel() for scale in scales]), strict=True):
        scale.grad = part.view_as(scale)


def _not_negative(value: float, name: str) -> float:
    if not 0 <= value < math.inf:
        raise InputError(f"expected {name} of 0 or more, got {value} - at the step of a method")
    return value
