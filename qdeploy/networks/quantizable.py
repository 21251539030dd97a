"""What can be quantized, layers and bits: what `quantize_` leaves in float by default, `export` rounds by default."""

from __future__ import annotations

import re

from torch import nn

from qdeploy.networks.wrappers import plain_names

# The layers whose `weight` is quantized, and whose input can be; axis 0 of each weight is its output channel.
WEIGHT_TYPES: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Linear)
ADDED = re.compile(
    "pos|type"
)  # in names of embeddings of positions and token types, which are no more than an addition


def weight_name(layer: nn.Module) -> str:
    """The name of the parameter that is quantized: the three projections of nn.MultiheadAttention are one matrix."""
    return "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"


def is_quantizable(path: str, layer: nn.Module) -> bool:
    """Whether `quantize_` can treat the layer of this name."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer._qkv_same_embed_dim
    if isinstance(layer, nn.Embedding):
        return layer.max_norm is None and not ADDED.search(path.rpartition(".")[2])
    return isinstance(layer, WEIGHT_TYPES)


def quantizable_layers(net: nn.Module) -> dict[str, nn.Module]:
    """The layers that `quantize_` can treat, by name in order of registration; a shared module appears once."""
    names = plain_names(net)
    return {names[path]: module for path, module in net.named_modules() if is_quantizable(path, module)}


def plain_layers(net: nn.Module) -> dict[str, nn.Module]:
    """Of these the convolutions and linear layers, each of which has one input and a `weight`."""
    return {name: layer for name, layer in quantizable_layers(net).items() if isinstance(layer, WEIGHT_TYPES)}


def classifier(net: nn.Module) -> str | None:
    """The layer that `quantize_` leaves in float unless told otherwise, and that `export` rounds to 8 bits: of all
    convolutions and linear layers that registered last, whatever the network does with it. None where there is none."""
    return next(reversed(plain_layers(net)), None)


# Layers of PyTorch that have no integer form, whatever the network does with them.
FLOAT_ONLY: tuple[type[nn.Module], ...] = (
    *(nn.Conv3d, nn.ConvTranspose3d),
    *(nn.RMSNorm, nn.LocalResponseNorm, nn.RNNBase, nn.Fold, nn.Unfold),
)


def float_only_layers(net: nn.Module) -> list[str]:
    """Why `export` will refuse the network, as far as the types of its layers tell: "`line` (Conv1d)"."""
    names = plain_names(net)
    found: dict[str, list[str]] = {}
    for path, module in net.named_modules():
        overlaps = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d)) and module.kernel_size != module.stride
        if isinstance(module, FLOAT_ONLY) or overlaps:
            found.setdefault(_kind(module), []).append(f"`{names[path]}`")
    return [f"{', '.join(where[:3])}{'...' if len(where) > 3 else ''} ({kind})" for kind, where in found.items()]


def _kind(module: nn.Module) -> str:
    """The class of PyTorch that it is: parametrizations make a subclass."""
    return next(kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules."))
