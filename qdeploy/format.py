"""Writes and reads model files: docs/format.md sections 1 to 3, with numpy and the standard library alone."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from typing import Any

import numpy as np

from qdeploy.arguments import path_text
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
    quoted,
    shape_text,
)
from qdeploy.errors import ModelError
from qdeploy.files import AnyPath, atomic_file
from qdeploy.graph import (
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
from qdeploy.validate import (
    INPUT_AT,
    MemberCheck,
    absent_constants,
    check_member_name,
    check_members,
    check_outputs,
    check_preprocess,
    check_results,
    check_text,
    validate,
)

RELEASES = dict.fromkeys(range(1, 5), "0.1.0")  # of each format version: the first qdeploy that reads it
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_DEPTH = 16
MAX_RANK = 8
LARGEST = float(np.finfo(np.float64).max)
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # which no UTF-8 holds
Json = dict[str, Any]
_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "F32": np.dtype("<f4"), "I32": np.dtype("<i4")}
_SINCE = {"U8": 1, "F32": 1, "I32": 3}  # the first format version with such constants


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """n int8 codes of any shape, each of `bits` (2..8) bits, as uint8 [ceil(n*bits/8)]: docs/format.md section 2."""
    flat = np.ascontiguousarray(codes, np.int8).reshape(-1).view(np.uint8) & np.uint8(2**bits - 1)
    groups = np.zeros((-(-flat.size // 8), 8), np.uint8)  # 8 codes fill `bits` whole bytes
    groups.reshape(-1)[: flat.size] = flat
    words = np.zeros(len(groups), "<u8")
    for i in range(8):
        words |= groups[:, i].astype(np.uint64) << np.uint64(i * bits)
    return words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)[: (flat.size * bits + 7) // 8].copy()


def unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The `count` int8 codes in a stream of `pack_codes`. Raises ModelError on a wrong size or stray last bits."""
    size = (count * bits + 7) // 8
    unused = size * 8 - count * bits
    if packed.size != size:
        raise ModelError(f"expected {size} bytes for {count} codes of {bits} bits, got {packed.size}")
    if unused and int(packed[-1]) >> (8 - unused):
        raise ModelError(f"expected zeros in the {unused} unused bits of the last byte, got {int(packed[-1]):#04x}")
    stream = np.zeros((-(-count // 8), bits), np.uint8)
    stream.reshape(-1)[:size] = packed
    padded = np.zeros((len(stream), 8), np.uint8)
    padded[:, :bits] = stream
    words = padded.view("<u8").reshape(-1)
    codes = np.empty((len(words), 8), np.uint8)
    for i in range(8):
        codes[:, i] = (words >> np.uint64(i * bits)).astype(np.uint8)
    codes <<= np.uint8(8 - bits)  # to the top of the byte, and back as int8, whose shift extends the sign
    return (codes.view(np.int8) >> np.int8(8 - bits)).reshape(-1)[:count]


def save(graph: Graph, path: AnyPath) -> None:
    """Validate `graph` and write it as a model file: an older file at `path` stays until the whole new one is on disk.

    Raises ModelError for an invalid graph, a path that is no regular file, or a write that failed (a full disk).
    """
    write(dump(graph), path)


def dump(graph: Graph) -> bytes:
    """The content of the model file of `graph`, with the lowest format version that holds its ops.

    Raises ModelError for an invalid graph.
    """
    validate(graph)
    tensors: dict[str, np.ndarray] = {}
    members = [_member_json(index, member, tensors) for index, member in enumerate(graph.members)]
    preprocess = graph.preprocess and {key: [_number(v) for v in graph.preprocess[key]] for key in ("mean", "std")}
    text = {"dtype": "i32", "vocabulary": graph.vocabulary, "variable": graph.variable} if graph.vocabulary else {}
    document = {
        "input": {"shape": [int(d) for d in graph.input_shape], **text, "preprocess": preprocess},
        "combine": graph.combine,
        "classes": graph.classes,
        "members": members,
    }
    order = ("F32", "I32", "U8")  # what is aligned to 4 bytes first
    ordered = sorted(tensors.items(), key=lambda item: order.index(_dtype_name(item[1])))
    header: dict[str, object] = {"__metadata__": _version_keys(lowest_version(graph)) | {"graph": _dump(document)}}
    begin = 0
    for name, value in ordered:
        header[name] = {
            "dtype": _dtype_name(value),
            "shape": list(value.shape),
            "data_offsets": [begin, begin + value.nbytes],
        }
        begin += value.nbytes
    data = _dump(header).encode()
    data += b" " * (-len(data) % 8)
    if len(data) > MAX_HEADER_BYTES:
        raise ModelError(f"expected at most {MAX_HEADER_BYTES} bytes of header, got {len(data)} - at the graph")
    return b"".join([len(data).to_bytes(8, "little"), data, *(_bytes(value) for _, value in ordered)])


def lowest_version(graph: Graph) -> int:
    """The lowest format version that holds the ops, dtypes and shapes of `graph`, and its outputs."""
    if any(member.outputs is not None for member in graph.members):
        return SEVERAL_OUTPUTS
    tensors = [tensor for member in graph.members for tensor in member.tensors]
    operands = [(node, [member.tensors[i] for i in node.inputs]) for member in graph.members for node in member.nodes]
    versions = [OPS[node.op].since(node, inputs) for node, inputs in operands]
    return max(*versions, *(max(DTYPES[tensor.dtype], 3 if len(tensor.shape) == 2 else 1) for tensor in tensors))


def _version_keys(version: int) -> dict[str, str]:
    """What says in a file how to read it; `requires` tells readers that are too old what they need."""
    keys = {"format": "qdeploy", "format_version": str(version)}
    return keys if version == 1 else keys | {"requires": RELEASES[version]}


def load(path: AnyPath) -> Graph:
    """Read a model file. Raises ModelError, naming place and file, for whatever docs/format.md does not allow."""
    return parse(read(path), path)


def parse(content: bytes, path: AnyPath) -> Graph:
    """The graph in the content of a model file; `path` is for errors alone. Raises as `load`."""
    try:
        graph = _parse(content)
    except ModelError as error:
        raise ModelError(f"{error} in {os.fsdecode(path)}") from None
    return graph


def is_onnx(path: AnyPath) -> bool:
    return os.fsdecode(path).lower().endswith(".onnx")


def read(path: AnyPath) -> bytes:
    """The content of a regular file, or what an ONNX file becomes. Raises ModelError, naming it; of ONNX others."""
    if is_onnx(path):
        from qdeploy.exporter import converted

        return converted(os.fsdecode(path))
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or device would block or never end
            raise ModelError(f"expected a regular file, got something else - at {os.fsdecode(path)}")
        with open(path, "rb") as file:
            _header_length(file.read(9), os.fstat(file.fileno()).st_size, f" in {os.fsdecode(path)}")
            file.seek(0)  # only now: a file of holes may be larger than any memory
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, ModelError):
            raise
        reason = getattr(error, "strerror", error)
        raise ModelError(f"expected a readable file, got {reason} - at {os.fsdecode(path)}") from None


def _dump(document: object) -> str:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _number(value: float) -> float:
    """The f32 nearest to `value`, as the double that prints with the digits needed to get it back."""
    return float(np.float32(value))


def _dtype_name(value: np.ndarray) -> str:
    return {"f": "F32", "i": "I32", "u": "U8"}[value.dtype.kind]


def _bytes(value: np.ndarray) -> memoryview:
    return np.ascontiguousarray(value, _DTYPES[_dtype_name(value)]).data.cast("B")


def _member_json(index: int, member: Member, tensors: dict[str, np.ndarray]) -> Json:
    """The member as JSON; adds its constants to `tensors` under the names that the JSON uses."""

    def constant(name: str, value: np.ndarray) -> str:
        tensors[f"{index}/{name}"] = value
        return f"{index}/{name}"

    def node_json(node: Node) -> Json:
        result = {"op": node.op, "name": node.name, "inputs": [int(i) for i in node.inputs], "output": int(node.output)}
        for key, value in node.constants.items():
            if key == "weight" and node.bits is not None:
                codes = constant(f"{node.name}/codes", pack_codes(value, node.bits))
                result[key] = {"codes": codes, "shape": list(value.shape), "bits": int(node.bits)}
            else:
                result[key] = constant(f"{node.name}/{key}", value)
        result |= dict.fromkeys(absent_constants(node))
        types = OPS[node.op].attribute_types(node, member.tensors[node.output], node.attributes)
        return result | {key: _attribute_json(value, types[key]) for key, value in node.attributes.items()}

    table = member.preprocess_table
    several = {} if member.outputs is None else {"outputs": [int(i) for i in member.outputs]}
    return {
        "name": member.name,
        "preprocess_table": None if table is None else constant("preprocess_table", table),
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": [int(d) for d in tensor.shape],
                "scale": _number(tensor.scale),
                "zero_point": int(tensor.zero_point),
            }
            for tensor in member.tensors
        ],
        "nodes": [node_json(node) for node in member.nodes],
        **several,
    }


