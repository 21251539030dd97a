"""Whole models on the kernels for GPUs, in Triton's interpreter, against qdeploy/reference.py bit for bit."""

from __future__ import annotations

import gc
import json
import pickle
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest

pytest.importorskip("triton_on_cpu", reason="the kernels for GPUs need Triton", exc_type=ImportError)
import torch
from builder import Builder, arrays, batch, small_text, small_vision, text_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import ensembles, generators, graphs, texts
from test_engine import LAYERS
from versions import NEWEST

import qdeploy
from qdeploy import cli, format, reference
from qdeploy.errors import InputError, ModelError
from qdeploy.gpu import loading, program, steps
from qdeploy.gpu import model as gpu
from qdeploy.gpu.loading import build
from qdeploy.graph import Graph
from qdeploy.kernels import int8_tiles, int8_weights
from qdeploy.kernels.int8_tiles import TILES, TunedTiles

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch) -> None:
    """The interpreter takes its time by the program."""
    monkeypatch.setattr(int8_tiles, "CTAS_TO_FILL", 1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qdeploy" / "int8_tiles.json"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models") / "model.safetensors"


def load(graph: Graph, path: Path) -> gpu.GpuModel:
    format.save(graph, path)
    return build(format.read(path), path, CPU)


def assert_same(found: torch.Tensor, expected: np.ndarray, what: str = "output") -> None:
    assert (found.numpy().dtype, found.shape) == (expected.dtype, expected.shape), what
    assert found.numpy().tobytes() == expected.tobytes(), what


def assert_equals_reference(graph: Graph, x: np.ndarray, path: Path, mask: np.ndarray | None = None) -> None:
    """Every activation, the output and the classes."""
    output, scores, tapped = reference.run_all(graph, x, mask)
    model = load(graph, path)
    inputs = [torch.from_numpy(array) for array in (x, mask) if array is not None]
    found, found_taps = model(*inputs, taps=list(tapped))
    for name, expected in tapped.items():
        assert_same(found_taps[name], expected, name)
    assert isinstance(found, list) == isinstance(output, list)
    for got, expected in zip(arrays(found), arrays(output), strict=True):
        assert_same(got, expected)
    if graph.combine and scores.shape[1] > 1:
        assert np.array_equal(model.predict(*inputs).numpy(), scores.argmax(axis=1))


@settings(max_examples=20, deadline=None)
@given(st.one_of(graphs(version=NEWEST), graphs(version=NEWEST), graphs(), ensembles()), generators())
def test_random_graphs(path, graph, rng):
    dtype = np.uint8 if graph.preprocess and rng.integers(2) else np.float32
    assert_equals_reference(graph, batch(graph, int(rng.integers(0, 4)), rng, dtype), path)


@settings(max_examples=10, deadline=None)
@given(texts(), generators())
def test_random_texts(path, graph, rng):
    """Where texts have any length, of as many tokens as the longest of the batch has, and for kernels a few more."""
    ids, mask = text_batch(graph, int(rng.integers(0, 4)), rng)
    if mask is not None and len(ids):
        longest = mask.sum(1).max()
        ids, mask = ids[:, :longest].copy(), mask[:, :longest].copy()
    with patch("qdeploy.gpu.texts.TOKENS_STEP", 8):
        assert_equals_reference(graph, ids, path, mask)


def test_every_op_of_version_3(path):
    for graph in (small_vision(), small_text()):
        rng = np.random.default_rng(0)
        inputs = text_batch(graph, 3, rng) if graph.vocabulary else (batch(graph, 2, rng), None)
        assert_equals_reference(graph, inputs[0], path, inputs[1])


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_real_networks(path, layer):
    (c, h, w), conv = LAYERS[layer]
    builder = Builder(np.random.default_rng(0), (c, min(h, 9), min(w, 11)), (0.25, 128))
    x = builder.conv2d(0, bits=8, **conv)
    builder.add(x, builder.conv2d(0, bits=3, residual=x, **conv))
    graph = Graph([builder.member()])
    assert_equals_reference(graph, batch(graph, 2, np.random.default_rng(1)), path)


