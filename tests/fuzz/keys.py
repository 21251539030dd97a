"""What the fuzzer does to what versions 3 and 4 brought: keys, types and ops. KEYS are mutations of the model, as those
of mutations.py."""

from __future__ import annotations

import math
import random
import struct
from typing import Any

from draft import Draft, Object, copied
from mutations import DraftMutation, add_floats, add_tensor, members

from qdeploy.graph import SEVERAL_OUTPUTS, Shape
from qdeploy.ops import OPS
from qdeploy.ops.op import channels_of, rows_of

Random = random.Random
MAX_PEAK, MAX_ACC = 32_767, 2**31 - 1
COUNTS = ("heads", "peak", "block", "groups", "prefix")
BIG = 20_000  # elements of an array that a mutation makes, at most


def chosen(draft: Draft, rng: Random, *keys: str, of: tuple[str, ...] = tuple(OPS)) -> tuple[Object, Object] | None:
    """A member and one of its nodes that has one of these keys and is one of these ops."""
    found = [(m, n) for m in members(draft) for n in m.get("nodes") if n.get("op") in of]
    found = [(m, n) for m, n in found if any(key in n for key in keys)]
    return rng.choice(found) if found else None


def shapes(member: Object, node: Object) -> list[Shape]:
    """Of the inputs of a node."""
    return [tuple(member.get("tensors")[i].get("shape")) for i in node.get("inputs")]


def fresh(draft: Draft) -> str:
    """The name of a tensor that the file does not have."""
    return f"array {len(draft.header)}"


def add_array(draft: Draft, dtype: str, shape: list[int], values: list) -> str:
    """A tensor of F32 or I32."""
    content = struct.pack(f"<{len(values)}{'f' if dtype == 'F32' else 'i'}", *values)
    return add_tensor(draft, fresh(draft), dtype, shape, content)


def integers_of(draft: Draft, name: str) -> list[int]:
    begin, end = draft.header.get(name).get("data_offsets")
    return list(struct.unpack_from(f"<{(end - begin) // 4}i", draft.data, begin))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, min(n, 1000) + 1) if n % d == 0]


def off_by_one(rng: Random, value: int) -> int:
    """Mostly the value itself."""
    return value + rng.choice([0, 0, 0, 0, 0, 0, 0, 0, 1, -1])


def other_count(draft: Draft, rng: Random) -> bool:
    """Heads, peak, block, groups or prefix: what divides a size of the input, what does not, the ends of the range."""
    found = chosen(draft, rng, *COUNTS)
    if not found:
        return False
    member, node = found
    near = [d for size in shapes(member, node)[0] for d in (*divisors(size), size + 1)]
    value = rng.choice([*near, *near, None, 0, -1, MAX_PEAK, MAX_PEAK + 1, 65_535, 65_536, 2**31, 2**63, 1.0])
    node.set(rng.choice([key for key in COUNTS if key in node]), value)
    return True


def attention_keys(draft: Draft, rng: Random, inputs: list[Shape]) -> dict[str, Any]:
    """Those of an attention over q, k and v of these shapes, all of them as they must be but for one, at times."""
    (rows, depth), (keys, _), (_, outputs) = inputs
    heads = rng.choice([d for d in divisors(depth) if outputs % d == 0])
    block = rng.choice([None, *divisors(keys)]) if rows == keys else None
    rows, seen = (block, block) if block else (rows, keys)
    largest = MAX_ACC // (255 * seen)
    values: dict[str, Any] = {
        "heads": off_by_one(rng, heads),
        "block": block and off_by_one(rng, block),
        "peak": rng.choice([1, min(MAX_PEAK, largest), min(MAX_PEAK, largest), largest + 1, MAX_PEAK + 1]),
        "logit_bias": None,
        "regions": None,
        "logit_multiplier": rng.choice([0.0, 1e-4, -0.01, 1.0, 1e20, 1e26]),
        "multiplier": rng.choice([0.01, -1.0, 4e6, 4.3e6]),
        "bias": rng.choice([0.5, 128.0, 2.0**30]) if rng.random() < 0.2 else 3.5,
    }
    shape = [off_by_one(rng, heads), rows, off_by_one(rng, seen)]
    if math.prod(shape) <= BIG and rng.random() < 0.5:
        biases = [rng.choice([0.0, -2.5, 7.0, -1e3]) for _ in range(math.prod(shape))]
        biases[-1:] = [rng.choice([1.0, 1e29, 2.0**100, math.inf])] if rng.random() < 0.1 and biases else biases[-1:]
        values["logit_bias"] = add_array(draft, "F32", shape, biases)
    if keys <= BIG and rng.random() < 0.5:
        count = off_by_one(rng, keys)
        regions = [rng.choice([0, 0, 1, -7, 2**31 - 1, -(2**31)]) for _ in range(count)]
        values["regions"] = add_array(draft, rng.choice(["I32", "I32", "I32", "F32"]), [count], regions)
    return values


