"""How the weights of a network come onto a grid of integers: in training, or when it is finished.

What `qdeploy.export` writes are the codes of the Quantizers (`training/quantizer.py`) that are attached at the end. LSQ
trains with them; those of the other methods belong to weights that lie on their grids already (`fixed.py`). INQ has a
module of its own (`inq.py`), and so has what OBC needs (`obc.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.exporter.obc import MAX_COLUMNS
from qdeploy.terminal import note, status
from qdeploy.training.attached_quantizers import attach, originals, project_steps_, quantizers, step_group
from qdeploy.training.equalize import equalize_
from qdeploy.training.initial_steps import initial_step
from qdeploy.training.methods.batches import Minibatches
from qdeploy.training.methods.fixed import Bits, attach_fixed, code_range, reattach_fixed, shared_weights
from qdeploy.training.methods.obc import codes_and_step, hessians
from qdeploy.training.quantize import quantize_
from qdeploy.training.quantize_like import quantize_like_
from qdeploy.training.quantizer import Quantizer
from qdeploy.training.seeds import seed_hash


class Quantization(Protocol):
    """When and how a run quantizes its network."""

    start: int | None = None  # the update at whose start `attach` is called
    of_finished_runs: bool = False  # instead, it is called with the selected network of a run in float

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Minibatches) -> None:
        """Changes `net` in place. `batches` are those of all devices; the optimizer gets what trains anew, and is None
        where nothing will train."""

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


class NoQuantization(Quantization):
    """The network stays float."""


class LSQ(Quantization):
    """Learned step sizes (arXiv 1902.08153), as QT-DoG trains them: v = s * rint(clip(w / s)), w and s both train.

    The Parameter objects stay, so the optimizer keeps its moments, and the step sizes join it as a group of their own.
    `scope` "no_s" freezes the step sizes, "bn_head" the quantized weights too. `equalize` is the exponent with which
    channels of LayerNorms are made alike before (`equalize_`); the optimizer begins anew with the weights that this
    changes. All else as for `quantize_`.
    """

    def __init__(
        self,
        start: int,
        bits: Bits = 7,
        activation_bits: Bits | None = None,
        *,
        per_channel: bool = True,
        init: str = "lsq",
        grad_scale: str = "tensor",
        scope: str = "all",
        lr_step_size: float = 1e-5,
        reset_optimizer: bool = False,
        equalize: float | None = None,
        allow_float: tuple[str, ...] = (),
    ):
        self.start, self.bits, self.activation_bits, self.equalize = start, bits, activation_bits, equalize
        self.options: dict[str, Any] = {"per_channel": per_channel, "init": init, "grad_scale": grad_scale}
        self.options["allow_float"] = allow_float
        self.scope, self.lr_step_size, self.reset_optimizer = scope, lr_step_size, reset_optimizer
        self.net: nn.Module | None = None

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Minibatches) -> None:
        calibration = [images for images, _ in batches]
        for weight in [] if self.equalize is None else equalize_(net, calibration, exponent=self.equalize):
            if optimizer is not None:
                optimizer.state.pop(weight, None)
        quantize_(net, self.bits, self.activation_bits, **self.options, calibration=calibration)
        self._train(net, optimizer)

    def reattach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Tensor]) -> None:
        quantize_like_(net, state)
        self._train(net, optimizer)

    def _train(self, net: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self.net = net
        for name, quantizer in quantizers(net).items():
            quantizer.step.requires_grad_(self.scope == "all")
            layer, _, kind = name.rpartition(".")
            if self.scope == "bn_head" and kind != "input":  # "in_proj_weight" of attention, too
                for weight in originals(net.get_submodule(layer)):
                    weight.requires_grad_(False).grad = None  # or the optimizer would make a step with the last one
        if optimizer is None:
            return  # of a finished network
        if self.reset_optimizer:
            optimizer.state.clear()
        if self.scope == "all":
            optimizer.add_param_group(step_group(net, self.lr_step_size))

    def after_step(self, t: int) -> None:
        if self.net is not None:
            project_steps_(self.net)


class UniformNoise(Quantization):
    """Uniform noise in place of rounding errors, from update 0 on (QT-DoG, table 15): w + u, u ~ U(-a, a).

    In training each forward pass draws u anew, for the weights that LSQ would quantize; the gradient is that of w. In
    eval mode there is no noise, and the network stays float. `amplitude` is a; None makes it half the first step size
    that LSQ of `bits` has for the weights of the moment, one for each output channel. The draws of an update follow
    from its number and the seed, and are the same on all devices of a run.
    """

    def __init__(
        self,
        amplitude: float | None = None,
        bits: Bits = 7,
        seed: int = 0,
        allow_float: tuple[str, ...] = (),
    ):
        if amplitude is not None and not 0 < amplitude < math.inf:
            raise InputError(f"expected an amplitude greater than 0, got {amplitude} - at UniformNoise")
        self.start = 0
        self.amplitude, self.bits, self.seed, self.allow_float = amplitude, bits, seed, allow_float
        self.update, self.generator = 0, torch.Generator()

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Minibatches) -> None:
        weights = shared_weights(net, self.bits, self.allow_float)
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
        step = initial_step(weight.float().flatten(1), *code_range(self.bits), "lsq")
        return unit * (step / 2).to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))


class RTN(Quantization):
    """Round to nearest, of a finished network: LSQ's codes at the first step sizes (`init`), and no update. `equalize`
    as for LSQ."""

    of_finished_runs = True

    def __init__(
        self,
        bits: Bits = 7,
        *,
        per_channel: bool = True,
        init: str = "mse",
        equalize: float | None = None,
        allow_float: tuple[str, ...] = (),
    ):
        self.bits, self.equalize = bits, equalize
        self.options: dict[str, Any] = {"per_channel": per_channel, "init": init, "allow_float": allow_float}

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Minibatches) -> None:
        if self.equalize is not None:
            equalize_(net, [images for images, _ in batches], exponent=self.equalize)
        for step in quantize_(net, self.bits, **self.options):
            step.requires_grad_(False)

    def reattach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Tensor]) -> None:
        reattach_fixed(net, state)


class OBC(Quantization):
    """Optimal Brain Compression (arXiv 2208.11580, OBQ) of a finished network, as `export` has it.

    `batches` of `attach` are training images, not augmented: 1,024 are enough. All H are those of the float network.
    The work on a layer grows with the cube of its columns, input channels of a group times kernel: NiN takes seconds,
    4,608 columns take hours. Layers with more than `max_columns` are rounded in natural order, and `natural_order`
    names them.
    """

    of_finished_runs = True

    def __init__(
        self,
        bits: Bits = 7,
        max_columns: int = MAX_COLUMNS,
        allow_float: tuple[str, ...] = (),
    ):
        self.bits, self.max_columns, self.allow_float = bits, max_columns, allow_float
        self.natural_order: list[str] = []

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Minibatches) -> None:
        weights = shared_weights(net, self.bits, self.allow_float)
        device = next(iter(weights.values())).values.device
        images = (part.to(device) for images, _ in batches for part in images.split(32))
        found = hessians(net, {name: weight.layers for name, weight in weights.items()}, images)
        if idle := [f"`{name}`" for name in weights.keys() - found.keys()]:
            expected = "images that reach every layer to quantize"
            raise InputError(f"expected {expected}, got no input - at layer {', '.join(sorted(idle))}")
        wide = [name for name, hessian in found.items() if hessian.shape[-1] > self.max_columns]
        made = {}
        for i, (name, weight) in enumerate(weights.items(), 1):
            status(f"OBC: {name}, layer {i} of {len(weights)}")
            codes, step = codes_and_step(weight.values, found[name], weight.bits, natural_order=name in wide)
            weight.values.copy_(codes * step.reshape(-1, *[1] * (codes.dim() - 1)))
            made[name] = Quantizer(step, *code_range(weight.bits), 1.0)
        status()
        self.natural_order = wide
        if wide:
            note(f"rounded in natural order, having more than {self.max_columns} columns: {', '.join(wide)}")
        attach_fixed(net, weights, made)

    def reattach(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Tensor]) -> None:
        reattach_fixed(net, state)
