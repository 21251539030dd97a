"""Which graphs are valid: the one definition, in Python, of docs/format.md section 3. csrc/graph.cc is the other."""

from __future__ import annotations

import math

import numpy as np

from qdeploy.checks import (
    array,
    check_keys,
    check_name,
    expect,
    integer,
    integers,
    key_of,
    kind,
    number,
    numbers,
    quoted,
    shape_text,
)
from qdeploy.errors import ModelError
from qdeploy.graph import COMBINE, MAX_ELEMENTS, MAX_MEMBERS, MAX_NODES, Activation, Graph, Member, Node, Shape
from qdeploy.ops import OPS, Op

MIN_SCALE, MAX_SCALE = 2.0**-126, 2.0**126  # so that 1/scale is a normal f32 as well


def validate(graph: Graph, input_shape: Shape | None = None) -> None:
    """Raise ModelError, naming member and node, unless `graph` is a valid model of docs/format.md section 3.

    input_shape: what the members must take; None: what the first one takes.
    """
    members = graph.members
    expect(len(members) <= MAX_MEMBERS, f"at most {MAX_MEMBERS} entries", len(members), "key `members` of the graph")
    expect(len(members) >= 1, "at least one member", "none", "the graph")
    if input_shape is None:
        input_shape = members[0].tensors[0].shape if members[0].tensors else ()
    _validate_preprocess(graph.preprocess, input_shape)
    for i, member in enumerate(members):
        check_name(member.name, key_of("name", f"member {i}"))
        _validate_member(member, input_shape, graph.preprocess is not None)
    total = sum(len(member.nodes) for member in members)
    expect(total <= MAX_NODES, f"at most {MAX_NODES} nodes in all members", total, "the graph")
    _validate_ensemble(graph)
    if graph.classes is not None:
        _validate_classes(graph.classes, members[0].output)


def _validate_ensemble(graph: Graph) -> None:
    if len(graph.members) == 1:
        expect(graph.combine is None, "combine null for one member", kind(graph.combine), "the graph")
        return
    at = key_of("combine", "the graph")
    if not isinstance(graph.combine, str):
        raise ModelError(f"expected a string, got {kind(graph.combine)} - at {at}")
    expect(graph.combine in COMBINE, "`logits` or `probs`", quoted(graph.combine), at)
    shape = graph.members[0].output.shape
    names: set[str] = set()
    for member in graph.members:
        output, at = member.output, member_at(member.name)
        alike = output.dtype == "f32" and len(output.shape) == 1 and output.shape == shape
        expect(alike, "members that end in one f32 shape [K]", shape_text(output.shape), at)
        expect(member.name not in names, "unique names", f"{quoted(member.name)} twice", "the members of the graph")
        names.add(member.name)


def _validate_classes(classes: list[str], output: Activation) -> None:
    expect(len(output.shape) == 1, "an output of shape [K] for classes", shape_text(output.shape), "the graph")
    expect(isinstance(classes, list), "an array", kind(classes), "key `classes` of the graph")
    expect(len(classes) == output.shape[0], f"{output.shape[0]} class names", len(classes), "the graph")
    for name in classes:
        check_name(name, "key `classes` of the graph")


def _validate_preprocess(preprocess: dict[str, list[float]] | None, shape: Shape) -> None:
    if preprocess is None:
        return
    at = key_of("preprocess", key_of("input", "the graph"))
    expect(len(shape) == 3, "an input of shape [C, H, W]", shape_text(shape), at)
    expect(isinstance(preprocess, dict), "an object", kind(preprocess), at)
    check_keys(preprocess, ("mean", "std"), at)
    numbers(preprocess["mean"], shape[0], key_of("mean", at))
    for std in numbers(preprocess["std"], shape[0], key_of("std", at)):
        expect(std > 0, "a positive std", f"{std:.3g}", at)


def member_at(name: str) -> str:
    return f"member {quoted(name)}"


def node_at(node: Node, at: str) -> str:
    return f"node {quoted(node.name)} of {at}"


