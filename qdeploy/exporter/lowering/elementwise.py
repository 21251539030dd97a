"""From a trace to layers: LOWERING has one function for each ATen operator that the engine can express; any other is an
ExportError. fusion.py then makes few layers of the many.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from qdeploy.errors import ExportError
from qdeploy.exporter.grid import Grid
from qdeploy.exporter.layers import (
    Add,
    Affine,
    AvgPool2d,
    Clamp,
    Concat,
    Conv2d,
    Function,
    Input,
    Layer,
    LearnedWeight,
    Linear,
    MaxPool2d,
    Mul,
    Network,
    Pad,
    Quantize,
    Reshape,
    Table,
    checked_step,
    elementwise,
)
from qdeploy.exporter.trace import LSQ, Trace, is_random, modules_of, trace

aten = torch.ops.aten
L = TypeVar("L", bound=Layer)
OPERATOR = (
    "an operator that the engine has (conv2d, linear, BatchNorm, ReLU and other functions of one tensor, sums and "
    "products of two, concatenation of channels, max and average pools, reshape, padding by 0)"
)


def lower(net: nn.Module, example: Tensor) -> Network:
    """One layer for each operator of `net` that its output needs, for inputs like `example` [N, C, H, W] or [N, F].

    The network is traced in eval mode and left as it was. Raises ExportError for what the engine lacks: all of it, with
    the modules.
    """
    return _lowered(trace(net, example))


class Obstacle(ExportError):
    """What stands in the way of one operator."""

    def __init__(self, expected: str, got: str, site: Site):
        super().__init__(f"expected {expected}, got {got} - at module `{site.module}` (aten.{site.operator})")
        self.expected, self.got, self.module = expected, got, site.module
        if site.attention is not None:  # thirty operators, of which each is missing for the same reason
            self.expected, self.got, self.module = OPERATOR, "attention", site.attention


class Missing(Layer):
    """In place of a layer that the engine lacks, so that what follows is looked at as well."""

    op = "missing"


class Unknown:
    """In place of a value that is no layer's: what it goes into is missing too, for no reason of its own."""


@dataclass(frozen=True)
class Expanded:
    """A gate that the network repeats for every pixel before it multiplies: a product does that by itself."""

    gate: Layer


@dataclass
class Site:
    """Where an operator stands in the network: what its lowering function needs besides the arguments."""

    node: fx.Node
    trace: Trace
    layers: list[Layer]

    @property
    def module(self) -> str:
        """Path of the module whose forward holds the operator, and the operator, unless the module is of torch.nn."""
        path, kind = modules_of(self.node, self.trace.names)[-1]
        path = path.split(".parametrizations.")[0]
        if path and (kind.startswith("torch.nn.") or self.operator == "lsq"):
            return path
        return f"{path}.{self.operator}" if path else self.operator

    @property
    def attention(self) -> str | None:
        """Path of the nn.MultiheadAttention that the operator is part of."""
        return next((x for x, kind in modules_of(self.node, self.trace.names) if kind == ATTENTION), None)

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
    def shape(self) -> tuple[int, ...]:
        value = self.node.meta["val"]
        shape = (value if isinstance(value, Tensor) else value[0]).shape
        if not self.has_batch(shape):
            got = ", ".join(str(size).replace(str(self.trace.batch), "N") for size in shape)
            self.fail("an operator that keeps the batch as dimension 0 and fixed sizes behind it", f"shape [{got}]")
        return tuple(shape[1:]) or (1,)  # one number an image is [N] in torch and [N, 1] in the file

    def has_batch(self, shape: Any) -> bool:
        """Whether the shape is [N, ...]: the batch, and fixed sizes behind it."""
        return len(shape) > 0 and str(shape[0]) == str(self.trace.batch) and all(isinstance(d, int) for d in shape[1:])

    def fail(self, expected: str, got: str) -> NoReturn:
        raise Obstacle(expected, got, self)

    def layer(self, kind: type[L], inputs: list[Layer], shape: tuple[int, ...] | None = None, **fields: Any) -> L:
        layer = kind(self.module, inputs, self.shape if shape is None else shape, self.node, **fields)
        self.layers.append(layer)
        return layer