def _attribute_json(value: Any, kind: type) -> Any:
    if value is None or kind is str:
        return value
    convert = _number if kind is float else int
    return convert(value) if np.ndim(value) == 0 else [convert(v) for v in value]


def write(content: bytes, path: AnyPath) -> None:
    """Write what `dump` gave; raises ModelError as `save`."""
    try:
        with atomic_file(path) as file:
            file.write(content)
    except OSError as error:
        got = error.strerror or error
        raise ModelError(f"expected to write {len(content)} bytes, got: {got} - at {os.fsdecode(path)}") from error


def check_path(path: AnyPath) -> None:
    """Raise InputError for what is no path, ModelError for one that `write` could not write to, as far as that shows
    beforehand."""
    target = os.path.realpath(path_text(path))
    folder = os.path.dirname(target)
    if os.path.exists(target) and not os.path.isfile(target):
        reason = "something that is not a regular file"
    elif not os.path.isdir(folder):
        reason = "a folder that does not exist"
    elif not os.access(folder, os.W_OK):
        reason = "a folder without permission to write"
    else:
        return
    raise ModelError(f"expected a path to write to, got {reason} - at {os.fsdecode(path)}")


def _parse(data: bytes) -> Graph:
    length = _header_length(data[:9], len(data))
    header = _json(data[8 : 8 + length], "the header")
    metadata = header.pop("__metadata__", None)
    ours = isinstance(metadata, dict) and metadata.get("format") == "qdeploy"
    expect(ours, "a file written by qdeploy.export", "another safetensors file", "__metadata__")
    for key, value in sorted(metadata.items()):
        expect(isinstance(value, str), "a string", kind(value), key_of(key, "__metadata__"))
    version, text = _version(metadata), _field(metadata, "graph", "__metadata__")
    tensors = _container(header, memoryview(data)[8 + length :], version)
    return _Reader(tensors, version).graph(_json(text.encode(), "the graph"))


