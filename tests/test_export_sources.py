"""Networks that another tool quantized: programs of torch.export, what PT2E converts, fake quantization of torch.ao.

Scales are powers of two and zero points even, so that float32 computes every sum exactly and rounds every tie as the
engine does: codes and logits must be equal, not close.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

import qdeploy
from qdeploy.errors import ExportError, InputError
from qdeploy.exporter import from_onnx, sources

ops, aten = torch.ops.quantized_decomposed, torch.ops.aten
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
U8, S8 = (0, 255, torch.uint8), (-128, 127, torch.int8)


def pair(x, scale, zero_point, codes=U8):
    """As PT2E quantizes an activation."""
    return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, scale, zero_point, *codes), scale, zero_point, *codes)


class Converted(nn.Module):
    """What `convert_pt2e` makes of two convolutions with a residual, a pool and a classifier."""

    def __init__(self, codes=U8, asymmetric=False):
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.codes, up = codes, 128 if codes is U8 else 0
        self.middle, self.low = up, up - 128
        for name, shape in (("first", (8, 3, 3, 3)), ("second", (8, 8, 3, 3)), ("fc", (5, 8 * 16))):
            self.register_buffer(name, torch.randint(-60, 60, shape, generator=random, dtype=torch.int8))
            self.register_buffer(f"{name}_bias", torch.randint(-8, 8, shape[:1], generator=random) / 16)
        self.register_buffer("scales", 2.0 ** -torch.arange(6, 14))
        self.register_buffer("zero_points", torch.full((8,), 20 if asymmetric else 0))

    def forward(self, x):
        first = ops.dequantize_per_channel(self.first, self.scales, self.zero_points, 0, *S8)
        second = ops.dequantize_per_channel(self.second, self.scales, None, 0, *S8)
        x = pair(x, 2**-5, self.middle, self.codes)
        x = torch.relu(nn.functional.conv2d(x, first, self.first_bias, padding=1))
        x = pair(x, 2**-6, self.low, self.codes)
        y = nn.functional.conv2d(x, second, self.second_bias, padding=1)
        x = pair(torch.relu(y + x), 2**-6, self.low, self.codes)
        x = nn.functional.max_pool2d(x, 2).flatten(1)
        fc = ops.dequantize_per_tensor(self.fc, 2**-8, 0, *S8)
        return nn.functional.linear(x, fc, self.fc_bias)


def program(net, batch=2, **options):
    return torch.export.export(net, (X[:batch],), **options)


def any_batch(net):
    return program(net, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


KINDS = {
    "module": lambda net: net,
    "program": any_batch,
    "program of one batch size": program,
    "module of a program": lambda net: any_batch(net).module(),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def exported(source, path, *args, **options):
    """The report of an export without an example, the nodes by name, and the logits of X."""
    report = qdeploy.export(source, *(args or (None,)), path, **options)
    nodes = {node.name: node for node in qdeploy.format.load(path).members[0].nodes}
    return report, nodes, qdeploy.load_int_model(path)(X.numpy())


@pytest.mark.parametrize("codes", (U8, S8), ids=("u8", "s8"))
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_converted_module(kind, codes, path):
    net = Converted(codes)
    options = {"shape": (3, 8, 8)} if kind == "module" else {}
    report, nodes, logits = exported(KINDS[kind](net), path, **options)
    assert [node.op for node in nodes.values()] == ["conv2d", "conv2d", "max_pool2d", "reshape", "linear"]
    weighted = [node for node in nodes.values() if node.op in ("conv2d", "linear")]
    for node, name in zip(weighted, ("first", "second", "fc"), strict=True):
        assert np.array_equal(node.constants["weight"], getattr(net, name).numpy())
    assert "residual_multiplier" in weighted[1].attributes
    assert np.array_equal(logits, net(X).numpy())
    rows = [(row.op, row.bits, row.quantizer, row.grid) for row in report.layers]
    assert rows == [
        ("conv2d", 7, "file", "file"),
        ("conv2d", 7, "file", "file"),
        ("max_pool2d", None, "", ""),
        ("reshape", None, "", ""),
        ("linear", 7, "file", ""),
    ]
    assert report.fp32_bytes == 4 * sum(t.numel() for name, t in net.named_buffers() if "scale" not in name) - 4 * 8
    assert report.warnings[0].endswith("inputs of random numbers: give calibration data for figures of its own")


def test_the_same_file_from_every_kind(tmp_path):
    for i, kind in enumerate(KINDS):
        qdeploy.export(KINDS[kind](Converted()), X[:1], tmp_path / f"{i}.safetensors", X)
    files = [
        [n.constants["bias"] for n in qdeploy.format.load(f).members[0].nodes if "bias" in n.constants]
        for f in sorted(tmp_path.iterdir())
    ]
    assert all(np.array_equal(a, b) for biases in files[1:] for a, b in zip(files[0], biases, strict=True))


def test_zero_points_of_weights_are_subtracted(path):
    net = Converted(asymmetric=True)
    _, nodes, logits = exported(any_batch(net), path)
    first = next(iter(nodes.values()))
    assert np.array_equal(first.constants["weight"], net.first.numpy().astype(int) - 20)
    assert np.array_equal(logits, net(X).numpy())


class Flow(nn.Module):
    """A quantized input, `flow(net, x)`, and a linear layer."""

    def __init__(self, flow):
        super().__init__()
        self.flow, self.conv, self.fc = flow, nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 5)
        with torch.no_grad():
            self.conv.weight.copy_(
                torch.randint(-30, 30, (4, 3, 3, 3), generator=torch.Generator().manual_seed(2)) / 64
            )
            self.fc.weight.copy_(torch.randint(-30, 30, (5, 4), generator=torch.Generator().manual_seed(3)) / 64)
            self.fc.bias.zero_()
        self.register_buffer("scale", torch.tensor([2.0**-5]))
        self.register_buffer("scales", torch.full((4,), 2.0**-5))
        self.register_buffer("inputs", torch.full((3,), 2.0**-5))
        self.register_buffer("zero", torch.tensor([128], dtype=torch.int32))
        self.register_buffer("zeros", torch.zeros(4, dtype=torch.int32))

    def forward(self, x):
        return self.fc(self.flow(self, x).amax((2, 3)))


def conv(net, x, weight):
    return torch.fake_quantize_per_tensor_affine(torch.relu(nn.functional.conv2d(x, weight)), 2**-4, 0, 0, 127)


FAKE = {
    "per tensor": lambda net, x: conv(
        net,
        torch.fake_quantize_per_tensor_affine(x, 2**-5, 128, 0, 255),
        torch.fake_quantize_per_channel_affine(net.conv.weight, net.scales, net.zeros, 0, -128, 127),
    ),
    "tensors": lambda net, x: conv(
        net,
        torch.fake_quantize_per_tensor_affine(x, net.scale, net.zero, 0, 255),
        torch.fake_quantize_per_tensor_affine(net.conv.weight, net.scale, net.zero * 0, -8, 7),
    ),
    "cachemask": lambda net, x: conv(
        net,
        aten.fake_quantize_per_tensor_affine_cachemask(x, 2**-5, 0, -128, 127)[0],
        aten.fake_quantize_per_channel_affine_cachemask(net.conv.weight, net.scales, net.zeros, 0, -128, 127)[0],
    ),
    "learnable": lambda net, x: conv(
        net,
        torch._fake_quantize_learnable_per_tensor_affine(x, net.scale, net.zero.float(), 0, 255, 1.0),
        torch._fake_quantize_learnable_per_channel_affine(
            net.conv.weight, net.scales, net.zeros.float(), 0, -128, 127, 1.0
        ),
    ),
    "fused": lambda net, x: conv(
        net,
        torch.fused_moving_avg_obs_fake_quant(  # of a running minimum and maximum of 255 scales
            *(x, torch.zeros(1).long(), torch.ones(1).long(), net.scale * -128, net.scale * 127, net.scale, net.zero),
            *(0.01, 0, 255, -1, False, False),
        ),
        torch.fake_quantize_per_channel_affine(net.conv.weight, net.scales, net.zeros, 0, -128, 127),
    ),
}


@pytest.mark.parametrize("flow", FAKE)
def test_fake_quantization(flow, path):
    net = Flow(FAKE[flow])
    report, nodes, logits = exported(net, path, X[:1], calibration=X)
    assert [(row.quantizer, row.grid) for row in report.layers][0] == ("file", "file")
    assert [row.quantizer for row in report.layers][-1] == "rounded"  # the classifier
    first, step = next(iter(nodes.values())), 2**-5
    bits = (-8, 7) if flow == "tensors" else (-128, 127)
    assert np.array_equal(first.constants["weight"], np.rint(net.conv.weight.detach().numpy() / step).clip(*bits))
    assert first.attributes["clamp"] == [0, 127]
    with torch.no_grad():
        assert np.abs(logits - net(X).numpy()).max() < 0.02 * np.ptp(logits)


def prepared():
    """A network of torch.ao's quantization-aware training, its observers still on."""
    net = nn.Sequential(FakeQuantize(MovingAverageMinMaxObserver), nn.Conv2d(3, 4, 3), nn.ReLU())
    weights = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "quant_min": -128, "quant_max": 127}
    fake = FakeQuantize(MovingAveragePerChannelMinMaxObserver, **weights)
    nn.utils.parametrize.register_parametrization(net[1], "weight", fake)
    net += nn.Sequential(FakeQuantize(MovingAverageMinMaxObserver), nn.Flatten(), nn.Linear(4 * 36, 5))
    net(X)
    return net