def _lowered(trace: Trace) -> Network:
    values: dict[fx.Node, Any] = {}
    layers: list[Layer] = []
    obstacles: list[Obstacle] = []
    needed = {trace.output}
    for node in reversed(trace.module.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    for node in trace.module.graph.nodes:
        if node not in needed and node.op != "placeholder":
            continue
        if node in trace.constants:
            values[node] = _constant(node, trace)
        elif node.op == "placeholder":
            values[node] = Input("input", [], trace.shape, node)
            layers.append(values[node])
        elif node.op == "call_function" and isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.get)
            site = Site(node, trace, layers)
            try:
                values[node] = _lower_node(site, args, kwargs)
            except Obstacle as obstacle:
                obstacles.append(obstacle)
                values[node] = _missing(site, node.meta["val"], tree_leaves((args, kwargs)))
    if obstacles:
        raise _all_of(obstacles)
    output = values.get(trace.output)
    if not isinstance(output, Layer):
        raise ExportError("expected an output that depends on the input, got a constant - at the network's forward")
    return Network(trace, layers, output)


def _missing(site: Site, value: Any, inputs: list[Any]) -> Any:
    """What stands for the result `value` of an operator that failed."""
    if isinstance(value, (tuple, list)):
        return tuple(_missing(site, part, inputs) for part in value)
    if site.has_batch(value.shape) and any(isinstance(x, (Layer, Expanded, Unknown)) for x in inputs):
        return Missing("", [], tuple(value.shape[1:]) or (1,), site.node)
    return Unknown()


