"""Transposed convolutions whose stride is their kernel, and pixel shuffles: a convolution and at most one gather."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulated import conv, images, quantized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qdeploy
from qdeploy import export, format
from qdeploy.errors import ExportError
from qdeploy.verification import verify

onnx = pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("upsampling") / "net.safetensors"


# ---- Transposed convolutions, by hand --------------------------------------------------------------------------------


class Case:
    """A transposed convolution from codes to codes. All scales are powers of two, so real numbers are exact."""

    def __init__(self, seed: int, channels: tuple[int, int], size: tuple[int, int], kernel: tuple[int, int]):
        rng = np.random.default_rng(seed)
        self.x_zero, self.y_zero = (int(zero) for zero in rng.integers(0, 256, 2))
        self.x_scale, self.y_scale = 0.5, 8.0
        self.kernel = list(kernel)
        self.codes = rng.integers(0, 256, (2, channels[0], *size))
        self.codes[0, :2, 0, 0] = 0, 255  # images of one number bring a warning
        self.weight = rng.integers(-128, 128, (*channels, *kernel))
        self.weight.reshape(-1)[0] = -128  # the quantizer's range
        self.steps = 2.0 ** rng.integers(-4, 0, channels[1])
        self.bias = rng.integers(-400, 400, channels[1]) * self.x_scale * self.steps

    @property
    def x(self) -> np.ndarray:
        return ((self.codes - self.x_zero) * self.x_scale).astype(np.float32)

    def expected(self) -> np.ndarray:
        """One product of matrices for each place in the kernel."""
        (n, _, h, w), (_, o, kh, kw) = self.codes.shape, self.weight.shape
        y = np.empty((n, o, h * kh, w * kw))
        for i in range(kh):
            for j in range(kw):
                sums = np.einsum("nchw,co->nohw", self.codes - self.x_zero, self.weight[:, :, i, j])
                y[:, :, i::kh, j::kw] = sums * (self.x_scale * self.steps).reshape(-1, 1, 1)
        y = np.rint((y + self.bias.reshape(-1, 1, 1)) / self.y_scale + self.y_zero)  # ties are ours: docs/format.md
        return ((np.clip(y, 0, 255) - self.y_zero) * self.y_scale).astype(np.float32)

    def in_torch(self) -> nn.Module:
        steps, bias = torch.tensor(self.steps, dtype=torch.float32), torch.tensor(self.bias, dtype=torch.float32)
        real = torch.tensor(self.weight * self.steps.reshape(-1, 1, 1), dtype=torch.float32)
        case = self

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight, self.bias, self.steps = nn.Parameter(real), nn.Parameter(bias), nn.Buffer(steps)
                self.zeros = nn.Buffer(torch.zeros(len(steps), dtype=torch.int32))

            def forward(self, x: Tensor) -> Tensor:
                x = torch.fake_quantize_per_tensor_affine(x, case.x_scale, case.x_zero, 0, 255)
                weight = torch.fake_quantize_per_channel_affine(self.weight, self.steps, self.zeros, 1, -128, 127)
                x = F.conv_transpose2d(x, weight, self.bias, stride=case.kernel)
                return torch.fake_quantize_per_tensor_affine(x, case.y_scale, case.y_zero, 0, 255)

        return Net()

    def in_onnx(self) -> Any:
        constants: dict[str, Any] = {
            **{"xs": np.float32(self.x_scale), "xz": np.uint8(self.x_zero)},
            **{"ys": np.float32(self.y_scale), "yz": np.uint8(self.y_zero)},
            **{"w": self.weight.astype(np.int8), "ws": self.steps.astype(np.float32)},
            **{"b": np.rint(self.bias / (self.x_scale * self.steps)).astype(np.int32)},
            "bs": (self.x_scale * self.steps).astype(np.float32),
        }
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=1),
            helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"], axis=0),
            helper.make_node("ConvTranspose", ["xd", "wd", "bd"], ["c"], name="up", strides=self.kernel),
            helper.make_node("QuantizeLinear", ["c", "ys", "yz"], ["yq"]),
            helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
        ]
        return onnx_of(nodes, constants, self.codes.shape[1:])


def onnx_of(nodes: list[Any], constants: dict[str, Any], shape: tuple[int, ...]) -> Any:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    arrays = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def ops(path: Path) -> list[str]:
    return [node.op for node in format.load(path).members[0].nodes]


SIZES = st.integers(1, 5)


@pytest.mark.parametrize("front_end", ["torch", "onnx"])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_a_transposed_convolution_has_the_codes_of_its_definition(front_end: str, data: st.DataObject, path: Path):
    channels = data.draw(st.tuples(st.integers(2, 5), SIZES))
    size, kernel = (data.draw(st.tuples(SIZES, SIZES)) for _ in range(2))
    case = Case(data.draw(st.integers(0, 99)), channels, size, kernel)
    if front_end == "torch":
        export(case.in_torch(), case.x[:1], path)
    else:
        export(case.in_onnx(), None, path)
    assert np.array_equal(qdeploy.load_int_model(path)(case.x), case.expected())
    assert set(ops(path)) <= {"tokens", "linear", "conv2d", "reshape", "gather", "image", "table"}


def test_both_front_ends_write_one_file(path: Path):
    case = Case(0, (3, 5), (4, 6), (2, 2))
    export(case.in_torch(), case.x[:1], path)
    first = format.load(path).members[0]
    export(case.in_onnx(), None, path)
    second = format.load(path).members[0]
    assert [node.op for node in first.nodes] == ["conv2d", "tokens", "reshape", "gather", "table"]
    for a, b in zip(first.nodes, second.nodes, strict=True):
        assert (a.op, a.attributes, a.inputs) == (b.op, b.attributes, b.inputs)
        assert all(np.array_equal(a.constants[key], b.constants[key]) for key in a.constants)


WRONG = {
    "overlap": ({"kernel_size": 3, "stride": 2}, "stride [2, 2]"),
    "padding": ({"kernel_size": 2, "stride": 2, "padding": 1}, "padding [1, 1, 1, 1]"),
    "output padding": ({"kernel_size": 2, "stride": 2, "output_padding": 1}, "output_padding [1, 1]"),
    "dilation": ({"kernel_size": 2, "stride": 2, "dilation": 2}, "dilation [2, 2]"),
    "groups": ({"kernel_size": 2, "stride": 2, "groups": 2}, "groups 2"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("front_end", ["torch", "onnx"])
def test_other_transposed_convolutions_say_what_is_expected(front_end: str, name: str, path: Path):
    options, got = WRONG[name]
    layer, kernel = nn.ConvTranspose2d(4, 4, **options), options["kernel_size"]
    expected = f"expected a transposed convolution by its kernel [{kernel}, {kernel}] as stride, without padding, "
    names = {"stride": "strides", "padding": "pads", "dilation": "dilations", "output_padding": "output_padding"}
    attributes = {names[key]: [value] * 2 for key, value in options.items() if key in names}
    attributes |= {"pads": attributes["pads"] * 2} if "pads" in attributes else {}
    constants = {"w": layer.weight.detach().numpy(), "b": layer.bias.detach().numpy()}
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], "0", group=layer.groups, **attributes)
    with pytest.raises(ExportError) as error:
        if front_end == "torch":
            export(nn.Sequential(layer), images((4, 6, 6))[:1], path, images((4, 6, 6)), fallback_bits=8)
        else:
            export(onnx_of([node], constants, (4, 6, 6)), None, path, images((4, 6, 6)), fallback_bits=8)
    assert str(error.value).startswith(expected) and f"got {got} - at" in str(error.value), error.value


@pytest.mark.parametrize("axis, reads", [(0, F.conv_transpose2d), (1, F.conv2d)])
def test_step_sizes_along_the_input_channels_are_refused(axis: int, reads: Callable, path: Path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4, 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            steps, zeros = torch.full((4,), 0.5), torch.zeros(4, dtype=torch.int32)
            weight = torch.fake_quantize_per_channel_affine(self.weight, steps, zeros, axis, -128, 127)
            return reads(x, weight, stride=2)

    with pytest.raises(ExportError, match=rf"output channel \(axis {1 - axis}\) or per tensor, got axis {axis} - at"):
        export(Net(), images((4, 6, 6))[:1], path, images((4, 6, 6)))


# ---- Moves between pixels and channels -------------------------------------------------------------------------------


def dcr(x: Tensor, k: int) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, k, k, c // (k * k), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * k, w * k)


def space_to_depth(x: Tensor, k: int) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // k, k, w // k, k).permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // k, w // k)


def mixed(x: Tensor, k: int) -> Tensor:
    """Height from the outer channels, width from the inner ones."""
    n, c, h, w = x.shape
    return x.reshape(n, k, c // (k * k), k, h, w).permute(0, 2, 4, 1, 5, 3).reshape(n, -1, h * k, w * k)


MOVES = {f.__name__: f for f in (F.pixel_shuffle, F.pixel_unshuffle, dcr, space_to_depth, mixed)}


@pytest.mark.parametrize("name", MOVES)
@settings(max_examples=3, deadline=None)
@given(channels=st.integers(1, 3), height=st.integers(1, 3), width=st.integers(1, 3), k=st.integers(2, 3))
def test_pixels_and_channels_trade_places(name: str, channels: int, height: int, width: int, k: int, path: Path):
    move = MOVES[name]

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return move(torch.fake_quantize_per_tensor_affine(x, 0.25, 100, 0, 255), k)

    into = move in (F.pixel_unshuffle, space_to_depth)
    shape = (channels, height * k, width * k) if into else (channels * k * k, height, width)
    x = (np.random.default_rng(0).integers(-100, 156, (3, *shape)) / 4).astype(np.float32)
    export(Net(), x[:1], path)
    assert np.array_equal(qdeploy.load_int_model(path)(x), move(torch.from_numpy(x), k).numpy())
    assert "concat" not in ops(path)


class Shuffled(nn.Module):
    """Down by a pixel unshuffle and up by a pixel shuffle, in torch's order of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(12, 8), conv(8, 12), conv(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(F.pixel_unshuffle(x, 2)))))
        return self.third(F.pixel_shuffle(x, 2))