def _header_length(start: bytes, size: int, file: str = "") -> int:
    """Bytes of the header of a file of `size` bytes, from the first 9 of them."""
    length = int.from_bytes(start[:8], "little")
    whole = 0 < length <= min(size - 8, MAX_HEADER_BYTES) and length % 8 == 0 and start[8:] == b"{"
    expect(whole, "a whole safetensors file", f"{size} bytes that do not hold its header", f"the header{file}")
    return length


def _version(metadata: dict[str, str]) -> int:
    """The format version of a file, which must be one of ours. Of a newer one the error says which qdeploy it needs."""
    text = _field(metadata, "format_version", "__metadata__")
    expected, at = f"format_version 1 to {max(RELEASES)}", "__metadata__"
    expect(re.fullmatch("[1-9][0-9]{0,8}", text) is not None, expected, quoted(text), at)
    version, needed = int(text), metadata.get("requires", "")
    if version > max(RELEASES):
        release = f"qdeploy {needed} or newer" if re.fullmatch("[0-9.]{1,20}", needed) else "a newer qdeploy"
        expect(False, expected, f"{version}, which needs {release}", at)
    expect(version == 1 or "requires" in metadata, "the key `requires` from format_version 2 on", "none", at)
    return version


def _json(text: bytes, at: str) -> Any:
    """An object of JSON, nested at most 16 deep, without a key twice, its numbers finite."""

    def unique(pairs: list[tuple[str, object]]) -> Json:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                expect(False, "unique keys", f"the key {quoted(key)} twice", at)
            seen.add(key)
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    def check(value: object, depth: int) -> None:
        if isinstance(value, (int, float)) and not abs(value) <= LARGEST:
            raise ValueError(value)
        if isinstance(value, str) and _HALF_PAIR.search(value):
            raise ValueError(value)
        if isinstance(value, (dict, list)):
            expect(depth <= MAX_JSON_DEPTH, f"JSON nested at most {MAX_JSON_DEPTH} deep", "deeper", at)
            for item in (*value, *value.values()) if isinstance(value, dict) else value:
                check(item, depth + 1)

    try:
        document = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
        check(document, 1)
    except RecursionError:
        raise ModelError(f"expected JSON nested at most {MAX_JSON_DEPTH} deep, got deeper - at {at}") from None
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"expected JSON in UTF-8 with finite numbers, got something else - at {at}") from None
    return _object(document, at)