def _all_of(obstacles: list[Obstacle]) -> ExportError:
    """One error, one line, for all of them: each kind once, with its modules."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for obstacle in obstacles:
        kinds.setdefault((obstacle.expected, obstacle.got), []).append(obstacle.module)
    (expected, got), modules = next(iter(kinds.items()))
    if len(obstacles) == 1:
        return ExportError(str(obstacles[0]))
    if len(kinds) == 1:
        return ExportError(f"expected {expected}, got {got} - at {_places(modules)}")
    lines = [
        f"({i}) {got} at {_places(modules)}" + ("" if expected == OPERATOR else f" instead of {expected}")
        for i, ((expected, got), modules) in enumerate(kinds.items(), 1)
    ]
    return ExportError(f"expected {OPERATOR}, got {len(kinds)} things that it lacks: {'; '.join(lines)}")


def _places(modules: list[str]) -> str:
    names = [f"`{name}`" for name in dict.fromkeys(modules)]
    if len(names) == 1:
        return f"module {names[0]}" + (f" ({len(modules)} times)" if len(modules) > 1 else "")
    rest = len(modules) - len(names[:3])
    return f"modules {', '.join(names[:3])}" + (f" and {rest} more" if rest else "")


def _constant(node: fx.Node, trace: Trace) -> Any:
    if node.target is LSQ:
        arguments: Any = fx.map_arg(node.args[:5], lambda n: trace.constants[n])
        value, step, qmin, qmax, axis = arguments
        if axis > 0:
            Site(node, trace, []).fail("step sizes per output channel (axis 0) or per tensor", f"axis {axis}")
        return LearnedWeight(value, step, qmin, qmax)
    return trace.constants[node]


def _lower_node(site: Site, args: tuple, kwargs: dict) -> Any:
    inputs = tree_leaves((args, kwargs))
    if is_random(site.node):
        dropout = "dropout" in site.operator
        got = "dropout that stays on (pass training=self.training)" if dropout else f"random numbers of {site.operator}"
        site.fail("an operator that gives the same every time", got)
    if site.node in site.trace.stateful:
        site.fail("a forward that changes no buffer in eval mode", "a change that the output depends on")
    rule = LOWERING.get(getattr(site.target, "overloadpacket", site.target))
    if rule is not None and any(isinstance(x, Unknown) for x in inputs):
        return _missing(site, site.node.meta["val"], inputs)
    weight = isinstance(args[0], LearnedWeight) and rule in (_same, _reshape)  # the codes stay
    for i, value in enumerate(inputs):
        if isinstance(value, LearnedWeight) and not weight and not (i == 1 and rule in (_conv2d, _linear)):
            expected = "a learned quantizer right before its conv2d or linear (quantize_ after pruning and the like)"
            site.fail(expected, f"aten.{site.operator} of its result")
        if isinstance(value, Expanded) and rule is not _multiply:
            site.fail("an expanded tensor that goes straight into a product", f"aten.{site.operator} of it")
    if rule is None:
        site.fail(OPERATOR, _described(site))
    if not weight and not any(isinstance(x, (Layer, Expanded)) for x in inputs):
        site.fail(OPERATOR, f"aten.{site.operator} of what is neither an activation nor a constant")
    try:
        return rule(site, *args, **kwargs)
    except ExportError:
        raise
    except Exception:  # arguments that no rule foresaw, such as sizes that depend on the batch
        site.fail(OPERATOR, f"{_described(site)} with arguments that it lacks")


def _described(site: Site) -> str:
    """The operator in the words of the field, where its own name is none of them."""
    words = PATTERNS.get(site.operator, f"aten.{site.operator}")
    return words + (f" ({ADVICE[site.operator]})" if site.operator in ADVICE else "")


# ---- A function for each kind of operator -------------------------------------------------------------------------


def _same(site: Site, x: Layer | LearnedWeight, *_: Any, **__: Any) -> Layer | LearnedWeight:
    dtype = site.node.meta["val"].dtype
    if dtype != torch.float32:
        site.fail("float32 throughout", str(dtype))
    return x


def _getitem(site: Site, x: Any, index: int) -> Layer:
    """BatchNorm and pools with indices return tuples; only their first element is a value."""
    if isinstance(x, tuple):  # of layers that the engine lacks
        return x[index]
    if index:
        site.fail("only the first result of the operator to be read", f"result {index}")
    x.value = site.node
    return x


def _quantize(site: Site, x: Layer, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float) -> Layer:
    if step.numel() != 1:
        site.fail("one step size for a layer's input", f"{step.numel()}")
    if qmax - qmin > 255 or qmin > 0:
        site.fail("an activation quantizer of at most 8 bits that holds 0", f"codes {qmin}..{qmax}")
    scale = checked_step(step, f"input quantizer of module `{site.module}`")[0]
    return site.layer(Quantize, [x], grid=Grid(float(scale), -qmin, 0, qmax - qmin))


def _pairs(value: Any) -> list[int]:
    values = [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return values * 2 if len(values) == 1 else values


def _conv2d(
    site: Site,
    x: Layer,
    weight: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Layer:
    value = weight.value if isinstance(weight, LearnedWeight) else weight
    dilation = _pairs(dilation)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, value.shape[2:], strict=True)]
        padding = [total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2]
    else:
        padding = [0, 0] * 2 if padding == "valid" else _pairs(padding) * 2
    window = {"stride": _pairs(stride), "padding": padding, "dilation": dilation, "groups": groups}
    return site.layer(Conv2d, [x], window=window, **_weighted(site, weight, bias))


def _linear(site: Site, x: Layer, weight: Any, bias: Tensor | None = None) -> Layer:
    if len(x.shape) != 1:
        site.fail("linear on a tensor [N, F]", f"one on [N, {', '.join(map(str, x.shape))}]")
    return site.layer(Linear, [x], **_weighted(site, weight, bias))


def _weighted(site: Site, weight: Any, bias: Tensor | None) -> dict[str, Any]:
    """The fields that conv2d and linear share."""
    if not isinstance(weight, (LearnedWeight, Tensor)):
        site.fail("a weight that does not depend on the input", "one that does")
    channels = site.shape[0]
    shift = np.zeros(channels) if bias is None else _float64(bias)
    return {"weight": weight, "scale": np.ones(channels), "shift": shift}


def _float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float64)


def _batch_norm(
    site: Site,
    x: Layer,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool = False,
) -> Layer:
    if training or mean is None or variance is None:
        expected = "BatchNorm with running statistics (in eval mode, with track_running_stats)"
        site.fail(expected, "statistics of the batch")
    gamma = np.ones(x.shape[0]) if weight is None else _float64(weight)
    beta = np.zeros(x.shape[0]) if bias is None else _float64(bias)
    scale = gamma / np.sqrt(_float64(variance) + eps)
    return site.layer(Affine, [x], x.shape, scale=scale, shift=beta - _float64(mean) * scale)


def _batch_norm_functional(
    site: Site, x: Layer, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, eps: float
) -> Layer:
    return _batch_norm(site, x, weight, bias, mean, variance, False, momentum, eps)


def _affine(site: Site, x: Layer, scale: Any, shift: Any) -> Layer:
    def per_channel(constant: Any) -> np.ndarray:
        tensor = torch.as_tensor(constant)
        shape = (1,) * (len(x.shape) + 1 - tensor.dim()) + tuple(tensor.shape)
        if len(shape) != len(x.shape) + 1 or any(size != 1 for i, size in enumerate(shape) if i != 1):
            site.fail("a constant that is one number or one per channel", f"shape {list(tensor.shape)}")
        return np.broadcast_to(_float64(tensor).reshape(-1), x.shape[:1]).copy()

    return site.layer(Affine, [x], scale=per_channel(scale), shift=per_channel(shift))


def _add(site: Site, a: Any, b: Any, alpha: float = 1) -> Layer:
    if not isinstance(b, Layer):
        return _affine(site, a, 1.0, b * alpha)
    if not isinstance(a, Layer):
        return _affine(site, b, alpha, a)
    if _ancestor([a, b]) is not None:
        return _table(site, a, b, alpha=alpha)
    if a.shape != b.shape:
        site.fail("two tensors of one shape", f"{list(a.shape)} and {list(b.shape)}")
    return site.layer(Add, [a, b], factors=(1.0, float(alpha)))


def _subtract(site: Site, a: Any, b: Any, alpha: float = 1) -> Layer:
    return _add(site, a, b, alpha=-alpha)


def _subtract_reversed(site: Site, a: Any, b: Any, alpha: float = 1) -> Layer:
    return _affine(site, a, -alpha, b) if not isinstance(b, Layer) else _add(site, b, a, alpha=-alpha)


def _is_gate(gate: Layer, shape: tuple[int, ...]) -> bool:
    """One number a channel for a tensor of this shape."""
    return gate.shape == (shape[0], *[1] * (len(shape) - 1))


def _expand(site: Site, x: Layer, *_: Any, **__: Any) -> Layer | Expanded:
    if x.shape == site.shape:
        return x
    if not _is_gate(x, site.shape):
        site.fail("a gate of one number a channel to expand", f"{list(x.shape)} to {list(site.shape)}")
    return Expanded(x)


def _multiply(site: Site, a: Any, b: Any) -> Layer:
    a, b = (x.gate if isinstance(x, Expanded) else x for x in (a, b))
    if not isinstance(b, Layer):
        return _affine(site, a, b, 0.0)
    if not isinstance(a, Layer):
        return _affine(site, b, a, 0.0)
    if _ancestor([a, b]) is not None:
        return _table(site, a, b)
    x, gate = (a, b) if a.shape == site.shape else (b, a)
    if x.shape != site.shape or gate.shape != x.shape and not _is_gate(gate, x.shape):
        site.fail("two tensors of one shape or a gate of one number a channel", f"{list(a.shape)} and {list(b.shape)}")
    return site.layer(Mul, [x, gate])


def _divide(site: Site, a: Any, b: Any, **kwargs: Any) -> Layer:
    if kwargs or isinstance(b, Layer):
        return _table(site, a, b, **kwargs)
    return _affine(site, a, torch.as_tensor(b).double().reciprocal(), 0.0)


def _negate(site: Site, x: Layer) -> Layer:
    return _affine(site, x, -1.0, 0.0)


def _clamp(site: Site, x: Layer, low: Any = None, high: Any = None) -> Layer:
    bounds = [default if v is None else float(v) for v, default in ((low, -math.inf), (high, math.inf))]
    return site.layer(Clamp, [x], low=min(bounds), high=bounds[1])


def _clamp_max(site: Site, x: Layer, high: Any) -> Layer:
    return _clamp(site, x, None, high)


def _relu(site: Site, x: Layer) -> Layer:
    return _clamp(site, x, 0.0, None)


def _hardtanh(site: Site, x: Layer, low: float = -1.0, high: float = 1.0) -> Layer:
    return _clamp(site, x, low, high)


def _relu6(site: Site, x: Layer) -> Layer:
    return _clamp(site, x, 0.0, 6.0)


def _table(site: Site, *args: Any, **kwargs: Any) -> Layer:
    """An elementwise operator whose tensors are all functions of one tensor: a table of that tensor's codes."""
    target = site.target
    if target._overloadname == "dim":
        site.fail("an elementwise operator", f"aten.{site.operator} along a dimension")
    root = _ancestor([a for a in args if isinstance(a, Layer)])
    if root is None:
        site.fail(
            "an elementwise operator on functions of one tensor, a sum or a product",
            "two tensors (as in attention)",
        )
    functions = [_path(root, a) if isinstance(a, Layer) else _scalar(site, a) for a in args]
    return site.layer(
        Table, [root], function=lambda v: target(*(f(v) if callable(f) else f for f in functions), **kwargs)
    )


