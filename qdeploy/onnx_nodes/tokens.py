"""position, mean and norm: over the rows of a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qdeploy.graph import Activation, Node
from qdeploy.onnx_nodes.writer import Value, Writer
from qdeploy.ops.op import channels_of, rows_of


def position(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    """Zeros before the first token stand where the prefix comes; then all rows are added."""
    x, prefix, multiplier = inputs[0], node.attributes["prefix"], node.attributes["multiplier"]
    rows = node.constants["rows"].astype(np.float64) - output.zero_point
    rows[prefix:] += multiplier * x.tensor.zero_point
    more = None if x.rows is None else x.rows + prefix
    real = writer.scaled(writer.real(x), multiplier * output.scale / x.tensor.scale, "scaled")
    if prefix:
        real = writer.add("Pad", [real, writer.integers([0, prefix, 0, 0, 0, 0], "pads")], "behind_prefix")
    table = writer.rows_of(writer.constant((rows * output.scale).astype(np.float32), "rows"), more)
    return writer.value(writer.add("Add", [real, table]), node, output, more)


def mean(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    x, real = inputs[0], writer.real(inputs[0])
    unit = output.scale / x.tensor.scale
    factors = (node.constants["multiplier"].astype(np.float64) * unit).astype(np.float32)
    axis = writer.integers([1], "axis")
    if x.rows is None:
        real = writer.add("ReduceSum", [real, axis], keepdims=0)
        real = writer.add("Mul", [real, writer.constant(factors[-1], "factor")], "scaled")
    else:
        real = writer.add("Mul", [real, writer.mask(x.rows, (-1, 1))], "real_rows")
        real = writer.add("ReduceSum", [real, axis], keepdims=0)
        count = writer.add("ReduceSum", [writer.mask(x.rows, (-1,)), axis], "count", keepdims=1)
        index = writer.add("Sub", [count, writer.number(1, "one")], "index_real")
        index = writer.add("Cast", [index], "index", to=7)
        factor = writer.add("Gather", [writer.constant(factors, "factors"), index], "factor")
        real = writer.add("Mul", [real, factor], "scaled")
    return writer.value(writer.shifted(real, node.attributes["bias"] - output.zero_point, output), node, output)


def norm(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    """Of each row a LayerNormalization. Of groups an InstanceNormalization, whose groups are its channels."""
    x = inputs[0]
    shape, groups = x.tensor.shape, node.attributes["groups"]
    channels = channels_of(shape)
    count = channels if groups is None else channels // groups * rows_of(shape)
    epsilon = node.attributes["epsilon"] * (x.tensor.scale / count) ** 2
    gamma = node.constants["multiplier"].astype(np.float64) * output.scale
    beta = (node.constants["bias"].astype(np.float64) - output.zero_point) * output.scale
    of_rows, is_image = groups is None, len(shape) == 3
    real = writer.real(x)
    if of_rows:
        if is_image:
            real = writer.add("Transpose", [real], "by_pixels", perm=[0, 2, 3, 1])
        scale, bias = (writer.constant(v.astype(np.float32), k) for v, k in ((gamma, "gamma"), (beta, "beta")))
        real = writer.add("LayerNormalization", [real, scale, bias], axis=-1, epsilon=epsilon)
        if is_image:
            real = writer.add("Transpose", [real], "by_channels", perm=[0, 3, 1, 2])
        return writer.value(real, node, output, x.rows)
    if not is_image:
        real = writer.reshape(real, (rows_of(shape), channels), "by_rows")
        real = writer.add("Transpose", [real], "by_channels", perm=[0, 2, 1])
    real = writer.reshape(real, (groups, -1), "by_groups")
    ones, zeros = (writer.constant(np.full(groups, v, np.float32), k) for v, k in ((1, "ones"), (0, "zeros")))
    real = writer.add("InstanceNormalization", [real, ones, zeros], epsilon=epsilon)
    if is_image:
        real = writer.reshape(real, shape, "ungrouped")
        gamma, beta = gamma[:, None, None], beta[:, None, None]
    else:
        real = writer.reshape(real, (channels, rows_of(shape)), "ungrouped")
        real = writer.add("Transpose", [real], "rows", perm=[0, 2, 1])
        real = real if len(shape) == 2 else writer.reshape(real, shape, "flat")
    real = writer.add("Mul", [real, writer.constant(gamma.astype(np.float32), "gamma")], "scaled")
    real = writer.add("Add", [real, writer.constant(beta.astype(np.float32), "beta")], "shifted")
    return writer.value(real, node, output)


OPS = {"position": position, "mean": mean, "norm": norm}
