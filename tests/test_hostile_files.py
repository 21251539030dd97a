"""Damaged and hostile files: the engine and qdeploy.format give a ModelError or a model that runs, and agree which.

The mutations run in child processes, so that a crash or a hang is a failed test: the file of the moment is on disk, and
the report says where. `python tests/test_hostile_files.py json 7 100000 model.safetensors` mutates a copy of yours.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from builder import arrays, batch, small_detector, small_ensemble, small_network, small_text, small_vision, text_batch

import qdeploy
from qdeploy import _engine, reference
from qdeploy.errors import ModelError
from qdeploy.format import load, save

RUNNABLE_ELEMENTS = 100_000  # mutated shapes can be valid and huge; larger models are loaded but not run
NUMBERS = [0, -1, 1, 2, 3, 7, 8, 9, 255, 256, 65_535, 65_536, 2**24, 2**28, 2**31 - 1, 2**31, 2**32, 2**53, 2**62]
NUMBERS += [2**63 - 1, 2**63, 2**64, 2**64 - 1, -(2**31), -(2**63), 10**30, 10**400]
NUMBERS += [0.0, -0.0, 0.5, 1.0, 2.0, 1e-45, 1e-320, 3.5e38, -1e39, 1e100, 1e308, math.nan, math.inf, -math.inf]
VALUES = [
    *NUMBERS,
    "",
    "x",
    "U8",
    "f32",
    "\x00",
    "\ud800",
    "é" * 300,
    None,
    True,
    False,
    [],
    {},
    [1],
    [[]],
    [1, 1, 1, 1],
]
DEEP = "@deep@"  # stands for many brackets, which json.dumps cannot write


GRAPHS = {
    "network": small_network,
    "ensemble": small_ensemble,
    "vision": small_vision,
    "text": small_text,
    "detector": small_detector,
}


# ---- What runs in the child ------------------------------------------------------------------------------------------


def check_file(path: Path, isa: str, must_fail: bool = False) -> bool:
    """Load with both readers; where both accept the file, the results must be the same. Returns whether they did."""
    try:
        graph = load(path)
    except ModelError as error:
        check_message(str(error))
        graph = None
    try:
        model = qdeploy.load_int_model(path, 1, isa)
    except ModelError as error:
        check_message(str(error))
        model = None
    if (graph is None) != (model is None):
        raise AssertionError(f"accepted by {'the engine' if model else 'qdeploy.format'} only")
    if must_fail and model is not None:
        raise AssertionError("accepted")
    if graph is None:
        return False
    tensors = [tensor for member in graph.members for tensor in member.tensors]
    depths = [node.constants["weight"][0].size for member in graph.members for node in member.nodes if node.bits]
    if sum(math.prod(tensor.shape) for tensor in tensors) * max([1, *depths]) <= RUNNABLE_ELEMENTS:
        rng = np.random.default_rng(0)
        if graph.vocabulary is None:
            x = batch(graph, 1, rng)
            got, expected = model(x), reference.run(graph, x)
        else:
            ids, mask = text_batch(graph, 2, rng)
            got, expected = model(ids, mask), reference.run(graph, ids, mask=mask)
        if [y.tobytes() for y in arrays(got)] != [y.tobytes() for y in arrays(expected)]:
            raise AssertionError("other results than the reference")
    return True


def check_message(message: str) -> None:
    if "\n" in message or not message.startswith("expected ") or ", got" not in message or " - at " not in message:
        raise AssertionError(f"not one line of the form 'expected X, got Y - at Z': {message!r}")


def truncations(path: Path) -> int:
    for size in reversed(sizes_to_truncate(path.read_bytes())):  # in place: each is the beginning of the one before
        os.truncate(path, size)
        check_file(path, _engine.isas()[-1], must_fail=True)
    return 0


def sizes_to_truncate(content: bytes) -> list[int]:
    """All in the header, and of the data, which readers do not look into, those around the ends of tensors."""
    begin = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:begin])
    ends = {begin + offset for key in entries if key != "__metadata__" for offset in entries[key]["data_offsets"]}
    near = {end + more for end in ends for more in (-1, 0, 1)}
    return [*range(begin), *sorted(size for size in near if begin <= size < len(content))]


def rewrite(path: Path, content: bytes) -> None:
    """As a new file: ext4 writes out to the disk what was truncated and written again, 3 ms a time."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def mutations(path: Path, mutate, seed: int, count: int) -> int:
    """Returns how many of the `count` mutated files were still models."""
    original = path.read_bytes()
    return sum(
        check_mutation(path, original, mutate, random.Random(f"{seed} {i}"), f"{seed} {i}") for i in range(count)
    )