def _scalar(site: Site, constant: Any) -> Any:
    if isinstance(constant, Tensor):
        if constant.numel() != 1:
            site.fail("one number for the whole tensor", f"a constant of shape {list(constant.shape)}")
        return constant.reshape(()).double() if constant.is_floating_point() else constant.reshape(())
    return constant


def _ancestry(layer: Layer) -> list[Layer]:
    """The layer and the tensors that it is an elementwise function of, nearest first."""
    chain = [layer]
    while elementwise(chain[-1]) is not None:
        chain.append(chain[-1].inputs[0])
    return chain


def _ancestor(layers: list[Layer]) -> Layer | None:
    chains = [_ancestry(layer) for layer in layers]
    return next((layer for layer in chains[0] if all(layer in chain for chain in chains)), None)


def _path(root: Layer, layer: Layer) -> Function:
    """The function that leads from `root` to `layer`."""
    chain = _ancestry(layer)
    functions = [function for step in chain[: chain.index(root)] if (function := elementwise(step))]

    def composed(v: Tensor) -> Tensor:
        for function in reversed(functions):
            v = function(v)
        return v

    return composed


def _reshape(site: Site, x: Any, *_: Any, **__: Any) -> Any:
    return _reshaped_weight(site, x) if isinstance(x, LearnedWeight) else _reshaped(site, x)


