"""Graphs for tests, node by node: the test gives the structure, the builder random constants.

Constants are scaled so that outputs use the whole u8 range; `exact` ones are powers of two and multiples of 0.5, so
that results often lie exactly between two integers.
"""

from __future__ import annotations

import math

import numpy as np

from qdeploy import reference
from qdeploy.graph import Activation, Graph, Member, Node, Output
from qdeploy.ops import OPS
from qdeploy.ops.op import channels_of

Quantization = tuple[float, int]  # scale and zero point


class Builder:
    """Builds one member, node by node; every method returns the id of the tensor that it adds."""

    def __init__(
        self, rng: np.random.Generator, input_shape: tuple[int, ...], quantization: Quantization | None
    ) -> None:
        """Without a quantization the input is token ids."""
        self.rng = rng
        codes = quantization and Activation("input", input_shape, "u8", *quantization)
        self.tensors = [codes or Activation("input", input_shape, "i32")]
        self.nodes: list[Node] = []

    def member(self, name: str = "net", preprocess: dict | None = None, outputs: list[int] | None = None) -> Member:
        table = preprocess and reference.preprocess_table(preprocess, self.tensors[0])
        return Member(name, self.tensors, self.nodes, table, outputs)

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
        return self._weighted("linear", x, (features, self.shape(x)[-1]), {}, **common)

    def add(self, a: int, b: int, dtype: str = "u8", clamp: tuple[int, int] = (0, 255), exact: bool = False) -> int:
        ma, mb = self._factor(np.array([self._typical(i, dtype) for i in (a, b)]), 2, exact)
        attributes = {"multipliers": (ma, mb), "bias": self._offset(1, exact)[0]}
        return self._node("add", [a, b], attributes, {}, dtype, clamp)

    def mul(self, a: int, b: int, dtype: str = "u8", clamp: tuple[int, int] = (0, 255), exact: bool = False) -> int:
        typical = math.prod(max(75, abs(128 - self.tensors[i].zero_point)) for i in (a, b))
        attributes = {"multiplier": self._factor(typical, 1, exact)[0], "bias": self._offset(1, exact)[0]}
        return self._node("mul", [a, b], attributes, {}, dtype, clamp)

    def rescale(self, x: int, dtype: str = "u8", clamp: tuple[int, int] = (0, 255), exact: bool = False) -> int:
        return self._node("rescale", [x], self._affine(self._typical(x, dtype), exact), {}, dtype, clamp)

    def resize(
        self, x: int, size: tuple[int, int], taps: tuple[int, int], dtype: str = "u8", clamp: tuple[int, int] = (0, 255)
    ) -> int:
        """Windows anywhere, random weights of both signs, whose sums are about 100 for an axis."""
        constants = {}
        for axis, outputs, inputs, k in zip(("row", "column"), size, self.shape(x)[1:], taps, strict=True):
            constants[f"{axis}_start"] = self.rng.integers(0, inputs - k + 1, outputs).astype(np.int32)
            constants[f"{axis}_weight"] = self.rng.integers(-20, 200 // k + 1, (outputs, k)).astype(np.int32)
        return self._node("resize", [x], self._affine(75.0 * 100 * 100, False), constants, dtype, clamp)

    def max_pool2d(self, x: int, kernel, stride, padding, dilation=(1, 1)) -> int:
        attributes = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        return self._node("max_pool2d", [x], attributes, {}, quantization=self.quantization(x))

    def avg_pool2d(
        self, x: int, kernel, stride, padding, per_count=True, dtype="u8", clamp=(0, 255), exact=False, flat=False
    ) -> int:
        counts = np.arange(1, math.prod(kernel) + 1) if per_count else np.array([math.prod(kernel)])
        multiplier = self._factor(self._typical(x, dtype) / 2 * counts, counts.size, exact)
        attributes = {"kernel": kernel, "stride": stride, "padding": padding, "bias": self._offset(1, exact)[0]}
        return self._node("avg_pool2d", [x], attributes, {"multiplier": multiplier}, dtype, clamp, flat=flat)

    def table(
        self, x: int, dtype: str = "u8", quantization: Quantization | None = None, by_channel: bool = False
    ) -> int:
        size = (channels_of(self.shape(x)), 256) if by_channel else 256
        values = self.rng.integers(0, 256, size).astype(np.uint8)
        if dtype == "f32":
            values = (self.rng.standard_normal(size) * 10).astype(np.float32)
        return self._node("table", [x], {}, {"table": values}, dtype, quantization=quantization)

    def concat(self, inputs: list[int], axis: str | None = None) -> int:
        """`axis` is for tokens, and only for them."""
        return self._move("concat", inputs, {"axis": axis} if axis else {}, {})

    def reshape(self, x: int, shape: tuple[int, ...]) -> int:
        return self._move("reshape", [x], {}, {}, shape)

    def gather(self, x: int, axis: str, index: object, shape: tuple[int, ...] | None = None) -> int:
        """`shape` of rows that are no tokens."""
        constants = {"index": np.asarray(index, np.int32)}
        if axis == "rows" and shape is None:
            shape = (constants["index"].size, channels_of(self.shape(x)))
        return self._move("gather", [x], {"axis": axis}, constants, shape)

    def tokens(self, x: int) -> int:
        return self._move("tokens", [x], {}, {})

    def image(self, x: int, height: int) -> int:
        rows, channels = self.shape(x)
        return self._move("image", [x], {}, {}, (channels, height, rows // height))

    def position(self, x: int, prefix: int = 0, dtype: str = "s16", exact: bool = False) -> int:
        rows, channels = self.shape(x)
        table = self._factor(1 / self._gain(dtype), (prefix + rows) * channels, exact).reshape(-1, channels) / 2
        attributes = {"multiplier": self._factor(self._typical(x, dtype), 1, exact)[0], "prefix": prefix}
        return self._node("position", [x], attributes, {"rows": table}, dtype, (0, 255))

    def embedding(self, vocabulary: int, channels: int, bits: int = 8, per_row: bool = True, dtype: str = "s16") -> int:
        typical = 2 ** (bits - 2) / self._gain(dtype)
        constants = {
            "weight": self._codes((vocabulary, channels), bits, "uniform"),
            "multiplier": self._factor(typical, vocabulary if per_row else 1, False),
            "rows": self._factor(1 / self._gain(dtype), self.shape(0)[0] * channels, False).reshape(-1, channels) / 2,
        }
        return self._node("embedding", [0], {}, constants, dtype, (0, 255), bits=bits)

    def mean(self, x: int, dtype: str = "u8", clamp: tuple[int, int] = (0, 255)) -> int:
        counts = np.arange(1, self.shape(x)[0] + 1)
        multiplier = self._factor(self._typical(x, dtype) / 4 * counts, counts.size, False)
        return self._node("mean", [x], {"bias": self._offset(1, False)[0]}, {"multiplier": multiplier}, dtype, clamp)

    def norm(
        self, x: int, groups: int | None = None, dtype: str = "u8", clamp: tuple[int, int] = (0, 255), epsilon=1e-5
    ) -> int:
        """`epsilon` as in the real network, whose scale is that of the input."""
        shape = self.shape(x)
        channels = channels_of(shape)
        count = channels if groups is None else math.prod(shape) // groups
        exact_epsilon = max(2.0**-60, count**2 * epsilon / self.tensors[x].scale ** 2)
        attributes = {"groups": groups, "epsilon": float(np.float32(exact_epsilon))}
        multiplier = self._factor(2 / self._gain(dtype), channels, False)
        constants = {"multiplier": multiplier, "bias": self._offset(channels, False)}
        return self._node("norm", [x], attributes, constants, dtype, clamp)

    def attention(
        self,
        q: int,
        k: int,
        v: int,
        heads: int,
        block: int | None = None,
        logit_bias: bool = False,
        regions: int | None = None,
        clamp: tuple[int, int] = (0, 255),
        spread: float = 4.0,
    ) -> int:
        """`regions` is their number, `spread` about the standard deviation of the logits."""
        queries, keys = block or self.shape(q)[0], block or self.shape(k)[0]
        typical = 75.0 * 75.0 * math.sqrt(self.shape(q)[1] // heads)
        attributes = {
            "heads": heads,
            "block": block,
            "peak": min(32767, (2**31 - 1) // (255 * keys)),
            "logit_multiplier": float(np.float32(self.rng.choice([-1, 1]) * spread / typical)),
            "multiplier": self._factor(75.0, 1, False)[0],
            "bias": self._offset(1, False)[0],
        }
        constants = {}
        if logit_bias:
            constants["logit_bias"] = (self.rng.standard_normal((heads, queries, keys)) * spread).astype(np.float32)
        if regions:
            constants["regions"] = self.rng.integers(0, regions, self.shape(k)[0]).astype(np.int32)
        return self._node("attention", [q, k, v], attributes, constants, "u8", clamp)

    def _typical(self, x: int, dtype: str) -> float:
        """Size of a code of x for a result of about 100, which is 100 times as much where the output is s16."""
        return (75.0 if self.tensors[x].dtype == "u8" else 10_000.0) / self._gain(dtype)

    def _gain(self, dtype: str) -> float:
        return 100.0 if dtype == "s16" else 1.0

    def _affine(self, typical: float, exact: bool) -> dict:
        return {"multiplier": self._factor(typical, 1, exact)[0], "bias": self._offset(1, exact)[0]}

    def _move(
        self,
        op: str,
        inputs: list[int],
        attributes: dict,
        constants: dict[str, np.ndarray],
        shape: tuple[int, ...] | None = None,
    ) -> int:
        first = self.tensors[inputs[0]]
        return self._node(op, inputs, attributes, constants, first.dtype, None, (first.scale, first.zero_point), shape)

    def _weighted(
        self,
        op: str,
        x: int,
        shape: tuple[int, ...],
        attributes: dict,
        *,
        bits: int = 8,
        residual: int | None = None,
        inner: bool = False,
        dtype: str = "u8",
        clamp: tuple[int, int] = (0, 255),
        exact: bool = False,
        codes: str = "uniform",
        size: float = 1.0,
        quantization: Quantization | None = None,
        flat: bool = False,
    ) -> int:
        """`size` multiplies the constants of an f32 output; `flat` declares its shape [C, 1, 1] as [C].

        inner: the residual is added to inner codes.
        """
        weight = self._codes(shape, bits, codes)
        typical = 75.0 * np.sqrt((weight.reshape(shape[0], -1).astype(np.float64) ** 2).sum(axis=1)) + 1
        factor = np.float32(size if dtype == "f32" else self._gain(dtype))
        constants = {
            "weight": weight,
            "multiplier": self._factor(typical, shape[0], exact) * (1 if inner else factor),
            "bias": self._offset(shape[0], exact) * (1 if inner else factor),
        }
        if residual is not None:
            typical = self._typical(residual, "u8")
            attributes["residual_multiplier"] = float(self._factor(typical, 1, exact)[0] * factor)
        if inner:
            bounds = [0, 255] if self.rng.random() < 0.5 else self.rng.choice(256, 2).tolist()
            attributes["inner_clamp"] = sorted(bounds)
            attributes["inner_multiplier"] = float(self._factor(150.0, 1, exact)[0] * factor)
            attributes["inner_bias"] = float((self._offset(1, exact)[0] - np.float32(150)) * factor)
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
        grid = {"u8": (scale, zero_point), "s16": (scale, 0)}.get(dtype, (1.0, 0))
        self.tensors.append(Activation(f"t{len(self.tensors)}", shape, dtype, *grid))
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


def text_batch(graph: Graph, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids and the mask; of texts of one length there is none. Beyond the end of a text stands no token at all."""
    longest = graph.input_shape[0]
    ids = rng.integers(0, graph.vocabulary, (n, longest)).astype(np.int64)
    if not graph.variable:
        return ids, None
    mask = (np.arange(longest) < rng.integers(1, longest + 1, n)[:, None]).astype(np.int64)
    return np.where(mask, ids, -100), mask


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


# ---- Networks with every op ------------------------------------------------------------------------------------------


def every_op(name: str, seed: int) -> Member:
    """A small network with every op and every number of bits; groups, depthwise, dilation, residual, both pools."""
    net = Builder(np.random.default_rng(seed), (3, 13, 11), (0.02, 100 + seed))
    x = net.conv2d(0, 24, (3, 3), (2, 2), (1, 1, 1, 1), bits=8, exact=True)
    y = net.conv2d(x, 24, (3, 3), (1, 1), (1, 1, 1, 1), groups=24, bits=7)
    y = net.conv2d(y, 24, (1, 1), bits=6, residual=x)
    z = net.conv2d(y, 12, (3, 2), (1, 1), (2, 0, 2, 2), dilation=(2, 2), groups=4, bits=5, quantization=(0.03, 9))
    w = net.max_pool2d(y, (3, 3), (1, 1), (1, 1, 1, 1))
    w = net.conv2d(w, 12, (1, 1), bits=4, clamp=(9, 200), quantization=(0.03, 9))
    x = net.concat([z, net.table(w, quantization=(0.03, 9))])
    x = net.add(x, y, exact=True)
    x = net.mul(net.mul(x, y, exact=True), net.avg_pool2d(x, (7, 6), (1, 1), (0, 0, 0, 0), clamp=(0, 60)))
    x = net.avg_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1))
    x = net.reshape(x, (24 * 4 * 3,))
    x = net.linear(x, 33, bits=3)
    net.linear(x, 10, bits=2, dtype="f32", size=0.01)
    return net.member(name)


def small_network() -> Graph:
    """Every op, preprocess and classes in a small file."""
    entry = {"mean": [0.5, 0.25, 0.125], "std": [0.25, 0.5, 1.0]}
    builder = Builder(np.random.default_rng(0), (3, 6, 5), (0.02, 110))
    a = builder.conv2d(0, 6, (3, 3), (2, 1), (1, 0, 1, 2), bits=5, groups=3)
    b = builder.conv2d(0, 6, (3, 1), (2, 1), (1, 0, 1, 0), bits=7, residual=a, clamp=(10, 250))
    c = builder.table(a, quantization=builder.quantization(b))
    d = builder.concat([b, c])
    e = builder.mul(builder.add(d, d), d)
    f = builder.max_pool2d(e, (2, 2), (1, 2), (1, 0, 0, 1), (1, 2))
    g = builder.avg_pool2d(f, (2, 2), (2, 2), (0, 0, 1, 1))
    h = builder.reshape(g, (math.prod(builder.shape(g)),))
    builder.linear(h, 2, bits=3, dtype="f32")
    return Graph([builder.member(preprocess=entry)], preprocess=entry, classes=["cat", "dog"])


def small_vision() -> Graph:
    """Every op of version 3 but `embedding` and `mean`, in a file that takes images."""
    net = Builder(np.random.default_rng(77), (3, 12, 12), (0.02, 110))
    x = net.conv2d(0, 16, (3, 3), (2, 2), (1, 1, 1, 1), bits=5, dtype="s16")
    x = net.conv2d(net.norm(x, groups=4), 16, residual=x, dtype="s16")
    y = net.mul(net.rescale(x), net.avg_pool2d(x, (6, 6), (1, 1), (0, 0, 0, 0)))
    gate = net.conv2d(y, 1, (3, 3), padding=(1, 1, 1, 1))
    y = net.resize(net.mul(y, gate), (4, 4), (3, 2))
    y = net.gather(y, "rows", np.clip(np.arange(-1, 5), 0, 3).repeat(6).reshape(6, 6).T.ravel(), (16, 6, 6))
    x = net.add(x, y, dtype="s16")
    x = net.position(net.gather(net.tokens(x), "channels", np.arange(15, -1, -1)), prefix=4)
    y = net.norm(x)
    q, k, v = (net.linear(y, 16, bits=4) for _ in range(3))
    y = net.attention(q, k, v, 4, block=20, logit_bias=True, regions=3)
    x = net.linear(y, 16, bits=6, residual=x, dtype="s16")
    y = net.norm(net.gather(x, "rows", np.random.default_rng(0).permutation(40)[:36]), dtype="u8")
    y = net.concat([y, net.table(y, quantization=net.quantization(y))], "channels")
    y = net.avg_pool2d(net.image(y, 6), (6, 6), (1, 1), (0, 0, 0, 0))
    net.linear(net.reshape(y, (32,)), 5, bits=3, dtype="f32")
    return Graph([net.member()])


def small_text() -> Graph:
    """Every op that reads a text of any length; the file takes token ids."""
    net = Builder(np.random.default_rng(16), (9,), None)
    x = net.position(net.embedding(11, 12, bits=5), prefix=1, exact=True)
    y = net.norm(x)
    q, k, v = (net.linear(y, 12) for _ in range(3))
    x = net.linear(net.attention(q, k, v, 3, logit_bias=True), 12, bits=3, residual=x, dtype="s16")
    y = net.norm(net.add(x, y, dtype="s16"))
    y = net.mul(net.table(y), net.gather(y, "rows", [0]))
    y = net.concat([y, net.table(y, quantization=net.quantization(y))], "channels")
    y = net.gather(y, "channels", [3, 1, -1, 15])
    x = net.mean(y)
    net.linear(x, 3, bits=7, dtype="f32")
    return Graph([net.member()], classes=["a", "b", "c"], vocabulary=11, variable=True)


def detector(seed: int) -> Graph:
    """Two heads on images of two sizes, [K] scores, a stream of 16 bits that is an output and is read inside as well;
    their order is not that of the nodes."""
    net = Builder(np.random.default_rng(seed), (3, 16, 12), (0.02, 120))
    stream = net.conv2d(0, 24, (3, 3), (2, 2), (1, 1, 1, 1), dtype="s16")
    features = net.rescale(stream, "f32")
    fine = net.table(net.norm(stream), by_channel=True)
    coarse = net.max_pool2d(net.conv2d(fine, 32, (3, 3), padding=(1, 1, 1, 1), bits=5), (2, 2), (2, 2), (0, 0, 0, 0))
    boxes = net.conv2d(coarse, 8, (1, 1), dtype="f32", bits=7)
    finer = net.conv2d(fine, 4, (3, 3), padding=(1, 1, 1, 1), dtype="f32", bits=6)
    mask = net.table(net.conv2d(coarse, 2), "f32", by_channel=True)
    pooled = net.reshape(net.avg_pool2d(coarse, (4, 3), (1, 1), (0, 0, 0, 0)), (32,))
    scores = net.linear(pooled, 5, dtype="f32", bits=4, size=0.01)
    net.linear(pooled, 3)  # that nobody reads
    return Graph([net.member(outputs=[scores, finer, features, boxes, mask])])


def sums(seed: int) -> Graph:
    """Inner codes in every form of a convolution, beside residuals of 8 and of 16 bits, in codes and in numbers."""
    net = Builder(np.random.default_rng(seed), (8, 9, 7), (0.02, 120))
    same: dict = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}
    x = net.conv2d(0, 32, **same)
    x = net.conv2d(x, 32, residual=x, inner=True, bits=5)
    x = net.conv2d(x, 32, **same, residual=x, inner=True)
    x = net.conv2d(x, 32, **same, groups=32, residual=x, inner=True)
    x = net.conv2d(x, 32, **same, groups=4, residual=x, inner=True, clamp=(10, 250))
    stream = net.conv2d(x, 32, residual=x, inner=True, dtype="s16")
    x = net.conv2d(x, 32, **same, groups=32, residual=stream, inner=True)
    x = net.conv2d(x, 32, **same, residual=stream, inner=True, bits=3)
    x = net.reshape(net.avg_pool2d(x, (9, 7), (1, 1), (0, 0, 0, 0)), (32,))
    net.linear(x, 5, residual=net.linear(x, 5), inner=True, dtype="f32", bits=4)
    return Graph([net.member()])


def small_detector() -> Graph:
    net = Builder(np.random.default_rng(3), (2, 4, 4), (0.05, 100))
    x = net.conv2d(0, 4, (3, 3), padding=(1, 1, 1, 1))
    boxes = net.conv2d(x, 3, bits=4, dtype="f32")
    scores = net.linear(net.reshape(x, (64,)), 2, bits=3, dtype="f32")
    return Graph([net.member(outputs=[scores, boxes])])


def arrays(output: Output) -> list[np.ndarray]:
    """Of one output, or of several."""
    return output if isinstance(output, list) else [output]


def small_ensemble() -> Graph:
    """Three members that read their input each on its own grid."""
    members = []
    for i in range(3):
        builder = Builder(np.random.default_rng(i), (5,), (0.5, 100 + i))
        builder.table(builder.linear(0, 4, bits=2 + i), "f32")
        members.append(builder.member(f"m{i}"))
    return Graph(members, "probs", classes=["a", "b", "c", "d"])
