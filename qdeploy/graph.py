"""The integer graph in memory: what docs/format.md section 3 describes, as plain dataclasses around numpy arrays.

`validate` is the one definition, in Python, of a graph that the engine accepts.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field

import numpy as np

from qdeploy.errors import ModelError

MAX_ELEMENTS = 2**28  # of one image of one tensor
MAX_MEMBERS = 256
MAX_NODES = 65_536  # of all members together
MAX_ATTRIBUTE = 65_535  # strides, paddings, dilations, groups, kernels
MAX_NAME_BYTES = 512
MIN_SCALE, MAX_SCALE = 2.0**-126, 2.0**126  # so that 1/scale is a normal f32 as well
CONSTANTS = {  # of the ops that have any; each is a numpy array in Node.constants and a tensor of the file
    "conv2d": ("weight", "multiplier", "bias"),
    "linear": ("weight", "multiplier", "bias"),
    "avg_pool2d": ("multiplier",),
    "table": ("table",),
}
CLAMPED_OPS = ("conv2d", "linear", "add", "avg_pool2d")  # their u8 output is clamped; they may write f32 instead


@dataclass
class Tensor:
    """One activation. A u8 code q means the real number `scale * (q - zero_point)`; shape is without the batch."""

    name: str
    shape: tuple[int, ...]  # (C, H, W) or (F,)
    dtype: str = "u8"  # "u8" or "f32"
    scale: float = 1.0
    zero_point: int = 0


@dataclass
class Node:
    """One operation, its keys as in docs/format.md. Weights are int8 codes of `bits` bits in their full shape."""

    op: str
    name: str
    inputs: list[int]
    output: int
    attributes: dict = field(default_factory=dict)  # stride, padding, clamp, residual_multiplier, bias of add...
    constants: dict[str, np.ndarray] = field(default_factory=dict)  # weight, multiplier, bias, table
    bits: int | None = None  # conv2d and linear


@dataclass
class Member:
    """One network: tensors[0] is its input, the output of nodes[-1] its output."""

    name: str
    tensors: list[Tensor]
    nodes: list[Node]
    preprocess_table: np.ndarray | None = None  # uint8 [C, 256]

    @property
    def output(self) -> Tensor:
        return self.tensors[self.nodes[-1].output]


@dataclass
class Graph:
    """A model file: one member, or an ensemble with a rule to combine them."""

    members: list[Member]
    combine: str | None = None  # None, "logits" or "probs"
    preprocess: dict | None = None  # {"mean": [...], "std": [...]}
    classes: list[str] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.members[0].tensors[0].shape


def validate(graph: Graph) -> None:
    """Raise ModelError, naming member and node, unless `graph` is a valid model of docs/format.md section 3."""
    members = graph.members
    _expect(1 <= len(members) <= MAX_MEMBERS, f"1 to {MAX_MEMBERS} members", len(members), "the graph")
    rules = (None,) if len(members) == 1 else ("logits", "probs")
    _expect(graph.combine in rules, f"combine to be one of {rules}", graph.combine, "the graph")
    _unique_names([member.name for member in members], "the members")
    total = sum(len(member.nodes) for member in members)
    _expect(total <= MAX_NODES, f"at most {MAX_NODES} nodes", total, "the graph")
    for member in members:
        _validate_member(member)
        shape = member.tensors[0].shape
        _expect(shape == graph.input_shape, f"input shape {graph.input_shape}", shape, f"member '{member.name}'")
    _validate_preprocess(graph)
    output = members[0].output
    if len(members) > 1:
        for member in members:
            got = (member.output.dtype, member.output.shape)
            expected = ("f32", (math.prod(output.shape),))
            _expect(got == expected, f"output {expected} in all members", got, f"member '{member.name}'")
    if graph.classes is not None:
        _expect(len(output.shape) == 1, "an output of shape [K] for classes", output.shape, "classes")
        _expect(len(graph.classes) == output.shape[0], f"{output.shape[0]} classes", len(graph.classes), "classes")
        for name in graph.classes:
            check_name(name, "classes")


def output_shape(node: Node, inputs: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of the output of `node` for these input shapes; None for reshape: its output tensor says it.

    The attributes and constants must have passed `validate`, or be as well formed as it asks.
    """
    x = inputs[0]
    if node.op == "conv2d":
        out_channels, _, *kernel = node.constants["weight"].shape
        return (out_channels, *_spatial(node, x, kernel, node.attributes["dilation"]))
    if node.op == "linear":
        return (node.constants["weight"].shape[0],)
    if node.op in ("max_pool2d", "avg_pool2d"):
        return (x[0], *_spatial(node, x, node.attributes["kernel"], node.attributes.get("dilation", (1, 1))))
    if node.op == "concat":
        return (sum(shape[0] for shape in inputs), *x[1:])
    return None if node.op == "reshape" else x


