"""Networks with several outputs: format version 4, what calls return, and both readers' words."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from builder import Builder, arrays, batch, detector, small_detector, small_ensemble, text_batch
from test_engine import assert_equals_reference
from test_format import assert_equal, header_of
from test_hostile_files import edited, refusal

import qdeploy
from qdeploy import cli, format, peers, reference, verification
from qdeploy.errors import InputError, ModelError
from qdeploy.graph import Graph


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "net.safetensors"


def rows_and_scores(variable: bool) -> Graph:
    """Of every token three numbers, of the text two."""
    net = Builder(np.random.default_rng(5), (9,), None)
    x = net.norm(net.position(net.embedding(11, 12), exact=True))
    rows = net.linear(x, 3, dtype="f32")
    scores = net.linear(net.mean(x), 2, dtype="f32")
    return Graph([net.member(outputs=[scores, rows])], vocabulary=11, variable=variable)


# ---- The file --------------------------------------------------------------------------------------------------------


def test_a_file_of_version_4_names_its_outputs(path):
    graph = small_detector()
    format.save(graph, path)
    metadata = header_of(path)["__metadata__"]
    assert (metadata["format_version"], metadata["requires"]) == ("4", "0.1.0")
    member = json.loads(metadata["graph"])["members"][0]
    assert member["outputs"] == [4, 2]
    assert sorted(member) == ["name", "nodes", "outputs", "preprocess_table", "tensors"]
    assert_equal(format.load(path), graph)


def test_one_output_says_nothing_and_keeps_its_version():
    net = Builder(np.random.default_rng(0), (4,), (0.5, 0))
    net.linear(0, 2, dtype="f32")
    content = format.dump(Graph([net.member()]))
    assert b"outputs" not in content and b'"format_version":"1"' in content


def with_outputs(outputs: object):
    return edited(change_graph=lambda graph: graph["members"][0].update(outputs=outputs))


AT = "key `outputs` of member `net` in "
REFUSED = {
    "one": (with_outputs([4]), f"at least 2 entries, got 1 - at {AT}"),
    "none": (with_outputs([]), f"at least 2 entries, got 0 - at {AT}"),
    "null": (with_outputs(None), f"an array, got null - at {AT}"),
    "a number": (with_outputs(4), f"an array, got number - at {AT}"),
    "the same": (with_outputs([4, 4]), f"outputs that differ, got tensor 4 twice - at {AT}"),
    "codes": (with_outputs([4, 3]), f"f32 outputs, got u8 tensor 3 - at {AT}"),
    "the input": (with_outputs([0, 4]), f"f32 outputs, got u8 tensor 0 - at {AT}"),
    "no tensor": (with_outputs([4, 5]), f"an integer in [0, 4], got 5 - at {AT}"),
    "classes": (
        edited(change_graph=lambda graph: graph.update(classes=["a", "b"])),
        "one output for classes, got 2 - at the graph in ",
    ),
    "without": (
        edited(change_graph=lambda graph: graph["members"][0].pop("outputs")),
        "f32 for outputs only, got tensor 2 - at member `net` in ",
    ),
    "version 3": (
        edited(lambda header: header["__metadata__"].update(format_version="3")),
        "no keys but the known ones, got `outputs` - at member `net` in ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_both_readers_refuse_other_outputs(path, name):
    change, text = REFUSED[name]
    format.save(small_detector(), path)
    path.write_bytes(change(path.read_bytes()))
    assert refusal(format.load, path) == refusal(qdeploy.load_int_model, path) == f"expected {text}{path}"


def test_a_version_above_what_the_outputs_need(path):
    net = Builder(np.random.default_rng(0), (4,), (0.5, 0))
    net.linear(0, 2, dtype="f32")
    format.save(Graph([net.member()]), path)
    notes = {"format_version": "4", "requires": "0.1.0"}
    path.write_bytes(edited(lambda header: header["__metadata__"].update(notes))(path.read_bytes()))
    text = f"expected format version 1, the lowest that holds the ops, got 4 - at the graph in {path}"
    assert refusal(format.load, path) == refusal(qdeploy.load_int_model, path) == text


def test_members_of_an_ensemble_have_one_output(path):
    text = "expected one output of a member of an ensemble, got 2 - at member `m1`"
    format.save(small_ensemble(), path)

    def two(graph: dict) -> None:
        member = graph["members"][1]
        member["tensors"].append({**member["tensors"][-1], "name": "more"})
        member["nodes"].append({**member["nodes"][-1], "name": "more", "output": len(member["tensors"]) - 1})
        member["outputs"] = [len(member["tensors"]) - 2, len(member["tensors"]) - 1]

    notes = {"format_version": "4", "requires": "0.1.0"}
    path.write_bytes(edited(lambda header: header["__metadata__"].update(notes), two)(path.read_bytes()))
    assert refusal(format.load, path) == refusal(qdeploy.load_int_model, path) == f"{text} in {path}"


# ---- Results ---------------------------------------------------------------------------------------------------------


def test_heads_of_images(path):
    graph = detector(3)
    assert_equals_reference(graph, batch(graph, 3, np.random.default_rng(0)), path)


@pytest.mark.parametrize("variable", [False, True])
def test_heads_of_texts(path, variable):
    graph = rows_and_scores(variable)
    ids, mask = text_batch(graph, 4, np.random.default_rng(0))
    assert_equals_reference(graph, ids, path, batches=(1, 0, 4), mask=mask)
    if variable:
        output = qdeploy.load_int_model(path)(ids[:, :5].clip(0), mask[:, :5] | (np.arange(5) == 0))
        assert [y.shape for y in output] == [(4, 2), (4, 5, 3)]


def test_large_batches_go_through_chunks(path):
    """More images than run together, with and without each having memory of its own."""
    net = Builder(np.random.default_rng(3), (16, 24, 24), (0.05, 100))
    x = net.conv2d(0, 32, (3, 3), padding=(1, 1, 1, 1))
    outputs = [
        net.conv2d(x, 4, dtype="f32"),
        net.conv2d(net.max_pool2d(x, (2, 2), (2, 2), (0, 0, 0, 0)), 3, dtype="f32"),
    ]
    graph = Graph([net.member(outputs=outputs)])
    format.save(graph, path)
    x = batch(graph, 70, np.random.default_rng(0))
    model = qdeploy.load_int_model(path, 2)
    for got, alone in zip(model(x), zip(*(model(x[i : i + 1]) for i in range(70)), strict=True), strict=True):
        assert got.tobytes() == np.concatenate(alone).tobytes()


def test_a_model_describes_its_outputs_and_has_no_classes(path):
    graph = small_detector()
    format.save(graph, path)
    model = qdeploy.load_int_model(path)
    tensors = [graph.members[0].tensors[i] for i in (4, 2)]
    assert [(o["name"], o["shape"], o["dtype"]) for o in model.outputs] == [(t.name, t.shape, "f32") for t in tensors]
    with pytest.raises(InputError, match=r"^expected a model with one output, got 2 - at predict$"):
        model.predict(batch(graph, 1, np.random.default_rng(0)))
    assert [y.shape for y in model(np.zeros((0, 2, 4, 4), np.float32))] == [(0, 2), (0, 3, 4, 4)]


def test_info_lists_the_outputs(path, capsys):
    format.save(small_detector(), path)
    (member,) = cli.info(argparse.Namespace(file=path))["members"]
    assert [output["shape"] for output in member["outputs"]] == [[2], [3, 4, 4]]
    names = [output["name"] for output in member["outputs"]]
    assert cli.main(["info", str(path)]) == 0
    assert f"outputs {names[0]} [2], {names[1]} [3, 4, 4]\n" in capsys.readouterr().out


def test_verify_compares_every_output(path):
    graph = small_detector()
    format.save(graph, path)
    rows = verification.verify(path, {"f32": (batch(graph, 2, np.random.default_rng(0)),)}, "cpu", lambda text="": None)
    assert {(row["compared"], row["different"]) for row in rows} == {(6, 0)}


def test_a_peer_agrees_as_its_worst_output_does():
    x = np.arange(6.0).reshape(2, 3)
    assert peers.correlation([x, x], [x, -x]) == -1
    assert peers.correlation([x, x * 0], [x, x]) == 1
    assert peers.correlation([x * 0], [x]) is None


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_peer_gives_every_output(name):
    pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
    pytest.importorskip(name, reason=f"{name} is not installed")
    graph = small_detector()
    x = _plain(graph)
    run = getattr(peers, name)(qdeploy.to_onnx(graph).SerializeToString(), x.shape, 1)
    assert [y.shape for y in run(x)] == [(2, 2), (2, 3, 4, 4)]
    assert peers.correlation(reference.run(graph, x), run(x)) > 0.999


# ---- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [True, False])
def test_onnx_has_the_names_and_the_numbers(quantized):
    onnx = pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from onnx_nodes import session

    graph = detector(3)
    scores, _, features, *_ = graph.members[0].outputs
    graph.members[0].tensors[scores].name, graph.members[0].tensors[features].name = "scores", "x"
    model = qdeploy.to_onnx(graph, quantized)
    onnx.checker.check_model(model, full_check=True)
    names = [output.name for output in model.graph.output]
    own = [graph.members[0].tensors[i].name for i in graph.members[0].outputs]
    assert own[0] == "scores" and names == ["x_2" if name == "x" else name for name in own]
    x = _plain(graph)
    for ours, theirs in zip(arrays(reference.run(graph, x)), session(model).run(None, {"x": x}), strict=True):
        assert ours.shape == theirs.shape
        if quantized:  # random tables and clamps are another function without roundings
            assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999


def _plain(graph: Graph) -> np.ndarray:
    tensor = graph.members[0].tensors[0]
    codes = np.random.default_rng(0).integers(0, 256, (2, *tensor.shape))
    return ((codes - tensor.zero_point) * tensor.scale).astype(np.float32)


def test_a_member_with_outputs_of_any_kind_is_refused_before_it_is_written():
    graph = small_detector()
    graph.members[0].outputs = [4]
    with pytest.raises(ModelError, match="expected at least 2 entries, got 1 - at key `outputs` of member `net`"):
        format.dump(graph)
