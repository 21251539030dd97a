"""The arithmetic of docs/format.md section 4 in numpy: the oracle that every kernel equals bit for bit.

Everything here is either exact in integers or one correctly rounded f32 operation at a time. Arrays are [N, C, H, W],
[N, T, D] or [N, F].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from qdeploy.errors import InputError
from qdeploy.f32 import Numbers, fma32, power_weights, softmax, to_f32
from qdeploy.graph import Activation, Graph, Member, Node, Output
from qdeploy.ops import rows_of_texts
from qdeploy.texts import TextInput

NUMPY: dict[str, type] = {"u8": np.uint8, "s16": np.int16, "i32": np.int32, "f32": np.float32}  # of activations


def run(
    graph: Graph, x: np.ndarray, taps: Sequence[str] = (), mask: np.ndarray | None = None
) -> Output | tuple[Output, dict[str, np.ndarray]]:
    """The output of `graph` for a batch, computed the plain way.

    x: f32 [N, C, H, W], [N, T, D] or [N, F]; where the graph has `preprocess` also u8 [N, H, W, C]; where it has a
        vocabulary token ids, int32 or int64 [N, T]. N may be 0.
    mask: 0 or 1 [N, T] for texts of any length: ones, at least one, and then zeros. None: all are as long as x.
    Returns f32 or the codes u8 or s16, in the shape of the graph's output after N, or a list of such f32 where it has
    several outputs; of an ensemble the combined probabilities, f32 [N, K]. Rows at and beyond a text's length are 0.
    With `taps` (names of nodes, in an ensemble "member/node") returns (output, {name: array}) with their outputs.
    Raises InputError for an x or a mask that does not fit and for an unknown tap.
    """
    output, _, tapped = run_all(graph, x, mask)
    if not len(taps):
        return output
    unknown = [name for name in taps if name not in tapped]
    if unknown:
        raise InputError(f"expected the name of a node, got {unknown[0]!r} - at taps")
    return output, {name: tapped[name] for name in taps}


def predict(graph: Graph, x: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The class of each image or text, int64 [N]: the first largest score. As for `run`; the one output must be
    [N, K]."""
    return run_all(graph, x, mask)[1].argmax(axis=1)


def run_all(
    graph: Graph, x: np.ndarray, mask: np.ndarray | None = None
) -> tuple[Output, np.ndarray, dict[str, np.ndarray]]:
    """The output, the scores whose first largest is the class, and the output of every node by its tap name."""
    lengths = None
    if graph.vocabulary is None:
        check_input(graph, x)
    else:
        text = TextInput(graph.input_shape[0], graph.vocabulary, graph.variable)
        lengths = text.checked(x, mask)[1]
    outputs, tapped = [], {}
    for member in graph.members:
        values = run_member(member, x) if lengths is None else run_texts(member, x, lengths)
        outputs += [values[i] for i in member.output_ids]
        prefix = f"{member.name}/" if graph.combine else ""
        tapped.update({prefix + node.name: values[node.output] for node in member.nodes})
    output, scores = combine(outputs, graph.combine)
    return output if len(graph.members[0].output_ids) == 1 else outputs, scores, tapped


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


def run_texts(member: Member, ids: np.ndarray, lengths: np.ndarray) -> dict[int, np.ndarray]:
    """As `run_member`, each text at its own length: the rows beyond it do not exist, and are 0 in what this returns."""
    rows = rows_of_texts(member)
    values = {}
    for i, (more, tensor) in enumerate(zip(rows, member.tensors, strict=True)):
        shape = tensor.shape if more is None else (ids.shape[1] + more, *tensor.shape[1:])
        values[i] = np.zeros((len(ids), *shape), NUMPY[tensor.dtype])
    for length in np.unique(lengths):
        texts = lengths == length
        for i, value in run_member(member, ids[texts, :length]).items():
            more = rows[i]
            if more is None:
                values[i][texts] = value
            else:
                values[i][texts, : length + more] = value
    return values