def check_name(name: object, at: str) -> None:
    """Names reach terminals and other tools: 1 to 512 bytes of UTF-8 without control characters."""
    valid = isinstance(name, str) and not any(c < " " or c == "\x7f" or "\ud800" <= c <= "\udfff" for c in name)
    valid = valid and 1 <= len(name.encode()) <= MAX_NAME_BYTES
    _expect(valid, f"a name of 1 to {MAX_NAME_BYTES} bytes of UTF-8 without control characters", name, at)


def _expect(condition: bool, expected: str, got: object, at: str) -> None:
    if not condition:
        text = repr(got)
        raise ModelError(f"expected {expected}, got {text if len(text) <= 100 else text[:97] + '...'} - at {at}")


def _unique_names(names: list[str], at: str) -> None:
    for name in names:
        check_name(name, at)
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        _expect(False, "unique names", twice, at)


def _integers(value: object, count: int, low: int, high: int, what: str, at: str) -> list[int]:
    """`count` integers of [low, high]; bool and float are not integers here."""
    try:
        values = [operator.index(v) for v in value if not isinstance(v, (bool, np.bool_))]
    except TypeError:
        values = []
    expected = f"{what} of {count} integers in {low}..{high}"
    _expect(len(values) == count == len(value if values else ()), expected, value, at)
    _expect(all(low <= v <= high for v in values), expected, value, at)
    return values


