"""Operators in terms of others: QLinearX(x, ...) is QuantizeLinear(X(DequantizeLinear(x))), the QDQ form; a Sum of
several is one of two at a time.

The message itself is rewritten, so that onnxruntime can run what is read here, too: each step is one of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from qdeploy.checks import quoted
from qdeploy.errors import ExportError

if TYPE_CHECKING:
    import onnx

MOST_TERMS = 64  # of a sum, which becomes as many nodes
MICROSOFT = "com.microsoft"
OF_ONNX = ("QLinearConv", "QLinearMatMul", "Sum")  # the others are of com.microsoft


def in_qdq_form(proto: onnx.ModelProto) -> None:
    """Rewrites the nodes of the graph; raises ExportError for one that is not as its definition says."""
    taken = {name for node in proto.graph.node for name in (*node.input, *node.output)}
    nodes = [new for node in proto.graph.node for new in _rewritten(node, taken)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _rewritten(node: onnx.NodeProto, taken: set[str]) -> list[onnx.NodeProto]:
    at_home = node.domain == MICROSOFT
    rule = RULES.get(node.op_type)
    if rule is None or at_home == (node.op_type in OF_ONNX):
        return [node]
    pen = _Pen(node, taken)
    try:
        rule(pen, *node.input)
    except TypeError:
        got = f"{len(node.input)} inputs"
        raise ExportError(f"expected the inputs of {node.op_type}, got {got} - at {_at(node)}") from None
    return pen.nodes


def _at(node: onnx.NodeProto) -> str:
    return f"node {quoted(node.name or next(iter(node.output), ''))} ({node.op_type})"


class _Pen:
    """Writes what stands in place of one node."""

    def __init__(self, node: onnx.NodeProto, taken: set[str]):
        self.node, self.taken, self.nodes = node, taken, list[Any]()
        self.output = next(iter(node.output), "")
        self.more = 1  # with the same name

    def __call__(self, op: str, inputs: list[str], output: str | None = None, attributes: bool = False) -> str:
        """One more node; returns its output. `attributes`: it has those of the node itself, and its name."""
        from onnx import NodeProto

        output = self._fresh(op) if output is None else output
        name = self.node.name if attributes else output
        new = NodeProto(op_type=op, name=name, input=inputs, output=[output])
        if attributes:
            new.attribute.extend(a for a in self.node.attribute if a.name not in ("channels_last", "activation"))
        self.nodes.append(new)
        return output

    def _fresh(self, op: str) -> str:
        name = f"{self.output}_{op}"
        while name in self.taken:
            self.more += 1
            name = f"{self.output}_{op}_{self.more}"
        self.taken.add(name)
        return name

    def real(self, codes: str, scale: str, zero_point: str = "", axis: int | None = None) -> str:
        output = self("DequantizeLinear", [codes, scale, *filter(None, [zero_point])])
        if axis is not None:
            attribute = self.nodes[-1].attribute.add(name="axis", i=axis)
            attribute.type = attribute.INT
        return output

    def codes(self, real: str, scale: str, zero_point: str = "") -> None:
        self("QuantizeLinear", [real, scale, *filter(None, [zero_point])], self.output)


def _conv(
    pen: _Pen, x: str, xs: str, xz: str, w: str, ws: str, wz: str, ys: str, yz: str, bias: str | None = None
) -> None:
    operands = [pen.real(x, xs, xz), pen.real(w, ws, wz, axis=0)]
    pen.codes(pen("Conv", operands + _bias(pen, bias, xs, ws), attributes=True), ys, yz)


def _bias(pen: _Pen, codes: str | None, xs: str, ws: str) -> list[str]:
    """int32, whose scale is the product of the two others."""
    return [pen.real(codes, pen("Mul", [xs, ws]), axis=0)] if codes else []


def _matmul(pen: _Pen, a: str, sa: str, za: str, b: str, sb: str, zb: str, sy: str, zy: str) -> None:
    pen.codes(pen("MatMul", [pen.real(a, sa, za), pen.real(b, sb, zb, axis=-1)], attributes=True), sy, zy)


def _gemm(
    pen: _Pen,
    a: str,
    sa: str,
    za: str,
    b: str,
    sb: str,
    zb: str,
    c: str = "",
    sy: str = "",
    zy: str = "",
) -> None:
    """Without a scale of the output that is real."""
    turned = any(attribute.name == "transB" and attribute.i for attribute in pen.node.attribute)
    operands = [pen.real(a, sa, za), pen.real(b, sb, zb, axis=0 if turned else 1)]
    operands += _bias(pen, c, sa, sb)
    result = pen("Gemm", operands, None if sy else pen.output, attributes=True)
    if sy:
        pen.codes(result, sy, zy)


def _pair(op: str) -> Callable[..., None]:
    def rule(pen: _Pen, a: str, sa: str, za: str, b: str, sb: str, zb: str, sc: str, zc: str = "") -> None:
        pen.codes(pen(op, [pen.real(a, sa, za), pen.real(b, sb, zb)], attributes=True), sc, zc)

    return rule


def _single(op: str) -> Callable[..., None]:
    def rule(pen: _Pen, x: str, sx: str, zx: str, sy: str, zy: str = "") -> None:
        last = next((a.i for a in pen.node.attribute if a.name == "channels_last"), 0)
        if last:
            got = "channels last"
            raise ExportError(f"expected channels behind the batch, got {got} - at {_at(pen.node)}")
        pen.codes(pen(op, [pen.real(x, sx, zx)], attributes=True), sy, zy)

    return rule


def _concat(pen: _Pen, sy: str, zy: str, *parts: str) -> None:
    if len(parts) % 3:
        raise TypeError

    def operands() -> Iterator[str]:
        for i in range(0, len(parts), 3):
            yield pen.real(parts[i], parts[i + 1], parts[i + 2])

    pen.codes(pen("Concat", list(operands()), attributes=True), sy, zy)


def _sum(pen: _Pen, first: str, *others: str) -> None:
    if len(others) >= MOST_TERMS:
        got = len(others) + 1
        raise ExportError(f"expected a sum of at most {MOST_TERMS} tensors, got one of {got} - at {_at(pen.node)}")
    for i, term in enumerate(others, 1):
        first = pen("Sum", [first, term], pen.output if i == len(others) else None, attributes=True)
    if not others:
        pen("Sum", [first], pen.output, attributes=True)


RULES: dict[str, Callable[..., None]] = {
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "QGemm": _gemm,
    "Sum": _sum,
    "QLinearAdd": _pair("Add"),
    "QLinearMul": _pair("Mul"),
    "QLinearConcat": _concat,
    "QLinearAveragePool": _single("AveragePool"),
    "QLinearGlobalAveragePool": _single("GlobalAveragePool"),
    "QLinearReduceMean": _single("ReduceMean"),
    "QLinearSigmoid": _single("Sigmoid"),
    "QLinearLeakyRelu": _single("LeakyRelu"),
    "QLinearSoftmax": _single("Softmax"),
}
