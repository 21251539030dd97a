"""Attaches LSQ quantizers to the weights and layer inputs of a network, in place.

A weight is quantized by a parametrization (torch.nn.utils.parametrize): the module keeps its Parameter object, so the
moments an optimizer holds for it survive, and `module.weight` becomes the fake-quantized value. An input is quantized
by a forward pre-hook. torch.export sees both as `qdeploy::lsq` nodes in front of the layer's own operator.

On a GPU a forward pre-hook of the network quantizes its float32 weights together, in one launch (`lsq_many`), and the
quantizers hand out the results; a forward hook takes them away. The gradients of all these weights come together too,
when that of the first layer is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qdeploy.errors import InputError
from qdeploy.kernels.lsq import lsq, lsq_codes, lsq_many, on_gpu

# The layers whose `weight` is quantized; axis 0 of each is its output channel. Add a class here to have it quantized.
WEIGHT_TYPES: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Linear)
MIN_STEP = 1e-8
CALIBRATION_BATCHES = 4
SAMPLES_PER_BATCH = 65536


@dataclass
class _Prepared:
    """The result of one quantizer in the launch for the whole network, and what it is the result of."""

    result: Tensor
    value: Tensor
    state: tuple  # of `_state`; empty in a trace of torch.compile, which would compile anew for every version
    traced: bool

    def serves(self, value: Tensor, step: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return self.traced and self.value is value
        # Activation checkpointing puts hooks on saved tensors. It runs a layer a second time, outside the network's
        # forward pass, and expects as many saved tensors: the first time, too, the layer has to quantize by itself.
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        return not hooked and self.value is value and self.state == _state(value, step)


def _state(*tensors: Tensor) -> tuple:
    return get_ident(), torch.is_grad_enabled(), *[None if t.is_inference() else t._version for t in tensors]


class Quantizer(nn.Module):
    """LSQ with its own step sizes: one float32 (shape []), or one for each slice along axis 0 (shape [C])."""

    prepared: _Prepared | None = None  # during a forward pass of the network

    def __init__(self, step: Tensor, qmin: int, qmax: int, grad_scale: float):
        super().__init__()
        self.step = nn.Parameter(step.float())
        self.qmin, self.qmax, self.grad_scale = qmin, qmax, grad_scale

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
        return lsq(value, self.step, self.qmin, self.qmax, self.axis, self.grad_scale)

    def codes(self, value: Tensor) -> Tensor:
        """The integer codes of `value`: int8, or uint8 for an unsigned range."""
        return lsq_codes(value, self.step, self.qmin, self.qmax, self.axis)

    def get_extra_state(self) -> Tensor:
        # Range and gradient scale of an input come from calibration data: a checkpoint has to carry them.
        return torch.tensor([self.qmin, self.qmax, self.grad_scale], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        qmin, qmax, self.grad_scale = state.tolist()
        self.qmin, self.qmax = int(qmin), int(qmax)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range=[{self.qmin}, {self.qmax}], steps={self.step.numel()}"


def quantizable_layers(net: nn.Module) -> dict[str, nn.Module]:
    """The layers that `quantize_` can treat, by name in order of registration; a shared module appears once."""
    return {name: module for name, module in net.named_modules() if isinstance(module, WEIGHT_TYPES)}


def quantize_(
    net: nn.Module,
    weight_bits: int | Mapping[str, int] = 7,
    activation_bits: int | None = None,
    *,
    per_channel: bool = True,
    init: str = "lsq",
    grad_scale: str = "tensor",
    skip: Iterable[str] | None = None,
    calibration: Iterable | None = None,
) -> list[nn.Parameter]:
    """Quantizes the weights, and on request the inputs, of the convolutions and linear layers of any network, in place.

    Args:
        net: the network. Its Parameter objects stay the same; shared modules and tied weights share one quantizer.
        weight_bits: 2 to 8 bits, signed, for every layer; or bits by layer name, and then only those layers.
        activation_bits: 2 to 8 bits for the input of each of these layers, or None. A tensor has one step size, which
            all layers that read it share. Its range is unsigned where calibration saw no negative value, else signed.
        per_channel: one step size per output channel of a weight (QT-DoG appendix B), or one per weight.
        init: the first step sizes: "lsq" 2*mean|v|/sqrt(qmax), "mse" (least squared error), "minmax" (nothing clipped).
        grad_scale: "tensor" 1/sqrt(numel(weight)*qmax), "channel" with the elements of one channel, "none" 1.
        skip: names of layers to leave alone. None leaves the classifier: the quantizable layer registered last.
        calibration: batches of inputs, or (inputs, ...) tuples; required with `activation_bits`. The first 4 are used.

    Returns:
        The trainable step sizes, in order; `step_group` makes an optimizer group of them.

    Raises:
        InputError: bits out of range, an unknown layer or option, a layer quantized before, or missing calibration.
    """
    layers = _select(net, weight_bits, skip)
    for name, (layer, bits) in layers.items():
        _check_bits(bits, f"layer `{name}`")
        if _weight_quantizer(layer) is not None:
            raise InputError(f"expected a layer without quantizer, got one quantized before - at layer `{name}`")
    by_weight: dict[int, Quantizer] = {}
    for layer, bits in layers.values():
        key = id(layer.weight)
        if key not in by_weight:
            by_weight[key] = _make_weight_quantizer(layer.weight.detach(), bits, per_channel, init, grad_scale)
        parametrize.register_parametrization(layer, "weight", by_weight[key])
    _quantize_together(net)
    if activation_bits is not None:
        _check_bits(activation_bits, "activation_bits")
        if calibration is None:
            raise InputError("expected calibration batches for quantized activations, got none - at quantize_")
        targets = {name: layer for name, (layer, _) in layers.items()}
        _attach_input_quantizers(net, targets, activation_bits, init, grad_scale, calibration)
    return step_parameters(net)


def quantizers(net: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer by what it quantizes: "layer1.0.conv1.weight" or "layer1.0.conv1.input". Shared ones repeat."""
    found = {}
    for name, module in net.named_modules():
        prefix = f"{name}." if name else ""
        if (quantizer := _weight_quantizer(module)) is not None:
            found[f"{prefix}weight"] = quantizer
        if isinstance(quantizer := getattr(module, "input_quantizer", None), Quantizer):
            found[f"{prefix}input"] = quantizer
    return found


