"""Which graphs are valid: the one definition, in Python, of docs/format.md section 3.

csrc/graph.cc and csrc/member_reader.cc are the other.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qdeploy.checks import (
    Facts,
    alternatives,
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
from qdeploy.graph import (
    COMBINE,
    DTYPES,
    MAX_ELEMENTS,
    MAX_MEMBERS,
    MAX_NODES,
    SEVERAL_OUTPUTS,
    Activation,
    Graph,
    Member,
    Node,
    Shape,
)
from qdeploy.ops import OPS
from qdeploy.ops.op import Rows, check_clamp, known_dtypes

MIN_SCALE, MAX_SCALE = 2.0**-126, 2.0**126  # so that 1/scale is a normal f32 as well
NEWEST = max(SEVERAL_OUTPUTS, *(op.version for op in OPS.values()))
INPUT_AT = key_of("input", "the graph")


def validate(graph: Graph) -> None:
    """Raise ModelError, naming member and node, unless `graph` is a valid model of docs/format.md section 3."""
    check_text(graph.vocabulary, graph.variable)
    facts = Facts(NEWEST, graph.vocabulary)
    check_members(graph)
    input_shape = graph.members[0].tensors[0].shape if graph.members[0].tensors else ()
    check_preprocess(graph.preprocess, input_shape)
    for i, member in enumerate(graph.members):
        check_name(member.name, key_of("name", f"member {i}"))
        check_member_name(member.name, key_of("name", f"member {i}"))
        check = MemberCheck(member.name, input_shape, graph.preprocess is not None, graph.variable, facts)
        for j, tensor in enumerate(member.tensors):
            check_name(tensor.name, key_of("name", f"tensor {j} of {check.at}"))
            check.tensor(tensor)
        check.input()
        check.preprocess_table(member.preprocess_table)
        for j, node in enumerate(member.nodes):
            check_name(node.name, key_of("name", f"node {j} of {check.at}"))
            check.operands(node, [*node.attributes, *node.constants, *absent_constants(node)])
            check.node(node)
        check.end(member.outputs)
    check_outputs(graph)
    check_results(graph, facts)


def absent_constants(node: Node) -> list[str]:
    """Those of the node's op that are null in a file."""
    op = OPS.get(node.op) if isinstance(node.op, str) else None
    return [key for key in op.nullable if key in op.constants and key not in node.constants] if op else []


def check_members(graph: Graph) -> None:
    """How many members and nodes there are."""
    count, nodes = len(graph.members), sum(len(member.nodes) for member in graph.members)
    expect(nodes <= MAX_NODES, f"at most {MAX_NODES} nodes in all members", nodes, "the graph")
    expect(count <= MAX_MEMBERS, f"at most {MAX_MEMBERS} entries", count, "key `members` of the graph")
    expect(count >= 1, "at least one member", "none", "the graph")


def check_member_name(name: str, at: str) -> None:
    """`member/node` is how results are asked for: the first `/` ends the member's name."""
    expect("/" not in name, "a name without `/`", quoted(name), at)


def check_text(vocabulary: Any, variable: Any) -> None:
    """The keys of an input of token ids."""
    if vocabulary is not None:
        integer(vocabulary, 1, MAX_ELEMENTS, key_of("vocabulary", INPUT_AT))
    expect(isinstance(variable, bool), "a boolean", kind(variable), key_of("variable", INPUT_AT))
    expect(vocabulary is not None or not variable, "token ids for texts of any length", "no vocabulary", INPUT_AT)


def check_preprocess(preprocess: Any, input_shape: Shape) -> None:
    if preprocess is None:
        return
    at = key_of("preprocess", INPUT_AT)
    expect(len(input_shape) == 3, "an input of shape [C, H, W]", shape_text(input_shape), at)
    expect(isinstance(preprocess, dict), "an object", kind(preprocess), at)
    check_keys(preprocess, ("mean", "std"), at)
    numbers(preprocess["mean"], input_shape[0], key_of("mean", at))
    for std in numbers(preprocess["std"], input_shape[0], key_of("std", at)):
        expect(std > 0, "a positive std", f"{std:.3g}", at)


