"""Attaches LSQ quantizers to the weights and layer inputs of a network, in place.

A weight is quantized by a parametrization (torch.nn.utils.parametrize): the module keeps its Parameter object, so the
moments an optimizer holds for it survive, and `module.weight` becomes the fake-quantized value. An input is quantized
by a forward pre-hook. torch.export sees both as `qdeploy::lsq` nodes in front of the layer's own operator. A weight
that is computed already (weight norm, spectral norm) keeps its parametrizations; the quantizer comes last.

On a GPU a forward pre-hook of the network quantizes its float32 weights together, in one launch (`lsq_many`), and the
quantizers hand out the results; a forward hook takes them away. The gradients of all these weights come together too,
when that of the first layer is there.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qdeploy.calibration import batches, doubt
from qdeploy.errors import InputError, one_line
from qdeploy.kernels.lsq import fake_quantize, lsq_codes, lsq_many, on_gpu
from qdeploy.networks.quantizable import checked_bits, classifier, float_only_layers, quantizable_layers
from qdeploy.networks.wrappers import WRAPPERS, plain_names, unwrapped
from qdeploy.training.ranges import observe
from qdeploy.training.untouched import all_or_nothing, evaluating, is_computed, undisturbed

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INITS, GRAD_SCALES = ("lsq", "mse", "minmax"), ("tensor", "channel", "none")
MIN_STEP = 1e-8
CALIBRATION_BATCHES = 4


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
        self.qmin, self.qmax, self.grad_scale, self.bundle = _checked_state(state, "a quantizer")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}_extra_state" in state_dict:  # checked here, where the name is known
            _checked_state(state_dict[f"{prefix}_extra_state"], f"quantizer `{prefix.rstrip('.')}`")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range=[{self.qmin}, {self.qmax}], steps={self.step.numel()}"


def _checked_state(state: Any, at: str) -> tuple[int, int, float, int]:
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


def quantize_(
    net: nn.Module,
    weight_bits: int | Mapping[str, int] = 7,
    activation_bits: int | None = None,
    *,
    per_channel: bool = True,
    init: str = "lsq",
    grad_scale: str = "tensor",
    skip: Iterable[str] | None = None,
    calibration: object = None,
) -> list[nn.Parameter]:
    """Quantizes the weights, and on request the inputs, of the convolutions and linear layers of any network, in place.

    All of it or nothing: where it raises, whatever for, the network is as it was before. It warns of layers that train
    but that `qdeploy.export` cannot write.

    Args:
        net: the network, or one in torch.compile, DataParallel, AveragedModel or Fabric. Its Parameter objects stay the
            same; shared modules and tied weights share one quantizer. Quantize before DistributedDataParallel.
        weight_bits: 2 to 8 bits, signed, for every layer; or bits by layer name, and then only those layers.
        activation_bits: 2 to 8 bits for the input of each of these layers, or None. A tensor has one step size, which
            all layers that read it share. Its range is unsigned where calibration saw no negative value, else signed.
        per_channel: one step size per output channel of a weight (QT-DoG appendix B), or one per weight.
        init: the first step sizes: "lsq" 2*mean|v|/sqrt(qmax), "mse" (least squared error), "minmax" (nothing clipped).
        grad_scale: "tensor" 1/sqrt(numel(weight)*qmax), "channel" with the elements of one channel, "none" 1.
        skip: names of layers to leave alone. None leaves the classifier: the quantizable layer registered last.
        calibration: inputs in any form that `export` takes; required with `activation_bits`. The first 4 batches are
            used (of an array, 128 images), converted to the type of the network's first parameter.

    Returns:
        The trainable step sizes, in order; `step_group` makes an optimizer group of them.

    Raises:
        InputError: bits out of range, an unknown layer or option, nothing to quantize, a layer quantized before, a
            weight that is no Parameter, not float or not finite, missing or bad calibration data, or
            DistributedDataParallel around the network.
    """
    net = _network(net)
    targets = _select(net, weight_bits, skip)
    for value, choices, name in ((init, INITS, "init"), (grad_scale, GRAD_SCALES, "grad_scale")):
        if value not in choices:
            known = f"{', '.join(choices[:-1])} or {choices[-1]}"
            raise InputError(f"expected {name} {known}, got {value!r} - at quantize_")
    if activation_bits is not None:
        activation_bits = checked_bits(activation_bits, "activation_bits")
        if calibration is None:
            got = "none (a saved state needs none: quantize_like_)"
            raise InputError(f"expected calibration batches for quantized activations, got {got} - at quantize_")
    made = _weight_quantizers(net, targets, per_channel, init, grad_scale)
    images = [] if activation_bits is None else _first_batches(net, calibration)
    with all_or_nothing(net):
        for name, (layer, _) in targets.items():
            _attach(layer, made[name])
        _quantize_together(net)
        if activation_bits is not None:
            layers = {name: layer for name, (layer, _) in targets.items()}
            _attach_input_quantizers(net, layers, activation_bits, init, grad_scale, images)
        if reason := _refusal_of_export(net, images[:1]):
            expected = "a network that qdeploy.export can write (this one only trains)"
            warnings.warn(f"expected {expected}, got {reason} - at quantize_", stacklevel=2)
    return step_parameters(net)


def quantize_like_(net: nn.Module, state: Mapping[str, Tensor]) -> list[nn.Parameter]:
    """Attaches the quantizers of a saved state dict to a float network and loads the state, without calibration data.

    Args:
        net: as before `quantize_` when `state` was made; left as it was where this raises.
        state: `state_dict()` of the quantized network.

    Returns:
        The trainable step sizes, in order.

    Raises:
        InputError: the state is of another network, or its network was not quantized.
    """
    net = _network(net)
    state = _plain_state(net, state)
    with all_or_nothing(net):
        weights: dict[tuple[int, ...], Quantizer] = {}
        inputs: dict[int, Quantizer] = {}
        for path, layer in [*net.named_modules()]:
            prefix = f"{path}." if path else ""
            if (found := _saved(state, f"{prefix}parametrizations.weight.{_depth(layer)}.")) is not None:
                weight = _check_weight(layer, f"layer `{path}`")
                if found.step.shape not in ((), weight.shape[:1]):
                    expected = f"one step size, or one for each of {len(weight)} channels"
                    raise InputError(f"expected {expected}, got shape {list(found.step.shape)} - at layer `{path}`")
                _attach(layer, weights.setdefault(_identity(layer), found.to(weight.device)))
                if (found := _saved(state, f"{prefix}input_quantizer.")) is not None:
                    _attach_input(layer, inputs.setdefault(found.bundle, found.to(weight.device)))
        _quantize_together(net)
        if not quantizers(net):
            raise InputError("expected the state of a quantized network, got no quantizers in it - at quantize_like_")
        _check_fits(net, state)
        net.load_state_dict(state)
    return step_parameters(net)


def quantizers(net: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer by what it quantizes: "layer1.0.conv1.weight" or "layer1.0.conv1.input". Shared ones repeat.

    Names are those of the network itself, without the wrappers around it or within it.
    """
    found = {}
    names = plain_names(net)
    for path, module in net.named_modules():
        prefix = f"{names[path]}." if names[path] else ""
        if (quantizer := _weight_quantizer(module)) is not None:
            found[f"{prefix}weight"] = quantizer
        if isinstance(quantizer := module._modules.get("input_quantizer"), Quantizer):
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
    steps = [module.step for module in net.modules() if isinstance(module, Quantizer) and module.step.requires_grad]
    if steps:
        torch._foreach_clamp_min_(steps, MIN_STEP)


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
    names = plain_names(net)
    for path, layer in net.named_modules():
        quantizer = _weight_quantizer(layer)
        if quantizer is None:
            continue
        weight = _weight_before(layer, quantizer).float()
        rest = weight / quantizer.step.reshape(-1, *[1] * (weight.dim() - 1))
        best = initial_step(_rows(weight, quantizer.axis), quantizer.qmin, quantizer.qmax, "mse")
        inputs = getattr(layer, "input_quantizer", None)
        rows.append(
            LayerSummary(
                name=names[path],
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


# ---- What to quantize, checked before anything is changed ---------------------------------------------------------


def _select(
    net: nn.Module, weight_bits: int | Mapping[str, int], skip: Iterable[str] | None
) -> dict[str, tuple[nn.Module, int]]:
    """The layers to quantize: {name: (layer, bits)}."""
    layers = quantizable_layers(net)
    if not layers:
        raise InputError(f"expected a network with convolutions or linear layers, got none - at {type(net).__name__}")
    given: Any = weight_bits
    if not isinstance(weight_bits, Mapping):
        given = classifier(net) if skip is None else skip
        given = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    elif skip is not None:
        raise InputError("expected bits by layer or names to skip, got both - at quantize_")
    if unknown := [str(name) for name in given if not (isinstance(name, str) and name in layers)]:
        got = ", ".join(unknown)
        raise InputError(f"expected names of convolutions or linear layers, got {got} - at quantize_")
    wanted = weight_bits if isinstance(weight_bits, Mapping) else dict.fromkeys(layers.keys() - given, weight_bits)
    chosen = {name: bits for name in layers if (bits := wanted.get(name)) is not None}
    if not chosen:
        got = f"none but what is left alone ({', '.join(layers)})"
        raise InputError(f"expected a convolution or linear layer to quantize, got {got} - at quantize_")
    return {name: (layers[name], checked_bits(bits, f"layer `{name}`")) for name, bits in chosen.items()}


def _check_not_distributed(net: nn.Module) -> None:
    """DistributedDataParallel averages the gradients of the parameters that it found when it was made, and no others:
    step sizes that come later drift apart from process to process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    gc.collect()  # one that was given up refers to itself and is still there
    kind, mine = nn.parallel.DistributedDataParallel, set(net.modules())
    if any(issubclass(type(found), kind) and not mine.isdisjoint(found.modules()) for found in gc.get_objects()):
        expected = "a network before DistributedDataParallel (quantize first, wrap afterwards)"
        raise InputError(f"expected {expected}, got one that it holds - at quantize_")


def _network(net: nn.Module) -> nn.Module:
    """What is in the wrappers, checked."""
    if not isinstance(net, nn.Module) or isinstance(net, torch.jit.ScriptModule):
        raise InputError(f"expected a torch.nn.Module in Python, got {type(net).__name__} - at quantize_")
    if torch.is_inference_mode_enabled():
        raise InputError("expected a network that will train, got torch.inference_mode - at quantize_")
    _check_not_distributed(net)
    net = unwrapped(net)
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise InputError(f"expected parameters with shapes, got a lazy one (run the network once) - at `{name}`")
    return net


# What holds the weight where something that is no parametrization computes it, and how to end that.
COMPUTED = {
    "weight_mask": "pruned: make that permanent with torch.nn.utils.prune.remove(layer, 'weight')",
    "weight_g": "of weight_norm: end that with torch.nn.utils.remove_weight_norm(layer)",
    "weight_u": "of spectral_norm: end that with torch.nn.utils.remove_spectral_norm(layer)",
}


def _first_batches(net: nn.Module, calibration: object) -> list[Tensor]:
    """On the CPU, of the type of the network's first parameter."""
    dtype = next(parameter.dtype for parameter in net.parameters() if parameter.is_floating_point())
    with undisturbed(net):  # a loader that shuffles draws random numbers
        return [torch.tensor(batch, dtype=dtype) for batch in batches(calibration, most=CALIBRATION_BATCHES)]


def _refusal_of_export(net: nn.Module, images: list[Tensor]) -> str:
    """Why `export` will refuse the network, from a trace where there are `images`, else from the types of its layers;
    "" where nothing is known against it."""
    if not images:
        return "; ".join(float_only_layers(net))
    from qdeploy.exporter import check  # takes half a second

    try:
        with undisturbed(net):
            check(net, images[0].float())
    except Exception as error:  # whatever it is, the network trains
        return f"a refusal: {one_line(error)}"
    return ""


def _check_weight(layer: nn.Module, at: str) -> Tensor:
    """The weight that a quantizer of the layer will round; raises InputError unless it has one that can train."""
    if _weight_quantizer(layer) is not None:
        raise InputError(f"expected a layer without quantizer, got one quantized before - at {at}")
    stored = layer._parameters.get("weight", layer._buffers.get("weight"))
    if stored is None and not is_computed(layer):
        how = next((text for name, text in COMPUTED.items() if hasattr(layer, name)), "computed elsewhere")
        raise InputError(f"expected a weight that is a Parameter, got one that is {how} - at {at}")
    weight: Any = layer.weight
    weight = weight.detach()
    if weight.dtype not in FLOATS or weight.layout != torch.strided or weight.is_meta or not weight.numel():
        kind = "meta " if weight.is_meta else "" if weight.layout == torch.strided else "sparse "
        got = f"{kind}{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        raise InputError(f"expected a dense float weight with values, got {got} - at {at}")
    if not weight.isfinite().all():
        raise InputError(f"expected finite weights, got NaN or infinity - at {at}")
    return weight


def _identity(layer: nn.Module) -> tuple[int, ...]:
    """Equal for layers that train one weight: the same Parameters, and the same parametrizations of them.

    The weight itself would not tell: a computed one is a new tensor at every access, often at an old address.
    """
    if not is_computed(layer):
        weight: Any = layer.weight
        return (id(weight),)
    done = takewhile(lambda module: not isinstance(module, Quantizer), parametrized_weight(layer))
    return tuple(id(part) for part in (*_originals(layer), *done))


@torch.no_grad()
def _weight_quantizers(
    net: nn.Module, targets: dict[str, tuple[nn.Module, int]], per_channel: bool, init: str, grad_scale: str
) -> dict[str, Quantizer]:
    """A quantizer for the weight of each layer, or that of the layer with which it shares the weight."""
    made: dict[str, Quantizer] = {}
    by_weight = {_identity(m): (name, q) for name, m in quantizable_layers(net).items() if (q := _weight_quantizer(m))}
    with evaluating(net):  # a spectral norm in training is another one every time
        for name, (layer, bits) in targets.items():
            weight = _check_weight(layer, f"layer `{name}`")
            key = _identity(layer)
            if key not in by_weight:
                by_weight[key] = name, _make_weight_quantizer(weight, bits, per_channel, init, grad_scale)
            other, made[name] = by_weight[key]
            if made[name].bits != bits:
                got = f"{made[name].bits} for `{other}` and {bits}"
                raise InputError(
                    f"expected the same bits for layers that share a weight, got {got} - at layer `{name}`"
                )
    return made


# ---- Attaching, and undoing it ------------------------------------------------------------------------------------


def _attach(layer: nn.Module, quantizer: Quantizer) -> None:
    """Quantizes the weight, after whatever computes it."""
    if is_computed(layer):
        parametrized_weight(layer).append(quantizer)  # register_parametrization would compute the weight in training
    else:
        if parametrize.is_parametrized(
            layer
        ):  # the bias, say; copies of the layer share its class, which gets `weight`
            kind = type(layer)
            own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            layer.__class__ = type(kind.__name__, kind.__bases__, own)
        parametrize.register_parametrization(layer, "weight", quantizer)
    _make_picklable(layer)


def _make_picklable(layer: nn.Module) -> None:
    """Gives the class that torch made for the parametrizations of this layer alone, and that no module holds, a way to
    be made again; torch itself refuses to pickle it."""
    made: Any = type(layer)
    made.__reduce_ex__ = _reduced


def _reduced(layer: nn.Module, protocol: int) -> tuple[Any, ...]:
    kind, computed = type(layer).__bases__[0], layer.parametrizations
    own: Any = getattr(kind, "__getstate__", None)  # every class has one since Python 3.11
    return _computed_layer, (kind, [*computed]), own(layer) if own else vars(layer)  # type: ignore[misc]


def _computed_layer(kind: type[nn.Module], names: list[str]) -> nn.Module:
    """A layer in which parametrizations compute the tensors `names`; all else is in the state that pickle sets."""
    layer = kind.__new__(kind)
    parametrize._inject_new_class(layer)
    for name in names:
        parametrize._inject_property(layer, name)
    _make_picklable(layer)
    return layer


def _attach_input(layer: nn.Module, quantizer: Quantizer) -> None:
    layer.input_quantizer = quantizer
    layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)


# ---- Quantized networks from saved states -------------------------------------------------------------------------


def _depth(layer: nn.Module) -> int:
    """How many parametrizations compute the weight."""
    return len(parametrized_weight(layer)) if is_computed(layer) else 0


def _saved(state: Mapping[str, Tensor], prefix: str) -> Quantizer | None:
    """The quantizer whose state begins with `prefix`."""
    step, extra = state.get(f"{prefix}step"), state.get(f"{prefix}_extra_state")
    if step is None or extra is None:
        return None
    return Quantizer(step.detach().clone(), *_checked_state(extra, f"quantizer `{prefix.rstrip('.')}`"))


def _plain_state(net: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state without the names that wrappers put before all others, and without the count of AveragedModel."""
    if not isinstance(state, Mapping):
        raise InputError(f"expected a state dict, got {type(state).__name__} - at quantize_like_")
    first = {name.partition(".")[0] for name in state} - {"n_averaged"}
    if len(first) != 1 or first & net._modules.keys() or not first & {*WRAPPERS.values()}:
        return state
    inner = {name.partition(".")[2]: value for name, value in state.items() if name != "n_averaged"}
    return _plain_state(net, inner)


def _check_fits(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Before anything is loaded: torch tells of what does not fit when half of it is loaded, in many lines."""
    own, shapes = net.state_dict(), {name: list(getattr(value, "shape", ())) for name, value in state.items()}
    wrong = [f"no {name}" for name in own if name not in state]
    wrong += [f"{name} too much" for name in state if name not in own]
    wrong += [f"{name} {shapes[name]}" for name in own if name in state and list(own[name].shape) != shapes[name]]
    if wrong:
        got = ", ".join(wrong[:3]) + ("..." if len(wrong) > 3 else "")
        raise InputError(f"expected the state of a {type(net).__name__}, got {got} - at quantize_like_")


def _weight_quantizer(module: nn.Module) -> Quantizer | None:
    if not is_computed(module):
        return None
    return next((p for p in parametrized_weight(module) if isinstance(p, Quantizer)), None)


def parametrized_weight(layer: nn.Module) -> parametrize.ParametrizationList:
    """The weight as it trains, `original` or `original0` and so on, and what is done to it, of a computed weight."""
    parametrizations: Any = layer.parametrizations
    return parametrizations.weight


def _originals(layer: nn.Module) -> list[Tensor]:
    """The tensors of which a computed weight is made."""
    computed = parametrized_weight(layer)
    names = ["original"] if computed.is_tensor else [f"original{i}" for i in range(computed.ntensors)]
    return [getattr(computed, name) for name in names]


def _weight_before(layer: nn.Module, quantizer: Quantizer) -> Tensor:
    """The weight that the quantizer rounds: what the parametrizations before it compute."""
    value: Any = _originals(layer)
    with evaluating(layer):
        for module in takewhile(lambda module: module is not quantizer, parametrized_weight(layer)):
            value = [module(*value)]
    return value[0].detach()


# ---- Step sizes ---------------------------------------------------------------------------------------------------


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
    return counts[mode] ** -0.5


@torch.no_grad()
def initial_step(rows: Tensor, qmin: int, qmax: int, method: str) -> Tensor:
    """First step sizes, [rows], for float32 values [rows, n]; `method` as `init` of `quantize_`. At least 1e-8."""
    if method == "lsq":
        step = 2 * rows.abs().mean(1) / qmax**0.5
    else:
        low = rows.amin(1) / qmin if qmin else torch.zeros_like(rows[:, 0])
        step = torch.maximum(rows.amax(1) / qmax, low)
        if method == "mse":
            step = _least_squares_step(rows, step.clamp(min=MIN_STEP), qmin, qmax)
    return step.clamp(min=MIN_STEP)


def _least_squares_step(rows: Tensor, largest: Tensor, qmin: int, qmax: int) -> Tensor:
    """argmin_s ||v - Q(v; s)||^2 for each row: a grid of eighths of an octave, then golden section.

    The grid spans largest * 2^-6, for a row whose largest value is far from the others, to largest * 2^0.5: a signed
    range has one code more below zero, so a step that clips nothing may be too small for the negative values (-1.05
    many times and 1 once have their optimum in 2 bits at 1.05).
    """

    def error(step: Tensor) -> Tensor:
        s = step[:, None]
        return rows.div(s).clamp_(qmin, qmax).round_().mul_(s).sub_(rows).square_().sum(1, dtype=torch.float64)

    best, best_error = largest, error(largest)

    def keep_better(step: Tensor, err: Tensor) -> None:
        nonlocal best, best_error
        better = err < best_error
        best, best_error = torch.where(better, step, best), torch.where(better, err, best_error)

    for j in (*range(-4, 0), *range(1, 49)):
        step = largest * 2 ** (-j / 8)
        keep_better(step, error(step))
    # Between the neighbours of the best, 0.17 of it apart: 16 cuts by 0.618 reach 1e-4 of it.
    low, high = best * 2**-0.125, best * 2**0.125
    for _ in range(16):
        left, right = high - 0.618 * (high - low), low + 0.618 * (high - low)
        left_error, right_error = error(left), error(right)
        keep_better(left, left_error)
        keep_better(right, right_error)
        to_left = left_error < right_error
        low, high = torch.where(to_left, low, left), torch.where(to_left, right, high)
    return best


# ---- All weights in one launch ------------------------------------------------------------------------------------


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


# ---- Inputs -------------------------------------------------------------------------------------------------------


def _quantize_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    quantizer: Any = module.input_quantizer
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": quantizer(kwargs["input"])}


def _attach_input_quantizers(
    net: nn.Module,
    layers: dict[str, nn.Module],
    bits: int,
    init: str,
    grad_scale: str,
    images: list[Tensor],
) -> None:
    observed, bundle_of = observe(net, layers, images)
    made: dict[str, Quantizer] = {}
    numbers = [quantizer.bundle for quantizer in quantizers(net).values()]
    silent = [f"`{name}`" for name in layers if not any(part.any() for part in observed[bundle_of[name]].samples)]
    if silent:
        expected = "inputs in calibration that are not all zero (the first step sizes would be 1e-8)"
        warnings.warn(f"expected {expected}, got zeros - at layer {', '.join(silent)}", stacklevel=3)
    elif len({batch.shape[1:] for batch in images}) == 1 and (found := doubt(torch.cat(images).float().numpy())):
        warnings.warn(f"{found} - at the calibration data", stacklevel=3)
    for name, layer in layers.items():
        bundle = bundle_of[name]
        if bundle not in made:
            seen = observed[bundle]
            values = torch.cat(seen.samples)
            qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if values.amin() < 0 else (0, 2**bits - 1)
            step = initial_step(values[None], qmin, qmax, init)[0]
            # Features of one sample, not of the batch (LSQ section 2.2): the scale does not change with the batch.
            scale = training_scale(seen.features, seen.features, qmax, grad_scale)
            made[bundle] = Quantizer(step, qmin, qmax, scale, max(numbers) + 1 + len(made))
        _attach_input(layer, made[bundle])
