"""Writes and reads model files: docs/format.md sections 1 to 3, with numpy and the standard library alone."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from typing import Any

import numpy as np

from qdeploy.errors import ModelError
from qdeploy.files import atomic_file
from qdeploy.graph import Graph, Member, Node, Tensor
from qdeploy.ops import OPS
from qdeploy.validate import validate

RELEASES = {1: "0.1.0", 2: "0.1.0"}  # of each format version: the first qdeploy that reads it
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_DEPTH = 16
Json = dict[str, Any]
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}


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


def save(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Validate `graph` and write it as a model file: an older file at `path` stays until the whole new one is on disk.

    The file carries the lowest format version that holds its ops.
    Raises ModelError for an invalid graph, a path that is no regular file, or a write that failed (a full disk).
    """
    validate(graph)
    tensors: dict[str, np.ndarray] = {}
    members = [_member_json(index, member, tensors) for index, member in enumerate(graph.members)]
    preprocess = graph.preprocess and {key: [_number(v) for v in graph.preprocess[key]] for key in ("mean", "std")}
    document = {
        "input": {"shape": [int(d) for d in graph.input_shape], "preprocess": preprocess},
        "combine": graph.combine,
        "classes": graph.classes,
        "members": members,
    }
    ordered = sorted(tensors.items(), key=lambda item: item[1].dtype != np.float32)  # stable: F32 first
    header: dict[str, object] = {"__metadata__": _version_keys(lowest_version(graph)) | {"graph": _dump(document)}}
    begin = 0
    for name, array in ordered:
        dtype = "F32" if array.dtype == np.float32 else "U8"
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, begin + array.nbytes]}
        begin += array.nbytes
    text = _dump(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ModelError(f"expected at most {MAX_HEADER_BYTES} bytes of header, got {len(text)} - at {os.fspath(path)}")
    _write(path, [len(text).to_bytes(8, "little"), text, *(_bytes(array) for _, array in ordered)])


def lowest_version(graph: Graph) -> int:
    """The lowest format version that holds the ops of `graph`."""
    return max(OPS[node.op].version for member in graph.members for node in member.nodes)


def _version_keys(version: int) -> dict[str, str]:
    """What says in a file how to read it; `requires` tells readers that are too old what they need."""
    keys = {"format": "qdeploy", "format_version": str(version)}
    return keys if version == 1 else keys | {"requires": RELEASES[version]}


def load(path: str | os.PathLike[str]) -> Graph:
    """Read a model file. Raises ModelError, naming place and file, for whatever docs/format.md does not allow."""
    return parse(read(path), path)


def parse(content: bytes, path: str | os.PathLike[str]) -> Graph:
    """The graph in the content of a model file; `path` is for errors alone. Raises as `load`."""
    try:
        graph, version = _parse(content)
        validate(graph)
        _check_version(graph, version)
    except ModelError as error:
        raise ModelError(f"{error} in {os.fspath(path)}") from None
    return graph


def read(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file. Raises ModelError, naming it."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or device would block or never end
            raise ModelError(f"expected a regular file, got something else - at the path in {os.fspath(path)}")
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, ModelError):
            raise
        reason = getattr(error, "strerror", error)
        raise ModelError(f"expected a readable file, got: {reason} - at the path in {os.fspath(path)}") from None


def _dump(document: object) -> str:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _number(value: float) -> float:
    """The f32 nearest to `value`, as the double that prints with the digits needed to get it back."""
    return float(np.float32(value))


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array, _DTYPES["F32"] if array.dtype == np.float32 else np.uint8).data.cast("B")


def _member_json(index: int, member: Member, tensors: dict[str, np.ndarray]) -> Json:
    """The member as JSON; adds its constants to `tensors` under the names that the JSON uses."""

    def constant(name: str, array: np.ndarray) -> str:
        tensors[f"{index}/{name}"] = array
        return f"{index}/{name}"

    def node_json(node: Node) -> Json:
        result = {"op": node.op, "name": node.name, "inputs": [int(i) for i in node.inputs], "output": int(node.output)}
        for key, array in node.constants.items():
            if key == "weight" and node.bits is not None:
                codes = constant(f"{node.name}/codes", pack_codes(array, node.bits))
                result[key] = {"codes": codes, "shape": list(array.shape), "bits": int(node.bits)}
            else:
                result[key] = constant(f"{node.name}/{key}", array)
        types = OPS[node.op].attribute_types(node, member.tensors[node.output])
        return result | {key: _attribute_json(value, types[key]) for key, value in node.attributes.items()}

    table = member.preprocess_table
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
    }


def _attribute_json(value: Any, kind: type) -> Any:
    convert = _number if kind is float else int
    return convert(value) if np.ndim(value) == 0 else [convert(v) for v in value]