def check_mutation(path: Path, original: bytes, mutate, rng: random.Random, name: str) -> bool:
    rewrite(path, mutate(original, rng))
    try:
        return check_file(path, os.environ.get("QDEPLOY_ISA") or rng.choice(_engine.isas()))
    except Exception as error:
        raise AssertionError(f"mutation {name}: {error}") from error


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few flips, overwrites, insertions, deletions and copies, half of them in the first kilobyte."""
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        size = len(result)
        at = rng.randrange(min(size, rng.choice([16, 1024, size])))
        length = rng.choice([1, 1, 2, 4, 8, 100])
        kind = rng.randrange(6)
        if kind == 0:
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[at] = rng.choice(b'\x00\xff\x7f\x80 0123456789-+.eE[]{}",:\\')
        elif kind == 2:
            result[at:at] = rng.randbytes(length)
        elif kind == 3:
            del result[at : at + length]
        elif kind == 4:
            other = rng.randrange(size)
            result[at : at + length] = result[other : other + length]
        else:
            result[at : at + length] = rng.randbytes(length)
        if len(result) < 16:
            break
    return bytes(result)


class Twin(str):
    """A key that a dict can hold beside its equal."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Changes in the header's or the graph's tree; the file around it stays well formed."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    graph = json.loads(header["__metadata__"]["graph"])
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        change(rng.choice([graph, graph, graph, header]), rng)
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and "graph" in metadata:
        metadata["graph"] = dump(graph, rng)
    text = dump(header, rng).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def dump(document: object, rng: random.Random) -> str:
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=rng.random() < 0.5)
    depth = rng.choice([3, 15, 16, 17, 500, 100_000])
    return text.replace(f'"{DEEP}"', "[" * depth + "]" * depth).replace(f'\\"{DEEP}\\"', "[" * depth + "]" * depth)


def change(tree: dict | list, rng: random.Random) -> None:
    places = list(containers(tree))
    at = rng.choice(places)
    keys = list(at) if isinstance(at, dict) else list(range(len(at)))
    if not keys:
        return
    key = rng.choice(keys)
    kind = rng.randrange(8)
    if kind <= 2:
        at[key] = rng.choice(VALUES)
    elif kind == 3:
        del at[key]
    elif kind == 4 and isinstance(at, dict):
        at[Twin(key)] = rng.choice([at[key], *VALUES])
    elif kind == 4:
        at.insert(rng.randrange(len(at) + 1), at[key])
    elif kind == 5:
        other = rng.choice(places)
        at[key] = json.loads(json.dumps(rng.choice(list(other.values()) if isinstance(other, dict) else other or [0])))
    elif kind == 6 and isinstance(at[key], int):
        at[key] += rng.choice([-1, 1, 2, 4, -4, 8])
    elif kind == 7:
        at[rng.choice([key, "extra"]) if isinstance(at, dict) else key] = rng.choice([DEEP, at[key]])


def containers(tree: object):
    """Every object and array in the tree that has entries, the tree itself first."""
    if isinstance(tree, (dict, list)) and tree:
        yield tree
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from containers(value)


KINDS = {"bytes": mutate_bytes, "json": mutate_json}


def main(kind: str, seed: str, count: str, path: str) -> None:
    faulthandler.enable()
    file = Path(path)
    models = truncations(file) if kind == "truncate" else mutations(file, KINDS[kind], int(seed), int(count))
    print(models)


# ---- What pytest runs ------------------------------------------------------------------------------------------------


