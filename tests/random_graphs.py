"""Hypothesis strategies for valid graphs. `DRAW` says how a node of each op is drawn.

Shapes and attributes are drawn by hypothesis, so failures shrink; arrays come from a generator with a drawn seed. Half
of the constants are `exact`: see builder.py.
"""

from __future__ import annotations

import math

import numpy as np
from builder import Builder, Quantization
from hypothesis import strategies as st

from qdeploy.graph import COMBINE, Graph
from qdeploy.ops import OPS

MAX_MACS = 3_000_000  # of one drawn node and image
CHANNELS = st.one_of(st.sampled_from([1, 2, 3, 4, 8, 16, 31, 32, 33, 63, 64, 65]), st.integers(1, 70))
SIZES = st.one_of(st.sampled_from([1, 2, 7, 8]), st.integers(1, 17))
ZERO_POINTS = st.one_of(st.sampled_from([0, 128, 255]), st.integers(0, 255))


def quantizations() -> st.SearchStrategy[Quantization]:
    scales = st.one_of(st.sampled_from([2.0**-5, 2.0**-7, 1.0]), st.floats(2.0**-12, 4.0, width=32))
    return st.tuples(scales, ZERO_POINTS)


def generators() -> st.SearchStrategy[np.random.Generator]:
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def input_shapes(draw: st.DrawFn) -> tuple[int, ...]:
    if draw(st.integers(0, 5)) == 5:
        return (draw(st.integers(1, 100)),)
    return (draw(CHANNELS), draw(SIZES), draw(SIZES))


@st.composite
def graphs(draw: st.DrawFn, max_nodes: int = 5) -> Graph:
    """Models of one member."""
    shape = draw(input_shapes())
    preprocess = draw(preprocesses(shape))
    builder = Builder(draw(generators()), shape, draw(quantizations()))
    x = _grow(draw, builder, draw(st.integers(0, max_nodes - 1)))
    _last_node(draw, builder, x)
    return Graph([builder.member(preprocess=preprocess)], preprocess=preprocess)


@st.composite
def winograd_graphs(draw: st.DrawFn) -> Graph:
    """Models of 3x3 convolutions with a stride of 1, dense or of two groups, and their residuals."""
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    channels = draw(CHANNELS) if groups == 1 else 64
    builder = Builder(draw(generators()), (channels, draw(SIZES), draw(SIZES)), draw(quantizations()))
    x, nodes = 0, draw(st.integers(1, 3))
    for i in range(nodes):
        size = builder.shape(x)[1:]
        padding = [draw(st.integers(0, 2)) for _ in range(4)]
        padding[2] = max(padding[2], 3 - size[0] - padding[0])
        padding[3] = max(padding[3], 3 - size[1] - padding[1])
        conv = {"kernel": (3, 3), "padding": tuple(padding), "groups": groups}
        conv["out_channels"] = draw(CHANNELS) if groups == 1 else draw(st.sampled_from([32, 64, 128]))
        conv |= _common(draw, "u8")
        if draw(st.booleans()):
            conv["residual"] = builder.conv2d(x, **conv)
        if i == nodes - 1 and draw(st.booleans()):
            conv |= {"dtype": "f32"}
        x = builder.conv2d(x, **conv)
        groups = groups if builder.shape(x)[0] == 64 else 1
    return Graph([builder.member()])


