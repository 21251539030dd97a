"""The integer graph in memory: what docs/format.md section 3 describes, as plain dataclasses around numpy arrays.

qdeploy/ops/ has the facts of every op, qdeploy/validate.py says which graphs the engine accepts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAX_ELEMENTS = 2**28  # of one image of one activation
MAX_MEMBERS = 256
MAX_NODES = 65_536  # of all members together
COMBINE = ("logits", "probs")  # the rules of an ensemble
DTYPES = {"u8": 1, "f32": 1, "s16": 3, "i32": 3}  # of activations, and the first format version that has them
CODES = ("u8", "s16")  # those that stand for real numbers on a grid
SEVERAL_OUTPUTS = 4  # the first format version that has them

Shape = tuple[int, ...]
Output = Any  # what a call returns: an array, or a list of arrays of a network with several outputs


@dataclass
class Activation:
    """What a node writes, or the input: the code q means the real number `scale * (q - zero_point)`.

    Codes are u8, 0..255, or s16, -32767..32767 with the zero point 0. i32 are the token ids of an input.
    """

    name: str
    shape: Shape  # (C, H, W), (T, D) or (F,), without the batch
    dtype: str = "u8"  # one of DTYPES
    scale: float = 1.0
    zero_point: int = 0


@dataclass
class Node:
    """One operation, its keys as in docs/format.md. Weights are int8 codes of `bits` bits in their full shape."""

    op: str
    name: str
    inputs: list[int]
    output: int
    attributes: dict[str, Any] = field(default_factory=dict)  # stride, padding, clamp, residual_multiplier...
    constants: dict[str, np.ndarray] = field(default_factory=dict)  # weight, multiplier, bias, table, index...
    bits: int | None = None  # where there is a weight


@dataclass
class Member:
    """One network: tensors[0] is its input, the output of nodes[-1] its output, unless it has several."""

    name: str
    tensors: list[Activation]
    nodes: list[Node]
    preprocess_table: np.ndarray | None = None  # uint8 [C, 256]
    outputs: list[int] | None = None  # ids of two or more f32 tensors

    @property
    def output_ids(self) -> list[int]:
        return [self.nodes[-1].output] if self.outputs is None else self.outputs

    @property
    def output(self) -> Activation:
        """The only one, or the first."""
        return self.tensors[self.output_ids[0]]


@dataclass
class Graph:
    """A model file: one member, or an ensemble with a rule to combine them."""

    members: list[Member]
    combine: str | None = None  # None, or one of COMBINE
    preprocess: dict[str, list[float]] | None = None  # {"mean": [...], "std": [...]}
    classes: list[str] | None = None
    vocabulary: int | None = None  # of token ids, which are then the input
    variable: bool = False  # texts may be shorter than the input shape says

    @property
    def input_shape(self) -> Shape:
        return self.members[0].tensors[0].shape