def _reshaped_weight(site: Site, weight: LearnedWeight) -> LearnedWeight:
    shape = site.node.meta["val"].shape
    if weight.step.numel() > 1 and shape[0] != weight.shape[0]:
        site.fail("a reshape that keeps the output channels of a quantized weight", f"{list(shape)}")
    return replace(weight, value=weight.value.reshape(shape))


def _reshaped(site: Site, x: Layer) -> Layer:
    return x if site.shape == x.shape else site.layer(Reshape, [x])


def _permutation(site: Site, x: Layer, order: list[int]) -> str:
    """What people call it."""
    if len(order) == 5 and order == [0, 2, 1, 3, 4]:
        return "a channel shuffle"
    if order == [0, 2, 3, 1]:
        return "channels moved last (NHWC)"
    if order == [0, 3, 1, 2]:
        return "channels moved back from last (NHWC to NCHW)"
    if len(order) == 3 and order == [0, 2, 1]:
        return "a transpose of channels and positions (tokens, as in transformers)"
    return f"a permutation of [N, {', '.join(map(str, x.shape))}] to order {order}"


def _permute(site: Site, x: Layer, *dims: Any) -> Layer:
    """Only dimensions of size 1 may move: then the order of the elements stays."""
    order = list(range(len(x.shape) + 1))
    if len(dims) == 2:
        a, b = dims
        order[a], order[b] = order[b], order[a]
    else:
        order = [d % len(order) for d in dims[0]]
    moved = [d for d in order if d == 0 or x.shape[d - 1] != 1]
    if moved != sorted(moved):
        site.fail(OPERATOR, _permutation(site, x, order))
    return _reshaped(site, x)