def test_largest_accumulators(path, monkeypatch):
    """255 * 128 * K is just below 2^31, and q - 128 at its ends."""
    monkeypatch.setattr(int8_tiles, "default", lambda *shape: int8_tiles.Tile(16, 32, 128, 4, 4))
    k = 513 * 128
    builder = Builder(np.random.default_rng(0), (k,), (1.0, 0))
    builder.linear(0, 3, bits=8, dtype="f32")
    weight = builder.nodes[0].constants["weight"]
    weight[0], weight[1] = -128, 127
    graph = Graph([builder.member()])
    x = np.stack([np.full(k, 255, np.float32), 255 * (np.arange(k) % 2).astype(np.float32)])
    assert_same(load(graph, path)(torch.from_numpy(x)), reference.run(graph, x))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_no_tile_changes_a_bit(path, tile, monkeypatch):
    builder = Builder(np.random.default_rng(0), (128, 3, 4), (0.25, 3))
    builder.conv2d(0, 128, (2, 3), padding=(1, 0, 1, 2))
    graph = Graph([builder.member()])
    x = batch(graph, 2, np.random.default_rng(1))
    monkeypatch.setattr(int8_tiles, "default", lambda *shape: tile)
    assert_same(load(graph, path)(torch.from_numpy(x)), reference.run(graph, x))


def small_ensemble(rule: str = "logits") -> Graph:
    members = []
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.5, 1.0]}
    for seed in range(2):
        builder = Builder(np.random.default_rng(seed), (3, 6, 5), (0.02, 120))
        x = builder.conv2d(0, 20, (3, 3), padding=(1, 1, 1, 1))
        x = builder.avg_pool2d(x, (6, 5), (1, 1), (0, 0, 0, 0))
        builder.linear(builder.reshape(x, (20,)), 4, dtype="f32")
        members.append(builder.member(f"member{seed}", preprocess))
    return Graph(members, rule, preprocess, list("abcd"))


@pytest.fixture
def model(tmp_path) -> gpu.GpuModel:
    return load(small_ensemble(), tmp_path / "model.safetensors")


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 6, 5, generator=torch.Generator().manual_seed(seed))


def test_an_image_has_the_same_bits_in_any_batch_and_chunk(model):
    x = images(5)
    whole = model(x)
    assert torch.equal(torch.cat([model(x[i : i + 1]) for i in range(5)]), whole)
    model._images_per_chunk = 2
    assert torch.equal(model(x), whole)
    assert model(x[:0]).shape == (0, 4) and model.predict(x[:0]).shape == (0,)
    assert model(x[:0], taps=["member1/conv2d.0"])[1]["member1/conv2d.0"].shape == (0, 20, 6, 5)
    assert torch.equal(model.predict(x), whole.argmax(1))


class FakeGraph:
    """Stands in for a CUDA graph: a replay runs what was captured again, on the memory it was captured with."""

    live = 0

    def __init__(self):
        FakeGraph.live += 1

    def __del__(self):
        FakeGraph.live -= 1

    def replay(self):
        for static, new in zip(self.results, self.forward(self.codes), strict=True):
            static.copy_(new)


