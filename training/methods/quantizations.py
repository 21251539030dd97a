"""How the weights of a network come onto a grid of integers: in training, or when it is finished.

What `qdeploy.export` writes are the codes of the Quantizers (`training/quantizer.py`) that are attached at the end. LSQ
attaches them at the switch and trains with them; the others attach them when every weight lies on its grid, w = code *
step, where they change no weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qdeploy.errors import ExportError, InputError
from qdeploy.training.attached import attach, identity, originals, project_steps_, quantizers, step_group
from qdeploy.training.initial_steps import MIN_STEP, initial_step
from qdeploy.training.methods.obc import hessians, quantize_rows
from qdeploy.training.one_launch import quantize_together
from qdeploy.training.quantize import quantize_
from qdeploy.training.quantize_like import quantize_like_
from qdeploy.training.quantizer import Quantizer
from qdeploy.training.start import seed_hash
from qdeploy.training.targets import check_weight, checked_network, select
from qdeploy.training.untouched import is_computed

Minibatches = list[tuple[Tensor, Tensor]]  # images f32 [n, C, H, W] and classes int64 [n] of each source domain


class Quantization(Protocol):
    """When and how a run quantizes its network."""

    start: int | None  # the update at whose start `attach` is called; None: after the last one, on the selected network

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Minibatches) -> None:
        """Changes `net` in place. `batches` are those of all devices; the optimizer gets what trains anew."""

    def reattach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Tensor]) -> None:
        """Gives the float network of a run that goes on, or is finished, the form whose `state_dict` is `state`, and
        loads that; a caller that trains then loads the states of the optimizer and of this object."""
        net.load_state_dict(state)

    def after_step(self, t: int) -> None:
        """After the optimizer's step of update `t`, from `start` on."""

    def eligible(self, t: int) -> bool:
        """Whether the network after update `t` is what this makes of it: only such a one may be selected."""
        return self.start is None or t >= self.start

    def check_export(self, net: nn.Module) -> None:
        """Raises ExportError where no network of this method can be exported; `net` is not quantized yet."""

    def state_dict(self) -> dict[str, Any]:
        """All that the coming updates depend on, beside the network and the optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`, after `reattach`."""


class LSQ(Quantization):
    """Learned step sizes (arXiv 1902.08153), as QT-DoG trains them: v = s * rint(clip(w / s)), w and s both train.

    The Parameter objects stay, so the optimizer keeps its moments, and the step sizes join it as a group of their own.
    `scope` "no_s" freezes the step sizes, "bn_head" the quantized weights too. All else as for `quantize_`.
    """

    def __init__(
        self,
        start: int,
        bits: int | Mapping[str, int] = 7,
        activation_bits: int | None = None,
        *,
        per_channel: bool = True,
        init: str = "lsq",
        grad_scale: str = "tensor",
        scope: str = "all",
        lr: float = 1e-5,
        reset_optimizer: bool = False,
    ):
        self.start, self.bits, self.activation_bits = start, bits, activation_bits
        self.options: dict[str, Any] = {"per_channel": per_channel, "init": init, "grad_scale": grad_scale}
        self.scope, self.lr, self.reset_optimizer = scope, lr, reset_optimizer
        self.net: nn.Module | None = None

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Minibatches) -> None:
        quantize_(net, self.bits, self.activation_bits, **self.options, calibration=[images for images, _ in batches])
        self._train(net, optimizer)

    def reattach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Tensor]) -> None:
        quantize_like_(net, state)
        self._train(net, optimizer)

    def _train(self, net: nn.Module, optimizer: Any) -> None:
        self.net = net
        for name, quantizer in quantizers(net).items():
            quantizer.step.requires_grad_(self.scope == "all")
            layer, _, kind = name.rpartition(".")
            if self.scope == "bn_head" and kind == "weight":
                for weight in originals(net.get_submodule(layer)):
                    weight.requires_grad_(False).grad = None  # or the optimizer would make a step with the last one
        if self.reset_optimizer:
            optimizer.state.clear()
        if self.scope == "all":
            optimizer.add_param_group(step_group(net, self.lr))

    def after_step(self, t: int) -> None:
        if self.net is not None:
            project_steps_(self.net)