def test_observers_neither_move_nor_hinder(path):
    torch.manual_seed(0)
    net = prepared()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report, nodes, _ = exported(net, path, None, shape=(3, 8, 8))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [(row.quantizer, row.grid) for row in report.layers if row.quantizer] == [("file", "file"), ("rounded", "")]
    fake = net[1].parametrizations.weight[0]
    codes = torch.fake_quantize_per_channel_affine(
        net[1].parametrizations.weight.original, fake.scale, fake.zero_point, 0, -128, 127
    ) / fake.scale.reshape(-1, 1, 1, 1)
    assert np.array_equal(next(iter(nodes.values())).constants["weight"], codes.detach().round().numpy())


def test_a_quantizer_behind_another_needs_no_data(path):
    net = Flow(lambda net, x: FAKE["per tensor"](net, pair(pair(x, 2**-4, 100), 2**-5, 128)))
    report, nodes, _ = exported(net, path, X[:1])
    assert [node.op for node in nodes.values()][:2] == ["table", "conv2d"]
    assert {row.grid for row in report.layers} == {"file", ""}


# ---- The shape of the input ------------------------------------------------------------------------------------------


def test_a_shape_fills_free_sizes(path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    dynamic = torch.export.Dim.DYNAMIC
    free = program(net, dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},))
    with pytest.raises(InputError, match=r"^expected shape=\(3, any, any\), as the source takes it, got none - at ex"):
        qdeploy.check(free)
    with pytest.raises(InputError, match=r"^expected shape=\(3, any, any\), .*, got \[4, 8, 8\] - at export$"):
        qdeploy.check(free, shape=(4, 8, 8))
    qdeploy.check(free, shape=(3, 8, 8))
    qdeploy.export(free, None, path, X, shape=(3, 8, 8), fallback_bits=8)
    assert qdeploy.format.load(path).members[0].tensors[0].shape == (3, 8, 8)