def with_fake_graphs(model: gpu.GpuModel, monkeypatch) -> None:
    gc.collect()  # the graphs of other tests
    capturing = []
    forward = model._forward

    @contextmanager
    def capture(graph, **options):
        capturing.append(graph)
        yield
        capturing.pop()

    def recorded(codes, visit=None):
        results = forward(codes, visit)
        if capturing:
            capturing[-1].codes, capturing[-1].forward, capturing[-1].results = codes, forward, results
        return results

    model._streams = [None]
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    stream = SimpleNamespace(
        wait_event=lambda event: None, record_event=lambda: SimpleNamespace(synchronize=lambda: None)
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(model, "_forward", recorded)


def test_graphs_by_number_of_images(model, monkeypatch):
    """What a GPU does but for the launches: static memory, one graph a batch size, the oldest dropped."""
    with_fake_graphs(model, monkeypatch)
    monkeypatch.setattr(gpu, "MAX_GRAPHS", 2)
    expected = {n: model(images(n, seed=n)) for n in (1, 2, 3)}
    first = model._replay(images(1, seed=1))[0]
    for n in (2, 3, 1):
        found = model._replay(images(n, seed=n))
        assert torch.equal(found[0], expected[n]) and torch.equal(found[1], expected[n].argmax(1))
        assert FakeGraph.live <= 2
    model._replay(images(1, seed=2))
    assert torch.equal(first, expected[1])  # results do not change with later calls
    bad = images(1)
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="expected finite numbers"):
        model._replay(bad)
    assert torch.equal(model._replay(images(1, seed=1))[0], expected[1])


def test_members_run_side_by_side_in_a_graph(model, monkeypatch):
    """Each on a stream of its own that waits for the main one alone; the main one waits for all of them at the end."""
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    codes = [program.empty_codes(images(1)).fill_(5) for program in model._programs]
    expected = model._run_members(codes, None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model.device, model._streams = SimpleNamespace(type="cuda"), [Stream("main"), Stream("first"), Stream("second")]
    found = model._run_members(codes, None)
    for ours, alone in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))
    forks, joins = log[:2], log[2:]
    assert forks == ["first waits for main", "second waits for main"]
    assert joins == ["main waits for first", "main waits for second"]
    with pytest.raises(InputError, match="expected a call outside of a CUDA graph, as a model replays its own"):
        model._replay(images(1))


def test_images_of_any_memory_layout(model):
    x = images(3)
    assert torch.equal(model(x.to(memory_format=torch.channels_last)), model(x))
    assert torch.equal(model(x.flip(0).flip(0)[::1]), model(x))


def test_raw_images(model, tmp_path):
    raw = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), np.uint8)
    assert_same(model(torch.from_numpy(raw)), qdeploy.load_int_model(tmp_path / "model.safetensors")(raw))


