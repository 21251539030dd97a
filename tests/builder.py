"""Graphs for tests, node by node: the test gives the structure, the builder random constants.

Constants are scaled so that outputs use the whole u8 range; `exact` ones are powers of two and multiples of 0.5, so
that results often lie exactly between two integers.
"""

from __future__ import annotations

import math

import numpy as np

from qdeploy import reference
from qdeploy.graph import Activation, Graph, Member, Node
from qdeploy.ops import OPS

Quantization = tuple[float, int]  # scale and zero point


class Builder:
    """Builds one member, node by node; every method returns the id of the tensor that it adds."""

    def __init__(self, rng: np.random.Generator, input_shape: tuple[int, ...], quantization: Quantization) -> None:
        self.rng = rng
        self.tensors = [Activation("input", input_shape, "u8", *quantization)]
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

    def mul(self, a: int, b: int, dtype: str = "u8", clamp: tuple[int, int] = (0, 255), exact: bool = False) -> int:
        typical = math.prod(max(75, abs(128 - self.tensors[i].zero_point)) for i in (a, b))
        attributes = {"multiplier": self._factor(typical, 1, exact)[0], "bias": self._offset(1, exact)[0]}
        return self._node("mul", [a, b], attributes, {}, dtype, clamp)

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
        tensor = Activation(f"t{len(self.tensors)}", shape, dtype, scale, zero_point)
        self.tensors.append(tensor if dtype == "u8" else Activation(tensor.name, shape, "f32"))
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


def small_ensemble() -> Graph:
    """Three members that read their input each on its own grid."""
    members = []
    for i in range(3):
        builder = Builder(np.random.default_rng(i), (5,), (0.5, 100 + i))
        builder.table(builder.linear(0, 4, bits=2 + i), "f32")
        members.append(builder.member(f"m{i}"))
    return Graph(members, "probs", classes=["a", "b", "c", "d"])
