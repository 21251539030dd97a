"""Hypothesis strategies for valid graphs. `DRAW` says how a node of each op is drawn.

Shapes and attributes are drawn by hypothesis, so failures shrink; arrays come from a generator with a drawn seed. Half
of the constants are `exact`: see builder.py. `version` is the newest format version whose ops, dtypes and shapes are
drawn: EVERYWHERE where a test asks for none.
"""

from __future__ import annotations

import math

import numpy as np
from builder import Builder, Quantization
from hypothesis import strategies as st
from versions import EVERYWHERE

from qdeploy.graph import COMBINE, SEVERAL_OUTPUTS, Graph
from qdeploy.ops import OPS
from qdeploy.ops.elementwise import TABLE_BY_CHANNEL
from qdeploy.ops.op import channels_of, known_dtypes, rows_of
from qdeploy.ops.weighted import INNER_CODES

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
def input_shapes(draw: st.DrawFn, version: int = EVERYWHERE) -> tuple[int, ...]:
    if draw(st.integers(0, 5)) == 5:
        return (draw(st.integers(1, 100)),)
    if version >= 3 and draw(st.booleans()):
        return (draw(st.integers(1, 50)), draw(CHANNELS))
    return (draw(CHANNELS), draw(SIZES), draw(SIZES))


@st.composite
def graphs(draw: st.DrawFn, max_nodes: int = 5, version: int = EVERYWHERE) -> Graph:
    """Models of one member."""
    shape = draw(input_shapes(version))
    preprocess = draw(preprocesses(shape))
    builder = Builder(draw(generators()), shape, draw(quantizations()))
    x = _grow(draw, builder, draw(st.integers(0, max_nodes - 1)), version)
    outputs = None
    if version >= SEVERAL_OUTPUTS and draw(st.booleans()):
        outputs = _several_outputs(draw, builder, version)
    else:
        _last_node(draw, builder, x, version, draw(st.sampled_from(["u8", "f32"])))
    return Graph([builder.member(preprocess=preprocess, outputs=outputs)], preprocess=preprocess)


@st.composite
def texts(draw: st.DrawFn) -> Graph:
    """Models of token ids: blocks as transformers have them, in any order, and rows or their mean as the output."""
    longest, vocabulary = draw(st.integers(1, 40)), draw(st.integers(1, 50))
    variable, heads = draw(st.booleans()), draw(st.integers(1, 4))
    width = heads * draw(st.integers(1, 20))
    net = Builder(draw(generators()), (longest,), None)
    x = net.embedding(vocabulary, width, draw(st.integers(2, 8)), draw(st.booleans()), draw(CODES))
    if draw(st.booleans()):
        x = net.position(x, draw(st.integers(0, 3)), draw(CODES), draw(st.booleans()))
    for _ in range(draw(st.integers(0, 3))):
        y = net.norm(x)
        if draw(st.booleans()):
            q, k, v = (net.linear(y, width) for _ in range(3))
            y = net.attention(q, k, v, heads, logit_bias=draw(st.booleans()), spread=draw(SPREADS), clamp=_clamp(draw))
        sums = {"residual": x, "inner": draw(st.booleans()), "dtype": draw(CODES)}
        x = net.linear(net.table(y), width, bits=draw(st.integers(2, 8)), **sums)
    last = draw(st.sampled_from(["rows", "mean", "first"]))
    if last == "mean":
        x = net.mean(x, clamp=_clamp(draw))
    elif last == "first":
        x = net.norm(net.gather(x, "rows", [0], (width,)))
    else:
        x = net.norm(x)
    net.linear(x, draw(st.integers(1, 10)), dtype="f32")
    return Graph([net.member()], vocabulary=vocabulary, variable=variable)


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
            conv["inner"] = draw(st.booleans())
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
        x = _grow(draw, builder, draw(st.integers(0, max_nodes)), EVERYWHERE)
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
    if len(shape) < 3 or draw(st.booleans()):
        return None
    numbers = st.floats(0.125, 1.0, width=32)
    return {key: draw(st.lists(numbers, min_size=shape[0], max_size=shape[0])) for key in ("mean", "std")}