def check_outputs(graph: Graph) -> None:
    """What the outputs of the members, each of which is valid, are made into."""
    _check_ensemble(graph)
    if graph.classes is not None:
        _check_classes(graph.classes, graph.members[0])


def check_results(graph: Graph, facts: Facts) -> None:
    """The bounds on nodes with weights; those come last because the engine finds them when it packs the weights."""
    for member in graph.members:
        for node in member.nodes:
            check, inputs = OPS[node.op].bound, [member.tensors[i] for i in node.inputs]
            if check:
                check(node, inputs, member.tensors[node.output], node_at(node, member_at(member.name)), facts)


def _check_ensemble(graph: Graph) -> None:
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
        expect(member.outputs is None, "one output of a member of an ensemble", len(member.output_ids), at)
        alike = output.dtype == "f32" and len(output.shape) == 1 and output.shape == shape
        expect(alike, "members that end in one f32 shape [K]", shape_text(output.shape), at)
        expect(member.name not in names, "unique names", f"{quoted(member.name)} twice", "the members of the graph")
        names.add(member.name)


def _check_classes(classes: list[str], member: Member) -> None:
    output, count = member.output, len(member.output_ids)
    expect(count == 1, "one output for classes", count, "the graph")
    expect(len(output.shape) == 1, "an output of shape [K] for classes", shape_text(output.shape), "the graph")
    expect(isinstance(classes, list), "an array", kind(classes), "key `classes` of the graph")
    expect(len(classes) == output.shape[0], f"{output.shape[0]} class names", len(classes), "the graph")
    for name in classes:
        check_name(name, "key `classes` of the graph")


def member_at(name: str) -> str:
    return f"member {quoted(name)}"


def node_at(node: Node, at: str) -> str:
    return f"node {quoted(node.name)} of {at}"