class INQ(Quantization):
    """Incremental network quantization (arXiv 1702.03044, section 2): weights come onto a grid for good, the largest
    first, while the rest trains on in float.

    Before the updates `start` + {0, 1/4, 1/2, 3/4} of those left, {1/2, 3/4, 7/8, 1} of each layer are on it. S is the
    largest |w| of the layer at `start`. The grid is uniform, S / (2^(b-1) - 1) * {-(2^(b-1) - 1)..2^(b-1) - 1}, or the
    paper's `powers_of_two`: {0, +-2^n2..+-2^n1} with n1 = floor(log2(4S/3)), n2 = n1 + 1 - 2^(b-2). Their codes are
    +-2^0..+-2^(2^(b-2) - 1), more than 8 bits hold from b = 5 on: such a network stays float.

    An optimizer moves weights without gradients too, by its moments and by weight decay: after each step the weights
    on the grid are put back.
    """

    FRACTIONS = (0.5, 0.75, 0.875, 1.0)

    def __init__(self, start: int, updates: int, bits: int | Mapping[str, int] = 7, powers_of_two: bool = False):
        """`updates`: of the whole run."""
        if start >= updates:
            raise InputError(f"expected a switch before the last of {updates} updates, got {start} - at INQ")
        self.start, self.bits, self.powers_of_two = start, bits, powers_of_two
        self.times = [start + (updates - start) * quarter // 4 for quarter in range(4)]
        self.scales: dict[str, float] = {}  # S of each layer
        self.levels: dict[str, Tensor] = {}  # what a weight is for good, NaN for those that train

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Minibatches) -> None:
        self._find(net)
        for name, weight in self.weights.items():
            self.scales[name] = max(weight.values.abs().max().item(), MIN_STEP)
            self.levels[name] = weight.values.new_full(weight.values.shape, torch.nan)
        self._freeze(self.start)

    def reattach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Tensor]) -> None:
        self._find(net)
        if any(name.endswith("parametrizations.weight.0.step") for name in state):
            _reattach_fixed(net, state)
        else:
            net.load_state_dict(state)

    def _find(self, net: nn.Module) -> None:
        self.net, self.weights = net, _weights(net, self.bits)

    def after_step(self, t: int) -> None:
        self._put_back()
        if t + 1 in self.times:
            self._freeze(t + 1)

    def _put_back(self) -> None:
        for name, weight in self.weights.items():
            level = self.levels[name]
            weight.values.copy_(torch.where(level.isnan(), weight.values, level))

    def _freeze(self, t: int) -> None:
        """Puts the largest weights that train onto the grid, as many as are due before update `t`."""
        fraction = max(part for time, part in zip(self.times, self.FRACTIONS, strict=True) if time <= t)
        for name, weight in self.weights.items():
            values, level = weight.values.flatten(), self.levels[name].view(-1)
            free = level.isnan()
            due = int(fraction * len(level)) - int((~free).sum())
            chosen = values.abs().masked_fill(~free, -1).argsort(descending=True, stable=True)[:due]
            level[chosen] = self._nearest(values[chosen], self.scales[name], weight.bits)
        self._put_back()
        if fraction == 1 and not any(self._beyond_int8(weight.bits) for weight in self.weights.values()):
            grids = {name: self._grid(self.scales[name], weight.bits) for name, weight in self.weights.items()}
            _attach_fixed(self.net, self.weights, {name: (torch.tensor(s), bits) for name, (s, bits) in grids.items()})

    def _nearest(self, weight: Tensor, scale: float, bits: int) -> Tensor:
        if not self.powers_of_two:
            step, most = torch.tensor(self._grid(scale, bits)[0], device=weight.device), 2 ** (bits - 1) - 1
            return (weight / step).clamp(-most, most).round() * step
        low, high = _exponents(scale, bits)
        mantissa, exponent = torch.frexp(weight.abs())  # mantissa in [1/2, 1): below 3/4 the lower power is nearer
        exponent = (exponent - (mantissa < 0.75).int()).clamp(low, high)
        powers = weight.new_tensor([2.0**power for power in range(low, high + 1)])
        level = powers[(exponent - low).long()].copysign(weight)
        return torch.where(weight.abs() < 2.0 ** (low - 1), 0, level)

    def _grid(self, scale: float, bits: int) -> tuple[float, int]:
        """Step size of the integer codes, and the bits that hold them."""
        if not self.powers_of_two:
            return scale / (2 ** (bits - 1) - 1), bits
        return 2.0 ** _exponents(scale, bits)[0], 2 ** (bits - 2) + 1

    def _beyond_int8(self, bits: int) -> bool:
        return self.powers_of_two and bits > 4

    def eligible(self, t: int) -> bool:
        return t >= self.times[-1]

    def check_export(self, net: nn.Module) -> None:
        for name, (_, bits) in select(net, self.bits, None).items():
            if self._beyond_int8(bits):
                expected = "powers of two of 4 bits or less (their codes are 0, +-1, +-2, +-4, +-8)"
                got = f"{bits} bits, whose codes reach 2^{2 ** (bits - 2) - 1}"
                raise ExportError(f"expected {expected}, got {got} - at layer `{name}`")

    def state_dict(self) -> dict[str, Any]:
        return {"scales": {**self.scales}, "levels": {name: level.clone() for name, level in self.levels.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scales = dict(state["scales"])
        for name, level in state["levels"].items():
            self.levels[name] = level.to(self.weights[name].values.device, copy=True)


def _exponents(scale: float, bits: int) -> tuple[int, int]:
    high = math.frexp(4 * scale / 3)[1] - 1  # floor(log2)
    return high + 1 - 2 ** (bits - 2), high


class UniformNoise(Quantization):
    """Uniform noise in place of rounding errors, from update 0 on (QT-DoG, table 15): w + u, u ~ U(-a, a).

    In training each forward pass draws u anew, for the weights that LSQ would quantize; the gradient is that of w. In
    eval mode there is no noise, and the network stays float. `amplitude` is a; None makes it half the first step size
    that LSQ of `bits` has for the weights of the moment, one for each output channel. The draws of an update follow
    from its number and the seed, and are the same on all devices of a run.
    """

    def __init__(self, amplitude: float | None = None, bits: int | Mapping[str, int] = 7, seed: int = 0):
        if amplitude is not None and not 0 < amplitude < math.inf:
            raise InputError(f"expected an amplitude greater than 0, got {amplitude} - at UniformNoise")
        self.start = 0
        self.amplitude, self.bits, self.seed = amplitude, bits, seed
        self.update, self.generator = 0, torch.Generator()

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Minibatches) -> None:
        weights = _weights(net, self.bits)
        self.generator = torch.Generator(next(iter(weights.values())).values.device)
        self._seed()
        for weight in weights.values():
            noise: Any = Noise(self.amplitude, weight.bits, self.generator)
            for layer in weight.layers:
                attach(layer, noise)

    def reattach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Tensor]) -> None:
        self.attach(net, optimizer, [])
        net.load_state_dict(state)

    def _seed(self) -> None:
        self.generator.manual_seed(seed_hash(self.seed, self.update, "noise"))

    def after_step(self, t: int) -> None:
        self.update = t + 1
        self._seed()

    def state_dict(self) -> dict[str, Any]:
        return {"update": self.update}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update = state["update"]
        self._seed()


