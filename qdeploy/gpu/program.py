"""One network of a model file as steps on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from qdeploy.checks import quoted
from qdeploy.errors import ModelError
from qdeploy.gpu.steps import Add, Concat, Conv, Mul, Pool, Rescale, Reshape, Resize, Step, Table, View, chw, empty
from qdeploy.gpu.token_steps import Attention, Embedding, Gather, Mean, Norm, Position
from qdeploy.graph import Member, Node
from qdeploy.kernels import triton_int8
from qdeploy.ops import rows_of_texts
from qdeploy.ops.op import Rows
from qdeploy.validate import member_at, node_at

STEPS: dict[str, type[Step]] = {
    "conv2d": Conv,
    "linear": Conv,
    "add": Add,
    "mul": Mul,
    "rescale": Rescale,
    "resize": Resize,
    "max_pool2d": Pool,
    "avg_pool2d": Pool,
    "table": Table,
    "concat": Concat,
    "reshape": Reshape,
    "tokens": View,
    "image": View,
    "gather": Gather,
    "position": Position,
    "embedding": Embedding,
    "norm": Norm,
    "mean": Mean,
    "attention": Attention,
}
Visit = Callable[[Step, list[Tensor], Tensor], None]


class Program:
    """The steps of one member."""

    def __init__(self, member: Member, device: torch.device, variable: bool):
        """variable: texts may be shorter than the input's shape says."""
        self.member, self.device = member, device
        rows: list[Rows] = rows_of_texts(member) if variable else [None] * len(member.tensors)
        self.steps = [_step(node, member, device, rows) for node in member.nodes]
        writers = {step.node.output: step for step in self.steps}
        self.ends = [writers[i] for i in member.output_ids]  # what writes the outputs
        self._last_reader = {i: index for index, node in enumerate(member.nodes) for i in node.inputs}
        table = member.preprocess_table
        self._preprocess = None if table is None else torch.from_numpy(np.array(table)).to(device)

    def empty_codes(self, images: Tensor) -> Tensor:
        """Memory for the codes of images, or for texts, i32 [N, tokens + 1]."""
        target = self.member.tensors[0]
        return empty(target, len(images), self.device, images.shape[1] - 1 if target.dtype == "i32" else None)

    def quantize(self, images: Tensor, codes: Tensor, bad: Tensor) -> None:
        """f32 [N, C, H, W] or u8 [N, H, W, C] to the codes of the input; sets bad (i32 [1]) at NaN or infinity.

        Token ids and the lengths of their texts, i32 [N, T + 1], are these codes.
        """
        target = self.member.tensors[0]
        if target.dtype == "i32":
            codes.copy_(images.view_as(codes))
        elif images.dtype == torch.uint8 and self._preprocess is not None:
            triton_int8.lookup(images, self._preprocess, codes, chw(target)[0])
        else:
            triton_int8.quantize(images, codes, float(np.float32(target.scale)), target.zero_point, bad)

    def run(self, codes: Tensor, visit: Visit | None = None) -> list[Tensor]:
        """The outputs; every other activation is freed after its last reader. `visit` sees each step."""
        values = {0: codes}
        for index, step in enumerate(self.steps):
            inputs = [values[i] for i in step.node.inputs] + [codes] * step.reads_lengths
            output = values[step.node.output] = step(inputs, len(codes), codes.shape[-1] - 1)
            if visit is not None:
                visit(step, inputs, output)
            for i in set(step.node.inputs):
                if self._last_reader[i] == index:
                    del values[i]
        return [values[i] for i in self.member.output_ids]

    @property
    def largest(self) -> int:
        """Elements of one image of the largest activation."""
        return max(empty(t, 1, torch.device("meta")).numel() for t in self.member.tensors)


def _step(node: Node, member: Member, device: torch.device, rows: list[Rows]) -> Step:
    ids = [*node.inputs, node.output]
    *inputs, output = (member.tensors[i] for i in ids)
    try:
        if node.op not in STEPS:
            raise ModelError(f"expected an op that runs on a GPU, got {quoted(node.op)} (device='cpu' runs it)")
        return STEPS[node.op](node, inputs, output, device, [rows[i] for i in ids])
    except ModelError as error:
        raise ModelError(f"{error} - at {node_at(node, member_at(member.name))}") from None
