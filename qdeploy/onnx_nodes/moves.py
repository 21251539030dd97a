"""concat, reshape, gather, tokens and image: elements that move, on one grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from qdeploy.graph import Activation, Node
from qdeploy.onnx_nodes.writer import Value, Writer


def concat(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    axis = 2 if node.attributes.get("axis") == "channels" else 1
    real = writer.add("Concat", [writer.real(value) for value in inputs], axis=axis)
    return writer.value(real, node, output, inputs[0].rows)


def reshape(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    return writer.value(writer.reshape(writer.real(inputs[0]), output.shape), node, output)


def gather(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    """What reads the index -1 reads a 0 behind the last row (channel)."""
    value, index = inputs[0], node.constants["index"].astype(np.int64)
    shape, of_rows = value.tensor.shape, node.attributes["axis"] == "rows"
    real = writer.real(value)
    if of_rows and len(shape) != 2:  # to [N, channels, rows] of an image, [N, 1, channels] of a vector
        real = writer.reshape(real, (shape[0], -1) if len(shape) == 3 else (1, -1), "by_rows")
    axis = _axis(shape, of_rows)
    if (index == -1).any():
        dimensions = 3 if of_rows else len(shape) + 1
        pads = np.zeros(2 * dimensions, np.int64)
        pads[dimensions + axis] = 1
        count = math.prod(shape[1:]) if of_rows and len(shape) == 3 else (1, *shape)[axis]
        index = np.where(index == -1, 1 if of_rows and len(shape) == 1 else count, index)
        real = writer.add("Pad", [real, writer.constant(pads, "pads")], "padded")
    real = writer.add("Gather", [real, writer.constant(index, "index")], axis=axis)
    if of_rows:
        real = _from_rows(writer, real, len(shape) == 3, output)
    return writer.value(real, node, output, None if of_rows else value.rows)


def _axis(shape: Sequence[int], of_rows: bool) -> int:
    if of_rows:
        return 2 if len(shape) == 3 else 1
    return 1 if len(shape) == 3 else len(shape)


def _from_rows(writer: Writer, real: str, channels_first: bool, output: Activation) -> str:
    """Rows [N, channels, rows] or [N, rows, channels] as the output."""
    if channels_first != (len(output.shape) == 3):
        real = writer.add("Transpose", [real], "swapped", perm=[0, 2, 1])
    return real if len(output.shape) == 2 else writer.reshape(real, output.shape, "shaped")


def tokens(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    flat = writer.reshape(writer.real(inputs[0]), (0, -1), "flat")
    return writer.value(writer.add("Transpose", [flat], perm=[0, 2, 1]), node, output)


def image(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    swapped = writer.add("Transpose", [writer.real(inputs[0])], "swapped", perm=[0, 2, 1])
    return writer.value(writer.reshape(swapped, output.shape), node, output)


OPS = {"concat": concat, "reshape": reshape, "gather": gather, "tokens": tokens, "image": image}
