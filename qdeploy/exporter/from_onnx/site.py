"""A node of an ONNX graph as rules see it: its attributes, its constants, what was found out so far."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qdeploy.exporter.elements import BATCH
from qdeploy.exporter.from_onnx.model import File, Node
from qdeploy.exporter.layers import Layer
from qdeploy.exporter.lowering import site as lowering
from qdeploy.exporter.lowering.moved import Value

OPERATOR = (
    "an operator that the engine has (Conv, Gemm, MatMul by a constant, BatchNormalization, other norms, functions of "
    "one tensor, sums and products of two, pools, means, and whatever moves rows or channels)"
)
MOST_COMPUTED = 2**24  # elements of one tensor that a file does not hold, but lets compute
MOST_IN_ALL = 2**26
MOST_NAME = 120  # characters of a name: 512 bytes in a model file
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass
class State:
    """What is known of a network while it is lowered."""

    file: File
    layers: list[Layer] = field(default_factory=list)
    quantized: dict[Any, Value] = field(default_factory=dict)  # by tensor and grid: a second quantizer is the first
    notes: list[str] = field(default_factory=list)
    computed: int = 0  # elements of constants


@dataclass
class Site(lowering.Site):
    """Where an operator stands in the graph."""

    noun = "node"
    node: Node
    state: State

    @property
    def layers(self) -> list[Layer]:  # type: ignore[override]
        return self.state.layers

    @property
    def name(self) -> str:
        return _UNFIT.sub("?", self.node.name)[:MOST_NAME]

    @property
    def tensor(self) -> str:
        return self.node.outputs[0]

    @property
    def detail(self) -> str:
        return f" ({self.node.op})"

    # ---- Attributes and constants ------------------------------------------------------------------------------------

    def integer(self, key: str, default: int) -> int:
        value = self.node.attributes.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(f"an integer as attribute {key}", type(value).__name__)
        return value

    def integers(self, key: str) -> list[int] | None:
        value = self.node.attributes.get(key)
        if value is not None and not (isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value)):
            self.fail(f"integers as attribute {key}", type(value).__name__)
        return None if value is None else list(value)

    def number(self, key: str, default: float) -> float:
        value = self.node.attributes.get(key, default)
        if not isinstance(value, (int, float)):
            self.fail(f"a number as attribute {key}", type(value).__name__)
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self.node.attributes.get(key, default)
        if not isinstance(value, str):
            self.fail(f"a text as attribute {key}", type(value).__name__)
        return value

    def constant(self, value: Any, what: str) -> np.ndarray:
        """`value`, which must depend on nothing."""
        if not isinstance(value, np.ndarray):
            self.fail(f"{what} that is a constant", "none" if value is None else "one that depends on the input")
        self.writes_out(value)
        return value

    def axes(self, value: Any, key: str = "axes") -> list[int] | None:
        """An attribute in old opsets, an input in new ones."""
        if value is None:
            return self.integers(key)
        return [int(v) for v in self.constant(value, key).reshape(-1)]

    def dimension(self, axis: int, rank: int) -> int:
        """Of a tensor of `rank` dimensions, counted from its end where it is negative."""
        if not -rank <= axis < rank:
            self.fail(f"a dimension of {rank}", f"{axis}")
        return axis % rank

    # ---- Limits ------------------------------------------------------------------------------------------------------

    def computes(self, count: int, held: int = 0) -> None:
        """Before an array of `count` elements is made of constants with `held` elements, or of numbers of elements."""
        self.state.computed += count
        most = max(MOST_COMPUTED, BATCH * held)
        if count > most or self.state.computed > max(MOST_IN_ALL, 16 * self._held()):
            self.fail(f"at most {MOST_COMPUTED} elements of a computed constant", f"{count}")

    def writes_out(self, constant: np.ndarray) -> None:
        """Before all elements of `constant` stand in memory. It may be one number, as ConstantOfShape has it: 400 bytes
        of a file could ask for gigabytes."""
        if not any(constant.strides):
            self.computes(constant.size, 1)

    def _held(self) -> int:
        return sum(array.size for array in self.state.file.constants.values())
