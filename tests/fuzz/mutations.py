"""What the fuzzer does to a file: MODEL, TREE and BYTES, the three levels at which a mutation works.

Those of the first two take a `Draft`, change it in place, and return False where there is nothing to change. Those of
the model find a well-formed draft and often leave a valid one.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from draft import Draft, GraphText, Object, Raw, containers, copied, encoded, slots

from qdeploy.graph import COMBINE, Node, Shape
from qdeploy.ops import OPS

Random = random.Random

F32_MAX = float(np.finfo(np.float32).max)
INTEGERS = [-1, 0, 1, 2, 3, 4, 7, 8, 9, 16, 17, 127, 128, 255, 256, 257, 511, 512, 65_535, 65_536, 65_537, 2**24]
INTEGERS += [2**28 - 1, 2**28, 2**28 + 1, 2**31 - 1, 2**31, 2**32, 2**40, 2**40 + 1, 2**48, 2**53, 2**53 + 1, 2**62]
INTEGERS += [2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**65, -(2**31), -(2**63), -(2**63) - 1, 10**30, 10**39, 10**308]
FLOATS = [0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 255.0, 256.0, 1e-45, 7e-46, 1e-46, 5e-324, 1e-320, 2.0**-126, 2.0**-127]
FLOATS += [2.0**126, 2.0**126 * (1 + 2**-23), 2.0**126 * (1 + 2**-25), F32_MAX, F32_MAX * (1 + 2**-26), 3.5e38, 1e39]
FLOATS += [2.0**100, 2.0**127, 2.0**128, 1e100, 1e308, 2.0**30, 2.0**30 - 32, 2.0**53, 1e22, 1e21, 123456789.0]
FLOATS += [float("nan"), float("inf"), float("-inf")]
NAMES = ["", " ", "a b", "`", "'", '"', "\\", "/", "a/b", "é", "日本語", "😀", "\u202ex", "\ufeff", "\u2028", "\uffff"]
NAMES += ["\x00", "\n", "\t", "\x1b[2J", "\x1f", "\x7f", "\x80", "\x85", "\x9b31m", "\x9f", "\xa0", "\xad", "\ud800"]
NAMES += ["\udc00\ud800", "x" * 60, "x" * 61, "x" * 511, "x" * 512, "x" * 513, "é" * 256, "é" * 256 + "x", "é" * 300]
NAMES += ["😀" * 15, "a" + "😀" * 15, "__metadata__", "net", "m0", "m1", "input", "constructor", "None", "0", "-1"]
PIECES = [
    "U8",
    "F32",
    "I32",
    "u8",
    "f32",
    "s16",
    "i32",
    "rows",
    "channels",
    "F16",
    "I8",
    "u8 ",
    "U",
    "logits",
    "probs",
    "qdeploy",
    "1",
    "2",
    "3",
    "0.1.0",
    *OPS,
]
NUMERALS = ["-0", "-0.0", "0e5", "1.", ".5", "01", "+1", "1e", "1e+", "0x10", "1_000", "1e400", "-1e400", "1E-400"]
NUMERALS += ["NaN", "Infinity", "-Infinity", "nan", "inf", "١", f"1{400 * '0'}", f"-1{400 * '0'}", f"0.{400 * '0'}1"]
NUMERALS += ["9" * 5000, "1" * 309, "1" * 308, "1e308", "1.7976931348623157e308", "1.7976931348623159e308", "1e0001"]
NUMERALS += ["1.79769313486231580793728971405301e308", "3.4028235677973366e38", "18446744073709551615", "16777217"]
NUMERALS += ["340282356779733661637539395458142568447", "340282356779733661637539395458142568448"]
TOKENS = ["true", "false", "null", "True", "None", "nul", "", '"', "'x'", "[", "]", "{", "}", "[1,]", "{1:2}", "/**/1"]
TOKENS += ['"\\x"', '"\\u12"', '"\\u00zz"', '"\\ud800"', '"\\ud800\\u0041"', '"\\ude00\\ud83d"', '"\\ud83d\\ude00"']
TOKENS += ['"a\nb"', '"a\tb"', '"\x7f"', '"\x1f"', '"\\u0000"', '"\\u001f"', '"\\u009b"', '"\\ud800\\udc00"', '"\\/"']
TOKENS += [
    '"\ud800"',
    "1 2",
    "1,,2",
    "--1",
    "1-",
    "- 1",
    "1 ",
    " 1",
    "\t1",
    "\u00a01",
    "\x0c1",
    "\x0b1",
    "\ufeff1",
    "1//x\n",
]


UTF8 = [
    b"\xff",
    b"\xc0\xaf",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xe9",
    "é😀".encode(),
    b"\xef\xbb\xbf",
]  # and what is none


# ---- The model: what a writer of valid files could have done ---------------------------------------------------------


def members(draft: Draft) -> list[Object]:
    return draft.graph.get("members")


def entries(draft: Draft) -> list[list]:
    """[name, entry] of every tensor in the header."""
    return [pair for pair in draft.header if pair[0] != "__metadata__"]


def constant_slots(draft: Draft) -> list[tuple[list, int]]:
    """Where the graph names a tensor of the container."""
    found = []
    for member in members(draft):
        if member.get("preprocess_table") is not None:
            found += [(pair, 1) for pair in member if pair[0] == "preprocess_table"]
        for node in member.get("nodes"):
            for pair in node:
                if pair[0] in OPS[node.get("op")].constants and pair[1] is not None:
                    found += [(pair, 1)] if pair[0] != "weight" else [(p, 1) for p in pair[1] if p[0] == "codes"]
    return found


def add_tensor(draft: Draft, name: str, dtype: str, shape: list[int], content: bytes) -> str:
    """Behind all others, with a tensor of unused bytes before it where it must be aligned. Returns its name."""
    if dtype != "U8" and len(draft.data) % 4:
        filler = -len(draft.data) % 4
        add_tensor(draft, f"filler for {name}", "U8", [filler], bytes(filler))
    begin = len(draft.data)
    draft.data += content
    entry = Object([["dtype", dtype], ["shape", shape], ["data_offsets", [begin, len(draft.data)]]])
    draft.header.append([name, entry])
    return name


def add_floats(draft: Draft, name: str, values: list[float]) -> str:
    return add_tensor(draft, name, "F32", [len(values)], struct.pack(f"<{len(values)}f", *values))


def notes(draft: Draft, rng: Random) -> bool:
    name = rng.choice(["note", "Format", *NAMES])
    value = rng.choice([*NAMES, *PIECES, "x" * 10_000])
    metadata = draft.header.get("__metadata__")
    return name not in metadata and not metadata.append([name, value])


def shuffled_keys(draft: Draft, rng: Random) -> bool:
    for tree in (draft.header, draft.graph):
        for container in containers(tree):
            if isinstance(container, Object):
                rng.shuffle(container)
    return True


def unnamed_tensor(draft: Draft, rng: Random) -> bool:
    name = rng.choice([f"unnamed {len(draft.header)}", *NAMES])
    rank = rng.choice([0, 1, 1, 2, 3, 4, 7, 8, 9])
    shape = [rng.choice([0, 1, 1, 1, 2, 3, 5]) for _ in range(rank)]
    if 0 in shape:
        shape[rng.randrange(rank)] = rng.choice([0, 2**39, 2**40, 2**40 + 1, 2**63 - 1])
    dtype = rng.choice(["U8", "F32", "I32"])
    size = math.prod(shape) * (1 if dtype == "U8" else 4)
    if name in draft.header or size > 10_000:
        return False
    add_tensor(draft, name, dtype, shape, rng.randbytes(size))
    return True


def relayout(draft: Draft, rng: Random) -> bool:
    """The data in another order, the U8 last or, where it keeps them aligned, not."""
    tensors = entries(draft)
    rng.shuffle(tensors)
    content = [bytes(draft.data[slice(*entry.get("data_offsets"))]) for _, entry in tensors]
    order = list(range(len(tensors)))
    if rng.random() < 0.7:
        order.sort(key=lambda i: tensors[i][1].get("dtype") == "U8")
    draft.data = bytearray()
    for i in order:
        begin = len(draft.data)
        draft.data += content[i]
        tensors[i][1].set("data_offsets", [begin, len(draft.data)])
    return True


def rename_constant(draft: Draft, rng: Random) -> bool:
    name = rng.choice([*NAMES, "0/x", "y"])
    if name in draft.header or not entries(draft):
        return False
    pair = rng.choice(entries(draft))
    for container, i in constant_slots(draft):
        if container[i] == pair[0]:
            container[i] = name
    pair[0] = name
    return True


def rename(draft: Draft, rng: Random) -> bool:
    """A member, a node, an activation or a class gets another name, a valid one or not."""
    member = rng.choice(members(draft))
    places = [pair for entry in (member, *member.get("nodes"), *member.get("tensors")) for pair in entry]
    places = [(pair, 1) for pair in places if pair[0] == "name"]
    classes = draft.graph.get("classes")
    places += [(classes, i) for i in range(len(classes or []))]
    container, i = rng.choice(places)
    container[i] = rng.choice(NAMES)
    return True


def share_constants(draft: Draft, rng: Random) -> bool:
    """Two nodes read one tensor, where dtype and shape are the same."""
    places = constant_slots(draft)
    if not places:
        return False
    mine, i = rng.choice(places)
    of = {name: (entry.get("dtype"), entry.get("shape")) for name, entry in entries(draft)}
    others = [c[j] for c, j in places if c[j] != mine[i] and of[c[j]] == of[mine[i]]]
    if not others:
        return False
    mine[i] = rng.choice(others)
    return True


def more_members(draft: Draft, rng: Random) -> bool:
    """Copies of a member under names of their own: an ensemble, if it ends in f32 [K]."""
    here = members(draft)
    copies = rng.choice([1, 1, 1, 2, 4, *([254, 255, 256] if len(draft.data) < 1000 else [])])
    for i in range(copies):
        member = copied(rng.choice(here))
        member.set("name", f"copy {i} of {len(here)}")
        here.insert(rng.randrange(len(here) + 1), member)
    draft.graph.set("combine", rng.choice(COMBINE))
    return True


def fewer_members(draft: Draft, rng: Random) -> bool:
    here = members(draft)
    if len(here) == 1:
        return False
    del here[rng.randrange(len(here))]
    if len(here) == 1 and rng.random() < 0.9:
        draft.graph.set("combine", None)
    return True


def other_rule(draft: Draft, rng: Random) -> bool:
    draft.graph.set("combine", rng.choice([*COMBINE, None]))
    return True


def other_classes(draft: Draft, rng: Random) -> bool:
    member = members(draft)[0]
    shape = member.get("tensors")[member.get("nodes")[-1].get("output")].get("shape")
    count = shape[0] + rng.choice([0, 0, 0, 1, -1])
    names = [f"class {k % rng.choice([count + 1, 2])}" for k in range(count)]  # they may repeat
    draft.graph.set("classes", rng.choice([None, names, names]))
    return True


def other_preprocess(draft: Draft, rng: Random) -> bool:
    """With mean and std, and tables of random codes, or without."""
    shape = draft.graph.get("input").get("shape")
    if rng.random() < 0.3:
        draft.graph.get("input").set("preprocess", None)
        for member in members(draft):
            member.set("preprocess_table", None)
        return True
    if "our table" in draft.header:
        return False
    std = [rng.choice([1, 0.5, 1e-45, 1e-46, 2.0**127, 0.0, -1.0, 0.2]) for _ in range(shape[0])]
    mean = [rng.choice([0, 0.5, -3.0, 1e38, *FLOATS[:10]]) for _ in range(shape[0])]
    draft.graph.get("input").set("preprocess", Object([["mean", mean], ["std", std]]))
    channels = shape[0] + rng.choice([0, 0, 0, 0, 1])
    add_tensor(draft, "our table", "U8", [channels, 256], rng.randbytes(channels * 256))
    for member in members(draft):
        member.set("preprocess_table", "our table")
    return True


def swap_nodes(draft: Draft, rng: Random) -> bool:
    """Neighbours in another order, which is valid where one does not read the other."""
    nodes = rng.choice(members(draft)).get("nodes")
    if len(nodes) < 2:
        return False
    i = rng.randrange(len(nodes) - 1)
    nodes[i], nodes[i + 1] = nodes[i + 1], nodes[i]
    return True


def other_ids(draft: Draft, rng: Random) -> bool:
    """The activations, all but the input, in another order."""
    member = rng.choice(members(draft))
    tensors = member.get("tensors")
    order = list(range(1, len(tensors)))
    rng.shuffle(order)
    order = [0, *order]
    member.set("tensors", [tensors[i] for i in order])
    for node in member.get("nodes"):
        node.set("inputs", [order.index(i) for i in node.get("inputs")])
        node.set("output", order.index(node.get("output")))
    return True


def insert_node(draft: Draft, rng: Random) -> bool:
    """A node that nobody reads, before the last one; its shape follows from its input, mostly."""
    member = rng.choice(members(draft))
    nodes, tensors = member.get("nodes"), member.get("tensors")
    at = rng.randrange(len(nodes))
    written = [0, *(node.get("output") for node in nodes[:at])]
    sources = [i for i in written if tensors[i].get("dtype") == "u8"]
    if not sources:
        return False
    source = rng.choice(sources)
    shape = tuple(tensors[source].get("shape"))
    name = f"inserted {len(tensors)}"
    if len(tensors) > 40 or f"{name}/table" in draft.header:
        return False
    window = ["max_pool2d", "avg_pool2d", "conv2d"] if len(shape) == 3 else ["linear"]
    op = rng.choice([*window, *window, "table", "reshape", "concat", "add", "mul"])
    inputs = [source] * rng.choice({"add": [2], "mul": [2], "concat": [2, 3]}.get(op, [1]))
    node = Object([["op", op], ["name", name], ["inputs", inputs], ["output", len(tensors)]])
    output = _fill(draft, rng, node, shape)
    if output is None:
        return False
    grid = OPS[op].same_grid
    tensor = copied(tensors[source]) if grid else Object([["dtype", "u8"], ["scale", 0.5], ["zero_point", 3]])
    tensor.set("name", name)
    tensor.set("shape", list(output))
    tensors.append(tensor)
    nodes.insert(at, node)
    metadata = draft.header.get("__metadata__")
    if OPS[op].version == 2 and metadata.get("format_version") == "1":
        metadata.set("format_version", "2")
        metadata.set("requires", "0.1.0")
    return True


def _fill(draft: Draft, rng: Random, node: Object, shape: Shape) -> Shape | None:
    """Adds the keys of the node's op and its constants; returns the shape of its output, None where there is none."""
    op, name = node.get("op"), node.get("name")
    keys: dict[str, Any] = {}
    weight: Shape = ()
    kernel = [1, 1]
    if "stride" in OPS[op].attributes:
        kernel, keys = _window(rng, shape[1:], "dilation" in OPS[op].attributes)
    if op == "conv2d":
        keys["groups"] = rng.choice([1, 1, shape[0], 2])
        weight = (keys["groups"] * rng.choice([1, 2, 3]), max(1, shape[0] // keys["groups"]), *kernel)
    elif op == "linear":
        weight = (rng.choice([1, 2, 5]), shape[0])
    elif "kernel" in OPS[op].attributes:
        keys["kernel"] = kernel
    if weight:
        keys |= _weighted(draft, rng, name, weight)
    elif op == "avg_pool2d":
        count = rng.choice([1, math.prod(kernel), math.prod(kernel)])
        keys |= {"multiplier": add_floats(draft, f"{name}/multiplier", [0.25] * count), "bias": rng.choice([0.5, 1e5])}
    elif op == "table":
        keys["table"] = add_tensor(draft, f"{name}/table", "U8", [256], rng.randbytes(256))
    elif op == "add":
        keys |= {"multipliers": [rng.choice([0.5, -1, 1e5]), 0.25], "bias": rng.choice([0.5, -1, 1e5])}
    elif op == "mul":
        keys |= {"multiplier": rng.choice([0.5, -1, 1e5]), "bias": rng.choice([0.5, -1, 1e5])}
    if OPS[op].requantized:
        keys["clamp"] = sorted(rng.choice([0, 0, 7, 255, 255]) for _ in range(2))
    node.extend([key, value] for key, value in keys.items())
    if op == "reshape":
        return rng.choice([(math.prod(shape),), (1, math.prod(shape), 1), (1, 1, math.prod(shape))])
    plain = Node(op, name, [], 0, keys, {"weight": np.zeros(weight, np.int8)} if weight else {})
    output = OPS[op].shape(plain, [shape] * len(node.get("inputs")))
    return output if output and min(output) > 0 and math.prod(output) < 10**6 else None


def _window(rng: Random, size: Shape, dilated: bool) -> tuple[list[int], dict[str, Any]]:
    """A kernel, and the keys of a window that mostly fits an image of this size, at times with no room to spare."""
    axes = []
    for pixels in size:
        for _ in range(20):
            kernel, dilation = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3]) if dilated else 1
            reach = dilation * (kernel - 1)
            before, after = (max(0, rng.choice([0, 1, reach // 2, reach - 1, reach, reach + 1])) for _ in range(2))
            if reach < before + pixels + after:
                break
        axes.append((kernel, dilation, before, after, rng.choice([1, 1, 2, 3, 65_535])))
    kernels, dilations, befores, afters, strides = (list(values) for values in zip(*axes, strict=True))
    keys = {"stride": strides, "padding": befores + afters}
    return kernels, keys | {"dilation": dilations} if dilated else keys


def _weighted(draft: Draft, rng: Random, name: str, weight: Shape) -> dict[str, Any]:
    """The constants of a conv2d or linear, of random codes; seldom with a stray bit behind the last one."""
    bits = rng.randint(2, 8)
    size, used = -(-math.prod(weight) * bits // 8), math.prod(weight) * bits % 8
    codes = bytearray(rng.randbytes(size))
    if used and rng.random() < 0.95:
        codes[-1] &= (1 << used) - 1
    packed = add_tensor(draft, f"{name}/codes", "U8", [size], bytes(codes))
    keys: dict[str, Any] = {"weight": Object([["codes", packed], ["shape", list(weight)], ["bits", bits]])}
    for key in ("multiplier", "bias"):
        keys[key] = add_floats(draft, f"{name}/{key}", [rng.choice([0.5, -0.01, 3e4]) for _ in range(weight[0])])
    return keys


def other_inputs(draft: Draft, rng: Random) -> bool:
    """A node reads another activation that was written before; seldom of the shape that it needs."""
    nodes = rng.choice(members(draft)).get("nodes")
    at = rng.randrange(len(nodes))
    inputs = nodes[at].get("inputs")
    inputs[rng.randrange(len(inputs))] = rng.choice([0, *(node.get("output") for node in nodes[:at])])
    return True


def other_shape(draft: Draft, rng: Random) -> bool:
    """An activation is declared otherwise."""
    shape = rng.choice(rng.choice(members(draft)).get("tensors")).get("shape")
    kind = rng.randrange(4)
    if kind == 0:
        shape[rng.randrange(len(shape))] += rng.choice([-1, 1, 1, 2**28])
    elif kind == 1:
        rng.shuffle(shape)
    elif kind == 2:
        shape[:] = [math.prod(shape)]
    else:
        shape[:] = [shape[0], 1, 1][: rng.choice([1, 1, 2, 3])]
    return True


def at_the_bound(draft: Draft, rng: Random) -> bool:
    """Constants of a node whose largest result is just below, at or above 2^30, of an f32 output 2^100."""
    member = rng.choice(members(draft))
    has_bias = {op for op, row in OPS.items() if "bias" in row.attributes or op in ("conv2d", "linear")}
    nodes = [node for node in member.get("nodes") if node.get("op") in has_bias]
    if not nodes:
        return False
    node = rng.choice(nodes)
    limit = 2.0**30 if member.get("tensors")[node.get("output")].get("dtype") != "f32" else 2.0**100
    below = float(np.nextafter(np.float32(limit), np.float32(0)))
    value = rng.choice([limit, below, below, -below, -limit, limit - 1e-30 * limit])
    op = node.get("op")
    if op in ("conv2d", "linear"):
        entry = draft.header.get(node.get("bias"))
        at = entry.get("data_offsets")[0] + 4 * rng.randrange(entry.get("shape")[0])
        struct.pack_into("<f", draft.data, at, value)
        if rng.random() < 0.8:  # then the bias decides alone
            begin, end = draft.header.get(node.get("multiplier")).get("data_offsets")
            draft.data[begin:end] = bytes(end - begin)
            if "residual_multiplier" in node:
                node.set("residual_multiplier", 0)
        return True
    node.set("bias", value)
    for key, zero in (("multipliers", [0, 0.0]), ("multiplier", 0.0)):
        if key in OPS[op].attributes:
            node.set(key, zero)
    if rng.random() < 0.3 and op in ("add", "mul"):
        factor = rng.choice([below, limit]) / (255 if op == "add" else 65_025)
        node.set("bias", 0)
        node.set(*(("multipliers", [0, factor]) if op == "add" else ("multiplier", factor)))
    return True


NUMBERS = ("bias", "residual_multiplier", "multiplier", "epsilon", "logit_multiplier", "inner_multiplier", "inner_bias")


def other_number(draft: Draft, rng: Random) -> bool:
    """An f32 number of a node."""
    found = []
    for member in members(draft):
        for node in member.get("nodes"):
            found += [(p, 1) for p in node if p[0] in NUMBERS]
            found += [(p[1], i) for p in node if p[0] == "multipliers" for i in range(2)]
    found = [(c, i) for c, i in found if isinstance(c[i], float)]
    if not found:
        return False
    container, i = rng.choice(found)
    container[i] = rng.choice([rng.uniform(-2, 2), rng.uniform(-1, 1) * 2.0 ** rng.randint(-150, 31), *FLOATS[:20]])
    return True


def other_grid(draft: Draft, rng: Random) -> bool:
    """All u8 activations of a member on one grid, or one of them on another."""
    tensors = [t for t in rng.choice(members(draft)).get("tensors") if t.get("dtype") == "u8"]
    scale = rng.choice([2.0**-126, 2.0**126, 0.1, 1, 3, 2.0**-126 * (1 - 2**-24), 2.0**-126 * (1 - 2**-30), 2.0**127])
    zero_point = rng.choice([0, 1, 128, 255, rng.randrange(256)])
    if rng.random() < 0.3:
        tensors = [rng.choice(tensors)]
    for tensor in tensors:
        tensor.set("scale", scale)
        tensor.set("zero_point", zero_point)
    return True


def other_clamp(draft: Draft, rng: Random) -> bool:
    nodes = [node for member in members(draft) for node in member.get("nodes") if "clamp" in node]
    if not nodes:
        return False
    low, high = sorted(rng.choice([0, 0, 1, 127, 128, 254, 255, rng.randrange(256)]) for _ in range(2))
    rng.choice(nodes).set("clamp", [low, high] if rng.random() < 0.9 else [high, low])
    return True


def other_bytes(draft: Draft, rng: Random) -> bool:
    """Random codes in a U8 tensor, with or without the bits behind the last code."""
    found = [entry for _, entry in entries(draft) if entry.get("dtype") == "U8" and 0 not in entry.get("shape")]
    if not found:
        return False
    begin, end = rng.choice(found).get("data_offsets")
    if rng.random() < 0.15:
        draft.data[end - 1] |= 128  # behind the last code, where there are bits left
        return True
    last = end if rng.random() < 0.1 else end - 1
    for _ in range(rng.choice([1, 1, 5, 50])):
        draft.data[rng.randrange(begin, max(begin + 1, last))] = rng.choice([0, 255, 128, 127, rng.randrange(256)])
    return True


def other_floats(draft: Draft, rng: Random) -> bool:
    """A number or three of an F32 tensor, of any bits, or of an I32 tensor."""
    found = [entry for _, entry in entries(draft) if entry.get("dtype") != "U8" and 0 not in entry.get("shape")]
    if not found:
        return False
    entry = rng.choice(found)
    begin, end = entry.get("data_offsets")
    if entry.get("dtype") == "I32":
        value = rng.choice([-1, 0, 1, rng.randrange(50), -2, 32_767, 32_768, 2**31 - 1, -(2**31)])
        struct.pack_into("<i", draft.data, rng.randrange(begin, end, 4), value)
        return True
    values = [0, 1 << 31, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF]
    for _ in range(rng.choice([1, 1, 3])):
        bits = rng.choice([*values, rng.getrandbits(30), rng.getrandbits(31)])
        struct.pack_into("<I", draft.data, rng.randrange(begin, end, 4), bits)
    return True


def other_padding(draft: Draft, rng: Random) -> bool:
    """A window's numbers, whose output mostly does not follow."""
    nodes = [node for member in members(draft) for node in member.get("nodes") if "stride" in node]
    if not nodes:
        return False
    node = rng.choice(nodes)
    key = rng.choice([key for key in ("stride", "padding", "dilation", "kernel", "groups") if key in node])
    values = node.get(key)
    if not isinstance(values, list):
        node.set(key, rng.choice([0, 1, 2, 3, 65_535, 65_536]))
        return True
    values[rng.randrange(len(values))] = rng.choice([0, 1, 1, 2, 3, 5, 100, 65_535, 65_536])
    return True


def other_spelling(draft: Draft, rng: Random) -> bool:
    draft.spelling.rng = random.Random(rng.random())
    draft.spelling.spaces = rng.choice([0, 0, 0.02, 0.3])
    draft.spelling.escapes = rng.choice([0, 0, 0.02, 0.3])
    draft.spelling.digits = rng.choice([0, 0.1, 1])
    return True


# ---- The trees: JSON of another shape --------------------------------------------------------------------------------


def tree(draft: Draft, rng: Random) -> Object:
    return draft.graph if rng.random() < 0.65 else draft.header


def any_slot(draft: Draft, rng: Random) -> tuple[list, int] | None:
    """Where some value stands; objects near the root are as likely as the many numbers below."""
    found = list(slots(tree(draft, rng)))
    if rng.random() < 0.4:
        found = [slot for slot in found if isinstance(slot[0][slot[1]], list)] or found
    return rng.choice(found) if found else None


def any_value(rng: Random) -> Any:
    kind = rng.randrange(8)
    if kind <= 2:
        return rng.choice([INTEGERS, FLOATS, NAMES][kind])
    if kind == 3:
        return rng.choice(PIECES)
    if kind == 4:
        return Raw(rng.choice([*NUMERALS, *TOKENS]))
    if kind == 5:
        return rng.choice([None, True, False])
    return rng.choice([[], [0], [1, 1], [1, 1, 1], [0, 0, 0, 0], [[]], Object(), Object([["a", 1]]), [None], [0.5]])


def replace(draft: Draft, rng: Random) -> bool:
    slot = any_slot(draft, rng)
    if not slot:
        return False
    slot[0][slot[1]] = any_value(rng)
    return True


def same_kind(draft: Draft, rng: Random) -> bool:
    """A value becomes another one of its type."""
    slot = any_slot(draft, rng)
    if not slot:
        return False
    container, i = slot
    value = container[i]
    if isinstance(value, bool) or value is None:
        return False
    if isinstance(value, int):
        container[i] = rng.choice([value + rng.choice([-8, -4, -2, -1, 1, 2, 4, 8]), rng.choice(INTEGERS)])
    elif isinstance(value, float):
        container[i] = rng.choice([*FLOATS, *INTEGERS, value * rng.choice([-1, 2, 0.5, 1 + 2**-23])])
    elif isinstance(value, str):
        container[i] = rng.choice([*NAMES, *PIECES, value + " ", value + "\x00", value[:-1], value.upper(), value * 2])
    elif isinstance(value, list):
        rng.shuffle(value)
    return True


def respell(draft: Draft, rng: Random) -> bool:
    """A number in digits that JSON or the format may not allow."""
    found = [s for s in slots(tree(draft, rng)) if type(s[0][s[1]]) in (int, float)]
    if not found:
        return False
    container, i = rng.choice(found)
    text = str(container[i])
    spelled = [f"{text}.0", f"{text}e0", f"{text}E+0", f"-{text}", f"0{text}", f"+{text}", f"{text}.", f"{text}0e-1"]
    container[i] = Raw(rng.choice([*spelled, f"{text}.000000000000000000001", *NUMERALS]))
    return True


def remove(draft: Draft, rng: Random) -> bool:
    container = rng.choice(list(containers(tree(draft, rng))))
    if not container:
        return False
    del container[rng.randrange(len(container))]
    return True


def duplicate(draft: Draft, rng: Random) -> bool:
    """A key that stands twice, or one more entry of an array."""
    container = rng.choice(list(containers(tree(draft, rng))))
    if not container:
        return False
    entry = copied(rng.choice(container))
    if isinstance(container, Object) and rng.random() < 0.3:
        entry = [entry[0], any_value(rng)]
    container.insert(rng.randrange(len(container) + 1), entry)
    return True


def extra_key(draft: Draft, rng: Random) -> bool:
    objects = [c for c in containers(tree(draft, rng)) if isinstance(c, Object)]
    if not objects:
        return False
    container = rng.choice(objects)
    known = ["clamp", "bias", "multiplier", "dilation", "groups", "residual_multiplier", "kernel", "table", "extra"]
    known += ["axis", "block", "peak", "prefix", "rows", "vocabulary", "variable", "inner_clamp", "inner_bias"]
    container.insert(rng.randrange(len(container) + 1), [rng.choice([*known, *NAMES]), any_value(rng)])
    return True


def rename_key(draft: Draft, rng: Random) -> bool:
    objects = [c for c in containers(tree(draft, rng)) if isinstance(c, Object) and c]
    if not objects:
        return False
    pair = rng.choice(rng.choice(objects))
    pair[0] = rng.choice([pair[0] + " ", pair[0].upper(), pair[0] + "\x00", pair[0][:-1], *NAMES])
    return True


def transplant(draft: Draft, rng: Random) -> bool:
    """A value from elsewhere, or two that change places."""
    mine, other = any_slot(draft, rng), any_slot(draft, rng)
    if not mine or not other:
        return False
    (a, i), (b, j) = mine, other
    if any(part is a for part in containers(b[j])) or any(part is b for part in containers(a[i])):
        return False  # one holds the other
    if rng.random() < 0.5:
        a[i], b[j] = b[j], a[i]
    else:
        a[i] = copied(b[j])
    return True


def deep(draft: Draft, rng: Random) -> bool:
    slot = any_slot(draft, rng)
    if not slot:
        return False
    depth = rng.choice([*range(9, 18), *range(9, 18), 100, 2000, 100_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    slot[0][slot[1]] = Raw(opening * depth + rng.choice(["", "1", "[]"] if opening == "[" else ["1"]) + closing * depth)
    return True


def other_op(draft: Draft, rng: Random) -> bool:
    found = [p for c in containers(draft.graph) if isinstance(c, Object) for p in c if p[0] == "op"]
    if not found:
        return False
    rng.choice(found)[1] = rng.choice([*OPS, *OPS, "softmax", "Conv2d", "conv2d ", ""])
    return True


def rewire(draft: Draft, rng: Random) -> bool:
    found = [p for c in containers(draft.graph) if isinstance(c, Object) for p in c if p[0] in ("inputs", "output")]
    if not found:
        return False
    pair = rng.choice(found)
    ids = [rng.choice([-1, 0, 0, 1, 1, 2, 3, 4, 5, 2**31, 2**32]) for _ in range(rng.choice([0, 1, 1, 2, 2, 3]))]
    pair[1] = ids if isinstance(pair[1], list) else rng.choice([-1, 0, 1, 2, 3, 4, 5, 2**32 + 1])
    return True


def other_metadata(draft: Draft, rng: Random) -> bool:
    if "__metadata__" not in draft.header or not isinstance(draft.header.get("__metadata__"), Object):
        return False
    metadata = draft.header.get("__metadata__")
    key = rng.choice(["format", "format_version", "requires", "graph", "note", rng.choice(NAMES)])
    values = ["1", "2", "3", "0", "01", "1 ", "1.0", "-1", "+1", "١", "9" * 9, "9" * 10, "", "qdeploy", "pt", "0.1.0"]
    other = rng.choice([*values, *values, *NAMES, copied(draft.graph), GraphText()])
    metadata.set(key, any_value(rng) if rng.random() < 0.3 else other)
    return True


def around_graph(draft: Draft, rng: Random) -> bool:
    """Text before or behind the JSON of the graph: white space does no harm."""
    before = rng.choice(["", "", " ", "\r\n\t", "\ufeff", "\x00", "\x0c", "\u00a0", "x", "//\n"])
    behind = rng.choice(["", "", " ", "\n\n", "\x00", "\x00x", "}", "{}", ",", "\x0c", "\u2028", "null"])
    draft.around_graph = before, behind
    return draft.around_graph != ("", "")


def other_offsets(draft: Draft, rng: Random) -> bool:
    """An entry of the header overlaps, leaves a hole, is of another size or begins elsewhere."""
    found = [c for c in containers(draft.header) if isinstance(c, Object) and "data_offsets" in c and "dtype" in c]
    found = [c for c in found if isinstance(c.get("data_offsets"), list) and len(c.get("data_offsets")) == 2]
    if not found:
        return False
    entry = rng.choice(found)
    kind = rng.randrange(5)
    offsets = entry.get("data_offsets")
    if kind == 0 and all(isinstance(v, int) for v in offsets):
        shift = rng.choice([-8, -4, -1, 1, 4, 8, 2**32, 2**63, -(2**63)])
        entry.set("data_offsets", [v + shift for v in offsets])
    elif kind == 1:
        entry.set("data_offsets", copied(rng.choice(found).get("data_offsets")))
    elif kind == 2:
        entry.set("data_offsets", [offsets[0], rng.choice([*INTEGERS, len(draft.data), len(draft.data) + 1])])
    elif kind == 3:
        entry.set("dtype", rng.choice(["U8", "F32", "I32", "F16", "BF16", "I8", "u8", ""]))
    elif isinstance(entry.get("shape"), list) if "shape" in entry else False:
        shape = entry.get("shape")
        shape.insert(rng.randrange(len(shape) + 1), rng.choice([1, 1, 1, 0, 2, 2**40, 2**41]))
    return True


# ---- The bytes -------------------------------------------------------------------------------------------------------


def header_size(content: bytes) -> int:
    return min(max(0, len(content) - 8), int.from_bytes(content[:8], "little"))


def truncate(content: bytes, rng: Random) -> bytes:
    size = len(content)
    return content[: rng.choice([size - 1, size - 4, 8, 9, 7, 0, rng.randrange(size + 1), 8 + header_size(content)])]


def append(content: bytes, rng: Random) -> bytes:
    return content + rng.choice([b"\0", b" ", bytes(4), bytes(8), rng.randbytes(100)])


def header_length(content: bytes, rng: Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    values = [
        0,
        1,
        7,
        8,
        max(0, len(content) - 8),
        len(content),
        100_000_000,
        100_000_008,
        2**31,
        2**32,
        2**63,
        2**64 - 8,
    ]
    value = rng.choice([*values, *(max(0, length + d) for d in (-16, -8, -1, 1, 8, 16))])
    return value.to_bytes(8, "little") + content[8:]


def longer_header(content: bytes, rng: Random) -> bytes:
    """More of what stands behind the header's object, or before it."""
    end = 8 + header_size(content)
    more = rng.choice([b" " * 8, b" " * 80, b"\n\t\r " * 2, b" " * 3, b"\0" * 8, b"       x", b"}       ", b"\x0c" * 8])
    text = content[8:end]
    text = more + text if rng.random() < 0.2 else text + more
    return len(text).to_bytes(8, "little") + text + content[end:]


def unaligned_header(content: bytes, rng: Random) -> bytes:
    """The header without its padding; its length is a multiple of 8 by chance."""
    end = 8 + header_size(content)
    text = content[8:end].rstrip(b" ")
    return len(text).to_bytes(8, "little") + text + content[end:]


def header_text(content: bytes, rng: Random) -> bytes:
    """A character of the JSON inserted, removed or replaced, the length and the padding right."""
    end = 8 + header_size(content)
    text = bytearray(content[8:end].rstrip(b" "))
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(text) + 1)
        new = rng.choice([*b'{}[]",:\\ \t\n\0/0123456789-+.eEuntrfalse\x7f'])
        kind = rng.randrange(4)
        piece = [
            bytes([new]),
            b"",
            rng.choice(UTF8),
            encoded(rng.choice([*TOKENS, *NUMERALS])),
        ][kind]
        text[at : at + rng.choice([0, 1])] = piece
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + bytes(text) + content[end:]


def flip(content: bytes, rng: Random) -> bytes:
    """A few bits, half of them in the first kilobyte."""
    result = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(min(len(result), rng.choice([16, 1024, len(result)]))) if result else 0
        if result:
            result[at] ^= 1 << rng.randrange(8)
    return bytes(result)


def splice(content: bytes, rng: Random) -> bytes:
    """Bytes inserted, removed, or copied from elsewhere in the file."""
    size = len(content)
    at, other, length = rng.randrange(size + 1), rng.randrange(size + 1), rng.choice([1, 1, 2, 4, 8, 100])
    kind = rng.randrange(3)
    piece = [rng.randbytes(length), b"", content[other : other + length]][kind]
    return content[:at] + piece + content[at + (0 if kind == 0 else length) :]


DraftMutation = Callable[[Draft, Random], bool]
BytesMutation = Callable[[bytes, Random], bytes]

MODEL: list[DraftMutation] = [
    notes,
    shuffled_keys,
    unnamed_tensor,
    relayout,
    rename_constant,
    rename,
    share_constants,
    more_members,
    fewer_members,
    other_rule,
    other_classes,
    other_preprocess,
    swap_nodes,
    other_inputs,
    other_shape,
    other_ids,
    insert_node,
    insert_node,
    insert_node,
    at_the_bound,
    at_the_bound,
    other_number,
    other_grid,
    other_clamp,
    other_bytes,
    other_floats,
    other_padding,
    other_spelling,
    other_spelling,
]
TREE: list[DraftMutation] = [
    replace,
    replace,
    same_kind,
    same_kind,
    same_kind,
    respell,
    remove,
    duplicate,
    extra_key,
    rename_key,
    transplant,
    deep,
    other_op,
    rewire,
    other_metadata,
    around_graph,
    other_offsets,
    other_offsets,
]
BYTES: list[BytesMutation] = [
    truncate,
    append,
    header_length,
    longer_header,
    unaligned_header,
    header_text,
    header_text,
    flip,
    splice,
]
