"""The engine equals the reference bit for bit: every op, instruction set, thread count, batch and way of use."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from builder import Builder, arrays, batch, text_batch
from forms import FORMS, WINOGRAD, conv_form
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import ensembles, generators, graphs, texts, winograd_graphs
from versions import NEWEST

import qdeploy
from qdeploy import _engine, reference
from qdeploy.errors import InputError, ModelError
from qdeploy.format import save
from qdeploy.graph import COMBINE, Graph
from qdeploy.ops import OPS

ISAS = _engine.isas()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engine") / "m.safetensors"


NEEDS = {  # flags of /proc/cpuinfo, each with the instruction set below
    "avx2": {"avx2", "fma"},
    "avxvnni": {"avx2", "fma", "avx_vnni"},
    "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512vnni": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    "amx": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "amx_tile", "amx_int8"},
    "neon": {"asimd"},
    "neondot": {"asimd", "asimddp"},
}


def test_every_instruction_set_of_this_cpu_is_found():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert ISAS == ["scalar", *(isa for isa, needed in NEEDS.items() if needed <= flags)]


def tap_names(graph: Graph) -> list[str]:
    return [
        f"{member.name}/{node.name}" if graph.combine else node.name
        for member in graph.members
        for node in member.nodes
    ]


def assert_same(got: np.ndarray, expected: np.ndarray, what: object) -> None:
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), what
    assert got.tobytes() == expected.tobytes(), what


def assert_equals_reference(
    graph: Graph, x: np.ndarray, path: Path, batches=(1, 0, 3), threads=(1, 2, 3), mask: np.ndarray | None = None
) -> None:
    """Output and every node, for the first n images (texts) of x, on every ISA and thread count."""
    save(graph, path)
    names = tap_names(graph)
    expected, expected_taps = reference.run(graph, x, names, mask)
    wanted = arrays(expected)
    has_classes = len(wanted) == 1 and wanted[0].ndim == 2 and wanted[0].shape[1] > 1
    classes = reference.predict(graph, x, mask) if has_classes else None
    for isa in ISAS:
        for num_threads in threads:
            model = qdeploy.load_int_model(path, num_threads, isa)
            for n in batches:
                inputs = (x[:n],) if mask is None else (x[:n], mask[:n])
                output, taps = model(*inputs, taps=names)
                for name in names:
                    assert_same(taps[name], expected_taps[name][:n], (isa, num_threads, n, name))
                for without_taps, found in ((False, output), (True, model(*inputs))):
                    assert isinstance(found, list) == isinstance(expected, list)
                    for got, want in zip(arrays(found), wanted, strict=True):
                        assert_same(got, want[:n], (isa, num_threads, n, without_taps))
            if classes is not None:
                assert_same(
                    model.predict(x) if mask is None else model.predict(x, mask), classes, (isa, num_threads, "classes")
                )


@pytest.mark.parametrize("residual", [None, "u8", "s16"])
@pytest.mark.parametrize("dtype", ["u8", "s16", "f32"])
def test_depthwise_of_every_type(path, residual, dtype):
    """Few channels, whose neighbouring pixels go together, and rows of more numbers than are made at once."""
    for channels, size in ((8, (4, 9)), (100, (3, 60))):
        net = Builder(np.random.default_rng(channels), (channels, *size), (0.5, 9))
        other = None if residual is None else net.rescale(0, residual)
        net.conv2d(0, channels, (3, 3), padding=(1, 1, 1, 1), groups=channels, residual=other, dtype=dtype)
        graph = Graph([net.member()])
        assert_equals_reference(graph, batch(graph, 2, np.random.default_rng(0)), path, (2,), (1, 3))


@settings(max_examples=120, deadline=None)
@given(st.one_of(graphs(), graphs(), graphs(), ensembles()), generators())
def test_random_graphs(path, graph, rng):
    dtype = np.uint8 if graph.preprocess and rng.integers(2) else np.float32
    assert_equals_reference(graph, batch(graph, 3, rng, dtype), path)


@settings(max_examples=100, deadline=None)
@given(graphs(version=NEWEST, max_nodes=6), generators())
def test_random_graphs_of_the_newest_version(path, graph, rng):
    assert_equals_reference(graph, batch(graph, 3, rng), path, threads=(1, 2))


@settings(max_examples=60, deadline=None)
@given(texts(), generators())
def test_random_texts(path, graph, rng):
    ids, mask = text_batch(graph, 4, rng)
    assert_equals_reference(graph, ids, path, batches=(1, 0, 4), threads=(1, 2), mask=mask)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(graph=winograd_graphs(), rng=generators())
def test_forms_of_convolutions(path, form, graph, rng):
    with conv_form(form):
        assert_equals_reference(graph, batch(graph, 2, rng), path, batches=(2,), threads=(1, 3))


def depth_to_space(net: Builder) -> None:
    """Into a border, and from there on."""
    parts = net.reshape(net.tokens(net.conv2d(0, 12)), (4 * 35, 3))
    y, x = np.divmod(np.arange(4 * 35), 14)
    pixels = net.gather(parts, "rows", (y // 2 * 7 + x // 2) * 4 + y % 2 * 2 + x % 2, (3, 10, 14))
    net.conv2d(pixels, 5, (3, 3), padding=(1, 1, 1, 1), dtype="f32")


def rows_between_borders(net: Builder) -> None:
    """Runs that go beyond the end of a row, with zeros between them."""
    a = net.conv2d(0, 6)
    b = net.conv2d(a, 4, (3, 3), padding=(1, 0, 1, 2))
    index = np.r_[3:20, -1, -1, 8, 8, 0:12, 34, 33]
    c = net.conv2d(net.gather(a, "rows", index, (6, 5, 7)), 4, (3, 3), padding=(1, 0, 1, 2))
    net.linear(net.reshape(net.add(b, c), (140,)), 5, dtype="f32")


def reshapes_in_place(net: Builder) -> None:
    """Of planes, of rows, and to a vector; one of them is read again."""
    planes = net.reshape(net.conv2d(0, 4), (4, 7, 5))
    rows = net.reshape(net.tokens(planes), (70, 2))
    net.linear(net.add(net.reshape(rows, (140,)), net.reshape(planes, (140,))), 5, dtype="f32")


@pytest.mark.parametrize("flow", [depth_to_space, rows_between_borders, reshapes_in_place])
def test_moves_of_what_lies_together(path, flow):
    net = Builder(np.random.default_rng(0), (6, 5, 7), (0.5, 9))
    flow(net)
    graph = Graph([net.member()])
    assert_equals_reference(graph, batch(graph, 3, np.random.default_rng(1)), path)


LAYERS = {  # name: input shape, arguments of conv2d
    "stem": ((3, 45, 37), {"out_channels": 64, "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3, 3, 3)}),
    "pointwise": ((256, 14, 14), {"out_channels": 130}),
    "pointwise with stride": ((64, 15, 13), {"out_channels": 96, "stride": (2, 2)}),
    "3x3": ((64, 28, 28), {"out_channels": 64, "kernel": (3, 3), "padding": (1, 1, 1, 1)}),
    "3x3 deep on one pixel": ((512, 1, 1), {"out_channels": 65, "kernel": (3, 3), "padding": (1, 1, 1, 1)}),
    "depthwise": ((97, 33, 31), {"out_channels": 97, "kernel": (3, 3), "padding": (1, 1, 1, 1), "groups": 97}),
    "depthwise 5x5 with stride": (
        (40, 20, 23),
        {"out_channels": 40, "kernel": (5, 5), "stride": (2, 2), "padding": (1, 2, 2, 1), "groups": 40},
    ),
    "32 groups": ((128, 9, 9), {"out_channels": 128, "kernel": (3, 3), "padding": (1, 1, 1, 1), "groups": 32}),
    "groups of 8": ((72, 9, 11), {"out_channels": 72, "kernel": (3, 3), "padding": (1, 1, 1, 1), "groups": 9}),
    "groups of 12 to 16": ((36, 6, 7), {"out_channels": 48, "kernel": (1, 3), "padding": (0, 1, 0, 1), "groups": 3}),
    "groups of 16 to 32": ((80, 5, 6), {"out_channels": 160, "kernel": (2, 2), "stride": (2, 1), "groups": 5}),
    "dilated": ((33, 19, 17), {"out_channels": 34, "kernel": (3, 3), "padding": (4, 4, 4, 4), "dilation": (4, 4)}),
    "large padding": ((5, 3, 3), {"out_channels": 7, "kernel": (2, 2), "padding": (9, 8, 7, 6)}),
    "one row": ((8, 1, 200), {"out_channels": 9, "kernel": (1, 9), "stride": (1, 2), "padding": (0, 4, 0, 4)}),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bits", [2, 4, 5, 6, 7, 8])
def test_layers_of_real_networks(path, layer, bits):
    """With a residual, in place or not, and with the extreme codes, whose sums overflow s16 if anything does."""
    shape, conv = LAYERS[layer]
    rng = np.random.default_rng(bits)
    builder = Builder(rng, shape, (0.25, 128))
    residual = builder.conv2d(0, **conv, bits=bits, codes="extreme")
    builder.conv2d(0, **conv, bits=bits, codes="lowest", residual=residual, exact=True)
    graph = Graph([builder.member()])
    assert_equals_reference(graph, batch(graph, 2, rng), path, batches=(2,), threads=(1, 2))


WINOGRAD_LAYERS = {  # name: input shape, arguments of conv2d
    "56x56": ((16, 56, 56), {"out_channels": 33, "padding": (1, 1, 1, 1)}),
    "several blocks of several chunks": ((130, 29, 27), {"out_channels": 40, "padding": (1, 0, 0, 1)}),
    "one block of several runs": ((1024, 12, 12), {"out_channels": 88, "padding": (1, 1, 1, 1)}),
    "deep on one pixel": ((512, 1, 1), {"out_channels": 65, "padding": (1, 1, 1, 1)}),
    "a border wider than a patch": ((3, 2, 1), {"out_channels": 5, "padding": (9, 8, 7, 6)}),
    "one row": ((24, 1, 100), {"out_channels": 17, "padding": (1, 1, 1, 1)}),
    "two groups of 32": ((64, 9, 11), {"out_channels": 128, "padding": (1, 1, 1, 1), "groups": 2}),
}


@pytest.mark.parametrize("form", WINOGRAD)
@pytest.mark.parametrize("layer", WINOGRAD_LAYERS)
@pytest.mark.parametrize("zero_point", [0, 255])
def test_extreme_codes_in_the_winograd_form(path, form, layer, zero_point):
    """On images of 0 and 255 alone; threads share out patches or channels."""
    shape, conv = WINOGRAD_LAYERS[layer]
    builder = Builder(np.random.default_rng(zero_point), shape, (1.0, zero_point))
    residual = builder.conv2d(0, kernel=(3, 3), **conv, codes="extreme")
    builder.conv2d(0, kernel=(3, 3), **conv, codes="lowest", residual=residual, exact=True)
    graph = Graph([builder.member()])
    x = np.random.default_rng(1).choice([-zero_point, 255 - zero_point], (2, *shape)).astype(np.float32)
    with conv_form(form):
        assert_equals_reference(graph, x, path, batches=(2,), threads=(1, 2, 5))
        kernels = {step["kernel"] for step in qdeploy.load_int_model(path, isa="scalar").plan()}
    assert kernels == {f"qu8_qc8w_{form}_1x16__scalar"}


@pytest.mark.parametrize("channels", [1824, 1832])
def test_codes_too_large_for_winograd(path, channels):
    """9 * 1824 codes of -128 on pixels of 255 are the last below 2^29; the form after them is the direct one."""
    builder = Builder(np.random.default_rng(0), (channels, 2, 3), (1.0, 0))
    builder.conv2d(0, 2, (3, 3), padding=(1, 1, 1, 1), codes="lowest", dtype="f32")
    graph = Graph([builder.member()])
    for form in WINOGRAD:
        with conv_form(form):
            assert_equals_reference(graph, np.full((1, channels, 2, 3), 255, np.float32), path, (1,), (1,))
            for isa in ISAS:
                (step,) = qdeploy.load_int_model(path, isa=isa).plan()
                assert (form in step["kernel"], step["note"]) == (
                    (True, "") if channels == 1824 else (False, "codes too large for Winograd")
                )


@pytest.mark.parametrize("form", WINOGRAD)
def test_sums_that_wrap_in_the_winograd_form(path, form):
    """Of 10,000 channels the products add up to far more than 2^32; the accumulators do not."""
    builder = Builder(np.random.default_rng(0), (10_000, 3, 2), (1.0, 0))
    builder.conv2d(0, 5, (3, 3), padding=(1, 1, 1, 1), bits=5, codes="lowest", dtype="f32")
    graph = Graph([builder.member()])
    x = np.random.default_rng(1).choice([0, 255], (1, 10_000, 3, 2), p=[0.1, 0.9]).astype(np.float32)
    with conv_form(form):
        assert_equals_reference(graph, x, path, batches=(1,), threads=(1, 2))
        for isa in ISAS:
            (step,) = qdeploy.load_int_model(path, isa=isa).plan()
            assert form in step["kernel"]


NO_MEMORY = """
import resource, sys
sys.path.insert(0, {tests!r})
import numpy as np
from builder import Builder
from qdeploy import _engine
from qdeploy.format import save
from qdeploy.graph import Graph

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (256 << 20)
channels = int((limit / 4 / 72) ** 0.5)  # of which U alone takes a quarter of the limit
builder = Builder(np.random.default_rng(0), (channels, 1, 1), (1.0, 0))
builder.conv2d(0, channels, (3, 3), padding=(1, 1, 1, 1), bits=2)
save(Graph([builder.member()]), "large.safetensors")
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
(step,) = _engine.Session("large.safetensors", 1, "", conv_form="winograd_4x4").plan(1)
print("winograd" in step["kernel"], step["note"])
"""


def test_no_memory_for_winograd(tmp_path):
    run = run_python(NO_MEMORY.format(tests=str(Path(__file__).parent)), tmp_path, "")
    assert (run.stdout, run.stderr) == ("False no memory for Winograd\n", "")


def test_forms_that_do_not_exist(network, tmp_path):
    with conv_form("fft"), pytest.raises(InputError) as error:
        qdeploy.load_int_model(tmp_path / "m.safetensors")
    assert str(error.value) == 'expected direct, winograd_4x4 or winograd_2x2, got "fft" - at conv_form'


def test_the_rule_takes_winograd_where_it_is_faster(path):
    """VGG's layers of 56x56 on every instruction set that was measured; nothing where there is nothing to gain."""
    for shape, outputs, expected in (((128, 56, 56), 128, True), ((128, 2, 2), 128, False), ((3, 56, 56), 64, False)):
        builder = Builder(np.random.default_rng(0), shape, (1.0, 0))
        builder.conv2d(0, outputs, (3, 3), padding=(1, 1, 1, 1))
        save(Graph([builder.member()]), path)
        for isa in ISAS:
            (step,) = qdeploy.load_int_model(path, isa=isa).plan()
            measured = isa in ("avx2", "avxvnni", "avx512", "avx512vnni")
            assert ("winograd" in step["kernel"]) == (expected and measured), (shape, isa)