def _grow(draw: st.DrawFn, builder: Builder, nodes: int, version: int) -> int:
    """Adds about `nodes` nodes and returns the tensor to go on from; branches may stay unread."""
    for _ in range(nodes):
        last = len(builder.tensors) - 1
        x = draw(st.sampled_from([last, last, last, *range(last + 1)]))
        ops = _ops_for(builder, x, version)
        weighted = [op for op in ops if OPS[op].has_weight]  # twice as often as the others
        op = draw(st.sampled_from([*weighted, *ops]))
        if op == "mul" and version >= 3 and len(builder.shape(x)) == 3 and draw(st.booleans()):
            builder.mul(x, builder.conv2d(x, 1), clamp=_clamp(draw))  # one gate for all channels
            continue
        if op == "table" and version >= TABLE_BY_CHANNEL and draw(st.booleans()):
            builder.table(x, by_channel=True)
            continue
        dtypes = [dtype for dtype in known_dtypes(OPS[op].writes, version) if dtype != "f32"]
        dtype = [draw(st.sampled_from(dtypes))] if len(dtypes) > 1 and OPS[op].requantized else []
        DRAW[op](draw, builder, x, *dtype, **_inner(draw, op, version))
    return len(builder.tensors) - 1


def _last_node(draw: st.DrawFn, builder: Builder, x: int, version: int, dtype: str) -> int:
    ops = [op for op in _ops_for(builder, x, version) if OPS[op].may_be_f32]
    op = draw(st.sampled_from(ops))
    return DRAW[op](draw, builder, x, dtype, **_inner(draw, op, version))


def _inner(draw: st.DrawFn, op: str, version: int) -> dict[str, bool]:
    """Whether inner codes are added to a residual, if there is one."""
    return {"inner": draw(st.booleans())} if OPS[op].residual and version >= INNER_CODES else {}


def _several_outputs(draw: st.DrawFn, builder: Builder, version: int) -> list[int]:
    """Two or three, in any order; behind each there may be nodes that nobody reads."""
    outputs = []
    for _ in range(draw(st.integers(2, 3))):
        codes = [i for i, tensor in enumerate(builder.tensors) if tensor.dtype != "f32"]
        outputs.append(_last_node(draw, builder, draw(st.sampled_from(codes)), version, "f32"))
        if draw(st.booleans()):
            builder.reshape(0, builder.shape(0))
    return draw(st.permutations(outputs))


def _ops_for(builder: Builder, x: int, version: int) -> list[str]:
    """Those that take an input of this shape and dtype."""
    tensor = builder.tensors[x]
    other = {1: IMAGES | TOKENS, 2: IMAGES, 3: TOKENS | {"linear"}}[len(tensor.shape)]
    ops = [op for op in DRAW if op not in other and OPS[op].version <= version]
    return [op for op in ops if tensor.dtype in OPS[op].reads]


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


