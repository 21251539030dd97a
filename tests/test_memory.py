"""Memory and work: what a model takes follows from its file, fits the container, and is counted before it is taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from builder import Builder, batch, small_network
from forms import FORMS, conv_form
from hypothesis import given, settings
from hypothesis import strategies as st

import qdeploy
from qdeploy import _engine, reference
from qdeploy.errors import InputError, ModelError
from qdeploy.format import load, save
from qdeploy.graph import Graph

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
LIMITS = {  # files under a root of their own, and the bytes that they grant
    "no cgroups": ({}, MACHINE),
    "v2 without a limit": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"}, MACHINE),
    "v2 in a container": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "1048576"}, 2**20),
    "v2, the smallest of the parents": (
        {
            "proc/self/cgroup": "0::/a/b:1/c",
            "sys/fs/cgroup/a/memory.max": "2097152",
            "sys/fs/cgroup/a/b:1/memory.max": "1048576",
            "sys/fs/cgroup/a/b:1/c/memory.max": "max",
            "sys/fs/cgroup/other/memory.max": "1",
        },
        2**20,
    ),
    "v1 without a limit": (
        {"proc/self/cgroup": "4:memory:/", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"},
        MACHINE,
    ),
    "v1 in a container that sees the path of the host": (
        {
            "proc/self/cgroup": "5:cpu:/m\n4:memory:/docker/0123\n0::/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1048576",
            "sys/fs/cgroup/memory/m/memory.limit_in_bytes": "1",
        },
        2**20,
    ),
    "unreadable": ({"proc/self/cgroup": "\n:\n0::\nx", "sys/fs/cgroup/memory.max": "lots of it"}, MACHINE),
}


@pytest.mark.parametrize("case", LIMITS)
def test_limits_of_cgroups(tmp_path, case):
    files, limit = LIMITS[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert _engine.memory_limit(str(tmp_path)) == limit


# ---- Shared constants ------------------------------------------------------------------------------------------------


def write(path: Path, member: dict, tensors: dict[str, np.ndarray]) -> Path:
    """A model file of one member, whose nodes name `tensors` as they like: what `save` never writes."""
    header: dict = {}
    data = b""
    for name, value in sorted(tensors.items(), key=lambda item: item[1].dtype != np.float32):
        dtype = "F32" if value.dtype == np.float32 else "U8"
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [len(data), len(data) + value.nbytes]}
        data += value.tobytes()
    graph = {"input": {"shape": member["tensors"][0]["shape"], "preprocess": None}, "combine": None, "classes": None}
    graph["members"] = [{"name": "net", "preprocess_table": None} | member]
    header["__metadata__"] = {"format": "qdeploy", "format_version": "1", "graph": json.dumps(graph)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(*shape: int, zero_point: int = 0) -> dict:
    return {"name": "t", "dtype": "u8", "shape": shape, "scale": 1, "zero_point": zero_point}


def linear(i: int, inputs: list[int], shape: tuple[int, int], bits: int = 2, **keys: object) -> dict:
    weight = {"codes": "codes", "shape": shape, "bits": bits}
    constants = {"weight": weight, "multiplier": "multiplier", "bias": "multiplier", "clamp": [0, 255]}
    return {"op": "linear", "name": f"n{i}", "inputs": inputs, "output": i} | constants | keys


def constants(features: int, codes: int, bits: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "multiplier": rng.uniform(0, 1, features).astype(np.float32),
        "codes": rng.integers(0, 256, codes * bits // 8, dtype=np.uint8),
    }


def footprint(path: Path) -> int:
    return qdeploy.load_int_model(path)._session.footprint


@pytest.mark.parametrize("bits", [2, 8])
def test_nodes_that_read_the_same_bytes_share_one_packed_copy(tmp_path, bits):
    """1,000 nodes over one weight take what one takes, in both readers, and give what the reference gives."""
    sizes = []
    for n in (1, 1000):
        nodes = [linear(i, [0], (3, 4096), bits) for i in range(1, n + 1)]
        member = {"tensors": [tensor(4096, zero_point=7)] + [tensor(3)] * n, "nodes": nodes}
        sizes.append(footprint(write(tmp_path / f"{n}.safetensors", member, constants(3, 3 * 4096, bits))))
    assert sizes[0] == sizes[1]
    graph = load(tmp_path / "1000.safetensors")
    assert len({id(node.constants["weight"]) for node in graph.members[0].nodes}) == 1
    x = batch(graph, 1, np.random.default_rng(1))
    model = qdeploy.load_int_model(tmp_path / "1000.safetensors")
    assert model(x, taps=["n7"])[1]["n7"].tobytes() == model(x).tobytes() == reference.run(graph, x).tobytes()


def test_nodes_of_other_grids_and_constants_share_the_weights(tmp_path):
    """As the heads of a detector do: the panels once, and for each node what its own zero point and factors ask for."""
    nodes, tensors, sizes = [], [tensor(4096)], []
    for i in range(1, 41, 2):
        nodes.append({"op": "table", "name": f"n{i}", "inputs": [0], "output": i, "table": "table"})
        nodes.append(
            linear(i + 1, [i, i - 1], (3, 4096), residual_multiplier=i) if i > 1 else linear(2, [1], (3, 4096))
        )
        tensors += [tensor(4096, zero_point=i), tensor(3)]
        own = constants(3, 3 * 4096) | {"table": np.arange(256, dtype=np.uint8)}
        path = write(tmp_path / f"{i}.safetensors", {"tensors": tensors, "nodes": nodes}, own)
        sizes.append(footprint(path))
        graph = load(path)
        x = batch(graph, 2, np.random.default_rng(i))
        assert qdeploy.load_int_model(path)(x).tobytes() == reference.run(graph, x).tobytes()
    assert sizes[-1] - sizes[0] < 20 * 1024 < 4096 * 16 < sizes[0]


def test_codes_of_other_lengths_in_the_same_bytes(tmp_path):
    """3 codes of 3 bits fill two bytes as 4 and 5 do: each weight has the panels of its own shape."""
    rng = np.random.default_rng(0)
    own = {"codes": np.array([0b11010001, 0], np.uint8), "multiplier": np.ones(1, np.float32)}
    nodes, tensors = [], [tensor(60)]
    for size in (3, 4, 5):
        i = len(tensors)
        first = {"weight": {"codes": f"c{size}", "shape": [size, 60], "bits": 8}}
        nodes.append(linear(i, [0], (size, 60)) | first | {"multiplier": f"m{size}", "bias": f"m{size}"})
        nodes.append(linear(i + 1, [i], (1, size), 3))
        tensors += [tensor(size), tensor(1)]
        own[f"c{size}"] = rng.integers(0, 256, 60 * size, dtype=np.uint8)
        own[f"m{size}"] = np.full(size, 0.01, np.float32)
    path = write(tmp_path / "m.safetensors", {"tensors": tensors, "nodes": nodes}, own)
    graph = load(path)
    x, names = batch(graph, 2, rng), [node["name"] for node in nodes]
    expected = reference.run(graph, x, names)[1]
    for isa in _engine.isas():
        taps = qdeploy.load_int_model(path, isa=isa)(x, taps=names)[1]
        assert all(np.array_equal(taps[name], expected[name]) for name in names), isa


@pytest.mark.parametrize("form", FORMS)
def test_strides_that_share_weights(tmp_path, form):
    """Of stride 1 a 3x3 convolution may take a Winograd form; with the same constants and stride 2 it may not."""
    own = constants(3, 3 * 64 * 9, 8)
    weight = {"codes": "codes", "shape": [3, 64, 3, 3], "bits": 8}
    common = {"weight": weight, "multiplier": "multiplier", "bias": "multiplier", "clamp": [0, 255]}
    common |= {"padding": [0] * 4, "dilation": [1, 1], "groups": 1, "op": "conv2d", "inputs": [0]}
    strides = [(1, 1), (2, 1), (1, 1), (1, 2)]
    nodes = [common | {"name": f"n{i}", "output": i, "stride": stride} for i, stride in enumerate(strides, 1)]
    shapes = [(3, 1 + 7 // y, 1 + 7 // x) for y, x in strides]
    member = {"tensors": [tensor(64, 10, 10, zero_point=7), *(tensor(*shape) for shape in shapes)], "nodes": nodes}
    path = write(tmp_path / "m.safetensors", member, own | {"multiplier": own["multiplier"] / 1000})
    graph = load(path)
    x, names = batch(graph, 2, np.random.default_rng(1)), [node["name"] for node in nodes]
    expected = reference.run(graph, x, names)[1]
    with conv_form(form):
        for isa in _engine.isas():
            taps = qdeploy.load_int_model(path, isa=isa)(x, taps=names)[1]
            assert all(np.array_equal(taps[name], expected[name]) for name in names), isa


def test_weights_of_a_plain_model_are_packed_once(tmp_path):
    """Each convolution of its own bytes has a place of its own: as many as there are, and no more."""
    builder = Builder(np.random.default_rng(0), (64, 8, 8), (0.5, 9))
    x = 0
    for _ in range(4):
        x = builder.conv2d(x, 64, bits=8)
    save(Graph([builder.member()]), tmp_path / "m.safetensors")
    assert 4 * 64 * (64 + 12) <= footprint(tmp_path / "m.safetensors") <= 4 * 64 * (128 + 12 + 8 + 12)


def test_pools_and_tables_share_their_constants(tmp_path):
    sizes = []
    for n in (1, 300):
        pool = {"op": "avg_pool2d", "inputs": [0], "kernel": [40, 40], "stride": [1, 1], "padding": [0] * 4}
        keys = {"multiplier": "multiplier", "bias": 0, "clamp": [0, 255]}
        nodes = [pool | keys | {"name": f"n{i}", "output": i} for i in range(1, n + 1)]
        member = {"tensors": [tensor(1, 40, 40)] + [tensor(1, 1, 1)] * n, "nodes": nodes}
        sizes.append(footprint(write(tmp_path / "m.safetensors", member, constants(1600, 0))))
    assert sizes == [1600 * 4] * 2


def test_a_file_out_of_proportion_is_refused(tmp_path):
    """The same codes in ever other shapes, which cannot share panels, of one channel, whose panels are emptiest."""
    count, nodes, tensors = 2**18, [], [tensor(2**18)]
    for h, w in ((2**i, 2**j) for i in range(16) for j in range(min(16, 19 - i))):
        i = len(tensors)
        nodes.append({"op": "reshape", "name": f"n{i}", "inputs": [0], "output": i})
        conv = {"op": "conv2d", "stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1}
        nodes.append(linear(i + 1, [i], (1, count // (h * w), h, w), **conv))
        tensors += [tensor(count // (h * w), h, w), tensor(1, 1, 1)]
    path = tmp_path / "m.safetensors"
    few = {"tensors": tensors[:41], "nodes": nodes[:40]}
    write(path, few, constants(1, count))
    assert 20 * 16 * count < qdeploy.load_int_model(path, isa="scalar")._session.footprint < 21 * 16 * count
    write(path, {"tensors": tensors, "nodes": nodes}, constants(1, count))
    with pytest.raises(ModelError) as error:
        qdeploy.load_int_model(path, isa="scalar")
    expected = f"expected weights of at most 2048 bytes for each of the file's {path.stat().st_size}, got "
    assert str(error.value).startswith(expected)
    wanted = int(str(error.value).removeprefix(expected).split()[0])
    assert 0 < wanted - 2048 * path.stat().st_size < 17 * count  # before it packs


# ---- What does not fit -----------------------------------------------------------------------------------------------

LIMITED = """
import json, resource, sys
import numpy as np
import qdeploy
pages = int(open("/proc/self/statm").read().split()[0])
limit = eval(sys.argv[1], {"used": pages * resource.getpagesize()})
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

