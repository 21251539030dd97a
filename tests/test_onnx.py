"""The ONNX twin of a model file computes the same network: node by node the same codes, but beside their borders."""

import json
import sys

import numpy as np
import pytest
from builder import Builder, batch, small_ensemble, small_network, small_text, text_batch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from random_graphs import ensembles, generators, graphs, texts
from versions import NEWEST

import qdeploy
from qdeploy import format, reference
from qdeploy.cli import main
from qdeploy.demo import DATA, MODEL
from qdeploy.errors import InputError
from qdeploy.graph import Graph, Node
from qdeploy.ops import rows_of_texts

pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
import onnx
from onnx_nodes import node_by_node, session

from qdeploy.onnx import to_onnx
from qdeploy.onnx_nodes.weighted import within

# Of a code: what float32 loses in the widest results, s16 codes, whose 32767 steps leave 2^-9 of one.
FLOAT_ERROR = {"u8": 2e-3, "s16": 2e-2}


def feeds(graph: Graph, rng: np.random.Generator, n: int = 2) -> dict[str, np.ndarray]:
    if graph.vocabulary is None:
        return {"x": batch(graph, n, rng)}
    ids, mask = text_batch(graph, n, rng)
    inputs = {"ids": np.maximum(ids, 0)}
    return inputs if mask is None else inputs | {"mask": mask}


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray], optimized: bool = False) -> np.ndarray:
    return session(model, optimized).run(["y"], inputs)[0]


# ---- Every graph -----------------------------------------------------------------------------------------------------


@given(st.one_of(graphs(version=NEWEST), graphs(version=NEWEST), texts(), ensembles()), generators())
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
def test_node_by_node_our_codes_are_roundings_of_what_onnxruntime_computes(graph: Graph, rng: np.random.Generator):
    model = to_onnx(graph)
    onnx.checker.check_model(model, full_check=True)
    inputs = feeds(graph, rng)
    nodes = {tap(graph, member, node): node for member in graph.members for node in member.nodes}
    found = node_by_node(model, graph, inputs)
    for name, (ours, theirs, unrounded, tensor) in found.items():
        exists = np.ones(ours.shape, bool)
        if "mask" in inputs and not name.endswith("input"):
            exists = rows_that_exist(graph, nodes[name].output, ours.shape, inputs["mask"])
        node = nodes.get(name)
        if node is not None and node.op == "norm" and loses_in_float32(graph, name, node, found):
            continue
        if node is not None and node.op == "conv2d" and len(node.inputs) == 2 and tensor.dtype == "u8":
            step = 1 + abs(node.attributes["residual_multiplier"])
            assert np.abs(ours.astype(int) - theirs)[exists].max(initial=0) <= step / 2 + 1, name
            continue
        assert np.abs(ours.astype(int) - theirs)[exists].max(initial=0) <= 1, name
        # A table's entry, and a weight of attention, may lie on a tie: then both of its roundings are right.
        if unrounded is not None and (node is None or node.op not in ("table", "attention")):
            lo, hi = (-32767, 32767) if tensor.dtype == "s16" else (0, 255)
            if node is not None:
                lo, hi = node.attributes.get("clamp", (lo, hi))
            error = np.abs(np.clip(unrounded, lo, hi) - ours)[exists].max(initial=0)
            assert error <= 0.5 + FLOAT_ERROR[tensor.dtype], name


