"""What the nodes of all ops are written with: names, constants, and values as codes and as real numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy.errors import InputError
from qdeploy.graph import Activation, Node, Shape
from qdeploy.ops.op import Rows

if TYPE_CHECKING:
    import onnx

OPSET = 17
OPSET_NARROW_AND_WIDE = 21  # the first with 4-bit and with 16-bit codes
INPUTS = ("x", "ids", "mask")  # tensors of the graph that are no node's, whatever the nodes are named
ZERO_POINT: dict[str, type] = {"u8": np.uint8, "s16": np.int16}


@dataclass
class Value:
    """What a node writes: names of ONNX tensors, one of them at least."""

    tensor: Activation
    name: str
    rows: Rows = None  # how many more than the text has
    real: str | None = None
    codes: str | None = None


class Writer:
    """Collects the nodes and initializers of one ONNX graph.

    The ONNX node that stands for a node of ours has its name, and so has what it writes; others are `name/role`. In a
    quantized graph `name/codes` are the codes of our node.
    """

    def __init__(self, quantized: bool, int4: bool, reserved: Sequence[str]) -> None:
        """`reserved`: the names of all nodes, which no role of another one may take."""
        self.quantized = quantized
        self.int4 = int4
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.nbytes = 0  # of the initializers
        self.opset = OPSET
        self.name = ""  # of what is being written
        self.at = ""  # the same for error texts
        self._taken = set(reserved)
        self._named: set[str] = set()  # the nodes so far
        self._masks: dict[int, str] = {}
        self._length: str | None = None

    def add(self, op: str, inputs: Sequence[str], role: str = "", **attributes: Any) -> str:
        """Append one ONNX node; returns the name of its output. At most one node of a name has no role."""
        from onnx import helper

        name = self._free(role) if role else self.name
        self._named.add(name)
        output = self._free("output") if name in (*INPUTS, "y") else name
        self.nodes.append(helper.make_node(op, inputs, [output], name, **attributes))
        return output

    def constant(self, value: np.ndarray | np.generic, role: str) -> str:
        """Raises InputError for numbers that float32 does not hold."""
        from onnx import numpy_helper

        if value.dtype == np.float32 and not np.isfinite(value).all():
            raise InputError(f"expected constants within float32, got beyond - at {self.at}")
        return self._initializer(numpy_helper.from_array(np.asarray(value, order="C"), self._free(role)), value.nbytes)

    def number(self, value: float, role: str) -> str:
        with np.errstate(over="ignore"):
            return self.constant(np.float32(value), role)

    def integers(self, values: Sequence[int], role: str) -> str:
        return self.constant(np.array(values, np.int64), role)

    def nibbles(self, codes: np.ndarray, role: str) -> str:
        """Codes of -8..7 in half a byte each."""
        from onnx import TensorProto, helper

        self.opset = OPSET_NARROW_AND_WIDE
        name = self._free(role)
        return self._initializer(
            helper.make_tensor(name, TensorProto.INT4, codes.shape, codes.ravel()), (codes.size + 1) // 2
        )

    def _initializer(self, tensor: onnx.TensorProto, nbytes: int) -> str:
        self.initializers.append(tensor)
        self.nbytes += nbytes
        return tensor.name

    def _free(self, role: str) -> str:
        """A name that is not taken yet, and is from now on."""
        name, count = f"{self.name}/{role}", 1
        while name in self._taken:
            count += 1
            name = f"{self.name}/{role}_{count}"
        self._taken.add(name)
        return name

    def output(self, value: str, name: str) -> str:
        """What an output of the graph is called: `name`, or the first of name_2, name_3... that is free."""
        found, count = name, 1
        while found in self._taken and found != value or found in INPUTS:
            count += 1
            found = f"{name}_{count}"
        self._taken.add(found)
        return found

    # ---- Codes and real numbers --------------------------------------------------------------------------------------

    def real(self, value: Value) -> str:
        if value.real is None:
            assert value.codes is not None
            value.real = self._at(value, "DequantizeLinear", value.codes, "real")
        return value.real

    def codes(self, value: Value) -> str:
        if value.codes is None:
            assert value.real is not None
            value.codes = self._at(value, "QuantizeLinear", value.real, "codes")
        return value.codes

    def _at(self, value: Value, op: str, name: str, role: str) -> str:
        """At the name of the value, which may be another than that of the node that reads it. A QuantizeLinear is the
        node of that name where the value has no other: a table between two grids."""
        reader, self.name = self.name, value.name
        if op == "QuantizeLinear" and value.tensor.dtype == "s16":  # -32768 is no code
            bound = 32767 * value.tensor.scale
            name = self.add("Clip", [name, *(self.number(b, "bound") for b in (-bound, bound))], "clipped")
        result = self.add(op, [name, *self.grid(value.tensor)], role)
        if op == "QuantizeLinear" and value.name not in self._named:
            self._named.add(value.name)
            self.nodes[-1].name = value.name
        self.name = reader
        return result

    def grid(self, tensor: Activation) -> list[str]:
        if tensor.dtype == "s16":
            self.opset = OPSET_NARROW_AND_WIDE
        zero_point = ZERO_POINT[tensor.dtype](tensor.zero_point)
        return [self.number(tensor.scale, "scale"), self.constant(zero_point, "zero_point")]

    def value(self, real: str, node: Node, output: Activation, rows: Rows = None) -> Value:
        """What `node` writes, from the real numbers: clamped and, where the graph is quantized, rounded."""
        if len(output.shape) == 1 and node.op in ("conv2d", "avg_pool2d"):  # scores [C, 1, 1] declared as [C]
            real = self.add("Flatten", [real], "flat", axis=1)
        result = Value(output, self.name, rows, real)
        lo, hi = node.attributes.get("clamp", (0, 255))
        if output.dtype == "f32" or not self.quantized:
            result.real = self._clamped(real, lo, hi, output)
        elif (lo, hi) == (0, 255):
            self.codes(result)
            result.real = None
        else:  # onnxruntime runs an op in int8 where nothing stands between it and its rounding
            rounded = self.add("QuantizeLinear", [real, *self.grid(output)], "unclamped")
            bounds = [self.constant(np.uint8(bound), "bound") for bound in (lo, hi)]
            result.real, result.codes = None, self.add("Clip", [rounded, *bounds], "codes")
        return result

    def _clamped(self, real: str, lo: int, hi: int, output: Activation) -> str:
        """ReLU and its kin are the clamp; a bound at 0 or 255 is only the end of the u8 range unless it is the zero."""
        if output.dtype != "u8":
            return real
        if hi == 255 and lo == output.zero_point:
            return self.add("Relu", [real], "relu")
        if lo == 0 and hi == 255:
            return real
        limits = np.finfo(np.float32)
        low = output.scale * (lo - output.zero_point) if lo > 0 or output.zero_point == 0 else float(limits.min)
        high = output.scale * (hi - output.zero_point) if hi < 255 else float(limits.max)
        return self.add("Clip", [real, *(self.number(bound, "bound") for bound in (low, high))], "clamp")

    def scaled(self, real: str, factor: float, role: str) -> str:
        exact = abs(factor - 1) < 1e-6  # 1 but for the rounding of the constants in the file
        return real if exact else self.add("Mul", [real, self.number(factor, f"{role}_factor")], role)

    def shifted(self, real: str, codes: float, output: Activation) -> str:
        """`codes` in steps of the output."""
        exact = abs(codes) < 1e-4  # 0 but for the rounding of the constants in the file
        return real if exact else self.add("Add", [real, self.number(codes * output.scale, "offset")], "shift")

    def affine(self, value: Value, multiplier: float, bias: float, output: Activation) -> str:
        """r = multiplier*(q - z) + bias in real numbers."""
        scaled = self.scaled(self.real(value), multiplier * output.scale / value.tensor.scale, "scaled")
        return self.shifted(scaled, bias - output.zero_point, output)

    def reshape(self, name: str, shape: Sequence[int], role: str = "") -> str:
        """To [N, *shape]; a 0 in it keeps the size that stands there."""
        return self.add("Reshape", [name, self.integers([0, *shape], "shape")], role)

    # ---- Texts of any length -----------------------------------------------------------------------------------------

    def text(self, ids: str, mask: str) -> None:
        """The inputs of a graph that takes them."""
        self.name = mask
        self._masks = {0: self.add("Cast", [mask], "real", to=1)}
        self._length = self.add("Shape", [ids], "length", start=1, end=2)

    def rows_of(self, table: str, more: Rows, axis: int = 0) -> str:
        """The first rows of a constant, as many as the text has and `more`."""
        if more is None or self._length is None:
            return table
        end = self._length
        if more:
            end = self.add("Add", [end, self.integers([more], "more")], "end")
        bounds = [self.integers([0], "begin"), end, self.integers([axis], "axis")]
        return self.add("Slice", [table, *bounds], "rows_of_text")

    def mask(self, more: int, shape: Shape) -> str:
        """1 where there is a token and 0 behind, f32 [N, *shape]; one 0 or -1 in it is how many rows there are."""
        if more not in self._masks:
            pads = self.integers([0, more, 0, 0], "mask_pads")
            self._masks[more] = self.add("Pad", [self._masks[0], pads, self.number(1, "one")], "mask")
        return self.reshape(self._masks[more], shape, "mask_shaped")