def _write(path: str | os.PathLike[str], parts: list[bytes | memoryview]) -> None:
    try:
        with atomic_file(path) as file:
            file.writelines(parts)
    except OSError as error:
        size = sum(len(part) for part in parts)
        reason = error.strerror or error
        raise ModelError(f"expected to write {size} bytes, got: {reason} - at {os.fspath(path)}") from error


def _expect(condition: bool, expected: str, got: object, at: str) -> None:
    if not condition:
        raise ModelError(f"expected {expected}, got {str(got)[:100]} - at {at}")


def _parse(data: bytes) -> tuple[Graph, int]:
    length = int.from_bytes(data[:8], "little")
    limit = min(len(data) - 8, MAX_HEADER_BYTES)
    good = 2 <= length <= limit and length % 8 == 0
    _expect(good, f"a qdeploy file: a header length of at most {limit}, a multiple of 8", length, "bytes 0..8")
    _expect(data[8:9] == b"{", "'{'", data[8:9], "byte 8")
    header = _json(data[8 : 8 + length], "the header")
    metadata = header.pop("__metadata__", None)
    kind = metadata.get("format") if isinstance(metadata, dict) else None
    _expect(kind == "qdeploy", "metadata with format 'qdeploy'", repr(kind), "__metadata__")
    _expect(all(isinstance(v, str) for v in metadata.values()), "strings", "other values", "__metadata__")
    version = _version(metadata)
    tensors = _container(header, memoryview(data)[8 + length :])
    document = _json(_field(metadata, "graph", str, "__metadata__").encode("utf-8", "surrogatepass"), "the graph")
    _expect(isinstance(document, dict), "an object", type(document).__name__, "the graph")
    return _graph(document, tensors), version


def _version(metadata: dict[str, str]) -> int:
    """The format version of a file, which must be one of ours. Of a newer one the error says which qdeploy it needs."""
    text = metadata.get("format_version", "none")
    expected, at = f"format_version 1 to {max(RELEASES)}", "__metadata__"
    _expect(re.fullmatch("[1-9][0-9]{0,8}", text) is not None, expected, f"`{text[:60]}`", at)
    version, needed = int(text), metadata.get("requires", "")
    if version > max(RELEASES):
        release = f"qdeploy {needed} or newer" if re.fullmatch("[0-9.]{1,20}", needed) else "a newer qdeploy"
        _expect(False, expected, f"{version}, which needs {release}", at)
    _expect(version == 1 or "requires" in metadata, "the key `requires` from format_version 2 on", "none", at)
    return version


def _check_version(graph: Graph, version: int) -> None:
    """A file carries the lowest version that holds its ops: docs/format.md section 1."""
    for member in graph.members:
        for node in member.nodes:
            needed = OPS[node.op].version
            at = f"node '{node.name}' of member '{member.name}'"
            _expect(needed <= version, f"format version {needed} for the op `{node.op}`", version, at)
    lowest = lowest_version(graph)
    _expect(lowest == version, f"format version {lowest}, the lowest that holds the ops", version, "the graph")


def _json(text: bytes, at: str) -> Any:
    def unique(pairs: list[tuple[str, object]]) -> Json:
        _expect(len(dict(pairs)) == len(pairs), "keys that differ", "one twice", at)
        return dict(pairs)

    def refuse(constant: str) -> None:
        _expect(False, "finite numbers", constant, at)

    def check(value: object, depth: int) -> None:
        if isinstance(value, float):
            _expect(math.isfinite(value), "finite numbers", value, at)
        elif isinstance(value, (dict, list)):
            _expect(depth <= MAX_JSON_DEPTH, f"JSON nested at most {MAX_JSON_DEPTH} deep", "deeper", at)
            for item in value.values() if isinstance(value, dict) else value:
                check(item, depth + 1)

    try:
        document = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"expected JSON in UTF-8, got: {str(error)[:100]} - at {at}") from None
    check(document, 1)
    return document


def _field(document: Json, key: str, kind: type, at: str) -> Any:
    value = document.get(key)
    good = isinstance(value, kind) and (kind is not int or not isinstance(value, bool))
    _expect(good, f"'{key}' to be of type {kind.__name__}", "none" if value is None else repr(value), at)
    return value


def _keys(document: Json, keys: tuple[str, ...], at: str) -> None:
    _expect(set(document) == set(keys), f"the keys {', '.join(keys)}", ", ".join(document), at)


def _objects(document: Json, key: str, at: str) -> list[Json]:
    values = _field(document, key, list, at)
    _expect(all(isinstance(value, dict) for value in values), f"objects in '{key}'", "something else", at)
    return values


def _shape(document: Json, at: str) -> tuple[int, ...]:
    values = _field(document, "shape", list, at)
    _expect(all(type(d) is int and d >= 0 for d in values), "a shape of integers", values, at)
    return tuple(values)


