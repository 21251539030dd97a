"""Scales per channel of an activation that depthwise convolutions alone read: one scale and factors instead.

QuantizeLinear(x, s[c]) is QuantizeLinear(x * (s/s[c]), s) with the largest s of all, and DequantizeLinear the same the
other way round. The factors then go into what makes x and into the convolutions. The message itself is rewritten, as in
qoperator, so that every step is a tensor that onnxruntime can show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qdeploy.checks import quoted
from qdeploy.errors import ExportError

if TYPE_CHECKING:
    import onnx

EXPECTED = "one scale for a tensor, or one per channel where depthwise convolutions alone read it"


def with_one_scale(proto: onnx.ModelProto, constants: dict[str, np.ndarray]) -> None:
    """Rewrites the graph; its new constants are in both. Raises ExportError where other nodes read such a tensor."""
    graph = proto.graph
    coded = [node for node in _of_activations(graph, constants) if _is_by_channel(node, constants)]
    if not coded:
        return
    made = {name: node for node in graph.node for name in node.output}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        source = made.get(node.input[0]) if node.input else None
        if node in coded:
            nodes += _before(proto, node, constants, made)
        elif source is not None and source in coded and node.op_type == "DequantizeLinear":
            if list(node.input[1:]) != list(source.input[1:]):
                expected = "the scale and zero point of its QuantizeLinear"
                raise ExportError(f"expected {expected}, got others - at node {quoted(node.name or node.output[0])}")
            nodes += _behind(proto, node, constants)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _of_activations(graph: onnx.GraphProto, constants: dict[str, np.ndarray]) -> list[onnx.NodeProto]:
    """The nodes that depend on the network's input."""
    names, found = {x.name for x in graph.input} - set(constants), []
    for node in graph.node:
        if names.intersection(node.input):
            names.update(node.output)
            found.append(node)
    return found


def _is_by_channel(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> bool:
    if node.op_type != "QuantizeLinear" or len(node.input) < 2:
        return False
    scale = constants.get(node.input[1])
    return scale is not None and scale.size > 1


def _before(
    proto: onnx.ModelProto,
    node: onnx.NodeProto,
    constants: dict[str, np.ndarray],
    made: dict[str, onnx.NodeProto],
) -> list[onnx.NodeProto]:
    scale = constants[node.input[1]].astype(np.float64).reshape(-1)
    zeros = constants.get(node.input[2]) if len(node.input) > 2 else np.zeros(1, np.uint8)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    alike = zeros is not None and zeros.size > 0 and zeros.dtype.kind in "iu" and np.ptp(zeros.astype(np.int64)) == 0
    if axis not in (1, -3) or not alike or not _only_depthwise(proto.graph, node.output[0], scale.size):
        got = f"{scale.size} scales along axis {axis}" if alike else "zero points that differ"
        raise ExportError(f"expected {EXPECTED}, got {got} - at node {quoted(node.name or node.output[0])}")
    assert zeros is not None
    last = scale * (np.iinfo(zeros.dtype).max - int(zeros.reshape(-1)[0]))
    source = _without_bound(proto, node.input[0], last, constants, made)
    factors = _constant(proto, constants, f"{node.output[0]}_factors", (scale.max() / scale).reshape(-1, 1, 1))
    new = _node("Mul", [source[-1].output[0] if source else node.input[0], factors], f"{node.output[0]}_scaled")
    return [*source, new, _with_one(proto, node, new.output[0], node.output[0], constants)]


def _behind(proto: onnx.ModelProto, node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> list[onnx.NodeProto]:
    scale = constants[node.input[1]].astype(np.float64).reshape(-1)
    factors = _constant(proto, constants, f"{node.output[0]}_factors", (scale / scale.max()).reshape(-1, 1, 1))
    real = f"{node.output[0]}_in_one_scale"
    return [
        _with_one(proto, node, node.input[0], real, constants),
        _node("Mul", [real, factors], node.output[0]),
    ]


def _with_one(
    proto: onnx.ModelProto, node: onnx.NodeProto, source: str, output: str, constants: dict[str, np.ndarray]
) -> onnx.NodeProto:
    """The node with the largest of its scales and the first of its zero points."""
    scale = _constant(proto, constants, f"{output}_scale", constants[node.input[1]].max())
    zero = [constants[name].reshape(-1)[0] for name in node.input[2:3]]
    names = [_constant(proto, constants, f"{output}_zero_point", value) for value in zero]
    new = _node(node.op_type, [source, scale, *names], output)
    new.name = node.name
    return new


def _without_bound(
    proto: onnx.ModelProto,
    name: str,
    last: np.ndarray,
    constants: dict[str, np.ndarray],
    made: dict[str, onnx.NodeProto],
) -> list[onnx.NodeProto]:
    """A Relu in place of a Clip at 0 whose upper bound is beyond the last code of every channel."""
    clip = made.get(name)
    if clip is None or clip.op_type != "Clip":
        return []
    given = {a.name: a.f for a in clip.attribute}
    bounds = [
        given.get(key) if len(clip.input) <= i or not clip.input[i] else constants.get(clip.input[i])
        for key, i in (("min", 1), ("max", 2))
    ]
    if any(bound is None or np.size(bound) != 1 for bound in bounds):
        return []
    low, high = (float(np.asarray(bound).reshape(())) for bound in bounds)
    return [_node("Relu", [clip.input[0]], f"{name}_unbounded")] if low == 0 and (high >= last).all() else []


def _only_depthwise(graph: onnx.GraphProto, codes: str, channels: int) -> bool:
    """Whether the codes go into depthwise convolutions alone."""
    reals = [node for node in graph.node if codes in node.input]
    names = {node.output[0] for node in reals}
    readers = [node for node in graph.node if names.intersection(node.input)]
    groups = [next((a.i for a in node.attribute if a.name == "group"), 1) for node in readers]
    return (
        bool(readers)
        and all(node.op_type == "DequantizeLinear" for node in reals)
        and all(node.op_type == "Conv" for node in readers)
        and all(count == channels for count in groups)
        and not names.intersection(output.name for output in graph.output)
    )


def _node(op: str, inputs: list[str], output: str) -> onnx.NodeProto:
    from onnx import NodeProto

    return NodeProto(op_type=op, name=output, input=inputs, output=[output])


def _constant(proto: onnx.ModelProto, constants: dict[str, np.ndarray], name: str, value: np.ndarray) -> str:
    from onnx import numpy_helper

    while name in constants:
        name += "_"
    array = np.asarray(value, np.float32 if np.asarray(value).dtype.kind == "f" else None)
    constants[name] = array
    proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return name