def test_description_is_that_of_the_model_on_a_cpu(model, tmp_path):
    other = qdeploy.load_int_model(tmp_path / "model.safetensors")
    for key in ("inputs", "outputs", "members", "classes", "weight_bits", "nbytes"):
        assert getattr(model, key) == getattr(other, key), key
    mine, theirs = model.plan(3), other.plan(3)
    for ours, row in zip(mine, theirs, strict=True):
        assert {key: ours[key] for key in ("member", "name", "op", "bits", "macs", "share_of_macs")} == {
            key: row[key] for key in ("member", "name", "op", "bits", "macs", "share_of_macs")
        }
    assert mine[0]["tile"] and "tensor cores" in mine[0]["kernel"]


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (np.zeros((1, 3, 6, 5), np.float32), "expected a tensor on cpu, got ndarray - at the input"),
        (
            torch.zeros(1, 3, 5, 6),
            r"expected float32 \[N, 3, 6, 5\] or uint8 \[N, 6, 5, 3\], got float32 \[1, 3, 5, 6\]",
        ),
        (torch.zeros(1, 3, 6, 5, dtype=torch.float16), r"got float16 \[1, 3, 6, 5\] - at the input"),
        (torch.tensor(1.0), r"got float32 \[\] - at the input"),
        (torch.zeros(1, 3, 6, 5, device="meta"), "expected a tensor on cpu, got one on meta - at the input"),
    ],
)
def test_inputs_that_do_not_fit(model, x, text):
    with pytest.raises(InputError, match=text):
        model(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_anywhere(model, bad):
    for position in (0, 17, 89, 3 * 90 - 1):
        x = images(3)
        x.view(-1)[position] = bad
        with pytest.raises(InputError, match="expected finite numbers, got NaN or infinity - at the input"):
            model(x)
    assert torch.isfinite(model(images(3).sign() * 3e38)).all()  # only the product overflows


def test_taps_of_more_images_than_offsets_reach(model):
    model._images_per_chunk = 2
    text = "expected at most 2 images with taps, to profile or to tune, got 3 - at the input"
    with pytest.raises(InputError, match=text):
        model(images(3), taps=["member0/conv2d.0"])
    with pytest.raises(InputError, match=text):
        model.tune(images(3))


def test_unknown_tap(model):
    with pytest.raises(InputError, match="expected the name of a node, as `plan` lists them, got 'conv' - at taps"):
        model(images(1), taps=["conv"])
    with pytest.raises(InputError, match="^expected the name of a node, .*got list - at taps$"):
        model(images(1), taps=[["conv"]])


def test_predict_needs_scores(tmp_path):
    builder = Builder(np.random.default_rng(0), (3, 4, 4), (0.1, 0))
    builder.conv2d(0, 5)
    with pytest.raises(InputError, match="expected a model with one score per class, got output"):
        load(Graph([builder.member()]), tmp_path / "net.safetensors").predict(torch.zeros(1, 3, 4, 4))


def test_groups_that_would_fill_the_memory_are_an_error():
    weight = np.zeros((80_001, 33, 1, 1), np.int8)
    constants = np.zeros(80_001, np.float32)
    with pytest.raises(ModelError, match="expected weights that take less than 2\\^31 bytes on a GPU, got"):
        int8_weights.pack_conv(weight, 80_001 // 3, constants, constants, 0, CPU)


def test_a_node_that_no_gpu_can_run_is_named(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise ModelError("expected little, got much")

    monkeypatch.setattr(steps, "pack_conv", refuse)
    builder = Builder(np.random.default_rng(0), (3, 4, 4), (0.1, 0))
    builder.conv2d(0, 5)
    path = tmp_path / "net.safetensors"
    with pytest.raises(ModelError) as error:
        load(Graph([builder.member()]), path)
    name = builder.nodes[0].name
    assert str(error.value) == f"expected little, got much - at node `{name}` of member `net` in {path}"


def test_an_op_without_a_kernel_is_refused(tmp_path, monkeypatch):
    monkeypatch.delitem(program.STEPS, "norm")
    builder = Builder(np.random.default_rng(0), (3, 4, 4), (0.1, 0))
    builder.norm(0)
    path = tmp_path / "net.safetensors"
    with pytest.raises(ModelError) as error:
        load(Graph([builder.member()]), path)
    reason = "expected an op that runs on a GPU, got `norm` (device='cpu' runs it)"
    assert str(error.value) == f"{reason} - at node `norm.0` of member `net` in {path}"


def test_devices_that_are_not_there(model, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match="expected num_threads and isa with device 'cpu' only, got 'cuda'"):
        qdeploy.load_int_model(path, num_threads=2, device="cuda")
    for device in ("gpu", "cpu:0"):
        with pytest.raises(InputError, match=f"expected cpu, cuda or cuda:N, got '?{device}"):
            qdeploy.load_int_model(path, device=device)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="expected a CUDA GPU that PyTorch can use, got none - at device"):
            qdeploy.load_int_model(path, device="cuda")


def test_verify_on_a_gpu(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "checked_device", lambda device: CPU)
    path = str(tmp_path / "model.safetensors")
    assert cli.main(["verify", path, "--batch", "1", "--device", "cuda", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [(row["input"], row["isa"], row["different"]) for row in runs] == [("f32", "cuda", 0), ("u8", "cuda", 0)]
    assert runs[0]["compared"] == 1 + len(model.plan())


def test_without_torch_the_error_says_what_to_install(model, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import qdeploy\n"
        "try:\n    qdeploy.load_int_model(sys.argv[1], device='cuda')\n"
        "except qdeploy.InputError as error:\n    print(error)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.safetensors"], capture_output=True, text=True, check=True
    )
    assert (
        "expected PyTorch and Triton for a model on a GPU (pip install 'qdeploy[train]'), got no module" in child.stdout
    )


def test_pickle_carries_the_file(model, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "checked_device", torch.device)
    content = pickle.dumps(model)
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(pickle.loads(content)(images(2)), model(images(2)))


# ---- Tiles -----------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 10**6),
    st.sampled_from([32, 64, 128, 192, 512]),
    st.integers(1, 40),
    st.sampled_from([32, 64, 96, 512]),
)
def test_default_tiles_fit(pixels, rows, superblocks, k_unit):
    with patch.object(int8_tiles, "CTAS_TO_FILL", 108):
        tile = int8_tiles.default(pixels, rows, superblocks, k_unit)
    assert rows % tile.block_n == 0 and k_unit % tile.block_k == 0
    assert tile.block_m * tile.block_n <= 64 * 32 * tile.num_warps  # what spills otherwise


def test_tuning_is_kept_on_disk(model, tmp_path, own_cache, monkeypatch):
    """Each shape takes the tile that was fastest, now and in the next process; another batch is another shape."""
    x, timed = images(3), []

    def later_is_faster(launch) -> float:
        launch()
        timed.append(launch)
        return 1 / len(timed)

    expected = model(x)
    monkeypatch.setattr(gpu, "_milliseconds", later_is_faster)
    model.tune(x)
    tiles = [row["tile"] for row in model.plan(3) if row["tile"]]
    assert set(tiles) == {"x".join(map(str, TILES[-1][:3]))}
    assert torch.equal(model(x), expected)
    again = load(small_ensemble(), tmp_path / "model.safetensors")
    assert [row["tile"] for row in again.plan(3) if row["tile"]] == tiles
    assert [row["tile"] for row in again.plan(64) if row["tile"]] != tiles
    count = len(timed)
    again.tune(x)
    assert len(timed) == count  # known shapes are not timed again
    own_cache.write_text("{damaged")
    assert load(small_ensemble(), tmp_path / "model.safetensors").plan(3)


def test_profile_times_every_node(model, monkeypatch):
    monkeypatch.setattr(gpu, "_milliseconds", lambda launch: (launch(), 0.25)[1])
    rows = model.profile(images(2))
    assert [row["name"] for row in rows] == [row["name"] for row in model.plan(2)]
    assert {row["microseconds"] for row in rows} == {250.0}


def test_a_view_takes_no_time(path, monkeypatch):
    builder = Builder(np.random.default_rng(0), (3, 4, 5), (0.1, 0))
    builder.rescale(builder.tokens(0))
    monkeypatch.setattr(gpu, "_milliseconds", lambda launch: (launch(), 0.25)[1])
    rows = load(Graph([builder.member()]), path).profile(torch.zeros(2, 3, 4, 5))
    assert [(row["kernel"], row["microseconds"]) for row in rows] == [("view", 0.0), ("rescale", 250.0)]


def test_a_cache_that_cannot_be_written(own_cache):
    own_cache.parent.write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"expected to write .*int8_tiles.json, got: .* - at the tuned tiles"):
        TunedTiles("cpu").tune("key", list(TILES), lambda tile: tile.block_k)


@pytest.mark.parametrize("content", ["", "[]", '{"cpu": 3}', '{"cpu": {"key": [1, 2]}}', '{"cpu": {"key": "x"}}'])
def test_a_damaged_cache_counts_as_empty(own_cache, content):
    own_cache.parent.mkdir()
    own_cache.write_text(content)
    tiles = TunedTiles("cpu")
    assert tiles.get("key") is None
    tiles.tune("key", list(TILES), lambda tile: -tile.block_k)
    assert tiles.get("key") == TILES[0]
