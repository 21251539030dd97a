"""Inner codes: a convolution that is rounded to codes and added to a residual in one node, with the bits of two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builder import Builder, batch, sums
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import generators
from test_engine import assert_equals_reference
from test_hostile_files import edited, refusal

import qdeploy
from qdeploy import format, reference
from qdeploy.graph import Activation, Graph, Node


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inner") / "net.safetensors"


def test_every_form_on_every_instruction_set(path):
    graph = sums(0)
    assert format.lowest_version(graph) == 4
    assert_equals_reference(graph, batch(graph, 3, np.random.default_rng(0)), path, (1, 3), (1, 2))


@pytest.mark.parametrize("residual", ["u8", "s16"])
@pytest.mark.parametrize("dtype", ["u8", "s16", "f32"])
def test_depthwise_of_every_type(path, residual, dtype):
    """Few channels, whose neighbouring pixels go together, and rows of more numbers than are made at once."""
    for channels, size in ((8, (4, 9)), (100, (3, 60))):
        net = Builder(np.random.default_rng(channels), (channels, *size), (0.5, 9))
        window = {"kernel": (3, 3), "padding": (1, 1, 1, 1), "groups": channels}
        net.conv2d(0, channels, **window, residual=net.rescale(0, residual), inner=True, dtype=dtype)
        graph = Graph([net.member()])
        assert_equals_reference(graph, batch(graph, 2, np.random.default_rng(0)), path, (2,), (1, 3))


# ---- The same as two nodes -------------------------------------------------------------------------------------------


def in_two_nodes(graph: Graph) -> Graph:
    """The last node as a convolution to codes and an `add` behind it."""
    [member] = graph.members
    *nodes, last = member.nodes
    attributes = dict(last.attributes)
    inner = Activation("inner", member.tensors[last.output].shape, "u8")
    multipliers = [attributes.pop("inner_multiplier"), attributes.pop("residual_multiplier")]
    added = {"multipliers": multipliers, "bias": attributes.pop("inner_bias")}
    added |= {"clamp": attributes.pop("clamp")} if "clamp" in attributes else {}
    attributes["clamp"] = attributes.pop("inner_clamp")
    x, residual = last.inputs
    alone = Node(last.op, last.name, [x], last.output, attributes, last.constants, last.bits)
    add = Node("add", "add", [last.output, residual], last.output + 1, added)
    tensors = [*member.tensors[:-1], inner, member.tensors[-1]]
    return Graph([type(member)(member.name, tensors, [*nodes, alone, add])])


@settings(max_examples=60, deadline=None)
@given(
    rng=generators(),
    channels=st.integers(1, 40),
    kernel=st.sampled_from([1, 3]),
    dtype=st.sampled_from(["u8", "s16", "f32"]),
    exact=st.booleans(),
)
def test_the_bits_are_those_of_two_nodes(path, rng, channels, kernel, dtype, exact):
    net = Builder(rng, (5, 6, 7), (0.05, 77))
    window = {"kernel": (kernel, kernel), "padding": (kernel // 2,) * 4, "exact": exact}
    net.conv2d(0, channels, **window, residual=net.conv2d(0, channels, **window), inner=True, dtype=dtype)
    graph = Graph([net.member()])
    x = batch(graph, 2, rng)
    for one in (graph, in_two_nodes(graph)):
        format.save(one, path)
        assert qdeploy.load_int_model(path)(x).tobytes() == reference.run(graph, x).tobytes()


# ---- Files -----------------------------------------------------------------------------------------------------------

NODE = "node `conv2d.1` of member `net`"
KNOWN = "expected no keys but the known ones, got"
BROKEN = {
    "no clamp": ({"inner_clamp": ...}, f"{KNOWN} `inner_bias` - at {NODE}"),
    "no bias": ({"inner_bias": ...}, f"expected the key `inner_bias`, got none - at {NODE}"),
    "a clamp of nothing": ({"inner_clamp": [9, 8]}, f"expected clamp [lo, hi] with lo <= hi, got [9, 8] - at {NODE}"),
    "no residual": ({"inputs": [0], "residual_multiplier": ...}, f"{KNOWN} `inner_bias` - at {NODE}"),
    "a number that is none": (
        {"inner_multiplier": "2"},
        f"expected a number, got string - at key `inner_multiplier` of {NODE}",
    ),
    "a sum beyond the bound": (
        {"inner_multiplier": 0.0, "inner_bias": 2.0**30},
        f"expected results below 2^30, got up to 1.07e+09 - at {NODE}",
    ),
}


def small() -> Graph:
    net = Builder(np.random.default_rng(1), (3, 4, 4), (0.05, 77))
    net.conv2d(0, 4, residual=net.conv2d(0, 4), inner=True)
    return Graph([net.member()])


@pytest.mark.parametrize("name", BROKEN)
def test_both_readers_name_what_is_wrong(path, name):
    changes, text = BROKEN[name]
    format.save(small(), path)

    def change(graph: dict) -> None:
        node = graph["members"][0]["nodes"][1]
        for key, value in changes.items():
            node[key] = value
        for key in [key for key, value in node.items() if value is ...]:
            del node[key]

    path.write_bytes(edited(change_graph=change)(path.read_bytes()))
    assert refusal(format.load, path) == refusal(qdeploy.load_int_model, path) == f"{text} in {path}"


def test_codes_that_are_added_stay_below_the_bound_of_codes(path):
    """Whatever the output is: an f32 one may be larger."""
    net = Builder(np.random.default_rng(1), (3, 4, 4), (0.05, 77))
    net.conv2d(0, 4, residual=net.conv2d(0, 4), inner=True, dtype="f32")
    graph = Graph([net.member()])
    graph.members[0].nodes[1].constants["bias"][2] = 2.0**30
    with pytest.raises(qdeploy.ModelError, match=r"expected results below 2\^30, got up to .* - at channel 2 of node"):
        format.dump(graph)


def test_an_older_version_has_none(path):
    format.save(small(), path)
    path.write_bytes(edited(lambda header: header["__metadata__"].update(format_version="3"))(path.read_bytes()))
    text = "expected format version 4, the lowest that holds the ops, got 3"
    assert refusal(format.load, path) == refusal(qdeploy.load_int_model, path)
    assert refusal(format.load, path).startswith(text)


# ---- ONNX ------------------------------------------------------------------------------------------------------------


def graph_with_sum(draw: st.DrawFn) -> Graph:
    rng, kernel, channels = draw(generators()), draw(st.sampled_from([1, 3])), draw(st.integers(1, 9))
    net = Builder(rng, (5, 6, 7), (0.05, draw(st.integers(0, 255))))
    window = {"kernel": (kernel, kernel), "padding": (kernel // 2,) * 4}
    x = net.conv2d(0, channels, **window, residual=net.conv2d(0, channels, **window), inner=True)
    net.avg_pool2d(x, (6, 7), (1, 1), (0, 0, 0, 0), dtype="f32")
    return Graph([net.member()])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_onnx_has_a_rounding_before_the_sum_and_is_read_again(data):
    pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
    from qdeploy.exporter import converted

    graph = graph_with_sum(data.draw)
    model = qdeploy.to_onnx(graph)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    content = converted(model)
    found = format.parse(content, "twice")
    assert "inner_clamp" in found.members[0].nodes[-2].attributes
    x = batch(graph, 2, np.random.default_rng(0))
    # A tie may fall to the other side once constants have been through float32.
    np.testing.assert_allclose(reference.run(found, x), reference.run(graph, x), rtol=2e-2, atol=2)
    assert converted(qdeploy.to_onnx(found)) == content


def test_a_factor_behind_the_sum_changes_no_inner_code():
    onnx = pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
    from qdeploy.exporter import converted

    net = Builder(np.random.default_rng(1), (3, 4, 4), (0.05, 77))
    net.conv2d(0, 4, residual=net.conv2d(0, 4), inner=True, dtype="f32")
    model = qdeploy.to_onnx(Graph([net.member()]))
    plain = format.parse(converted(model), "plain")
    last = model.graph.node[-1].output[0]
    for op, name, number in (("Mul", "halves", 0.5), ("Add", "shifted", 3.0)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(number), f"{name}_by"))
        model.graph.node.append(onnx.helper.make_node(op, [last, f"{name}_by"], [name]))
        last = name
    model.graph.output[0].name = last
    found = format.parse(converted(model), "found")
    [*_, before], [*_, after] = plain.members[0].nodes, found.members[0].nodes
    assert "inner_clamp" in after.attributes and after.attributes["inner_clamp"] == before.attributes["inner_clamp"]
    assert after.constants["multiplier"].tobytes() == before.constants["multiplier"].tobytes()
    x = batch(plain, 3, np.random.default_rng(0))
    np.testing.assert_allclose(reference.run(found, x), 0.5 * reference.run(plain, x) + 3, rtol=1e-5, atol=1e-4)


def test_float_onnx_has_the_clamp_of_the_inner_codes(path):
    pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from onnx_nodes import session

    net = Builder(np.random.default_rng(1), (3, 4, 4), (0.05, 77))
    net.conv2d(0, 3, residual=0, inner=True, dtype="f32")
    graph = Graph([net.member()])
    node = graph.members[0].nodes[0]
    node.attributes["inner_clamp"] = [60, 180]
    x = np.float32(0.05) * (np.random.default_rng(0).integers(0, 256, (4, 3, 4, 4)) - 77).astype(np.float32)
    found = session(qdeploy.to_onnx(graph, quantized=False)).run(None, {"x": x})[0]
    step = abs(node.attributes["inner_multiplier"])  # what the rounding may make of a number, twice
    np.testing.assert_allclose(found, reference.run(graph, x), atol=0.51 * step, rtol=1e-4)