def _conv2d(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8", inner: bool = False) -> int:
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
        candidates = _alike(builder, builder.shape(last.output))
        conv["residual"] = draw(st.sampled_from(candidates))
        conv["inner"] = inner
    if dtype == "f32":
        conv["size"] = draw(st.sampled_from([1.0, 2.0**-140, 2.0**80]))
    return builder.conv2d(x, **conv)


def _linear(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8", inner: bool = False) -> int:
    features = draw(CHANNELS)
    candidates = _alike(builder, (*builder.shape(x)[:-1], features))
    residual = draw(st.sampled_from(candidates)) if candidates else None
    added = {} if residual is None else {"residual": residual, "inner": inner}
    return builder.linear(x, features, **added, **_common(draw, dtype))


def _add(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8") -> int:
    other = draw(st.sampled_from(_alike(builder, builder.shape(x))))
    return builder.add(x, other, dtype, _clamp(draw), draw(st.booleans()))


def _mul(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8") -> int:
    shape = builder.shape(x)
    gates = {3: [(shape[0], 1, 1)], 2: [(1, shape[-1])]}.get(len(shape), [])
    others = [i for i, t in enumerate(builder.tensors) if t.shape in (shape, *gates) and t.dtype == "u8"]
    if len(shape) == 3 and shape not in gates and draw(st.booleans()):
        others = [builder.avg_pool2d(x, shape[1:], (1, 1), (0, 0, 0, 0))]
    if len(shape) == 2 and draw(st.booleans()):
        others = [builder.gather(x, "rows", [draw(st.integers(-1, shape[0] - 1))])]
    return builder.mul(x, draw(st.sampled_from(others)), dtype, _clamp(draw), draw(st.booleans()))


def _table(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8") -> int:
    return builder.table(x, dtype)


def _alike(builder: Builder, shape: tuple[int, ...]) -> list[int]:
    """Codes of this shape."""
    return [i for i, tensor in enumerate(builder.tensors) if tensor.shape == shape and tensor.dtype != "f32"]


def _concat(draw: st.DrawFn, builder: Builder, x: int) -> int:
    other = x
    if builder.tensors[x].dtype == "u8":
        other = draw(st.sampled_from([x, builder.table(x, quantization=builder.quantization(x))]))
    inputs = draw(st.sampled_from([[x, other], [other, x], [x, other, x]]))
    return builder.concat(inputs, draw(AXES) if len(builder.shape(x)) == 2 else None)


def _reshape(draw: st.DrawFn, builder: Builder, x: int) -> int:
    elements = math.prod(builder.shape(x))
    if len(builder.shape(x)) > 1 and draw(st.booleans()):
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


def _rescale(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8") -> int:
    return builder.rescale(x, dtype, _clamp(draw), draw(st.booleans()))


def _resize(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8") -> int:
    taps = tuple(draw(st.integers(1, min(5, size))) for size in builder.shape(x)[1:])
    return builder.resize(x, (draw(SIZES), draw(SIZES)), taps, dtype, _clamp(draw))


def _gather(draw: st.DrawFn, builder: Builder, x: int) -> int:
    shape = builder.shape(x)
    axis, size = draw(AXES), None
    count = rows_of(shape) if axis == "rows" else channels_of(shape)
    index = builder.rng.integers(-1, count, draw(st.integers(1, 60)))
    if axis == "rows" and draw(st.booleans()):
        size = (channels_of(shape),) if index.size == 1 else (channels_of(shape), 1, index.size)
    return builder.gather(x, axis, index, size)


def _tokens(draw: st.DrawFn, builder: Builder, x: int) -> int:
    return builder.tokens(x)


def _image(draw: st.DrawFn, builder: Builder, x: int) -> int:
    rows = builder.shape(x)[0]
    return builder.image(x, draw(st.sampled_from([h for h in range(1, rows + 1) if rows % h == 0])))


def _position(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8") -> int:
    return builder.position(x, draw(st.integers(0, 3)), dtype, draw(st.booleans()))


def _mean(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8") -> int:
    return builder.mean(x, dtype, _clamp(draw))


def _norm(draw: st.DrawFn, builder: Builder, x: int, dtype: str = "u8") -> int:
    channels = channels_of(builder.shape(x))
    groups = draw(st.sampled_from([None, *[g for g in range(1, channels + 1) if channels % g == 0]]))
    epsilon = draw(st.sampled_from([1e-5, 1e-12, 0.5]))
    return builder.norm(x, groups, dtype, _clamp(draw), epsilon)


def _attention(draw: st.DrawFn, builder: Builder, x: int) -> int:
    """The keys are x, the queries and values other tensors of its shape where there are any."""
    rows, channels = builder.shape(x)
    others = [i for i in _alike(builder, (rows, channels)) if builder.tensors[i].dtype == "u8"]
    q, v = draw(st.sampled_from(others)), draw(st.sampled_from(others))
    return builder.attention(
        q,
        x,
        v,
        heads=draw(st.sampled_from([h for h in range(1, channels + 1) if channels % h == 0])),
        block=draw(st.sampled_from([None, *[b for b in range(1, rows + 1) if rows % b == 0]])),
        logit_bias=draw(st.booleans()),
        regions=draw(st.sampled_from([None, 1, 3])),
        clamp=_clamp(draw),
        spread=draw(SPREADS),
    )


AXES = st.sampled_from(["rows", "channels"])
CODES = st.sampled_from(["u8", "s16"])
SPREADS = st.sampled_from([0.0, 0.1, 4.0, 100.0])  # of logits: from equal weights to a single one
IMAGES = {"conv2d", "max_pool2d", "avg_pool2d", "resize", "tokens"}
TOKENS = {"position", "mean", "attention", "image"}
ONLY_TEXTS = {"embedding"}  # which `texts` draws

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
    "rescale": _rescale,
    "resize": _resize,
    "gather": _gather,
    "tokens": _tokens,
    "image": _image,
    "position": _position,
    "mean": _mean,
    "norm": _norm,
    "attention": _attention,
}
