"""Weights that lie on their grids, and the Quantizers that give `qdeploy.export` their codes without changing them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.networks.quantizable import quantizable_layers
from qdeploy.training.attached_quantizers import attach, identity
from qdeploy.training.one_launch import quantize_together
from qdeploy.training.quantize_checks import check_weight, checked_network, select
from qdeploy.training.quantize_like import quantize_like_
from qdeploy.training.quantizer import Quantizer
from qdeploy.training.standardized import standardizes
from qdeploy.training.untouched import is_computed

Bits = int | Mapping[str, int | None]  # of all layers, or by name or pattern


@dataclass(frozen=True)
class SharedWeight:
    """A weight to be quantized, and the layers that share it."""

    parameter: nn.Parameter
    layers: list[nn.Module]
    bits: int

    @property
    def values(self) -> Tensor:
        return self.parameter.detach()  # the same memory


def shared_weights(net: nn.Module, bits: Bits, allow_float: Iterable[str] = ()) -> dict[str, SharedWeight]:
    """The weights of convolutions and linear layers that `quantize_` would quantize, each by the name of the first
    layer that has it. Raises InputError for an nn.Embedding that it would quantize as well and that may not stay float.
    """
    layers, _ = select(checked_network(net), bits, allow_float=allow_float)
    _check_embeddings(net, [str(pattern) for pattern in allow_float])
    found: dict[str, SharedWeight] = {}
    names: dict[tuple[int, ...], str] = {}
    for name, (layer, width) in layers.items():
        check_weight(layer, f"layer `{name}`")
        if is_computed(layer) or standardizes(layer):
            got = f"one that {'parametrizations compute' if is_computed(layer) else 'its forward standardizes'}"
            raise InputError(f"expected a weight that is a Parameter, got {got} - at layer `{name}`")
        first, parameter = names.setdefault(identity(layer), name), layer._parameters["weight"]
        assert parameter is not None  # `check_weight` lets no other one pass
        found.setdefault(first, SharedWeight(parameter, [], width)).layers.append(layer)
        if found[first].bits != width:
            got = f"{found[first].bits} for `{first}` and {width}"
            raise InputError(f"expected the same bits for layers that share a weight, got {got} - at layer `{name}`")
    return found


def _check_embeddings(net: nn.Module, allowed: list[str]) -> None:
    embeddings = [name for name, layer in quantizable_layers(net).items() if isinstance(layer, nn.Embedding)]
    if left := [name for name in embeddings if not any(fnmatchcase(f"{name}.weight", one) for one in allowed)]:
        expected = "convolutions and linear layers alone (LSQ quantizes embeddings; else allow it: allow_float)"
        raise InputError(f"expected {expected}, got an nn.Embedding - at layer `{left[0]}`")


def code_range(bits: int) -> tuple[int, int]:
    """The least and the greatest signed code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def attach_fixed(net: nn.Module, weights: Mapping[str, SharedWeight], made: Mapping[str, Quantizer]) -> None:
    """Attaches quantizers for weights that lie on their grids, or will; the step sizes do not train."""
    for name, quantizer in made.items():
        quantizer.to(weights[name].values.device).step.requires_grad_(False)
        for layer in weights[name].layers:
            attach(layer, quantizer)
    quantize_together(net)


def reattach_fixed(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Attaches them to a float network, and loads it, from the state of a quantized one."""
    for step in quantize_like_(net, state):
        step.requires_grad_(False)
