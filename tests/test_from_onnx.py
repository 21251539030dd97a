"""Networks from ONNX files: those of other tools beside onnxruntime, random ones, and the node tests of ONNX."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import qdeploy
from qdeploy import format, reference
from qdeploy.demo import MODEL
from qdeploy.errors import ExportError, InputError
from qdeploy.exporter import converted as content_of
from qdeploy.exporter.from_onnx import lower
from qdeploy.exporter.layers import Network
from qdeploy.graph import Graph, Member

pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
import onnx
from builder import Builder
from onnx import TensorProto, helper, numpy_helper
from onnx_files import FILES, converted, differences, graph_of, images
from random_graphs import graphs

from qdeploy.onnx import to_onnx

REFUSED = {
    "convnet_ort_dynamic": "DynamicQuantizeLinear (ranges at run time; quantize with static ranges",
    "convnet_ort_u16s8": "activations of 8 bits, u8 or s8, with one scale, got uint16 - at node `x_QuantizeLinear`",
    "convnet_ort_u8u8": "in groups (quantize with signed weights), got more - at node `/depthwise/Conv` (Conv)",
    "convnet_ort_qoperator_u8u8": "(quantize with signed weights), got more - at node `/depthwise/Conv_quant` (Conv)",
    "depthwise_ort_u8u8": "in groups (quantize with signed weights), got more - at node `/net/net.2/Conv` (Conv)",
}
WITH_GAPS = (
    "convnet_modelopt",
    "convnet_nncf_default",
    "convnet_nncf_mixed",
    "convnet_pt2e",
    "resnet_pt2e",
)
QUANTIZED = sorted(path.stem for path in FILES.glob("*.onnx") if path.stem not in (*REFUSED, *WITH_GAPS))


def correlation(member: Member, network: Network, x: np.ndarray) -> float:
    """Of the scores with those of onnxruntime without optimizations."""
    found: list[np.ndarray] = []
    network.source.run(x, {network.outputs[0].value.tensor: found.append})
    return float(np.corrcoef(reference.run(graph_of(member), x).ravel(), found[0].ravel())[0, 1])


@pytest.mark.parametrize("name", QUANTIZED)
def test_each_node_has_the_codes_of_onnxruntime(name: str):
    path, x = FILES / f"{name}.onnx", images(8)
    network, grids, member = converted(path)
    different, count, largest = differences(network, grids, member, x)
    assert largest <= 1 and different <= 1e-4 * count
    assert correlation(member, network, x) > 0.999
    assert content_of(path) == content_of(path.read_bytes()) == format.dump(graph_of(member))


@pytest.mark.parametrize("name", WITH_GAPS)
def test_a_gap_needs_data(name: str):
    """Where the file has no grid onnxruntime computes with real numbers: one code more or less here."""
    path, x = FILES / f"{name}.onnx", images(8)
    with pytest.raises(
        InputError, match=r"^expected calibration data for \d tensors? without a quantizer \(from .* to "
    ):
        content_of(path)
    network, grids, member = converted(path, images(64))
    assert differences(network, grids, member, x)[2] <= 1
    assert correlation(member, network, x) > 0.999


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name: str):
    with pytest.raises(ExportError) as error:
        content_of(FILES / f"{name}.onnx")
    assert REFUSED[name] in str(error.value) and "\n" not in str(error.value)


def test_an_ensemble_that_we_wrote_is_read_back():
    graph = format.load(MODEL)
    graph.members[0].preprocess_table = None
    graph = Graph(graph.members[:1])
    content = content_of(to_onnx(graph, quantized=True))
    x = images(4, graph.input_shape)
    assert np.array_equal(qdeploy.load_int_model(content)(x), reference.run(graph, x))
    assert content_of(to_onnx(format.parse(content, "twice"), quantized=True)) == content


def test_a_path_is_loaded_with_numpy_and_onnx_alone(tmp_path: Path):
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnxruntime"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import qdeploy
assert "onnx" not in sys.modules
import numpy
x = numpy.zeros((2, 3, 12, 12), numpy.float32)
path = {str(FILES / "resnet_ort_qoperator.onnx")!r}
assert qdeploy.load_int_model(path)(x).shape == (2, 10)
report = qdeploy.export(path, None, {str(tmp_path / "net.safetensors")!r})
assert report.top1_agreement is None and "onnxruntime" in str(report), str(report)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


# ---- Random graphs ---------------------------------------------------------------------------------------------------


def varied(model: onnx.ModelProto, draw: Any) -> onnx.ModelProto:
    """The same network in other words: signed activations, zero points of weights or none, clips, negative axes."""
    graph = model.graph
    values = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    nodes: list[onnx.NodeProto] = []

    def constant(value: np.ndarray) -> str:
        name = f"extra{len(graph.initializer)}"
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    signed, clipped, floats = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    signed = signed and not any(node.op_type == "Gather" for node in graph.node)  # a table is of u8 codes
    for node in graph.node:
        if node.op_type == "Clip" and signed and values[node.input[1]].dtype == np.uint8:  # of codes
            node.input[1:] = [constant((values[name].astype(int) - 128).astype(np.int8)) for name in node.input[1:]]
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            nodes.append(node)
            continue
        zero = values[node.input[2]]
        if zero.dtype == np.uint8:
            if signed:
                node.input[2] = constant((zero.astype(int) - 128).astype(np.int8))
            elif zero == 0:
                del node.input[2]
            nodes.append(node)
            if node.op_type == "QuantizeLinear" and clipped:
                low, high = (np.int8(-128), np.int8(127)) if signed else (np.uint8(0), np.uint8(255))
                output = node.output[0]
                node.output[0] = f"{output}_not_clipped"
                nodes.append(helper.make_node("Clip", [node.output[0], constant(low), constant(high)], [output]))
            continue
        codes = values[node.input[0]]
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        for attribute in node.attribute:
            attribute.i = draw(st.sampled_from([attribute.i, attribute.i - codes.ndim]))
        if floats:
            scale = values[node.input[1]]
            along = [-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)]
            real = (codes * (scale if scale.ndim == 0 else scale.reshape(along))).astype(np.float32)
            output = f"{node.output[0]}_quantized_here"
            made = helper.make_node("QuantizeLinear", [constant(real), *node.input[1:]], [output])
            made.attribute.extend(node.attribute)
            nodes.append(made)
            node.input[0] = output
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


@st.composite
def files(draw: st.DrawFn) -> Graph:
    """Graphs as a file has them, without numbers that the exporter takes for 0."""
    graph = format.parse(format.dump(draw(graphs(max_nodes=3, version=2))), "graph")
    for node in graph.members[0].nodes:
        for numbers in (node.constants.get("multiplier", 1), node.attributes.get("residual_multiplier", 1)):
            assume((np.abs(numbers) >= np.finfo(np.float32).tiny).all())
    return graph


@given(files(), st.data())
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_random_graphs_are_read_in_any_wording_and_written_again(graph: Graph, data: st.DataObject):
    model = to_onnx(graph)
    expected = content_of(model)
    assert content_of(varied(model, data.draw)) == expected
    assert content_of(to_onnx(format.parse(expected, "twice"))) == expected


@given(files())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_random_graphs_have_the_codes_of_onnxruntime(graph: Graph):
    nodes = graph.members[0].nodes
    squares = [node for node in nodes if node.op == "mul" and node.inputs[0] == node.inputs[1]]
    assume(all(node.attributes.get("clamp", (0, 255)) == (0, 255) for node in squares))  # a table, with the clamp in it
    tensor = graph.members[0].tensors[0]
    codes = np.random.default_rng(0).integers(0, 256, (2, *tensor.shape))
    x = ((codes - tensor.zero_point) * np.float32(tensor.scale)).astype(np.float32)
    different, count, largest = differences(*converted(to_onnx(graph)), x)
    assert largest <= 1 and different <= 1e-3 * count + 1


def read_again(builder: Builder) -> Member:
    """What is read of the ONNX twin, whose scores are those of the graph but for float32."""
    graph = Graph([builder.member()])
    content = content_of(to_onnx(graph))
    found = format.parse(content, "twice")
    x = images(4, graph.input_shape)
    np.testing.assert_allclose(reference.run(found, x), reference.run(graph, x), rtol=1e-6, atol=1e-6)
    assert content_of(to_onnx(found)) == content
    return found.members[0]


def ops(member: Member) -> list[str]:
    return [node.op for node in member.nodes]


def test_an_average_pool_with_a_factor_by_number_of_elements():
    builder = Builder(np.random.default_rng(0), (3, 5, 4), (0.05, 120))
    x = builder.avg_pool2d(0, (3, 3), (1, 1), (1, 1, 1, 1))
    builder.nodes[0].constants["multiplier"] *= np.linspace(0.5, 2, 9, dtype=np.float32)
    builder.avg_pool2d(x, (5, 4), (1, 1), (0, 0, 0, 0), dtype="f32")
    assert ops(read_again(builder)) == ["avg_pool2d", "avg_pool2d"]


@pytest.mark.parametrize("seed", range(8))
def test_an_average_pool_whose_windows_all_hold_as_many_elements(seed: int):
    """3 of 5: the factor of their mean, in float32, is read back to the same bits."""
    builder = Builder(np.random.default_rng(seed), (3, 1, 3), (0.05, 120))
    builder.avg_pool2d(0, (1, 5), (1, 1), (0, 0, 0, 2), dtype="f32")
    builder.nodes[0].constants["multiplier"] *= np.random.default_rng(seed).normal(size=5).astype(np.float32)
    assert ops(read_again(builder)) == ["avg_pool2d"]


def test_a_max_pool_padded_by_more_than_its_kernel():
    builder = Builder(np.random.default_rng(0), (3, 5, 4), (0.05, 120))
    x = builder.max_pool2d(0, (2, 2), (2, 1), (2, 0, 2, 3), (3, 3))
    builder.avg_pool2d(x, builder.shape(x)[1:], (1, 1), (0, 0, 0, 0), dtype="f32")
    member = read_again(builder)
    assert member.nodes[0].attributes["padding"] == [2, 0, 2, 3]


@pytest.mark.parametrize("op", ["table", "add", "mul"])
def test_a_reshape_before_the_last_real_numbers(op: str):
    builder = Builder(np.random.default_rng(0), (3, 5, 4), (0.05, 120))
    x = builder.reshape(builder.avg_pool2d(0, (2, 2), (1, 1), (0, 0, 0, 0)), (36,))
    y = builder.table(x)
    if op == "table":
        builder.table(y, "f32")
    else:
        getattr(builder, op)(x, y, "f32")
    assert ops(read_again(builder)) == ["avg_pool2d", "reshape", "table", op]


def test_a_resize_is_two_products():
    builder = Builder(np.random.default_rng(0), (3, 5, 4), (0.05, 120))
    x = builder.resize(builder.conv2d(0, 3), (7, 6), (2, 3))
    builder.resize(x, (1, 9), (7, 1), "f32")
    assert ops(read_again(builder)) == ["conv2d", "resize", "resize"]


def test_gathered_rows_keep_their_name():
    builder = Builder(np.random.default_rng(0), (7, 5), (0.05, 120))
    builder.linear(builder.gather(builder.linear(0, 4), "rows", [6, -1, 2, 2]), 3, dtype="f32")
    member = read_again(builder)
    assert [node.name for node in member.nodes] == [node.name for node in builder.nodes]


def test_clamped_codes_beside_others_need_no_table():
    builder = Builder(np.random.default_rng(0), (3, 5, 4), (0.05, 120))
    a = builder.conv2d(0, 4, quantization=(0.1, 10), clamp=(10, 70))
    b = builder.conv2d(0, 2, quantization=(0.1, 10))
    builder.linear(builder.reshape(builder.concat([a, b]), (120,)), 5, dtype="f32")
    member = read_again(builder)
    assert ops(member) == ["conv2d", "conv2d", "concat", "reshape", "linear"]
    assert member.nodes[0].attributes["clamp"] == [10, 70]


def test_codes_below_0_alone_have_their_bits():
    builder = Builder(np.random.default_rng(0), (4, 5, 4), (0.05, 120))
    builder.conv2d(0, 4, (3, 3), groups=2, codes="lowest", dtype="f32")
    builder.nodes[0].constants["multiplier"] = np.abs(builder.nodes[0].constants["multiplier"])
    node = read_again(builder).nodes[0]
    assert node.bits == 8 and node.constants["weight"].max() == -128


def test_nodes_may_be_named_as_inputs_and_outputs_are():
    builder = Builder(np.random.default_rng(0), (3, 5, 4), (0.05, 120))
    builder.conv2d(builder.conv2d(builder.conv2d(builder.conv2d(0, 4), 4), 4), 4, dtype="f32")
    for node, name in zip(builder.nodes, ("x", "y", "ids", "mask"), strict=True):
        node.name = name
    assert [node.name for node in read_again(builder).nodes] == ["x", "y", "ids", "mask"]


# ---- The node tests of ONNX ------------------------------------------------------------------------------------------

IN_SCOPE = {
    "test_qlinearconv",
    *(f"test_qlinearmatmul_2D_{codes}_{real}" for codes in ("int8", "uint8") for real in ("float16", "float32")),
    "test_quantizelinear",
}


def cases() -> dict[str, Any]:
    """The node tests about quantization: all of them are made where their modules are imported."""
    from onnx.backend.test.case import node as nodes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("qlinearconv", "qlinearmatmul", "quantizelinear", "dequantizelinear", "dynamicquantizelinear"):
            import_module(f"onnx.backend.test.case.node.{name}")
        for name in ("convinteger", "matmulinteger"):
            import_module(f"onnx.backend.test.case.node.{name}")
    names = ("quantize", "qlinear", "convinteger", "matmulinteger")
    return {case.name: case for case in nodes._NodeTestCases if any(part in case.name for part in names)}


def bound(case: Any) -> tuple[onnx.ModelProto, np.ndarray, Any]:
    """Everything but the first input as constants, codes as real numbers on their grid, a batch where there is none;
    and what makes the expected codes real."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for opset in model.opset_import:  # the newest, of which these operators have nothing
        opset.version = min(opset.version, 25)
    graph, (inputs, _) = model.graph, case.data_sets[0]
    values = [numpy_helper.to_array(x) if isinstance(x, TensorProto) else np.asarray(x) for x in inputs]
    arrays = dict(zip([x.name for x in graph.input], values, strict=True))
    node, first = graph.node[0], graph.input[0].name
    for value in list(graph.input)[1:]:
        graph.initializer.append(numpy_helper.from_array(arrays[value.name], value.name))
        graph.input.remove(value)

    def real(codes: np.ndarray, names: Any) -> np.ndarray:
        scale, zero = (arrays[name].astype(np.float64) for name in names)
        return ((codes.astype(np.float64) - zero) * scale).astype(np.float32)

    x, scales = arrays[first], list(node.input[1:3])
    if node.op_type.startswith("QLinear"):
        graph.node.insert(0, helper.make_node("QuantizeLinear", ["real", *scales], ["codes"]))
        graph.node[1].input[0] = "codes"
        first, x = "real", real(x, scales)
    end = graph.node[-1]
    quantizer = list(end.input[6:8] if end.op_type.startswith("QLinear") else end.input[1:3])
    graph.node.append(helper.make_node("DequantizeLinear", [end.output[0], *quantizer], ["y_real"]))
    x = x if x.ndim > 1 else x[None]
    del graph.input[:], graph.output[:]
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph.input.append(helper.make_tensor_value_info(first, kind, ["N", *x.shape[1:]]))
    graph.output.append(helper.make_tensor_value_info("y_real", TensorProto.FLOAT, None))
    return model, x, lambda codes: real(codes, quantizer)