def run_member(member: Member, x: np.ndarray) -> dict[int, np.ndarray]:
    """Every activation of the member, by tensor id."""
    table = member.preprocess_table
    if member.tensors[0].dtype == "i32":
        values = {0: x.astype(np.int32)}
    elif x.dtype == np.uint8 and table is not None:
        values = {0: np.stack([row[x[..., c]] for c, row in enumerate(table)], axis=1)}
    else:
        values = {0: quantize(x, member.tensors[0])}
    for node in member.nodes:
        inputs = [member.tensors[i] for i in node.inputs]
        values[node.output] = run_node(node, [values[i] for i in node.inputs], inputs, member.tensors[node.output])
    return values


def run_node(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    """What the node writes for a batch of its `inputs` with these values."""
    result = OPS[node.op](node, values, inputs, output)
    if result.dtype == np.float32 and output.dtype != "f32":
        clamp = node.attributes.get("clamp", (-32767, 32767))
        result = np.clip(np.rint(result), *clamp).astype(NUMPY[output.dtype])
    is_flat = len(output.shape) == 1  # f32 [C, 1, 1] may be declared [C]
    return result.reshape(len(result), *output.shape) if is_flat else result


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
    """r = fma(float(acc), m, b), then with a residual r = fma(float(residual), m_res, r).

    Inner codes t of r are added as `add` does it: r = fma(float(t), m_t, fma(float(residual), m_res, b_t)).
    """
    shape = (-1, 1, 1) if acc.ndim == 4 else (-1,)  # of an image channels are axis 1, else the last
    m, b = (node.constants[key].reshape(shape) for key in ("multiplier", "bias"))
    r = fma32(to_f32(acc), m, b)
    if not residual:
        return r
    q, factor = residual[0].reshape(acc.shape).astype(np.float32), np.float32(node.attributes["residual_multiplier"])
    if "inner_clamp" not in node.attributes:
        return fma32(q, factor, r)
    t = np.clip(np.rint(r), *node.attributes["inner_clamp"]).astype(np.uint8).astype(np.float32)
    m, b = (np.float32(node.attributes[key]) for key in ("inner_multiplier", "inner_bias"))
    return fma32(t, m, fma32(q, factor, b))


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
    return fma32(to_f32(a * b), multiplier, bias)  # a gate is the same for all pixels, tokens or channels


def rescale(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    multiplier, bias = (np.float32(node.attributes[key]) for key in ("multiplier", "bias"))
    return fma32(values[0].astype(np.float32), multiplier, bias)


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
    entries = node.constants["table"]
    if entries.ndim == 1:
        return entries[values[0]]
    channels = np.arange(len(entries)).reshape((-1, 1, 1) if values[0].ndim == 4 else (-1,))
    return entries[channels, values[0]]


def resize(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    x = values[0].astype(np.float64) - inputs[0].zero_point
    acc = bands(node, "row", x.shape[2]) @ x @ bands(node, "column", x.shape[3]).T
    multiplier, bias = (np.float32(node.attributes[key]) for key in ("multiplier", "bias"))
    return fma32(to_f32(acc), multiplier, bias)


def bands(node: Node, axis: str, size: int) -> np.ndarray:
    """The matrix [rows of the output, `size` rows of the input] of one axis."""
    start, weight = node.constants[f"{axis}_start"], node.constants[f"{axis}_weight"]
    matrix = np.zeros((len(start), size))
    matrix[np.arange(len(start))[:, None], start[:, None] + np.arange(weight.shape[1])] = weight
    return matrix


def concat(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    return np.concatenate(values, axis=2 if node.attributes.get("axis") == "channels" else 1)


def by_rows(x: np.ndarray) -> np.ndarray:
    """[N, rows, channels]: pixels or tokens; a vector is one row."""
    if x.ndim == 4:
        return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3]).swapaxes(1, 2)
    return x if x.ndim == 3 else x[:, None]


def from_rows(x: np.ndarray, output: Activation) -> np.ndarray:
    """[N, rows, channels] as a tensor of the output's number of dimensions."""
    if len(output.shape) == 3:
        return x.swapaxes(1, 2).reshape(len(x), *output.shape)
    return x if len(output.shape) == 2 else x[:, 0]


def gather(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    x, axis = by_rows(values[0]), 1 if node.attributes["axis"] == "rows" else 2
    padded = np.insert(x, x.shape[axis], inputs[0].zero_point, axis=axis)  # the last one is what -1 reads
    return from_rows(padded.take(node.constants["index"], axis=axis), output)


def tokens(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    return from_rows(by_rows(values[0]), output)


def position(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    prefix, n = node.attributes["prefix"], len(values[0])
    rows = node.constants["rows"][: prefix + values[0].shape[1]]
    tokens = fma32(values[0].astype(np.float32), np.float32(node.attributes["multiplier"]), rows[prefix:])
    return np.concatenate([np.repeat(rows[None, :prefix], n, axis=0), tokens], axis=1)


def embedding(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    ids, multiplier = values[0], node.constants["multiplier"]
    m = multiplier[ids][..., None] if multiplier.size > 1 else multiplier
    return fma32(node.constants["weight"][ids].astype(np.float32), m, node.constants["rows"][: ids.shape[1]])


def mean(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    acc = (values[0].astype(np.int64) - inputs[0].zero_point).sum(axis=1)
    m = node.constants["multiplier"][values[0].shape[1] - 1]
    return fma32(to_f32(acc), m, np.float32(node.attributes["bias"]))


def norm(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    """Of each row, or of each group of channels over all rows: t = (N*q - S) / sqrt(N*sum q^2 - S^2 + E)."""
    rows, groups = by_rows(values[0]).astype(np.int64), node.attributes["groups"]
    q = rows.reshape(*rows.shape[:2], groups or 1, rows.shape[2] // (groups or 1))
    axes: tuple[int, ...] = (1, 3) if groups else (3,)
    count = math.prod(q.shape[axis] for axis in axes)
    total = q.sum(axis=axes, keepdims=True)
    variance = count * (q * q).sum(axis=axes, keepdims=True) - total * total
    width = np.sqrt(variance.astype(np.float32) + np.float32(node.attributes["epsilon"]))
    t = (count * q - total).astype(np.float32) * (np.float32(1) / width)
    r = fma32(t.reshape(rows.shape), node.constants["multiplier"], node.constants["bias"])
    return from_rows(r, output)


def attention(node: Node, values: list[np.ndarray], inputs: list[Activation], output: Activation) -> np.ndarray:
    """Sums in f64 are exact: products of codes stay below 2^31, and so do those of weights and codes."""
    block, heads = node.attributes["block"], node.attributes["heads"]

    def split(x: np.ndarray) -> np.ndarray:
        """[N or N*blocks, heads, rows, channels of a head]."""
        n, rows, channels = x.shape
        return x.reshape(n * (rows // (block or rows)), block or rows, heads, channels // heads).swapaxes(1, 2)

    q, k, v = (split(x.astype(np.float64) - t.zero_point) for x, t in zip(values, inputs, strict=True))
    logit_bias: Numbers = np.float32(0)
    if "logit_bias" in node.constants:
        logit_bias = node.constants["logit_bias"][:, : q.shape[2], : k.shape[2]]
    logits = fma32(to_f32(q @ k.swapaxes(2, 3)), np.float32(node.attributes["logit_multiplier"]), logit_bias)
    if "regions" in node.constants:
        regions = np.tile(node.constants["regions"].reshape(-1, 1, q.shape[2]), (len(values[0]), 1, 1))
        apart = regions[..., :, None] != regions[..., None, :]
        logits = np.where(apart, -np.inf, logits)
    weights = power_weights(logits - logits.max(axis=3, keepdims=True), node.attributes["peak"])
    if "regions" in node.constants:
        weights = np.where(apart, 0, weights)
    multiplier = np.float32(node.attributes["multiplier"]) / to_f32(weights.sum(axis=3, keepdims=True))
    r = fma32(to_f32(weights @ v), multiplier, np.float32(node.attributes["bias"]))
    return r.swapaxes(1, 2).reshape(*values[0].shape[:2], output.shape[1])


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
    "rescale": rescale,
    "resize": resize,
    "gather": gather,
    "tokens": tokens,
    "image": tokens,
    "position": position,
    "embedding": embedding,
    "mean": mean,
    "norm": norm,
    "attention": attention,
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
