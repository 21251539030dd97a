"""One network of a model file as steps on a GPU: what each step launches, and on which memory.

An activation is a tensor [N, H, W, stride]: u8 codes with the padded channels of kernels/triton_int8.py, or the f32
output with C itself. A shape [F] is [F, 1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from qdeploy.checks import quoted, shape_text
from qdeploy.errors import ModelError
from qdeploy.graph import Activation, Member, Node
from qdeploy.kernels import int8_tiles, triton_int8, triton_int8_conv
from qdeploy.kernels.int8_tiles import Tile, TunedTiles
from qdeploy.kernels.int8_weights import channel_stride, pack_conv
from qdeploy.validate import member_at, node_at

INSTEAD = "device='cpu' runs it"


def chw(activation: Activation) -> tuple[int, int, int]:
    """The shape as (C, H, W)."""
    c, h, w = (*activation.shape, 1, 1)[:3]
    return c, h, w


def empty(activation: Activation, n: int, device: torch.device) -> Tensor:
    """Memory for `n` images of the activation."""
    c, h, w = chw(activation)
    if activation.dtype == "f32":
        return torch.empty((n, h, w, c), dtype=torch.float32, device=device)
    return torch.empty((n, h, w, channel_stride(c)), dtype=torch.uint8, device=device)


def as_array(value: Tensor, activation: Activation) -> Tensor:
    """The activation in the shape and order of the file: [N, C, H, W] or [N, F]; a view where that is its memory."""
    c = chw(activation)[0]
    return value[..., :c].permute(0, 3, 1, 2).reshape(len(value), *activation.shape)


class Step:
    """One node: called with its inputs and the number of images it returns its output."""

    kernel = ""  # of the plan

    def __init__(self, node: Node, inputs: list[Activation], output: Activation, device: torch.device):
        self.node, self.inputs, self.output, self.device = node, inputs, output, device

    def __call__(self, values: Sequence[Tensor], n: int) -> Tensor:
        out = empty(self.output, n, self.device)
        self.launch(values, out)
        return out

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        raise NotImplementedError

    def constant(self, key: str) -> Tensor:
        return torch.from_numpy(np.array(self.node.constants[key])).to(self.device)

    @property
    def clamp(self) -> tuple[int, int]:
        """Of u8 outputs; f32 ones have none, and their kernels do not look at it."""
        low, high = self.node.attributes.get("clamp", (0, 255))
        return low, high

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return 0


class Conv(Step):
    """conv2d and linear."""

    def __init__(self, node: Node, inputs: list[Activation], output: Activation, device: torch.device):
        super().__init__(node, inputs, output, device)
        weight, attributes = node.constants["weight"], node.attributes
        self._weight_shape = (*weight.shape, 1, 1)[:4]  # a linear layer's is [O, F]
        self._packed = pack_conv(
            weight.reshape(self._weight_shape),
            attributes.get("groups", 1),
            node.constants["multiplier"],
            node.constants["bias"],
            inputs[0].zero_point,
            device,
        )
        keys = ("stride", "padding", "dilation")
        self._window: dict[str, Any] = {key: tuple(attributes[key]) for key in keys if key in attributes}
        self._tuned = TunedTiles(_name_of(device))
        self._tiles: dict[int, Tile] = {}

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        self.launch_with(self.tile(len(out)), values, out)

    def launch_with(self, tile: Tile, values: Sequence[Tensor], out: Tensor) -> None:
        triton_int8_conv.conv(
            values[0],
            self._packed,
            out,
            tile,
            **self._window,
            clamp=self.clamp,
            residual=values[1] if len(values) > 1 else None,
            residual_multiplier=float(np.float32(self.node.attributes.get("residual_multiplier", 0.0))),
        )

    def tile(self, n: int) -> Tile:
        """The fastest tile for `n` images, where this GPU has been tuned for them; else one chosen by rule."""
        if n not in self._tiles:
            packed = self._packed
            shape = (self._pixels(n), packed.rows_per_superblock, packed.superblocks, packed.k_unit)
            self._tiles[n] = self._tuned.get(self._key(n)) or int8_tiles.default(*shape)
        return self._tiles[n]

    def tune(self, values: Sequence[Tensor], milliseconds: Callable[[Callable], float]) -> None:
        """Times the tiles for so many images, unless this shape has been tuned before."""
        n, out = len(values[0]), empty(self.output, len(values[0]), self.device)

        def time(tile: Tile) -> float:
            return milliseconds(lambda: self.launch_with(tile, values, out))

        if self._tuned.get(self._key(n)) is None:
            candidates = int8_tiles.fitting(self._packed.rows_per_superblock, self._packed.k_unit)
            self._tuned.tune(self._key(n), candidates, time)
        self._tiles.pop(n, None)

    @property
    def macs(self) -> int:
        _, h, w = chw(self.output)
        return h * w * math.prod(self._weight_shape)

    def _pixels(self, n: int) -> int:
        _, h, w = chw(self.output)
        return n * h * w

    def _key(self, n: int) -> str:
        packed, stride = self._packed, self._window.get("stride", (1, 1))
        rows, k = packed.codes.shape
        return (
            f"{self._pixels(n)} pixels, {rows}x{k} codes, {packed.superblocks} superblocks, "
            f"kernel {packed.kh}x{packed.kw}, stride {stride[0]}x{stride[1]}, {len(self.inputs)} inputs"
        )


class Add(Step):
    kernel = "add"

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        a, b = values
        ma, mb = (float(np.float32(m)) for m in self.node.attributes["multipliers"])
        bias = float(np.float32(self.node.attributes["bias"]))
        triton_int8.add(a, b, out, chw(self.output)[0], (ma, mb), bias, self.clamp)


class Mul(Step):
    kernel = "mul"

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        a, b = values
        zero_points = (self.inputs[0].zero_point, self.inputs[1].zero_point)
        multiplier, bias = (float(np.float32(self.node.attributes[key])) for key in ("multiplier", "bias"))
        triton_int8.mul(a, b, out, chw(self.output)[0], zero_points, multiplier, bias, self.clamp)


class Pool(Step):
    """max_pool2d and avg_pool2d."""

    kernel = "pool"

    def __init__(self, node: Node, inputs: list[Activation], output: Activation, device: torch.device):
        super().__init__(node, inputs, output, device)
        attributes = node.attributes
        keys = ("kernel", "stride", "padding", "dilation")
        self._options: dict[str, Any] = {key: tuple(attributes[key]) for key in keys if key in attributes}
        if node.op == "avg_pool2d":
            self._options |= {"multiplier": self.constant("multiplier"), "bias": float(np.float32(attributes["bias"]))}
            self._options |= {"zero_point": inputs[0].zero_point, "clamp": self.clamp}

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        triton_int8.pool(values[0], out, chw(self.output)[0], **self._options)


class Table(Step):
    kernel = "lookup"

    def __init__(self, node: Node, inputs: list[Activation], output: Activation, device: torch.device):
        super().__init__(node, inputs, output, device)
        self._table = self.constant("table")

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        triton_int8.lookup(values[0], self._table, out, chw(self.output)[0])


class Concat(Step):
    kernel = "copy"

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        first = 0
        for value, activation in zip(values, self.inputs, strict=True):
            channels = chw(activation)[0]
            out[..., first : first + channels].copy_(value[..., :channels])
            first += channels


class Reshape(Step):
    """The elements in the order [C, H, W], which is not theirs in memory, under another shape."""

    kernel = "copy"

    def __call__(self, values: Sequence[Tensor], n: int) -> Tensor:
        if chw(self.inputs[0]) == chw(self.output):  # [C, 1, 1] to [C]
            return values[0]
        return super().__call__(values, n)

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        (c, _, _), shape = chw(self.inputs[0]), chw(self.output)
        elements = values[0][..., :c].permute(0, 3, 1, 2).reshape(len(out), *shape)
        out[..., : shape[0]].copy_(elements.permute(0, 2, 3, 1))


STEPS: dict[str, type[Step]] = {
    "conv2d": Conv,
    "linear": Conv,
    "add": Add,
    "mul": Mul,
    "max_pool2d": Pool,
    "avg_pool2d": Pool,
    "table": Table,
    "concat": Concat,
    "reshape": Reshape,
}


class Program:
    """The steps of one member."""

    def __init__(self, member: Member, device: torch.device):
        self.member, self.device = member, device
        tensors = member.tensors
        self.steps = [
            _step(node, [tensors[i] for i in node.inputs], tensors[node.output], device, member)
            for node in member.nodes
        ]
        self._last_reader = {i: index for index, node in enumerate(member.nodes) for i in node.inputs}
        table = member.preprocess_table
        self._preprocess = None if table is None else torch.from_numpy(np.array(table)).to(device)

    def empty_codes(self, n: int) -> Tensor:
        """Memory for the codes of `n` inputs."""
        return empty(self.member.tensors[0], n, self.device)

    def quantize(self, images: Tensor, codes: Tensor, bad: Tensor) -> None:
        """f32 [N, C, H, W] or u8 [N, H, W, C] to the codes of the input; sets bad (i32 [1]) at NaN or infinity."""
        target = self.member.tensors[0]
        if images.dtype == torch.uint8 and self._preprocess is not None:
            triton_int8.lookup(images, self._preprocess, codes, chw(target)[0])
        else:
            triton_int8.quantize(images, codes, float(np.float32(target.scale)), target.zero_point, bad)

    def run(self, codes: Tensor, visit: Callable[[Step, list[Tensor], Tensor], None] | None = None) -> Tensor:
        """The output of the last node; every activation is freed after its last reader. `visit` sees each step."""
        values = {0: codes}
        for index, step in enumerate(self.steps):
            inputs = [values[i] for i in step.node.inputs]
            output = values[step.node.output] = step(inputs, len(codes))
            if visit is not None:
                visit(step, inputs, output)
            for i in set(step.node.inputs):
                if self._last_reader[i] == index:
                    del values[i]
        return output

    @property
    def largest(self) -> int:
        """Elements of one image of the largest activation."""
        return max(math.prod(chw(t)[1:]) * max(channel_stride(chw(t)[0]), chw(t)[0]) for t in self.member.tensors)


def _step(node: Node, inputs: list[Activation], output: Activation, device: torch.device, member: Member) -> Step:
    try:
        _check_known(node, [*inputs, output])
        return STEPS[node.op](node, inputs, output, device)
    except ModelError as error:
        raise ModelError(f"{error} - at {node_at(node, member_at(member.name))}") from None


def _check_known(node: Node, tensors: list[Activation]) -> None:
    """Raise ModelError for an op, dtype or shape that has no kernel here."""
    if node.op not in STEPS:
        raise ModelError(f"expected an op that runs on a GPU, got {quoted(node.op)} ({INSTEAD})")
    for tensor in tensors:
        if tensor.dtype not in ("u8", "f32") or len(tensor.shape) == 2:
            got = f"{tensor.dtype} {shape_text(tensor.shape)} {quoted(tensor.name)} ({INSTEAD})"
            raise ModelError(f"expected u8 or f32 tensors of shape [C, H, W] or [F] on a GPU, got {got}")
    if node.op == "mul" and tensors[1].shape not in (tensors[0].shape, (tensors[0].shape[0], 1, 1)):
        got = f"{shape_text(tensors[1].shape)} ({INSTEAD})"
        raise ModelError(f"expected a second factor of the first one's shape or [C, 1, 1] on a GPU, got {got}")


def _name_of(device: torch.device) -> str:
    """What the fastest tile depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, Triton {triton.__version__}"
