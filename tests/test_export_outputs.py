"""Networks with several outputs, exported: their order and names, outputs that are read inside as well, the report."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

import qdeploy
from qdeploy import ExportError, InputError, export, export_ensemble, format
from qdeploy.exporter import check

torch.set_num_threads(1)
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Heads = namedtuple("Heads", "boxes scores")


class Detector(nn.Module):
    """Boxes for each pixel, scores of the image, features; `shown` is what forward returns of the three."""

    def __init__(self, shown):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.boxes, self.scores, self.shown = nn.Conv2d(8, 4, 1), nn.Linear(8, 5), shown

    def forward(self, x):
        features = self.body(x)
        return self.shown(self.boxes(features), self.scores(features.mean((2, 3))), features)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def exported(shown, path, **options):
    net = Detector(shown).eval()
    report = export(net, X[:1], path, X, fallback_bits=8, **options)
    return net, report, qdeploy.load_int_model(path)


def close(got, expected):
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert np.square(got - expected).mean() < 1e-3 * np.square(expected).mean()


KINDS = {
    "tuple": (lambda b, s, f: (b, s), ["boxes", "scores"], []),
    "list": (lambda b, s, f: [s, b], ["scores", "boxes"], []),
    "nested": (lambda b, s, f: ([s], (b, None)), ["scores", "boxes"], []),
    "dict": (lambda b, s, f: {"classes": s, "where": b}, ["classes", "where"], ["classes, where"]),
    "namedtuple": (lambda b, s, f: Heads(b, s), ["boxes", "scores"], ["boxes, scores"]),
    "dict of lists": (lambda b, s, f: {"z": [s], "a": [b, f]}, ["z.0", "a.0", "a.1"], ["z.0, a.0, a.1"]),
}


@pytest.mark.parametrize("name", KINDS)
def test_outputs_keep_their_order_and_names(name, path):
    shown, names, order = KINDS[name]
    net, report, model = exported(shown, path)
    assert [output["name"] for output in model.outputs] == names
    assert report.notes == [f"outputs in this order: {text}" for text in order]
    with torch.no_grad():
        expected = [y.numpy() for y in torch.utils._pytree.tree_leaves(net(X)) if y is not None]
    output = model(X.numpy())
    assert isinstance(output, list)
    for got, want in zip(output, expected, strict=True):
        close(got, want)


def test_an_output_that_is_read_inside_is_written_from_its_codes(path):
    net, report, model = exported(lambda b, s, f: (f, b), path)
    nodes = [(node.op, node.name) for node in format.load(path).members[0].nodes]
    assert nodes == [("conv2d", "body.0"), ("conv2d", "boxes"), ("table", "output")]
    features, codes = model(X.numpy(), taps=["body.0"])[0][0], model(X.numpy(), taps=["body.0"])[1]["body.0"]
    grid = format.load(path).members[0].tensors[1]
    assert np.array_equal(features, (np.float32(grid.scale) * (codes.astype(np.float32) - grid.zero_point)))


def test_the_same_tensor_twice_is_two_outputs(path):
    model = exported(lambda b, s, f: (s, s), path)[2]
    first, second = model(X.numpy())
    assert np.array_equal(first, second) and [o["name"] for o in model.outputs] == ["output", "output#2"]


@pytest.mark.parametrize("behind_a_sum", [False, True])
def test_an_output_of_16_bits_keeps_them(behind_a_sum, path):
    """What a norm reads as well, or reads behind a sum, is a stream of s16, which no table reads."""

    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 8)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            stream = self.first(x)
            return stream, self.head(self.norm(stream + self.second(x) if behind_a_sum else stream))

    net, x = Stream().eval(), torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(1))
    export(net, x[:1], path, x, fallback_bits=8)
    member = format.load(path).members[0]
    nodes = [(node.op, member.tensors[node.output].dtype) for node in member.nodes]
    linear = [("linear", "s16")] * (1 + behind_a_sum)
    assert nodes == [*linear, ("norm", "u8"), ("linear", "f32"), ("rescale", "f32")]
    for got, want in zip(qdeploy.load_int_model(path)(x.numpy()), net(x), strict=True):
        close(got, want.detach().numpy())


def test_the_report_says_what_is_worst(path):
    _, report, _ = exported(lambda b, s, f: (b, s), path)
    rows = {layer.name: layer.sqnr_db for layer in report.layers}
    assert report.output_sqnr_db == min(rows["boxes"], rows["scores"])
    assert report.top1_agreement is not None and "top-1 agreement" in str(report)
    report = exported(lambda b, s, f: (b, f), path)[1]
    assert report.top1_agreement is None  # no output has scores
    assert f"\noutput SQNR {report.output_sqnr_db:.1f} dB\n" in str(report)


def test_what_needs_one_output_says_so(path):
    two = Detector(lambda b, s, f: (b, s))
    with pytest.raises(InputError, match=r"^expected a network with one output, got 2 - at classes$"):
        export(two, X[:1], path, X, fallback_bits=8, classes=["a", "b"])
    with pytest.raises(InputError, match=r"^expected a network with one output, got 2 - at export_ensemble$"):
        export_ensemble([two, two], X[:1], path, X, fallback_bits=8)
    with pytest.raises(ExportError, match=r"^expected an output that depends on the input, got a constant - at the ne"):
        export(Detector(lambda b, s, f: (b, torch.ones(2))), X[:1], path, X, fallback_bits=8)
    assert not path.exists()
    check(two, X[:1])


# ---- ONNX ------------------------------------------------------------------------------------------------------------


def onnx_file(ends, outputs):
    """A convolution `c`, then these nodes."""
    pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(4, 3, 3, 3)), "v": rng.normal(size=(2, 4, 1, 1)), "m": rng.normal(size=(4, 5))}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["c"]),
        helper.make_node("Conv", ["c", "v"], ["where"], "boxes"),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["scores"], "head"),
        *(helper.make_node(op, [source], [name]) for op, source, name in ends),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])
    ys = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    arrays = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", [x], ys, arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.mark.parametrize("outputs", [["where", "scores"], ["scores", "c", "where"]])
def test_outputs_of_an_onnx_file(outputs, path):
    model = onnx_file([], outputs)
    export(model, None, path, X.numpy(), fallback_bits=8)
    loaded = qdeploy.load_int_model(path)
    assert [output["name"] for output in loaded.outputs] == outputs

    from onnx_nodes import session

    for got, want in zip(loaded(X.numpy()), session(model).run(outputs, {"x": X.numpy()}), strict=True):
        close(got, want)


def test_probabilities_beside_their_scores_are_one_output(path):
    model = onnx_file([("Softmax", "scores", "probabilities")], ["probabilities", "scores", "where"])
    report = export(model, None, path, X.numpy(), fallback_bits=8)
    loaded = qdeploy.load_int_model(path)
    assert [output["name"] for output in loaded.outputs] == ["probabilities", "where"]
    assert report.notes[:2] == [
        "Softmax at the end dropped: the output is what it reads - at node `probabilities`",
        "output `scores` dropped: it would be `probabilities` once more",
    ]


def test_outputs_go_out_and_come_back(path):
    from qdeploy import to_onnx

    model = onnx_file([], ["scores", "where"])
    export(model, None, path, X.numpy(), fallback_bits=8)
    out = to_onnx(path)
    assert [output.name for output in out.graph.output] == ["scores", "where"]
    back = path.with_name("back.safetensors")
    export(out, None, back, X.numpy(), fallback_bits=8)
    for got, want in zip(qdeploy.load_int_model(back)(X.numpy()), qdeploy.load_int_model(path)(X.numpy()), strict=True):
        assert np.abs(got - want).max() < 1e-4 * np.ptp(want)


def test_more_outputs_than_any_network_has():
    names = [f"y{i}" for i in range(257)]
    model = onnx_file([("Identity", "scores", name) for name in names], names)
    with pytest.raises(ExportError, match=r"^expected one input and 1 to 256 outputs, got 1 \(`x`\) and 257 \(`y0`, "):
        export(model, None, "none", X.numpy(), fallback_bits=8)
