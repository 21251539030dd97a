"""A model file as an ONNX graph, in float32 or in int8 (QDQ), so that other runtimes can run the same network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy.errors import InputError
from qdeploy.graph import Activation, Graph, Member, Node
from qdeploy.validate import member_at, node_at

if TYPE_CHECKING:
    import onnx

OPSET = 17
LARGEST = 2**31 - 2**20  # bytes of constants: a protobuf message ends at 2 GiB


def to_onnx(graph: Graph, quantized: bool) -> onnx.ModelProto:
    """The network of `graph` as ONNX: input `x` f32 [N, C, H, W] (or [N, F]), one f32 output `y`, dynamic batch.

    `quantized=False` gives the float32 network that the integers stand for: the codes and multipliers turned back
    into real weights, no rounding between the layers. `quantized=True` gives the same integers in QDQ form (u8
    activations, s8 weights per channel), which onnxruntime and OpenVINO run as int8, with roundings of their own.
    Raises InputError for a table that is not the identity (its float32 twin is not in the file) and for an average pool
    that weights border windows in a way that ONNX has not, and for more than the 2 GiB that one ONNX message can hold.
    """
    import onnx
    from onnx import TensorProto, helper

    writer = _Writer(quantized)
    outputs = [writer.member(member) for member in graph.members]
    if writer.nbytes > LARGEST:
        raise InputError(
            f"expected at most 2 GiB of constants in an ONNX graph, got {writer.nbytes} bytes - at the graph"
        )
    if graph.combine == "probs":
        outputs = [writer.add("Softmax", [name], axis=-1) for name in outputs]
    y = outputs[0] if len(outputs) == 1 else writer.add("Mean", outputs)
    if graph.combine == "logits":
        y = writer.add("Softmax", [y], axis=-1)
    writer.nodes.append(helper.make_node("Identity", [y], ["y"]))
    shapes = [("x", graph.input_shape), ("y", graph.members[0].output.shape)]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape]) for name, shape in shapes)
    body = helper.make_graph(writer.nodes, "qdeploy", [x], [y], writer.initializers)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    return model


class _Writer:
    """Collects the nodes and initializers of one ONNX graph. Names of values count upwards."""

    def __init__(self, quantized: bool) -> None:
        self.quantized = quantized
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.nbytes = 0  # of the initializers
        self.at = ""  # the member that is being written, for error texts

    def add(self, op: str, inputs: list[str], **attributes: Any) -> str:
        from onnx import helper

        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(self, value: np.ndarray | np.generic) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        self.nbytes += value.nbytes
        return name

    def member(self, member: Member) -> str:
        """Append one network; returns the name of its f32 output."""
        self.at = member_at(member.name)
        values = {0: self.activation("x", member.tensors[0])}
        for node in member.nodes:
            inputs = [(values[i], member.tensors[i]) for i in node.inputs]
            output = member.tensors[node.output]
            self._check(node, output)
            value = OPS[node.op](self, node, inputs, output)
            if len(output.shape) == 1 and len(inputs[0][1].shape) == 3 and node.op != "reshape":
                value = self.add("Flatten", [value], axis=1)  # scores [C, 1, 1] that the file declares as [C]
            values[node.output] = self.activation(value, output)
        return values[member.nodes[-1].output]

    def _check(self, node: Node, output: Activation) -> None:
        """Raise InputError for what only files of format version 3 hold."""
        if node.op in OPS and output.dtype != "s16" and len(output.shape) != 2:
            return
        got = f"{node.op} to {output.dtype} {list(output.shape)}"
        raise InputError(f"expected what ONNX is written of, format version 2, got {got} - at {node_at(node, self.at)}")

    def activation(self, value: str, tensor: Activation) -> str:
        """Round to the codes of a u8 tensor and back, where the graph is quantized."""
        if not self.quantized or tensor.dtype != "u8":
            return value
        grid = [self.constant(np.float32(tensor.scale)), self.constant(np.uint8(tensor.zero_point))]
        return self.add("DequantizeLinear", [self.add("QuantizeLinear", [value, *grid]), *grid])

    def weight(self, codes: np.ndarray, scale: np.ndarray) -> str:
        """Real weights codes*scale[channel]. QDQ allows no negative scale, so its sign goes to the codes."""
        if not self.quantized:
            return self.constant((codes * scale.reshape(-1, *[1] * (codes.ndim - 1))).astype(np.float32))
        factor = np.where(scale < 0, -1, 1) * finer(codes)
        magnitude = np.maximum(np.abs(scale / factor), np.finfo(np.float32).tiny).astype(np.float32)
        signed = np.clip(codes * factor.reshape(-1, *[1] * (codes.ndim - 1)), -128, 127).astype(np.int8)
        zeros = self.constant(np.zeros(len(scale), np.int8))
        return self.add("DequantizeLinear", [self.constant(signed), self.constant(magnitude), zeros], axis=0)

    def clamp(self, value: str, node: Node, output: Activation) -> str:
        """ReLU and its kin are the clamp; a bound at 0 or 255 is only the end of the u8 range unless it is the zero."""
        if output.dtype != "u8":
            return value
        lo, hi = node.attributes["clamp"]
        if hi == 255 and lo == output.zero_point:
            return self.add("Relu", [value])
        if lo == 0 and hi == 255:
            return value
        bounds = [output.scale * (lo - output.zero_point) if lo > 0 or output.zero_point == 0 else -np.inf]
        bounds += [output.scale * (hi - output.zero_point) if hi < 255 else np.inf]
        return self.add("Clip", [value, *(self.constant(np.float32(bound)) for bound in bounds)])


def finer(codes: np.ndarray) -> np.ndarray:
    """What the codes [N, ...] of each channel can be multiplied by within 7 bits, beyond which some runtimes saturate.

    onnxruntime rounds the bias to whole accumulators. Beside codes of 1, as in the BatchNorms of DenseNet-121 that come
    before a convolution, that is 2 codes of the output: the correlation of its logits with ours was 0.9945, now 0.9995.
    """
    return np.maximum(63 // np.maximum(np.abs(codes.reshape(len(codes), -1).astype(np.int64)).max(axis=1), 1), 1)


Inputs = list[tuple[str, Activation]]


def _weighted(writer: _Writer, node: Node, inputs: Inputs, output: Activation) -> str:
    """conv2d and linear: out code = m*acc + b (+ m_res*q_res), so in real numbers the weight is codes*m*s_out/s_in."""
    (value, x), residual = inputs[0], inputs[1:]
    multiplier, bias = (node.constants[key].astype(np.float64) for key in ("multiplier", "bias"))
    bias = bias - output.zero_point
    for _, tensor in residual:
        bias = bias + node.attributes["residual_multiplier"] * tensor.zero_point
    weight = writer.weight(node.constants["weight"], multiplier * output.scale / x.scale)
    operands = [value, weight, writer.constant((bias * output.scale).astype(np.float32))]
    if node.op == "linear":
        result = writer.add("Gemm", operands, transB=1)
    else:
        keys = {"strides": "stride", "pads": "padding", "dilations": "dilation"}
        attributes = {name: list(node.attributes[key]) for name, key in keys.items()}
        result = writer.add("Conv", operands, group=node.attributes["groups"], **attributes)
    for name, tensor in residual:
        # The engine adds in its accumulators. onnxruntime runs a convolution as int8 only if its output is rounded too.
        result = writer.activation(result, _without_residual(node.attributes["residual_multiplier"], tensor, output))
        factor = node.attributes["residual_multiplier"] * output.scale / tensor.scale
        result = writer.add("Add", [result, _scaled(writer, name, factor)])
    return writer.clamp(result, node, output)


def _without_residual(multiplier: float, residual: Activation, output: Activation) -> Activation:
    """The grid of (output - residual) over its whole range, which is (1 + |multiplier|) times that of the output."""
    size = abs(multiplier)
    largest = 255 - residual.zero_point if multiplier > 0 else residual.zero_point
    zero_point = (output.zero_point + size * largest) / (1 + size)
    return Activation("", output.shape, "u8", output.scale * (1 + size), round(zero_point))


def _scaled(writer: _Writer, value: str, factor: float) -> str:
    exact = abs(factor - 1) < 1e-5  # 1 but for the rounding of the constants in the file
    return value if exact else writer.add("Mul", [value, writer.constant(np.float32(factor))])


def _shifted(writer: _Writer, value: str, codes: float, output: Activation) -> str:
    exact = abs(codes) < 1e-3  # 0 but for the rounding of the constants in the file
    return value if exact else writer.add("Add", [value, writer.constant(np.float32(codes * output.scale))])


def _add(writer: _Writer, node: Node, inputs: Inputs, output: Activation) -> str:
    multipliers = node.attributes["multipliers"]
    factors = [m * output.scale / tensor.scale for m, (_, tensor) in zip(multipliers, inputs, strict=True)]
    terms = [_scaled(writer, name, factor) for factor, (name, _) in zip(factors, inputs, strict=True)]
    offset = sum(m * tensor.zero_point for m, (_, tensor) in zip(multipliers, inputs, strict=True))
    offset += node.attributes["bias"] - output.zero_point
    return writer.clamp(_shifted(writer, writer.add("Add", terms), offset, output), node, output)


def _mul(writer: _Writer, node: Node, inputs: Inputs, output: Activation) -> str:
    """ONNX broadcasts a gate [N, C, 1, 1] as the engine does."""
    (a, a_tensor), (b, b_tensor) = inputs
    factor = node.attributes["multiplier"] * output.scale / (a_tensor.scale * b_tensor.scale)
    result = _scaled(writer, writer.add("Mul", [a, b]), factor)
    return writer.clamp(_shifted(writer, result, node.attributes["bias"] - output.zero_point, output), node, output)


def _max_pool(writer: _Writer, node: Node, inputs: Inputs, output: Activation) -> str:
    attributes = {f"{key}s": list(node.attributes[key]) for key in ("stride", "dilation")}
    shape = list(node.attributes["kernel"])
    return writer.add(
        "MaxPool", [inputs[0][0]], kernel_shape=shape, pads=list(node.attributes["padding"]), **attributes
    )


def _avg_pool(writer: _Writer, node: Node, inputs: Inputs, output: Activation) -> str:
    """One multiplier m: sum over the window times m. One for each number n of elements: their mean times n*m[n-1]."""
    (value, x) = inputs[0]
    multiplier = node.constants["multiplier"].astype(np.float64)
    window = int(np.prod(node.attributes["kernel"]))
    per_mean = multiplier * (window if multiplier.size == 1 else np.arange(1, window + 1))
    if np.ptp(per_mean) > 1e-5 * np.abs(per_mean).max():
        at = node_at(node, writer.at)
        raise InputError(f"expected an average over the real elements, got another weighting - at {at}")
    mean = writer.add(
        "AveragePool",
        [value],
        kernel_shape=list(node.attributes["kernel"]),
        strides=list(node.attributes["stride"]),
        pads=list(node.attributes["padding"]),
        count_include_pad=int(multiplier.size == 1),
    )
    result = _scaled(writer, mean, per_mean[0] * output.scale / x.scale)
    return writer.clamp(_shifted(writer, result, node.attributes["bias"] - output.zero_point, output), node, output)


def _table(writer: _Writer, node: Node, inputs: Inputs, output: Activation) -> str:
    (value, x) = inputs[0]
    real = x.scale * (np.arange(256.0) - x.zero_point)
    identity = real
    if output.dtype == "u8":
        identity = np.clip(np.rint(real / output.scale + output.zero_point), 0, 255)
    if np.abs(node.constants["table"].astype(np.float64) - identity).max() > 1:
        expected = "no function but the identity (a table has no float32 twin)"
        raise InputError(f"expected {expected}, got one - at {node_at(node, writer.at)}")
    return value


def _concat(writer: _Writer, node: Node, inputs: Inputs, output: Activation) -> str:
    return writer.add("Concat", [name for name, _ in inputs], axis=1)


def _reshape(writer: _Writer, node: Node, inputs: Inputs, output: Activation) -> str:
    return writer.add("Reshape", [inputs[0][0], writer.constant(np.array([-1, *output.shape], np.int64))])


OPS: dict[str, Callable[[_Writer, Node, Inputs, Activation], str]] = {
    "conv2d": _weighted,
    "linear": _weighted,
    "add": _add,
    "mul": _mul,
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "table": _table,
    "concat": _concat,
    "reshape": _reshape,
}
