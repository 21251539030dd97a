"""The weights of a network as measures take them: as its layers compute with them, in one vector that can be moved.

Weights on a grid are what the grid made of them, and no quantizer rounds them again: a measure then means the same for
networks in float and for quantized ones. Quantizers of layers' inputs stay: without them it would be another network.
`bare` makes such a copy; `folded` has the BatchNorms of it in the convolutions in front of them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from qdeploy.errors import InputError
from qdeploy.training.attached_quantizers import identity
from qdeploy.training.quantizer import Quantizer
from qdeploy.training.untouched import undisturbed

FoldsInto = nn.Conv1d | nn.Conv2d | nn.Linear


def bare(net: nn.Module) -> nn.Module:
    """A copy in which every weight is a Parameter, the value with which its layer computes; layers that share one share
    it in the copy. In eval mode."""
    net = copy.deepcopy(net).eval()
    layers: list[Any] = [layer for layer in net.modules() if parametrize.is_parametrized(layer)]
    names = [identity(layer) for layer in layers]  # before the first is made plain: an address may be used again
    shared: dict[tuple[int, ...], dict[str, nn.Parameter]] = {}
    for layer, same in zip(layers, names, strict=True):
        computed = {name: nn.Parameter(getattr(layer, name).detach()) for name in layer.parametrizations}
        # By hand: torch would take the property from the class of the layer, which `net` shares with its copy.
        del layer.parametrizations
        layer.__class__ = type(layer).__bases__[0]
        for name, parameter in shared.setdefault(same, computed).items():
            layer.register_parameter(name, parameter)
    held: Any = net
    if hasattr(held, "_quantized_weights"):
        held._quantized_weights = []  # of `quantize_together`, which has none to quantize any more
    return net


def folded(net: nn.Module, inputs: Tensor) -> nn.Module:
    """A `bare` copy in which BatchNorms are folded into the convolution or linear layer whose output they read.

    Which one that is shows a forward pass of `inputs`, a batch or a part of one. BatchNorms that read something else,
    a concatenation say, or that normalize by the batch, stay. Raises InputError where the copy computes something else.
    """
    net = bare(net)
    with undisturbed(net):
        expected = net(inputs)
        for layer, norm, name in _pairs(net, inputs):
            _fold_(layer, norm)
            parent, _, own = name.rpartition(".")
            setattr(net.get_submodule(parent), own, nn.Identity())
        found = net(inputs)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        largest = float((found - expected).abs().max())
        raise InputError(f"expected the same outputs with BatchNorm folded, got {largest:.3g} away - at the network")
    return net


def _pairs(net: nn.Module, inputs: Tensor) -> list[tuple[FoldsInto, _BatchNorm, str]]:
    """Layers with the BatchNorms that read their output, and the names of these."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # by id, which the reference keeps from being used again
    found: dict[_BatchNorm, nn.Module | None] = {}

    def of_layer(layer: nn.Module, args: tuple, output: Tensor) -> None:
        made[id(output)] = layer, output

    def of_norm(norm: Any, args: tuple) -> None:
        layer, _ = made.get(id(args[0]), (None, None))
        found[norm] = layer if norm not in found else None  # one that is used twice

    handles = []
    for module in net.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(of_layer))
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(of_norm))
    try:
        net(inputs)
    finally:
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in net.named_modules()}
    once = Counter(found.values())
    pairs: Any = [(layer, norm, names[norm]) for norm, layer in found.items() if layer is not None and once[layer] == 1]
    return pairs


@torch.no_grad()
def _fold_(layer: FoldsInto, norm: _BatchNorm) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = (0 if layer.bias is None else layer.bias.double()) - norm.running_mean.double()
    bias = bias * scale + (0 if norm.bias is None else norm.bias.double())
    weight = layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype))
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))


def parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """What trains but for step sizes, by name, sorted: in this order a network in float, a quantized one and the `bare`
    copy of either have the same vector of weights. Those that layers share come once."""
    found, seen = {}, set[int]()
    steps = {id(module.step) for module in net.modules() if isinstance(module, Quantizer)}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        found[name.replace("parametrizations.", "").replace(".original", "")] = parameter
    kept = {}
    for name, parameter in sorted(found.items()):
        if id(parameter) not in steps | seen:
            kept[name] = parameter
            seen.add(id(parameter))
    return kept


def weights(net: nn.Module) -> dict[str, nn.Parameter]:
    """Of `parameters` those of layers, as papers count weights: not biases, nor gains and shifts of norms, which have
    one dimension."""
    return {name: parameter for name, parameter in parameters(net).items() if parameter.dim() > 1}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One vector of all."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


class Place:
    """All `parameters` of a network as one vector, to which they can be moved. The network is changed in place.

    Convolutions compute on channels that lie beside each other, which takes two thirds of the time on a CPU: a NiN of
    16 x 16 images 21 microseconds an image on a core of a Xeon, against 33. Draws that are batched, by grouped
    convolutions (torch.vmap), take 93 and more.
    """

    def __init__(self, net: nn.Module):
        self.net: nn.Module = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters = [*parameters(net).values()]
        self._sizes = [parameter.numel() for parameter in self.parameters]
        self.center = flat(self.parameters)  # where they were

    @torch.no_grad()
    def move(self, vector: Tensor) -> None:
        """To `vector`, [n] as `center`."""
        for parameter, values in zip(self.parameters, vector.split(self._sizes), strict=True):
            parameter.copy_(values.reshape(parameter.shape))

    def gradient(self, loss: Tensor) -> Tensor:
        """Of `loss` where the parameters are: [n]; 0 of what it does not depend on."""
        return flat(torch.autograd.grad(loss, self.parameters, materialize_grads=True))


def channels_last(batches: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Batches of images as a `Place` computes with them."""
    return [(_beside(inputs), labels) for inputs, labels in batches]


def _beside(inputs: Tensor) -> Tensor:
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs


def normal(count: int, seed: int) -> Tensor:
    """f32 [count] from N(0, 1), on the CPU: the same for every device."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def uniform(count: int, seed: int) -> Tensor:
    """f32 [count] in [-1, 1), as `normal`."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).mul_(2).sub_(1)
