"""max_pool2d, avg_pool2d and resize: windows of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qdeploy.graph import Activation, Node
from qdeploy.onnx_nodes.writer import Value, Writer
from qdeploy.reference import bands, windows


def max_pool2d(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    """onnxruntime refuses a pool padded by its kernel or more, as dilation allows, so that is padded before."""
    real, kernel, padding = writer.real(inputs[0]), list(node.attributes["kernel"]), list(node.attributes["padding"])
    if any(pad >= size for pad, size in zip(padding, 2 * kernel, strict=True)):
        pads = writer.integers([0, 0, *padding[:2], 0, 0, *padding[2:]], "pads")
        real = writer.add("Pad", [real, pads, writer.number(float(np.finfo(np.float32).min), "lowest")], "padded")
        padding = [0, 0, 0, 0]
    attributes: dict[str, Any] = {f"{key}s": list(node.attributes[key]) for key in ("stride", "dilation")}
    real = writer.add("MaxPool", [real], kernel_shape=kernel, pads=padding, **attributes)
    return writer.value(real, node, output)


def avg_pool2d(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    """The mean of a window of n elements times n*m[n-1], which is one number but where borders are weighted apart."""
    x, multiplier = inputs[0], node.constants["multiplier"].astype(np.float64)
    size = int(np.prod(node.attributes["kernel"]))
    counts = _counts(node, x)
    with_padding = multiplier.size == 1 or np.ptp(counts) == 0
    if with_padding:  # padding adds 0 to a sum, so that one number is for as many elements as the kernel has
        multiplier, counts = multiplier[[0 if multiplier.size == 1 else counts[0, 0] - 1]], np.full((1, 1), size)
    per_mean = _read_back(
        multiplier if with_padding else multiplier[counts - 1], counts * output.scale / x.tensor.scale
    )
    keys = {"kernel_shape": "kernel", "strides": "stride", "pads": "padding"}
    attributes: dict[str, Any] = {name: list(node.attributes[key]) for name, key in keys.items()}
    real = writer.add("AveragePool", [writer.real(x)], count_include_pad=int(with_padding), **attributes)
    if np.ptp(per_mean) > 1e-6 * np.abs(per_mean).max():
        real = writer.add("Mul", [real, writer.constant(per_mean.astype(np.float32), "factor")], "weighted")
    else:
        real = writer.scaled(real, per_mean[0, 0], "scaled")
    return writer.value(writer.shifted(real, node.attributes["bias"] - output.zero_point, output), node, output)


def _read_back(multiplier: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """The float32 numbers beside multiplier * ratio that give the multipliers again when they are divided by the ratio
    and rounded, or else the nearest: so what is read back, and written again, is the same."""
    with np.errstate(over="ignore"):
        found = nearest = (multiplier * ratio).astype(np.float32)
    for beside in (np.nextafter(nearest, np.float32(np.inf)), np.nextafter(nearest, np.float32(-np.inf))):
        wrong = (found / ratio).astype(np.float32) != multiplier
        found = np.where(wrong & ((beside / ratio).astype(np.float32) == multiplier), beside, found)
    return found.astype(np.float64)


def _counts(node: Node, x: Value) -> np.ndarray:
    """How many elements of the image each window holds, [OH, OW]."""
    image = np.ones((1, 1, *x.tensor.shape[1:]), np.int64)
    return windows(image, node, node.attributes["kernel"], (1, 1)).sum(axis=(4, 5))[0, 0]


def resize(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    """Two products with constant matrices, [OH, H] and [W, OW]: ONNX's Resize has weights of its own."""
    rows, columns = (bands(node, axis, inputs[0].tensor.shape[i]) for i, axis in ((1, "row"), (2, "column")))
    high = writer.add("MatMul", [writer.constant(rows.astype(np.float32), "rows"), writer.real(inputs[0])], "tall")
    wide = writer.add("MatMul", [high, writer.constant(columns.T.astype(np.float32), "columns")])
    real = writer.scaled(wide, node.attributes["multiplier"] * output.scale / inputs[0].tensor.scale, "scaled")
    return writer.value(writer.shifted(real, node.attributes["bias"] - output.zero_point, output), node, output)


OPS = {"max_pool2d": max_pool2d, "avg_pool2d": avg_pool2d, "resize": resize}