@st.composite
def ensembles(draw: st.DrawFn, max_nodes: int = 3) -> Graph:
    """Models of 2 to 4 members, each with its own network and input quantization."""
    shape = draw(input_shapes())
    preprocess = draw(preprocesses(shape))
    classes = draw(st.integers(1, 20))
    size = draw(st.sampled_from([0.01, 0.1, 1.0]))  # from flat to saturated probabilities
    members = []
    for i in range(draw(st.integers(2, 4))):
        builder = Builder(draw(generators()), shape, draw(quantizations()))
        x = _grow(draw, builder, draw(st.integers(0, max_nodes)))
        if len(builder.shape(x)) == 3:
            x = builder.reshape(x, (math.prod(builder.shape(x)),))
        if draw(st.booleans()):
            builder.linear(x, classes, **_common(draw, "f32"), size=size)
        else:
            builder.table(builder.linear(x, classes, **_common(draw, "u8")), "f32")
        members.append(builder.member(f"member {i}", preprocess))
    names = [f"class {k}" for k in range(classes)] if draw(st.booleans()) else None
    return Graph(members, draw(st.sampled_from(COMBINE)), preprocess, names)


@st.composite
def preprocesses(draw: st.DrawFn, shape: tuple[int, ...]) -> dict | None:
    if len(shape) == 1 or draw(st.booleans()):
        return None
    numbers = st.floats(0.125, 1.0, width=32)
    return {key: draw(st.lists(numbers, min_size=shape[0], max_size=shape[0])) for key in ("mean", "std")}


def _grow(draw: st.DrawFn, builder: Builder, nodes: int) -> int:
    """Adds about `nodes` nodes and returns the tensor to go on from; branches may stay unread."""
    for _ in range(nodes):
        last = len(builder.tensors) - 1
        x = draw(st.sampled_from([last, last, last, *range(last + 1)]))
        ops = _ops_for(builder.shape(x))
        weighted = [op for op in ops if OPS[op].has_weight]  # twice as often as the others
        DRAW[draw(st.sampled_from([*weighted, *ops]))](draw, builder, x)
    return len(builder.tensors) - 1


def _last_node(draw: st.DrawFn, builder: Builder, x: int) -> None:
    dtype = draw(st.sampled_from(["u8", "f32"]))
    ops = [op for op in _ops_for(builder.shape(x)) if OPS[op].may_be_f32]
    DRAW[draw(st.sampled_from(ops))](draw, builder, x, dtype)


def _ops_for(shape: tuple[int, ...]) -> list[str]:
    """Those that take an input of this shape."""
    other = {"linear"} if len(shape) == 3 else {"conv2d", "max_pool2d", "avg_pool2d"}
    return [op for op in DRAW if op not in other]


def _clamp(draw: st.DrawFn) -> tuple[int, int]:
    some = st.tuples(st.integers(0, 255), st.integers(0, 255)).map(lambda pair: tuple(sorted(pair)))
    return draw(st.one_of(st.just((0, 255)), some))


def _common(draw: st.DrawFn, dtype: str) -> dict:
    return {
        "bits": draw(st.integers(2, 8)),
        "codes": draw(st.sampled_from(["uniform", "uniform", "extreme", "lowest", "sparse", "sparse"])),
        "exact": draw(st.booleans()),
        "clamp": _clamp(draw),
        "dtype": dtype,
    }


