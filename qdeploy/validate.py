"""Which graphs are valid: the one definition, in Python, of docs/format.md section 3. csrc/graph.cc is the other."""

from __future__ import annotations

import math

import numpy as np

from qdeploy.checks import check_name, expect, f32, integers, unique_names
from qdeploy.graph import COMBINE, MAX_ELEMENTS, MAX_MEMBERS, MAX_NODES, Graph, Member, Node, Tensor
from qdeploy.ops import OPS, Op

MIN_SCALE, MAX_SCALE = 2.0**-126, 2.0**126  # so that 1/scale is a normal f32 as well


def validate(graph: Graph) -> None:
    """Raise ModelError, naming member and node, unless `graph` is a valid model of docs/format.md section 3."""
    members = graph.members
    expect(1 <= len(members) <= MAX_MEMBERS, f"1 to {MAX_MEMBERS} members", len(members), "the graph")
    rules = (None,) if len(members) == 1 else COMBINE
    expect(graph.combine in rules, f"combine to be one of {rules}", graph.combine, "the graph")
    unique_names([member.name for member in members], "the members")
    total = sum(len(member.nodes) for member in members)
    expect(total <= MAX_NODES, f"at most {MAX_NODES} nodes", total, "the graph")
    for member in members:
        _validate_member(member)
        shape = member.tensors[0].shape
        expect(shape == graph.input_shape, f"input shape {graph.input_shape}", shape, f"member '{member.name}'")
    _validate_preprocess(graph)
    output = members[0].output
    if len(members) > 1:
        for member in members:
            got = (member.output.dtype, member.output.shape)
            expected = ("f32", (math.prod(output.shape),))
            expect(got == expected, f"output {expected} in all members", got, f"member '{member.name}'")
    if graph.classes is not None:
        expect(len(output.shape) == 1, "an output of shape [K] for classes", output.shape, "classes")
        expect(len(graph.classes) == output.shape[0], f"{output.shape[0]} classes", len(graph.classes), "classes")
        for name in graph.classes:
            check_name(name, "classes")


def _validate_preprocess(graph: Graph) -> None:
    tables = [member.preprocess_table for member in graph.members]
    if graph.preprocess is None:
        expect(all(table is None for table in tables), "no preprocess_table without preprocess", "one", "preprocess")
        return
    shape = graph.input_shape
    expect(len(shape) == 3, "an input of shape [C, H, W] for preprocess", shape, "preprocess")
    for key in ("mean", "std"):
        values = graph.preprocess.get(key)
        if not isinstance(values, (list, tuple)):
            expect(False, f"'{key}' with {shape[0]} numbers", values, "preprocess")
            continue
        expect(len(values) == shape[0], f"'{key}' with {shape[0]} numbers", len(values), "preprocess")
        for value in values:
            number = f32(value, key, "preprocess")
            expect(key == "mean" or number > 0, "std greater than 0", value, "preprocess")
    for table in tables:
        got = (table.dtype.name, table.shape) if isinstance(table, np.ndarray) else table
        expect(got == ("uint8", (shape[0], 256)), f"a uint8 preprocess_table [{shape[0]}, 256]", got, "preprocess")


def _validate_member(member: Member) -> None:
    at = f"member '{member.name}'"
    expect(len(member.nodes) >= 1, "at least one node", 0, at)
    tensors = len(member.nodes) + 1
    expect(len(member.tensors) == tensors, f"{tensors} tensors", len(member.tensors), at)
    unique_names([node.name for node in member.nodes], f"the nodes of {at}")
    for tensor in member.tensors:
        _validate_tensor(tensor, at)
    expect(member.tensors[0].dtype == "u8", "a u8 input", member.tensors[0].dtype, at)
    written = {0}
    for node in member.nodes:
        _validate_node(node, member, written, f"node '{node.name}' of {at}")
        written.add(node.output)


