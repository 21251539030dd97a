"""conv2d, linear and embedding: what has weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qdeploy.graph import Activation, Node
from qdeploy.onnx_nodes.writer import Value, Writer

MAX_BIAS = 2.0**30  # of a bias in whole accumulators, int32
FINE = 2.0**-24


def conv2d(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    """onnxruntime runs a convolution as int8 only if its output is rounded to 8 bits, so before a residual it is.

    That costs accuracy: of ResNet-18's codes behind a residual a third differs from ours, by up to 2. No form is known
    that it fuses and that is nearer: its int8 convolution has no residual and writes 8 bits alone, and any step that
    covers the range is at least that of the output, which by itself makes a quarter differ. Left unrounded, the
    convolution is float32. OpenVINO adds in its accumulators.
    """
    groups, residual = node.attributes["groups"], inputs[1:]
    x, weight, bias = _operands(writer, node, inputs, output, groups, 0)
    keys = {"strides": "stride", "pads": "padding", "dilations": "dilation"}
    attributes: dict[str, Any] = {name: list(node.attributes[key]) for name, key in keys.items()}
    real = writer.add("Conv", [x, weight, bias], group=groups, **attributes)
    if "inner_clamp" in node.attributes:
        real = _of_inner_codes(writer, real, node, inputs, output)
    elif writer.quantized and residual and output.dtype == "u8":
        step = _without_residual(node.attributes["residual_multiplier"], residual[0].tensor, output)
        before = Value(step, f"{writer.name}/before_residual", real=real)
        writer.codes(before)
        before.real = None
        real = writer.real(before)
    return writer.value(_plus_residual(writer, real, node, residual, output), node, output)


def linear(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    """MatMul and Add: onnxruntime runs them as int8 whatever follows, as Gemm only where its output is rounded."""
    x, weight, bias = _operands(writer, node, inputs, output, 1, 1)
    real = writer.add("Add", [writer.add("MatMul", [x, weight]), bias], "biased")
    if "inner_clamp" in node.attributes:
        real = _of_inner_codes(writer, real, node, inputs, output)
    rows = inputs[0].rows
    return writer.value(_plus_residual(writer, real, node, inputs[1:], output), node, output, rows)


def embedding(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    """In the quantized graph the codes are looked up, not the numbers: runtimes would keep the whole table in f32."""
    codes, ids = node.constants["weight"], inputs[0]
    scale = node.constants["multiplier"].astype(np.float64) * output.scale
    rows = (node.constants["rows"].astype(np.float64) - output.zero_point) * output.scale
    assert ids.codes is not None
    if not writer.quantized:
        table = writer.constant((codes * scale[:, None]).astype(np.float32), "weight")
        real = writer.add("Gather", [table, ids.codes])
    else:
        looked_up = writer.add("Gather", [writer.constant(codes, "weight"), ids.codes])
        factor = writer.constant(scale.astype(np.float32)[:, None] if scale.size > 1 else np.float32(scale[0]), "scale")
        if scale.size > 1:
            factor = writer.add("Gather", [factor, ids.codes], "scale_of_id")
        real = writer.add("Mul", [writer.add("Cast", [looked_up], "cast", to=1), factor], "real_weight")
    table = writer.rows_of(writer.constant(rows.astype(np.float32), "rows"), ids.rows)
    return writer.value(writer.add("Add", [real, table], "plus_rows"), node, output, ids.rows)


def _operands(
    writer: Writer, node: Node, inputs: Sequence[Value], output: Activation, groups: int, axis: int
) -> list[str]:
    """x, weights and bias: out code = m*acc + b (+ m_res*q_res), so in real numbers the weight is codes*m*s_out/s_in.

    axis: of the output channels among those of the weights; of a linear layer 1, whose weights are [F, O] in ONNX.
    """
    x = inputs[0]
    multiplier, bias = (node.constants[key].astype(np.float64) for key in ("multiplier", "bias"))
    if "inner_clamp" in node.attributes:
        output = _inner_grid(node, inputs[1].tensor, output)
    else:
        bias = bias + sum(node.attributes["residual_multiplier"] * value.tensor.zero_point for value in inputs[1:])
    bias = bias - output.zero_point
    scale, bias = multiplier * output.scale / x.tensor.scale, bias * output.scale
    codes = node.constants["weight"]
    if writer.quantized:
        name, weight = _quantized(writer, node, x, scale, bias, groups, axis)
    else:
        real = codes * scale.reshape(-1, *[1] * (codes.ndim - 1))
        name, weight = writer.real(x), writer.constant(_stored(real, axis).astype(np.float32), "weight")
    return [name, weight, writer.constant(bias.astype(np.float32), "bias")]


def _quantized(
    writer: Writer, node: Node, x: Value, scale: np.ndarray, bias: np.ndarray, groups: int, axis: int
) -> tuple[str, str]:
    """x and weights codes*scale[channel]. QDQ allows no negative scale, so its sign goes to the codes."""
    narrow = writer.int4 and node.bits is not None and node.bits <= 4
    low, high = (-8, 7) if narrow else (-128, 127)
    codes = node.constants["weight"].astype(np.int64)
    silent = (scale == 0) | ~codes.reshape(len(codes), -1).any(axis=1)
    factor = np.where(scale < 0, -1, 1) * (1 if narrow else finer(codes, np.abs(scale), np.abs(bias) / x.tensor.scale))
    codes = codes * np.where(silent, 0, factor).reshape(-1, *[1] * (codes.ndim - 1))
    # Runtimes round the bias to steps of this scale, so that of weights which are all 0 is fine enough for the bias.
    magnitude = np.where(silent, np.maximum(np.abs(bias), 1) / x.tensor.scale * FINE, np.abs(scale / factor))
    magnitude = np.maximum(magnitude, np.finfo(np.float32).smallest_subnormal)
    codes, index = within(codes, groups, low, high)
    name = writer.real(x)
    if index is not None:
        channels = writer.constant(index, "channels")
        twice = Value(x.tensor, f"{writer.name}/repeated", x.rows)
        twice.real = writer.add("Gather", [name, channels], "repeat", axis=1 if axis == 0 else len(x.tensor.shape))
        writer.codes(twice)
        twice.real = None
        name = writer.real(twice)
    codes = _stored(codes, axis).astype(np.int8)
    stored = writer.nibbles(codes, "weight_codes") if narrow else writer.constant(codes, "weight_codes")
    zeros = np.zeros(len(scale), np.int8)
    zero_point = writer.nibbles(zeros, "weight_zero") if narrow else writer.constant(zeros, "weight_zero")
    with np.errstate(over="ignore"):
        operands = [stored, writer.constant(magnitude.astype(np.float32), "weight_scale"), zero_point]
    return name, writer.add("DequantizeLinear", operands, "weight", axis=axis)


def _stored(weight: np.ndarray, axis: int) -> np.ndarray:
    return weight.T if axis == 1 else weight


def finer(codes: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """What the codes [N, ...] of each channel can be multiplied by within 7 bits, beyond which some runtimes saturate.

    onnxruntime rounds the bias to whole accumulators. Beside codes of 1, as in the BatchNorms of DenseNet-121 that come
    before a convolution, that is 2 codes of the output: the correlation of its logits with ours was 0.9945, now 0.9995.
    Those accumulators have 32 bits: a large bias beside a small scale leaves less room.
    """
    room = 63 // np.maximum(np.abs(codes.reshape(len(codes), -1).astype(np.int64)).max(axis=1), 1)
    fits = MAX_BIAS * scale / np.maximum(np.maximum(bias, scale), np.finfo(np.float64).tiny)
    return np.maximum(np.minimum(room, np.minimum(fits, 64).astype(np.int64)), 1)


def within(codes: np.ndarray, groups: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes [O, D, ...] of low..high, exactly: what is beyond, as the code -128 of a negative multiplier, goes with the
    same input channel once more. Returns them [O, D + E, ...] and which input channels they read; None where E = 0."""
    kept = np.clip(codes, low, high)
    beyond = codes - kept
    if not beyond.any():
        return codes, None
    outputs, depth = codes.shape[:2]
    shape = (groups, outputs // groups, depth, -1)
    kept, beyond = kept.reshape(shape), beyond.reshape(shape)
    needed = beyond.any(axis=(1, 3))
    channels = np.argsort(~needed, axis=1, kind="stable")[:, : needed.sum(axis=1).max()]
    both = np.concatenate([kept, np.take_along_axis(beyond, channels[:, None, :, None], axis=2)], axis=2)
    own = np.broadcast_to(np.arange(depth), (groups, depth))
    index = np.concatenate([own, channels], axis=1) + depth * np.arange(groups)[:, None]
    return both.reshape(outputs, -1, *codes.shape[2:]), index.ravel()


def _inner_grid(node: Node, residual: Activation, output: Activation) -> Activation:
    """The one whose numbers are added without a factor, but for a sign, and if there is one, without an offset."""
    multiplier, offset = node.attributes["inner_multiplier"], _inner_offset(node, residual, output)
    zero_point = round(min(max(-offset / multiplier, 0), 255)) if multiplier else 0
    shape = (*output.shape, 1, 1) if node.op == "conv2d" and len(output.shape) == 1 else output.shape
    return Activation("", shape, "u8", _scale_that_gives(abs(multiplier), output.scale), zero_point)


def _scale_that_gives(ratio: float, scale: float) -> float:
    """The float32 nearest to ratio*scale by which an export finds the same ratio again, if there is one."""
    nearest = np.float32(ratio * scale)
    if nearest < np.finfo(np.float32).tiny:
        return scale
    near = [nearest, *(np.nextafter(nearest, np.float32(end)) for end in (0, np.inf))]
    return float(next((one for one in near if np.float32(float(one) / scale) == np.float32(ratio)), nearest))


def _inner_offset(node: Node, residual: Activation, output: Activation) -> float:
    """What remains of inner_bias without the zero points of residual and output, in codes of the output."""
    zeros = output.zero_point - node.attributes["residual_multiplier"] * residual.zero_point
    return node.attributes["inner_bias"] - zeros


def _of_inner_codes(writer: Writer, real: str, node: Node, inputs: Sequence[Value], output: Activation) -> str:
    grid = _inner_grid(node, inputs[1].tensor, output)
    multiplier, name = node.attributes["inner_multiplier"], writer.name
    writer.name = f"{name}/inner"
    inner = writer.value(real, replace(node, attributes={"clamp": tuple(node.attributes["inner_clamp"])}), grid)
    real, writer.name = writer.real(inner), name
    offset = _inner_offset(node, inputs[1].tensor, output) + multiplier * grid.zero_point
    return writer.shifted(writer.scaled(real, multiplier * output.scale / grid.scale, "summand"), offset, output)


def _plus_residual(writer: Writer, real: str, node: Node, residual: Sequence[Value], output: Activation) -> str:
    for value in residual:  # one or none
        factor = node.attributes["residual_multiplier"] * output.scale / value.tensor.scale
        real = writer.add("Add", [real, writer.scaled(writer.real(value), factor, "residual")], "sum")
    return real


def _without_residual(multiplier: float, residual: Activation, output: Activation) -> Activation:
    """The grid of (output - residual) over its whole range, which is (1 + |multiplier|) times that of the output."""
    size = abs(multiplier)
    largest = 255 - residual.zero_point if multiplier > 0 else residual.zero_point
    zero_point = (output.zero_point + size * largest) / (1 + size)
    return Activation("", output.shape, "u8", output.scale * (1 + size), round(zero_point))


OPS = {"conv2d": conv2d, "linear": linear, "embedding": embedding}