def _object(value: Any, at: str) -> Json:
    expect(isinstance(value, dict), "an object", kind(value), at)
    return value


def _field(document: Json, key: str, at: str) -> str:
    """The string under `key`."""
    expect(key in document, f"the key `{key}`", "none", at)
    expect(isinstance(document[key], str), "a string", kind(document[key]), key_of(key, at))
    return document[key]


def _list(document: Json, key: str, most: int, at: str) -> list[Any]:
    values, place = document[key], key_of(key, at)
    expect(isinstance(values, list), "an array", kind(values), place)
    expect(len(values) <= most, f"at most {most} entries", len(values), place)
    return values


def _container(header: Json, data: memoryview, version: int) -> dict[str, np.ndarray]:
    """The arrays of the container, by name, as views of `data`."""
    tensors, spans = {}, []
    known = [dtype for dtype in _DTYPES if _SINCE[dtype] <= version]
    for name, entry in sorted(header.items()):  # which fault is named first is up to no order in the file
        at = f"tensor {quoted(name)}"
        dtype_name = _field(_object(entry, at), "dtype", at)
        expect(dtype_name in known, f"dtype {alternatives(known)}", quoted(dtype_name), at)
        dtype = _DTYPES[dtype_name]
        expect("shape" in entry, "the key `shape`", "none", at)
        shape = integers(entry["shape"], 0, MAX_RANK, 0, 2**40, key_of("shape", at))
        expect("data_offsets" in entry, "the key `data_offsets`", "none", at)
        begin, end = integers(entry["data_offsets"], 2, 2, 0, 2**63 - 1, key_of("data_offsets", at))
        elements = math.prod(max(d, 1) for d in shape)  # a size of 0 excuses no other
        expect(elements <= 2**48, "a tensor that fits a file", f"shape {shape_text(shape)}", at)
        size = math.prod(shape) * dtype.itemsize
        fits = begin <= end <= len(data) and end - begin == size
        expect(fits, f"{size} bytes inside {len(data)}", f"[{begin}, {end})", at)
        expect(begin % dtype.itemsize == 0, f"{dtype_name} data aligned to 4 bytes", f"offset {begin}", at)
        tensors[name] = np.frombuffer(data[begin:end], dtype).reshape(shape)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        expect(begin == position, "tensors without holes or overlap", f"one at {begin}", "the data offsets")
        position = end
    expect(position == len(data), f"{position} bytes of data", len(data), "the data offsets")
    return tensors


def _name(document: Any, at: str) -> str:
    """The name of the member, tensor or node that is known as `at` until then."""
    expect("name" in _object(document, at), "the key `name`", "none", at)
    check_name(document["name"], key_of("name", at))
    return document["name"]


def _activation(document: Json, unnamed_at: str, member: str) -> Activation:
    name = _name(document, unnamed_at)
    at = f"tensor {quoted(name)} of {member}"
    check_keys(document, ("name", "dtype", "shape", "scale", "zero_point"), at)
    dtype, shape = _field(document, "dtype", at), document["shape"]
    shape = tuple(shape) if isinstance(shape, list) else shape
    return Activation(name, shape, dtype, document["scale"], document["zero_point"])


