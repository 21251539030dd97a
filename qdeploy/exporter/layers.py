"""A network as layers, still in real numbers: the operations of docs/format.md, and those that rules make into them.

What a layer computes is `clamp(linear part, low, high)`. BatchNorm goes into the float64 scale and shift of a linear
part, never into the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from qdeploy.errors import ExportError
from qdeploy.exporter.elements import Value
from qdeploy.exporter.grid import Grid
from qdeploy.ops import OPS

Function = Callable[[np.ndarray], np.ndarray]  # elementwise, float64 to float64


@dataclass(frozen=True)
class Composed:
    """Functions one after the other. Calls within calls would end where Python's stack does, at some 900 of them."""

    steps: tuple[Function, ...]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        for function in self.steps:
            values = function(values)
        return values


def composed(inner: Function, outer: Function) -> Composed:
    """`outer(inner(x))`."""
    parts = [one.steps if isinstance(one, Composed) else (one,) for one in (inner, outer)]
    return Composed((*parts[0], *parts[1]))


# ---- Weights ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight and its quantizer; all f32. `origin`: "learned" in training, or of a "file" that holds the codes."""

    value: np.ndarray
    step: np.ndarray  # [], or by output channel
    qmin: int
    qmax: int
    origin: str = "learned"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def reshape(self, shape: Sequence[int]) -> QuantizedWeight:
        """With the same output channels."""
        return replace(self, value=self.value.reshape(tuple(shape)))

    def __getitem__(self, channels: np.ndarray) -> QuantizedWeight:
        """Of some output channels."""
        return replace(self, value=self.value[channels], step=self.step[channels] if self.step.size > 1 else self.step)

    def dequantized(self) -> np.ndarray:
        """What the quantizer makes of it, as in training."""
        step = self.step.reshape(-1, *[1] * (self.value.ndim - 1)) if self.step.ndim else self.step
        return np.rint(np.clip(self.value / step, self.qmin, self.qmax)) * step


@dataclass(frozen=True)
class Codes:
    """A quantized weight. `quantizer`: "learned", "file", "rounded" (fallback_bits), or "" where a rule made it."""

    values: np.ndarray  # int8
    bits: int
    quantizer: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def checked_step(step: np.ndarray, at: str) -> np.ndarray:
    """The step sizes as float64; ExportError where one is not > 0 and finite."""
    steps = step.reshape(-1)
    wrong = np.flatnonzero(~(np.isfinite(steps) & (steps > 0)))
    if len(wrong):
        raise ExportError(f"expected step sizes > 0 and finite, got {steps[wrong[0]]} of channel {wrong[0]} - at {at}")
    return steps.astype(np.float64)


# ---- Layers -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Layer:
    """What all layers have. `op` is one of docs/format.md, or input, affine, clamp, pad or quantize."""

    op: ClassVar[str]
    name: str  # of the module; unique once the network is lowered
    inputs: list[Layer]
    shape: tuple[int, ...]  # without the batch
    value: Value  # in the float network: its output, clamped to [low, high], is this layer's
    low: float = -math.inf
    high: float = math.inf

    @property
    def clamped(self) -> bool:
        return (self.low, self.high) != (-math.inf, math.inf)

    @property
    def same_grid(self) -> bool:
        """Its codes are codes of its inputs."""
        return self.op in OPS and OPS[self.op].same_grid


class Input(Layer):
    op = "input"


@dataclass(eq=False, kw_only=True)
class Scaled(Layer):
    """A linear part that ends in `scale[c] * ... + shift[c]`; float64 [channels], or [1] where all share one."""

    scale: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True)
class InnerCodes:
    """What a residual is added to where that is rounded first: `factor * rounded + shift`, in real numbers.

    grid: of the rounding; its low and high are the clamps before it, too.
    """

    grid: Grid
    factor: float
    shift: float


@dataclass(eq=False, kw_only=True)
class Weighted(Scaled):
    """`scale[c] * (weight * x)[c] + shift[c]`, and with a second input `+ residual * inputs[1]`; with inner codes these
    come in between."""

    weight: QuantizedWeight | np.ndarray | Codes
    residual: float = 1.0
    inner: InnerCodes | None = None

    @property
    def codes(self) -> Codes:
        """The weight, once weights.py has quantized it."""
        assert isinstance(self.weight, Codes)
        return self.weight

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return math.prod(self.shape) * math.prod(self.weight.shape[1:])

    @property
    def channels(self) -> int:
        return self.weight.shape[0]


