"""What a row of the table of ops says, and the checks that ops share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from qdeploy.checks import (
    Facts,
    alternatives,
    array,
    expect,
    finite,
    integers,
    key_of,
    kind,
    number,
    quoted,
    shape_text,
)
from qdeploy.graph import CODES, DTYPES, Activation, Node, Shape

MAX_ATTRIBUTE = 65_535  # strides, paddings, dilations, groups, kernels, heads, prefixes
Kind = type[int] | type[float] | type[str]
INNER: Mapping[str, Kind] = {"inner_clamp": int, "inner_multiplier": float, "inner_bias": float}  # of codes to add
Rows = int | None  # of an activation: how many more than the text has, or None where the text's length does not matter
Shaper = Callable[[Node, Sequence[Shape]], Shape | None]
Check = Callable[[Node, Sequence[Activation], Activation, str, Facts], None]


def fixed_rows(node: Node, inputs: Sequence[Activation], rows: Sequence[Rows], at: str) -> Rows:
    """Of an op that needs to know how many rows there are."""
    expect(all(r is None for r in rows), "inputs whose rows do not depend on a text's length", "others", at)
    return None


def same_rows(node: Node, inputs: Sequence[Activation], rows: Sequence[Rows], at: str) -> Rows:
    """Of an op that does the same with every row."""
    expect(all(r == rows[0] for r in rows), "inputs of one length for every text", "others", at)
    return rows[0]


def version_1(node: Node, inputs: Sequence[Activation]) -> int:
    """Of a node that brings no version of its own."""
    return 1


@dataclass(frozen=True)
class Op:
    """The facts of one operation.

    inputs: fewest and most.
    output: "requantized" is a number r that becomes clamp(rint(r), lo, hi) as u8 or s16, or stays itself as f32;
        "same_grid" are codes of the inputs, whose dtype, scale and zero point the output shares; "table" is an entry.
    shape: of the output for the shapes of the inputs; None where only the output tensor says it. The node must have
        passed `check`, or be as well formed as that asks.
    check: raises ModelError for attributes, constants, inputs and an output that do not fit. That the keys are there
        and the numbers of the inputs are checked before; what follows from `output` is checked elsewhere.
    attributes: numbers and strings in the graph's JSON, and which they are.
    constants: arrays, which are tensors of the file.
    nullable: those of both that may be null: an attribute is None then, a constant is not in the node.
    token_attributes: those that come only with an output of shape [T, D].
    residual: the last input may be left out, and may be s16; with it comes the attribute residual_multiplier, and
        those of INNER may come: all or none.
    reads, writes: the dtypes that inputs and output may have.
    rows: of the output where texts have any length; raises ModelError where the op cannot have such inputs.
    bound: raises ModelError for results beyond the output's range, where that takes a pass over the weights.
    version: the first format version that has it.
    variant_since: the first format version that has it for shapes as these, of inputs and constants, and attributes.
    """

    inputs: tuple[int, int]
    output: Literal["requantized", "same_grid", "table"]
    shape: Shaper
    check: Check
    attributes: Mapping[str, Kind] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    nullable: tuple[str, ...] = ()
    token_attributes: Mapping[str, Kind] = field(default_factory=dict)
    residual: bool = False
    reads: tuple[str, ...] = ("u8",)
    writes: tuple[str, ...] = ("u8", "f32")
    rows: Callable[[Node, Sequence[Activation], Sequence[Rows], str], Rows] = fixed_rows
    bound: Check | None = None
    version: int = 1
    variant_since: Callable[[Node, Sequence[Activation]], int] = version_1

    @property
    def requantized(self) -> bool:
        return self.output == "requantized"

    @property
    def same_grid(self) -> bool:
        return self.output == "same_grid"

    @property
    def may_be_f32(self) -> bool:
        """As the output of the last node."""
        return "f32" in self.writes

    @property
    def may_be_flat(self) -> bool:
        """Scores by global pooling: an f32 output [C, 1, 1] of a window may be declared [C]."""
        return self.requantized and "stride" in self.attributes

    @property
    def has_weight(self) -> bool:
        return "weight" in self.constants

    def may_read(self, index: int) -> tuple[str, ...]:
        """The dtypes of input number `index`."""
        return CODES if self.residual and index == self.inputs[1] - 1 else self.reads

    def attribute_types(self, node: Node, output: Activation, keys: Collection[str]) -> dict[str, Kind]:
        """Exactly the attributes that `node` has: those of its op, and what its residual and its output bring.

        keys: those that are there, by which a residual's inner codes are known.
        """
        types = dict(self.attributes)
        if len(output.shape) == 2:
            types |= self.token_attributes
        if self.requantized and output.dtype == "u8":
            types["clamp"] = int
        if self.residual and len(node.inputs) == self.inputs[1]:
            types["residual_multiplier"] = float
            if "inner_clamp" in keys:
                types |= INNER
        return types

    def since(self, node: Node, inputs: Sequence[Activation]) -> int:
        """The first format version that has this node, for these inputs."""
        return max(self.version, self.variant_since(node, inputs))


# ---- What ops share --------------------------------------------------------------------------------------------------


def attribute(node: Node, key: str, at: str) -> tuple[Any, str]:
    return node.attributes[key], key_of(key, at)


def number_of(node: Node, key: str, at: str) -> float:
    return number(*attribute(node, key, at))


def check_clamp(node: Node, key: str, at: str) -> None:
    low, high = integers(node.attributes[key], 2, 2, 0, 255, key_of(key, at))
    expect(low <= high, "clamp [lo, hi] with lo <= hi", shape_text([low, high]), at)


def choice_of(node: Node, key: str, choices: Sequence[str], at: str) -> str:
    """A string, one of `choices`."""
    value, place = attribute(node, key, at)
    expect(isinstance(value, str), "a string", kind(value), place)
    expect(value in choices, alternatives([quoted(choice) for choice in choices]), quoted(value), place)
    return value


def floats(node: Node, key: str, shape: Sequence[int], at: str, facts: Facts) -> np.ndarray:
    value = array(node.constants[key], np.float32, shape, key_of(key, at))
    finite(value, facts, key_of(key, at))
    return value


def indices(node: Node, key: str, shape: Sequence[int], at: str) -> np.ndarray:
    """A constant of integers, at least one."""
    value = array(node.constants[key], np.int32, shape, key_of(key, at))
    expect(value.size > 0, "at least one integer", "none", key_of(key, at))
    return value


def largest(value: np.ndarray) -> float:
    """The largest magnitude."""
    return float(np.abs(value.astype(np.float64)).max(initial=0.0))


def largest_by_count(multiplier: np.ndarray) -> float:
    """The largest magnitude of n*multiplier[n-1]."""
    return float(np.max(np.arange(1, multiplier.size + 1) * np.abs(multiplier.astype(np.float64))))


def value_range(value: np.ndarray) -> tuple[int, int]:
    return int(value.min()), int(value.max())


def most(tensor: Activation) -> float:
    """The largest magnitude of its codes, with or without the zero point."""
    return 32767.0 if tensor.dtype == "s16" else 255.0


def check_bound(bound: float, output: Activation, at: str) -> None:
    """So that no result leaves the range of the conversion to an integer (codes) or of sums over members (f32)."""
    check_power(bound, limit(output), at)


def check_power(bound: float, power: int, at: str) -> None:
    expect(bound < 2.0**power, f"results below 2^{power}", f"up to {bound:.3g}", at)


def limit(output: Activation) -> int:
    """The power of two that results stay below."""
    return 100 if output.dtype == "f32" else 30


def like_first(node: Node, inputs: Sequence[Shape]) -> Shape:
    return inputs[0]


def check_shape(output: Activation, shape: Shape, at: str) -> None:
    expect(output.shape == shape, f"an output of shape {shape_text(shape)}", shape_text(output.shape), at)


def check_tokens(tensor: Activation, what: str, at: str) -> None:
    expect(len(tensor.shape) == 2, f"{what} of shape [T, D]", shape_text(tensor.shape), at)


def channels_of(shape: Shape) -> int:
    return shape[0] if len(shape) == 3 else shape[-1]


def rows_of(shape: Shape) -> int:
    """Tokens, or pixels; a vector is one row."""
    return math.prod(shape) // channels_of(shape)


def known_dtypes(dtypes: Sequence[str], version: int) -> list[str]:
    """Those of them that files of this version know."""
    return [dtype for dtype in dtypes if DTYPES[dtype] <= version]
