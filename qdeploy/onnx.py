"""A model file as an ONNX graph, in float32 or in int8 (QDQ), so that other runtimes can run the same network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

import qdeploy
from qdeploy import format
from qdeploy.errors import InputError
from qdeploy.files import AnyPath
from qdeploy.graph import Graph, Member
from qdeploy.onnx_nodes import OPS
from qdeploy.onnx_nodes.writer import Value, Writer
from qdeploy.ops import rows_of_texts
from qdeploy.ops.op import Rows
from qdeploy.validate import member_at, node_at

if TYPE_CHECKING:
    import onnx

LARGEST = 2**31 - 2**20  # bytes of constants: a protobuf message ends at 2 GiB
IR_VERSION = {17: 8, 21: 10}  # the first with the opset


def to_onnx(model: Graph | AnyPath, quantized: bool = True, u8: bool = False, int4: bool = False) -> onnx.ModelProto:
    """A model, or the file of one, as ONNX, with a dynamic batch.

    Inputs: `x` f32 [N, C, H, W], [N, T, D] or [N, F]; with `u8`, where the file has `preprocess`, u8 [N, H, W, C].
        Of a text `ids` int64 [N, T], and where it may be shorter `mask` int64 [N, T], ones and then zeros.
    Output: `y` f32, real numbers also where the file ends in codes; rows beyond the end of a text are 0.
    Names of nodes stay; metadata_props has `classes`, `preprocess` and `qdeploy`, the version that wrote it.

    quantized: the same integers in QDQ form (u8 activations, s8 weights per channel), which onnxruntime and OpenVINO
        run as int8. Else the float32 network that the integers stand for, with no rounding between the layers.
    int4: weights of at most 4 bits as INT4, half as large; onnxruntime 1.31 runs such layers in float32.

    What differs from our codes: runtimes compute between the integers in float32 and round to the nearest code in
    their own way, so that a result beside the border of two codes may get the other one. Node by node from equal
    codes, onnxruntime 1.31 without optimizations was at most 1 code away over ResNet-18, MobileNetV2 and DeiT-S: in
    8e-6 of the u8 codes, in 2.5e-4 of those of attention and in 8e-4 of the 16-bit ones. Before a residual its
    convolutions are rounded once more (see qdeploy/onnx_nodes/weighted.py). Its int8 kernels also round the bias to
    whole accumulators. The logits of the whole networks correlated with ours at 0.9994 and more.

    Raises InputError for `u8` without `preprocess`, `int4` without `quantized`, constants beyond float32 and more than
    the 2 GiB that one ONNX message can hold, and without the package onnx; ModelError for a file that is no model.
    """
    try:
        import onnx
        from onnx import helper
    except ImportError:
        fix = "pip install 'qdeploy[onnx]'"
        raise InputError(f"expected the package onnx ({fix}), got none - at this Python environment") from None
    graph = model if isinstance(model, Graph) else format.load(model)
    if u8 and graph.preprocess is None:
        raise InputError("expected a model with `preprocess` for u8 images, got one without - at u8")
    if int4 and not quantized:
        raise InputError("expected no float32 graph for 4-bit codes, got one - at int4")
    taps = [_prefix(graph, member) + node.name for member in graph.members for node in member.nodes]
    writer = Writer(quantized, int4, taps)
    inputs = _inputs(graph, u8)
    if graph.variable:
        writer.text("ids", "mask")
    y = _combined(writer, graph, [_member(writer, graph, member, u8) for member in graph.members])
    if writer.nbytes > LARGEST:
        raise InputError(
            f"expected at most 2 GiB of constants in an ONNX graph, got {writer.nbytes} bytes - at the graph"
        )
    writer.nodes.append(helper.make_node("Identity", [y], ["y"], "y"))
    body = helper.make_graph(writer.nodes, "qdeploy", inputs, [_output(graph)], writer.initializers)
    opset = helper.make_opsetid("", writer.opset)
    result = helper.make_model(
        body,
        opset_imports=[opset],
        ir_version=IR_VERSION[writer.opset],
        producer_name="qdeploy",
        producer_version=qdeploy.__version__,
    )
    notes = {"classes": graph.classes, "preprocess": graph.preprocess}
    known = {key: json.dumps(value, ensure_ascii=False) for key, value in notes.items() if value is not None}
    helper.set_model_props(result, {**known, "qdeploy": qdeploy.__version__})
    onnx.checker.check_model(result)
    return result


def _prefix(graph: Graph, member: Member) -> str:
    """Nodes are named as their taps are."""
    return f"{member.name}/" if graph.combine else ""


def _inputs(graph: Graph, u8: bool) -> list[onnx.ValueInfoProto]:
    from onnx import TensorProto, helper

    shape = graph.input_shape
    if graph.vocabulary is not None:
        sizes = ["N", "L" if graph.variable else shape[0]]
        names = ["ids", "mask"] if graph.variable else ["ids"]
        return [helper.make_tensor_value_info(name, TensorProto.INT64, sizes) for name in names]
    if u8:
        return [helper.make_tensor_value_info("x", TensorProto.UINT8, ["N", *shape[1:], shape[0]])]
    return [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])]


def _output(graph: Graph) -> onnx.ValueInfoProto:
    from onnx import TensorProto, helper

    shape: list[int | str] = list(graph.members[0].output.shape)
    more = _rows(graph, graph.members[0])[graph.members[0].nodes[-1].output]
    if more is not None:
        shape[0] = f"L + {more}" if more else "L"
    return helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", *shape])


def _rows(graph: Graph, member: Member) -> Sequence[Rows]:
    return rows_of_texts(member) if graph.variable else [None] * len(member.tensors)


def _member(writer: Writer, graph: Graph, member: Member, u8: bool) -> str:
    """Append one network; returns the name of its f32 output."""
    values = {0: _entry(writer, graph, member, u8)}
    for node in member.nodes:
        writer.name = _prefix(graph, member) + node.name
        writer.at = node_at(node, member_at(member.name))
        output = member.tensors[node.output]
        values[node.output] = OPS[node.op](writer, node, [values[i] for i in node.inputs], output)
    last = values[member.nodes[-1].output]
    real = writer.real(last)
    if last.rows is None:
        return real
    behind = [1] * (len(last.tensor.shape) - 1)
    return writer.add("Mul", [real, writer.mask(last.rows, (-1, *behind))], "rows_that_exist")


def _entry(writer: Writer, graph: Graph, member: Member, u8: bool) -> Value:
    tensor = member.tensors[0]
    writer.name, writer.at = _prefix(graph, member) + "input", member_at(member.name)
    if graph.vocabulary is not None:
        return Value(tensor, writer.name, 0 if graph.variable else None, codes="ids")
    value = Value(tensor, writer.name, real="x")
    if u8:
        value = _pixels(writer, graph, member, value)
    if writer.quantized:
        writer.codes(value)
        value.real = None
    return value


def _pixels(writer: Writer, graph: Graph, member: Member, value: Value) -> Value:
    """u8 [N, H, W, C] by the file's own table, whose codes any runtime gives; in float32 by mean and std."""
    assert graph.preprocess is not None and member.preprocess_table is not None
    if writer.quantized:
        table = member.preprocess_table
        offsets = writer.constant(256 * np.arange(len(table), dtype=np.int32), "channel_offsets")
        index = writer.add("Add", [writer.add("Cast", ["x"], "pixels", to=6), offsets], "index")
        by_pixels = writer.add("Gather", [writer.constant(table.ravel(), "table"), index], "by_pixels")
        value.real, value.codes = None, writer.add("Transpose", [by_pixels], "codes", perm=[0, 3, 1, 2])
        return value
    mean, std = (writer.constant(np.asarray(graph.preprocess[key], np.float32), key) for key in ("mean", "std"))
    unit = writer.add("Div", [writer.add("Cast", ["x"], "pixels", to=1), writer.number(255, "white")], "unit")
    standard = writer.add("Div", [writer.add("Sub", [unit, mean], "centred"), std], "standard")
    value.real = writer.add("Transpose", [standard], "real", perm=[0, 3, 1, 2])
    return value


def _combined(writer: Writer, graph: Graph, outputs: list[str]) -> str:
    """The rule of an ensemble over the outputs of its members."""
    if graph.combine is None:
        return outputs[0]
    writer.name = graph.combine
    if graph.combine == "probs":
        outputs = [writer.add("Softmax", [name], "softmax", axis=-1) for name in outputs]
    mean = writer.add("Mean", outputs, "mean")
    return mean if graph.combine == "probs" else writer.add("Softmax", [mean], "softmax", axis=-1)