@dataclass(eq=False, kw_only=True)
class Conv2d(Weighted):
    op = "conv2d"
    window: dict[str, Any]  # attributes as in docs/format.md, so for the pools


class Linear(Weighted):
    op = "linear"


@dataclass(eq=False, kw_only=True)
class Embedding(Weighted):
    """`scale[id] * weight[id] + rows[t]` of token t."""

    op = "embedding"
    rows: np.ndarray  # float64 [T, D]

    @property
    def macs(self) -> int:
        return 0


class Affine(Scaled):
    """`scale[c] * x + shift[c]`: BatchNorm, constants."""

    op = "affine"

    @property
    def uniform(self) -> bool:
        """With one scale and one shift for the whole tensor."""
        return bool(np.ptp(self.scale) == 0 and np.ptp(self.shift) == 0)


class Rescale(Affine):
    """A uniform one before a norm or a position: it keeps the 16 bits of a stream."""

    op = "rescale"


@dataclass(eq=False, kw_only=True)
class AvgPool2d(Scaled):
    op = "avg_pool2d"
    window: dict[str, Any]
    divisors: np.ndarray  # [1], or by number of real elements in the window
    scale: np.ndarray = field(default_factory=lambda: np.ones(1))
    shift: np.ndarray = field(default_factory=lambda: np.zeros(1))


@dataclass(eq=False, kw_only=True)
class MaxPool2d(Layer):
    op = "max_pool2d"
    window: dict[str, Any]


@dataclass(eq=False, kw_only=True)
class Add(Layer):
    """`factors[0] * inputs[0] + factors[1] * inputs[1] + shift`."""

    op = "add"
    factors: tuple[float, float]
    shift: np.ndarray = field(default_factory=lambda: np.zeros(1))


@dataclass(eq=False, kw_only=True)
class Mul(Scaled):
    """`scale * inputs[0] * inputs[1] + shift`; inputs[1] may be a gate, one number a channel."""

    op = "mul"
    scale: np.ndarray = field(default_factory=lambda: np.ones(1))
    shift: np.ndarray = field(default_factory=lambda: np.zeros(1))


class Clamp(Layer):
    op = "clamp"


@dataclass(eq=False, kw_only=True)
class Pad(Layer):
    op = "pad"
    padding: list[int]  # top, left, bottom, right; by 0


class Concat(Layer):
    op = "concat"

    @property
    def along_channels(self) -> bool:
        return len(self.shape) == 3 or self.inputs[0].shape[-1] != self.shape[-1]


class Reshape(Layer):
    op = "reshape"


class Tokens(Layer):
    """[C, H, W] as [H*W, C]: the same in memory."""

    op = "tokens"


class Image(Layer):
    """[H*W, C] as [C, H, W]."""

    op = "image"


@dataclass(eq=False, kw_only=True)
class Gather(Layer):
    op = "gather"
    axis: str  # rows or channels
    index: np.ndarray  # -1 is 0


@dataclass(eq=False, kw_only=True)
class Resize(Scaled):
    """`scale * rows * x * columns + shift` with integers in the two matrices."""

    op = "resize"
    rows: Band
    columns: Band
    shift: np.ndarray = field(default_factory=lambda: np.zeros(1))


@dataclass(frozen=True)
class Band:
    """A matrix of integers whose row i is `weight[i]` from column `start[i]` on, zero elsewhere."""

    start: np.ndarray  # int32 [n]
    weight: np.ndarray  # int32 [n, k]


@dataclass(eq=False, kw_only=True)
class Norm(Scaled):
    """`scale[c] * (x - mean) / sqrt(variance + epsilon) + shift[c]`; of each row, or of groups of channels."""

    op = "norm"
    groups: int | None
    epsilon: float


@dataclass(eq=False, kw_only=True)
class Position(Layer):
    """`factor * x + rows` of tokens x, behind as many rows more as `rows` has beyond those of x."""

    op = "position"
    rows: np.ndarray  # float64
    factor: float = 1.0


@dataclass(eq=False, kw_only=True)
class Mean(Scaled):
    """`scale / divisor * (sum over the tokens) + shift`."""

    op = "mean"
    divisors: np.ndarray  # by number of tokens
    scale: np.ndarray = field(default_factory=lambda: np.ones(1))
    shift: np.ndarray = field(default_factory=lambda: np.zeros(1))


