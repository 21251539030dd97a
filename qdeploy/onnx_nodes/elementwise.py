"""add, mul, rescale and table: element by element."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qdeploy.graph import Activation, Node
from qdeploy.onnx_nodes.functions import slopes_of, which
from qdeploy.onnx_nodes.writer import Value, Writer

INT32 = 6  # TensorProto.INT32


def add(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    multipliers = node.attributes["multipliers"]
    terms = []
    for multiplier, value, role in zip(multipliers, inputs, "ab", strict=True):
        factor = multiplier * output.scale / value.tensor.scale
        terms.append(writer.scaled(writer.real(value), factor, role))
    offset = sum(m * value.tensor.zero_point for m, value in zip(multipliers, inputs, strict=True))
    offset += node.attributes["bias"] - output.zero_point
    return writer.value(writer.shifted(writer.add("Add", terms), offset, output), node, output, inputs[0].rows)


def mul(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    """ONNX broadcasts a gate [N, C, 1, 1], [N, 1, H, W] or [N, 1, D] as the engine does."""
    a, b = inputs
    factor = node.attributes["multiplier"] * output.scale / (a.tensor.scale * b.tensor.scale)
    product = writer.add("Mul", [writer.real(a), writer.real(b)])
    real = writer.shifted(writer.scaled(product, factor, "scaled"), node.attributes["bias"] - output.zero_point, output)
    return writer.value(real, node, output, a.rows)


def rescale(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    x, multiplier = inputs[0], node.attributes["multiplier"]
    bias = node.attributes["bias"] + multiplier * x.tensor.zero_point  # r = m*q + b, the zero point in b
    return writer.value(writer.affine(x, multiplier, bias, output), node, output, x.rows)


def table(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    """The function that gives exactly these codes, else a Gather of their 256 numbers, which every runtime has. With
    a Gather of the codes OpenVINO 2026.4 took 12 times as long for four convolutions and four tables.

    In float32 the function need only be within a code of the table, whose writer may have rounded on the way; where
    there is none the input is rounded to its codes as well.
    """
    x, entries = inputs[0], node.constants["table"]
    if entries.ndim == 2:
        return _table_by_channel(writer, x, entries, output)
    for tolerance in (0,) if writer.quantized else (0, 1):
        function = which(entries, x.tensor, output, tolerance)
        if function:
            return writer.value(function.write(writer, writer.real(x)), node, output, x.rows)
    return _looked_up(writer, x, entries, output, writer.add("Cast", [writer.codes(x)], "index", to=INT32))


def _looked_up(writer: Writer, x: Value, entries: np.ndarray, output: Activation, index: str) -> Value:
    if output.dtype != "f32":
        entries = (output.scale * (entries.astype(np.float64) - output.zero_point)).astype(np.float32)
    found = Value(output, writer.name, x.rows, writer.add("Gather", [writer.constant(entries, "table"), index]))
    if writer.quantized and output.dtype != "f32":
        writer.codes(found)
        found.real = None
    return found


def _table_by_channel(writer: Writer, x: Value, entries: np.ndarray, output: Activation) -> Value:
    """PRelu in float32, where every row is a leaky ReLU; else the tables one behind the other, and Gather."""
    slopes = None if writer.quantized else slopes_of(entries, x.tensor, output)
    channels = (-1, 1, 1) if len(x.tensor.shape) == 3 else (-1,)
    if slopes is not None:
        slope = writer.constant(slopes.reshape(channels), "slope")
        return Value(output, writer.name, x.rows, real=writer.add("PRelu", [writer.real(x), slope]))
    offsets = writer.constant((256 * np.arange(len(entries), dtype=np.int32)).reshape(channels), "channel_offsets")
    index = writer.add("Add", [writer.add("Cast", [writer.codes(x)], "codes_in", to=INT32), offsets], "index")
    return _looked_up(writer, x, entries.ravel(), output, index)


OPS = {"add": add, "mul": mul, "rescale": rescale, "table": table}