def _validate_member(member: Member, input_shape: Shape, has_preprocess: bool) -> None:
    at = member_at(member.name)
    expect(len(member.tensors) >= 1, "at least one tensor", "none", at)
    for i, tensor in enumerate(member.tensors):
        check_name(tensor.name, key_of("name", f"tensor {i} of {at}"))
        _validate_activation(tensor, f"tensor {quoted(tensor.name)} of {at}")
    first = member.tensors[0]
    fits = first.dtype == "u8" and first.shape == input_shape
    expect(fits, f"a u8 input of shape {shape_text(input_shape)}", shape_text(first.shape), at)
    if has_preprocess:
        array(member.preprocess_table, np.uint8, (first.shape[0], 256), key_of("preprocess_table", at))
    else:
        expect(member.preprocess_table is None, "no preprocess_table", "one", at)
    written, names = {0}, set()
    for i, node in enumerate(member.nodes):
        check_name(node.name, key_of("name", f"node {i} of {at}"))
        _validate_node(node, member, written, node_at(node, at))
        written.add(node.output)
        expect(node.name not in names, "unique names", f"{quoted(node.name)} twice", f"the nodes of {at}")
        names.add(node.name)
    expect(len(member.nodes) >= 1, "at least one node", "none", at)
    count = len(member.tensors)
    expect(count == len(member.nodes) + 1, "one tensor more than nodes", count, at)
    for i, tensor in enumerate(member.tensors):
        is_output = i == member.nodes[-1].output
        expect(tensor.dtype == "u8" or is_output, "f32 for the output only", f"tensor {i}", at)


def _validate_activation(tensor: Activation, at: str) -> None:
    dtype = quoted(tensor.dtype) if isinstance(tensor.dtype, str) else kind(tensor.dtype)
    expect(tensor.dtype in ("u8", "f32"), "dtype u8 or f32", dtype, at)
    shape = integers(tensor.shape, 1, 3, 1, MAX_ELEMENTS, key_of("shape", at))
    expect(len(shape) != 2, "shape [C, H, W] or [F]", shape_text(shape), at)
    expect(math.prod(shape) < MAX_ELEMENTS, "fewer than 2^28 elements", shape_text(shape), at)
    scale = number(tensor.scale, key_of("scale", at))
    expect(MIN_SCALE <= scale <= MAX_SCALE, "a scale in [2^-126, 2^126]", f"{scale:.3g}", at)
    zero_point = integer(tensor.zero_point, 0, 255, key_of("zero_point", at))
    plain = tensor.dtype == "u8" or (scale == 1 and zero_point == 0)
    expect(plain, "scale 1 and zero point 0 of an f32 tensor", "others", at)


def _validate_node(node: Node, member: Member, written: set[int], at: str) -> None:
    name = quoted(node.op) if isinstance(node.op, str) else kind(node.op)
    expect(isinstance(node.op, str) and node.op in OPS, "an op that this engine has", name, at)
    op = OPS[node.op]
    last = len(member.tensors) - 1
    ids = integers(node.inputs, *op.inputs, 0, last, key_of("inputs", at))
    for i in ids:
        expect(i in written, "inputs written by an earlier node", f"tensor {i}", at)
        expect(member.tensors[i].dtype == "u8", "u8 inputs", f"f32 tensor {i}", at)
    output_id = integer(node.output, 0, last, key_of("output", at))
    expect(output_id not in written, "an output that nothing wrote before", f"tensor {output_id}", at)
    inputs, output = [member.tensors[i] for i in ids], member.tensors[output_id]
    expect(output.dtype == "u8" or op.may_be_f32, "a u8 output", "f32", at)
    _validate_keys(node, op, output, at)
    op.check(node, inputs, output, at)
    if "clamp" in node.attributes:
        clamp = integers(node.attributes["clamp"], 2, 2, 0, 255, key_of("clamp", at))
        expect(clamp[0] <= clamp[1], "clamp [lo, hi] with lo <= hi", shape_text(clamp), at)
    if op.same_grid:
        _validate_same_grid(node, inputs, output, at)


def _validate_keys(node: Node, op: Op, output: Activation, at: str) -> None:
    """Exactly the attributes and constants of the op, and bits with a weight."""
    check_keys((*node.attributes, *node.constants), (*op.attribute_types(node, output), *op.constants), at)
    expect(op.has_weight or node.bits is None, f"no bits of {node.op}", node.bits, at)


def _validate_same_grid(node: Node, inputs: list[Activation], output: Activation, at: str) -> None:
    grid = (np.float32(output.scale), output.zero_point)
    for i, tensor in zip(node.inputs, inputs, strict=True):
        same = (np.float32(tensor.scale), tensor.zero_point) == grid
        expect(same, "the output's scale and zero point on every input", f"others on tensor {i}", at)