def test_shapes_that_do_not_fit():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    for arguments, options, text in (
        (
            (),
            {},
            r"^expected an example of the input, or shape=\(3, 224, 224\), got neither for a Sequential - at export$",
        ),
        ((X[:1],), {"shape": (3, 8, 8)}, r"^expected an example or its shape, got both - at shape \(3, 8, 8\)$"),
        ((), {"shape": (3, 0)}, r"^expected sizes > 0 of one input, .*, got \(3, 0\) - at shape$"),
        ((), {"shape": "38"}, r"^expected sizes > 0 of one input, .*, got '38' - at shape$"),
    ):
        with pytest.raises(InputError, match=text):
            qdeploy.check(net, *arguments, **options)


def test_ensembles_take_programs(path):
    members = [any_batch(Converted()), any_batch(Converted(S8)).module()]
    report = qdeploy.export_ensemble(members, None, path)
    assert {row.grid for row in report.layers} == {"file", ""}
    with pytest.raises(
        InputError, match="^expected two or more networks, got one ExportedProgram - at export_ensemble$"
    ):
        qdeploy.export_ensemble(members[0], None, path)


def test_an_onnx_file_goes_to_its_own_front_end(monkeypatch):
    calls = []
    monkeypatch.setattr(from_onnx, "lower", lambda source, shape: calls.append((source, shape)))
    sources.lowered("net.onnx", None, None)
    sources.lowered(b"", X[:1].numpy(), None)
    assert calls == [("net.onnx", None), (b"", (3, 8, 8))]


