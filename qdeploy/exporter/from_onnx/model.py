"""An ONNX file as nodes and constants, after everything that a stranger may have put into it was looked at."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy.checks import quoted, shape_text
from qdeploy.errors import ExportError, InputError
from qdeploy.exporter.from_onnx.channels import with_one_scale
from qdeploy.exporter.from_onnx.external import external_bytes
from qdeploy.exporter.from_onnx.qoperator import in_qdq_form
from qdeploy.graph import MAX_ELEMENTS, MAX_NODES

if TYPE_CHECKING:
    import onnx

    AnyModel = str | os.PathLike[str] | bytes | onnx.ModelProto

OPSETS = range(7, 26)  # of the default domain
MAX_OUTPUTS = 256
LARGEST = 2**31 - 1  # bytes of one protobuf message, and of all constants
NOT_UTF8 = "expected names in UTF-8, got other bytes - at the model"
REQUIRES = "expected the package onnx (pip install 'qdeploy[onnx]'), got none - at this Python environment"


@dataclass(eq=False)
class Node:
    """One operator. A name of an input is "" where that is left out."""

    op: str  # with its domain, unless that is the default
    name: str  # unique enough for people: the node's own, else its first output's
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class File:
    """A network: one float32 input, one or more outputs, nodes in an order in which they can run."""

    proto: onnx.ModelProto  # without external data
    nodes: list[Node]
    constants: dict[str, np.ndarray]
    input: str
    shape: tuple[int, ...]  # of the input, without the batch
    outputs: list[str]
    batch: int | None  # that the file fixes
    opset: int


def is_onnx(source: object) -> bool:
    """Whether it is a path, the bytes of a file, or a ModelProto."""
    return isinstance(source, (str, bytes, os.PathLike)) or type(source).__name__ == "ModelProto"


def read(source: AnyModel, shape: tuple[int, ...] | None) -> File:
    """`shape`: of the input without the batch, where the file leaves it free.

    Raises ExportError for anything that is no network as File holds one, InputError where the package onnx is missing.
    """
    proto, folder = _parsed(source)
    try:
        return _read(proto, folder, shape)
    except UnicodeError:  # protobuf says so where a text is read
        raise ExportError(NOT_UTF8) from None


def _read(proto: onnx.ModelProto, folder: Path | None, shape: tuple[int, ...] | None) -> File:
    _check_model(proto)
    graph = proto.graph
    constants = _initializers(graph, folder)
    in_qdq_form(proto)
    _check_names(graph, [_node(node) for node in graph.node], constants)
    for node in map(_node, graph.node):
        if node.op == "Constant":
            constants[node.outputs[0]] = _constant(node)
    with_one_scale(proto, constants)
    nodes = [_node(node) for node in graph.node]
    inputs = [x for x in graph.input if x.name not in constants]
    if len(inputs) != 1 or not 1 <= len(graph.output) <= MAX_OUTPUTS:
        got = f"{len(inputs)} ({_names(inputs)}) and {len(graph.output)} ({_names(graph.output)})"
        raise ExportError(f"expected one input and 1 to {MAX_OUTPUTS} outputs, got {got} - at the graph")
    batch, own = _input_shape(inputs[0], shape)
    outputs = [x.name for x in graph.output]
    needed = _needed(nodes, outputs)
    opset = next(x.version for x in proto.opset_import if x.domain in ("", "ai.onnx"))
    return File(proto, needed, constants, inputs[0].name, own, outputs, batch, opset)


def _names(values: Any) -> str:
    names = [quoted(value.name) for value in values]
    return ", ".join(names[:4]) + ("..." if len(names) > 4 else "") or "none"


# ---- The message -----------------------------------------------------------------------------------------------------


def _parsed(source: AnyModel) -> tuple[onnx.ModelProto, Path | None]:
    """A copy of the model, and the folder that external data may be in."""
    try:
        import onnx
    except ImportError:
        raise InputError(REQUIRES) from None
    proto = onnx.ModelProto()
    if not isinstance(source, (str, bytes, os.PathLike)):
        proto.CopyFrom(source)
        return proto, None
    data, folder, at = (source, None, "the bytes") if isinstance(source, bytes) else _content(Path(source))
    try:
        proto.ParseFromString(data)
    except Exception:  # google.protobuf.message.DecodeError, whose package is onnx's own affair
        raise ExportError(f"expected an ONNX file, got {len(data)} bytes that are none - at {at}") from None
    if not proto.HasField("graph"):
        raise ExportError(f"expected an ONNX file, got {len(data)} bytes without a graph - at {at}")
    return proto, folder


def _content(path: Path) -> tuple[bytes, Path, str]:
    at = quoted(os.fsdecode(path))
    try:
        if not path.is_file():
            raise ExportError(
                f"expected an ONNX file, got {'none' if not path.exists() else 'something else'} - at {at}"
            )
        if path.stat().st_size > LARGEST:
            raise ExportError(f"expected at most {LARGEST} bytes, got {path.stat().st_size} - at {at}")
        return path.read_bytes(), path.parent, at
    except ExportError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a byte 0
        raise ExportError(f"expected an ONNX file, got {error} - at {at}") from None


def _check_model(proto: onnx.ModelProto) -> None:
    graph = proto.graph
    texts = [x.name for part in (graph.initializer, graph.input, graph.output) for x in part]
    for node in graph.node:
        texts += [node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute)]
    if not all(isinstance(text, str) for text in texts):
        raise ExportError(NOT_UTF8)
    versions = [x.version for x in proto.opset_import if x.domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in OPSETS:
        got = ", ".join(map(str, versions)) or "none"
        raise ExportError(f"expected opset {OPSETS[0]} to {OPSETS[-1]} of the default domain, got {got} - at the model")
    if len(graph.node) > MAX_NODES:
        raise ExportError(f"expected at most {MAX_NODES} nodes, got {len(graph.node)} - at the graph")
    if graph.sparse_initializer:
        raise ExportError("expected dense constants, got sparse ones - at the graph")


def _check_names(graph: onnx.GraphProto, nodes: list[Node], constants: Mapping[str, np.ndarray]) -> None:
    """Each tensor is made once, and before it is read."""
    made = {x.name for x in graph.input} | set(constants)
    for node in nodes:
        for name in node.inputs:
            if name and name not in made:
                got = f"{quoted(name)}, which nothing before it makes"
                raise ExportError(f"expected nodes in an order in which they can run, got {got} - at node {_of(node)}")
        for name in filter(None, node.outputs):
            if name in made:
                raise ExportError(
                    f"expected tensors that are made once, got {quoted(name)} twice - at node {_of(node)}"
                )
            made.add(name)
        if not node.outputs:
            raise ExportError(f"expected an output, got none - at node {_of(node)}")
    for output in graph.output:
        if output.name not in made:
            raise ExportError(f"expected an output that a node makes, got {quoted(output.name)} - at the graph")


def _of(node: Node) -> str:
    return f"{quoted(node.name)} ({node.op})"


def _needed(nodes: list[Node], outputs: list[str]) -> list[Node]:
    """The nodes that the outputs depend on."""
    wanted, found = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            found.append(node)
    return found[::-1]


def _node(proto: onnx.NodeProto) -> Node:
    from onnx import helper

    name = proto.name or next(iter(proto.output), "") or proto.op_type
    op = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"
    if op in ("com.microsoft.QuantizeLinear", "com.microsoft.DequantizeLinear"):  # as those of opset 21
        op = proto.op_type
    node = Node(op, name, list(proto.input), list(proto.output))
    for attribute in proto.attribute:
        try:
            value = helper.get_attribute_value(attribute)
        except Exception:
            raise ExportError(f"expected attributes with a value, got none - at node {_of(node)}") from None
        node.attributes[attribute.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return node


def _input_shape(value: onnx.ValueInfoProto, shape: tuple[int, ...] | None) -> tuple[int | None, tuple[int, ...]]:
    """The batch, where the file fixes it, and what is behind it."""
    kind, at = value.type.tensor_type, f"input {quoted(value.name)}"
    if kind.elem_type not in (1, 0):  # float32, or not said
        from onnx import helper

        got = helper.tensor_dtype_to_string(kind.elem_type).removeprefix("TensorProto.")
        raise ExportError(f"expected a float32 input, got {got} - at {at}")
    sizes = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim]
    if not sizes and shape is not None:
        sizes = [None] * (1 + len(shape))
    batch, own = (sizes[0], sizes[1:]) if sizes else (None, [])
    if shape is not None:
        if len(own) != len(shape) or any(a not in (None, b) for a, b in zip(own, shape, strict=True)):
            got = f"{shape_text(shape)} for {shape_text([-1 if d is None else d for d in own])}"
            raise ExportError(f"expected a shape that fits the file's, got {got} - at {at}")
        own = [*shape]
    fixed = [d for d in own if d is not None]
    if not own or len(fixed) < len(own):
        got = f"[N, {', '.join('?' if d is None else str(d) for d in own)}]" if sizes else "none"
        raise ExportError(f"expected an input of known size, got {got} (give shape, --shape C,H,W) - at {at}")
    if len(own) > 3 or math.prod(fixed) > MAX_ELEMENTS:
        raise ExportError(f"expected [N, C, H, W], [N, T, D] or [N, F], got [N, {', '.join(map(str, own))}] - at {at}")
    return batch, tuple(fixed)


# ---- Constants -------------------------------------------------------------------------------------------------------


def _initializers(graph: onnx.GraphProto, folder: Path | None) -> dict[str, np.ndarray]:
    constants: dict[str, np.ndarray] = {}
    total = 0
    for tensor in graph.initializer:
        if tensor.name in constants:
            raise ExportError(f"expected tensors that are made once, got {quoted(tensor.name)} twice - at the graph")
        constants[tensor.name] = array = array_of(tensor, folder, f"constant {quoted(tensor.name)}")
        total += array.nbytes
        if total > LARGEST:
            raise ExportError("expected at most 2 GiB of constants, got more - at the graph")
    return constants


def _constant(node: Node) -> np.ndarray:
    """Of a node Constant."""
    at = f"node {_of(node)}"
    for key, value in node.attributes.items():
        if key == "value":
            return array_of(value, None, at)
        if key in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
        if key in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
    raise ExportError(f"expected a constant of numbers, got {', '.join(node.attributes) or 'none'} - at {at}")


def array_of(tensor: onnx.TensorProto, folder: Path | None, at: str) -> np.ndarray:
    """The numbers of a tensor. External ones are then in the tensor itself."""
    from onnx import TensorProto, numpy_helper

    if not isinstance(tensor, TensorProto):
        raise ExportError(f"expected a constant of numbers, got {type(tensor).__name__} - at {at}")
    if tensor.data_location == tensor.EXTERNAL:
        tensor.raw_data = external_bytes(tensor, folder, at)
        tensor.data_location = tensor.DEFAULT
        del tensor.external_data[:]
    try:
        array = numpy_helper.to_array(tensor)
    except Exception:  # of a shape, a data type or data that are none
        got = f"shape {shape_text(tensor.dims[:8])} of type {tensor.data_type}"
        raise ExportError(f"expected numbers that fill their shape, got {got} - at {at}") from None
    if array.dtype.kind not in "fiub" and "int" not in array.dtype.name:
        raise ExportError(f"expected numbers, got {array.dtype.name} - at {at}")
    return array