def said(call):
    try:
        call()
    except qdeploy.QdeployError as error:
        return f"{type(error).__name__}: {error}"

"""


def in_limited_memory(limit: str, code: str, folder: Path) -> list:
    """What `code` prints as JSON, in a process of so many bytes of address space."""
    command = [sys.executable, "-c", LIMITED + code, limit]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


POOL = {"op": "max_pool2d", "kernel": [1, 1], "stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1]}


def chain(path: Path, n: int, size: int, node: dict) -> None:
    """n nodes over an image, each read by the next."""
    nodes = [node | {"name": f"n{i}", "inputs": [i], "output": i + 1} for i in range(n)]
    tables = {"table": np.arange(256, dtype=np.uint8)} if node["op"] == "table" else {}
    write(path, {"tensors": [tensor(1, size, size)] * (n + 1), "nodes": nodes}, tables)


def test_what_does_not_fit_says_how_much_it_wanted(tmp_path):
    chain(tmp_path / "large.safetensors", 1, 16_000, POOL)
    chain(tmp_path / "deep.safetensors", 200, 2048, {"op": "table", "table": "table"})
    messages = in_limited_memory(
        "500_000_000",
        """
network = qdeploy.load_int_model("deep.safetensors", 1)
x = np.zeros((1, 1, 2048, 2048), np.float32)
print(json.dumps([
    said(lambda: qdeploy.load_int_model("large.safetensors", 1)),
    said(lambda: network(x, taps=["n3"])),
    said(lambda: network(x)),
    said(lambda: network(np.broadcast_to(x[0], (10**9, *x.shape[1:])))),
]))
""",
        tmp_path,
    )
    memory = "that fit the 500000000 bytes of memory"
    assert messages == [
        f"ModelError: expected activations and tiles {memory}, got 512000128 bytes an image - at the graph in "
        "large.safetensors",
        f"InputError: expected activations and tiles {memory}, got {201 * (2048**2 + 64)} bytes of one image - at taps",
        None,
        "InputError: expected a batch that fits the 500000000 bytes of memory, got 1000000000 images, which need "
        f"{10**9 * 4 * 2048**2} bytes more - at the input",
    ]


def test_memory_that_is_not_there_when_it_is_asked_for(tmp_path):
    """Within the limit, but beyond what the process itself has left: an error of ours, not a MemoryError."""
    nodes = [linear(i, [0], (1, 2**21)) for i in range(1, 7)]
    for node in nodes:
        node["weight"] = node["weight"] | {"codes": node["name"]}
    codes = {node["name"]: np.zeros(2**19, np.uint8) for node in nodes}
    member = {"tensors": [tensor(2**21)] + [tensor(1)] * 6, "nodes": nodes}
    write(tmp_path / "m.safetensors", member, constants(1, 0) | codes)
    code = 'print(json.dumps(said(lambda: qdeploy.load_int_model("m.safetensors", 1, "scalar"))))'
    wanted = 6 * 16 * 2**21 + 2 * 64  # and what a kernel may read around it
    assert in_limited_memory("used + 100_000_000", code, tmp_path) == (
        f"ModelError: expected {wanted} bytes of memory, got none - at m.safetensors"
    )


def test_a_header_that_does_not_fit(tmp_path):
    header = b'{"__metadata__":{"x":"' + b"x" * 20_000_000 + b'"}}'
    header += b" " * (-len(header) % 8)
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    code = 'print(json.dumps(said(lambda: qdeploy.load_int_model("m.safetensors", 1))))'
    assert in_limited_memory("500_000_000", code, tmp_path) == (
        f"ModelError: expected a header that fits the 500000000 bytes of memory, got {len(header)} bytes, which take "
        "32 times as many - at the header in m.safetensors"
    )


def test_results_that_do_not_fit(tmp_path, monkeypatch):
    """What a call allocates for its results is counted for all images and all taps."""
    graph = small_network()
    save(graph, tmp_path / "m.safetensors")
    model = qdeploy.load_int_model(tmp_path / "m.safetensors")
    names = [node.name for node in graph.members[0].nodes]
    sizes = [int(np.prod(t.shape)) * (4 if t.dtype == "f32" else 1) for t in graph.members[0].tensors[1:]]
    wanted = 3 * (sizes[-1] + sum(sizes))
    x = batch(graph, 3, np.random.default_rng(0))
    monkeypatch.setattr(model, "_memory", wanted)
    model(x, taps=names)
    monkeypatch.setattr(model, "_memory", wanted - 1)
    message = f"got 3 images, which need {wanted} bytes more - at the input"
    with pytest.raises(InputError, match=f"expected a batch that fits the {wanted - 1} bytes of memory, {message}"):
        model(x, taps=names)


@pytest.mark.parametrize("batch", [0, -1, -(2**62)])
def test_plans_are_of_one_image_or_more(tmp_path, batch):
    save(small_network(), tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=f"expected at least 1 image, got {batch} - at batch"):
        qdeploy.load_int_model(tmp_path / "m.safetensors")._session.plan(batch)


def test_plans_of_huge_batches_count_without_overflow(tmp_path):
    save(small_network(), tmp_path / "m.safetensors")
    session = qdeploy.load_int_model(tmp_path / "m.safetensors")._session
    assert [step["macs"] for step in session.plan(2**62)] == [step["macs"] * 2**62 for step in session.plan(1)]


# ---- Work ------------------------------------------------------------------------------------------------------------

Blocks = list[tuple[int, int, int]]  # bytes, first and last step


def plainly_placed(blocks: Blocks) -> tuple[list[int], int]:
    """Largest first, each at the lowest place that is free during its whole life, by trying all."""
    offset: dict[int, int] = {}
    for i in sorted(range(len(blocks)), key=lambda i: -blocks[i][0]):
        size, first, last = blocks[i]
        meets = [j for j in offset if blocks[j][1] <= last and first <= blocks[j][2]]
        ends = sorted([0] + [offset[j] + blocks[j][0] for j in meets])
        offset[i] = next(
            at for at in ends if all(at + size <= offset[j] or offset[j] + blocks[j][0] <= at for j in meets)
        )
    return [offset[i] for i in range(len(blocks))], max(offset[i] + blocks[i][0] for i in offset)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(-1, 30), st.integers(0, 12)), min_size=1, max_size=60))
def test_blocks_lie_where_a_plain_search_puts_them(lives):
    blocks = [(64 * size, first, first + length) for size, first, length in lives]
    offsets, total, _ = _engine.place(blocks)
    assert (offsets, total) == plainly_placed(blocks)


LIVES: dict[str, Callable[[int], Blocks]] = {
    "a chain": lambda n: [(64 * (1 + i % 7), i, i + 1) for i in range(n)],
    "one node that reads all": lambda n: [(64, i, n) for i in range(n)],
    "all at once": lambda n: [(64 * (1 + i % 5), -1, n) for i in range(n)],
    "lives of 600 steps": lambda n: [(64 * (1 + i * 37 % 1000), i, i + i * 7919 % 600) for i in range(n)],
}


@pytest.mark.parametrize("name", LIVES)
def test_placement_takes_n_log_n_steps(name):
    """At most 512 neighbours are looked at, each found by a walk down the tree."""
    for n in (1000, 4000, 16_000):
        blocks = LIVES[name](n)
        offsets, total, visits = _engine.place(blocks)
        assert visits <= n * 4 * (512 + n.bit_length())
        if name == "a chain":
            assert visits <= 2 * n * n.bit_length()
        assert total >= max(size for size, _, _ in blocks)
    beside = sorted((offsets[i], blocks[i][0]) for i in range(n) if blocks[i][1] <= n // 2 <= blocks[i][2])
    assert all(a + size <= b for (a, size), (b, _) in zip(beside, beside[1:], strict=False))


SIZES = st.integers(1, 12)


@settings(max_examples=300, deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(1, 4), st.integers(0, 40), st.integers(0, 40))
def test_windows_of_pools_are_counted_together(tmp_path_factory, size, stride, dilation, kernel, before, after):
    """Both readers refuse what a walk through all windows refuses: one without a real element."""
    extent = dilation * (kernel - 1) + 1
    windows = (size + before + after - extent) // stride + 1
    if windows < 1:
        return
    starts = [i * stride - before for i in range(windows)]
    real = all(any(0 <= s + i * dilation < size for i in range(kernel)) for s in starts)
    real = real and before < extent and after < extent
    pool = {"op": "max_pool2d", "name": "n", "inputs": [0], "output": 1, "kernel": [1, kernel], "stride": [1, stride]}
    pool |= {"padding": [0, before, 0, after], "dilation": [1, dilation]}
    path = tmp_path_factory.getbasetemp() / "pool.safetensors"
    write(path, {"tensors": [tensor(1, 1, size), tensor(1, 1, windows)], "nodes": [pool]}, {})
    for read in (load, qdeploy.load_int_model):
        if real:
            read(path)
        else:
            with pytest.raises(ModelError, match="expected a real element in every window of the pool"):
                read(path)


def calls(function: Callable[[], object]) -> int:
    """How many functions and generators of Python it enters."""
    count = 0

    def entered(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(entered)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def wide(path: Path, n: int) -> Path:
    """n nodes, and one that reads them all."""
    nodes = [{"op": "table", "name": f"n{i}", "inputs": [0], "output": i, "table": "table"} for i in range(1, n + 1)]
    nodes.append({"op": "concat", "name": "all", "inputs": list(range(1, n + 1)), "output": n + 1})
    return write(path, {"tensors": [tensor(1)] * (n + 1) + [tensor(n)], "nodes": nodes}, {"table": np.zeros(256, "u1")})


def test_many_objects_beside_each_other(tmp_path):
    """What is ignored is read nonetheless, and each object as the first one."""
    path = tmp_path / "m.safetensors"
    save(small_network(), path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    others = {"others": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0], "notes": [{}] * 200_000}}
    header = json.dumps(json.loads(data[8 : 8 + size]) | others).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    graph = load(path)
    x = batch(graph, 1, np.random.default_rng(0))
    assert qdeploy.load_int_model(path)(x).tobytes() == reference.run(graph, x).tobytes()


def many_tensors(path: Path, n: int) -> Path:
    """n tensors that nothing reads."""
    others = {f"t{i}": np.zeros(1, np.uint8) for i in range(n)}
    node = {"op": "table", "name": "n", "inputs": [0], "output": 1, "table": "table"}
    return write(path, {"tensors": [tensor(1)] * 2, "nodes": [node]}, {"table": np.zeros(256, "u1")} | others)


@pytest.mark.parametrize("make", [wide, many_tensors])
def test_reading_and_planning_take_linear_work(tmp_path, make):
    few, many = make(tmp_path / "few.safetensors", 250), make(tmp_path / "many.safetensors", 1000)
    assert calls(lambda: load(many)) <= 4.1 * calls(lambda: load(few))
    counts = [calls(describing(qdeploy.load_int_model(path))) for path in (few, few, many)]  # the first one imports
    assert counts[2] <= 4.1 * counts[1]


def describing(model: qdeploy.Model) -> Callable[[], object]:
    x = np.zeros((1, 1), np.float32)
    return lambda: (model.plan(1), model.weight_bits, model.profile(x, 1), model(x, taps=[model.plan(1)[0]["name"]]))