def _f32(value: object, what: str, at: str) -> float:
    """A finite f32, as a Python float."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    with np.errstate(over="ignore"):
        result = float(np.float32(value)) if number and abs(value) < 2.0**128 else math.nan
    _expect(math.isfinite(result), f"{what} to be a finite f32 number", value, at)
    return result


def _array(node: Node, key: str, dtype: type, ndim: int, at: str) -> np.ndarray:
    value = node.constants.get(key)
    _expect(isinstance(value, np.ndarray), f"constant '{key}'", type(value).__name__, at)
    got = (value.dtype.name, value.ndim)
    _expect(got == (np.dtype(dtype).name, ndim), f"constant '{key}' of {np.dtype(dtype).name}, rank {ndim}", got, at)
    if dtype is np.float32:
        _expect(bool(np.isfinite(value).all()), f"finite constant '{key}'", "NaN or infinity", at)
    return value


def _validate_preprocess(graph: Graph) -> None:
    tables = [member.preprocess_table for member in graph.members]
    if graph.preprocess is None:
        _expect(all(table is None for table in tables), "no preprocess_table without preprocess", "one", "preprocess")
        return
    shape = graph.input_shape
    _expect(len(shape) == 3, "an input of shape [C, H, W] for preprocess", shape, "preprocess")
    for key in ("mean", "std"):
        values = graph.preprocess.get(key)
        _expect(isinstance(values, (list, tuple)), f"'{key}' with {shape[0]} numbers", values, "preprocess")
        _expect(len(values) == shape[0], f"'{key}' with {shape[0]} numbers", len(values), "preprocess")
        for value in values:
            number = _f32(value, key, "preprocess")
            _expect(key == "mean" or number > 0, "std greater than 0", value, "preprocess")
    for table in tables:
        got = (table.dtype.name, table.shape) if isinstance(table, np.ndarray) else table
        _expect(got == ("uint8", (shape[0], 256)), f"a uint8 preprocess_table [{shape[0]}, 256]", got, "preprocess")


def _validate_member(member: Member) -> None:
    at = f"member '{member.name}'"
    _expect(len(member.nodes) >= 1, "at least one node", 0, at)
    tensors = len(member.nodes) + 1
    _expect(len(member.tensors) == tensors, f"{tensors} tensors", len(member.tensors), at)
    _unique_names([node.name for node in member.nodes], f"the nodes of {at}")
    for tensor in member.tensors:
        _validate_tensor(tensor, at)
    _expect(member.tensors[0].dtype == "u8", "a u8 input", member.tensors[0].dtype, at)
    written = {0}
    for node in member.nodes:
        _validate_node(node, member, written, f"node '{node.name}' of {at}")
        written.add(node.output)


def _validate_tensor(tensor: Tensor, at: str) -> None:
    check_name(tensor.name, f"a tensor of {at}")
    at = f"tensor '{tensor.name}' of {at}"
    rank = len(tensor.shape) if isinstance(tensor.shape, tuple) else 0
    _expect(rank in (1, 3), "shape [C, H, W] or [F]", tensor.shape, at)
    _integers(tensor.shape, rank, 1, MAX_ELEMENTS - 1, "a shape", at)
    _expect(math.prod(tensor.shape) < MAX_ELEMENTS, f"fewer than {MAX_ELEMENTS} elements", tensor.shape, at)
    _expect(tensor.dtype in ("u8", "f32"), "dtype u8 or f32", tensor.dtype, at)
    scale = _f32(tensor.scale, "scale", at)
    _expect(MIN_SCALE <= scale <= MAX_SCALE, "scale in 2^-126..2^126", scale, at)
    _integers([tensor.zero_point], 1, 0, 255, "zero_point", at)
    if tensor.dtype == "f32":
        got = (scale, tensor.zero_point)
        _expect(got == (1.0, 0), "scale 1 and zero_point 0 of an f32 tensor", got, at)


def _validate_node(node: Node, member: Member, written: set[int], at: str) -> None:
    _expect(node.op in _OPS, f"op to be one of {', '.join(_OPS)}", node.op, at)
    check, low, high, keys = _OPS[node.op]
    unknown = sorted(set(node.attributes) - {*keys, "clamp"})
    _expect(not unknown, f"no attributes of {node.op} but {', '.join(keys) or 'none'}", unknown, at)
    constants = CONSTANTS.get(node.op, ())
    _expect(set(node.constants) == set(constants), f"constants {constants}", tuple(node.constants), at)
    _expect("weight" in constants or node.bits is None, f"no bits of {node.op}", node.bits, at)
    last = len(member.tensors) - 1
    ids = _integers(node.inputs, len(node.inputs), 0, last, "inputs", at)
    (output_id,) = _integers([node.output], 1, 1, last, "output", at)
    _expect(all(i in written for i in ids), "inputs that an earlier node wrote", node.inputs, at)
    _expect(output_id not in written, "an output that no other node writes", output_id, at)
    _expect(low <= len(ids) <= high, f"{low} to {high} inputs" if low < high else f"{low} input(s)", len(ids), at)
    inputs, output = [member.tensors[i] for i in ids], member.tensors[output_id]
    _expect(all(t.dtype == "u8" for t in inputs), "u8 inputs", "f32", at)
    is_last = node is member.nodes[-1]
    _expect(output.dtype == "u8" or is_last, "f32 only as the output of the last node", "f32", at)
    has_clamp, needs_clamp = "clamp" in node.attributes, node.op in CLAMPED_OPS and output.dtype == "u8"
    _expect(has_clamp == needs_clamp, "clamp" if needs_clamp else "no clamp", node.attributes.get("clamp"), at)
    if needs_clamp:
        clamp = _integers(node.attributes["clamp"], 2, 0, 255, "clamp", at)
        _expect(clamp[0] <= clamp[1], "clamp with lo <= hi", clamp, at)
    check(node, inputs, output, at)
    shape = output_shape(node, [t.shape for t in inputs])
    may_be_flat = node.op in ("conv2d", "avg_pool2d") and output.dtype == "f32" and shape[1:] == (1, 1)
    fits = output.shape == shape or (may_be_flat and output.shape == shape[:1])
    _expect(shape is None or fits, f"output shape {shape}", output.shape, at)


def _check_bound(bound: float | np.ndarray, output: Tensor, at: str) -> None:
    """So that no accumulated result leaves the range of the conversion to an integer (u8) or of f32."""
    limit = 30 if output.dtype == "u8" else 100
    largest = float(np.max(bound))
    _expect(largest < 2.0**limit, f"results below 2^{limit} from these constants", largest, at)


def _check_weighted(node: Node, ndim: int, inputs: list[Tensor], output: Tensor, at: str) -> np.ndarray:
    """What conv2d and linear share: codes, multiplier, bias, residual and the bounds; returns the weight."""
    weight = _array(node, "weight", np.int8, ndim, at)
    _expect(weight.size > 0, "a weight with elements", weight.shape, at)
    (bits,) = _integers([node.bits], 1, 2, 8, "bits", at)
    codes = (int(weight.min()), int(weight.max()))
    half = 2 ** (bits - 1)
    _expect(-half <= codes[0] and codes[1] < half, f"codes of {bits} bits in {-half}..{half - 1}", codes, at)
    depth = math.prod(weight.shape[1:])
    _expect(depth * 255 * half < 2**31, "K*255*2^(b-1) < 2^31", f"K = {depth}, b = {bits}", at)
    constants = [_array(node, key, np.float32, 1, at) for key in ("multiplier", "bias")]
    for key, value in zip(("multiplier", "bias"), constants, strict=True):
        _expect(value.shape == weight.shape[:1], f"'{key}' of shape {weight.shape[:1]}", value.shape, at)
    multiplier, bias = (np.abs(value.astype(np.float64)) for value in constants)
    has_residual = len(inputs) == 2
    attribute = node.attributes.get("residual_multiplier")
    expected = "residual_multiplier" if has_residual else "no residual_multiplier without a residual"
    _expect(("residual_multiplier" in node.attributes) == has_residual, expected, attribute, at)
    residual = 0.0
    if has_residual:
        residual = abs(_f32(attribute, "residual_multiplier", at))
        _expect(inputs[1].shape == output.shape, f"a residual of shape {output.shape}", inputs[1].shape, at)
    magnitude = np.abs(weight.reshape(weight.shape[0], -1).astype(np.int16)).sum(axis=1, dtype=np.int64)
    _check_bound(255.0 * magnitude * multiplier + bias + 255.0 * residual, output, at)
    return weight


def _spatial(node: Node, x: tuple[int, ...], kernel: list[int], dilation: list[int]) -> tuple[int, int]:
    top, left, bottom, right = node.attributes["padding"]
    sizes = [
        (size + padding - d * (k - 1) - 1) // stride + 1
        for size, padding, k, d, stride in zip(
            x[1:], (top + bottom, left + right), kernel, dilation, node.attributes["stride"], strict=True
        )
    ]
    return sizes[0], sizes[1]


def _check_window(node: Node, x: Tensor, kernel: list[int], dilation: list[int], at: str) -> None:
    _expect(len(x.shape) == 3, "an input of shape [C, H, W]", x.shape, at)
    _integers(node.attributes.get("stride"), 2, 1, MAX_ATTRIBUTE, "stride", at)
    _integers(node.attributes.get("padding"), 4, 0, MAX_ATTRIBUTE, "padding", at)
    sizes = _spatial(node, x.shape, kernel, dilation)
    _expect(min(sizes) >= 1, "a window that fits the padded input", f"output size {sizes}", at)


def _check_conv2d(node: Node, inputs: list[Tensor], output: Tensor, at: str) -> None:
    weight = _check_weighted(node, 4, inputs, output, at)
    dilation = _integers(node.attributes.get("dilation"), 2, 1, MAX_ATTRIBUTE, "dilation", at)
    kernel = _integers(weight.shape[2:], 2, 1, MAX_ATTRIBUTE, "kernel", at)
    (groups,) = _integers([node.attributes.get("groups")], 1, 1, MAX_ATTRIBUTE, "groups", at)
    _check_window(node, inputs[0], kernel, dilation, at)
    channels = weight.shape[1] * groups
    _expect(inputs[0].shape[0] == channels, f"an input of {channels} channels", inputs[0].shape, at)
    _expect(weight.shape[0] % groups == 0, f"output channels divisible by {groups} groups", weight.shape[0], at)


def _check_linear(node: Node, inputs: list[Tensor], output: Tensor, at: str) -> None:
    weight = _check_weighted(node, 2, inputs, output, at)
    _expect(inputs[0].shape == weight.shape[1:], f"an input of shape {weight.shape[1:]}", inputs[0].shape, at)


def _check_add(node: Node, inputs: list[Tensor], output: Tensor, at: str) -> None:
    multipliers = node.attributes.get("multipliers")
    pair = isinstance(multipliers, (list, tuple)) and len(multipliers) == 2
    _expect(pair, "multipliers [ma, mb]", multipliers, at)
    ma, mb = (abs(_f32(m, "multipliers", at)) for m in multipliers)
    bias = abs(_f32(node.attributes.get("bias"), "bias", at))
    _expect(inputs[0].shape == inputs[1].shape, f"a second input of shape {inputs[0].shape}", inputs[1].shape, at)
    _check_bound(255.0 * ma + 255.0 * mb + bias, output, at)


def _check_pool(node: Node, x: Tensor, dilation: list[int], at: str) -> list[int]:
    """Every window must hold a real element: with padding below the extent, only a dilated one can miss them all."""
    kernel = _integers(node.attributes.get("kernel"), 2, 1, MAX_ATTRIBUTE, "kernel", at)
    _check_window(node, x, kernel, dilation, at)
    padding = node.attributes["padding"]
    for axis in (0, 1):
        before, after, step = padding[axis], padding[axis + 2], dilation[axis]
        extent = step * (kernel[axis] - 1) + 1
        _expect(before < extent and after < extent, f"padding below the window's extent {extent}", padding, at)
        starts = range(-before, 0, node.attributes["stride"][axis])
        real = all(start % step < x.shape[1 + axis] for start in starts)
        _expect(real, "a real element in every window", f"dilation {step} over size {x.shape[1 + axis]}", at)
    return kernel


def _check_max_pool2d(node: Node, inputs: list[Tensor], output: Tensor, at: str) -> None:
    dilation = _integers(node.attributes.get("dilation"), 2, 1, MAX_ATTRIBUTE, "dilation", at)
    _check_pool(node, inputs[0], dilation, at)
    _check_same_quantization(inputs, output, at)


def _check_avg_pool2d(node: Node, inputs: list[Tensor], output: Tensor, at: str) -> None:
    kernel = _check_pool(node, inputs[0], [1, 1], at)
    window = math.prod(kernel)
    _expect(window * 255 < 2**31, "KH*KW*255 < 2^31", kernel, at)
    multiplier = _array(node, "multiplier", np.float32, 1, at)
    _expect(multiplier.size in (1, window), f"'multiplier' of 1 or {window} elements", multiplier.size, at)
    counts = np.arange(1, window + 1) if multiplier.size == window else window
    bias = abs(_f32(node.attributes.get("bias"), "bias", at))
    _check_bound(255.0 * counts * np.abs(multiplier.astype(np.float64)) + bias, output, at)


def _check_table(node: Node, inputs: list[Tensor], output: Tensor, at: str) -> None:
    table = _array(node, "table", np.uint8 if output.dtype == "u8" else np.float32, 1, at)
    _expect(table.size == 256, "a table of 256 entries", table.size, at)
    if output.dtype == "f32":
        _check_bound(np.abs(table), output, at)


def _check_concat(node: Node, inputs: list[Tensor], output: Tensor, at: str) -> None:
    first = inputs[0].shape
    for tensor in inputs[1:]:
        same = len(tensor.shape) == len(first) and tensor.shape[1:] == first[1:]
        _expect(same, f"inputs like {first} but for dimension 0", tensor.shape, at)
    _check_same_quantization(inputs, output, at)


def _check_reshape(node: Node, inputs: list[Tensor], output: Tensor, at: str) -> None:
    elements = math.prod(inputs[0].shape)
    _expect(math.prod(output.shape) == elements, f"an output of {elements} elements", output.shape, at)
    _check_same_quantization(inputs, output, at)


def _check_same_quantization(inputs: list[Tensor], output: Tensor, at: str) -> None:
    _expect(output.dtype == "u8", "a u8 output", output.dtype, at)
    expected = (float(np.float32(output.scale)), output.zero_point)
    for tensor in inputs:
        got = (float(np.float32(tensor.scale)), tensor.zero_point)
        _expect(got == expected, f"the output's scale and zero_point {expected} at each input", got, at)


_OPS = {  # op: (check, least inputs, most inputs, attributes besides clamp)
    "conv2d": (_check_conv2d, 1, 2, ("stride", "padding", "dilation", "groups", "residual_multiplier")),
    "linear": (_check_linear, 1, 2, ("residual_multiplier",)),
    "add": (_check_add, 2, 2, ("multipliers", "bias")),
    "max_pool2d": (_check_max_pool2d, 1, 1, ("kernel", "stride", "padding", "dilation")),
    "avg_pool2d": (_check_avg_pool2d, 1, 1, ("kernel", "stride", "padding", "bias")),
    "table": (_check_table, 1, 1, ()),
    "concat": (_check_concat, 2, MAX_NODES, ()),
    "reshape": (_check_reshape, 1, 1, ()),
}