class _Reader:
    """Reads and checks the graph part by part, in the order of csrc/graph.cc and csrc/member_reader.cc: both name the
    same of several faults."""

    def __init__(self, tensors: dict[str, np.ndarray], version: int) -> None:
        self.tensors = tensors
        self.facts = Facts(version)
        self.weights: dict[tuple[str, int, tuple[int, ...]], np.ndarray] = {}  # by name, bits and shape

    def graph(self, document: Json) -> Graph:
        at = "the graph"
        check_keys(document, ("input", "combine", "classes", "members"), at)
        graph, shape = self.input(document["input"])
        graph.combine, graph.classes = document["combine"], document["classes"]
        for i, member in enumerate(_list(document, "members", MAX_MEMBERS, at)):
            graph.members.append(self.member(member, f"member {i}", shape, graph))
            check_members(graph)
        check_members(graph)
        lowest, version = lowest_version(graph), self.facts.version
        expect(lowest == version, f"format version {lowest}, the lowest that holds the ops", version, at)
        check_outputs(graph)
        check_results(graph, self.facts)
        return graph

    def input(self, document: Any) -> tuple[Graph, Shape]:
        """What the graph says of its input, as a graph without members, and the shape."""
        entry = _object(document, INPUT_AT)
        is_text = "dtype" in entry and self.facts.version >= 3
        text_keys = ("dtype", "vocabulary", "variable") if is_text else ()
        check_keys(entry, ("shape", *text_keys, "preprocess"), INPUT_AT)
        shape = tuple(integers(entry["shape"], 1, 3, 1, MAX_ELEMENTS, key_of("shape", INPUT_AT)))
        graph = Graph([], preprocess=entry["preprocess"])
        if is_text:
            dtype = _field(entry, "dtype", INPUT_AT)
            expect(dtype == "i32", "dtype i32 of token ids", quoted(dtype), INPUT_AT)
            expect(entry["vocabulary"] is not None, "an integer", "null", key_of("vocabulary", INPUT_AT))
            check_text(entry["vocabulary"], entry["variable"])
            graph.vocabulary, graph.variable = entry["vocabulary"], entry["variable"]
            self.facts.vocabulary = graph.vocabulary
        check_preprocess(graph.preprocess, shape)
        return graph, shape

    def member(self, document: Json, unnamed_at: str, input_shape: Shape, graph: Graph) -> Member:
        name = _name(document, unnamed_at)
        check_member_name(name, key_of("name", unnamed_at))
        has_preprocess = graph.preprocess is not None
        check = MemberCheck(name, input_shape, has_preprocess, graph.variable, self.facts)
        has_several = "outputs" in document and self.facts.version >= SEVERAL_OUTPUTS
        several = ("outputs",) if has_several else ()
        check_keys(document, ("name", "preprocess_table", "tensors", "nodes", *several), check.at)
        for i, entry in enumerate(_list(document, "tensors", MAX_NODES + 1, check.at)):
            check.tensor(_activation(entry, f"tensor {i} of {check.at}", check.at))
        check.input()
        table = document["preprocess_table"]
        if table is not None and has_preprocess:
            table = self.constant(document, "preprocess_table", check.at)
        check.preprocess_table(table)
        nodes = [
            self.node(entry, f"node {i} of {check.at}", check)
            for i, entry in enumerate(_list(document, "nodes", MAX_NODES, check.at))
        ]
        expect(not has_several or document["outputs"] is not None, "an array", "null", key_of("outputs", check.at))
        outputs = document["outputs"] if has_several else None
        check.end(outputs)
        return Member(name, check.tensors, nodes, table, outputs)

    def node(self, document: Json, unnamed_at: str, check: MemberCheck) -> Node:
        name = _name(document, unnamed_at)
        at = f"node {quoted(name)} of {check.at}"
        op = _field(document, "op", at)
        for key in ("inputs", "output"):
            expect(key in document, f"the key `{key}`", "none", at)
        node = Node(op, name, document["inputs"], document["output"])
        own = [key for key in document if key not in ("op", "name", "inputs", "output")]
        check.operands(node, own)
        for key in own:
            if key == "weight":
                node.constants[key], node.bits = self.weight(document[key], key_of(key, at))
            elif key in OPS[op].constants and not (document[key] is None and key in OPS[op].nullable):
                node.constants[key] = self.constant(document, key, at)
            elif key not in OPS[op].constants:
                node.attributes[key] = document[key]
        check.node(node)
        return node

    def weight(self, document: Json, at: str) -> tuple[np.ndarray, int]:
        """Codes and bits of what section 2 describes."""
        check_keys(_object(document, at), ("codes", "shape", "bits"), at)
        shape = integers(document["shape"], 1, 4, 1, MAX_ELEMENTS, key_of("shape", at))
        bits = integer(document["bits"], 2, 8, key_of("bits", at))
        count = math.prod(shape)
        expect(count < 2**48, "a weight that fits a file", f"shape {shape_text(shape)}", at)
        packed = self.constant(document, "codes", at)
        array(packed, np.uint8, (-(-count * bits // 8),), key_of("codes", at))
        key = (document["codes"], bits, tuple(shape))
        try:
            if key not in self.weights:
                self.weights[key] = unpack_codes(packed, bits, count).reshape(shape)
            return self.weights[key], bits
        except ModelError:
            raise ModelError(f"expected zeros after the last code, got others - at {key_of('codes', at)}") from None

    def constant(self, document: Json, key: str, at: str) -> np.ndarray:
        name = _field(document, key, at)
        expect(name in self.tensors, f"the tensor {quoted(name)}", "none of that name", key_of(key, at))
        return self.tensors[name]
