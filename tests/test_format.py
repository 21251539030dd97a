"""The file: bits, container, graph, atomic writing, and what save and load refuse."""

from __future__ import annotations

import json
import os
import resource
from dataclasses import fields

import numpy as np
import pytest
import safetensors.numpy
from builder import Builder
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import ensembles, generators, graphs

import qdeploy
from qdeploy import reference
from qdeploy.errors import ModelError
from qdeploy.format import load, pack_codes, save, unpack_codes
from qdeploy.graph import Activation, Graph, Node


def small_graph() -> Graph:
    builder = Builder(np.random.default_rng(1), (3, 6, 5), (0.25, 7))
    residual = builder.conv2d(0, 4, (3, 3), padding=(1, 1, 1, 1))
    x = builder.conv2d(0, 4, (3, 3), padding=(1, 1, 1, 1), bits=7, residual=residual)
    x = builder.avg_pool2d(x, (6, 5), (1, 1), (0, 0, 0, 0), per_count=False)
    builder.linear(builder.reshape(x, (4,)), 2, bits=3, dtype="f32")
    return Graph([builder.member()], classes=["cat", "dog"])


def assert_equal(a: object, b: object) -> None:
    """Deep equality of graphs; lists and tuples are the same, numbers equal as f32."""
    if isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    elif hasattr(a, "__dataclass_fields__"):
        for field in fields(a):
            assert_equal(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, float):
        assert np.float32(a) == np.float32(b)
    else:
        assert a == b


