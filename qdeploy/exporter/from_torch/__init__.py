"""PyTorch's front end: `lower` makes layers of a network, in real numbers. Needs PyTorch.

LOWERING has one function for each ATen operator that the engine can express; any other is an ExportError.

    trace          torch.export of the network; rewriting.py puts some of its operators in terms of others
    moves          what only moves elements, in numbers of elements
    elementwise, weighted, norms, windows   what the operators of the rules in exporter/lowering/ are in ATen
    attention      products of queries and keys, and of softmax and values
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from qdeploy.errors import ExportError
from qdeploy.exporter.elements import Value
from qdeploy.exporter.from_torch import attention, elementwise, exported, moves, norms, quantizers, weighted, windows
from qdeploy.exporter.from_torch.exported import Source, is_exported, module_of
from qdeploy.exporter.from_torch.operators import DEQUANTIZE, FAKE, LSQ, QUANTIZE, gives_real_numbers, name_of
from qdeploy.exporter.from_torch.site import (
    OPERATOR,
    RIGHT_BEFORE,
    Site,
    UnknownScores,
    aten,
    depends,
    dequantized,
    missing,
)
from qdeploy.exporter.from_torch.trace import Trace, is_random, trace
from qdeploy.exporter.from_torch.words import described
from qdeploy.exporter.layers import Input, Layer, Network, QuantizedWeight
from qdeploy.exporter.lowering.moved import Moved, layer_of, plain
from qdeploy.exporter.lowering.site import Missing, Obstacle, Unknown, all_of
from qdeploy.networks.quantizable import classifier


def is_network(value: object) -> bool:
    """Whether it is one network, not a list of them."""
    return isinstance(value, Source) and not isinstance(value, nn.ModuleList)


def lower(source: Source, example: np.ndarray) -> Network:
    """One layer for each operator of the network that its outputs need, for inputs like `example`, [N, ...].

    The network is traced in eval mode and left as it was; what torch.export made has no mode. Raises ExportError for
    what the engine lacks: all of it, with the modules.
    """
    net = module_of(source)
    found = trace(net, torch.from_numpy(example[:1].copy()))
    return _lowered(found, exported.classifier(net) if is_exported(net) else classifier(net))


def _lowered(trace: Trace, classifier: str | None) -> Network:
    values: dict[fx.Node, Any] = {}
    layers: list[Layer] = []
    obstacles: list[Obstacle] = []
    needed = set(trace.outputs.values())
    for node in reversed(trace.module.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    for node in trace.module.graph.nodes:
        if node not in needed and node.op != "placeholder":
            continue
        found = node.meta.get("val")
        if node in trace.constants:
            values[node] = quantizers.weight(node, trace) if gives_real_numbers(node) else trace.constants[node]
        elif node.op == "placeholder":
            values[node] = Input("input", [], trace.shape, Value(node))
            layers.append(values[node])
        elif isinstance(found, torch.SymInt):
            values[node] = trace.size(found)
        elif node.op == "call_function" and isinstance(found, (Tensor, tuple, list)):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.get)
            site = Site(node, trace, layers)
            try:
                values[node] = _lower_node(site, args, kwargs)
            except Obstacle as obstacle:
                inputs = tree_leaves((args, kwargs))
                if _rule(site) is None or not any(map(_is_missing, inputs)):  # else it follows from another one
                    obstacles.append(obstacle)
                values[node] = _in_place(site, inputs)
    if obstacles:
        raise all_of(obstacles, OPERATOR)
    outputs = [_output(values.get(node), Site(node, trace, layers)) for node in trace.outputs.values()]
    several = list(trace.outputs) if len(outputs) > 1 else []
    names = ["" if name.replace(".", "").isdigit() else name for name in several]
    notes = [f"outputs in this order: {', '.join(several)}"] if any(names) else []
    return Network(trace, layers, outputs, trace.ids, classifier, notes, names)


def _output(found: Any, site: Site) -> Layer:
    if not isinstance(found, (Layer, Moved)):
        raise ExportError("expected an output that depends on the input, got a constant - at the network's forward")
    return plain(site, found)


def _rule(site: Site) -> Callable[..., Any] | None:
    rule = LOWERING.get(getattr(site.target, "overloadpacket", site.target))
    return rule or QUANTIZERS.get(name_of(site.target))


def _in_place(site: Site, inputs: list[Any]) -> Any:
    """What stands for the result of an operator that failed, or whose inputs are unknown."""
    of_scores = any(isinstance(x, (attention.Scores, UnknownScores)) for x in inputs)
    if of_scores and _rule(site) is not attention.product:
        return UnknownScores()
    return missing(site, site.node.meta["val"], inputs)


def _is_missing(x: Any) -> bool:
    of = x.q if isinstance(x, attention.Scores) else x
    return isinstance(of, (Layer, Moved)) and isinstance(layer_of(of), Missing)


def _lower_node(site: Site, args: tuple, kwargs: dict) -> Any:
    inputs = tree_leaves((args, kwargs))
    if is_random(site.node):
        dropout = "dropout" in site.operator
        got = "dropout that stays on (pass training=self.training)" if dropout else f"random numbers of {site.operator}"
        site.fail("an operator that gives the same every time", got)
    if site.node in site.trace.stateful:
        site.fail("a forward that changes no buffer in eval mode", "a change that the output depends on")
    rule = _rule(site)
    if rule is not None and any(isinstance(x, Unknown) for x in inputs):
        return _in_place(site, inputs)
    if rule is not quantizers.dequantize and any(isinstance(x, quantizers.Quantized) for x in inputs):
        site.fail("an activation that is dequantized right behind its quantizer", f"{site.operator} of its codes")
    if rule is not weighted.transposed_convolution and any(isinstance(x, quantizers.InputFirst) for x in inputs):
        site.fail(quantizers.BY_CHANNEL.format(0), "axis 1")
    if rule in WEIGHTED and isinstance(args[0], Tensor) and isinstance(args[1], QuantizedWeight):
        return _computed(site, (args[0], dequantized(args[1]), *args[2:]), kwargs)  # of constants, as learned queries
    moved = rule in (moves.same, moves.move, moves.getitem)  # the codes stay
    for i, value in enumerate(inputs):
        right = i == 1 and rule in WEIGHTED or i == 0 and rule is weighted.embedding
        if isinstance(value, QuantizedWeight) and not moved and not right:
            site.fail(RIGHT_BEFORE, f"aten.{site.operator} of its result")
    if not any(map(depends, inputs)):
        return _computed(site, args, kwargs)
    if rule is None:
        site.fail(OPERATOR, described(site))
    try:
        return rule(site, *args, **kwargs)
    except ExportError:
        raise
    except Exception:  # arguments that no rule foresaw, such as sizes that depend on the batch
        site.fail(OPERATOR, f"{described(site)} with arguments that it lacks")


def _computed(site: Site, args: tuple, kwargs: dict) -> Any:
    """What depends on nothing but the size of the batch, for a batch of BATCH."""
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    target = aten.reshape.default if "view" in site.operator else site.target  # strides may be others than in the trace
    with torch.no_grad():
        return target(*args, **kwargs)


WEIGHTED = (weighted.convolution, weighted.transposed_convolution, weighted.linear)
MOVES = """view reshape flatten squeeze unsqueeze unflatten _unsafe_view expand expand_as repeat permute transpose t
    movedim swapaxes swapdims select slice narrow chunk split split_with_sizes unbind flip roll rot90 index_select
    tensor_split unsafe_split unsafe_chunk view_as reshape_as pixel_shuffle pixel_unshuffle channel_shuffle"""
FLOAT_MOVES = """upsample_nearest2d _upsample_nearest_exact2d upsample_nearest1d reflection_pad1d reflection_pad2d
    replication_pad1d replication_pad2d"""
IDENTITIES = """clone alias detach contiguous to type_as _to_copy dropout feature_dropout alpha_dropout lift_fresh_copy
    _assert_tensor_metadata"""
FILLED = "new_zeros new_ones new_full zeros_like ones_like full_like"
FUNCTIONS = """sigmoid silu gelu hardswish hardsigmoid leaky_relu elu selu celu mish softplus tanh rrelu
    threshold log_sigmoid exp expm1 log log1p sqrt rsqrt square pow reciprocal abs sign erf sin cos atan floor ceil
    round gt ge lt le where max min maximum minimum"""
QUANTIZERS: dict[str, Callable[..., Any]] = {  # by name: torch registers some of them late
    **dict.fromkeys(FAKE, quantizers.fake_quantize),
    **dict.fromkeys(QUANTIZE, quantizers.quantize),
    **dict.fromkeys(DEQUANTIZE, quantizers.dequantize),
}
LOWERING: dict[Any, Callable[..., Any]] = {
    LSQ.overloadpacket: quantizers.lsq,
    operator.getitem: moves.getitem,
    aten.conv1d: weighted.convolution,
    aten.conv2d: weighted.convolution,
    aten.conv_transpose1d: weighted.transposed_convolution,
    aten.conv_transpose2d: weighted.transposed_convolution,
    aten.linear: weighted.linear,
    aten.embedding: weighted.embedding,
    aten.ne: weighted.no_padding,
    aten.batch_norm: elementwise.batch_norm,
    aten._native_batch_norm_legit_no_training: elementwise.batch_norm_functional,
    aten.layer_norm: norms.layer_norm,
    aten.group_norm: norms.group_norm,
    aten.instance_norm: norms.instance_norm,
    aten.scaled_dot_product_attention: attention.scaled_dot_product,
    **dict.fromkeys((aten.matmul, aten.bmm), attention.product),
    aten.baddbmm: attention.added_product,
    aten.masked_fill: attention.masked,
    aten.softmax: attention.softmax,
    aten.add: elementwise.add,
    aten.sub: elementwise.subtract,
    aten.rsub: elementwise.subtract_reversed,
    aten.mul: elementwise.multiply,
    aten.div: elementwise.divide,
    aten.neg: elementwise.negate,
    aten.relu: elementwise.relu,
    aten.relu6: elementwise.relu6,
    aten.hardtanh: elementwise.hardtanh,
    aten.prelu: elementwise.prelu,
    aten.clamp: elementwise.clamp,
    aten.clip: elementwise.clamp,
    aten.clamp_min: elementwise.clamp,
    aten.clamp_max: elementwise.clamp_max,
    aten.cat: moves.concat,
    aten.concat: moves.concat,
    aten.stack: moves.stack,
    aten.pad: moves.pad,
    aten.constant_pad_nd: lambda site, x, padding, value=0: moves.pad(site, x, padding, "constant", value),
    aten.index: moves.index,
    aten.max_pool2d: windows.max_pool2d,
    aten.max_pool2d_with_indices: windows.max_pool2d,
    aten.avg_pool2d: windows.avg_pool2d,
    aten.adaptive_avg_pool2d: windows.adaptive_avg_pool2d,
    aten.adaptive_avg_pool1d: windows.adaptive_avg_pool1d,
    aten.adaptive_max_pool2d: windows.adaptive_max_pool2d,
    aten.upsample_bilinear2d: windows.upsample,
    aten.upsample_bicubic2d: windows.upsample,
    aten.mean: windows.mean,
    aten.sum: windows.total,
    aten.amax: windows.maximum_over,
    **{getattr(aten, name): moves.move for name in MOVES.split()},
    **{getattr(aten, name): moves.move_in_float for name in FLOAT_MOVES.split()},
    **{getattr(aten, name): moves.filled for name in FILLED.split()},
    **{getattr(aten, name): moves.same for name in IDENTITIES.split()},
    **{getattr(aten, name): elementwise.table for name in FUNCTIONS.split()},
}
