"""What ONNX files of strangers hold: one line each, soon and in little memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qdeploy
from qdeploy.errors import ExportError, InputError
from qdeploy.exporter import converted

pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_files import FILES

SCALE, ZERO = np.float32(0.1), np.uint8(3)
QUANTIZED = [
    helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="Q"),
    helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="D"),
]


def model(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], shape: tuple[Any, ...] = ("N", 3, 4, 4), opset: int = 17
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    arrays = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def node(op: str, inputs: list[str], output: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"n_{output}", **attributes)


def behind_quantizer(op: str, *more: str, **constants: Any) -> onnx.ModelProto:
    return model([*QUANTIZED, node(op, ["d", *more])], {"s": SCALE, "z": ZERO} | constants)


WEIGHT = np.ones((2, 3, 1, 1), np.int8)
OPERATORS = "expected an operator that the engine has (Conv, Gemm, MatMul by a constant, "
REFUSED: dict[str, tuple[onnx.ModelProto, str]] = {
    **{
        f"scale {scale}": (
            behind_quantizer("Relu", s=np.float32(scale)),
            f"expected a scale > 0 and finite, got {scale} - at node `Q` (QuantizeLinear)",
        )
        for scale in (0.0, -1.0, np.nan)
    },
    "16 bits": (
        behind_quantizer("Relu", z=np.uint16(0)),
        "expected activations of 8 bits, u8 or s8, with one scale, got uint16 - at node `Q` (QuantizeLinear)",
    ),
    "scales per channel": (
        behind_quantizer("Relu", s=np.ones(3, np.float32), z=np.zeros(3, np.uint8)),
        "expected one scale for a tensor, or one per channel where depthwise convolutions alone read it, "
        "got 3 scales along axis 1 - at node `Q`",
    ),
    "zero points that differ": (
        model(
            [*QUANTIZED, node("Conv", ["d", "w"], group=3)],
            {"s": np.ones(3, np.float32), "z": np.arange(3, dtype=np.uint8), "w": np.ones((3, 1, 1, 1), np.float32)},
        ),
        "expected one scale for a tensor, or one per channel where depthwise convolutions alone read it, "
        "got zero points that differ - at node `Q`",
    ),
    "scales along inputs": (
        model(
            [*QUANTIZED, node("DequantizeLinear", ["w", "ws"], "wd", axis=1), node("Conv", ["d", "wd"])],
            {"s": SCALE, "z": ZERO, "w": WEIGHT, "ws": np.array([1, 2, 3], np.float32)},
        ),
        "expected one weight scale per output channel, or one for all, got scales along another dimension "
        "- at node `n_y` (Conv)",
    ),
    "blocks": (
        model(
            [
                *QUANTIZED,
                node("DequantizeLinear", ["w", "ws"], "wd", axis=1, block_size=3),
                node("Conv", ["d", "wd"]),
            ],
            {"s": SCALE, "z": ZERO, "w": WEIGHT, "ws": np.ones((2, 1, 1, 1), np.float32)},
            opset=21,
        ),
        "expected a scale per tensor or per channel, got one per block - at node `n_wd` (DequantizeLinear)",
    ),
    "free size": (
        model([node("Relu", ["x"])], {}, ("N", 3, "H", "W")),
        "expected an input of known size, got [N, 3, ?, ?] (give shape, --shape C,H,W) - at input `x`",
    ),
    "two inputs": (
        model([node("Add", ["x", "x2"])], {}),
        "expected nodes in an order in which they can run, got `x2`, which nothing before it makes "
        "- at node `n_y` (Add)",
    ),
    "all unknown operators": (
        model(
            [
                node("LSTM", ["x"], "a"),
                node("LRN", ["x"], "b"),
                node("LRN", ["b"], "c"),
                node("If", ["c"], "e"),
                node("Add", ["a", "e"]),
            ],
            {},
        ),
        OPERATORS,
    ),
    "opset": (
        model([node("Relu", ["x"])], {}, opset=99),
        "expected opset 7 to 25 of the default domain, got 99 - at the model",
    ),
    "batch": (
        model([node("Reshape", ["x", "r"])], {"r": np.array([1, -1])}),
        "expected a reshape that keeps the batch, got one of [N, 3, 4, 4] to [1, -1] - at node `n_y` (Reshape)",
    ),
    "circle": (
        model([node("Add", ["x", "b"], "a"), node("Relu", ["a"], "b"), node("Relu", ["b"])], {}),
        "expected nodes in an order in which they can run, got `b`, which nothing before it makes "
        "- at node `n_a` (Add)",
    ),
    "twice": (
        model([node("Relu", ["x"], "a"), node("Neg", ["x"], "a"), node("Relu", ["a"])], {}),
        "expected tensors that are made once, got `a` twice - at node `n_a` (Neg)",
    ),
    "axis": (
        model([node("Concat", ["x", "x"], axis=9)], {}),
        "expected a dimension of 4, got 9 - at node `n_y` (Concat)",
    ),
    "inputs of a function": (
        model([node("HardSigmoid", ["x", "x", "x"])], {}),
        "got HardSigmoid with arguments that it lacks (TypeError) - at node `n_y` (HardSigmoid)",
    ),
    "padding by the least number": (
        model(
            [node("Pad", ["x", "p", "least"], "a"), node("Relu", ["a"])],
            {"p": np.array([0, 0, 1, 1] * 2), "least": np.float32(-np.inf)},
        ),
        "expected padding by 0, reflect, edge or wrap, or by the least number before a max pool, "
        "got Relu of what the least number pads - at node `n_y` (Relu)",
    ),
    "padding at the end": (
        model([node("Pad", ["x", "p", "least"])], {"p": np.array([0, 0, 1, 1] * 2), "least": np.float32(-np.inf)}),
        "expected a real output that depends on the input, got padding - at output `y`",
    ),
    "a product by a matrix for another image": (
        model([node("MatMul", ["m", "x"])], {"m": np.ones((2, 5), np.float32)}),
        "expected a matrix for 4 rows of pixels, got one for 5 - at node `n_y` (MatMul)",
    ),
    "a sum of too many": (
        model([node("Sum", ["x"] * 65)], {}),
        "expected a sum of at most 64 tensors, got one of 65 - at node `n_y` (Sum)",
    ),
    "attribute": (
        model([node("Transpose", ["x"], perm="abc")], {}),
        "expected integers as attribute perm, got str - at node `n_y` (Transpose)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_says_why(name: str):
    source, expected = REFUSED[name]
    with pytest.raises(ExportError) as error:
        converted(source)
    text = str(error.value)
    is_part = text.startswith(expected) if expected == OPERATORS else expected.startswith("got ") and expected in text
    assert "\n" not in text and (text == expected or is_part)


def test_all_unknown_operators_are_listed_with_their_nodes():
    with pytest.raises(ExportError) as error:
        converted(REFUSED["all unknown operators"][0])
    got = str(error.value).partition(", got ")[2]
    norms = "BatchNormalization, LayerNormalization and GroupNormalization are there"
    assert got == (
        "3 things that it lacks: (1) LSTM (a recurrent layer) at node `n_a`; "
        f"(2) LRN ({norms}) at nodes `n_b`, `n_c`; (3) If (control flow) at node `n_e`"
    )


def test_a_gap_without_data_names_both_ends():
    one = np.ones((3, 3, 1, 1), np.int8)
    nodes = [
        *QUANTIZED,
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"]),
        helper.make_node("Conv", ["d", "wd"], ["a"], name="first"),
        helper.make_node("Conv", ["a", "wd"], ["y"], name="second"),
    ]
    with pytest.raises(InputError) as error:
        converted(model(nodes, {"s": SCALE, "z": ZERO, "w": one}))
    expected = "calibration data for 1 tensors without a quantizer (from first to second)"
    assert str(error.value) == f"expected {expected}, got none - at export"


@pytest.mark.parametrize("data", [b"", b"no ONNX file at all\0", b"\x08\x07" * 100])
def test_bytes_that_are_no_file(data: bytes):
    with pytest.raises(ExportError, match=r"^expected an ONNX file, got \d+ bytes .*- at the bytes$"):
        converted(data)


def test_paths_that_are_no_file(tmp_path: Path):
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(ExportError, match=r"^expected an ONNX file, got (none|something else) - at `"):
            converted(path)
    with pytest.raises(ExportError, match="^expected an ONNX file, got none"):
        qdeploy.load_int_model(tmp_path / "none.onnx")


# ---- Constants in other files ----------------------------------------------------------------------------------------


def external(path: Path, **entries: str) -> Path:
    """The network of a file with its largest constant in weights.bin, as `entries` say."""
    proto = onnx.load(FILES / "resnet_ort_u8s8_per_channel.onnx")
    tensor = max(proto.graph.initializer, key=lambda x: len(x.raw_data))
    path.with_name("weights.bin").write_bytes(b"1234" + tensor.raw_data)
    size = str(len(tensor.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "weights.bin", "offset": "4", "length": size} | entries).items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())
    return path


def test_a_constant_beside_the_file(tmp_path: Path):
    path = external(tmp_path / "net.onnx")
    assert converted(path) == converted(FILES / "resnet_ort_u8s8_per_channel.onnx")
    with pytest.raises(ExportError, match=r"^expected all constants in the file, got external data \(give the path\)"):
        converted(path.read_bytes())


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"location": "../weights.bin"}, "external data in a file beside the model, got `../weights.bin`"),
        ({"location": "/etc/passwd"}, "external data in a file beside the model, got `/etc/passwd`"),
        ({"location": "sub/../weights.bin"}, "external data in a file beside the model"),
        ({"location": ""}, "external data in a file beside the model, got ``"),
        ({"location": "absent.bin"}, "external data in `absent.bin`, got No such file or directory"),
        ({"length": "5"}, "bytes of external data, got 5"),
        ({"offset": "5"}, "external data within `weights.bin`, got"),
        ({"offset": "-4"}, "a number of bytes, got `-4`"),
        ({"offset": "9" * 30}, "a number of bytes, got `999"),
    ],
)  # CVE-2022-25882, CVE-2024-27318: paths; CVE-2026-27489: sizes
def test_a_constant_elsewhere_is_not_read(tmp_path: Path, entries: dict[str, str], expected: str):
    (tmp_path / "sub").mkdir()
    with pytest.raises(ExportError) as error:
        converted(external(tmp_path / "net.onnx", **entries))
    assert str(error.value).startswith("expected ") and expected in str(error.value)


@pytest.mark.parametrize("link", [os.symlink, os.link])  # CVE-2026-34446, CVE-2026-34447
def test_a_link_is_not_followed(tmp_path: Path, link: Any):
    path = external(tmp_path / "net.onnx", location="link.bin")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "weights.bin").rename(tmp_path / "elsewhere/secret")
    link(tmp_path / "elsewhere/secret", tmp_path / "link.bin")
    with pytest.raises(ExportError, match="expected external data in .*, got a link"):
        converted(path)


# ---- Much out of little ----------------------------------------------------------------------------------------------

BOMBS = {
    "filled": ([node("ConstantOfShape", ["r"], "k"), node("Add", ["x", "k"])], {"r": np.array([2**40])}),
    "squared": ([node("ConstantOfShape", ["r"], "k"), node("Add", ["x", "k"])], {"r": np.array([2**30] * 3)}),
    "added": ([node("ConstantOfShape", ["r"], "k"), node("Add", ["x", "k"])], {"r": np.array([2**27])}),
    "computed": (
        [node("ConstantOfShape", ["r"], "k"), node("Exp", ["k"], "e"), node("Add", ["x", "e"])],
        {"r": np.array([2**27])},
    ),
    "outer": (
        [node("Mul", ["a", "b"], "k"), node("Add", ["x", "k"])],
        {"a": np.ones((2**12, 1), np.float32), "b": np.ones((1, 2**13), np.float32)},
    ),
    "range": (
        [node("Range", ["a", "b", "c"], "k"), node("Add", ["x", "k"])],
        {"a": np.int64(0), "b": np.int64(2**40), "c": np.int64(1)},
    ),
    "resized": ([node("Resize", ["x", "", "r"])], {"r": np.array([1, 1, 2**20, 2**20], np.float32)}),
    "resized by weights": (
        [node("Resize", ["x", "", "r"], mode="linear")],
        {"r": np.array([1, 1, 2**20, 1], np.float32)},
    ),
    "resized by a matrix": (
        [node("ConstantOfShape", ["r"], "k"), node("MatMul", ["k", "x"])],
        {"r": np.array([2**22, 4])},
    ),
    "tiled": ([node("Tile", ["x", "r"])], {"r": np.array([1, 2**20, 2**20, 1])}),
    "expanded": ([node("Expand", ["x", "r"])], {"r": np.array([2**20, 2, 3, 4, 4])}),
    "doubled": (
        [
            *(node("Concat", [f"k{i}"] * 64, f"k{i + 1}", axis=0) for i in range(6)),
            node("Add", ["x", "k6"]),
        ],
        {"k0": np.ones(4, np.float32)},
    ),
    "convolved": ([node("ConstantOfShape", ["r"], "k"), node("Conv", ["x", "k"])], {"r": np.array([2**25, 3, 1, 1])}),
    "convolved codes": (
        [
            node("ConstantOfShape", ["r"], "k", value=numpy_helper.from_array(np.array([3], np.int8))),
            node("DequantizeLinear", ["k", "s"], "w"),
            node("Conv", ["x", "w"]),
        ],
        {"r": np.array([2**25, 3, 1, 1]), "s": np.float32(0.5)},
    ),
    "convolved and moved": (
        [
            node("ConstantOfShape", ["r"], "k"),
            node("Transpose", ["k"], "t", perm=[3, 2, 1, 0]),
            node("Reshape", ["t", "n"], "w"),
            node("Conv", ["x", "w"]),
        ],
        {"r": np.array([2**25, 3, 1, 1]), "n": np.array([2**25, 3, 1, 1])},
    ),
    "scaled": (
        [
            node("ConstantOfShape", ["r"], "s", value=numpy_helper.from_array(np.array([0.5], np.float32))),
            node("DequantizeLinear", ["k", "s"], "w"),
            node("Conv", ["x", "w"]),
        ],
        {"r": np.array([2**27]), "k": np.ones((4, 3, 1, 1), np.int8)},
    ),
    "divided": (
        [
            node("ConstantOfShape", ["r"], "s", value=numpy_helper.from_array(np.array([0.5], np.float32))),
            node("QuantizeLinear", ["x", "s"], "q"),
            node("DequantizeLinear", ["q", "s"], "d"),
            node("Relu", ["d"]),
        ],
        {"r": np.array([2**27])},
    ),
    "biased": (
        [node("ConstantOfShape", ["r"], "b"), node("Conv", ["x", "k", "b"])],
        {"r": np.array([2**27]), "k": np.ones((4, 3, 1, 1), np.float32)},
    ),
    "normalized": (
        [node("ConstantOfShape", ["r"], "b"), node("BatchNormalization", ["x", "b", "b", "b", "b"])],
        {"r": np.array([2**27])},
    ),
    "padded": ([node("Pad", ["x", "r"], "p"), node("Transpose", ["p"])], {"r": np.array([0, 0, 2**30, 0] * 2)}),
}


def test_bombs_end_within_a_second_and_200_megabytes():
    """Each in one process, whose memory is limited; the time is that of the processor."""
    code = """
import resource, sys, time
sys.path += [sys.argv[1]]
from test_from_onnx_refusals import BOMBS, model, converted, ExportError, InputError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, (nodes, constants) in BOMBS.items():
    source, start = model(nodes, constants), time.process_time()
    try:
        converted(source)
        sys.exit(f"{name} was read")
    except (ExportError, InputError):
        pass
    if time.process_time() - start > 1:
        sys.exit(f"{name} took {time.process_time() - start} s")
more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
if more > 200 * 1024:
    sys.exit(f"{more} kB")
"""
    folder = str(Path(__file__).parent)
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_a_constant_of_a_node_is_not_read_from_a_file():
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    shape = {"r": np.array([4])}
    for made in (node("ConstantOfShape", ["r"], "k", value=tensor), node("Constant", [], "k", value=tensor)):
        with pytest.raises(ExportError, match=r"expected all constants in the file, got external data .* `n_k`"):
            converted(model([made, node("Add", ["x", "k"])], shape))
