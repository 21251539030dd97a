"""What is to be quantized, checked before anything is changed."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.networks.quantizable import checked_bits, classifier, quantizable_layers
from qdeploy.networks.wrappers import unwrapped
from qdeploy.training.attached_quantizers import weight_quantizer
from qdeploy.training.untouched import is_computed

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What holds the weight where something that is no parametrization computes it, and how to end that.
COMPUTED = {
    "weight_mask": "pruned: make that permanent with torch.nn.utils.prune.remove(layer, 'weight')",
    "weight_g": "of weight_norm: end that with torch.nn.utils.remove_weight_norm(layer)",
    "weight_u": "of spectral_norm: end that with torch.nn.utils.remove_spectral_norm(layer)",
}


def select(
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
    if weight_quantizer(layer) is not None:
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
