"""Incremental network quantization: weights come onto a grid for good, the largest first, while the rest trains on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.errors import ExportError, InputError
from qdeploy.training.initial_steps import MIN_STEP
from qdeploy.training.methods.batches import Minibatches
from qdeploy.training.methods.fixed import Bits, SharedWeight, attach_fixed, code_range, shared_weights
from qdeploy.training.methods.quantizations import Quantization
from qdeploy.training.quantize_checks import select
from qdeploy.training.quantizer import Quantizer

FRACTIONS = (0.5, 0.75, 0.875, 1.0)  # of each layer that are on their grids, one quarter of the updates after the other


class INQ(Quantization):
    """INQ (arXiv 1702.03044, section 2) on a uniform grid, or on the paper's powers of two.

    Before the updates `start` + {0, 1/4, 1/2, 3/4} of those left, {1/2, 3/4, 7/8, 1} of each layer are on its grid. An
    optimizer moves weights without gradients too, by its moments and by weight decay: after each step those on the grid
    are put back. `updates` are those of the whole run.
    Powers of two of 5 bits and more have no integer codes of 8 bits: such weights stay float.
    """

    def __init__(
        self, start: int, updates: int, bits: Bits = 7, powers_of_two: bool = False, allow_float: tuple[str, ...] = ()
    ):
        if start >= updates:
            raise InputError(f"expected a switch before the last of {updates} updates, got {start} - at INQ")
        self.start, self.bits, self.allow_float = start, bits, allow_float
        self.grid = PowersOfTwo if powers_of_two else UniformGrid
        self.times = [start + (updates - start) * quarter // 4 for quarter in range(4)]
        self.parts: dict[str, Part] = {}

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Minibatches) -> None:
        self._attach(net, lambda weight: max(weight.values.abs().max().item(), MIN_STEP))
        self._fix(self.times[0])

    def reattach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Tensor]) -> None:
        self._attach(net, lambda weight: 1.0)  # the step sizes are in `state`
        net.load_state_dict(state)

    def _attach(self, net: nn.Module, scale_of: Callable[[SharedWeight], float]) -> None:
        weights = shared_weights(net, self.bits, self.allow_float)
        self.parts = {name: Part(one, self.grid(scale_of(one), one.bits)) for name, one in weights.items()}
        made = {name: part.quantizer for name, part in self.parts.items() if part.quantizer is not None}
        attach_fixed(net, weights, made)

    def after_step(self, t: int) -> None:
        for part in self.parts.values():
            part.put_back()
        if t + 1 in self.times:
            self._fix(t + 1)

    def _fix(self, t: int) -> None:
        """Puts onto the grids what is due at the start of update `t`."""
        due = max(part for time, part in zip(self.times, FRACTIONS, strict=True) if time <= t)
        for part in self.parts.values():
            part.fix(due)

    def eligible(self, t: int) -> bool:
        return t >= self.times[-1]

    def check_export(self, net: nn.Module) -> None:
        layers, _ = select(net, self.bits, allow_float=self.allow_float)
        for name, (_, bits) in layers.items():
            check_codes(self.grid(1.0, bits), bits, name)

    def state_dict(self) -> dict[str, Any]:
        return {name: (part.grid.scale, part.level.clone()) for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            scale, level = state[name]
            part.go_on(self.grid(scale, part.weight.bits), level)


def check_codes(grid: UniformGrid | PowersOfTwo, bits: int, name: str) -> None:
    """Raises ExportError where the codes of a layer on a grid of so many bits do not fit 8 bits."""
    if grid.code_bits > 8:
        expected = "powers of two of 4 bits or less (their codes are 0, +-1, +-2, +-4, +-8)"
        got = f"{bits} bits, whose codes reach 2^{2 ** (bits - 2) - 1}"
        raise ExportError(f"expected {expected}, got {got} - at layer `{name}`")


class UniformGrid:
    """S / (2^(b-1) - 1) * {-(2^(b-1) - 1)..2^(b-1) - 1}, where S is the largest |w| of the layer at the switch."""

    def __init__(self, scale: float, bits: int):
        self.scale, self.code_bits, self.most = scale, bits, 2 ** (bits - 1) - 1
        self.step = scale / self.most

    def nearest(self, weight: Tensor) -> Tensor:
        step = torch.tensor(self.step, device=weight.device)
        return (weight / step).clamp(-self.most, self.most).round() * step


class PowersOfTwo:
    """{0, +-2^low..+-2^high}, high = floor(log2(4S/3)), low = high + 1 - 2^(b-2) (equations 2 to 4 of the paper).

    In steps of 2^low the codes are 0, +-1, +-2, +-4 to +-2^(2^(b-2) - 1), which takes `code_bits`.
    """

    def __init__(self, scale: float, bits: int):
        self.scale, self.code_bits = scale, 2 ** (bits - 2) + 1
        self.high = math.frexp(4 * scale / 3)[1] - 1
        self.low = self.high + 1 - 2 ** (bits - 2)
        self.step = 2.0**self.low

    def nearest(self, weight: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(weight.abs())  # in [1/2, 1); below 3/4 the lower power is nearer
        place = (exponent - (mantissa < 0.75).int()).clamp(self.low, self.high) - self.low
        powers = weight.new_tensor([2.0**power for power in range(self.low, self.high + 1)])
        return torch.where(weight.abs() < self.step / 2, 0, powers[place.long()].copysign(weight))


class Part:
    """The part of a weight that is on its grid."""

    def __init__(self, weight: SharedWeight, grid: UniformGrid | PowersOfTwo):
        self.weight, self.grid = weight, grid
        self.level = weight.values.new_full(weight.values.shape, torch.nan)  # NaN where the weight trains
        self.quantizer: LateQuantizer | None = None
        if grid.code_bits <= 8:
            self.quantizer = LateQuantizer(torch.tensor(grid.step), *code_range(grid.code_bits), grad_scale=1.0)

    def fix(self, fraction: float) -> None:
        """Puts the largest weights that train onto the grid until a fraction of all is there."""
        values, level = self.weight.values.flatten(), self.level.view(-1)
        trains = level.isnan()
        due = int(fraction * len(level)) - int((~trains).sum())
        chosen = values.abs().masked_fill(~trains, -1).argsort(descending=True, stable=True)[:due]
        level[chosen] = self.grid.nearest(values[chosen])
        self.put_back()
        self._wait()

    def go_on(self, grid: UniformGrid | PowersOfTwo, level: Tensor) -> None:
        """With what has been fixed until now."""
        self.grid = grid
        self.level.copy_(level)
        self._wait()

    def _wait(self) -> None:
        if self.quantizer is not None:
            self.quantizer.waiting = bool(self.level.isnan().any())

    def put_back(self) -> None:
        """What is on the grid is what it was when it came there, to the bit."""
        values = self.weight.values
        values.copy_(torch.where(self.level.isnan(), values, self.level))


class LateQuantizer(Quantizer):
    """Leaves its weight alone until all of it lies on the grid. It is there before: data-parallel training holds
    the network, whose parameters must not move to another module then."""

    waiting = False

    def forward(self, value: Tensor) -> Tensor:
        return value if self.waiting else super().forward(value)
