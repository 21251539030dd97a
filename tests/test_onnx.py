"""The ONNX twin of a model file computes the same network, in onnxruntime: op by op exactly, as far as float32 goes."""

import numpy as np
import pytest
from builder import Builder, Quantization
from hypothesis import HealthCheck, assume, given, settings
from random_graphs import generators, graphs, quantizations

import qdeploy
from qdeploy import format, reference
from qdeploy.demo import DATA, MODEL
from qdeploy.errors import InputError
from qdeploy.graph import Activation, Graph

pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from qdeploy.onnx import finer, to_onnx
from qdeploy.peers import onnxruntime


def inputs_on_the_grid(activation: Activation, n: int) -> np.ndarray:
    codes = np.random.default_rng(0).integers(0, 256, (n, *activation.shape))
    return ((codes - activation.zero_point) * activation.scale).astype(np.float32)


@given(graphs(max_nodes=1))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.filter_too_much])
def test_one_op_in_float32_rounds_to_our_codes(graph: Graph):
    assume(len(graph.members[0].nodes) == 1)
    try:
        model = to_onnx(graph, quantized=False)
    except InputError:
        assume(False)  # a random table has no float32 twin
    assert_rounds_to_our_codes(graph, model)


def test_residual_in_float32_rounds_to_our_codes():
    builder = Builder(np.random.default_rng(0), (6, 5, 7), (0.02, 100))
    builder.conv2d(0, 6, (3, 3), padding=(1, 1, 1, 1), residual=0, clamp=(20, 255))
    graph = Graph([builder.member()])
    assert_rounds_to_our_codes(graph, to_onnx(graph, quantized=False))


def assert_rounds_to_our_codes(graph: Graph, model) -> None:
    x = inputs_on_the_grid(graph.members[0].tensors[0], 2)
    real = onnxruntime(model.SerializeToString(), x.shape, 1)(x).astype(np.float64)
    ours = reference.run(graph, x)
    output = graph.members[0].output
    if output.dtype == "f32":
        assert np.abs(real - ours).max() <= 1e-5 * np.abs(real).max() + 1e-6
    else:
        codes = np.clip(real / output.scale + output.zero_point, 0, 255)
        assert np.abs(codes - ours).max() <= 0.51


@given(graphs(max_nodes=1))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.filter_too_much])
def test_one_op_in_int8_is_within_a_code(graph: Graph):
    """onnxruntime rounds a bias to whole accumulators, half a code where one of them is a code; and QDQ has no negative
    scales, so that the code -128 of a negative multiplier becomes 127."""
    assume(len(graph.members[0].nodes) == 1)
    assume("residual_multiplier" not in graph.members[0].nodes[0].attributes)
    node = graph.members[0].nodes[0]
    if "weight" in node.constants:
        assume(np.abs(node.constants["multiplier"] / finer(node.constants["weight"])).max() <= 1)
        assume(node.constants["weight"].min() > -128 or node.constants["multiplier"].min() >= 0)
    try:
        model = to_onnx(graph, quantized=True)
    except InputError:
        assume(False)  # a random table has no twin
    assert largest_difference(graph, model) <= 1


def test_a_table_that_is_a_function_is_named():
    builder = Builder(np.random.default_rng(0), (2, 3, 3), (0.1, 0))
    builder.table(0)
    with pytest.raises(InputError) as error:
        to_onnx(Graph([builder.member()]), quantized=False)
    expected = "expected no function but the identity (a table has no float32 twin), got one"
    assert str(error.value) == f"{expected} - at node `{builder.nodes[0].name}` of member `net`"


@given(generators(), quantizations(), quantizations())
@settings(deadline=None, max_examples=30)
def test_residual_in_int8_is_rounded_once_more(rng: np.random.Generator, first: Quantization, second: Quantization):
    """The convolution is rounded before the addition, to steps that cover the range of the output and the residual."""
    builder = Builder(rng, (6, 5, 7), first)
    builder.conv2d(0, 6, (3, 3), padding=(1, 1, 1, 1), bits=7, residual=0, clamp=(20, 255), quantization=second)
    member = builder.member()
    step = 1 + abs(member.nodes[0].attributes["residual_multiplier"])
    graph = Graph([member])
    assert largest_difference(graph, to_onnx(graph, quantized=True)) <= step / 2 + 1


def largest_difference(graph: Graph, model) -> float:
    """In codes of the output; of an f32 output in units of a hundred thousandth of its largest value."""
    x = inputs_on_the_grid(graph.members[0].tensors[0], 2)
    real = onnxruntime(model.SerializeToString(), x.shape, 1)(x).astype(np.float64)
    ours, output = reference.run(graph, x), graph.members[0].output
    if output.dtype == "f32":
        return np.abs(real - ours).max() / (1e-5 * np.abs(real).max() + 1e-6)
    return np.abs(np.rint(np.clip(real / output.scale + output.zero_point, 0, 255)) - ours).max()


@pytest.mark.parametrize("quantized", [False, True])
def test_ensemble_agrees_with_its_twin(quantized):
    """Activations are rounded at other places, so the probabilities are close, not equal; the classes are the same."""
    with np.load(DATA / "digits.npz") as archive:
        images = archive["images"]
    graph = format.load(MODEL)
    mean, std = (np.float32(graph.preprocess[key]) for key in ("mean", "std"))
    x = np.ascontiguousarray(((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2), np.float32)
    ours = qdeploy.load_int_model(MODEL)(images)
    theirs = onnxruntime(to_onnx(graph, quantized).SerializeToString(), x.shape, 1)(x)
    assert np.abs(ours - theirs).max() < 0.02
    assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.97