@pytest.mark.parametrize("step", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_kernels_that_add_in_16_bits_get_the_codes_that_fit(path, step, sign):
    """Codes of 100 and of 28 or 29, `step` dwords of k later: products with 255 add up to 32640 or 32895 in s16."""
    for second, bits in ((28, 4), (29, {0: 8, 1: 7, 2: 6, 4: 5, 8: 4}[step])):
        builder = Builder(np.random.default_rng(0), (100,), (1.0, 0))
        builder.linear(0, 40, dtype="f32")
        weight = builder.nodes[0].constants["weight"]
        weight[:] = 0
        weight[37, [32, 33 + 4 * step]] = sign * 100, sign * second
        graph = Graph([builder.member()])
        assert_equals_reference(graph, np.full((1, 100), 255, np.float32), path, batches=(1,), threads=(1,))
        for isa in {"avx2", "avx512"}.intersection(ISAS):
            (plan,) = qdeploy.load_int_model(path, isa=isa).plan(1)
            assert plan["kernel"].endswith(f"_w{bits}__{isa}" if bits < 8 else f"c2__{isa}")


@pytest.mark.parametrize("zero_point", [0, 255])
def test_largest_accumulators(path, zero_point):
    """K = 65793 is the most for 8 bits: every product is -+255*128 and the sum 128 short of 2^31."""
    builder = Builder(np.random.default_rng(0), (65_793,), (1.0, zero_point))
    builder.linear(0, 3, bits=8, codes="lowest", dtype="f32")
    graph = Graph([builder.member()])
    constants = graph.members[0].nodes[0].constants
    constants["multiplier"][:], constants["bias"][:] = 1, 0
    x = np.full((1, 65_793), 255 - 2 * zero_point, np.float32)
    assert_equals_reference(graph, x, path, batches=(1,), threads=(1,))
    assert abs(reference.run(graph, x)[0, 0]) == 2.0**31 - 128


def test_accumulators_above_2_to_24_round_half_to_even(path):
    builder = Builder(np.random.default_rng(0), (1000,), (1.0, 0))
    builder.linear(0, 33, bits=8, dtype="f32")
    constants = builder.nodes[0].constants
    constants["multiplier"][:], constants["bias"][:] = 1, 0
    constants["weight"][:] = 127
    graph = Graph([builder.member()])
    x = np.random.default_rng(1).integers(150, 256, (4, 1000)).astype(np.float32)  # sums near 2^24.6: odd ones are ties
    assert_equals_reference(graph, x, path, batches=(4,), threads=(1,))


@pytest.mark.parametrize("rule", COMBINE)
@pytest.mark.parametrize("classes", [1, 2, 7, 1000])
def test_ensembles_of_many_classes_and_large_logits(path, rule, classes):
    rng = np.random.default_rng(classes)
    members = []
    for i in range(3):
        builder = Builder(rng, (9,), (0.5, 10 * i))
        builder.linear(0, classes, dtype="f32", size=(0.01, 1.0, 40.0)[i])
        members.append(builder.member(f"m{i}"))
    graph = Graph(members, rule)
    assert_equals_reference(graph, batch(graph, 5, rng), path, batches=(5, 1), threads=(1, 2))


def test_logits_by_global_pooling_or_a_convolution_over_the_whole_image(path):
    """f32 [C, 1, 1] declared as [C], with a residual of that shape too, alone and in an ensemble."""
    rng = np.random.default_rng(0)
    pooled, convolved = Builder(rng, (6, 4, 3), (0.5, 9)), Builder(rng, (6, 4, 3), (0.25, 99))
    pooled.avg_pool2d(0, (4, 3), (1, 1), (0, 0, 0, 0), dtype="f32", flat=True)
    residual = convolved.reshape(convolved.conv2d(0, 6, (4, 3)), (6,))
    convolved.conv2d(0, 6, (4, 3), residual=residual, dtype="f32", flat=True)
    members = [pooled.member("pooled"), convolved.member("convolved")]
    for graph in (Graph(members[:1]), Graph(members[1:]), Graph(members, "logits")):
        assert_equals_reference(graph, batch(graph, 3, rng), path)


def small_network(seed: int = 0, preprocess: bool = False) -> Graph:
    rng = np.random.default_rng(seed)
    builder = Builder(rng, (3, 12, 11), (0.02, 110))
    x = builder.conv2d(0, 24, (3, 3), padding=(1, 1, 1, 1), bits=7)
    x = builder.conv2d(x, 24, (3, 3), padding=(1, 1, 1, 1), bits=4, residual=x, clamp=(30, 255))
    x = builder.reshape(builder.avg_pool2d(x, (12, 11), (1, 1), (0, 0, 0, 0), per_count=False), (24,))
    builder.linear(x, 10, dtype="f32")
    entry = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]} if preprocess else None
    return Graph([builder.member(preprocess=entry)], preprocess=entry)