def step_parameters(net: nn.Module) -> list[nn.Parameter]:
    """The step sizes that train, each once."""
    steps = {id(q.step): q.step for q in quantizers(net).values() if q.step.requires_grad}
    return list(steps.values())


def step_group(net: nn.Module, lr: float) -> dict:
    """An optimizer group of the step sizes, for `optimizer.add_param_group`. Weight decay would change the grid: 0."""
    return {"params": step_parameters(net), "lr": lr, "weight_decay": 0.0}


@torch.no_grad()
def project_steps_(net: nn.Module) -> None:
    """Keeps every step size at 1e-8 or more; call it after each optimizer step (LSQ is undefined for s <= 0)."""
    for step in step_parameters(net):
        step.clamp_(min=MIN_STEP)


@dataclass(frozen=True)
class LayerSummary:
    """One quantized weight. Step sizes are medians over its channels; `error` is rms(w - Q(w)) / rms(w)."""

    name: str
    shape: tuple[int, ...]
    bits: int
    input_bits: int | None
    step: float
    mse_step: float  # what init="mse" would choose for the weights as they are
    error: float
    clipped: float  # share of weights outside the range


@torch.no_grad()
def summary(net: nn.Module) -> list[LayerSummary]:
    """What is quantized, how finely, and how far the step sizes are from the ones of least squared error."""
    rows = []
    found = quantizers(net)
    for key, quantizer in found.items():
        name, _, kind = key.rpartition(".")
        if kind != "weight":
            continue
        weight = parametrized_weight(net.get_submodule(name)).original.float()
        rest = weight / quantizer.step.reshape(-1, *[1] * (weight.dim() - 1))
        best = initial_step(_rows(weight, quantizer.axis), quantizer.qmin, quantizer.qmax, "mse")
        inputs = found.get(key.removesuffix("weight") + "input")
        rows.append(
            LayerSummary(
                name=name,
                shape=tuple(weight.shape),
                bits=quantizer.bits,
                input_bits=inputs.bits if inputs else None,
                step=quantizer.step.median().item(),
                mse_step=best.median().item(),
                error=((quantizer(weight) - weight).norm() / weight.norm().clamp(min=1e-30)).item(),
                clipped=((rest < quantizer.qmin) | (rest > quantizer.qmax)).float().mean().item(),
            )
        )
    return rows


def _select(
    net: nn.Module, weight_bits: int | Mapping[str, int], skip: Iterable[str] | None
) -> dict[str, tuple[Any, int]]:
    """The layers to quantize: {name: (layer, bits)}."""
    layers = quantizable_layers(net)
    if isinstance(weight_bits, Mapping):
        if skip is not None:
            raise InputError("expected bits by layer or names to skip, got both - at quantize_")
        wanted: dict[str, int | None] = {**weight_bits}
    else:
        skipped = list(layers)[-1:] if skip is None else list(skip)
        wanted = {**dict.fromkeys(layers, weight_bits), **dict.fromkeys(skipped)}
    if unknown := sorted(set(wanted) - set(layers)):
        raise InputError(f"expected names of convolutions or linear layers, got {', '.join(unknown)} - at quantize_")
    return {name: (layer, bits) for name, layer in layers.items() if (bits := wanted.get(name)) is not None}