class MemberCheck:
    """The checks of one member but for names, in the order of a file: its tensors, its input, its nodes, its end.

    So that a graph that is being read is checked as it grows: of several faults every reader names the first.
    """

    def __init__(self, name: str, input_shape: Shape, has_preprocess: bool, variable: bool, facts: Facts) -> None:
        self.at = member_at(name)
        self.input_shape = input_shape
        self.has_preprocess = has_preprocess
        self.facts = facts
        self.tensors: list[Activation] = []
        self.written: dict[int, Rows] = {0: 0 if variable else None}  # by tensor id
        self.names: set[str] = set()  # of nodes
        self.last = 0  # the output of the last node

    def tensor(self, tensor: Activation) -> None:
        at = f"tensor {quoted(tensor.name)} of {self.at}"
        dtype = quoted(tensor.dtype) if isinstance(tensor.dtype, str) else kind(tensor.dtype)
        known = known_dtypes(list(DTYPES), self.facts.version)
        expect(tensor.dtype in known, f"dtype {alternatives(known)}", dtype, at)
        shape = integers(tensor.shape, 1, 3, 1, MAX_ELEMENTS, key_of("shape", at))
        expect(len(shape) != 2 or self.facts.version >= 3, "shape [C, H, W] or [F]", shape_text(shape), at)
        expect(math.prod(shape) < MAX_ELEMENTS, "fewer than 2^28 elements", shape_text(shape), at)
        scale = number(tensor.scale, key_of("scale", at))
        expect(MIN_SCALE <= scale <= MAX_SCALE, "a scale in [2^-126, 2^126]", f"{scale:.3g}", at)
        zero_point = integer(tensor.zero_point, 0, 255, key_of("zero_point", at))
        if tensor.dtype == "s16":
            expect(zero_point == 0, "zero point 0 of an s16 tensor", zero_point, at)
        elif tensor.dtype != "u8":
            plain = scale == 1 and zero_point == 0
            expect(plain, f"scale 1 and zero point 0 of an {tensor.dtype} tensor", "others", at)
        self.tensors.append(tensor)

    def input(self) -> None:
        expect(len(self.tensors) >= 1, "at least one tensor", "none", self.at)
        first, shape = self.tensors[0], shape_text(self.input_shape)
        if self.facts.vocabulary is None:
            fits = first.dtype == "u8" and first.shape == self.input_shape
            expect(fits, f"a u8 input of shape {shape}", shape_text(first.shape), self.at)
        else:
            fits = first.dtype == "i32" and first.shape == self.input_shape and len(first.shape) == 1
            expect(fits, "an i32 input of one dimension, that of the graph", shape_text(first.shape), self.at)

    def preprocess_table(self, table: np.ndarray | None) -> None:
        if self.has_preprocess:
            array(table, np.uint8, (self.input_shape[0], 256), key_of("preprocess_table", self.at))
        else:
            expect(table is None, "no preprocess_table", "one", self.at)

    def operands(self, node: Node, keys: list[str]) -> None:
        """That the op is known, its inputs and output are fit for it, and its own keys are these."""
        at = node_at(node, self.at)
        name = quoted(node.op) if isinstance(node.op, str) else kind(node.op)
        expect(isinstance(node.op, str) and node.op in OPS, "an op that this engine has", name, at)
        op, last, version = OPS[node.op], len(self.tensors) - 1, self.facts.version
        expect(op.version <= version, f"format version {op.version} for the op {name}", version, at)
        for index, i in enumerate(integers(node.inputs, *op.inputs, 0, last, key_of("inputs", at))):
            expect(i in self.written, "inputs written by an earlier node", f"tensor {i}", at)
            dtype, known = self.tensors[i].dtype, known_dtypes(op.may_read(index), version)
            expect(dtype in known, f"{alternatives(known)} inputs", f"{dtype} tensor {i}", at)
        output = integer(node.output, 0, last, key_of("output", at))
        expect(output not in self.written, "an output that nothing wrote before", f"tensor {output}", at)
        dtype, known = self.tensors[output].dtype, known_dtypes(op.writes, version)
        expect(dtype in known, f"a {alternatives(known)} output", dtype, at)
        check_keys(keys, (*op.attribute_types(node, self.tensors[output], keys), *op.constants), at)

    def node(self, node: Node) -> None:
        """The rest of a node whose operands are valid; it counts as written from now on."""
        at, op = node_at(node, self.at), OPS[node.op]
        inputs, output = [self.tensors[i] for i in node.inputs], self.tensors[node.output]
        expect(op.has_weight or node.bits is None, f"no bits of {node.op}", node.bits, at)
        op.check(node, inputs, output, at, self.facts)
        if "clamp" in node.attributes:
            check_clamp(node, "clamp", at)
        if op.same_grid:
            self._same_grid(node, inputs, output)
        expect(node.name not in self.names, "unique names", f"{quoted(node.name)} twice", f"the nodes of {self.at}")
        self.names.add(node.name)
        self.written[node.output] = op.rows(node, inputs, [self.written[i] for i in node.inputs], at)
        self.last = node.output

    def _same_grid(self, node: Node, inputs: list[Activation], output: Activation) -> None:
        grid = (np.float32(output.scale), output.zero_point)
        place = node_at(node, self.at)
        for i, tensor in zip(node.inputs, inputs, strict=True):
            dtypes = f"{tensor.dtype} tensor {i} and {output.dtype} output"
            expect(tensor.dtype == output.dtype, "the output's dtype on every input", dtypes, place)
            same = (np.float32(tensor.scale), tensor.zero_point) == grid
            expect(same, "the output's scale and zero point on every input", f"others on tensor {i}", place)

    def end(self, outputs: Any) -> None:
        """The member as a whole. `outputs`: their ids, or None where there is one."""
        expect(len(self.names) >= 1, "at least one node", "none", self.at)
        count = len(self.tensors)
        expect(count == len(self.names) + 1, "one tensor more than nodes", count, self.at)
        ids = {self.last} if outputs is None else self._outputs(outputs)
        for i, tensor in enumerate(self.tensors):
            fits = tensor.dtype != "f32" or i in ids
            expect(fits, "f32 for outputs only", f"tensor {i}", self.at)

    def _outputs(self, outputs: Any) -> set[int]:
        """The ids of several, checked."""
        at = key_of("outputs", self.at)
        found: set[int] = set()
        for i in integers(outputs, 2, MAX_NODES, 0, len(self.tensors) - 1, at):
            expect(i not in found, "outputs that differ", f"tensor {i} twice", at)
            dtype = self.tensors[i].dtype
            expect(dtype == "f32", "f32 outputs", f"{dtype} tensor {i}", at)
            found.add(i)
        return found
