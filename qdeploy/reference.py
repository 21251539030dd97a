"""The arithmetic of docs/format.md section 4 in numpy: the oracle that every kernel equals bit for bit.

Everything here is either exact in integers or one correctly rounded f32 operation at a time. Arrays are NCHW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from qdeploy.errors import InputError
from qdeploy.graph import Activation, Graph, Member, Node

Numbers = np.ndarray | np.float32


def run(graph: Graph, x: np.ndarray, taps: Sequence[str] = ()) -> np.ndarray | tuple[np.ndarray, dict[str, np.ndarray]]:
    """The output of `graph` for a batch, computed the plain way.

    x: f32 [N, C, H, W] or [N, F], or, where the graph has `preprocess`, u8 [N, H, W, C]. N may be 0.
    Returns f32 or the codes u8, [N, K] or [N, C, H, W]; of an ensemble the combined probabilities, f32 [N, K].
    With `taps` (names of nodes, in an ensemble "member/node") returns (output, {name: array}) with their outputs.
    Raises InputError for an x that does not fit and for an unknown tap.
    """
    output, _, tapped = run_all(graph, x)
    if not len(taps):
        return output
    unknown = [name for name in taps if name not in tapped]
    if unknown:
        raise InputError(f"expected the name of a node, got {unknown[0]!r} - at taps")
    return output, {name: tapped[name] for name in taps}


def predict(graph: Graph, x: np.ndarray) -> np.ndarray:
    """The class of each image, int64 [N]: the first largest score. x as for `run`; the output must be [N, K]."""
    return run_all(graph, x)[1].argmax(axis=1)


def run_all(graph: Graph, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The output, the scores whose first largest is the class, and the output of every node by its tap name."""
    check_input(graph, x)
    outputs, tapped = [], {}
    for member in graph.members:
        values = run_member(member, x)
        outputs.append(values[member.nodes[-1].output])
        prefix = f"{member.name}/" if graph.combine else ""
        tapped.update({prefix + node.name: values[node.output] for node in member.nodes})
    output, scores = combine(outputs, graph.combine)
    return output, scores, tapped


def check_input(graph: Graph, x: np.ndarray) -> None:
    """Raise InputError unless x is a batch that `run` takes."""
    shape = graph.input_shape
    if x.dtype == np.uint8 and graph.preprocess:
        shape = (*shape[1:], shape[0])
    elif x.dtype != np.float32:
        expected = "float32 or uint8" if graph.preprocess else "float32"
        raise InputError(f"expected dtype {expected}, got {x.dtype} - at the input")
    if x.ndim != len(shape) + 1 or x.shape[1:] != shape:
        raise InputError(f"expected shape [N, {', '.join(map(str, shape))}], got {list(x.shape)} - at the input")
    if x.dtype == np.float32 and not np.isfinite(x).all():
        raise InputError("expected finite numbers, got NaN or infinity - at the input")


def run_member(member: Member, x: np.ndarray) -> dict[int, np.ndarray]:
    """Every activation of the member, by tensor id."""
    table = member.preprocess_table
    if x.dtype == np.uint8 and table is not None:
        values = {0: np.stack([row[x[..., c]] for c, row in enumerate(table)], axis=1)}
    else:
        values = {0: quantize(x, member.tensors[0])}
    for node in member.nodes:
        inputs = [member.tensors[i] for i in node.inputs]
        output = member.tensors[node.output]
        result = OPS[node.op](node, [values[i] for i in node.inputs], inputs, output)
        if "clamp" in node.attributes:
            result = np.clip(np.rint(result), *node.attributes["clamp"]).astype(np.uint8)
        values[node.output] = result.reshape(len(x), *output.shape)  # f32 [C, 1, 1] may be declared [C]
    return values


