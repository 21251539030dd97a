"""The operations of docs/format.md, one row each: all facts of an op, its shape and its checks, in one small file.

What else follows from the row stands nowhere: whether an output is clamped, or has the grid of its inputs is its
`output` kind. `_engine.ops()` is the same table in C++; tests/test_ops.py compares them, and every phase that must
know all ops: the reference, the export, ONNX, GPU programs, the random graphs.
"""

from __future__ import annotations

from qdeploy.graph import Member
from qdeploy.ops import attention, elementwise, moves, resize, tokens, weighted, windows
from qdeploy.ops.op import Op, Rows

OPS: dict[str, Op] = {
    **weighted.OPS,
    **windows.OPS,
    **elementwise.OPS,
    **moves.OPS,
    **tokens.OPS,
    **attention.OPS,
    **resize.OPS,
}


def rows_of_texts(member: Member) -> list[Rows]:
    """Of every activation of a valid member that takes texts of any length."""
    rows: list[Rows] = [0] + [None] * (len(member.tensors) - 1)
    for node in member.nodes:
        inputs = [member.tensors[i] for i in node.inputs]
        rows[node.output] = OPS[node.op].rows(node, inputs, [rows[i] for i in node.inputs], node.name)
    return rows
