"""Quantized networks from saved states, without calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.networks.quantizable import is_quantizable, weight_name
from qdeploy.networks.wrappers import WRAPPERS
from qdeploy.training.attached_quantizers import (
    attach,
    attach_input,
    identity,
    parametrized_weight,
    quantizers,
    step_parameters,
)
from qdeploy.training.equalize import FACTOR, attach_factor
from qdeploy.training.one_launch import quantize_together
from qdeploy.training.quantize_checks import check_input, check_weight, checked_network
from qdeploy.training.quantizer import Quantizer, checked_state
from qdeploy.training.standardized import parametrize_standardized
from qdeploy.training.untouched import all_or_nothing, is_computed


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
    net = checked_network(net)
    state = _plain_state(net, state)
    with all_or_nothing(net):
        parametrize_standardized([m for path, m in net.named_modules() if _is_computed_in(state, path, m)])
        weights: dict[tuple[int, ...], Quantizer] = {}
        inputs: dict[int, Quantizer] = {}
        for path, layer in [*net.named_modules()]:
            if not is_quantizable(path, layer):
                continue
            prefix = f"{path}." if path else ""
            if isinstance(factor := state.get(f"{prefix}{FACTOR}"), Tensor) and FACTOR not in layer._buffers:
                attach_factor(layer, torch.empty_like(factor, device=next(layer.parameters()).device))
            if (found := _saved(state, f"{prefix}parametrizations.{weight_name(layer)}.{_depth(layer)}.")) is not None:
                weight = check_weight(layer, f"layer `{path}`")
                if found.step.shape not in ((), weight.shape[:1]):
                    expected = f"one step size, or one for each of {len(weight)} channels"
                    raise InputError(f"expected {expected}, got shape {list(found.step.shape)} - at layer `{path}`")
                attach(layer, weights.setdefault(identity(layer), found.to(weight.device)))
            if (found := _saved(state, f"{prefix}input_quantizer.")) is not None:
                check_input(layer, f"layer `{path}`")
                device = next(chain(layer.parameters(), layer.buffers())).device
                attach_input(layer, inputs.setdefault(found.bundle, found.to(device)))
        quantize_together(net)
        if not quantizers(net):
            raise InputError("expected the state of a quantized network, got no quantizers in it - at quantize_like_")
        _check_fits(net, state)
        net.load_state_dict(state)
    return step_parameters(net)


def _is_computed_in(state: Mapping[str, Tensor], path: str, layer: nn.Module) -> bool:
    """Whether parametrizations computed the weight when the state was saved."""
    return f"{path}.parametrizations.{weight_name(layer)}.original".lstrip(".") in state


def _depth(layer: nn.Module) -> int:
    """How many parametrizations compute the weight."""
    return len(parametrized_weight(layer)) if is_computed(layer) else 0


def _saved(state: Mapping[str, Tensor], prefix: str) -> Quantizer | None:
    """The quantizer whose state begins with `prefix`."""
    step, extra = state.get(f"{prefix}step"), state.get(f"{prefix}_extra_state")
    if step is None or extra is None:
        return None
    return Quantizer(step.detach().clone(), *checked_state(extra, f"quantizer `{prefix.rstrip('.')}`"))


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