def test_node_tests_in_scope_are_equal_and_the_others_are_refused_by_one_line():
    equal, refused = set(), set()
    for name, case in cases().items():
        model, x, real = bound(case)
        try:
            content = content_of(model)
        except (ExportError, InputError) as error:
            assert "\n" not in str(error) and " at " in str(error)
            refused.add(name)
            continue
        got, expected = qdeploy.load_int_model(content)(x), real(np.asarray(case.data_sets[0][1][0]))
        assert np.abs(got.reshape(-1) - expected.reshape(-1)).max() < 1e-5, name
        equal.add(name)
    assert equal == IN_SCOPE
    assert len(refused) >= 37  # later releases of onnx have more


# ---- Networks of others ----------------------------------------------------------------------------------------------

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


@pytest.mark.parametrize("name", ["light_densenet121", "light_squeezenet"])
def test_light_networks_of_opset_9_are_read(name: str):
    """Their weights are made by ConstantOfShape."""
    assert lower(LIGHT / f"{name}.onnx").outputs[0].shape[0] == 1000


@pytest.mark.parametrize("name", ["light_bvlc_alexnet", "light_inception_v1", "light_zfnet512"])
def test_light_networks_with_lrn_are_refused_by_its_name(name: str):
    with pytest.raises(ExportError, match=r"got LRN \(.* are there\) - at nodes `n"):
        lower(LIGHT / f"{name}.onnx")
