"""The ONNX nodes of each op of docs/format.md: one function for an op, in files named as those of qdeploy/ops/."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qdeploy.graph import Activation, Node
from qdeploy.onnx_nodes import attention, elementwise, moves, tokens, weighted, windows
from qdeploy.onnx_nodes.writer import Value, Writer

OPS: dict[str, Callable[[Writer, Node, Sequence[Value], Activation], Value]] = {
    **weighted.OPS,
    **windows.OPS,
    **elementwise.OPS,
    **moves.OPS,
    **tokens.OPS,
    **attention.OPS,
}