def _conv2d(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8") -> int:
    channels, *size = builder.shape(x)
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    groups = draw(st.sampled_from([1, 1, 1, channels, channels, *divisors]))
    window = _window(draw, size, draw(st.sampled_from([1, 1, 3, 3, 7])), draw(st.integers(1, 3)))
    pixels = math.prod(-(-s // t) for s, t in zip(size, window["stride"], strict=True))
    macs = channels // groups * math.prod(window["kernel"]) * pixels
    most = max(1, min(70, MAX_MACS // macs) // groups)
    channel_choice = st.integers(1, most)
    if groups == 1:
        channel_choice = CHANNELS.map(lambda c: min(c, most))
    conv = {"out_channels": groups * draw(channel_choice), "groups": groups, **window, **_common(draw, dtype)}
    if draw(st.booleans()):
        conv["residual"] = builder.conv2d(x, **{**conv, "dtype": "u8", "bits": 8})
        last = builder.nodes[-1]
        candidates = [i for i, t in enumerate(builder.tensors) if t.shape == builder.shape(last.output)]
        conv["residual"] = draw(st.sampled_from(candidates))
    if dtype == "f32":
        conv["size"] = draw(st.sampled_from([1.0, 2.0**-140, 2.0**80]))
    return builder.conv2d(x, **conv)


def _linear(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8") -> int:
    features = draw(CHANNELS)
    candidates = [i for i, t in enumerate(builder.tensors) if t.shape == (features,)]
    residual = draw(st.sampled_from(candidates)) if candidates else None
    return builder.linear(x, features, residual=residual, **_common(draw, dtype))


def _add(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8") -> int:
    candidates = [i for i, t in enumerate(builder.tensors) if t.shape == builder.shape(x)]
    other = draw(st.sampled_from(candidates))
    return builder.add(x, other, dtype, _clamp(draw), draw(st.booleans()))


def _mul(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8") -> int:
    shape = builder.shape(x)
    gate = (shape[0], 1, 1) if len(shape) == 3 else shape
    others = [i for i, t in enumerate(builder.tensors) if t.shape in (shape, gate)]
    if shape != gate and draw(st.booleans()):
        others = [builder.avg_pool2d(x, shape[1:], (1, 1), (0, 0, 0, 0))]
    return builder.mul(x, draw(st.sampled_from(others)), dtype, _clamp(draw), draw(st.booleans()))


def _table(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8") -> int:
    return builder.table(x, dtype)


def _concat(draw: st.DrawFn, builder: Builder, x: int) -> int:
    other = draw(st.sampled_from([x, builder.table(x, quantization=builder.quantization(x))]))
    inputs = draw(st.sampled_from([[x, other], [other, x], [x, other, x]]))
    return builder.concat(inputs)


def _reshape(draw: st.DrawFn, builder: Builder, x: int) -> int:
    elements = math.prod(builder.shape(x))
    if len(builder.shape(x)) == 3 and draw(st.booleans()):
        return builder.reshape(x, (elements,))
    width = draw(st.sampled_from([d for d in range(1, 71) if elements % d == 0]))
    return builder.reshape(x, (elements // width, 1, width))


def _window(draw: st.DrawFn, size: list[int], largest: int, dilation: int) -> dict:
    """Kernel, stride, dilation and asymmetric padding for which the window fits the padded image."""
    kernel = (draw(st.integers(1, largest)), draw(st.integers(1, largest)))
    extent = [dilation * (k - 1) + 1 for k in kernel]
    top, left, bottom, right = (draw(st.integers(0, k // 2 * dilation)) for k in (*kernel, *kernel))
    bottom = max(bottom, extent[0] - size[0] - top)
    right = max(right, extent[1] - size[1] - left)
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    return {"kernel": kernel, "stride": stride, "padding": (top, left, bottom, right), "dilation": (dilation, dilation)}


def _max_pool2d(draw: st.DrawFn, builder: Builder, x: int) -> int:
    size = builder.shape(x)[1:]
    dilation = draw(st.integers(1, min(3, *size)))  # then no window can miss the image
    return builder.max_pool2d(x, **_window(draw, size, draw(st.sampled_from([2, 3, 7])), dilation))


def _avg_pool2d(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8") -> int:
    size = builder.shape(x)[1:]
    window = {"kernel": size, "stride": (1, 1), "padding": (0, 0, 0, 0)}
    if draw(st.booleans()):
        window = _window(draw, size, draw(st.sampled_from([2, 3, 7])), 1)
        del window["dilation"]
    return builder.avg_pool2d(x, **window, per_count=draw(st.booleans()), dtype=dtype, clamp=_clamp(draw))


# By op: draws its parameters and adds a node that reads the tensor x; takes a dtype where the output may be f32.
DRAW = {
    "conv2d": _conv2d,
    "linear": _linear,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "add": _add,
    "mul": _mul,
    "table": _table,
    "concat": _concat,
    "reshape": _reshape,
}