def other_attention(draft: Draft, rng: Random) -> bool:
    """Who sees whom, in how many heads, by which weights."""
    found = chosen(draft, rng, "heads", of=("attention",))
    if not found or not all(len(shape) == 2 for shape in shapes(*found)) or len(shapes(*found)) != 3:
        return False
    for key, value in attention_keys(draft, rng, shapes(*found)).items():
        if rng.random() < 0.8:
            found[1].set(key, value)
    return True


def random_index(rng: Random, count: int, size: int) -> list[int]:
    """`size` of `count` rows or channels, or none of them; seldom one beyond."""
    index = [rng.randrange(-1, count) for _ in range(size)]
    if index and rng.random() < 0.2:
        index[rng.randrange(size)] = rng.choice([count, count - 1, -1, -2, 2**31 - 1, -(2**31)])
    return index


def other_index(draft: Draft, rng: Random) -> bool:
    """What a gather takes; as many as before, mostly."""
    found = chosen(draft, rng, "index", of=("gather",))
    if not found:
        return False
    member, node = found
    x = shapes(member, node)[0]
    count = rows_of(x) if node.get("axis") == "rows" else channels_of(x)
    size = max(0, off_by_one(rng, len(integers_of(draft, node.get("index")))))
    shape = rng.choice([[size], [size], [size], [size], [1, size], [size, 1]])
    dtype = rng.choice(["I32", "I32", "I32", "I32", "F32"])
    node.set("index", add_array(draft, dtype, shape, random_index(rng, count, size)))
    if rng.random() < 0.1:
        node.set("axis", rng.choice(["rows", "channels", "columns", None, 0]))
    return True