def header_of(path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (2, [1, -2, 0, -1], "c9"),  # 01 10 00 11 from the least significant end
        (3, [1, -1, -4], "39 01"),  # the example of docs/format.md
        (4, [7, -8, -1], "87 0f"),
        (5, [15, -16, -1], "0f 7e"),
        (6, [31, -32, 1, -1], "1f 18 fc"),
        (7, [63, -64, 1], "3f 60 00"),
        (8, [127, -128, -1], "7f 80 ff"),
    ],
)
def test_bit_layout(bits, codes, expected):
    packed = pack_codes(np.array(codes, np.int8), bits)
    assert packed.tobytes() == bytes.fromhex(expected)
    assert unpack_codes(packed, bits, len(codes)).tolist() == codes


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 8), st.integers(0, 200), generators())
def test_packing_round_trip(bits, count, rng):
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), count).astype(np.int8)
    packed = pack_codes(codes, bits)
    stream = sum((int(code) & (2**bits - 1)) << (i * bits) for i, code in enumerate(codes))  # one long integer
    assert packed.tobytes() == stream.to_bytes((count * bits + 7) // 8, "little")
    assert np.array_equal(unpack_codes(packed, bits, count), codes)


def test_unpack_refuses_a_wrong_size_and_stray_bits():
    with pytest.raises(ModelError, match="expected 2 bytes for 3 codes of 5 bits, got 3"):
        unpack_codes(np.zeros(3, np.uint8), 5, 3)
    with pytest.raises(ModelError, match="expected zeros in the 1 unused bits of the last byte, got 0x80"):
        unpack_codes(np.array([0, 0x80], np.uint8), 5, 3)


@settings(max_examples=50, deadline=None)
@given(st.one_of(graphs(), ensembles()))
def test_graph_round_trip(tmp_path_factory, graph):
    path = tmp_path_factory.mktemp("format") / "m.safetensors"
    save(graph, path)
    assert_equal(load(path), graph)


def test_safetensors_package_reads_the_file_and_its_copy_is_a_model(tmp_path):
    path, copied = tmp_path / "m.safetensors", tmp_path / "copy.safetensors"
    graph = small_graph()
    save(graph, path)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "qdeploy"
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        safetensors.numpy.save_file(tensors, copied, file.metadata())
    assert np.array_equal(tensors["0/linear.4/bias"], graph.members[0].nodes[4].constants["bias"])
    assert np.array_equal(unpack_codes(tensors["0/linear.4/codes"], 3, 8), pack_source(graph, 4))
    size = sum(tensor.nbytes for tensor in tensors.values())
    data = path.read_bytes()
    assert len(data) == 8 + int.from_bytes(data[:8], "little") + size
    assert int.from_bytes(data[:8], "little") % 8 == 0
    assert_equal(load(copied), graph)


def pack_source(graph: Graph, node: int) -> np.ndarray:
    return graph.members[0].nodes[node].constants["weight"].reshape(-1)


def test_container_as_documented(tmp_path):
    path = tmp_path / "m.safetensors"
    save(small_graph(), path)
    header = header_of(path)
    metadata = header.pop("__metadata__")
    assert metadata["format_version"] == "1"
    assert list(header)[:2] == ["0/conv2d.0/multiplier", "0/conv2d.0/bias"]
    dtypes = [entry["dtype"] for entry in header.values()]
    assert dtypes == sorted(dtypes)  # F32 before U8
    assert header["0/conv2d.1/codes"]["shape"] == [-(-4 * 27 * 7 // 8)]
    document = json.loads(metadata["graph"])
    assert document["classes"] == ["cat", "dog"]
    assert document["members"][0]["nodes"][1]["weight"] == {
        "codes": "0/conv2d.1/codes",
        "shape": [4, 3, 3, 3],
        "bits": 7,
    }


def test_scale_survives_to_the_last_bit(tmp_path):
    path = tmp_path / "m.safetensors"
    graph = small_graph()
    for i, scale in enumerate([0.1, 1 / 3, 2.0**-126, 2.0**126, 1e-30]):
        graph.members[0].tensors[0].scale = float(np.float32(scale)) if i % 2 else scale
        save(graph, path)
        assert load(path).members[0].tensors[0].scale == float(np.float32(scale))


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save(small_graph(), path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # a write beyond it fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ModelError, match=r"expected to write \d+ bytes, got: File too large - at .*m.safetensors"):
            save(small_graph(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(small_graph(), tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []


def test_save_follows_a_link_and_keeps_permissions_ordinary(tmp_path):
    target, link = tmp_path / "m.safetensors", tmp_path / "link"
    link.symlink_to(target)
    save(small_graph(), link)
    mask = os.umask(0o022)
    os.umask(mask)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask


def test_save_to_something_else_than_a_file(tmp_path):
    with pytest.raises(ModelError, match="not a regular file - at"):
        save(small_graph(), tmp_path)
    with pytest.raises(ModelError, match="got: No such file or directory - at"):
        save(small_graph(), tmp_path / "none" / "m.safetensors")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="not a regular file - at"):
        save(small_graph(), tmp_path / "pipe")


def put(graph: Graph, path: str, value: object) -> None:
    """Set what `path` names: "graph.x", or a place in the first member such as "nodes.0.attributes.clamp"."""
    *parents, last = path.split(".")
    at = graph if parents == ["graph"] else graph.members[0]
    for key in parents:
        if key != "graph":
            at = at[int(key)] if isinstance(at, list) else getattr(at, key)
    if isinstance(at, dict):
        at[last] = value
    else:
        setattr(at, last, value)


F32 = np.float32
NAME = "a name of 1 to 512 bytes without control characters"
KNOWN = "no keys but the known ones"
SIZE = "an integer in [1, 65535]"
MEAN_STD = {"mean": [0] * 3, "std": [1] * 3}
BAD_GRAPHS = [
    ("graph.members", [], "at least one member, got none - at the graph"),
    ("graph.combine", "logits", "combine null for one member, got string - at the graph"),
    ("graph.classes", ["cat"], "2 class names, got 1 - at the graph"),
    ("graph.classes", ["cat", "\x1b[31m"], f"{NAME}, got `?[31m` - at key `classes` of the graph"),
    ("graph.preprocess", MEAN_STD, "U8 [3, 256], got null - at key `preprocess_table` of member `net`"),
    ("tensors.1.scale", 0.0, "a scale in [2^-126, 2^126], got 0 - at tensor `t1` of member `net`"),
    ("tensors.1.scale", float("nan"), "a finite f32, got nan - at key `scale` of tensor `t1` of"),
    ("tensors.1.scale", 1e39, "a finite f32, got 1e+39 - at key `scale` of tensor `t1` of"),
    (
        "tensors.1.zero_point",
        256,
        "an integer in [0, 255], got 256 - at key `zero_point` of tensor `t1` of",
    ),
    ("tensors.1.shape", (4, 6), "an output of shape [4, 6, 5], got [4, 6] - at node `conv2d.0` of member `net`"),
    (
        "tensors.1.shape",
        (2**14, 2**7, 2**7),
        "fewer than 2^28 elements, got [16384, 128, 128] - at tensor `t1` of",
    ),
    ("tensors.1.shape", (4, 6, 6), "an output of shape [4, 6, 5], got [4, 6, 6] - at node `conv2d.0` of member `net`"),
    ("tensors.4.zero_point", 200, "the output's scale and zero point on every input, got others on tensor 3 - at node"),
    ("nodes.0.op", "softmax", "an op that this engine has, got `softmax` - at node `conv2d.0` of member `net`"),
    ("nodes.0.name", "", f"{NAME}, got `` - at key `name` of node 0 of member `net`"),
    ("nodes.0.name", "conv2d.1", "unique names, got `conv2d.1` twice - at the nodes of member `net`"),
    ("nodes.0.inputs", [1], "inputs written by an earlier node, got tensor 1 - at node `conv2d.0` of member `net`"),
    ("nodes.0.inputs", [6], "an integer in [0, 5], got 6 - at key `inputs` of node `conv2d.0` of member `net`"),
    ("nodes.0.inputs", [], "at least 1 entries, got 0 - at key `inputs` of node `conv2d.0` of member `net`"),
    ("nodes.1.output", 1, "an output that nothing wrote before, got tensor 1 - at node `conv2d.1` of member `net`"),
    ("nodes.1.inputs", [0], f"{KNOWN}, got `residual_multiplier` - at node `conv2d.1` of member `net`"),
    (
        "nodes.0.bits",
        9,
        "an integer in [2, 8], got 9 - at key `bits` of key `weight` of node `conv2d.0` of",
    ),
    ("nodes.0.bits", 7, "codes of 7 bits, got codes from -123 to 123 - at node `conv2d.0` of member `net`"),
    ("nodes.3.bits", 7, "no bits of reshape, got 7 - at node `reshape.3` of member `net`"),
    ("nodes.0.attributes.clamp", (5, 4), "clamp [lo, hi] with lo <= hi, got [5, 4] - at node `conv2d.0` of member"),
    ("nodes.0.attributes", {}, "the key `clamp`, got none - at node `conv2d.0` of member `net`"),
    ("nodes.4.attributes.clamp", (0, 255), f"{KNOWN}, got `clamp` - at node `linear.4` of member `net`"),
    ("nodes.0.attributes.stride", (0, 1), f"{SIZE}, got 0 - at key `stride` of node `conv2d.0` of member `net`"),
    ("nodes.0.attributes.stride", (True, 1), f"{SIZE}, got boolean - at key `stride` of node `conv2d.0` of member"),
    ("nodes.0.attributes.padding", (1, 1), "at least 4 entries, got 2 - at key `padding` of node `conv2d.0` of member"),
    ("nodes.0.attributes.dilation", (5, 1), "a window that fits the padded input, got 11 over 8 - at node `conv2d.0`"),
    ("nodes.0.attributes.groups", 2, "groups that divide the channels, got 2 - at node `conv2d.0` of member `net`"),
    ("nodes.0.attributes.color", 2, f"{KNOWN}, got `color` - at node `conv2d.0` of member `net`"),
    ("nodes.1.attributes.residual_multiplier", float("inf"), "a finite f32, got inf - at key `residual_multiplier` of"),
    ("nodes.1.attributes.residual_multiplier", 2.0**23, "results below 2^30, got up to 2.14e+09 - at channel 0 of"),
    (
        "nodes.2.attributes.padding",
        (6, 0, 0, 0),
        "an output of shape [4, 7, 1], got [4, 1, 1] - at node `avg_pool2d.2` of",
    ),
    ("nodes.0.constants.multiplier", np.full(4, 2.0**20, F32), "results below 2^30, got up to "),
    (
        "nodes.0.constants.multiplier",
        np.full(4, np.nan, F32),
        "finite constants, got nan - at key `multiplier` of",
    ),
    ("nodes.0.constants.multiplier", np.ones(3, F32), "F32 [4], got F32 [3] - at key `multiplier` of node `conv2d.0`"),
    ("nodes.0.constants.multiplier", np.ones(4), "F32 [4], got float64 [4] - at key `multiplier` of node `conv2d.0`"),
    ("nodes.0.constants.scale", np.ones(4, F32), f"{KNOWN}, got `scale` - at node `conv2d.0` of member `net`"),
    (
        "nodes.0.constants.weight",
        np.zeros((0, 3, 3, 3), np.int8),
        "a weight of shape [O, C/groups, KH, KW], got [0,",
    ),
    ("nodes.2.constants.multiplier", np.ones(2, F32), "1 or 30 multipliers, got 2 - at node `avg_pool2d.2` of member"),
    (
        "nodes.4.constants.weight",
        np.zeros((2, 5), np.int8),
        "a weight of shape [2, 4], got [2, 5] - at key `weight`",
    ),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_GRAPHS)
def test_save_refuses_an_invalid_graph(tmp_path, path, value, message):
    graph = small_graph()
    put(graph, path, value)
    with pytest.raises(ModelError) as error:
        save(graph, tmp_path / "m.safetensors")
    assert str(error.value).startswith(f"expected {message}")
    assert os.listdir(tmp_path) == []


def test_save_refuses_a_graph_whose_parts_do_not_match(tmp_path):
    path = tmp_path / "m.safetensors"
    graph = small_graph()
    graph.members[0].tensors.append(Activation("unwritten", (2,)))
    with pytest.raises(ModelError, match="expected one tensor more than nodes, got 7 - at member `net`"):
        save(graph, path)
    twice = Graph([*small_graph().members, *small_graph().members], "logits")
    with pytest.raises(ModelError, match="expected unique names, got `net` twice - at the members of the graph"):
        save(twice, path)
    graph = small_graph()
    graph.members[0].tensors[1] = Activation("t1", (4, 6, 5), "f32")
    with pytest.raises(
        ModelError, match="expected no keys but the known ones, got `clamp` - at node `conv2d.0` of member"
    ):
        save(graph, path)


def test_a_dilated_window_may_not_miss_the_image(tmp_path):
    builder = Builder(np.random.default_rng(0), (1, 1, 1), (1.0, 0))
    builder.max_pool2d(0, (2, 2), (1, 1), (1, 1, 1, 1), (2, 2))  # the window of the corner sees rows -1 and 1
    with pytest.raises(ModelError, match="expected a real element in every window of the pool, got padding 1 and 1"):
        save(Graph([builder.member()]), tmp_path / "m.safetensors")


def test_a_window_that_does_not_exist_needs_no_real_element(tmp_path):
    builder = Builder(np.random.default_rng(0), (1, 1, 1), (1.0, 0))
    builder.max_pool2d(0, (3, 1), (1, 1), (2, 0, 2, 0), (2, 1))  # one window, of rows -2, 0 and 2; none begins at -1
    graph, path = Graph([builder.member()]), tmp_path / "m.safetensors"
    save(graph, path)
    x = np.full((1, 1, 1, 1), 7, np.float32)
    assert qdeploy.load_int_model(path)(x).tolist() == reference.run(load(path), x).tolist() == [[[[7]]]]


def test_accumulators_stay_below_2_to_31(tmp_path):
    builder = Builder(np.random.default_rng(0), (65_793,), (1.0, 0))
    builder.linear(0, 1, bits=8)
    save(Graph([builder.member()]), tmp_path / "m.safetensors")  # 65,793*255*128 is 2^31 - 128
    builder = Builder(np.random.default_rng(0), (65_794,), (1.0, 0))
    builder.linear(0, 1, bits=8)
    with pytest.raises(ModelError, match=r"expected accumulators below 2\^31, got weight \[1, 65794\] of 8 bits - at"):
        save(Graph([builder.member()]), tmp_path / "m.safetensors")


def test_load_names_the_file_and_the_node(tmp_path):
    path = tmp_path / "m.safetensors"
    save(small_graph(), path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'\\"stride\\":[1,1]', b'\\"stride\\":[0,1]', 1))
    with pytest.raises(ModelError, match="got 0 - at key `stride` of node `conv2d.0` of member `net` in .*m.safe"):
        load(path)


def test_nodes_may_share_a_constant(tmp_path):
    path = tmp_path / "m.safetensors"
    builder = Builder(np.random.default_rng(0), (3,), (1.0, 0))
    builder.table(builder.table(0))
    graph = Graph([builder.member()])
    save(graph, path)
    header = header_of(path)
    header["__metadata__"]["graph"] = header["__metadata__"]["graph"].replace("0/table.1/table", "0/table.0/table")
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + path.read_bytes()[-512:])
    first, second = load(path).members[0].nodes
    assert np.array_equal(first.constants["table"], second.constants["table"])


def test_node_defaults_are_not_shared():
    a, b = (Node("table", name, [0], 1) for name in "ab")
    a.attributes["x"] = 1
    assert b.attributes == {}