def _validate_tensor(tensor: Tensor, at: str) -> None:
    check_name(tensor.name, f"a tensor of {at}")
    at = f"tensor '{tensor.name}' of {at}"
    rank = len(tensor.shape) if isinstance(tensor.shape, tuple) else 0
    expect(rank in (1, 3), "shape [C, H, W] or [F]", tensor.shape, at)
    integers(tensor.shape, rank, 1, MAX_ELEMENTS - 1, "a shape", at)
    expect(math.prod(tensor.shape) < MAX_ELEMENTS, f"fewer than {MAX_ELEMENTS} elements", tensor.shape, at)
    expect(tensor.dtype in ("u8", "f32"), "dtype u8 or f32", tensor.dtype, at)
    scale = f32(tensor.scale, "scale", at)
    expect(MIN_SCALE <= scale <= MAX_SCALE, "scale in 2^-126..2^126", scale, at)
    integers([tensor.zero_point], 1, 0, 255, "zero_point", at)
    if tensor.dtype == "f32":
        got = (scale, tensor.zero_point)
        expect(got == (1.0, 0), "scale 1 and zero_point 0 of an f32 tensor", got, at)


def _validate_node(node: Node, member: Member, written: set[int], at: str) -> None:
    expect(node.op in OPS, f"op to be one of {', '.join(OPS)}", node.op, at)
    op = OPS[node.op]
    low, high = op.inputs
    last = len(member.tensors) - 1
    ids = integers(node.inputs, len(node.inputs), 0, last, "inputs", at)
    (output_id,) = integers([node.output], 1, 1, last, "output", at)
    expect(all(i in written for i in ids), "inputs that an earlier node wrote", node.inputs, at)
    expect(output_id not in written, "an output that no other node writes", output_id, at)
    expect(low <= len(ids) <= high, f"{low} to {high} inputs" if low < high else f"{low} input(s)", len(ids), at)
    inputs, output = [member.tensors[i] for i in ids], member.tensors[output_id]
    expect(all(t.dtype == "u8" for t in inputs), "u8 inputs", "f32", at)
    expect(output.dtype == "u8" or node is member.nodes[-1], "f32 only as the output of the last node", "f32", at)
    _validate_keys(node, op, output, at)
    if op.same_grid:
        _validate_same_grid(inputs, output, at)
    if "clamp" in node.attributes:
        clamp = integers(node.attributes["clamp"], 2, 0, 255, "clamp", at)
        expect(clamp[0] <= clamp[1], "clamp with lo <= hi", clamp, at)
    op.check(node, inputs, output, at)
    shape = op.shape(node, [t.shape for t in inputs])
    if shape is not None:
        flat = op.may_be_flat and output.dtype == "f32" and shape[1:] == (1, 1)
        fits = output.shape == shape or (flat and output.shape == shape[:1])
        expect(fits, f"output shape {shape}", output.shape, at)


def _validate_keys(node: Node, op: Op, output: Tensor, at: str) -> None:
    """Exactly the attributes and constants of the op, and bits with a weight."""
    attributes = op.attribute_types(node, output)
    for key in attributes:
        expect(key in node.attributes, f"the attribute '{key}'", None, at)
    unknown = sorted(set(node.attributes) - set(attributes))
    expect(not unknown, f"no attributes of {node.op} but {', '.join(attributes) or 'none'}", unknown, at)
    expect(set(node.constants) == set(op.constants), f"constants {op.constants}", tuple(node.constants), at)
    expect(op.has_weight or node.bits is None, f"no bits of {node.op}", node.bits, at)


def _validate_same_grid(inputs: list[Tensor], output: Tensor, at: str) -> None:
    expect(output.dtype == "u8", "a u8 output", output.dtype, at)
    expected = (float(np.float32(output.scale)), output.zero_point)
    for tensor in inputs:
        got = (float(np.float32(tensor.scale)), tensor.zero_point)
        expect(got == expected, f"the output's scale and zero_point {expected} at each input", got, at)