@pytest.fixture
def network(tmp_path) -> tuple[qdeploy.Model, Graph, np.ndarray]:
    """A loaded model, its graph and a batch."""
    graph = small_network()
    save(graph, tmp_path / "m.safetensors")
    return qdeploy.load_int_model(tmp_path / "m.safetensors", 2), graph, batch(graph, 6, np.random.default_rng(1))


def test_raw_images_give_what_preprocessed_floats_give(tmp_path):
    graph = small_network(preprocess=True)
    path = tmp_path / "m.safetensors"
    raw = batch(graph, 4, np.random.default_rng(3), np.uint8)
    assert_equals_reference(graph, raw, path)
    mean, std = (np.asarray(graph.preprocess[key], np.float32) for key in ("mean", "std"))
    x = ((raw.astype(np.float32) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
    model = qdeploy.load_int_model(path)
    assert_same(model(raw), model(x), "u8 and f32")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_that_went_through_pickle(tmp_path, dtype):
    """Every pool of processes sends its arrays so: their dtype equals numpy's own, but is another object."""
    graph = small_network(preprocess=True)
    save(graph, tmp_path / "m.safetensors")
    x = batch(graph, 3, np.random.default_rng(1), dtype)
    sent = pickle.loads(pickle.dumps(x))
    assert sent.dtype is not x.dtype
    assert_same(qdeploy.load_int_model(tmp_path / "m.safetensors")(sent), reference.run(graph, x), "sent")


def test_what_describes_a_model_is_a_copy(network):
    model, _, x = network
    before = model(x[:1])
    for entry in (*model.inputs, *model.outputs):
        entry.update(shape=(1,), dtype="u8")
    model.members.clear()
    assert np.array_equal(model(x[:1]), before)


def test_batches_in_any_order_on_one_model(network):
    model, graph, x = network
    expected = reference.run(graph, x)
    for n in (3, 1, 0, 6, 2, 6, 1):
        assert_same(model(x[:n]), expected[:n], n)


def test_large_batches(path):
    """More images than run together, of two members whose first layers run image by image and whose last ones do not,
    with a residual, a skipped layer and a result of the first part that the second part reads twice."""
    rng = np.random.default_rng(0)
    members = []
    for name in ("a", "b"):
        builder = Builder(rng, (3, 20, 20), (0.02, 110))
        x = builder.conv2d(0, 16, (3, 3), padding=(1, 1, 1, 1), bits=7)
        x = builder.conv2d(x, 16, (3, 3), padding=(1, 1, 1, 1), bits=7, residual=x)
        wide = builder.max_pool2d(x, (4, 4), (4, 4), (0, 0, 0, 0))
        y = builder.conv2d(wide, 64, (3, 3), padding=(1, 1, 1, 1), bits=7)
        y = builder.conv2d(y, 16, (3, 3), padding=(1, 1, 1, 1), bits=7, residual=wide)
        z = builder.concat([y, builder.table(wide, quantization=builder.quantization(y))])
        z = builder.conv2d(z, 96, (5, 5), bits=7)
        builder.linear(builder.reshape(z, (96,)), 10, dtype="f32")
        members.append(builder.member(name))
    graph = Graph(members, "logits")
    save(graph, path)
    x = batch(graph, 150, rng)
    expected = reference.run(graph, x)
    for threads in (1, 2, 3):
        assert_same(qdeploy.load_int_model(path, threads)(x), expected, threads)


def test_inputs_of_any_memory_layout(network):
    model, graph, x = network
    expected = reference.run(graph, x)
    assert_same(model(np.asfortranarray(x)), expected, "column-major")
    assert_same(model(np.repeat(x, 2, axis=3)[..., ::2]), expected, "strided")
    assert_same(model(x[::-1]), expected[::-1], "reversed")
    nhwc = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert_same(model(nhwc), expected, "channels last")
    unaligned = np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    unaligned.setflags(write=False)
    assert_same(model(unaligned), expected, "unaligned and read-only")


def test_many_threads_on_one_model(network):
    model, graph, x = network
    expected = reference.run(graph, x)

    def work(i: int) -> bool:
        n = 1 + i % 6
        return model(x[:n]).tobytes() == expected[:n].tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))


