"""Functions of one number that ONNX has, and which of them a table is.

A table holds the codes of a function, and what function that was is not in the file. A function stands for the table if
it gives all 256 entries. The runtimes' own float32 differs from ours: over inputs of 256 codes at steps of 0.01, 0.04
and 0.1, onnxruntime 1.31 and OpenVINO 2026.4 were within 4e-5 of a code of these functions in float64, where the output
has 255 codes. So no result may lie within MARGIN of a code from the border between two codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from qdeploy.graph import Activation
from qdeploy.onnx_nodes.writer import Writer

MARGIN = 1e-4
RELATIVE = 1e-5  # of the largest entry of an f32 table
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
NICE_SLOPES = (0.01, 0.1, 0.2, 0.25, 0.3, 0.5)

Write = Callable[[Writer, str], str]


class Function(NamedTuple):
    of: Callable[[np.ndarray], np.ndarray]
    write: Write  # from the name of an ONNX tensor to that of the result
    exact: bool = False  # the same bits in every float32, so that it needs no margin


def which(table: np.ndarray, x: Activation, output: Activation, tolerance: int) -> Function | None:
    """The function whose codes all are within `tolerance` of the table's; None where there is none."""
    real = np.float32(x.scale) * (np.arange(256) - x.zero_point).astype(np.float32)
    for function in (*FUNCTIONS, *map(_leaky, _slopes(table, real, output))):
        if _distance(function, table, real, output) <= tolerance:
            return function
    return None


def _distance(function: Function, table: np.ndarray, real: np.ndarray, output: Activation) -> float:
    """The largest, in codes. Of f32 entries 0 where the bits are the same, and 1 where they are as good as that."""
    with np.errstate(over="ignore", invalid="ignore"):
        y = function.of(real if function.exact else real.astype(np.float64))
        if output.dtype == "f32":
            far = np.abs(y - table).max() > RELATIVE * np.abs(table).max()
            if far or not np.isfinite(y).all():
                return math.inf
            return 0 if np.array_equal(y.astype(np.float32), table) else 1
        codes = y / np.float32(output.scale)
    margin = 0.0 if function.exact else MARGIN
    bounds = [np.clip(np.rint(codes + m) + output.zero_point, 0, 255) for m in (-margin, margin)]
    return max(float(np.abs(bound - table).max()) for bound in bounds)


def slopes_of(tables: np.ndarray, x: Activation, output: Activation) -> np.ndarray | None:
    """The slopes f32 [C] of which each table of [C, 256] is the leaky ReLU, within a code; None where one is none."""
    real = np.float32(x.scale) * (np.arange(256) - x.zero_point).astype(np.float32)
    found = []
    for table in tables:
        slopes = (0.0, 1.0, *_slopes(table, real, output))
        distances = [_distance(_leaky(slope), table, real, output) for slope in slopes]
        if min(distances) > 1:
            return None
        found.append(slopes[int(np.argmin(distances))])
    return np.array(found, np.float32)


def _slopes(table: np.ndarray, real: np.ndarray, output: Activation) -> list[float]:
    """The nice ones, and the one amid all with which leaky ReLU gives these codes."""
    slopes = list(NICE_SLOPES)
    below = real < 0
    if output.dtype == "u8":
        below &= (table > 0) & (table < 255)
    if below.any():
        steps = 0.0 if output.dtype == "f32" else 0.5 * output.scale
        y = table.astype(np.float64) - output.zero_point
        bounds = [(y * output.scale + step)[below] / real[below] for step in (steps, -steps)]
        slopes.append((bounds[0].max() + bounds[1].min()) / 2)
    return slopes


def _leaky(slope: float) -> Function:
    return Function(partial(_leaky_relu, slope), partial(_leaky_node, slope), True)


def _leaky_relu(slope: float, x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, np.float32(slope) * x, x)


def _leaky_node(slope: float, writer: Writer, x: str) -> str:
    return writer.add("LeakyRelu", [x], alpha=float(slope))


# ---- The functions by name -------------------------------------------------------------------------------------------


def _erf(x: np.ndarray) -> np.ndarray:
    return np.array([math.erf(v) for v in x])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def _selu(x: np.ndarray) -> np.ndarray:
    return SELU_SCALE * np.where(x > 0, x, SELU_ALPHA * np.expm1(np.minimum(x, 0)))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, 0)


def _tanh_gelu_inside(x: np.ndarray) -> np.ndarray:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def _node(op: str, **attributes: Any) -> Write:
    return lambda writer, x: writer.add(op, [x], **attributes)


def _silu(writer: Writer, x: str, factor: float = 1.0) -> str:
    gate = writer.add("Sigmoid", [writer.scaled(x, factor, "sharper")], "sigmoid")
    return writer.add("Mul", [x, gate])


def _relu6(writer: Writer, x: str) -> str:
    return writer.add("Clip", [x, writer.number(0, "low"), writer.number(6, "high")])


def _gelu(writer: Writer, x: str) -> str:
    """In the five nodes that runtimes look for: Gelu is an operator from opset 20 on."""
    inside = writer.add("Erf", [writer.add("Div", [x, writer.number(math.sqrt(2), "sqrt_2")], "scaled")], "erf")
    return _halved(writer, x, inside)


def _tanh_gelu(writer: Writer, x: str) -> str:
    cube = writer.add("Mul", [writer.add("Mul", [x, x], "square"), x], "cube")
    small = writer.add("Mul", [cube, writer.number(0.044715, "cubic")], "small")
    inside = writer.add("Add", [x, small], "sum")
    inside = writer.add("Mul", [inside, writer.number(math.sqrt(2 / math.pi), "factor")], "scaled")
    return _halved(writer, x, writer.add("Tanh", [inside], "tanh"))


def _halved(writer: Writer, x: str, inside: str) -> str:
    """x*(1 + inside)/2."""
    product = writer.add("Mul", [x, writer.add("Add", [inside, writer.number(1, "one")], "plus_one")], "twice")
    return writer.add("Mul", [product, writer.number(0.5, "half")])


def _mish(writer: Writer, x: str) -> str:
    return writer.add("Mul", [x, writer.add("Tanh", [writer.add("Softplus", [x], "softplus")], "tanh")])


FUNCTIONS = (
    Function(lambda x: x, lambda writer, x: x, True),
    Function(lambda x: np.maximum(x, 0), _node("Relu"), True),
    Function(lambda x: np.clip(x, 0, 6), _relu6, True),
    Function(lambda x: x * np.clip(x / 6 + 0.5, 0, 1), _node("HardSwish")),
    Function(lambda x: np.clip(x / 6 + 0.5, 0, 1), _node("HardSigmoid", alpha=1 / 6, beta=0.5)),
    Function(_sigmoid, _node("Sigmoid")),
    Function(lambda x: x * _sigmoid(x), _silu),
    Function(lambda x: x * _sigmoid(1.702 * x), partial(_silu, factor=1.702)),
    Function(lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))), _gelu),
    Function(lambda x: x * 0.5 * (1 + np.tanh(_tanh_gelu_inside(x))), _tanh_gelu),
    Function(np.tanh, _node("Tanh")),
    Function(_elu, _node("Elu", alpha=1.0)),
    Function(_selu, _node("Selu", alpha=SELU_ALPHA, gamma=SELU_SCALE)),
    Function(_softplus, _node("Softplus")),
    Function(lambda x: x * np.tanh(_softplus(x)), _mish),
    Function(lambda x: x / (1 + np.abs(x)), _node("Softsign")),
    Function(np.exp, _node("Exp")),
    Function(_erf, _node("Erf")),
    Function(np.abs, _node("Abs"), True),
)