def loses_in_float32(graph: Graph, name: str, node: Node, found: dict) -> bool:
    """Whether the mean is so far beyond the deviation that sums in float32 lose the latter; ours are of integers."""
    member = next(m for m in graph.members if any(tap(graph, m, other) == name for other in m.nodes))
    source = next((tap(graph, member, other) for other in member.nodes if other.output == node.inputs[0]), None)
    prefix = f"{member.name}/" if graph.combine else ""
    x = found[source or f"{prefix}input"][0].astype(np.float64) - member.tensors[node.inputs[0]].zero_point
    x = np.moveaxis(x, 1, -1) if x.ndim == 4 else x
    groups = node.attributes["groups"]
    x = x.reshape(len(x), -1, groups, x.shape[-1] // groups) if groups else x
    axes = (1, 3) if groups else (-1,)
    return bool((x.mean(axes) ** 2 > 64 * (x.var(axes) + node.attributes["epsilon"])).any())


def tap(graph: Graph, member, node) -> str:
    return f"{member.name}/{node.name}" if graph.combine else node.name


def rows_that_exist(graph: Graph, tensor: int, shape: tuple[int, ...], mask: np.ndarray) -> np.ndarray:
    more = rows_of_texts(graph.members[0])[tensor]
    if more is None:
        return np.ones(shape, bool)
    rows = np.arange(shape[1]) < mask.sum(axis=1)[:, None] + more
    return np.broadcast_to(rows.reshape(*rows.shape, *[1] * (len(shape) - 2)), shape)


@given(graphs(max_nodes=1, version=NEWEST), generators())
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
def test_in_float32_results_round_to_our_codes(graph: Graph, rng: np.random.Generator):
    model = to_onnx(graph, quantized=False)
    onnx.checker.check_model(model, full_check=True)
    node = graph.members[0].nodes[-1]
    if len(graph.members[0].nodes) > 1 or node.op == "table":
        return  # without roundings between them several nodes drift apart
    tensor, output = graph.members[0].tensors[0], graph.members[0].output
    codes = rng.integers(0, 256, (2, *tensor.shape))
    x = ((codes - tensor.zero_point) * tensor.scale).astype(np.float32)
    real, ours = run(model, {"x": x}).astype(np.float64), reference.run(graph, x)
    if output.dtype == "f32":
        assert np.abs(real - ours).max() <= 1e-5 * np.abs(real).max() + 1e-6
    else:
        result = np.clip(real / output.scale + output.zero_point, *node.attributes.get("clamp", (0, 255)))
        assert np.abs(result - ours).max() <= 0.5 + FLOAT_ERROR["u8"]


@pytest.mark.parametrize("quantized", [False, True])
def test_ensemble_agrees_with_its_twin(quantized):
    """Activations are rounded at other places, so the probabilities are close, not equal; the classes are the same."""
    with np.load(DATA / "digits.npz") as archive:
        images = archive["images"]
    graph, ours = format.load(MODEL), qdeploy.load_int_model(MODEL)(images)
    mean, std = (np.float32(graph.preprocess[key]) for key in ("mean", "std"))
    x = np.ascontiguousarray(((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2), np.float32)
    for inputs, u8 in ((x, False), (images, True)):
        theirs = run(qdeploy.to_onnx(MODEL, quantized, u8), {"x": inputs}, optimized=True)
        assert np.abs(ours - theirs).max() < 0.02
        assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.97


def test_padding_of_a_text_changes_nothing():
    graph = small_text()
    model = to_onnx(graph)
    ids, mask = np.array([[3, 1, 4]]), np.ones((1, 3), np.int64)
    padded = {"ids": np.pad(ids, ((0, 0), (0, 4))), "mask": np.pad(mask, ((0, 0), (0, 4)))}
    short = run(model, {"ids": ids, "mask": mask})
    np.testing.assert_allclose(run(model, padded), short, atol=1e-5 * np.abs(short).max())


# ---- Names and notes -------------------------------------------------------------------------------------------------


def test_names_of_nodes_stay():
    for graph in (small_network(), small_ensemble()):
        nodes = {tap(graph, member, node): node for member in graph.members for node in member.nodes}
        written = [node.name for node in to_onnx(graph).graph.node]
        assert {name for name, node in nodes.items() if node.op != "table"} <= set(written)
        assert all(any(other.startswith(f"{name}/") for other in written) for name in nodes)


def test_a_node_may_have_the_name_of_a_role():
    builder = Builder(np.random.default_rng(0), (2, 3, 3), (0.1, 0))
    builder.conv2d(builder.conv2d(0, 2), 2)
    builder.nodes[0].name, builder.nodes[1].name = "a", "a/codes"
    model = to_onnx(Graph([builder.member()]))
    onnx.checker.check_model(model, full_check=True)
    assert {"a", "a/codes", "a/codes_2", "a/codes/codes"} <= {node.name for node in model.graph.node}


def test_notes_of_the_file():
    graph = small_network()
    notes = {entry.key: entry.value for entry in to_onnx(graph).metadata_props}
    assert notes.pop("qdeploy") == qdeploy.__version__
    assert {key: json.loads(text) for key, text in notes.items()} == {
        "classes": graph.classes,
        "preprocess": graph.preprocess,
    }
    assert [entry.key for entry in to_onnx(small_ensemble()).metadata_props] == ["classes", "qdeploy"]


# ---- Tables ----------------------------------------------------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


FUNCTIONS = {
    "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "HardSigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "Sigmoid": sigmoid,
    "Sigmoid Mul": lambda x: x * sigmoid(x),
    "Mul Sigmoid Mul": lambda x: x * sigmoid(1.702 * x),
    "Tanh": np.tanh,
    "LeakyRelu": lambda x: np.where(x < 0, 0.15 * x, x),
    "Elu": lambda x: np.where(x < 0, np.expm1(np.minimum(x, 0)), x),
    "Softplus Tanh Mul": lambda x: x * np.tanh(np.logaddexp(x, 0)),
}


def table_graph(function, grid: tuple[float, int] = (0.03713, 12)) -> Graph:
    builder = Builder(np.random.default_rng(0), (2, 16, 16), (0.04127, 140))
    builder.table(0, quantization=grid)
    tensor, output = builder.tensors
    y = function(tensor.scale * (np.arange(256.0) - tensor.zero_point))
    builder.nodes[0].constants["table"] = np.clip(np.rint(y / output.scale + output.zero_point), 0, 255).astype(
        np.uint8
    )
    return Graph([builder.member()])


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_table_that_is_a_function_is_written_as_one(name, quantized):
    graph = table_graph(FUNCTIONS[name])
    model = to_onnx(graph, quantized)
    quantizing = {"QuantizeLinear", "DequantizeLinear", "Identity"}
    assert [node.op_type for node in model.graph.node if node.op_type not in quantizing] == name.split()
    codes = np.arange(512).reshape(1, 2, 16, 16) % 256
    tensor, output = graph.members[0].tensors
    x = ((codes - tensor.zero_point) * tensor.scale).astype(np.float32)
    ours = reference.run(graph, x)
    for optimized in (False, True):
        theirs = np.clip(np.rint(run(model, {"x": x}, optimized) / output.scale) + output.zero_point, 0, 255)
        np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_table_that_is_none_is_looked_up(quantized):
    builder = Builder(np.random.default_rng(0), (2, 16, 16), (0.1, 3))
    builder.table(0)
    graph = Graph([builder.member()])
    model, output = to_onnx(graph, quantized), graph.members[0].output
    assert {"Cast", "Gather"} <= {node.op_type for node in model.graph.node}
    x = batch(graph, 2, np.random.default_rng(1)) + np.float32(0.01)  # not between two codes
    expected = output.scale * (reference.run(graph, x).astype(np.float32) - output.zero_point)
    np.testing.assert_allclose(run(model, {"x": x}), expected, rtol=1e-6)


# ---- Weights ---------------------------------------------------------------------------------------------------------


@given(generators(), st.sampled_from([1, 3, 6]), st.sampled_from([(-128, 127), (-8, 7)]))
@example(np.random.default_rng(0), 1, (-8, 7))
@settings(deadline=None, max_examples=30)
def test_codes_beyond_the_range_go_with_their_channel_once_more(rng, groups, bounds):
    low, high = bounds
    codes = rng.integers(low, high + 2, (6, 6 // groups, 2, 2)) * rng.choice([-1, 0, 1], (6, 6 // groups, 2, 2))
    kept, index = within(codes, groups, low, high)
    assert low <= kept.min() and kept.max() <= high
    if index is None:
        np.testing.assert_array_equal(kept, codes)
        return
    found = np.zeros((6, 6, 2, 2), np.int64)
    depth = index.size // groups
    for o in range(6):
        group = o // (6 // groups)
        for j, channel in enumerate(index[group * depth : (group + 1) * depth]):
            assert channel // (6 // groups) == group
            found[o, channel] += kept[o, j]
    for o in range(6):
        first = o // (6 // groups) * (6 // groups)
        np.testing.assert_array_equal(found[o, first : first + 6 // groups], codes[o])


@pytest.mark.parametrize("groups", [1, 6])
def test_the_lowest_code_of_a_negative_multiplier_is_exact(groups):
    builder = Builder(np.random.default_rng(0), (6, 5, 7), (0.02, 100))
    builder.conv2d(0, 6, (3, 3), padding=(1, 1, 1, 1), groups=groups, codes="extreme")
    builder.nodes[0].constants["multiplier"] *= -np.sign(builder.nodes[0].constants["multiplier"])
    graph = Graph([builder.member()])
    x = batch(graph, 3, np.random.default_rng(1)) + np.float32(0.001)
    name = builder.nodes[0].name
    ours, _, unrounded, _ = node_by_node(to_onnx(graph), graph, {"x": x})[name]
    assert np.abs(np.clip(unrounded, 0, 255) - ours).max() <= 0.5 + FLOAT_ERROR["u8"]


def test_4_bit_weights_on_request():
    builder = Builder(np.random.default_rng(0), (6, 5, 7), (0.02, 100))
    x = builder.conv2d(0, 6, (3, 3), bits=4)
    builder.conv2d(x, 6, bits=5)
    graph = Graph([builder.member()])
    model = to_onnx(graph, int4=True)
    onnx.checker.check_model(model, full_check=True)
    kinds = {entry.name: onnx.TensorProto.DataType.Name(entry.data_type) for entry in model.graph.initializer}
    assert [kinds[f"{node.name}/weight_codes"] for node in builder.nodes] == ["INT4", "INT8"]
    assert model.opset_import[0].version == 21
    for ours, theirs, _, _ in node_by_node(model, graph, {"x": batch(graph, 3, np.random.default_rng(1))}).values():
        assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_a_channel_without_weights_keeps_its_bias():
    """Its scale is free, and runtimes round the bias to steps of it."""
    builder = Builder(np.random.default_rng(0), (4, 5, 7), (0.02, 100))
    builder.conv2d(0, 6, (3, 3))
    builder.nodes[0].constants["multiplier"][:3] = 0
    builder.nodes[0].constants["weight"][3] = 0
    graph = Graph([builder.member()])
    found = node_by_node(to_onnx(graph), graph, {"x": batch(graph, 3, np.random.default_rng(1))}, optimized=True)
    ours, theirs, _, _ = found[builder.nodes[0].name]
    np.testing.assert_array_equal(theirs[:, :4], ours[:, :4])


# ---- Raw images ------------------------------------------------------------------------------------------------------


def test_raw_images_get_the_codes_of_the_table():
    graph = small_network()
    rng = np.random.default_rng(0)
    channels, height, width = graph.input_shape
    images = rng.integers(0, 256, (50, height, width, channels), np.uint8)
    ours, theirs, _, _ = node_by_node(to_onnx(graph, u8=True), graph, {"x": images})["input"]
    np.testing.assert_array_equal(theirs, ours)


# ---- The command and bad input ---------------------------------------------------------------------------------------


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command(tmp_path, capsys):
    out = tmp_path / "demo.onnx"
    code, said, _ = command(capsys, MODEL, "--out", out)
    model = onnx.load(out)
    assert code == 0
    assert said == f"{out}: {out.stat().st_size:,} bytes, {len(model.graph.node):,} nodes, opset 17\n"
    assert model == to_onnx(MODEL)
    assert command(capsys, MODEL, "--out", out, "--float", "--u8")[0] == 0
    assert onnx.load(out) == to_onnx(MODEL, quantized=False, u8=True)
    assert command(capsys, MODEL, "--out", out, "--int4", "--json")[0] == 0
    assert onnx.load(out) == to_onnx(MODEL, int4=True)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["m.safetensors", "--out", "m.bin", "--u8"],
            "expected an ONNX file as --out with --u8, got runs of qdeploy train - at --u8",
        ),
        (
            ["m.onnx", "--out", "m.bin", "--images", "3"],
            "expected runs of qdeploy train with --images, got an ONNX file as the source - at --images",
        ),
        (
            [MODEL, "--out", "m.onnx", "--bits", "7"],
            "expected runs of qdeploy train or an ONNX file as the source with --bits, got an ONNX file as --out"
            " - at --bits",
        ),
        (
            ["m.safetensors", "n.safetensors", "--out", "m.onnx"],
            "expected one source with an ONNX file as --out, got 2 - at the command line",
        ),
        (
            ["plain", "--out", "m.onnx", "--u8"],
            "expected a model with `preprocess` for u8 images, got one without - at u8",
        ),
        (
            [MODEL, "--out", "m.onnx", "--int4", "--float"],
            "expected no float32 graph for 4-bit codes, got one - at int4",
        ),
        (
            [MODEL, "--out", "m.onnx", "--html", "x"],
            "expected a model file as --out with --html, got an ONNX file as --out - at --html",
        ),
    ],
)
def test_command_refuses(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    format.save(small_ensemble(), tmp_path / "plain")
    assert command(capsys, *arguments) == (2, "", f"qdeploy: error: {text}\n")
    assert not (tmp_path / "m.onnx").exists()


def test_without_onnx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError) as error:
        to_onnx(MODEL)
    expected = "expected the package onnx (pip install 'qdeploy[onnx]'), got none"
    assert str(error.value) == f"{expected} - at this Python environment"


def test_constants_beyond_float32_are_named():
    builder = Builder(np.random.default_rng(0), (3,), (2.0**-126, 0))
    builder.linear(0, 2, quantization=(2.0**126, 0))
    with pytest.raises(InputError) as error:
        to_onnx(Graph([builder.member()]))
    assert str(error.value) == "expected constants within float32, got beyond - at node `linear.0` of member `net`"


def test_every_scale_of_a_grid_is_positive():
    for graph in (small_network(), small_text()):
        model = to_onnx(graph)
        constants = {entry.name: entry for entry in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                assert onnx.numpy_helper.to_array(constants[node.input[1]]).min() > 0, node.name
