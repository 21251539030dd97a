"""The layers of a network whose weights are on a grid."""

from __future__ import annotations

from torch import nn

from qdeploy.errors import InputError
from qdeploy.networks.wrappers import plain_names
from qdeploy.training.attached_quantizers import weight_quantizer
from qdeploy.training.quantizer import Quantizer


def quantized_layers(net: nn.Module) -> dict[str, tuple[nn.Module, Quantizer]]:
    """Each with the quantizer of its weight, by its name, in order of registration. Raises InputError where none is."""
    names = plain_names(net)
    found = {names[path]: (module, weight_quantizer(module)) for path, module in net.named_modules()}
    layers = {name: (layer, quantizer) for name, (layer, quantizer) in found.items() if quantizer is not None}
    if not layers:
        raise InputError("expected a network with quantized weights, got one in float - at the network")
    return layers