class Noise(nn.Module):
    """The parametrization of one weight."""

    def __init__(self, amplitude: float | None, bits: int, generator: torch.Generator):
        super().__init__()
        self.amplitude, self.bits, self.generator = amplitude, bits, generator

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.draw(weight.detach()) if self.training else weight

    def draw(self, weight: Tensor) -> Tensor:
        unit = torch.rand(weight.shape, dtype=weight.dtype, device=weight.device, generator=self.generator) * 2 - 1
        if self.amplitude is not None:
            return unit * self.amplitude
        step = initial_step(weight.float().flatten(1), -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1, "lsq")
        return unit * (step / 2).to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))


class RTN(Quantization):
    """Round to nearest, of a finished network: LSQ's codes at the first step sizes (`init`), and no update."""

    def __init__(self, bits: int | Mapping[str, int] = 7, *, per_channel: bool = True, init: str = "mse"):
        self.start = None
        self.bits, self.per_channel, self.init = bits, per_channel, init

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Minibatches) -> None:
        for step in quantize_(net, self.bits, per_channel=self.per_channel, init=self.init):
            step.requires_grad_(False)

    def reattach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Tensor]) -> None:
        _reattach_fixed(net, state)


class OBC(Quantization):
    """Optimal Brain Compression (arXiv 2208.11580, OBQ) of a finished network; the arithmetic is in `obc.py`.

    `batches` of `attach` are training images, not augmented: 1,024 are enough. All H are those of the float network.
    The work on a layer grows with the cube of its columns, input channels of a group times kernel: NiN takes seconds,
    4,608 columns take hours. Layers with more than `max_columns` are rounded in natural order, and `natural_order`
    names them.
    """

    def __init__(self, bits: int | Mapping[str, int] = 7, max_columns: int = 1200):
        self.start = None
        self.bits, self.max_columns = bits, max_columns
        self.natural_order: list[str] = []

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Minibatches) -> None:
        weights = _weights(net, self.bits)
        device = next(iter(weights.values())).values.device
        images = (part.to(device) for images, _ in batches for part in images.split(32))
        found = hessians(net, {name: weight.layers for name, weight in weights.items()}, images)
        if idle := [f"`{name}`" for name in weights.keys() - found.keys()]:
            expected = "images that reach every layer to quantize"
            raise InputError(f"expected {expected}, got no input - at layer {', '.join(sorted(idle))}")
        wide = [name for name, hessian in found.items() if hessian.shape[-1] > self.max_columns]
        grids = {}
        for name, weight in weights.items():
            codes, step = quantize_rows(weight.values, found[name], weight.bits, natural_order=name in wide)
            weight.values.copy_(codes * step.reshape(-1, *[1] * (codes.dim() - 1)))
            grids[name] = step, weight.bits
        self.natural_order = wide
        _attach_fixed(net, weights, grids)

    def reattach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Tensor]) -> None:
        _reattach_fixed(net, state)


