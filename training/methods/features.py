"""What a module of a network reads or gives in a forward pass, by hooks: no network is rewritten for it.

Names are those of the network itself, whatever wraps it (Fabric, DistributedDataParallel): the hooks are on the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from qdeploy.errors import InputError
from qdeploy.networks.quantizable import classifier
from qdeploy.networks.wrappers import plain_names


@dataclass
class Tapped:
    """What was seen of one module since the tap was set."""

    name: str
    seen: list[Tensor] = field(default_factory=list)

    @property
    def value(self) -> Tensor:
        """The one tensor of the one forward pass; gradients flow through it."""
        if len(self.seen) != 1:
            raise InputError(f"expected a module that is called once, got {len(self.seen)} calls - at `{self.name}`")
        return self.seen[0]


@contextmanager
def tap(net: nn.Module, name: str, side: str = "output") -> Iterator[Tapped]:
    """Within the block, keeps the first tensor that module `name` gives, or reads (side "input", before its quantizer).

    It is a copy: layers that follow may work in place. Raises InputError where the network has no such module.
    """
    tapped = Tapped(name)

    def keep(value: Any) -> None:
        tapped.seen.append((value if isinstance(value, Tensor) else next(iter(value))).clone())

    module = module_of(net, name)
    if side == "input":
        # First of all hooks: the quantizer of an input is one, too.
        handle = module.register_forward_pre_hook(
            lambda module, args, kwargs: keep(args or kwargs.values()), prepend=True, with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(lambda module, args, output: keep(output))
    try:
        yield tapped
    finally:
        handle.remove()


@contextmanager
def changed_output(net: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, module `name` gives `change(output)` in place of its output."""
    handle = module_of(net, name).register_forward_hook(lambda module, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def tap_features(net: nn.Module) -> Iterator[Tapped]:
    """The input of the classifier, [N, C] or, of a convolution, [N, C, H, W]; `pooled` makes it [N, C]."""
    name = classifier(net)
    if name is None:
        raise InputError(f"expected a network with a classifier, got {type(net).__name__} without layers - at features")
    with tap(net, name, "input") as tapped:
        yield tapped


def pooled(features: Tensor) -> Tensor:
    """Features [N, C, ...] as [N, C]: their mean over positions, as most networks pool in front of a classifier."""
    return features.flatten(2).mean(2) if features.dim() > 2 else features


def of_all_devices(features: Tensor) -> Tensor:
    """Features [N, C] of the shares of all devices. Where each device computes the same of them and gradients are
    averaged over devices, these come out as if one device had the whole minibatch."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return features
    return _Gathered.apply(features)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        parts = [torch.empty_like(features) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, features.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # All devices have the same gradient of the whole. Of its parts each passes on its own alone, to a mean.
        devices = distributed.get_world_size()
        return gradient.chunk(devices)[distributed.get_rank()] * devices


def module_of(net: nn.Module, name: str) -> nn.Module:
    """The module of that name, the innermost where one wraps another; raises InputError where there is none."""
    paths = {plain: path for path, plain in plain_names(net).items() if plain}
    if name not in paths:
        known = [plain for plain in paths if "." not in plain]
        raise InputError(f"expected a module of the network ({', '.join(known)}, ...), got `{name}` - at features")
    return net.get_submodule(paths[name])