def _concat(site: Site, tensors: list, dim: int = 0) -> Layer:
    if dim % (len(site.shape) + 1) != 1:
        site.fail("concatenation along dimension 1", f"dimension {dim}")
    if not all(isinstance(x, Layer) for x in tensors):
        site.fail("concatenation of activations", "a constant")
    return tensors[0] if len(tensors) == 1 else site.layer(Concat, list(tensors))


def _pad(site: Site, x: Layer, padding: list[int], mode: str = "constant", value: float | None = None) -> Layer:
    """`padding` begins with the last dimension, as in torch: left, right, top, bottom."""
    if mode != "constant" or value not in (None, 0):
        site.fail("padding by the constant 0", f"{mode} padding" if mode != "constant" else f"padding by {value}")
    left, right, top, bottom, *rest = [int(p) for p in padding] + [0] * (4 - len(padding))
    if any(rest) or min(left, right, top, bottom) < 0 or len(x.shape) != 3:
        site.fail("padding of height and width by 0 or more", f"{list(padding)} on {list(x.shape)}")
    return site.layer(Pad, [x], padding=[top, left, bottom, right])


def _pool_window(site: Site, x: Layer, kernel: Any, stride: Any, padding: Any, dilation: Any) -> dict[str, list[int]]:
    """Ceil mode is more padding at the bottom and the right: as much as the last window needs."""
    if len(x.shape) != 3:
        site.fail("a pool over a tensor [N, C, H, W]", f"one over [N, {', '.join(map(str, x.shape))}]")
    kernel, padding, dilation = _pairs(kernel), _pairs(padding), _pairs(dilation)
    stride = _pairs(stride) if stride else kernel
    after = []
    for i in (0, 1):
        reach = (site.shape[1 + i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
        after.append(max(0, reach - x.shape[1 + i] - padding[i]))
    return {"kernel": kernel, "stride": stride, "padding": padding + after, "dilation": dilation}


def _max_pool2d(
    site: Site, x: Layer, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> Layer:
    return site.layer(MaxPool2d, [x], window=_pool_window(site, x, kernel, stride, padding, dilation))


def _avg_pool2d(
    site: Site,
    x: Layer,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Layer:
    window = _pool_window(site, x, kernel, stride, padding, 1)
    del window["dilation"]
    # What torch divides each window by, asked of torch itself: the engine divides by a function of the number of real
    # elements.
    ones = torch.ones(1, *x.shape[1:], dtype=torch.float64)
    arguments = (window["kernel"], window["stride"], window["padding"][:2], ceil, count_include_pad)
    counts = functional.avg_pool2d(ones, *arguments, 1).reshape(-1)
    divisors = counts / functional.avg_pool2d(ones, *arguments, divisor).reshape(-1)
    by_count = np.ones(math.prod(window["kernel"]))
    for count, value in set(zip(counts.tolist(), divisors.tolist(), strict=True)):
        by_count[int(count) - 1] = value
    if not np.array_equal(by_count[counts.numpy().astype(int) - 1], divisors.numpy()):
        site.fail(
            "windows of as many elements to be divided by one number",
            "ceil_mode with count_include_pad; set one to False",
        )
    used = np.unique(divisors.numpy())
    return site.layer(AvgPool2d, [x], window=window, divisors=used if len(used) == 1 else by_count)


def _adaptive_kernel(site: Site, x: Layer, size: Any) -> list[int] | None:
    """The window of an adaptive pool to `size`, or None where it changes nothing."""
    target = [x.shape[1 + i] if s is None else int(s) for i, s in enumerate(_pairs(size))]
    if any(x.shape[1 + i] % s for i, s in enumerate(target)):
        site.fail("an adaptive pool to sizes that divide the input's", f"{list(x.shape[1:])} to {target}")
    kernel = [x.shape[1] // target[0], x.shape[2] // target[1]]
    return None if kernel == [1, 1] else kernel


def _adaptive_avg_pool2d(site: Site, x: Layer, size: Any) -> Layer:
    kernel = _adaptive_kernel(site, x, size)
    return x if kernel is None else _avg_pool2d(site, x, kernel)


def _adaptive_max_pool2d(site: Site, x: Layer, size: Any) -> Layer:
    kernel = _adaptive_kernel(site, x, size)
    return x if kernel is None else _max_pool2d(site, x, kernel)


def _reduce(site: Site, x: Layer, dims: Any, kind: type[MaxPool2d | AvgPool2d], divisor: float | None = None) -> Layer:
    """Maximum, or sum over `divisor` (None: mean), of height, width or both, or the length of [N, C, L]: one pool."""
    rank = len(x.shape) + 1
    reduced = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims]) if d is not None}
    if rank not in (3, 4) or not reduced or min(reduced) < 2:
        site.fail("a reduction over height, width or both", f"one over dimensions {sorted(reduced) or 'all'} of {rank}")
    image = x if rank == 4 else site.layer(Reshape, [x], (*x.shape, 1))
    kernel = [image.shape[i - 1] if i in reduced else 1 for i in (2, 3)]
    shape = (x.shape[0], *(size // k for size, k in zip(image.shape[1:], kernel, strict=True)))
    window = {"kernel": kernel, "stride": kernel, "padding": [0] * 4}
    pooled: Layer
    if kind is MaxPool2d:
        pooled = site.layer(MaxPool2d, [image], shape, window=window | {"dilation": [1, 1]})
    else:
        divisors = np.array([divisor or float(math.prod(kernel))])
        pooled = site.layer(AvgPool2d, [image], shape, window=window, divisors=divisors)
    return pooled if site.shape == pooled.shape else site.layer(Reshape, [pooled])


def _mean(site: Site, x: Layer, dims: Any = None, keepdim: bool = False, **_: Any) -> Layer:
    return _reduce(site, x, dims, AvgPool2d)


def _sum(site: Site, x: Layer, dims: Any = None, keepdim: bool = False, **_: Any) -> Layer:
    return _reduce(site, x, dims, AvgPool2d, divisor=1.0)


def _maximum_over(site: Site, x: Layer, dims: Any = (), keepdim: bool = False) -> Layer:
    return _reduce(site, x, dims, MaxPool2d)


def _slice(
    site: Site, x: Layer, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Layer:
    """Every step-th row or column from the first on is a max pool of 1x1 windows; a full slice is nothing."""
    if site.shape == x.shape:
        return x
    if dim == 1:
        site.fail(OPERATOR, "a channel split (part of the channels)")
    if start or dim < 2 or len(x.shape) != 3 or site.shape[dim - 1] != -(-x.shape[dim - 1] // step):
        site.fail("x[..., ::step] of height or width", f"a slice of dimension {dim}")
    stride = [step if dim == 2 else 1, step if dim == 3 else 1]
    window = {"kernel": [1, 1], "stride": stride, "padding": [0] * 4, "dilation": [1, 1]}
    return site.layer(MaxPool2d, [x], window=window)


RESHAPES = "view reshape flatten squeeze unsqueeze unflatten _unsafe_view"
IDENTITIES = """clone alias detach contiguous to _to_copy dropout feature_dropout alpha_dropout lift_fresh_copy
    _assert_tensor_metadata"""
FUNCTIONS = """sigmoid silu gelu hardswish hardsigmoid leaky_relu elu selu celu mish softplus tanh prelu rrelu
    threshold log_sigmoid exp expm1 log log1p sqrt rsqrt square pow reciprocal abs sign erf sin cos atan floor ceil
    round gt ge lt le where max min maximum minimum"""
LOWERING: dict[Any, Callable[..., Any]] = {
    LSQ.overloadpacket: _quantize,
    operator.getitem: _getitem,
    aten.conv2d: _conv2d,
    aten.linear: _linear,
    aten.batch_norm: _batch_norm,
    aten._native_batch_norm_legit_no_training: _batch_norm_functional,
    aten.add: _add,
    aten.sub: _subtract,
    aten.rsub: _subtract_reversed,
    aten.mul: _multiply,
    aten.div: _divide,
    aten.neg: _negate,
    aten.relu: _relu,
    aten.relu6: _relu6,
    aten.hardtanh: _hardtanh,
    aten.clamp: _clamp,
    aten.clip: _clamp,
    aten.clamp_min: _clamp,
    aten.clamp_max: _clamp_max,
    aten.cat: _concat,
    aten.pad: _pad,
    aten.constant_pad_nd: lambda site, x, padding, value=0: _pad(site, x, padding, "constant", value),
    aten.max_pool2d: _max_pool2d,
    aten.max_pool2d_with_indices: _max_pool2d,
    aten.avg_pool2d: _avg_pool2d,
    aten.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    aten.adaptive_max_pool2d: _adaptive_max_pool2d,
    aten.mean: _mean,
    aten.sum: _sum,
    aten.amax: _maximum_over,
    aten.slice: _slice,
    **{getattr(aten, name): _reshape for name in RESHAPES.split()},
    **{getattr(aten, name): _expand for name in ("expand", "expand_as")},
    **{getattr(aten, name): _permute for name in ("permute", "transpose")},
    **{getattr(aten, name): _same for name in IDENTITIES.split()},
    **{getattr(aten, name): _table for name in FUNCTIONS.split()},
}

# ---- Words for what the engine lacks ---------------------------------------------------------------------------------

ATTENTION = "torch.nn.modules.activation.MultiheadAttention"
PATTERNS = {
    "group_norm": "GroupNorm",
    "layer_norm": "LayerNorm",
    "instance_norm": "InstanceNorm",
    "linalg_vector_norm": "a norm of activations",
    "conv1d": "Conv1d",
    "conv3d": "Conv3d",
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "a transposed convolution"),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "narrow"), "a channel split (part of the channels)"),
    **dict.fromkeys(("select", "index", "index_select", "gather"), "a selection by index"),
    **dict.fromkeys(("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"), "attention"),
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "einsum"), "a matrix product outside a Linear"),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"), "a resize (interpolate)"),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), "a recurrent layer"),
    "embedding": "an embedding",
    "channel_shuffle": "a channel shuffle",
    "pixel_shuffle": "a pixel shuffle",
    "softmax": "softmax",
    "log_softmax": "log_softmax",
}
_LOGITS = "export the network that ends in logits; predict and ensembles apply softmax themselves"
_NORMALIZE = "only normalization with constants, as BatchNorm in eval mode, is integer arithmetic"
ADVICE = {
    **dict.fromkeys(("softmax", "log_softmax"), _LOGITS),
    **dict.fromkeys(("group_norm", "layer_norm", "instance_norm", "linalg_vector_norm"), _NORMALIZE),
}
