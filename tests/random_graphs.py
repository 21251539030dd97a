"""Random valid graphs: a builder that fills in random constants, and hypothesis strategies that drive it.

Shapes and attributes are drawn by hypothesis, so failures shrink; arrays come from a generator with a drawn seed.
Constants are scaled so that outputs use the whole u8 range; half of them are powers of two and multiples of 0.5, so
that results often lie exactly between two integers.
"""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from qdeploy import reference
from qdeploy.graph import Graph, Member, Node, Tensor
from qdeploy.ops import OPS

Quantization = tuple[float, int]  # scale and zero point
MAX_MACS = 3_000_000  # of one drawn node and image
CHANNELS = st.one_of(st.sampled_from([1, 2, 3, 4, 8, 16, 31, 32, 33, 63, 64, 65]), st.integers(1, 70))
SIZES = st.one_of(st.sampled_from([1, 2, 7, 8]), st.integers(1, 17))
ZERO_POINTS = st.one_of(st.sampled_from([0, 128, 255]), st.integers(0, 255))


class Builder:
    """Builds one member, node by node; every method returns the id of the tensor that it adds."""

    def __init__(self, rng: np.random.Generator, input_shape: tuple[int, ...], quantization: Quantization) -> None:
        self.rng = rng
        self.tensors = [Tensor("input", input_shape, "u8", *quantization)]
        self.nodes: list[Node] = []

    def member(self, name: str = "net", preprocess: dict | None = None) -> Member:
        table = preprocess and reference.preprocess_table(preprocess, self.tensors[0])
        return Member(name, self.tensors, self.nodes, table)

    def shape(self, tensor: int) -> tuple[int, ...]:
        return self.tensors[tensor].shape

    def quantization(self, tensor: int) -> Quantization:
        return self.tensors[tensor].scale, self.tensors[tensor].zero_point

    def conv2d(
        self,
        x: int,
        out_channels: int,
        kernel: tuple[int, int] = (1, 1),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        **common: object,
    ) -> int:
        attributes = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return self._weighted("conv2d", x, (out_channels, self.shape(x)[0] // groups, *kernel), attributes, **common)

    def linear(self, x: int, features: int, **common: object) -> int:
        return self._weighted("linear", x, (features, self.shape(x)[0]), {}, **common)

    def add(self, a: int, b: int, dtype: str = "u8", clamp: tuple[int, int] = (0, 255), exact: bool = False) -> int:
        ma, mb = self._factor(75.0, 2, exact)
        return self._node("add", [a, b], {"multipliers": (ma, mb), "bias": self._offset(1, exact)[0]}, {}, dtype, clamp)

    def max_pool2d(self, x: int, kernel, stride, padding, dilation=(1, 1)) -> int:
        attributes = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        return self._node("max_pool2d", [x], attributes, {}, quantization=self.quantization(x))

    def avg_pool2d(
        self, x: int, kernel, stride, padding, per_count=True, dtype="u8", clamp=(0, 255), exact=False, flat=False
    ) -> int:
        counts = np.arange(1, math.prod(kernel) + 1) if per_count else np.array([math.prod(kernel)])
        multiplier = self._factor(40.0 * counts, counts.size, exact)
        attributes = {"kernel": kernel, "stride": stride, "padding": padding, "bias": self._offset(1, exact)[0]}
        return self._node("avg_pool2d", [x], attributes, {"multiplier": multiplier}, dtype, clamp, flat=flat)

    def table(self, x: int, dtype: str = "u8", quantization: Quantization | None = None) -> int:
        values = self.rng.integers(0, 256, 256).astype(np.uint8)
        if dtype == "f32":
            values = (self.rng.standard_normal(256) * 10).astype(np.float32)
        return self._node("table", [x], {}, {"table": values}, dtype, quantization=quantization)

    def concat(self, inputs: list[int]) -> int:
        return self._node("concat", inputs, {}, {}, quantization=self.quantization(inputs[0]))

    def reshape(self, x: int, shape: tuple[int, ...]) -> int:
        return self._node("reshape", [x], {}, {}, quantization=self.quantization(x), shape=shape)

    def _weighted(
        self,
        op: str,
        x: int,
        shape: tuple[int, ...],
        attributes: dict,
        *,
        bits: int = 8,
        residual: int | None = None,
        dtype: str = "u8",
        clamp: tuple[int, int] = (0, 255),
        exact: bool = False,
        codes: str = "uniform",
        size: float = 1.0,
        quantization: Quantization | None = None,
        flat: bool = False,
    ) -> int:
        """`size` multiplies the constants of an f32 output; `flat` declares its shape [C, 1, 1] as [C]."""
        weight = self._codes(shape, bits, codes)
        typical = 75.0 * np.sqrt((weight.reshape(shape[0], -1).astype(np.float64) ** 2).sum(axis=1)) + 1
        factor = np.float32(size if dtype == "f32" else 1)
        constants = {
            "weight": weight,
            "multiplier": self._factor(typical, shape[0], exact) * factor,
            "bias": self._offset(shape[0], exact) * factor,
        }
        if residual is not None:
            attributes["residual_multiplier"] = float(self._factor(75.0, 1, exact)[0] * factor)
        inputs = [x] if residual is None else [x, residual]
        return self._node(op, inputs, attributes, constants, dtype, clamp, quantization, bits=bits, flat=flat)

    def _node(
        self,
        op: str,
        inputs: list[int],
        attributes: dict,
        constants: dict[str, np.ndarray],
        dtype: str = "u8",
        clamp: tuple[int, int] | None = None,
        quantization: Quantization | None = None,
        shape: tuple[int, ...] | None = None,
        bits: int | None = None,
        flat: bool = False,
    ) -> int:
        if clamp and dtype == "u8":
            attributes["clamp"] = clamp
        node = Node(op, f"{op}.{len(self.nodes)}", inputs, len(self.tensors), attributes, constants, bits)
        shape = shape or OPS[op].shape(node, [self.shape(i) for i in inputs])
        shape = shape[:1] if flat else shape
        scale, zero_point = quantization or (float(np.float32(self.rng.uniform(0.001, 0.1))), self._zero_point())
        tensor = Tensor(f"t{len(self.tensors)}", shape, dtype, scale, zero_point)
        self.tensors.append(tensor if dtype == "u8" else Tensor(tensor.name, shape, "f32"))
        self.nodes.append(node)
        return node.output

    def _zero_point(self) -> int:
        return int(self.rng.choice([0, 255, 128, self.rng.integers(256)]))

    def _codes(self, shape: tuple[int, ...], bits: int, kind: str) -> np.ndarray:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        if kind == "extreme":
            return self.rng.choice(np.array([low, high], np.int8), shape)
        if kind == "lowest":
            return np.full(shape, low, np.int8)
        if kind == "sparse":  # as trained codes: a few large ones among small ones
            return np.where(self.rng.random(shape) < 0.1, self._codes(shape, bits, "extreme"), 0).astype(np.int8)
        return self.rng.integers(low, high + 1, shape).astype(np.int8)

    def _factor(self, typical: float | np.ndarray, count: int, exact: bool) -> np.ndarray:
        """Multipliers that take numbers of a typical size to about 100; signs vary."""
        factor = self.rng.choice([-1.0, 1.0, 1.0], count) * self.rng.uniform(40, 300, count) / typical
        if exact:
            factor = np.sign(factor) * 2.0 ** np.round(np.log2(np.abs(factor)))
        return factor.astype(np.float32)

    def _offset(self, count: int, exact: bool) -> np.ndarray:
        offset = self.rng.uniform(-40, 300, count)
        return (np.round(offset * 2) / 2 if exact else offset).astype(np.float32)


def batch(graph: Graph, n: int, rng: np.random.Generator, dtype: type = np.float32) -> np.ndarray:
    """Inputs around and beyond the range of the first member's codes, half of them exactly between two codes."""
    shape = graph.input_shape
    if dtype == np.uint8:
        return rng.integers(0, 256, (n, *shape[1:], shape[0])).astype(np.uint8)
    tensor = graph.members[0].tensors[0]
    codes = rng.integers(-40, 600, (n, *shape)) / 2
    codes = np.where(rng.random(codes.shape) < 0.5, codes, rng.uniform(-20, 275, codes.shape))
    x = (codes - tensor.zero_point) * tensor.scale
    return np.where(rng.random(x.shape) < 0.01, np.copysign(3e38, x), x).astype(np.float32)


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
    return Graph(members, draw(st.sampled_from(["logits", "probs"])), preprocess, names)


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
        rank = len(builder.shape(x))
        steps = [_conv2d, _conv2d, _max_pool2d, _avg_pool2d] if rank == 3 else [_linear]
        draw(st.sampled_from([*steps, _add, _table, _concat, _reshape]))(draw, builder, x)
    return len(builder.tensors) - 1


def _last_node(draw: st.DrawFn, builder: Builder, x: int) -> None:
    dtype = draw(st.sampled_from(["u8", "f32"]))
    rank = len(builder.shape(x))
    steps = [_conv2d, _avg_pool2d] if rank == 3 else [_linear]
    draw(st.sampled_from([*steps, _add, _table]))(draw, builder, x, dtype)


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