def _check_bits(bits: int, at: str) -> None:
    if not (isinstance(bits, int) and 2 <= bits <= 8):
        raise InputError(f"expected 2 to 8 bits, got {bits!r} - at {at}")


def _weight_quantizer(module: nn.Module) -> Quantizer | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    return next((p for p in parametrized_weight(module) if isinstance(p, Quantizer)), None)


def parametrized_weight(layer: nn.Module) -> parametrize.ParametrizationList:
    """The weight as it trains, `original`, and what is done to it, of a layer with a quantizer."""
    parametrizations: Any = layer.parametrizations
    return parametrizations.weight


def _rows(value: Tensor, axis: int) -> Tensor:
    """The elements that share a step size, one row each."""
    return value.reshape(1, -1) if axis == -1 else value.flatten(1)


def _make_weight_quantizer(weight: Tensor, bits: int, per_channel: bool, init: str, grad_scale: str) -> Quantizer:
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows = _rows(weight.float(), 0 if per_channel else -1)
    step = initial_step(rows, qmin, qmax, init)
    scale = training_scale(weight.numel(), weight.numel() // len(rows), qmax, grad_scale)
    return Quantizer(step if per_channel else step[0], qmin, qmax, scale)


def training_scale(numel: int, numel_per_step: int, qmax: int, mode: str) -> float:
    """The factor g on the gradient of a step size (LSQ section 2.2); `mode` as `grad_scale` of `quantize_`."""
    counts = {"tensor": numel * qmax, "channel": numel_per_step * qmax, "none": 1}
    if mode not in counts:
        raise InputError(f"expected grad_scale tensor, channel or none, got {mode!r} - at quantize_")
    return counts[mode] ** -0.5


@torch.no_grad()
def initial_step(rows: Tensor, qmin: int, qmax: int, method: str) -> Tensor:
    """First step sizes, [rows], for float32 values [rows, n]; `method` as `init` of `quantize_`. At least 1e-8."""
    if method == "lsq":
        step = 2 * rows.abs().mean(1) / qmax**0.5
    elif method in ("mse", "minmax"):
        low = rows.amin(1) / qmin if qmin else torch.zeros_like(rows[:, 0])
        step = torch.maximum(rows.amax(1) / qmax, low)
        if method == "mse":
            step = _least_squares_step(rows, step.clamp(min=MIN_STEP), qmin, qmax)
    else:
        raise InputError(f"expected init lsq, mse or minmax, got {method!r} - at quantize_")
    return step.clamp(min=MIN_STEP)


def _least_squares_step(rows: Tensor, largest: Tensor, qmin: int, qmax: int) -> Tensor:
    """argmin_s ||v - Q(v; s)||^2 for each row: the grid 0.20, 0.21 .. 1.00 of `largest`, then golden section."""

    def error(step: Tensor) -> Tensor:
        s = step[:, None]
        return rows.div(s).clamp_(qmin, qmax).round_().mul_(s).sub_(rows).square_().sum(1, dtype=torch.float64)

    best, best_error = largest, error(largest)

    def keep_better(step: Tensor, err: Tensor) -> None:
        nonlocal best, best_error
        better = err < best_error
        best, best_error = torch.where(better, step, best), torch.where(better, err, best_error)

    for k in range(20, 100):
        step = largest * (k / 100)
        keep_better(step, error(step))
    # The bracket is 0.02 * largest wide, at most a tenth of the step: 15 cuts by 0.618 reach 1e-4 of it.
    low, high = best - 0.01 * largest, best + 0.01 * largest
    for _ in range(15):
        left, right = high - 0.618 * (high - low), low + 0.618 * (high - low)
        left_error, right_error = error(left), error(right)
        keep_better(left, left_error)
        keep_better(right, right_error)
        to_left = left_error < right_error
        low, high = torch.where(to_left, low, left), torch.where(to_left, right, high)
    return best


def _quantize_together(net: nn.Module) -> None:
    """Has the weights of `net` quantized in one launch in every forward pass on a GPU."""
    if not hasattr(net, "_quantized_weights"):
        net.register_forward_pre_hook(_prepare_weights)
        net.register_forward_hook(_forget_weights, always_call=True)
    weights = {}
    for module in net.modules():
        quantizer = _weight_quantizer(module)
        if quantizer is not None and parametrized_weight(module)[0] is quantizer:
            weights[quantizer] = parametrized_weight(module)
    pairs: Any = list(weights.items())
    net._quantized_weights = pairs  # an attribute, so that a copy of the network has its own


def _prepare_weights(net: nn.Module, args: tuple) -> None:
    if torch.compiler.is_exporting():
        return
    groups: dict[tuple[torch.device, bool], list[tuple[Quantizer, Tensor]]] = {}
    weights: Any = net._quantized_weights
    for quantizer, weight in weights:
        value = weight.original
        # Replicas of nn.DataParallel and torch.func have plain tensors or subclasses, without an address of their own.
        if type(value) is nn.Parameter and on_gpu(value) and value.dtype == torch.float32:
            # Frozen weights apart: among others their results would require a gradient, and so all activations.
            trains = torch.is_grad_enabled() and (value.requires_grad or quantizer.step.requires_grad)
            groups.setdefault((value.device, trains), []).append((quantizer, value))
    traced = torch.compiler.is_compiling()
    for (_, trains), pairs in groups.items():
        made, values = zip(*pairs, strict=True)
        ranges, scales = [(q.qmin, q.qmax) for q in made], [q.grad_scale for q in made]
        with torch.set_grad_enabled(trains):
            results = lsq_many(values, [q.step for q in made], ranges, scales)
        for quantizer, value, result in zip(made, values, results, strict=True):
            state = () if traced else _state(value, quantizer.step)
            quantizer.prepared = _Prepared(result, value, state, traced)


def _forget_weights(net: nn.Module, args: tuple, output: object) -> None:
    weights: Any = net._quantized_weights
    for quantizer, _ in weights:
        if quantizer.prepared is not None:  # torch.export reports every assignment
            quantizer.prepared = None


def _quantize_input(module: nn.Module, args: tuple) -> tuple:
    quantizer: Any = module.input_quantizer
    return (quantizer(args[0]), *args[1:])


@dataclass
class _Observed:
    """What calibration saw of the tensors that share one step size."""

    samples: list[Tensor]
    features: int = 1  # elements of one sample of the batch

    def add(self, value: Tensor, generator: torch.Generator) -> None:
        flat = value.detach().float().flatten()
        count = min(flat.numel(), SAMPLES_PER_BATCH)
        picks = torch.randint(flat.numel(), (count,), generator=generator, device="cpu")  # where the generator is
        self.samples += [flat[picks.to(flat.device)], flat.amin()[None], flat.amax()[None]]
        self.features = value[0].numel()


def _attach_input_quantizers(
    net: nn.Module,
    layers: dict[str, nn.Module],
    bits: int,
    init: str,
    grad_scale: str,
    calibration: Iterable,
) -> None:
    observed, bundle_of = _observe(net, layers, calibration)
    made: dict[str, Quantizer] = {}
    for name, layer in layers.items():
        bundle = bundle_of[name]
        if bundle not in made:
            seen = observed[bundle]
            values = torch.cat(seen.samples)
            qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if values.amin() < 0 else (0, 2**bits - 1)
            step = initial_step(values[None], qmin, qmax, init)[0]
            # Features of one sample, not of the batch (LSQ section 2.2): the scale does not change with the batch.
            made[bundle] = Quantizer(step, qmin, qmax, training_scale(seen.features, seen.features, qmax, grad_scale))
        layer.input_quantizer = made[bundle]
        layer.register_forward_pre_hook(_quantize_input)


def _observe(
    net: nn.Module, layers: dict[str, nn.Module], calibration: Iterable
) -> tuple[dict[str, _Observed], dict[str, str]]:
    """Runs the calibration batches in eval mode; returns what was seen by bundle, and the bundle of each layer.

    Layers that read the very same tensor (the first convolution and the shortcut of a residual block) form a bundle:
    one tensor can have only one integer code.
    """
    parent = {name: name for name in layers}
    by_layer: dict[str, _Observed] = {name: _Observed([]) for name in layers}
    generator = torch.Generator().manual_seed(0)

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    def observe(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            key = (id(args[0]), args[0]._version)
            if key in readers:
                parent[root(name)] = root(readers[key][0])
            else:
                readers[key] = (name, args[0])  # the reference keeps the id from being used again
            by_layer[name].add(args[0], generator)

        return hook

    handles = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.no_grad():
            for batch in islice(calibration, CALIBRATION_BATCHES):
                readers: dict[tuple[int, int], tuple[str, Tensor]] = {}
                net(batch[0] if isinstance(batch, (tuple, list)) else batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if idle := [f"`{name}`" for name in layers if not by_layer[name].samples]:
        raise InputError(f"expected calibration to reach every layer, got no input - at layer {', '.join(idle)}")
    bundle_of = {name: root(name) for name in layers}
    merged: dict[str, _Observed] = {}
    for name, bundle in bundle_of.items():
        merged.setdefault(bundle, _Observed([])).samples += by_layer[name].samples
        merged[bundle].features = by_layer[name].features
    return merged, bundle_of