@dataclass(eq=False, kw_only=True)
class Attention(Scaled):
    """`scale * softmax(factor * q k^T + bias) v + shift`, of each head in each block of rows."""

    op = "attention"
    heads: int
    factor: float
    block: int | None  # rows
    bias: np.ndarray | None  # float64 [heads, T, S]
    regions: np.ndarray | None  # rows of another number do not see each other
    scale: np.ndarray = field(default_factory=lambda: np.ones(1))
    shift: np.ndarray = field(default_factory=lambda: np.zeros(1))


@dataclass(eq=False, kw_only=True)
class Table(Layer):
    op = "table"
    function: Function  # its clamp is in it
    by_channel: bool = False  # the function is of [C, n], another one for each channel


@dataclass(eq=False, kw_only=True)
class Quantize(Layer):
    """A quantizer of an activation, "learned" or of a "file": nothing where its input has its grid, else a table."""

    op = "quantize"
    grid: Grid
    origin: str = "learned"

    def function(self, values: np.ndarray) -> np.ndarray:
        return self.grid.real(self.grid.codes(values))


def elementwise(layer: Layer) -> Function | None:
    """What the layer does to each element, where that is the same function everywhere."""
    low, high = layer.low, layer.high  # values of now: a rule may change the layer later
    if isinstance(layer, Table):
        return None if layer.by_channel else layer.function
    if isinstance(layer, Clamp):
        return lambda v: np.clip(v, low, high)
    if isinstance(layer, Affine) and layer.uniform:
        scale, shift = float(layer.scale[0]), float(layer.shift[0])
        return lambda v: np.clip(v * scale + shift, low, high)
    return None


# ---- Networks -----------------------------------------------------------------------------------------------------


class Source(Protocol):
    """A float network as its front end holds it."""

    def run(self, images: np.ndarray, observe: Mapping[Hashable, Callable[[np.ndarray], None]]) -> None:
        """Runs it on f32 images, or int64 token ids, and hands the f32 values of each tensor in `observe` to its
        function, which must copy what it keeps: memory may be used again."""

    def stored(self) -> tuple[int, int]:
        """Bytes of the network in float32, and with learned weights packed at their width, all the rest in float32."""


@dataclass
class Network:
    """The layers in execution order; layers[0] is the input. What a front end makes and the rest of the exporter takes.

    outputs: one or more; from fusion on no layer reads them, and no two are the same.
    names: of several outputs, as the source has them; "" where the layer's name is to do.
    classifier: the name of the module that may be rounded without being asked for.
    notes: what a front end made of the network, in words.
    """

    source: Source
    layers: list[Layer]
    outputs: list[Layer]
    ids: bool = False  # the input is token ids
    classifier: str | None = None
    notes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def run(self, images: np.ndarray, observe: Mapping[Layer, Callable[[np.ndarray], None]]) -> None:
        """Runs the float network on `images` and hands what each layer in `observe` computes there, [N, *shape], to its
        function."""
        tensors: dict[Hashable, list[Layer]] = {}
        for layer in observe:
            tensors.setdefault(layer.value.tensor, []).append(layer)

        def distributed(layers: list[Layer]) -> Callable[[np.ndarray], None]:
            def call(values: np.ndarray) -> None:
                for layer in layers:
                    observe[layer](np.clip(layer.value.read(values, layer.shape), layer.low, layer.high))

            return call

        self.source.run(images, {tensor: distributed(layers) for tensor, layers in tensors.items()})

    def users(self, layer: Layer) -> list[Layer]:
        return [user for user in self.layers if layer in user.inputs]

    def only_user(self, layer: Layer) -> Layer | None:
        users = self.users(layer)
        return users[0] if len(users) == 1 and layer not in self.outputs and users[0].inputs.count(layer) == 1 else None

    def replace(self, old: Layer, new: Layer) -> None:
        """Everything that read `old` reads `new`; `old` is removed, and `new` stands there unless it has a place."""
        for user in self.users(old):
            if user is not new:
                user.inputs = [new if x is old else x for x in user.inputs]
        self.end_in(new, old)
        place = self.layers.index(old)
        self.layers[place : place + 1] = [] if new in self.layers else [new]

    def end_in(self, new: Layer, old: Layer) -> None:
        """Where `old` is an output `new` is, and nothing else changes."""
        self.outputs = [new if x is old else x for x in self.outputs]
