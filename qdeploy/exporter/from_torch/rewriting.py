"""Operators of a trace in terms of others, before they are lowered: each step is then a tensor of the trace, which
calibration and the report can look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
MOST_SUMMED = 4  # tensors of a stack that are summed one by one
LENGTH = (aten.expand_as.default, aten.expand.default, aten.clamp_min.default)  # of a row, as normalize divides by it


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


def _mul(pen: _Pen, a: Any, b: Any) -> fx.Node | None:
    """Attention scores times one number for each head: the queries times it."""
    for scores, factor in ((a, b), (b, a)):
        if _is_product(scores) and len(scores.users) == 1 and _is_of_heads(factor):
            q, k = scores.args
            return pen(scores.target, pen(aten.mul.Tensor, q, factor), k)
    return None


def _is_product(x: Any) -> bool:
    return isinstance(x, fx.Node) and x.target is aten.matmul.default and x.meta["val"].dim() > 3


def _is_of_heads(x: Any) -> bool:
    sizes: Any = x.meta["val"].shape if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), Tensor) else ()
    return len(sizes) > 2 and tuple(sizes[-2:]) == (1, 1) and sizes[-3] != 1


def _einsum(pen: _Pen, equation: str, tensors: list[fx.Node], **_: Any) -> fx.Node | None:
    """Of two tensors that share all dimensions but one each, and sum over one: a product of matrices."""
    terms, _arrow, result = equation.replace(" ", "").partition("->")
    if len(tensors) != 2 or "." in equation or not result:
        return None
    first, second = terms.split(",")
    lead = [letter for letter in first if letter in second and letter in result]
    summed, left, right = (
        [letter for letter in first + second if condition(letter)]
        for condition in (
            lambda letter: letter in first and letter in second and letter not in result,
            lambda letter: letter not in second,
            lambda letter: letter not in first,
        )
    )
    if [len(summed), len(left), len(right), len(result)] != [2, 1, 1, len(lead) + 2]:
        return None
    orders = ([*lead, *left, summed[0]], [*lead, summed[0], *right], [*lead, *left, *right])
    a, b = (
        pen(aten.permute.default, x, [term.index(letter) for letter in order])
        for x, term, order in zip(tensors, (first, second), orders, strict=False)
    )
    product = pen(aten.matmul.default, a, b)
    return pen(aten.permute.default, product, [orders[2].index(letter) for letter in result])


def _div(pen: _Pen, x: Any, length: Any, **_: Any) -> fx.Node | None:
    """x / max(|x|, eps) of each row: of x beside -x, whose mean is 0, a LayerNorm divides by the root mean square."""
    chain = [length]
    while isinstance(chain[-1], fx.Node) and chain[-1].target in LENGTH:
        chain.append(chain[-1].args[0])
    norm, eps = chain[-1], next((n.args[1] for n in chain[:-1] if n.target is aten.clamp_min.default), 1e-12)
    if getattr(norm, "target", None) is not aten.linalg_vector_norm.default or norm.args[0] is not x:
        return None
    _, order, dims, keep = (*norm.args, 2, None, False)[:4]
    value = x.meta["val"]
    if order != 2 or not keep or [d % value.dim() for d in dims or ()] != [value.dim() - 1]:
        return None
    width = value.shape[-1]
    both = pen(aten.cat.default, [x, pen(aten.neg.default, x)], -1)
    gain = pen(aten.full.default, [2 * width], width**-0.5)
    normed = pen(aten.layer_norm.default, both, [2 * width], gain, None, max(eps * eps / width, 1e-30))
    return pen(aten.slice.Tensor, normed, -1, 0, width)


def _fused(pen: _Pen, x: fx.Node, *state: Any) -> fx.Node:
    """Fake quantization that may observe first: with the scale that it has."""
    _, _, _, _, scale, zero_point, _, low, high, axis, per_channel, *_ = *state, False
    if per_channel:
        return pen(aten.fake_quantize_per_channel_affine.default, x, scale, zero_point, axis, low, high)
    return pen(aten.fake_quantize_per_tensor_affine.tensor_qparams, x, scale, zero_point, low, high)


RULES: dict[Any, Callable[..., fx.Node | None]] = {
    aten.fused_moving_avg_obs_fake_quant: _fused,
    aten.softmax: _softmax,
    aten.sum: _sum,
    aten.addcmul: _addcmul,
    aten.mul: _mul,
    aten.div: _div,
    aten.einsum: _einsum,
}