def fma32(a: Numbers, b: Numbers, c: Numbers) -> np.ndarray:
    """a*b + c in f32 with ONE rounding, for f32 arrays (or f32 scalars) that broadcast.

    The product of two f32 is exact in f64. The f64 sum is rounded to odd: where it is inexact (its error `e` is exact
    by Knuth's TwoSum) and its last bit is even, it moves one step towards the true sum. An f64 rounded to odd has more
    than 24 + 2 bits, so rounding it to f32 gives what rounding the true sum would give, ties and subnormals included.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        c64 = np.asarray(c, np.float64)
        p = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        s = np.asarray(p + c64)
        t = s - p
        e = (p - (s - t)) + (c64 - t)
        bits = s.view(np.int64)
        step = np.where((e > 0) == (s > 0), 1, -1)
        odd = np.where((np.abs(e) > 0) & (bits & 1 == 0), bits + step, bits)
        return odd.view(np.float64).astype(np.float32)


def quantize(x: np.ndarray, activation: Activation) -> np.ndarray:
    """f32 numbers to the u8 codes of `activation`."""
    inverse = np.float32(1) / np.float32(activation.scale)
    return np.clip(np.rint(fma32(x, inverse, np.float32(activation.zero_point))), 0, 255).astype(np.uint8)


def preprocess_table(preprocess: dict[str, list[float]], activation: Activation) -> np.ndarray:
    """The u8 [C, 256] table from pixel values to the codes of the input `activation`; row c is channel c."""
    mean, std = (np.asarray(preprocess[key], np.float32)[:, None] for key in ("mean", "std"))
    return quantize((np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std, activation)


def windows(x: np.ndarray, node: Node, kernel: tuple[int, int], dilation: tuple[int, int]) -> np.ndarray:
    """A view [N, C, OH, OW, KH, KW] of the windows of x [N, C, H, W], which is padded with zeros."""
    top, left, bottom, right = node.attributes["padding"]
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    views = sliding_window_view(padded, extent, axis=(2, 3))
    (sh, sw), (dh, dw) = node.attributes["stride"], dilation
    return views[:, :, ::sh, ::sw, ::dh, ::dw]


def requantize(acc: np.ndarray, node: Node, residual: list[np.ndarray]) -> np.ndarray:
    """r = fma(float(acc), m, b), then with a residual r = fma(float(residual), m_res, r). Channels are axis 1."""
    shape = (-1, *[1] * (acc.ndim - 2))
    m, b = (node.constants[key].reshape(shape) for key in ("multiplier", "bias"))
    r = fma32(to_f32(acc), m, b)
    for q in residual:  # one or none
        r = fma32(q.reshape(acc.shape).astype(np.float32), np.float32(node.attributes["residual_multiplier"]), r)
    return r


def to_f32(acc: np.ndarray) -> np.ndarray:
    """Integers held in f64 to f32, half to even; by way of int64, because f64 products can leave a -0."""
    return acc.astype(np.int64).astype(np.float32)


# Sums of codes are taken in f64, because BLAS is fast there. They are exact in any order: every partial sum is an
# integer below K*255*2^(b-1) < 2^31, and f64 holds all integers up to 2^53.


def conv2d(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    weight, groups = node.constants["weight"], node.attributes["groups"]
    out_channels, depth, kh, kw = weight.shape
    x = values[0].astype(np.float64) - inputs[0].zero_point
    view = windows(x, node, (kh, kw), node.attributes["dilation"])  # padding: zero_point - zero_point = 0
    n, _, oh, ow, _, _ = view.shape
    view = view.reshape(n, groups, depth, oh, ow, kh, kw).transpose(1, 0, 3, 4, 2, 5, 6)
    columns = view.reshape(groups, n * oh * ow, depth * kh * kw)
    acc = columns @ weight.reshape(groups, -1, depth * kh * kw).astype(np.float64).transpose(0, 2, 1)
    acc = acc.reshape(groups, n, oh, ow, out_channels // groups).transpose(1, 0, 4, 2, 3)
    return requantize(acc.reshape(n, out_channels, oh, ow), node, values[1:])


def linear(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    acc = (values[0].astype(np.float64) - inputs[0].zero_point) @ node.constants["weight"].T.astype(np.float64)
    return requantize(acc, node, values[1:])


def add(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    (a, b), (ma, mb) = (v.astype(np.float32) for v in values), map(np.float32, node.attributes["multipliers"])
    return fma32(a, ma, fma32(b, mb, np.float32(node.attributes["bias"])))


def mul(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    a, b = (v.astype(np.int64) - activation.zero_point for v, activation in zip(values, inputs, strict=True))
    multiplier, bias = (np.float32(node.attributes[key]) for key in ("multiplier", "bias"))
    return fma32(to_f32(a * b), multiplier, bias)  # a gate [C, 1, 1] is the same for all pixels


def avg_pool2d(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    kernel, multiplier = node.attributes["kernel"], node.constants["multiplier"]
    x = values[0].astype(np.float64) - inputs[0].zero_point
    acc = windows(x, node, kernel, (1, 1)).sum(axis=(4, 5))
    real = windows(np.ones((1, 1, *x.shape[2:]), np.int64), node, kernel, (1, 1)).sum(axis=(4, 5))
    m = multiplier[real - 1] if multiplier.size > 1 else multiplier[0]
    return fma32(to_f32(acc), m, np.float32(node.attributes["bias"]))


def max_pool2d(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    # A padding of 0 is no greater than the real element that every window holds.
    return windows(values[0], node, node.attributes["kernel"], node.attributes["dilation"]).max(axis=(4, 5))


def table(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    return node.constants["table"][values[0]]


def concat(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    return np.concatenate(values, axis=1)


def reshape(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    return values[0].reshape(len(values[0]), *output.shape)


OPS: dict[str, Callable[[Node, list[np.ndarray], list[Activation], Activation], np.ndarray]] = {
    "conv2d": conv2d,
    "linear": linear,
    "add": add,
    "mul": mul,
    "avg_pool2d": avg_pool2d,
    "max_pool2d": max_pool2d,
    "table": table,
    "concat": concat,
    "reshape": reshape,
}


def combine(logits: list[np.ndarray], rule: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Output and scores of members with these outputs, f32 [N, K], under a rule of COMBINE (None: one member)."""
    terms = [softmax(x) for x in logits] if rule == "probs" else logits
    if rule is None:
        return terms[0], terms[0]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    mean = total * (np.float32(1) / np.float32(len(logits)))
    return (softmax(mean) if rule == "logits" else mean), mean


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, f32 to f32. The sum is one of integers, so that no order of summation changes a bit."""
    e = exp32(x - x.max(axis=-1, keepdims=True)) * np.float32(2**30)
    total = np.rint(e).astype(np.int64).sum(axis=-1, keepdims=True)
    return e / total.astype(np.float32)


def exp32(d: np.ndarray) -> np.ndarray:
    """exp(d) of f32 d <= 0 by range reduction d = n*ln 2 + f and a polynomial of degree 6; 0 below -87."""
    log2_e, ln2_high, ln2_low = np.array([0x3FB8AA3B, 0x3F317200, 0x35BFBE8E], np.uint32).view(np.float32)
    in_range = np.maximum(d, np.float32(-87))
    n = np.rint(in_range * log2_e)
    f = fma32(n, -ln2_low, fma32(n, -ln2_high, in_range))
    result: Numbers = np.float32(1 / 720)
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1, 1):
        result = fma32(result, f, np.float32(coefficient))
    return np.where(d < -87, np.float32(0), np.ldexp(result, n.astype(np.int32)))