def _container(header: Json, data: memoryview) -> dict[str, np.ndarray]:
    """The arrays of the container, by name, as views of `data`."""
    tensors, spans = {}, []
    for name, entry in header.items():
        at = f"tensor '{name[:100]}'"
        _expect(isinstance(entry, dict), "an object", entry, at)
        kind = _field(entry, "dtype", str, at)
        _expect(kind in _DTYPES, f"dtype {' or '.join(_DTYPES)}", kind, at)
        dtype = _DTYPES[kind]
        shape = _shape(entry, at)
        offsets = _field(entry, "data_offsets", list, at)
        good = len(offsets) == 2 and all(type(o) is int for o in offsets)
        _expect(good and 0 <= offsets[0] <= offsets[1] <= len(data), f"offsets within {len(data)} bytes", offsets, at)
        begin, end = offsets
        _expect(math.prod(shape) * dtype.itemsize == end - begin, f"{end - begin} bytes of data", f"shape {shape}", at)
        _expect(begin % dtype.itemsize == 0, f"an offset that is a multiple of {dtype.itemsize}", begin, at)
        tensors[name] = np.frombuffer(data[begin:end], dtype).reshape(shape)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        _expect(begin == position, f"a tensor that begins at {position}", begin, "the data offsets")
        position = end
    _expect(position == len(data), f"tensors that cover {len(data)} bytes", position, "the data offsets")
    return tensors


def _graph(document: Json, tensors: dict[str, np.ndarray]) -> Graph:
    _keys(document, ("input", "combine", "classes", "members"), "the graph")
    members = [_member(member, tensors) for member in _objects(document, "members", "the graph")]
    entry = _field(document, "input", dict, "the graph")
    _keys(entry, ("shape", "preprocess"), "input")
    shape = _shape(entry, "input")
    for member in members:
        got = member.tensors[0].shape if member.tensors else None
        _expect(got == shape, f"input shape {shape}", got, f"member '{member.name}'")
    preprocess, classes = entry["preprocess"], document["classes"]
    if preprocess is not None:
        _keys(_field(entry, "preprocess", dict, "input"), ("mean", "std"), "preprocess")
    _expect(classes is None or isinstance(classes, list), "classes null or a list", classes, "the graph")
    return Graph(members, document["combine"], preprocess, classes)


def _member(document: Json, tensors: dict[str, np.ndarray]) -> Member:
    name = _field(document, "name", str, "a member")
    at = f"member '{name[:100]}'"
    _keys(document, ("name", "preprocess_table", "tensors", "nodes"), at)
    activations = [_activation(entry, at) for entry in _objects(document, "tensors", at)]
    table = document["preprocess_table"]
    if table is not None:
        table = _constant(document, "preprocess_table", tensors, at)
    return Member(name, activations, [_node(entry, tensors, at) for entry in _objects(document, "nodes", at)], table)


def _activation(document: Json, at: str) -> Tensor:
    _keys(document, ("name", "dtype", "shape", "scale", "zero_point"), f"a tensor of {at}")
    name, dtype = (_field(document, key, str, at) for key in ("name", "dtype"))
    return Tensor(name, _shape(document, at), dtype, document["scale"], document["zero_point"])


def _node(document: Json, tensors: dict[str, np.ndarray], at: str) -> Node:
    entry = dict(document)
    name = _field(entry, "name", str, f"a node of {at}")
    at = f"node '{name[:100]}' of {at}"
    op = _field(entry, "op", str, at)
    node = Node(op, name, _field(entry, "inputs", list, at), _field(entry, "output", int, at))
    for key in OPS[op].constants if op in OPS else ():  # `validate` refuses other ops
        if key != "weight":
            node.constants[key] = _constant(entry, key, tensors, at)
            del entry[key]
            continue
        weight = _field(entry, "weight", dict, at)
        _keys(weight, ("codes", "shape", "bits"), at)
        node.bits, shape = _field(weight, "bits", int, at), _shape(weight, at)
        _expect(2 <= node.bits <= 8, "bits in 2..8", node.bits, at)
        packed = _constant(weight, "codes", tensors, at)
        _expect((packed.dtype, packed.ndim) == (np.uint8, 1), "codes of dtype U8 and rank 1", packed.dtype, at)
        try:
            node.constants["weight"] = unpack_codes(packed, node.bits, math.prod(shape)).reshape(shape)
        except ModelError as error:
            raise ModelError(f"{error} - at {at}") from None
        del entry["weight"]
    node.attributes = {k: v for k, v in entry.items() if k not in ("op", "name", "inputs", "output")}
    return node


def _constant(document: Json, key: str, tensors: dict[str, np.ndarray], at: str) -> np.ndarray:
    name = _field(document, key, str, at)
    _expect(name in tensors, f"'{key}' to name a tensor of the file", name, at)
    return tensors[name]
