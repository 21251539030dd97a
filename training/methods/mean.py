"""Means of networks: of their parameters and float buffers, by name."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Mean:
    """The mean of tensors by name, weighted; it lies where the first ones did."""

    def __init__(self) -> None:
        self.total, self.tensors = 0.0, dict[str, Tensor]()  # the weight of all

    def clear(self) -> None:
        self.total, self.tensors = 0.0, {}

    def of_others(self, tensors: dict[str, Tensor]) -> bool:
        """Whether it is the mean of tensors of other names."""
        return bool(self.tensors) and self.tensors.keys() != tensors.keys()

    @torch.no_grad()
    def add(self, tensors: dict[str, Tensor], weight: float = 1.0) -> None:
        """Counts `tensors` in; those of other names than before begin anew."""
        if self.of_others(tensors):
            self.clear()
        if not self.total:
            self.tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        else:
            # A checkpoint may have been loaded on another device. A step from the mean so far, not a sum over the
            # weights: the mean of equal tensors is that tensor, to the bit.
            self.tensors = {name: tensor.to(tensors[name].device) for name, tensor in self.tensors.items()}
            torch._foreach_lerp_([*self.tensors.values()], [*tensors.values()], weight / (self.total + weight))
        self.total += weight

    @torch.no_grad()
    def network(self, net: nn.Module) -> nn.Module:
        """A copy of `net` with this mean, or `net` itself where it is a mean of nothing, or of other tensors."""
        if not self.total or self.of_others(averaged_tensors(net)):
            return net
        net = copy.deepcopy(net)
        for name, tensor in averaged_tensors(net).items():
            tensor.copy_(self.tensors[name])
        return net

    def copy(self) -> Mean:
        other = Mean()
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "tensors": {name: tensor.clone() for name, tensor in self.tensors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]
        self.tensors = {name: tensor.clone() for name, tensor in state["tensors"].items()}


def averaged_tensors(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and float buffers by name, shared ones once."""
    tensors = dict(net.named_parameters())
    return tensors | {name: buffer for name, buffer in net.named_buffers() if buffer.is_floating_point()}
