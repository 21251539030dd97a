"""A table for each channel: format version 4, instruction sets, the GPU, ONNX, and PReLU with a slope per channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builder import Builder, batch
from test_engine import assert_equals_reference
from test_hostile_files import edited, refusal

import qdeploy
from qdeploy import format, reference
from qdeploy.graph import Graph


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "net.safetensors"


def network(shape: tuple[int, ...], dtype: str = "u8") -> Graph:
    net = Builder(np.random.default_rng(len(shape)), shape, (0.02, 110))
    net.table(0, dtype, by_channel=True)
    return Graph([net.member()])


SHAPES = [(1, 1, 1), (3, 5, 7), (65, 2, 33), (9, 31), (1, 4), (70,), (1,)]


@pytest.mark.parametrize("dtype", ["u8", "f32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(path, shape, dtype):
    graph = network(shape, dtype)
    assert format.lowest_version(graph) == 4
    assert_equals_reference(graph, batch(graph, 3, np.random.default_rng(0)), path, (1, 3), (1, 2))


@pytest.mark.parametrize("shape", [(3, 2, 4), (5, 6), (7,)], ids=str)
def test_the_reference_reads_the_row_of_the_channel(shape):
    graph = network(shape)
    table = graph.members[0].nodes[0].constants["table"]
    x = batch(graph, 2, np.random.default_rng(0))
    codes = reference.quantize(x, graph.members[0].tensors[0])
    axis = 1 if len(shape) == 3 else -1
    for index in np.ndindex(codes.shape):
        assert reference.run(graph, x)[index] == table[index[axis]][codes[index]]


def test_in_place_and_behind_a_border(path):
    """Where it may write over its input, and where a convolution reads a border around its output."""
    net = Builder(np.random.default_rng(0), (6, 9, 8), (0.02, 110))
    x = net.table(net.table(0, by_channel=True), by_channel=True)
    net.conv2d(x, 4, (3, 3), padding=(1, 1, 1, 1), dtype="f32")
    graph = Graph([net.member()])
    assert_equals_reference(graph, batch(graph, 3, np.random.default_rng(0)), path)


def set_version(version: str):
    return edited(lambda header: header["__metadata__"].update(format_version=version, requires="0.1.0"))


def test_both_readers_refuse_other_tables(path):
    graph = network((3, 2, 2))
    format.save(graph, path)
    content = path.read_bytes()
    at = "key `table` of node `table.0` of member `net`"
    cases = {"3": "U8 [256], got U8 [3, 256]", "1": "U8 [256], got U8 [3, 256]"}
    for version, text in cases.items():
        path.write_bytes(set_version(version)(content))
        assert (
            refusal(format.load, path)
            == refusal(qdeploy.load_int_model, path)
            == f"expected {text} - at {at} in {path}"
        )
    graph.members[0].nodes[0].constants["table"] = np.zeros((4, 256), np.uint8)
    with pytest.raises(qdeploy.ModelError, match=r"^expected U8 \[3, 256\], got U8 \[4, 256\] - at key `table`"):
        format.dump(graph)


# ---- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4, 3), (6, 5), (7,)], ids=str)
@pytest.mark.parametrize("dtype", ["u8", "f32"])
def test_onnx_gathers_the_same_entries(shape, dtype):
    pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from onnx_nodes import session

    graph = network(shape, dtype)
    tensor, output = graph.members[0].tensors
    x = ((np.random.default_rng(0).integers(0, 256, (2, *shape)) - 110) * tensor.scale).astype(np.float32)
    (found,) = session(qdeploy.to_onnx(graph)).run(None, {"x": x})
    expected = reference.run(graph, x)
    if dtype == "u8":
        expected = np.float32(output.scale) * (expected.astype(np.float32) - output.zero_point)
    assert found.tobytes() == expected.astype(np.float32).tobytes()


# ---- PReLU -----------------------------------------------------------------------------------------------------------


SLOPES = np.array([0.25, -0.5, 0.0, 1.0, 0.1, 2.0], np.float32)


def torch_network(shape: tuple[int, ...]):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6) if len(shape) == 1 else torch.nn.Conv2d(4, 6, 3), torch.nn.PReLU(6))
    net[1].weight.data = torch.from_numpy(SLOPES.copy())
    return net.eval(), torch.randn(32, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(4,), (4, 6, 5)], ids=str)
def test_prelu_of_channels_is_a_table_behind_the_layer(path, shape):
    net, x = torch_network(shape)
    qdeploy.export(net, x[:1], path, x, fallback_bits=8)
    member = format.load(path).members[0]
    assert [node.op for node in member.nodes][1:] == ["table"]
    assert member.nodes[1].constants["table"].shape == (6, 256)
    grid, table = member.tensors[1], member.nodes[1].constants["table"]
    real = grid.scale * (np.arange(256) - grid.zero_point)
    assert np.array_equal(table, np.where(real < 0, SLOPES[:, None] * real, real).astype(np.float32))
    got, want = qdeploy.load_int_model(path)(x.numpy()), net(x).detach().numpy()
    assert np.square(got - want).mean() < 2e-4 * np.square(want).mean()


def test_functions_around_a_prelu_are_in_its_table(path):
    net, x = torch_network((4, 6, 5))
    import torch

    whole = torch.nn.Sequential(*net, torch.nn.Sigmoid(), torch.nn.Conv2d(6, 2, 1))
    qdeploy.export(whole, x[:1], path, x, fallback_bits=8)
    assert [node.op for node in format.load(path).members[0].nodes] == ["conv2d", "table", "conv2d"]
    got, want = qdeploy.load_int_model(path)(x.numpy()), whole(x).detach().numpy()
    assert np.square(got - want).mean() < 1e-3 * np.square(want).mean()


def onnx_network():
    pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    constants = {"w": rng.normal(size=(6, 4, 3, 3)).astype(np.float32), "s": SLOPES.reshape(6, 1, 1)}
    constants["v"] = rng.normal(size=(2, 6, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "conv"),
        helper.make_node("PRelu", ["a", "s"], ["b"], "act"),
        helper.make_node("Conv", ["b", "v"], ["y"], "last"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 6, 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    arrays = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return model, rng.normal(size=(32, 4, 6, 5)).astype(np.float32)


def test_prelu_of_an_onnx_file_and_back(path):
    model, x = onnx_network()
    qdeploy.export(model, None, path, x, fallback_bits=8)
    assert [node.op for node in format.load(path).members[0].nodes] == ["conv2d", "table", "conv2d"]
    from onnx_nodes import session

    (want,) = session(model).run(None, {"x": x})
    got = qdeploy.load_int_model(path)(x)
    assert np.square(got - want).mean() < 1e-3 * np.square(want).mean()
    (quantized,) = session(qdeploy.to_onnx(path)).run(None, {"x": x})
    assert np.corrcoef(quantized.ravel(), got.ravel())[0, 1] > 0.9999
    back = path.with_name("back.safetensors")
    qdeploy.export(qdeploy.to_onnx(path), None, back)
    tables = [format.load(file).members[0].nodes[1].constants["table"] for file in (path, back)]
    assert np.array_equal(*tables)
    assert np.abs(qdeploy.load_int_model(back)(x) - got).max() < 1e-4 * np.ptp(got)
    floats = qdeploy.to_onnx(path, quantized=False)
    assert [node.op_type for node in floats.graph.node if node.op_type in ("PRelu", "Gather")] == ["PRelu"]
    (floating,) = session(floats).run(None, {"x": x})
    assert np.square(floating - want).mean() < 1e-3 * np.square(want).mean()


def test_a_pixel_shuffle_behind_slopes_of_channels_keeps_each_with_its_channel(path):
    """It permutes channels, and such a gather moves through functions that are the same for all of them."""
    torch = pytest.importorskip("torch", reason="it exports: pip install 'qdeploy[train]'")
    nn = torch.nn
    torch.manual_seed(0)
    first, slopes = nn.Conv2d(3, 8, 3), nn.PReLU(8)
    slopes.weight.data = torch.linspace(-1, 1, 8)
    x = torch.randn(16, 3, 6, 6)
    outputs = []
    for net in (nn.Sequential(first, slopes), nn.Sequential(first, slopes, nn.PixelShuffle(2))):
        qdeploy.export(net, x[:1], path, x, fallback_bits=8)
        outputs.append(torch.from_numpy(qdeploy.load_int_model(path)(x.numpy())))
    assert torch.allclose(
        nn.functional.pixel_shuffle(outputs[0], 2), outputs[1], atol=float(outputs[0].abs().max()) / 100
    )