def test_models_share_the_pool(tmp_path):
    """Models of different thread counts, used at once from several threads."""
    jobs = []
    for seed in range(4):
        graph = small_network(seed)
        save(graph, tmp_path / f"{seed}.safetensors")
        x = batch(graph, 2, np.random.default_rng(seed))
        model = qdeploy.load_int_model(tmp_path / f"{seed}.safetensors", seed + 1, ISAS[seed % len(ISAS)])
        jobs.append((model, x, reference.run(graph, x)))
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda i: jobs[i % 4][0](jobs[i % 4][1]).tobytes() == jobs[i % 4][2].tobytes(), range(200))
        assert all(results)


def test_use_after_fork(network):
    """The worker threads do not exist in the child; parent and child both go on."""
    model, graph, x = network
    expected = reference.run(graph, x)
    for _ in range(3):
        assert_same(model(x), expected, "before")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork with threads
            child = os.fork()
        if child == 0:
            same = all(model(x[:n]).tobytes() == expected[:n].tobytes() for n in (6, 1, 3))
            os._exit(0 if same else 1)
        assert_same(model(x), expected, "in the parent")
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0


def test_pickle_needs_the_file_only_once(network, tmp_path):
    model, graph, x = network
    expected = reference.run(graph, x)
    data = pickle.dumps(model)
    (tmp_path / "m.safetensors").unlink()
    copied = pickle.loads(data)
    assert_same(copied(x), expected, "unpickled")
    assert (copied.isa, copied.num_threads) == (model.isa, model.num_threads)
    assert_same(pickle.loads(pickle.dumps(copied))(x), expected, "pickled again")
    with pytest.raises(ModelError, match="expected the file that was loaded, got another or none"):
        pickle.dumps(model)


