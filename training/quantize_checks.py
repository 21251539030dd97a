"""What is to be quantized, checked before anything is changed."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.arguments import checked_bits
from qdeploy.errors import InputError
from qdeploy.networks.quantizable import WEIGHT_TYPES, classifier, plain_layers, weight_name
from qdeploy.networks.wrappers import unwrapped
from qdeploy.training.attached_quantizers import input_quantizer, weight_quantizer
from qdeploy.training.float_matrices import check_matrices
from qdeploy.training.untouched import is_computed

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What holds the weight where something that is no parametrization computes it, and how to end that.
COMPUTED = {
    "weight_mask": "pruned: make that permanent with torch.nn.utils.prune.remove(layer, 'weight')",
    "weight_g": "of weight_norm: end that with torch.nn.utils.remove_weight_norm(layer)",
    "weight_u": "of spectral_norm: end that with torch.nn.utils.remove_spectral_norm(layer)",
}


Layers = dict[str, tuple[nn.Module, int]]  # by name, with their bits


def select(
    net: nn.Module,
    weight_bits: int | Mapping[str, int | None],
    activation_bits: int | Mapping[str, int | None] | None = None,
    skip: Iterable[str] | None = None,
    allow_float: Iterable[str] = (),
    layers: Mapping[str, nn.Module] | None = None,
) -> tuple[Layers, Layers]:
    """The layers whose weights, and those whose inputs are to be quantized; arguments and errors as of `quantize_`.

    layers: of which they are chosen; None are convolutions and linear layers.
    """
    layers = plain_layers(net) if layers is None else layers
    if not layers:
        raise InputError(f"expected a network with convolutions or linear layers, got none - at {type(net).__name__}")
    if isinstance(weight_bits, Mapping) and skip is not None:
        raise InputError("expected bits by layer or names to skip, got both - at quantize_")
    alone = _listed(classifier(net) if skip is None else skip)
    if unknown := [name for name in alone if not (isinstance(name, str) and name in layers)]:
        raise _unknown(unknown, layers)
    weights = _bits_by_layer(weight_bits, layers, alone)
    if activation_bits is None or isinstance(activation_bits, Mapping):
        inputs = _bits_by_layer(activation_bits or {}, layers, alone)
    else:
        read = [name for name in weights if isinstance(layers[name], WEIGHT_TYPES)]  # ids, and three inputs, are none
        inputs = dict.fromkeys(read, checked_bits(activation_bits, "activation_bits"))
    if wrong := [name for name in inputs if not isinstance(layers[name], WEIGHT_TYPES)]:
        got = f"a {type(layers[wrong[0]]).__name__}"
        raise InputError(f"expected inputs of convolutions or linear layers, got {got} - at layer `{wrong[0]}`")
    if not weights and not inputs:
        got = f"none but what is left alone ({', '.join(layers)})"
        raise InputError(f"expected a convolution or linear layer to quantize, got {got} - at quantize_")
    check_matrices(net, _listed(allow_float), layers.values())
    return (
        {name: (layers[name], checked_bits(bits, f"layer `{name}`")) for name, bits in weights.items()},
        {name: (layers[name], checked_bits(bits, f"the input of layer `{name}`")) for name, bits in inputs.items()},
    )


def _listed(names: Any) -> list[Any]:
    return [names] if isinstance(names, str) or not isinstance(names, Iterable) else [*names]


def _bits_by_layer(bits: Any, layers: Mapping[str, nn.Module], alone: list[str]) -> dict[str, Any]:
    """The bits of each layer that gets some, in order of registration."""
    others = [name for name in layers if name not in alone]
    if not isinstance(bits, Mapping):
        return {} if bits is None else dict.fromkeys(others, bits)
    taken = {key: [key] if key in layers else [name for name in others if _matches(name, key)] for key in bits}
    if unknown := [key for key, names in taken.items() if not names]:
        raise _unknown(unknown, layers, alone)
    found = {name: width for key, width in bits.items() for name in taken[key]}  # the last key that matches counts
    return {name: width for name in layers if (width := found.get(name)) is not None}


def _matches(name: str, key: Any) -> bool:
    return isinstance(key, str) and fnmatchcase(name, key)


def _unknown(names: list[Any], layers: Mapping[str, nn.Module], alone: Iterable[str] = ()) -> InputError:
    some = ", ".join([*layers][:3]) + (", ..." if len(layers) > 3 else "")
    got = ", ".join(map(str, names))
    if only := [name for name in alone if any(_matches(name, key) for key in names)]:
        got += f", which matches `{only[0]}` alone: a pattern leaves that out, its name takes it"
    return InputError(f"expected names of convolutions or linear layers, got {got} - at quantize_ (there are {some})")


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


def checked_network(net: nn.Module) -> nn.Module:
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


def check_weight(layer: nn.Module, at: str) -> Tensor:
    """The weight that a quantizer of the layer will round; raises InputError unless it has one that can train."""
    _check_first(weight_quantizer(layer), at)
    name = weight_name(layer)
    stored = layer._parameters.get(name, layer._buffers.get(name))
    if stored is None and not is_computed(layer):
        how = next((text for name, text in COMPUTED.items() if hasattr(layer, name)), "computed elsewhere")
        raise InputError(f"expected a weight that is a Parameter, got one that is {how} - at {at}")
    weight: Tensor = getattr(layer, name).detach()
    if weight.dtype not in FLOATS or weight.layout != torch.strided or weight.is_meta or not weight.numel():
        kind = "meta " if weight.is_meta else "" if weight.layout == torch.strided else "sparse "
        got = f"{kind}{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        raise InputError(f"expected a dense float weight with values, got {got} - at {at}")
    if not weight.isfinite().all():
        raise InputError(f"expected finite weights, got NaN or infinity - at {at}")
    return weight


def check_input(layer: nn.Module, at: str) -> None:
    """Raises InputError where the input is quantized already."""
    _check_first(input_quantizer(layer), at)


def _check_first(quantizer: nn.Module | None, at: str) -> None:
    if quantizer is not None:
        raise InputError(f"expected a layer without quantizer, got one quantized before - at {at}")
