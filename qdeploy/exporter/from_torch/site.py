"""Where an operator stands in the network, and what is said where it cannot be lowered."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from qdeploy.exporter.elements import Value
from qdeploy.exporter.from_torch.operators import gives_real_numbers, is_inserted
from qdeploy.exporter.from_torch.trace import Trace, modules_of
from qdeploy.exporter.layers import Layer, QuantizedWeight
from qdeploy.exporter.lowering import site as lowering
from qdeploy.exporter.lowering.site import Missing, Unknown
from qdeploy.graph import Shape

aten = torch.ops.aten
OPERATOR = (
    "an operator that the engine has (conv1d, conv2d, linear, norms, attention, embedding, ReLU and other functions of "
    "one tensor, sums and products of two, pools, resize, and whatever moves rows or channels)"
)
RIGHT_BEFORE = (
    "a learned quantizer right before its conv2d or linear (make what else is done to the weight a parametrization of "
    "it, then quantize_)"
)


class UnknownScores(Unknown):
    """In place of attention scores, up to their product with the values."""


@dataclass
class Site(lowering.Site):
    """Where an operator stands in the trace."""

    noun = "module"
    node: fx.Node
    trace: Trace
    layers: list[Layer]

    @property
    def name(self) -> str:
        """Path of the module whose forward holds the operator, and the operator, unless the module is of torch.nn. Of a
        quantizer that PT2E inserted it is the module that reads it."""
        if is_inserted(self.node) and (reader := _reader(self.node)) is not None:
            return Site(reader, self.trace, self.layers).name
        path, kind = modules_of(self.node, self.trace.names)[-1]
        path = path.split(".parametrizations.")[0]
        if path and (kind.startswith(("torch.nn.", "torch.ao.", "torchao.")) or gives_real_numbers(self.node)):
            return path
        return f"{path}.{self.operator}" if path else self.operator

    def argument(self, place: int) -> fx.Node:
        """The node of a tensor that it reads."""
        node: Any = self.node.args[place]
        return node

    @property
    def operator(self) -> str:
        return getattr(self.target, "_opname", self.target.__name__)

    @property
    def target(self) -> Any:
        """The operator itself; of an in-place one, whose name ends in _, the functional one."""
        target: Any = self.node.target
        name = getattr(target, "_opname", "")
        pure = getattr(aten, name[:-1], None) if name.endswith("_") else None
        return target if pure is None else getattr(pure, target._overloadname, target)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the result, for a batch of BATCH."""
        value = self.node.meta["val"]
        return self.trace.sizes(value if isinstance(value, Tensor) else value[0])

    @property
    def shape(self) -> Shape:
        value = self.node.meta["val"]
        shape = (value if isinstance(value, Tensor) else value[0]).shape
        if not self.has_batch(shape):
            got = ", ".join(str(size).replace(str(self.trace.batch), "N") for size in shape)
            self.fail("an operator that keeps the batch as dimension 0 and fixed sizes behind it", f"shape [{got}]")
        return tuple(shape[1:]) or (1,)  # one number an image is [N] in torch and [N, 1] in the file

    def has_batch(self, shape: Any) -> bool:
        """Whether the shape is [N, ...]: the batch, and fixed sizes behind it."""
        return len(shape) > 0 and str(shape[0]) == str(self.trace.batch) and all(isinstance(d, int) for d in shape[1:])

    @property
    def tensor(self) -> fx.Node:
        return self.node

    @property
    def detail(self) -> str:
        return f" (aten.{self.operator})"


def _reader(node: fx.Node) -> fx.Node | None:
    """The first operator behind quantizers."""
    while is_inserted(node) or node.target is operator.getitem:
        if not node.users:
            return None
        node = next(iter(node.users))
    return node if node.op == "call_function" else None


def missing(site: Site, value: Any, inputs: list[Any]) -> Any:
    """What stands for the result `value` of an operator that failed."""
    if isinstance(value, (tuple, list)):
        return tuple(missing(site, part, inputs) for part in value)
    if isinstance(value, Tensor) and site.has_batch(value.shape) and any(map(depends, inputs)):
        return Missing("", [], tuple(value.shape[1:]) or (1,), Value(site.node))
    return Unknown()


def depends(value: Any) -> bool:
    """Whether a value in a lowering depends on the network's input."""
    return not (value is None or isinstance(value, (Tensor, int, float, str, torch.dtype, torch.device)))


def dequantized(weight: QuantizedWeight) -> Tensor:
    return torch.from_numpy(weight.dequantized())


def float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float64)