def test_pickle_in_another_process(network, tmp_path):
    model, graph, x = network
    code = "import pickle, sys; model, x = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(model(x).tobytes())"
    data = pickle.dumps((model, x))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, input=data, cwd=tmp_path, check=True)
    assert result.stdout == reference.run(graph, x).tobytes()


def test_a_file_may_change_after_loading(network, tmp_path):
    model, graph, x = network
    os.truncate(tmp_path / "m.safetensors", 0)
    assert_same(model(x), reference.run(graph, x), "after truncation")


def test_a_file_may_shrink_while_it_is_loaded(tmp_path):
    """An error or a whole model, at whatever point of the loading another thread cuts the file."""
    builder = Builder(np.random.default_rng(0), (4096,), (0.1, 3))
    builder.linear(0, 4096, bits=8, dtype="f32")
    save(Graph([builder.member()]), tmp_path / "whole.safetensors")
    code = """
import os, shutil, threading, timeit, qdeploy
seconds = min(timeit.repeat(lambda: qdeploy.load_int_model("whole.safetensors", 1), number=1, repeat=5))
for i in range(20):
    shutil.copy("whole.safetensors", "m.safetensors")
    cutter = threading.Timer(i / 40 * seconds, os.truncate, ("m.safetensors", 4096))
    cutter.start()
    try:
        qdeploy.load_int_model("m.safetensors", 1)
        print("loaded")
    except qdeploy.ModelError as error:
        print(error)
    cutter.join()
"""
    result = run_python(code, tmp_path, "")
    assert result.returncode == 0, (result.returncode, result.stderr)
    lines = result.stdout.splitlines()
    errors = [line for line in lines if line != "loaded"]
    assert len(lines) == 20
    assert all("m.safetensors" in line for line in errors)
    assert any("the end of a file that just shrank" in line for line in errors)