def axis_keys(draft: Draft, rng: Random, axis: str, size: int, outputs: int, at_most: int) -> dict[str, str]:
    """Start and weight of an axis of a resize; magnitudes of weights add up to `at_most`, or more by one."""
    taps = off_by_one(rng, rng.randint(1, min(size, 4)))
    starts = [rng.randint(0, max(0, size - taps)) for _ in range(outputs)]
    if rng.random() < 0.1:
        starts[-1] = rng.choice([-1, size - taps + 1, size, 2**31 - 1])
    each = max(1, at_most // max(1, taps))
    weights = [rng.choice([-1, 1]) * rng.randint(0, each) for _ in range(outputs * taps)]
    if weights and rng.random() < 0.5:
        weights[:taps] = [0] * taps
        weights[0] = rng.choice([-1, 1]) * rng.choice([at_most, at_most, at_most + 1, 32_767, 32_768, 2**31 - 1])
        weights[0] = max(-(2**31), min(2**31 - 1, weights[0]))
    return {
        f"{axis}_start": add_array(draft, "I32", [outputs], starts),
        f"{axis}_weight": add_array(draft, "I32", [outputs, taps], weights),
    }


def resize_keys(draft: Draft, rng: Random, shape: Shape, outputs: list[int]) -> dict[str, Any]:
    """Of a resize of [C, H, W] to so many rows and columns, whose sums fit 31 bits, or do not by a little."""
    rows = rng.choice([1, 64, 2048, 32_767])
    columns = MAX_ACC // (255 * rows) if rng.random() < 0.5 else rng.choice([1, 100])
    keys: dict[str, Any] = axis_keys(draft, rng, "row", shape[1], outputs[0], rows)
    keys |= axis_keys(draft, rng, "column", shape[2], outputs[1], columns)
    return keys | {"multiplier": rng.choice([0.0, 0.25 / (rows * columns), -1e-3, 0.5]), "bias": 99.5}


def other_resize(draft: Draft, rng: Random) -> bool:
    """Windows and weights, of one axis or of both."""
    found = chosen(draft, rng, "row_start", of=("resize",))
    if not found or len(shapes(*found)[0]) != 3:
        return False
    member, node = found
    outputs = [len(integers_of(draft, node.get(f"{axis}_start"))) for axis in ("row", "column")]
    if max(outputs) > BIG or min(outputs) < 1:
        return False
    for key, value in resize_keys(draft, rng, shapes(member, node)[0], outputs).items():
        if rng.random() < 0.9:
            node.set(key, value)
    return True


def other_dtype(draft: Draft, rng: Random) -> bool:
    """An activation in codes of the other width, where its op and its readers know them or where they do not."""
    member = rng.choice(members(draft))
    tensors = member.get("tensors")
    writers = {node.get("output"): node for node in member.get("nodes")}
    number = rng.randrange(len(tensors))
    tensor, node = tensors[number], writers.get(number)
    to_s16 = tensor.get("dtype") == "u8"
    tensor.set("dtype", "s16" if to_s16 else rng.choice(["u8", "u8", "i32", "f32"]))
    if to_s16 and rng.random() < 0.9:
        tensor.set("zero_point", 0)
    if node and OPS[node.get("op")].requantized and rng.random() < 0.9:
        node[:] = [pair for pair in node if pair[0] != "clamp"]
        node.extend([] if to_s16 else [["clamp", [0, 255]]])
    return at_version_3(draft)


def at_version_3(draft: Draft) -> bool:
    return at_version(draft, SEVERAL_OUTPUTS if any("outputs" in member for member in members(draft)) else 3)


def at_version(draft: Draft, version: int) -> bool:
    metadata = draft.header.get("__metadata__")
    metadata.set("format_version", str(version))
    metadata.set("requires", "0.1.0")
    return True


def other_table(draft: Draft, rng: Random) -> bool:
    """256 entries for each channel, or for nearly each, or for all; at version 4, mostly."""
    found = chosen(draft, rng, "table", of=("table",))
    if not found:
        return False
    member, node = found
    channels = max(0, off_by_one(rng, channels_of(shapes(member, node)[0])))
    if channels * 256 > BIG:
        return False
    shape = rng.choice([[channels, 256]] * 6 + [[256], [256, channels], [1, 256], [channels, 256, 1], [channels, 255]])
    size = math.prod(shape)
    if member.get("tensors")[node.get("output")].get("dtype") == "f32":
        node.set("table", add_array(draft, "F32", shape, [rng.choice([0.0, -1.5, 2.0**99]) for _ in range(size)]))
    else:
        node.set("table", add_tensor(draft, fresh(draft), "U8", shape, rng.randbytes(size)))
    return at_version(draft, 4) if rng.random() < 0.9 else True


def other_inner_codes(draft: Draft, rng: Random) -> bool:
    """Where a residual is: they come, go, come in part, or are others, up to the bound; at version 4, mostly."""
    found = chosen(draft, rng, "residual_multiplier")
    if not found:
        return False
    _, node = found
    low, high = sorted(rng.choice([0, 0, 7, 255, 255]) for _ in range(2))
    factor = rng.choice([0.0, 0.5, -1.5, 2.0**22, 4_210_752.0, 2.0**90])
    keys = {"inner_clamp": [low, high], "inner_multiplier": factor, "inner_bias": rng.choice([0.0, 9.5, -(2.0**29)])}
    if rng.random() < 0.2:
        keys["inner_clamp"] = rng.choice([[high, low], [0, 256], [-1, 255], [0], None, [0.0, 255.0]])
    node[:] = [pair for pair in node if pair[0] not in keys]
    for key in rng.sample(list(keys), rng.choice([0, 1, 2, 3, 3, 3, 3, 3])):
        node.set(key, keys[key])
    return at_version(draft, 4) if rng.random() < 0.9 else True


def other_outputs(draft: Draft, rng: Random) -> bool:
    """Their ids; or one more f32 tensor; also where there is one output, and in ensembles."""
    member = rng.choice(members(draft))
    tensors = member.get("tensors")
    real = [i for i, tensor in enumerate(tensors) if tensor.get("dtype") == "f32"]
    if rng.random() < 0.5:  # one more
        i = rng.randrange(len(tensors))
        writer = next((node for node in member.get("nodes") if node.get("output") == i), None)
        for key, value in {"dtype": "f32", "scale": 1, "zero_point": 0}.items():
            tensors[i].set(key, value)
        if writer:
            writer[:] = [pair for pair in writer if pair[0] != "clamp"]
        real.append(i)
    rng.shuffle(real)
    ids: Any = real + rng.choice([[], [], [], [], [0], real[:1], [len(tensors)], [-1], [None]])
    member.set("outputs", rng.choice([ids, ids, ids, ids, ids[:1], [], None, ids[0] if ids else 0]))
    return at_version(draft, SEVERAL_OUTPUTS)


def other_epsilon(draft: Draft, rng: Random) -> bool:
    found = chosen(draft, rng, "epsilon", of=("norm",))
    if not found:
        return False
    ends = [2.0**-60, 2.0**-60 * (1 - 2**-24), 2.0**-60 * (1 - 2**-26), 2.0**100, 2.0**100 * (1 + 2**-23), 1e39]
    found[1].set("epsilon", rng.choice([*ends, 0.0, -0.0, -1.0, 1e-46, 1, 2**100, None]))
    return True


def other_text(draft: Draft, rng: Random) -> bool:
    """The keys of an input of token ids; also where the input is numbers."""
    entry = draft.graph.get("input")
    if "vocabulary" not in entry:
        if rng.random() < 0.8:
            return False
        entry.extend([["dtype", "i32"], ["vocabulary", 7], ["variable", False]])
        return at_version_3(draft)
    kind = rng.randrange(4)
    if kind == 0:
        entry.set("variable", rng.choice([True, False, False, None, 0]))
    elif kind == 1:
        value = entry.get("vocabulary")
        entry.set("vocabulary", rng.choice([value + 1, value - 1, 1, 0, 2**28, 2**28 + 1, 2**63, None, 7.0]))
    elif kind == 2:
        entry.set("dtype", rng.choice(["u8", "i64", "I32", None]))
    else:
        entry.set("shape", rng.choice([[1], [entry.get("shape")[0] + 1], [3, 3], [2**28 - 1], [2**28]]))
        first = [member.get("tensors")[0] for member in members(draft)]
        for tensor in first if rng.random() < 0.8 else []:
            tensor.set("shape", copied(entry.get("shape")))
    return True


def rows_at_the_bound(draft: Draft, rng: Random) -> bool:
    """The constants of a norm, position, embedding or mean whose largest result is just below, at or above 2^30."""
    found = chosen(draft, rng, "multiplier", of=("norm", "position", "embedding", "mean"))
    if not found:
        return False
    _, node = found
    below = 2.0**30 - 64
    value = rng.choice([below, below, -below, 2.0**30, -(2.0**30), math.nan, math.inf])
    key = "bias" if "bias" in node else "rows"
    if isinstance(node.get(key), str):
        begin, end = draft.header.get(node.get(key)).get("data_offsets")
        struct.pack_into("<f", draft.data, rng.randrange(begin, end, 4) if begin < end else begin, value)
    else:
        node.set(key, value)
    if rng.random() < 0.2:
        return True
    if isinstance(node.get("multiplier"), str):
        begin, end = draft.header.get(node.get("multiplier")).get("data_offsets")
        draft.data[begin:end] = bytes(end - begin)
    else:
        node.set("multiplier", 0.0)
    return True


# ---- A node more -----------------------------------------------------------------------------------------------------


def insert_row_node(draft: Draft, rng: Random) -> bool:
    """A node of an op of version 3 that nobody reads, before the last one."""
    member = rng.choice(members(draft))
    nodes, tensors = member.get("nodes"), member.get("tensors")
    at = rng.randrange(len(nodes))
    written = [0, *(node.get("output") for node in nodes[:at])]
    sources = [i for i in written if tensors[i].get("dtype") in ("u8", "s16")]
    if not sources or len(tensors) > 40:
        return False
    source = rng.choice(sources)
    shape, is_u8 = tuple(tensors[source].get("shape")), tensors[source].get("dtype") == "u8"
    if math.prod(shape) > BIG:
        return False
    ops = ["rescale", "norm", *[[], ["position", "mean", "image", "gather"], ["tokens", "gather"]][len(shape) - 1]]
    op = rng.choice([*ops, *([[], ["attention"], ["resize"]][len(shape) - 1] if is_u8 else [])])
    keys, output = row_keys(draft, rng, op, shape)
    tensor = copied(tensors[source])
    if not OPS[op].same_grid:
        as_s16 = "s16" in OPS[op].writes and rng.random() < 0.5
        grid = {"dtype": "s16", "zero_point": 0} if as_s16 else {"dtype": "u8", "zero_point": rng.choice([0, 3, 255])}
        for key, value in {**grid, "scale": 0.5}.items():
            tensor.set(key, value)
        keys |= {} if as_s16 else {"clamp": sorted(rng.choice([0, 0, 7, 255, 255]) for _ in range(2))}
    inputs = [source] * (3 if op == "attention" else 1)
    name = f"inserted {len(tensors)}"
    node = Object([["op", op], ["name", name], ["inputs", inputs], ["output", len(tensors)]])
    node.extend([key, value] for key, value in keys.items())
    tensor.set("name", name)
    tensor.set("shape", list(output))
    tensors.append(tensor)
    nodes.insert(at, node)
    return at_version_3(draft)


def row_keys(draft: Draft, rng: Random, op: str, shape: Shape) -> tuple[dict[str, Any], Shape]:
    """The keys of a node that reads a tensor of this shape, and the shape of its output."""
    rows, channels = rows_of(shape), channels_of(shape)
    affine = {"multiplier": rng.choice([0.01, -0.5, 2.0**15, 3e4]), "bias": rng.choice([0.5, -1e5, 2.0**30])}
    if op == "rescale":
        return affine, shape
    if op == "norm":
        floats = {key: add_floats(draft, fresh(draft), [0.5] * channels) for key in ("multiplier", "bias")}
        groups = rng.choice([None, off_by_one(rng, rng.choice(divisors(channels)))])
        return {**floats, "groups": groups, "epsilon": rng.choice([2.0**-60, 1.0, 1e9, 2.0**100])}, shape
    if op == "position":
        prefix = rng.choice([0, 1, 1, 7])
        table = [rng.uniform(-99, 99) for _ in range((prefix + rows) * channels)]
        array = add_array(draft, "F32", [prefix + rows, channels], table)
        return {"rows": array, "multiplier": affine["multiplier"], "prefix": prefix}, (prefix + rows, channels)
    if op == "mean":
        multiplier = add_floats(draft, fresh(draft), [0.5 / n for n in range(1, rows + 1)])
        return {"multiplier": multiplier, "bias": affine["bias"]}, (channels,)
    if op == "attention":
        return attention_keys(draft, rng, [shape] * 3), shape
    if op == "resize":
        outputs = [rng.choice([1, 2, 5]) for _ in range(2)]
        return resize_keys(draft, rng, shape, outputs), (channels, *outputs)
    if op == "gather":
        return gather_keys(draft, rng, shape)
    return {}, (rows, channels) if op == "tokens" else (channels, 1, rows)  # image


def gather_keys(draft: Draft, rng: Random, shape: Shape) -> tuple[dict[str, Any], Shape]:
    axis, size = rng.choice(["rows", "channels"]), rng.choice([1, 1, 2, 9])
    count = rows_of(shape) if axis == "rows" else channels_of(shape)
    output = (size, channels_of(shape))
    if axis == "channels":
        output = (size, *shape[1:]) if len(shape) == 3 else (*shape[:-1], size)
    elif rng.random() < 0.5:
        output = (channels_of(shape), size, 1) if rng.random() < 0.5 else (channels_of(shape),)
    return {"axis": axis, "index": add_array(draft, "I32", [size], random_index(rng, count, size))}, output


KEYS: list[DraftMutation] = [
    other_count,
    other_attention,
    other_index,
    other_resize,
    other_dtype,
    other_epsilon,
    other_text,
    other_outputs,
    other_outputs,
    other_table,
    other_inner_codes,
    rows_at_the_bound,
    insert_row_node,
    insert_row_node,
]