@dataclass(frozen=True)
class _Weight:
    """A weight to be quantized, and the layers that share it."""

    parameter: nn.Parameter
    layers: list[nn.Module]
    bits: int

    @property
    def values(self) -> Tensor:
        return self.parameter.detach()  # the same memory


def _weights(net: nn.Module, bits: int | Mapping[str, int]) -> dict[str, _Weight]:
    """The weights that `quantize_` would quantize, each by the name of the first layer that has it."""
    found: dict[str, _Weight] = {}
    names: dict[tuple[int, ...], str] = {}
    for name, (layer, width) in select(checked_network(net), bits, None).items():
        check_weight(layer, f"layer `{name}`")
        if is_computed(layer):
            got = "one that parametrizations compute"
            raise InputError(f"expected a weight that is a Parameter, got {got} - at layer `{name}`")
        first, parameter = names.setdefault(identity(layer), name), layer._parameters["weight"]
        assert parameter is not None  # `check_weight` lets no other one pass
        found.setdefault(first, _Weight(parameter, [], width)).layers.append(layer)
        if found[first].bits != width:
            got = f"{found[first].bits} for `{first}` and {width}"
            raise InputError(f"expected the same bits for layers that share a weight, got {got} - at layer `{name}`")
    return found


def _attach_fixed(net: nn.Module, weights: dict[str, _Weight], grids: Mapping[str, tuple[Tensor, int]]) -> None:
    """Quantizers for weights that lie on their grids, {name: (step sizes, bits)}; they neither change nor train."""
    for name, (step, bits) in grids.items():
        device = weights[name].values.device
        quantizer = Quantizer(step.to(device), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, grad_scale=1.0)
        quantizer.step.requires_grad_(False)
        for layer in weights[name].layers:
            attach(layer, quantizer)
    quantize_together(net)


def _reattach_fixed(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    for step in quantize_like_(net, state):
        step.requires_grad_(False)