def test_loading_keeps_no_file_open(tmp_path):
    save(small_network(), tmp_path / "m.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    models = [qdeploy.load_int_model(tmp_path / "m.safetensors") for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before
    del models


BAD_INPUTS = {
    "a list": ([[1.0]], r"expected float32 \[N, 3, 12, 11\], got list"),
    "float64": (np.zeros((1, 3, 12, 11)), r"expected float32 \[N, 3, 12, 11\], got float64 \[1, 3, 12, 11\]"),
    "int32": (np.zeros((1, 3, 12, 11), np.int32), "got int32"),
    "uint8 without preprocess": (np.zeros((1, 12, 11, 3), np.uint8), "got uint8"),
    "no batch": (np.zeros((3, 12, 11), np.float32), r"got float32 \[3, 12, 11\]"),
    "a scalar": (np.float32(1) + np.zeros((), np.float32), "got float32"),
    "channels": (np.zeros((1, 4, 12, 11), np.float32), r"got float32 \[1, 4, 12, 11\]"),
    "height": (np.zeros((1, 3, 11, 11), np.float32), r"got float32 \[1, 3, 11, 11\]"),
    "an empty batch of another shape": (np.zeros((0, 3, 11, 11), np.float32), r"got float32 \[0, 3, 11, 11\]"),
    "big-endian": (np.zeros((1, 3, 12, 11), ">f4"), "expected"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_that_do_not_fit(network, case):
    x, message = BAD_INPUTS[case]
    with pytest.raises(InputError, match=message):
        network[0](x)


def test_masked_images_are_refused(network):
    """Whatever lies under the mask is no image; a mask of nothing hides nothing."""
    model, graph, x = network
    masked = np.ma.masked_array(x)
    masked[-1, 2, 3, 4] = np.ma.masked
    for call in (model, model.predict, model.profile):
        with pytest.raises(InputError, match="expected images without masked elements, got some - at the input"):
            call(masked)
    assert_same(model(np.ma.masked_array(x)), reference.run(graph, x), "nothing masked")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_anywhere(tmp_path, isa, bad):
    """At every place of odd shapes, so that no vector tail is forgotten; afterwards the model still works."""
    for shape in [(3, 5, 7), (1, 1, 1), (4, 2, 9), (67,)]:
        builder = Builder(np.random.default_rng(0), shape, (0.1, 3))
        builder.table(0)
        graph = Graph([builder.member()])
        save(graph, tmp_path / "m.safetensors")
        model = qdeploy.load_int_model(tmp_path / "m.safetensors", 1, isa)
        x = batch(graph, 2, np.random.default_rng(0))
        for place in range(x.size):
            damaged = x.copy()
            damaged.reshape(-1)[place] = bad
            with pytest.raises(InputError, match="expected finite .*, got NaN or infinity - at the input"):
                model(damaged)
        assert_same(model(x), reference.run(graph, x), "after errors")


def test_options_that_do_not_fit(network, tmp_path):
    path = tmp_path / "m.safetensors"
    for threads in (0, -1, 257, 10_000, 1.5, True, "2"):
        with pytest.raises(InputError, match="expected 1 to 256 threads, got .* - at num_threads"):
            qdeploy.load_int_model(path, threads)
    with pytest.raises(InputError, match="expected .*scalar.*, got .*mmx"):
        qdeploy.load_int_model(path, isa="mmx")
    with pytest.raises(InputError, match="expected the name of a node, .*got 'fc' - at taps"):
        network[0](network[2], taps=["fc"])
    with pytest.raises(InputError, match="^expected the name of a node, .*got ndarray - at taps$"):
        network[0](network[2], np.ones((2, 3), np.int64))  # a mask, where there is no text


def run_python(code: str, folder: Path, isa: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, "m.safetensors"]
    environment = {**os.environ, "QDEPLOY_ISA": isa}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ISAS)
def test_environment_chooses_the_isa(network, tmp_path, isa):
    code = "import qdeploy, sys; print(qdeploy.load_int_model(sys.argv[1]).isa)"
    result = run_python(code, tmp_path, isa)
    assert (result.returncode, result.stdout.strip()) == (0, isa)


def test_environment_with_an_isa_that_does_not_exist(network, tmp_path):
    code = "import qdeploy, sys; qdeploy.load_int_model(sys.argv[1])"
    result = run_python(code, tmp_path, "sse9")
    assert result.returncode == 1
    assert "InputError: expected" in result.stderr
    assert "sse9" in result.stderr


def test_predict_needs_scores(tmp_path):
    builder = Builder(np.random.default_rng(0), (2, 3, 3), (0.1, 3))
    builder.table(0)
    save(Graph([builder.member()]), tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="expected a model with one score per class"):
        qdeploy.load_int_model(tmp_path / "m.safetensors").predict(np.zeros((1, 2, 3, 3), np.float32))
    builder = Builder(np.random.default_rng(0), (2,), (0.1, 3))
    builder.linear(0, 1, dtype="f32")
    save(Graph([builder.member()]), tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"two or more scores, got one \(its sign says the class\) - at predict"):
        qdeploy.load_int_model(tmp_path / "m.safetensors").predict(np.zeros((1, 2), np.float32))


def test_the_first_of_equal_scores_is_the_class(tmp_path):
    builder = Builder(np.random.default_rng(0), (2,), (0.1, 3))
    builder.linear(0, 70, dtype="f32")
    for value in builder.nodes[0].constants.values():
        value[3:] = value[3]  # scores from 3 on are equal
        value[:3] = -1
    builder.nodes[0].constants["bias"][3:] = 1000
    graph = Graph([builder.member()])
    save(graph, tmp_path / "m.safetensors")
    for isa in ISAS:
        classes = qdeploy.load_int_model(tmp_path / "m.safetensors", isa=isa).predict(batch(graph, 3, builder.rng))
        assert_same(classes, np.array([3, 3, 3]), isa)


def test_plan_and_profile_name_every_node(network):
    model, graph, x = network
    names = [node.name for node in graph.members[0].nodes]
    plan = model.plan(2)
    assert [step["name"] for step in plan] == names
    assert sum(step["share_of_macs"] for step in plan) == pytest.approx(1)
    assert plan[0]["macs"] == 2 * 24 * 3 * 9 * 12 * 11
    assert [step["bits"] for step in plan if step["bits"]] == [7, 4, 8]
    profile = model.profile(x, rounds=3)
    assert [step["name"] for step in profile] == names
    assert all(step["microseconds"] >= 0 for step in profile)


def test_table_of_ops():
    table = {op.pop("name"): op for op in _engine.ops()}
    assert set(table) == set(OPS)
    assert table["conv2d"] == {
        "version": 1,
        "inputs": (1, 2),
        "output": "requantized",
        "residual": True,
        "reads": ["u8"],
        "writes": ["u8", "s16", "f32"],
        "keys": ["bias", "dilation", "groups", "multiplier", "padding", "stride", "weight"],
        "token_keys": [],
    }
    assert table["max_pool2d"] == {
        "version": 1,
        "inputs": (1, 1),
        "output": "same_grid",
        "residual": False,
        "reads": ["u8"],
        "writes": ["u8"],
        "keys": ["dilation", "kernel", "padding", "stride"],
        "token_keys": [],
    }
    assert (table["table"]["output"], table["table"]["keys"]) == ("table", ["table"])
    assert (table["concat"]["inputs"], table["concat"]["keys"]) == ((2, 65_536), [])


def test_description_of_a_model(network, tmp_path):
    model, graph, _ = network
    assert model.inputs[0]["shape"] == (3, 12, 11)
    assert (model.inputs[0]["scale"], model.inputs[0]["zero_point"]) == (pytest.approx(0.02), 110)
    assert (model.outputs[0]["shape"], model.outputs[0]["dtype"]) == ((10,), "f32")
    assert model.weight_bits == {"conv2d.0": 7, "conv2d.1": 4, "linear.4": 8}
    assert model.nbytes == (tmp_path / "m.safetensors").stat().st_size
    assert (model.num_threads, model.members) == (2, ["net"])
