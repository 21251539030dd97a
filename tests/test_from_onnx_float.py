"""Operators of float ONNX files: each as a network of its own, calibrated, beside onnxruntime; and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qdeploy
from qdeploy import cli, reference
from qdeploy.errors import ExportError, InputError
from qdeploy.exporter import converted
from qdeploy.exporter.emit import emit
from qdeploy.exporter.from_onnx import lower
from qdeploy.exporter.fusion import fuse
from qdeploy.exporter.grid import Grid
from qdeploy.graph import Graph

pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_files import FILES, images

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def network(
    nodes: list[tuple[str, list[str], str, dict[str, Any]]],
    constants: dict[str, Any],
    shape: tuple[int, ...] = (8, 9, 7),
    opset: int = 18,
    batch: Any = "N",
) -> onnx.ModelProto:
    made = [helper.make_node(op, inputs, outputs.split(), **attributes) for op, inputs, outputs, attributes in nodes]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    arrays = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(made, "g", [x], [y], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def one(op: str, *more: Any, **attributes: Any) -> tuple[list, dict[str, Any]]:
    """A network of one operator that reads x and constants."""
    constants = {f"c{i}": value for i, value in enumerate(more) if value is not None}
    names = ["x", *("" if value is None else f"c{i}" for i, value in enumerate(more))]
    return [(op, names, "y", attributes)], constants


POSITIVE = np.abs(normal(8)) + 0.5
FUNCTIONS = """Sigmoid HardSigmoid HardSwish Tanh Erf Softplus Softsign Mish Elu Selu Celu LeakyRelu ThresholdedRelu
    Exp Abs Sign Neg Relu Sin Cos Atan""".split()
JUMPING = ("Sign", "ThresholdedRelu")  # half a code beside a jump is all of it
NETWORKS: dict[str, tuple[list, dict[str, Any]]] = {
    **{name: one(name) for name in FUNCTIONS},
    "Conv": one("Conv", normal(6, 8, 3, 2), normal(6), pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2]),
    "Conv SAME_UPPER": one("Conv", normal(6, 8, 3, 2), auto_pad="SAME_UPPER", strides=[2, 2]),
    "Conv SAME_LOWER": one("Conv", normal(6, 8, 3, 2), auto_pad="SAME_LOWER"),
    "Conv depthwise": one("Conv", normal(16, 1, 3, 3), group=8),
    "Conv 1d": (
        [
            ("Reshape", ["x", "r"], "a", {}),
            ("Conv", ["a", "w"], "b", {"pads": [1, 1], "strides": [2]}),
            ("Flatten", ["b"], "y", {}),
        ],
        {"r": ints(0, 8, 63), "w": normal(5, 8, 3)},
    ),
    "ConvTranspose": one("ConvTranspose", normal(8, 6, 3, 2), normal(6), strides=[3, 2]),
    "ConvTranspose SAME": one("ConvTranspose", normal(8, 5, 2, 2), strides=[2, 2], auto_pad="SAME_UPPER"),
    "ConvTranspose of a size": one("ConvTranspose", normal(8, 5, 2, 2), strides=[2, 2], output_shape=[18, 14]),
    "ConvTranspose 1d": (
        [
            ("Reshape", ["x", "r"], "a", {}),
            ("ConvTranspose", ["a", "w"], "b", {"strides": [3]}),
            ("Flatten", ["b"], "y", {}),
        ],
        {"r": ints(0, 8, 63), "w": normal(8, 5, 3)},
    ),
    "Gemm": (
        [("Flatten", ["x"], "a", {}), ("Gemm", ["a", "w", "c"], "y", {"alpha": 0.5, "beta": 2.0})],
        {"w": normal(504, 5), "c": normal(5)},
    ),
    "Gemm transB": (
        [("Flatten", ["x"], "a", {}), ("Gemm", ["a", "w", "c"], "y", {"transB": 1})],
        {"w": normal(5, 504), "c": normal(1, 5)},
    ),
    "MatMul": (
        [
            ("GlobalAveragePool", ["x"], "p", {}),
            ("Squeeze", ["p", "a"], "q", {}),
            ("MatMul", ["q", "w"], "m", {}),
            ("Add", ["m", "c"], "y", {}),
        ],
        {"a": ints(2, 3), "w": normal(8, 5), "c": normal(5)},
    ),  # fmt: skip
    "MatMul of tokens": (
        [
            ("Reshape", ["x", "r"], "a", {}),
            ("Transpose", ["a"], "t", {"perm": [0, 2, 1]}),
            ("MatMul", ["t", "w"], "y", {}),
        ],
        {"r": ints(0, 8, -1), "w": normal(8, 5)},
    ),  # fmt: skip
    "BatchNormalization": one("BatchNormalization", normal(8), normal(8), normal(8), POSITIVE),
    "BatchNormalization of codes": (
        [
            ("DequantizeLinear", ["g", "gs", "gz"], "gain", {}),
            ("DequantizeLinear", ["b", "bs"], "shift", {}),
            ("BatchNormalization", ["x", "gain", "shift", "m", "v"], "y", {}),
        ],
        {
            **{"g": np.arange(-4, 4, dtype=np.int8), "gs": np.float32(0.3), "gz": np.int8(1)},
            **{"b": np.arange(8, dtype=np.int32), "bs": np.float32(0.1), "m": normal(8), "v": POSITIVE},
        },
    ),
    "InstanceNormalization": one("InstanceNormalization", normal(8), normal(8)),
    "Add a constant": one("Add", normal(8, 1, 1)),
    "Sub a constant": one("Sub", np.float32(0.3)),
    "Mul by a constant": one("Mul", normal(1, 8, 1, 1)),
    "Div by a constant": one("Div", POSITIVE.reshape(8, 1, 1)),
    "Clip": one("Clip", np.float32(-0.5), np.float32(0.9)),
    "Pow": one("Pow", np.float32(2)),
    "PRelu": one("PRelu", np.full((1,), 0.2, np.float32)),
    "Max": one("Max", np.float32(0.1)),
    "MaxPool": one("MaxPool", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1]),
    "MaxPool ceil": one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "AveragePool": one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "AveragePool with padding": one("AveragePool", kernel_shape=[3, 2], pads=[1, 1, 1, 1], count_include_pad=1),
    "AveragePool ceil": one("AveragePool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    "GlobalMaxPool": one("GlobalMaxPool"),
    "ReduceMean": one("ReduceMean", ints(2, 3), keepdims=0),
    "ReduceMax": one("ReduceMax", ints(-1, -2)),
    "ReduceSum": one("ReduceSum", ints(2, 3)),
    "Pad": one("Pad", ints(0, 0, 1, 2, 0, 0, 3, 0)),
    "Pad reflect": one("Pad", ints(0, 0, 1, 2, 0, 0, 2, 1), mode="reflect"),
    "DepthToSpace": one("DepthToSpace", blocksize=2),
    "DepthToSpace CRD": one("DepthToSpace", blocksize=2, mode="CRD"),
    "SpaceToDepth": (
        [("Slice", ["x", "from", "to", "axes"], "a", {}), ("SpaceToDepth", ["a"], "y", {"blocksize": 2})],
        {"from": ints(0, 0), "to": ints(8, 6), "axes": ints(2, 3)},
    ),
    "Slice": one("Slice", ints(2), ints(6), ints(1)),
    "Split": (
        [("Split", ["x", "s"], "a b", {"axis": 1}), ("Sigmoid", ["a"], "c", {}), ("Mul", ["b", "c"], "y", {})],
        {"s": ints(4, 4)},
    ),
    "residual": (
        [
            ("Relu", ["x"], "a", {}),
            ("Conv", ["a", "w"], "b", {}),
            ("Add", ["b", "a"], "c", {}),
            ("Relu", ["c"], "y", {}),
        ],
        {"w": normal(8, 8, 1, 1)},
    ),  # fmt: skip
    "SiLU": ([("Sigmoid", ["x"], "a", {}), ("Mul", ["x", "a"], "y", {})], {}),
    "gate": (
        [("GlobalAveragePool", ["x"], "a", {}), ("HardSigmoid", ["a"], "b", {}), ("Mul", ["x", "b"], "y", {})],
        {},
    ),
    "concatenation": (
        [("Relu", ["x"], "a", {}), ("Concat", ["a", "x"], "b", {"axis": -3}), ("Dropout", ["b"], "y", {})],
        {},
    ),
    "concatenation of vectors": (
        [
            ("GlobalAveragePool", ["x"], "a", {}),
            ("Flatten", ["a"], "b", {}),
            ("GlobalMaxPool", ["x"], "c", {}),
            ("Flatten", ["c"], "d", {}),
            ("Concat", ["b", "d"], "y", {"axis": 1}),
        ],
        {},
    ),
    "shape computed": (
        [
            ("Shape", ["x"], "s", {}),
            ("Gather", ["s", "zero"], "n", {}),
            ("Unsqueeze", ["n", "zeros"], "n1", {}),
            ("Concat", ["n1", "rest"], "r", {"axis": 0}),
            ("Reshape", ["x", "r"], "a", {}),
            ("Gemm", ["a", "w"], "y", {}),
        ],
        {"zero": np.int64(0), "zeros": ints(0), "rest": ints(-1), "w": normal(504, 4)},
    ),
}

TWO = [("Sigmoid", ["x"], "a", {}), ("Conv", ["x", "w"], "b", {})]  # two tensors, neither a function of the other
NETWORKS |= {
    **{name: (TWO + [(name, ["a", "b"], "y", {})], {"w": normal(8, 8, 1, 1)}) for name in ("Add", "Sub", "Mul")},
    "Sum": (
        [*TWO, ("Relu", ["b"], "c", {}), ("Sum", ["a", "b", "x", "c"], "y", {})],
        {"w": normal(8, 8, 1, 1)},
    ),
    "Sum with a constant": (
        [*TWO, ("Sum", ["one", "a", "b"], "y", {})],
        {"w": normal(8, 8, 1, 1), "one": np.float32([1])},
    ),
    "Sum of one": ([("Sum", ["x"], "a", {}), ("Relu", ["a"], "y", {})], {}),
    "Sub from a constant": ([("Sub", ["c", "x"], "y", {})], {"c": normal(8, 1, 1)}),
    "Div of functions": ([("Exp", ["x"], "a", {}), ("Div", ["x", "a"], "y", {})], {}),
    "Div of a constant": ([("Exp", ["x"], "a", {}), ("Div", ["c", "a"], "y", {})], {"c": np.float32(2)}),
    **{f"{name} of positive numbers": ([("Exp", ["x"], "a", {}), (name, ["a"], "y", {})], {})
       for name in ("Log", "Sqrt", "Reciprocal")},
    **{f"{name} of many": ([("Mul", ["x", "c"], "a", {}), (name, ["a"], "y", {})], {"c": np.float32(30)})
       for name in ("Floor", "Ceil", "Round")},
    "Shrink": one("Shrink", lambd=0.3, bias=0.3),
    "Min": one("Min", np.float32(0.4)),
    "Clip without a bound": one("Clip", None, np.float32(0.9)),
    "GlobalAveragePool": one("GlobalAveragePool"),
    "ReduceMean of channels": one("ReduceMean", ints(1)),
    "Transpose that moves nothing": (
        [("GlobalAveragePool", ["x"], "a", {}), ("Transpose", ["a"], "y", {"perm": [0, 1, 3, 2]})],
        {},
    ),
    "Squeeze and Unsqueeze": (
        [
            ("GlobalAveragePool", ["x"], "a", {}),
            ("Squeeze", ["a"], "b", {}),
            ("Unsqueeze", ["b", "axis"], "c", {}),
            ("Identity", ["c"], "d", {}),
            ("Cast", ["d"], "y", {"to": TensorProto.FLOAT}),
        ],
        {"axis": ints(2)},
    ),
    "LayerNormalization of channels": (
        [
            ("Transpose", ["x"], "a", {"perm": [0, 2, 3, 1]}),
            ("LayerNormalization", ["a", "g", "b"], "c", {"axis": -1}),
            ("Transpose", ["c"], "y", {"perm": [0, 3, 1, 2]}),
        ],
        {"g": normal(8), "b": normal(8)},
    ),
    "Expand": (
        [("GlobalAveragePool", ["x"], "a", {}), ("Expand", ["a", "s"], "b", {}), ("Mul", ["b", "x"], "y", {})],
        {"s": ints(1, 8, 9, 7)},
    ),
    "Tile": ([("GlobalAveragePool", ["x"], "a", {}), ("Tile", ["a", "t"], "y", {})], {"t": ints(1, 2, 1, 3)}),
    "Resize nearest": one("Resize", None, np.float32([1, 1, 2, 3])),
    "Resize linear": one("Resize", None, None, ints(5, 13), mode="linear", axes=[2, 3]),
    "Resize cubic": one("Resize", None, np.float32([2, 0.7]), mode="cubic", axes=[2, 3], exclude_outside=1),
}  # fmt: skip
OLD: dict[str, tuple[int, list, dict[str, Any]]] = {  # of an opset of their own
    "ReduceMean by attribute": (13, *one("ReduceMean", axes=[2, 3], keepdims=0)),
    "ReduceMax by attribute": (17, *one("ReduceMax", axes=[3])),
    "Clip by attributes": (7, *one("Clip", min=-0.5, max=0.9)),
    "Pad by attributes": (7, *one("Pad", pads=[0, 0, 1, 2, 0, 0, 3, 0])),
    "Slice by attributes": (7, *one("Slice", starts=[2], ends=[6], axes=[1])),
    "Squeeze by attributes": (
        9,
        [("GlobalAveragePool", ["x"], "a", {}), ("Squeeze", ["a"], "y", {"axes": [2, 3]})],
        {},
    ),
    "Upsample": (9, *one("Upsample", np.float32([1, 1, 2, 1]))),
    "Upsample by attribute": (7, *one("Upsample", scales=[1.0, 1.0, 2.0, 1.0], mode="linear")),
    "Resize 10": (10, *one("Resize", np.float32([1, 1, 0.5, 1.5]))),
    "Gelu": (20, *one("Gelu")),
    "Gelu by tanh": (20, *one("Gelu", approximate="tanh")),
    "GroupNormalization": (21, *one("GroupNormalization", normal(8), normal(8), num_groups=4)),
    "GroupNormalization of groups": (18, *one("GroupNormalization", normal(4), normal(4), num_groups=4)),
}


def decibels(nodes: list, constants: dict[str, Any], path: Path, opset: int = 18) -> float:
    """Of 8 bits beside onnxruntime."""
    report = qdeploy.export(network(nodes, constants, opset=opset), None, path, images(32, (8, 9, 7)), fallback_bits=8)
    assert report.images == 32
    return math.inf if report.output_sqnr_db is None else report.output_sqnr_db


@pytest.mark.parametrize("name", NETWORKS)
def test_an_operator_is_that_of_onnxruntime(name: str, tmp_path: Path):
    assert decibels(*NETWORKS[name], tmp_path / "net.safetensors") > (15 if name in JUMPING else 28)


@pytest.mark.parametrize("name", OLD)
def test_an_operator_of_another_opset_is_that_of_onnxruntime(name: str, tmp_path: Path):
    opset, nodes, constants = OLD[name]
    assert decibels(nodes, constants, tmp_path / "net.safetensors", opset) > 28


COORDINATES = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric", "align_corners", "asymmetric")


@pytest.mark.parametrize("sizes", [[2, 8, 4, 13], [2, 8, 1, 10]])
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_a_resize_reads_the_places_that_onnxruntime_reads(mode: str, coordinates: str, sizes: list[int]):
    import onnxruntime

    rounding = "round_prefer_ceil" if coordinates == "half_pixel" else "floor"
    attributes = {"mode": mode, "coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
    model = network(*one("Resize", None, None, ints(*sizes), **attributes), opset=19)
    x = np.rint(images(2, (8, 9, 7)) * 20) / 8  # on the grid below
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    net = fuse(lower(model))
    graph = Graph([emit("net", net, dict.fromkeys(net.layers, Grid(0.125, 128)))])
    np.testing.assert_allclose(reference.run(graph, x), expected, atol=0.01 * np.abs(x).max())


@pytest.mark.parametrize(
    ("attributes", "sizes", "text"),
    [
        ({"mode": "cubic", "antialias": 1}, (2, 8, 4, 4), "a resize that is nearest, linear or cubic, got antialias"),
        ({"mode": "area"}, (2, 8, 4, 4), "a resize that is nearest, linear or cubic, got area"),
        ({"keep_aspect_ratio_policy": "not_larger"}, (2, 8, 4, 4), "a resize to the sizes that it names"),
        ({}, (2, 16, 4, 4), r"a resize of height, width or both, got one to \[16, 4, 4\]"),
        ({"nearest_mode": "up"}, (2, 8, 4, 4), "a nearest_mode of ONNX, got up"),
        (
            {"coordinate_transformation_mode": "tf_crop_and_resize"},
            (2, 8, 4, 4),
            "a coordinate_transformation_mode but tf_crop_and_resize, got tf_crop_and_resize",
        ),
    ],
)
def test_a_resize_that_is_refused(attributes: dict[str, Any], sizes: tuple[int, ...], text: str):
    with pytest.raises(ExportError, match=f"^expected {text}.* - at node `y` \\(Resize\\)$"):
        lower(network(*one("Resize", None, None, ints(*sizes), **attributes), opset=19))


@pytest.mark.parametrize(
    ("op", "gains", "attributes", "text"),
    [
        ("InstanceNormalization", 9, {}, "expected a gain and a shift for each of 8 channels, got 9"),
        ("GroupNormalization", 72, {"num_groups": 4}, "expected a gain and a shift for each of 8 channels, got 72"),
        ("GroupNormalization", 8, {"num_groups": 3}, "expected groups that divide 8 channels, got 3"),
        ("GroupNormalization", 8, {"num_groups": 0}, "expected groups that divide 8 channels, got 0"),
    ],
)
def test_a_norm_of_other_channels_is_refused(op: str, gains: int, attributes: dict[str, int], text: str):
    with pytest.raises(ExportError, match=text):
        lower(network(*one(op, normal(gains), normal(gains), **attributes), opset=21))


def test_a_function_before_the_last_reshape_needs_no_data():
    """Of a file that rounds all before it: what the function returns is not rounded."""
    nodes = [
        ("QuantizeLinear", ["x", "s", "z"], "a", {}),
        ("DequantizeLinear", ["a", "s", "z"], "b", {}),
        ("Sigmoid", ["b"], "c", {}),
        ("Flatten", ["c"], "y", {}),
    ]
    model = network(nodes, {"s": np.float32(0.05), "z": np.uint8(100)})
    net = qdeploy.load_int_model(converted(model))
    x = images(3, (8, 9, 7))
    expected = 1 / (1 + np.exp(-0.05 * (np.clip(np.rint(x / np.float32(0.05)) + 100, 0, 255) - 100)))
    np.testing.assert_allclose(net(x), expected.reshape(3, -1), rtol=1e-6)


def chain(op: str, count: int, *more: str) -> onnx.ModelProto:
    names = ["x", *(f"a{i}" for i in range(count - 1)), "y"]
    return network([(op, [a, *more], b, {}) for a, b in zip(names, names[1:], strict=False)], {})


def test_a_thousand_functions_are_one_table(tmp_path: Path):
    """More than Python has calls within calls."""
    report = qdeploy.export(chain("Neg", 1200), None, tmp_path / "net.safetensors", images(4, (8, 9, 7)))
    assert report.output_sqnr_db > 40
    model = qdeploy.load_int_model(tmp_path / "net.safetensors")
    assert [row["op"] for row in model.plan()] == ["table"]
    with pytest.raises(ExportError, match="expected a function of one tensor, of some hundred sums .* at module `y`"):
        qdeploy.export(chain("Add", 1200, "x"), None, tmp_path / "no.safetensors", images(4, (8, 9, 7)))


def test_a_file_with_a_batch_of_its_own_takes_any(tmp_path: Path):
    nodes = [("Reshape", ["x", "r"], "a", {}), ("Gemm", ["a", "w"], "y", {})]
    model = network(nodes, {"r": ints(1, -1), "w": normal(504, 4)}, batch=1)
    report = qdeploy.export(model, None, tmp_path / "net.safetensors", images(12, (8, 9, 7)))
    assert report.output_sqnr_db > 30
    assert qdeploy.load_int_model(tmp_path / "net.safetensors")(images(5, (8, 9, 7))).shape == (5, 4)


def test_a_softmax_at_the_end_is_dropped_and_told(tmp_path: Path):
    nodes = [("Flatten", ["x"], "a", {}), ("Gemm", ["a", "w"], "b", {}), ("Softmax", ["b"], "y", {})]
    model = network(nodes, {"w": normal(504, 4)})
    report = qdeploy.export(model, None, tmp_path / "net.safetensors", images(12, (8, 9, 7)))
    note = "Softmax at the end dropped: the output is what it reads - at node `y`"
    assert report.notes == [note]
    assert f"note: {note}" in str(report)


def test_rows_of_channels_become_the_input(tmp_path: Path):
    """A file that reads [N, H, W, C] makes a network of [N, C, H, W]."""
    nodes = [("Transpose", ["x"], "a", {"perm": [0, 3, 1, 2]}), ("Conv", ["a", "w"], "y", {})]
    model = network(nodes, {"w": normal(4, 3, 3, 3)}, (9, 7, 3))
    path = tmp_path / "net.safetensors"
    report = qdeploy.export(model, None, path, images(12, (3, 9, 7)), fallback_bits=8)
    assert report.output_sqnr_db > 30
    assert qdeploy.load_int_model(path).inputs[0]["shape"] == (3, 9, 7)


def test_free_sizes_are_given(tmp_path: Path):
    model = network([("Relu", ["x"], "y", {})], {}, (8, "H", "W"))
    with pytest.raises(ExportError, match=r"got \[N, 8, \?, \?\] \(give shape, --shape C,H,W\) - at input `x`$"):
        qdeploy.export(model, None, tmp_path / "net.safetensors")
    with pytest.raises(ExportError, match=r"a shape that fits the file's, got \[3, 9, 7\] for \[8, any, any\]"):
        qdeploy.export(model, None, tmp_path / "net.safetensors", shape=(3, 9, 7))
    qdeploy.export(model, None, tmp_path / "net.safetensors", images(4, (8, 9, 7)), shape=(8, 9, 7))


# ---- The command -----------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_exports_and_runs_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, out = FILES / "resnet_ort_qoperator.onnx", tmp_path / "net.safetensors"
    code, text, _ = run(capsys, "export", path, "--out", out, "--json")
    assert code == 0 and {row["grid"] for row in json.loads(text)["layers"]} <= {"file", ""}
    x = images(3)
    assert np.array_equal(qdeploy.load_int_model(out)(x), qdeploy.load_int_model(path)(x))
    assert run(capsys, "verify", path)[0] == 0
    assert "1 avg_pool2d" in run(capsys, "info", path)[1]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_command_calibrates_with_pictures(channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from PIL import Image

    folder, out = tmp_path / "pictures", tmp_path / "net.safetensors"
    (folder / "cats").mkdir(parents=True)
    model = tmp_path / "net.onnx"
    w = normal(4, channels, 3, 3)
    model.write_bytes(network([("Conv", ["x", "w"], "y", {})], {"w": w}, (channels, 8, 8)).SerializeToString())
    options = ("--out", out, "--bits", 8, "--mean", ",".join(["0.5"] * channels), "--std", "0.25")
    code, _, err = run(capsys, "export", model, "--calibration", folder, *options)
    assert code == 2 and "expected pictures (.bmp, " in err and "got none" in err
    for i in range(3):
        pixels = RNG.integers(0, 256, (20 + i, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"cats/{i}.png")
    code, _, err = run(capsys, "export", model, "--calibration", folder, "--out", out, "--bits", 8)
    assert (code, err) == (2, "qdeploy: error: expected the mean and std of the pictures, got neither - at --mean\n")
    assert run(capsys, "export", model, "--calibration", folder, *options)[0] == 0
    assert qdeploy.load_int_model(out)(RNG.integers(0, 256, (2, 8, 8, channels), dtype=np.uint8)).shape == (2, 4, 6, 6)
    (folder / "cats/broken.png").write_bytes(b"no picture")
    code, _, err = run(capsys, "export", model, "--calibration", folder, *options)
    assert code == 2 and "expected a picture, got UnidentifiedImageError - at " in err and "broken.png" in err


def test_names_of_classes_are_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = tmp_path / "names.txt"
    names.write_bytes(b"caf\xe9\n")
    code, _, err = run(capsys, "export", FILES / "resnet_ort_u8u8.onnx", "--out", tmp_path / "x", "--classes", names)
    expected = f"expected names of classes in UTF-8, one a line, got other bytes - at {names}"
    assert (code, err) == (2, f"qdeploy: error: {expected}\n")


def test_bits_are_named_as_they_were_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        run(capsys, "export", FILES / "resnet_ort_u8u8.onnx", "--out", tmp_path / "x", "--bits", 9)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "qdeploy: error: expected at most 8, got 9 - at --bits\n"


def test_the_command_calibrates_with_an_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, data, out = tmp_path / "net.onnx", tmp_path / "x.npy", tmp_path / "net.safetensors"
    model.write_bytes(
        network([("Conv", ["x", "w"], "y", {})], {"w": normal(4, 3, 3, 3)}, (3, 8, 8)).SerializeToString()
    )
    np.save(data, images(6, (3, 8, 8)))
    assert run(capsys, "export", model, "--calibration", data, "--bits", 7, "--out", out)[0] == 0
    data.write_bytes(b"nothing")
    code, _, err = run(capsys, "export", model, "--calibration", data, "--bits", 7, "--out", out)
    assert code == 2 and err.startswith("qdeploy: error: expected an array in .npy format, got ")


def test_without_data_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "net.safetensors"
    code, _, err = run(capsys, "export", FILES / "convnet_pt2e.onnx", "--out", out)
    assert code == 2 and "expected calibration data for 3 tensors without a quantizer (from node_conv2d_3 to " in err
    assert not out.exists()
    with pytest.raises(InputError):
        qdeploy.load_int_model(FILES / "convnet_pt2e.onnx")