def run_child(path: Path, kind: str, seed: int = 0, count: int = 0) -> int:
    command = [sys.executable, __file__, kind, str(seed), str(count), str(path)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        pytest.fail(f"no end within 240 s: see {path}")
    if result.returncode:
        pytest.fail(f"exit code {result.returncode} on the file left at {path}:\n{result.stderr[-3000:]}")
    return int(result.stdout)


def container(header: bytes, data: bytes = b"") -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def edited(change_header=None, change_graph=None):
    """A function of a file's bytes that changes its header or its graph, both dicts, in place."""

    def edit(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        graph = json.loads(header["__metadata__"]["graph"])
        if change_graph:
            change_graph(graph)
            header["__metadata__"]["graph"] = json.dumps(graph)
        if change_header:
            change_header(header)
        return container(json.dumps(header).encode(), data[8 + size :])

    return edit


def replaced(old: bytes, new: bytes):
    """A function of a file's bytes that puts `new`, of the same length, in the place of the first `old`."""
    assert len(old) == len(new)
    return lambda data: data.replace(old, new, 1)


def behind_header(data: bytes, text: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    return container(data[8 : 8 + size].rstrip() + text, data[8 + size :])


def graph_and(header: dict, text: str) -> None:
    header["__metadata__"]["graph"] += text


def before_graph(header: dict, text: str) -> None:
    header["__metadata__"]["graph"] = text + header["__metadata__"]["graph"]


def set_offsets(begin: int, end: int):
    return edited(lambda header: header["0/linear.0/bias"].update(data_offsets=[begin, end]))


def set_tensor(**changes):
    return edited(change_graph=lambda graph: graph["members"][0]["tensors"][1].update(changes))


def set_node(**changes):
    return edited(change_graph=lambda graph: graph["members"][0]["nodes"][0].update(changes))


def same_twice(graph: dict) -> None:
    graph["members"][1] = graph["members"][0]


FOREIGN = {"w": np.ones(3, np.float32)}
BAD_FILES = {  # name: function of the bytes of a good file, what both messages contain
    "empty": (lambda data: b"", "got 0"),
    "seven bytes": (lambda data: data[:7], "expected"),
    "a text": (lambda data: b"Accuracy of every model, by domain\n" * 9, "expected"),
    "a header beyond the file": (lambda data: len(data).to_bytes(8, "little") + data[8:], "expected"),
    "a header of 2^64 - 1 bytes": (lambda data: b"\xff" * 8 + data[8:], "expected"),
    "a header that is a list": (lambda data: container(b"[]"), "expected"),
    "a header of garbage": (lambda data: container(b"{garbage}"), "JSON"),
    "a header that is not UTF-8": (lambda data: container(b'{"\xff": 1}'), "JSON"),
    "a deep header": (lambda data: container(b'{"a":' + b"[" * 2**20), "expected"),
    "a foreign safetensors file": (lambda data: safetensors.numpy.save(FOREIGN), "expected"),
    "a file of another tool": (lambda data: safetensors.numpy.save(FOREIGN, {"format": "pt"}), "expected"),
    "a newer version": (edited(lambda header: header["__metadata__"].update(format_version="5")), "newer"),
    "version 1.0": (edited(lambda header: header["__metadata__"].update(format_version="1.0")), "format_version"),
    "a note that is a number": (edited(lambda header: header["__metadata__"].update(note=7)), "__metadata__"),
    "a version that is a number": (edited(lambda header: header["__metadata__"].update(format_version=1)), "expected"),
    "no graph": (edited(lambda header: header["__metadata__"].pop("graph")), "graph"),
    "another dtype": (edited(lambda header: header["0/linear.0/bias"].update(dtype="F16")), "F16"),
    "a byte 0 behind the header": (lambda data: behind_header(data, b"\0garbage"), "JSON"),
    "a byte 0 behind the graph": (edited(lambda header: graph_and(header, "\0garbage")), "JSON"),
    "a byte order mark before the graph": (edited(lambda header: before_graph(header, "\ufeff")), "JSON"),
    "half a surrogate pair in a note": (edited(lambda header: header["__metadata__"].update(note="\ud800")), "JSON"),
    "a tensor of no elements beyond the machine": (
        edited(lambda header: header.update(x={"dtype": "U8", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]})),
        "a tensor that fits a file",
    ),
    "a negative offset": (set_offsets(-16, 0), "0/linear.0/bias"),
    "an offset beyond 2^63": (set_offsets(2**64 - 16, 2**64), "0/linear.0/bias"),
    "an offset beyond the file": (set_offsets(2**40, 2**40 + 16), "0/linear.0/bias"),
    "overlapping tensors": (set_offsets(0, 16), "expected"),
    "a byte too many": (lambda data: data + b"\0", "expected"),
    "NaN": (replaced(b'\\"zero_point\\":100', b'\\"zero_point\\":NaN'), "expected"),
    "a key twice": (replaced(b'\\"dtype\\":', b'\\"shape\\":'), "expected"),
    "one member": (edited(change_graph=lambda graph: graph.update(members=graph["members"][:1])), "combine"),
    "no members": (edited(change_graph=lambda graph: graph.update(members=[])), "member"),
    "257 members": (edited(change_graph=lambda graph: graph.update(members=graph["members"][:1] * 257)), "256"),
    "a member twice": (edited(change_graph=same_twice), "unique"),
    "an op of tomorrow": (set_node(op="softmax"), "softmax"),
    "a key of tomorrow": (set_node(sparsity=0.5), "sparsity"),
    "an input of itself": (set_node(inputs=[1]), "earlier node"),
    "an input without end": (set_node(inputs=[2**31]), "inputs"),
    "the output on the input": (set_node(output=0), "output"),
    "a missing constant": (set_node(bias="0/none"), "0/none"),
    "a constant of another shape": (set_node(bias="1/table.1/table"), "expected"),
    "9 bits": (set_node(weight={"codes": "0/linear.0/codes", "shape": [4, 5], "bits": 9}), "bits"),
    "a weight of 2^60 elements": (
        set_node(weight={"codes": "0/linear.0/codes", "shape": [2**30, 2**30], "bits": 2}),
        "expected",
    ),
    "scale 0": (set_tensor(scale=0), "scale"),
    "a subnormal scale": (set_tensor(scale=2.0**-127), "scale"),
    "a scale above f32": (set_tensor(scale=1e39), "f32"),
    "zero point 256": (set_tensor(zero_point=256), "zero_point"),
    "zero point 7.0": (set_tensor(zero_point=7.0), "zero_point"),
    "a name with an escape sequence": (set_tensor(name="\x1b[2J"), "control characters"),
    "a huge tensor": (set_tensor(shape=[2**14, 2**14, 1]), "2"),
    "a shape that overflows": (set_tensor(shape=[2**27, 2**27, 2**27]), "expected"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    path = tmp_path / "m.safetensors"
    save(small_ensemble(), path)
    change, text = BAD_FILES[case]
    data = change(path.read_bytes())
    assert data != path.read_bytes()
    path.write_bytes(data)
    message = refusal(load, path)
    assert message == refusal(qdeploy.load_int_model, path)  # one wording on both sides
    check_message(message)
    assert text in message
    assert message.endswith(f" in {path}")
    assert "\x1b" not in message


def refusal(read, path: Path) -> str:
    with pytest.raises(ModelError) as error:
        read(path)
    return str(error.value)


NEWER = "expected format_version 1 to 4, got 5, which needs"
VERSIONS = {  # what a file of version 1 is made to say of itself: what both readers say, before the file's name
    ("5", "0.3.0"): f"{NEWER} qdeploy 0.3.0 or newer - at __metadata__",
    ("5", None): f"{NEWER} a newer qdeploy - at __metadata__",
    ("5", "\x1b[2J"): f"{NEWER} a newer qdeploy - at __metadata__",
    ("5", "1" * 21): f"{NEWER} a newer qdeploy - at __metadata__",
    ("2", "0.1.0"): "expected format version 1, the lowest that holds the ops, got 2 - at the graph",
    ("2", None): "expected the key `requires` from format_version 2 on, got none - at __metadata__",
    ("0", None): "expected format_version 1 to 4, got `0` - at __metadata__",
    ("01", None): "expected format_version 1 to 4, got `01` - at __metadata__",
    ("1.0", None): "expected format_version 1 to 4, got `1.0` - at __metadata__",
    ("9999999999", None): "expected format_version 1 to 4, got `9999999999` - at __metadata__",
}


@pytest.mark.parametrize(("version", "requires"), VERSIONS)
def test_versions_that_do_not_fit(tmp_path, version, requires):
    path = tmp_path / "m.safetensors"
    save(small_ensemble(), path)
    notes = {"format_version": version} | ({"requires": requires} if requires else {})
    path.write_bytes(edited(lambda header: header["__metadata__"].update(notes))(path.read_bytes()))
    message = f"{VERSIONS[version, requires]} in {path}"
    assert (refusal(load, path), refusal(qdeploy.load_int_model, path)) == (message, message)


def test_an_op_of_a_later_version(tmp_path):
    path = tmp_path / "m.safetensors"
    save(small_network(), path)
    path.write_bytes(edited(lambda header: header["__metadata__"].update(format_version="1"))(path.read_bytes()))
    expected = "expected format version 2 for the op `mul`, got 1 - at node `mul.5` of member `net` in "
    assert refusal(load, path) == refusal(qdeploy.load_int_model, path) == f"{expected}{path}"


def set_place(*keys: str | int, **changes):
    """A function of a file's bytes that changes the object that `keys` lead to in the first member."""

    def change(graph: dict) -> None:
        place = graph["members"][0]
        for key in keys:
            place = place[key]
        place.update(changes)

    return edited(change_graph=change)


PLACES = {  # name: function of the bytes of `small_network`, what the engine says before the file's name
    "a key": (
        set_place("nodes", 1, bias=7),
        "expected a string, got number - at key `bias` of node `conv2d.1` of member `net`",
    ),
    "a channel": (
        set_place("nodes", 1, residual_multiplier=1e30),
        "expected results below 2^30, got up to 2.55e+32 - at channel 0 of node `conv2d.1` of member `net`",
    ),
    "a node": (
        set_place("nodes", 4, multipliers=[1e9, 0]),
        "expected results below 2^30, got up to 2.55e+11 - at node `add.4` of member `net`",
    ),
    "a node without a name": (
        set_place("nodes", 4, name=None),
        "expected a string, got null - at key `name` of node 4 of member `net`",
    ),
    "a tensor": (
        set_place("tensors", 1, scale=0),
        "expected a scale in [2^-126, 2^126], got 0 - at tensor `t1` of member `net`",
    ),
    "a member": (set_place(extra=1), "expected no keys but the known ones, got `extra` - at member `net`"),
    "the graph": (
        edited(change_graph=lambda graph: graph.update(members=[])),
        "expected at least one member, got none - at the graph",
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_places_in_errors_of_the_engine(tmp_path, case):
    path = tmp_path / "m.safetensors"
    save(small_network(), path)
    change, message = PLACES[case]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ModelError) as error:
        qdeploy.load_int_model(path)
    assert str(error.value) == f"{message} in {path}"


def paths(tree: dict | list, start: tuple = ()):
    """Where every value of the tree stands."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*start, key)
        if isinstance(value, (dict, list)):
            yield from paths(value, (*start, key))


def changed(tree: dict, path: tuple, value: object) -> dict:
    """A copy of the tree with one value changed, or removed (DELETE)."""
    tree = json.loads(json.dumps(tree))
    at = tree
    for key in path[:-1]:
        at = at[key]
    if value is DELETE:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return tree


DELETE = object()
CHANGES = [DELETE, 0, 7, 2**28, 1e39, "x", None, [], {}, [1, 1]]


@pytest.mark.parametrize("name", GRAPHS)
def test_both_readers_say_the_same_of_every_single_change(tmp_path, name):
    """Every value of header and graph is removed or becomes each of CHANGES: the same words, or a model for both."""
    path = tmp_path / "m.safetensors"
    save(GRAPHS[name](), path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    graph = json.loads(header["__metadata__"].pop("graph"))
    files = [(graph, header) for graph in every_change(graph)] + [(graph, header) for header in every_change(header)]
    refused = 0
    for graph, header in files:
        if isinstance(header.get("__metadata__"), dict):
            header["__metadata__"]["graph"] = json.dumps(graph)
        rewrite(path, container(json.dumps(header).encode(), data[8 + size :]))
        said = [verdict(read, path) for read in (load, qdeploy.load_int_model)]
        assert said[0] == said[1]
        refused += said[0] != "a model"
    assert refused > len(files) / 2


def every_change(tree: dict):
    return (changed(tree, path, value) for path in different_paths(tree, set()) for value in CHANGES)


def different_paths(tree: dict | list, seen: set, start: tuple = ()):
    """As `paths`, but of nodes of one op, and of tensors of one dtype and rank, only the first."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*start, key)
        if isinstance(value, dict) and ("op" in value or "dtype" in value and start != ("input",)):
            kind = (tuple(value), value.get("op"), value.get("dtype"), len(value.get("shape", ())), len(start))
            if kind in seen:
                continue
            seen.add(kind)
        if isinstance(value, (dict, list)):
            yield from different_paths(value, seen, (*start, key))


def verdict(read, path: Path) -> str:
    try:
        read(path)
    except ModelError as error:
        return str(error)
    return "a model"


@pytest.mark.parametrize("read", [load, qdeploy.load_int_model])
def test_what_is_no_file(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")  # opening it for reading would wait for a writer
    for name, text in [
        ("none", "No such file or directory"),
        ("", "expected"),
        ("pipe", "expected"),
        ("a\0b", "expected"),
    ]:
        with pytest.raises(ModelError, match=text) as error:
            read(tmp_path / name if name else tmp_path)
        check_message(str(error.value))


@pytest.mark.parametrize("name", GRAPHS)
def test_the_files_themselves_are_fine(tmp_path, name):
    save(GRAPHS[name](), tmp_path / "m.safetensors")
    for isa in _engine.isas():
        assert check_file(tmp_path / "m.safetensors", isa)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_truncation(tmp_path, name):
    save(GRAPHS[name](), tmp_path / "m.safetensors")
    run_child(tmp_path / "m.safetensors", "truncate")


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(("kind", "count"), [("bytes", 600), ("json", 900)])  # the fuzzer knows more of them
def test_random_mutations(tmp_path, name, kind, count):
    save(GRAPHS[name](), tmp_path / "m.safetensors")
    models = run_child(tmp_path / "m.safetensors", kind, 1, count)
    assert 0 < models < count  # some changes do no harm, and that is tested too


if __name__ == "__main__":
    main(*sys.argv[1:])