def test_the_order_of_channels_goes_into_the_weights(path: Path):
    net, x = quantized(Shuffled(), activation_bits=8, calibration=images((3, 8, 6))), images((3, 8, 6))
    export(net, x[:1], path, x)
    expected = "gather reshape image conv2d conv2d tokens reshape gather conv2d"
    assert " ".join(ops(path)) == expected
    with torch.no_grad():
        assert np.abs(qdeploy.load_int_model(path)(x) - net(torch.from_numpy(x)).numpy()).max() < 1e-3


class Patches(nn.Module):
    """Tokens of 2x2 pixels for a linear layer, as an MLP-Mixer begins."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 5, 3, 1).reshape(n, -1, 4 * c)
        return self.fc(F.relu(self.stem(tokens)).mean(1))


def test_patches_are_rows_of_a_linear_layer(path: Path):
    torch.manual_seed(0)
    x = images((3, 8, 6), count=16)
    report = export(Patches().eval(), x[:1], path, x, fallback_bits=8)
    assert ops(path) == ["gather", "reshape", "linear", "mean", "linear"]
    assert report.output_sqnr_db > 30


# ---- A whole network -------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Two levels down and up again, with what was there before beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv(3, 8), conv(8, 12), conv(12, 16)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2)])
        self.norm = nn.ModuleList([nn.BatchNorm2d(12), nn.BatchNorm2d(8)])
        self.merge = nn.ModuleList([conv(24, 12), conv(16, 8)])
        self.head = conv(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            x = F.relu(layer(F.max_pool2d(x, 2) if kept else x))
            kept.append(x)
        for up, norm, merge, beside in zip(self.up, self.norm, self.merge, kept[-2::-1], strict=True):
            x = F.relu(merge(torch.cat([F.relu(norm(up(x))), beside], 1)))
        return self.head(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.onnx
@pytest.mark.parametrize("front_end", ["torch", "onnx"])
def test_a_decoder_is_exported_whole(front_end: str, path: Path):
    torch.manual_seed(0)
    net, x = UNet().eval(), images((3, 16, 12), count=16)
    for norm in net.norm:
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    source: Any = net
    if front_end == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        file = path.with_suffix(".onnx")
        names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "N"}}}
        torch.onnx.export(net, (torch.from_numpy(x[:1]),), file, opset_version=17, dynamo=False, **names)
        source = file
    report = export(source, x[:1] if source is net else None, path, x, fallback_bits=8)
    assert report.output_sqnr_db > 30
    assert ops(path).count("gather") == 2 and not {"table", "add"} & set(ops(path))
    rows = verify(path, {"float": (x[:2],)}, "cpu", lambda text: None)
    assert rows and not any(row["different"] for row in rows), rows
