"""The quantizers of a network: how they are attached to its layers, and found again.

A weight is quantized by a parametrization (torch.nn.utils.parametrize): the module keeps its Parameter object, so the
moments an optimizer holds for it survive, and `module.weight` becomes the fake-quantized value. An input is quantized
by a forward pre-hook. torch.export sees both as `qdeploy::lsq` nodes in front of the layer's own operator. A weight
that is computed already (weight norm, spectral norm, standardized.py) keeps its parametrizations; the quantizer comes
last.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qdeploy.networks.quantizable import weight_name
from qdeploy.networks.wrappers import plain_names
from qdeploy.training.initial_steps import MIN_STEP
from qdeploy.training.quantizer import Quantizer
from qdeploy.training.untouched import evaluating, is_computed


def quantizers(net: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer by what it quantizes: "layer1.0.conv1.weight" or "layer1.0.conv1.input". Shared ones repeat.

    Names are those of the network itself, without the wrappers around it or within it.
    """
    found = {}
    names = plain_names(net)
    for path, module in net.named_modules():
        prefix = f"{names[path]}." if names[path] else ""
        if (quantizer := weight_quantizer(module)) is not None:
            found[f"{prefix}{weight_name(module)}"] = quantizer
        if (quantizer := input_quantizer(module)) is not None:
            found[f"{prefix}input"] = quantizer
    return found


def step_parameters(net: nn.Module) -> list[nn.Parameter]:
    """The step sizes that train, each once."""
    return [module.step for module in net.modules() if isinstance(module, Quantizer) and module.step.requires_grad]


def step_group(net: nn.Module, lr: float) -> dict:
    """An optimizer group of the step sizes, for `optimizer.add_param_group`. Weight decay would change the grid: 0."""
    return {"params": step_parameters(net), "lr": lr, "weight_decay": 0.0}


@torch.no_grad()
def project_steps_(net: nn.Module) -> None:
    """Keeps every step size at 1e-8 or more; call it after each optimizer step (LSQ is undefined for s <= 0)."""
    steps: list[Tensor] = [*step_parameters(net)]
    if steps:
        torch._foreach_clamp_min_(steps, MIN_STEP)


def weight_quantizer(module: nn.Module) -> Quantizer | None:
    if not is_computed(module):
        return None
    return next((p for p in parametrized_weight(module) if isinstance(p, Quantizer)), None)


def input_quantizer(module: nn.Module) -> Quantizer | None:
    quantizer = module._modules.get("input_quantizer")
    return quantizer if isinstance(quantizer, Quantizer) else None


def parametrized_weight(layer: nn.Module) -> parametrize.ParametrizationList:
    """The weight as it trains, `original` or `original0` and so on, and what is done to it, of a computed weight."""
    parametrizations: Any = layer.parametrizations
    return parametrizations[weight_name(layer)]


def originals(layer: nn.Module) -> list[Tensor]:
    """The tensors of which a computed weight is made."""
    computed = parametrized_weight(layer)
    names = ["original"] if computed.is_tensor else [f"original{i}" for i in range(computed.ntensors)]
    return [getattr(computed, name) for name in names]


def weight_before(layer: nn.Module, quantizer: Quantizer) -> Tensor:
    """The weight that the quantizer rounds: what the parametrizations before it compute. Gradients flow through it."""
    value: Any = originals(layer)
    with evaluating(layer):
        for module in takewhile(lambda module: module is not quantizer, parametrized_weight(layer)):
            value = [module(*value)]
    return value[0]


def identity(layer: nn.Module) -> tuple[int, ...]:
    """Equal for layers that train one weight: the same Parameters, and the same parametrizations of them.

    The weight itself would not tell: a computed one is a new tensor at every access, often at an old address.
    """
    if not is_computed(layer):
        return (id(getattr(layer, weight_name(layer))),)
    done = takewhile(lambda module: not isinstance(module, Quantizer), parametrized_weight(layer))
    return tuple(id(part) for part in (*originals(layer), *done))


def attach(layer: nn.Module, quantizer: Quantizer) -> None:
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
        parametrize.register_parametrization(layer, weight_name(layer), quantizer)
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


def attach_input(layer: nn.Module, quantizer: Quantizer) -> None:
    layer.input_quantizer = quantizer
    layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def _quantize_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    quantizer: Any = module.input_quantizer
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": quantizer(kwargs["input"])}
