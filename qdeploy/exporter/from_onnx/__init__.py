"""ONNX's front end: `lower` makes layers of a file. Needs the package onnx; onnxruntime where the network must run.

LOWERING has one function for each operator that the engine can express; any other is an ExportError.

    model, external     the file, opened with care; qoperator puts operators on codes in terms of others
    constants           what can be computed of constants alone: functions, moves
    quantized           QuantizeLinear and DequantizeLinear: grids of activations, codes of weights
    arranged, elementwise, weighted, windows   what the operators of the rules in exporter/lowering/ are in ONNX
    ending              what stands behind the scores and is dropped
    source              the network in onnxruntime, for calibration and the report
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy.checks import quoted
from qdeploy.errors import ExportError
from qdeploy.exporter import elements
from qdeploy.exporter.from_onnx import arranged, elementwise, ending, quantized, source, weighted, windows
from qdeploy.exporter.from_onnx.constants import fold
from qdeploy.exporter.from_onnx.functions import FUNCTIONS
from qdeploy.exporter.from_onnx.model import File, Node, is_onnx, read
from qdeploy.exporter.from_onnx.moves import MOVES
from qdeploy.exporter.from_onnx.quantized import REAL, Coded, LookedUp, Offset, Stored
from qdeploy.exporter.from_onnx.site import OPERATOR, Site, State
from qdeploy.exporter.from_onnx.words import described
from qdeploy.exporter.layers import Input, Layer, Network, Weighted
from qdeploy.exporter.lowering.moved import Moved, Value, plain, seen
from qdeploy.exporter.lowering.site import Obstacle, Unknown, all_of

if TYPE_CHECKING:
    from qdeploy.exporter.from_onnx.model import AnyModel

__all__ = ["is_onnx", "lower"]


def lower(model: AnyModel, shape: tuple[int, ...] | None = None) -> Network:
    """One layer for each operator of an ONNX file that its outputs need.

    `model`: a path, the bytes of a file or a ModelProto. `shape`: of the input, (C, H, W), where the file leaves height
    and width free. Raises ExportError for what the engine lacks: all of it, with the nodes; and for a damaged file.
    """
    file = read(model, shape)
    outputs, notes = ending.scores(file)
    state = State(file, notes=notes)
    values: dict[str, Any] = dict(file.constants)
    x, rows_first = _input(file)
    state.layers.append(x.layer if isinstance(x, Moved) else x)
    values[file.input] = x
    _lower_nodes(state, values, list(outputs))
    makers = {name: node for node in file.nodes for name in node.outputs}
    ends = [_output(name, values, state, makers) for name in outputs]
    weights = [layer for layer in state.layers if isinstance(layer, Weighted)]
    classifier = weights[-1].name if weights and isinstance(weights[-1].weight, np.ndarray) else None
    network = source.Source(file, rows_first, source.bytes_of(state.layers))
    names = list(outputs.values()) if len(outputs) > 1 else []
    return Network(network, state.layers, ends, False, classifier, [*notes, *_tables(file)], names)


def _output(name: str, values: Mapping[str, Any], state: State, makers: Mapping[str, Node]) -> Layer:
    found = values.get(name)
    if isinstance(found, Coded) or not isinstance(found, (Layer, Moved)):
        got = "codes" if isinstance(found, Coded) else "a constant"
        raise ExportError(f"expected a real output that depends on the input, got {got} - at output {quoted(name)}")
    if found is values[state.file.input]:
        raise ExportError(f"expected a network, got its input - at output {quoted(name)}")
    return plain(Site(makers[name], state), found)


def _tables(file: File) -> list[str]:
    """The functions that become tables."""
    counts = Counter(node.op for node in file.nodes if node.op in FUNCTIONS)
    return [f"{op} as a table of 256 codes ({count} times)" for op, count in sorted(counts.items())]


def _input(file: File) -> tuple[Value, bool]:
    """Of a file that reads [N, H, W, C] the layer is [C, H, W] all the same."""
    rows_first = len(file.shape) == 3 and arranged.is_read_as_rows(file.nodes, file.input)
    if not rows_first:
        return Input("input", [], file.shape, elements.Value(file.input)), False
    shape = (file.shape[2], *file.shape[:2])
    index = elements.numbered(shape).transpose(0, 2, 3, 1)
    value = elements.value_of(file.input, index, shape)
    assert value is not None  # the batch is dimension 0
    return seen(Input("input", [], shape, value), index), True


def _lower_nodes(state: State, values: dict[str, Any], outputs: list[str]) -> None:
    obstacles: list[Obstacle] = []
    ends = [i for i, node in enumerate(state.file.nodes) if not set(outputs).isdisjoint(node.outputs)]
    last = max(ends, default=-1)
    for node in state.file.nodes[: last + 1]:
        if node.op == "Constant":
            continue
        site = Site(node, state)
        inputs = [values.get(name) if name else None for name in node.inputs]
        try:
            result = _lower_node(site, inputs)
        except Obstacle as obstacle:
            if node.op not in LOWERING or not any(isinstance(x, Unknown) for x in inputs):
                obstacles.append(obstacle)
            result = Unknown()
        results = result if isinstance(result, tuple) else (result,) * len(node.outputs)
        values.update(zip(node.outputs, results, strict=False))
    if obstacles:
        raise all_of(obstacles, OPERATOR)


def _lower_node(site: Site, inputs: list[Any]) -> Any:
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    op = site.node.op
    try:
        if not any(isinstance(x, (Layer, Moved, Coded, LookedUp, Offset, Unknown)) for x in inputs):
            return _of_constants(site, inputs)
        rule = LOWERING.get(op)
        if rule is None or any(isinstance(x, Unknown) for x in inputs):
            site.fail(OPERATOR, described(op))
        if any(isinstance(x, (Coded, LookedUp, Offset)) for x in inputs) and op not in ON_CODES:
            site.fail(REAL, f"{op} of codes")
        return rule(site, *inputs)
    except ExportError:
        raise
    except Exception as error:  # arguments that no rule foresaw
        site.fail(OPERATOR, f"{described(op)} with arguments that it lacks ({type(error).__name__})")


def _of_constants(site: Site, inputs: list[Any]) -> Any:
    op = site.node.op
    if op == "DequantizeLinear":
        return quantized.dequantize_constant(site, *inputs)
    if inputs and isinstance(inputs[0], Stored) and op in MOVES:
        return inputs[0].moved(site, *inputs[1:])
    return fold(site, [x.real.astype(np.float32) if isinstance(x, Stored) else x for x in inputs])


ON_CODES = (
    "DequantizeLinear",
    "Add",
    "Clip",
    "Cast",
    "MaxPool",
    "GlobalMaxPool",
    "Concat",
    "Shape",
    "Relu",
    "Pad",
    *MOVES,
)
LOWERING: dict[str, Callable[..., Any]] = {
    "QuantizeLinear": quantized.quantize,
    "DequantizeLinear": quantized.dequantize,
    "Conv": weighted.conv,
    "ConvTranspose": weighted.transposed_conv,
    "Gemm": weighted.gemm,
    "MatMul": weighted.matmul,
    "BatchNormalization": elementwise.batch_norm,
    "LayerNormalization": elementwise.layer_norm,
    "InstanceNormalization": elementwise.instance_norm,
    "GroupNormalization": elementwise.group_norm,
    "Add": elementwise.add,
    "Sum": elementwise.total,
    "Sub": elementwise.subtract,
    "Mul": elementwise.multiply,
    "Div": elementwise.divide,
    "Neg": elementwise.negate,
    "Relu": elementwise.relu,
    "Clip": elementwise.clamp,
    "MaxPool": windows.max_pool,
    "AveragePool": windows.average_pool,
    "GlobalAveragePool": windows.whole_image("mean"),
    "GlobalMaxPool": windows.whole_image("amax"),
    "ReduceMean": windows.reduction("mean"),
    "ReduceSum": windows.reduction("sum"),
    "ReduceMax": windows.reduction("amax"),
    "Concat": arranged.concat,
    "Pad": arranged.pad,
    "Shape": arranged.shape,
    "Cast": arranged.cast,
    **dict.fromkeys(MOVES, arranged.move),
    **dict.fromkeys(FUNCTIONS, elementwise.function),
    "PRelu": elementwise.prelu,
}
