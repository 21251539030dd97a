"""The steps of a model file on a GPU, one for each node: what they launch, and on which memory. Here are the ops that
version 2 of the format had, and their like.

An activation is a tensor [N, H, W, stride]: codes with the padded channels of kernels/triton_pixels.py, or the f32
output with C itself. A shape [F] is [F, 1, 1], and [T, D] is [D, T, 1]. Token ids [T] are [N, 1, 1, T + 1]: behind
them is the length of their text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from qdeploy.graph import Activation, Node
from qdeploy.kernels import int8_tiles, triton_int8, triton_int8_conv, triton_int8_windows
from qdeploy.kernels.int8_tiles import Tile, TunedTiles
from qdeploy.kernels.int8_weights import channel_stride, pack_conv
from qdeploy.ops.op import Rows

DTYPES = {"u8": torch.uint8, "s16": torch.int16, "i32": torch.int32, "f32": torch.float32}


def chw(activation: Activation) -> tuple[int, int, int]:
    """The shape as (C, H, W)."""
    if len(activation.shape) == 2:
        return activation.shape[1], activation.shape[0], 1
    c, h, w = (*activation.shape, 1, 1)[:3]
    return c, h, w


def empty(activation: Activation, n: int, device: torch.device, rows: int | None = None) -> Tensor:
    """Memory for `n` images of the activation; `rows`: so many tokens instead of those that its shape says."""
    c, h, w = chw(activation)
    if activation.dtype == "i32":
        return torch.empty((n, 1, 1, (rows or c) + 1), dtype=torch.int32, device=device)
    h, stride = rows or h, c if activation.dtype == "f32" else channel_stride(c)
    return torch.empty((n, h, w, stride), dtype=DTYPES[activation.dtype], device=device)


def as_array(value: Tensor, activation: Activation) -> Tensor:
    """The activation in the shape and order of the file: [N, C, H, W], [N, T, D] or [N, F]; a view where it can be."""
    c = chw(activation)[0]
    if len(activation.shape) == 2:
        return value[:, :, 0, :c]
    return value[..., :c].permute(0, 3, 1, 2).reshape(len(value), *activation.shape)


class Step:
    """One node: called with its inputs, the number of images and the tokens of the longest text, it returns its output.

    rows: of the inputs and, last, of the output: how many more than the text has, where they vary with its length.
    """

    kernel = ""  # of the plan

    def __init__(
        self, node: Node, inputs: list[Activation], output: Activation, device: torch.device, rows: Sequence[Rows]
    ):
        self.node, self.inputs, self.output, self.device, self.rows = node, inputs, output, device, rows

    def __call__(self, values: Sequence[Tensor], n: int, tokens: int) -> Tensor:
        more = self.rows[-1]
        out = empty(self.output, n, self.device, None if more is None else tokens + more)
        self.launch(values, out)
        return out

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        raise NotImplementedError

    @property
    def reads_lengths(self) -> bool:
        """Then the token ids, which have the lengths of the texts behind them, come after its inputs."""
        return False

    def array(self, value: Tensor, ids: Tensor) -> Tensor:
        """An output as `as_array`; rows beyond the end of a text, whose ids [N, ..., T + 1] are given, are 0."""
        array, more = as_array(value, self.output), self.rows[-1]
        if more is None:
            return array
        exists = torch.arange(array.shape[1], device=array.device) < ids.flatten(1)[:, -1:] + more
        return torch.where(exists[:, :, None], array, 0)

    def first_rows(self, array: Tensor, tokens: int) -> Tensor:
        """Of such an array the rows that texts of so many tokens have."""
        more = self.rows[-1]
        return array if more is None else array[:, : tokens + more]

    def constant(self, key: str) -> Tensor:
        return torch.from_numpy(np.array(self.node.constants[key])).to(self.device)

    def number(self, key: str) -> float:
        """An attribute, as the f32 that it is."""
        return float(np.float32(self.node.attributes[key]))

    @property
    def clamp(self) -> tuple[int, int]:
        """Of codes; f32 outputs have none, and their kernels do not look at it."""
        low, high = self.node.attributes.get("clamp", (-32767, 32767))
        return low, high

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return 0


class Conv(Step):
    """conv2d and linear."""

    def __init__(self, *place: Any):
        super().__init__(*place)
        node, attributes = self.node, self.node.attributes
        weight = node.constants["weight"]
        self._weight_shape = (*weight.shape, 1, 1)[:4]  # a linear layer's is [O, F]
        self._packed = pack_conv(
            weight.reshape(self._weight_shape),
            attributes.get("groups", 1),
            node.constants["multiplier"],
            node.constants["bias"],
            self.inputs[0].zero_point,
            self.device,
        )
        keys = ("stride", "padding", "dilation")
        self._window: dict[str, Any] = {key: tuple(attributes[key]) for key in keys if key in attributes}
        self._inner = None
        if "inner_clamp" in attributes:
            low, high = map(float, attributes["inner_clamp"])
            numbers = self.number("inner_multiplier"), self.number("inner_bias")
            self._inner = triton_int8_conv.InnerCodes(low, high, *numbers)
        self._tuned = TunedTiles(_name_of(self.device))
        self._tiles: dict[int, Tile] = {}

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        self.launch_with(self.tile(_pixels(out)), values, out)

    def launch_with(self, tile: Tile, values: Sequence[Tensor], out: Tensor) -> None:
        triton_int8_conv.conv(
            values[0],
            self._packed,
            out,
            tile,
            **self._window,
            clamp=self.clamp,
            residual=values[1] if len(values) > 1 else None,
            residual_multiplier=self.number("residual_multiplier") if len(values) > 1 else 0.0,
            inner=self._inner,
        )

    def tile(self, pixels: int) -> Tile:
        """The fastest tile for so many pixels, where this GPU has been tuned for them; else one chosen by rule."""
        if pixels not in self._tiles:
            packed = self._packed
            shape = (pixels, packed.rows_per_superblock, packed.superblocks, packed.k_unit)
            self._tiles[pixels] = self._tuned.get(self._key(pixels)) or int8_tiles.default(*shape)
        return self._tiles[pixels]

    def tune(self, values: Sequence[Tensor], out: Tensor, milliseconds: Callable[[Callable], float]) -> None:
        """Times the tiles for so many pixels, unless this shape has been tuned before."""
        key = self._key(_pixels(out))

        def time(tile: Tile) -> float:
            return milliseconds(lambda: self.launch_with(tile, values, out))

        if self._tuned.get(key) is None:
            candidates = int8_tiles.fitting(self._packed.rows_per_superblock, self._packed.k_unit)
            self._tuned.tune(key, candidates, time)
        self._tiles.pop(_pixels(out), None)

    @property
    def macs(self) -> int:
        return self.pixels * math.prod(self._weight_shape)

    @property
    def pixels(self) -> int:
        """Of one image, or of the longest text."""
        return math.prod(chw(self.output)[1:])

    def _key(self, pixels: int) -> str:
        packed, stride = self._packed, self._window.get("stride", (1, 1))
        rows, k = packed.codes.shape
        return (
            f"{pixels} pixels, {rows}x{k} codes, {packed.superblocks} superblocks, "
            f"kernel {packed.kh}x{packed.kw}, stride {stride[0]}x{stride[1]}, {len(self.inputs)} inputs"
        )


class Add(Step):
    kernel = "add"

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        a, b = values
        ma, mb = (float(np.float32(m)) for m in self.node.attributes["multipliers"])
        triton_int8.add(a, b, out, chw(self.output)[0], (ma, mb), self.number("bias"), self.clamp)


class Mul(Step):
    kernel = "mul"

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        a, b = self.inputs
        triton_int8.mul(
            values[0],
            values[1],
            out,
            chw(self.output)[0],
            (a.zero_point, b.zero_point),
            self.number("multiplier"),
            self.number("bias"),
            self.clamp,
            one_channel=chw(b)[0] < chw(a)[0],
        )


class Rescale(Step):
    kernel = "rescale"

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        factors = self.number("multiplier"), self.number("bias")
        triton_int8.rescale(values[0], out, chw(self.output)[0], *factors, self.clamp)


class Resize(Step):
    kernel = "resize"

    def __init__(self, *place: Any):
        super().__init__(*place)
        self._rows = self.constant("row_start"), self.constant("row_weight")
        self._columns = self.constant("column_start"), self.constant("column_weight")

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        triton_int8_windows.resize(
            values[0],
            out,
            chw(self.output)[0],
            self._rows,
            self._columns,
            self.inputs[0].zero_point,
            self.number("multiplier"),
            self.number("bias"),
            self.clamp,
        )


class Pool(Step):
    """max_pool2d and avg_pool2d."""

    kernel = "pool"

    def __init__(self, *place: Any):
        super().__init__(*place)
        attributes = self.node.attributes
        keys = ("kernel", "stride", "padding", "dilation")
        self._options: dict[str, Any] = {key: tuple(attributes[key]) for key in keys if key in attributes}
        if self.node.op == "avg_pool2d":
            self._options |= {"multiplier": self.constant("multiplier"), "bias": self.number("bias")}
            self._options |= {"zero_point": self.inputs[0].zero_point, "clamp": self.clamp}

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        triton_int8_windows.pool(values[0], out, chw(self.output)[0], **self._options)


class Table(Step):
    kernel = "lookup"

    def __init__(self, *place: Any):
        super().__init__(*place)
        self._table = self.constant("table")

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        triton_int8.lookup(values[0], self._table, out, chw(self.output)[0])


class Concat(Step):
    """Along the channels, of tokens also the rows."""

    kernel = "copy"

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        by_rows, first = self.node.attributes.get("axis") == "rows", 0
        for value, activation in zip(values, self.inputs, strict=True):
            channels, rows, _ = chw(activation)
            size = rows if by_rows else channels
            part = out[:, first : first + size] if by_rows else out[..., first : first + size]
            part.copy_(value if by_rows else value[..., :channels])
            first += size


class Reshape(Step):
    """The elements in the order of the file, which may not be theirs in memory, under another shape."""

    kernel = "copy"

    def __call__(self, values: Sequence[Tensor], n: int, tokens: int) -> Tensor:
        x, out = self.inputs[0], self.output
        if chw(x) == chw(out) and (len(x.shape) == 2) == (len(out.shape) == 2):  # [C, 1, 1] to [C]
            return values[0]
        return super().__call__(values, n, tokens)

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        as_array(out, self.output).copy_(as_array(values[0], self.inputs[0]).reshape(len(out), *self.output.shape))


class View(Step):
    """tokens and image: the same rows under another shape."""

    kernel = "view"

    def __call__(self, values: Sequence[Tensor], n: int, tokens: int) -> Tensor:
        _, h, w = chw(self.output)
        return values[0].view(n, h, w, values[0].shape[-1])  # of no image, too


def _pixels(value: Tensor) -> int:
    return value.shape[0] * value.shape[1] * value.shape[2]


def _name_of(device: torch.device) -> str:
    """What the fastest tile depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, Triton {triton.__version__}"
