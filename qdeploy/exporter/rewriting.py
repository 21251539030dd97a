"""Operators of a trace in terms of others, before they are lowered: each step is then a tensor of the trace, which
calibration and the report can look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
MOST_SUMMED = 4  # tensors of a stack that are summed one by one


def rewrite(graph: fx.Graph) -> None:
    """Puts what a rule of RULES makes of a node in its place."""
    for node in list(graph.nodes):
        rule = RULES.get(getattr(node.target, "overloadpacket", None))
        if rule is None:
            continue
        with graph.inserting_before(node):
            new = rule(_Pen(graph, node), *node.args, **node.kwargs)
        if new is not None:
            node.replace_all_uses_with(new)
            graph.erase_node(node)


class _Pen:
    """Writes nodes that stand where `node` does."""

    def __init__(self, graph: fx.Graph, node: fx.Node):
        self.graph, self.node = graph, node

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        new = self.graph.call_function(target, args)
        value = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        new.meta = {**self.node.meta, "val": value}
        return new

    def parts(self, x: fx.Node, dim: int) -> list[fx.Node]:
        return [self(aten.select.int, x, dim, i) for i in range(x.meta["val"].shape[dim])]


def _softmax(pen: _Pen, x: fx.Node, dim: int, *_: Any, **__: Any) -> fx.Node | None:
    """Over two numbers it is the sigmoid of their difference: the choice between two branches (SKNet, ResNeSt)."""
    if x.meta["val"].shape[dim] != 2:
        return None
    first, second = pen.parts(x, dim)
    difference = pen(aten.sub.Tensor, first, second)
    shares = [pen(aten.sigmoid.default, of) for of in (difference, pen(aten.neg.default, difference))]
    return pen(aten.stack.default, shares, dim)


def _sum(pen: _Pen, x: fx.Node, dims: Any = None, keep: bool = False, **options: Any) -> fx.Node | None:
    """Over the tensors of a stack: they are added."""
    value = x.meta["val"]
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(value, Tensor) or value.dim() != 5 or dims is None or len(dims) != 1 or keep or options:
        return None
    if dims[0] % 5 == 0 or value.shape[dims[0]] > MOST_SUMMED:
        return None
    total, *rest = pen.parts(x, dims[0])
    for part in rest:
        total = pen(aten.add.Tensor, total, part)
    return total


def _addcmul(pen: _Pen, x: fx.Node, a: fx.Node, b: fx.Node, *, value: float = 1) -> fx.Node:
    product = pen(aten.mul.Tensor, a, b)
    return pen(aten.add.Tensor, x, product if value == 1 else pen(aten.mul.Tensor, product, value))


RULES: dict[Any, Callable[..., fx.Node | None]] = {
    aten.softmax: _softmax,
    aten.sum: _sum,
    aten.addcmul: _addcmul,
}
