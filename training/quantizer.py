"""One LSQ quantizer: step sizes, a range, and what they make of a value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.kernels.lsq import fake_quantize, lsq_codes


@dataclass
class Prepared:
    """The result of one quantizer in the launch for the whole network, and what it is the result of."""

    result: Tensor
    value: Tensor
    state: tuple  # of `state_of`; empty in a trace of torch.compile, which would compile anew for every version
    traced: bool

    def serves(self, value: Tensor, step: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return self.traced and self.value is value
        # Activation checkpointing puts hooks on saved tensors. It runs a layer a second time, outside the network's
        # forward pass, and expects as many saved tensors: the first time, too, the layer has to quantize by itself.
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        return not hooked and self.value is value and self.state == state_of(value, step)


def state_of(*tensors: Tensor) -> tuple:
    return get_ident(), torch.is_grad_enabled(), *[None if t.is_inference() else t._version for t in tensors]


class Quantizer(nn.Module):
    """LSQ with its own step sizes: one float32 (shape []), or one for each slice along axis 0 (shape [C])."""

    prepared: Prepared | None = None  # during a forward pass of the network

    def __init__(self, step: Tensor, qmin: int, qmax: int, grad_scale: float, bundle: int = 0):
        super().__init__()
        self.step = nn.Parameter(step.float())
        self.qmin, self.qmax, self.grad_scale = qmin, qmax, grad_scale
        self.bundle = bundle  # of an input: layers whose inputs have the same number read one tensor

    @property
    def axis(self) -> int:
        return 0 if self.step.dim() else -1

    @property
    def bits(self) -> int:
        return (self.qmax - self.qmin).bit_length()

    def forward(self, value: Tensor) -> Tensor:
        prepared = self.prepared
        if prepared is not None and prepared.serves(value, self.step):
            return prepared.result
        return fake_quantize(value, self.step, self.qmin, self.qmax, self.axis, self.grad_scale)

    def codes(self, value: Tensor) -> Tensor:
        """The integer codes of `value`: int8, or uint8 for an unsigned range."""
        return lsq_codes(value, self.step, self.qmin, self.qmax, self.axis)

    def get_extra_state(self) -> Tensor:
        # Range and gradient scale of an input come from calibration data: a checkpoint has to carry them.
        return torch.tensor([self.qmin, self.qmax, self.bits, self.grad_scale, self.bundle], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.qmin, self.qmax, self.grad_scale, self.bundle = checked_state(state, "a quantizer")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}_extra_state" in state_dict:  # checked here, where the name is known
            checked_state(state_dict[f"{prefix}_extra_state"], f"quantizer `{prefix.rstrip('.')}`")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range=[{self.qmin}, {self.qmax}], steps={self.step.numel()}"


def checked_state(state: Any, at: str) -> tuple[int, int, float, int]:
    """qmin, qmax, gradient scale and bundle of a quantizer's state.

    A state may be an average of states (soups, moving averages), whose integers come out a rounding error away. Those
    of different ranges may come out as a third one (4, 4 and 6 bits as 5), but their bits never as the bits of that:
    2**bits is convex.
    """
    numbers = state.tolist() if isinstance(state, Tensor) and state.shape == (5,) else []
    if numbers and all(map(math.isfinite, numbers)):
        low, high, bits, scale, bundle = numbers
        ranges = [(qmin, qmin + 2**b - 1, b) for b in range(2, 9) for qmin in (0, -(2 ** (b - 1)))]
        qmin, qmax, b = min(ranges, key=lambda one: abs(low - one[0]) + abs(high - one[1]))
        off = max(abs(low - qmin) / qmax, abs(high - qmax) / qmax, abs(bits - b), abs(bundle - round(bundle)))
        if off < 0.01 and scale > 0 and bundle >= 0:
            return qmin, qmax, scale, round(bundle)
    got = numbers or (list(state.shape) if isinstance(state, Tensor) else type(state).__name__)
    raise InputError(f"expected the state of a quantizer of 2 to 8 bits, got {got} - at {at}")