# ---- Refused ---------------------------------------------------------------------------------------------------------


def weight_of(codes, scale=1.0, zero_point=0):
    """A network with this weight behind `dequantize_per_tensor`."""
    held = torch.full((4, 3, 3, 3), codes, dtype=torch.uint8)
    return lambda net, x: nn.functional.conv2d(
        pair(x, 2**-5, 128), ops.dequantize_per_tensor(held, scale, zero_point, *U8)
    )


def activation(*arguments, **options):
    return lambda net, x: net.conv(pair(x, *arguments, **options))


def dynamic(net, x):
    scale, zero_point = ops.choose_qparams.tensor(x, 0, 255, 1e-9, torch.uint8)
    codes = ops.quantize_per_tensor.tensor(x, scale, zero_point, *U8)
    return net.conv(ops.dequantize_per_tensor.tensor(codes, scale, zero_point, *U8))


def two_grids(net, x):
    codes = ops.quantize_per_tensor(x, 2**-5, 128, *U8)
    return net.conv(ops.dequantize_per_tensor(codes, 2**-4, 128, *U8))


def codes_read(net, x):
    return net.conv(ops.quantize_per_tensor(x, 2**-5, 128, *U8).float())


ZERO = "a scale > 0 and finite, got"
REFUSED = {
    "dynamic": (dynamic, r"dynamic quantization \(quantize statically, with is_dynamic=False\) - at module `conv`"),
    "per channel": (
        lambda net, x: net.conv(torch.fake_quantize_per_channel_affine(x, net.inputs, net.zeros[:3], 1, 0, 255)),
        r"expected one scale and zero point for an activation, got 3 \(per channel\) - at module `fake_quantize_per_ch",
    ),
    "16 bits": (
        activation(2**-5, 0, (-32768, 32767, torch.int16)),
        r"expected activations of 8 bits, codes within 0..255 or -128..127, got codes -32768..32767 - at module `conv`",
    ),
    "zero": (activation(0.0, 0), rf"expected {ZERO} 0 - at module `conv`"),
    "negative": (activation(-0.5, 0), rf"expected {ZERO} -0.5 - at module `conv`"),
    "NaN": (activation(float("nan"), 0), rf"expected {ZERO} nan - at module `conv`"),
    "underflow": (activation(1e-60, 0), rf"expected {ZERO} 1e-60 - at module `conv`"),
    "zero point": (activation(0.5, 256), r"expected a zero point within 0..255, got 256 - at module `conv`"),
    "two grids": (two_grids, r"expected codes of Grid\(scale=0.0625.*, got codes of Grid\(scale=0.03125.* `conv`"),
    "codes": (
        codes_read,
        r"expected an activation that is dequantized right behind its quantizer, got to of its codes",
    ),
    "wide weight": (
        weight_of(255, 1.0, 0),
        r"are within -128..127 \(quantize with signed weights\), got 255..255 - at module `conv2d`",
    ),
    "weight of scale 0": (
        weight_of(3, 0.0),
        "expected step sizes > 0 and finite, got 0.0 of channel 0 - at weight of module `conv2d`",
    ),
    "weight of scale NaN": (
        weight_of(3, float("nan")),
        "expected step sizes > 0 and finite, got nan of channel 0 - at weight of module `conv2d`",
    ),
    "axis of a weight": (
        lambda net, x: nn.functional.conv2d(
            x, torch.fake_quantize_per_channel_affine(net.conv.weight, net.inputs, net.zeros[:3], 1, -128, 127)
        ),
        r"expected step sizes per output channel \(axis 0\) or per tensor, got axis 1 - at module `conv2d`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_quantizers_are_named(case, path):
    flow, text = REFUSED[case]
    net = Flow(flow).eval()
    with pytest.raises(ExportError, match=text) as error:
        qdeploy.export(program(net) if case == "dynamic" else net, X[:1], path, X, fallback_bits=8)
    assert "\n" not in str(error.value)
    assert not path.exists()


def test_what_is_not_converted_yet(path):
    net = nn.Sequential(MovingAverageMinMaxObserver(), nn.Conv2d(3, 4, 3))
    text = (
        r"^expected a converted network \(call convert_pt2e first\), got an observer, MovingAverageMinMaxObserver - at"
    )
    with pytest.raises(ExportError, match=text):
        qdeploy.export(net, X[:1], path, X)
