"""Networks to integer files, compared with the emulation of emulated.py."""

import io
import json
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulated import Net, between, check, conv, emulated, images, ops, quantized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qdeploy
from qdeploy import ExportError, InputError, ModelError, _engine, export, export_ensemble, format, page, reference
from qdeploy.exporter.calibrate import Histogram
from qdeploy.exporter.grid import grid_of_range
from qdeploy.graph import COMBINE
from qdeploy.kernels.lsq import lsq_codes
from qdeploy.terminal import progress
from qdeploy.training import quantize_, quantizers

torch.set_num_threads(1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


# ---- What real code writes -------------------------------------------------------------------------------------------


def residual(net, x):
    out = net.relu(net.bn1(net.conv1(x)))
    out = net.bn2(net.conv2(net.q("conv1", out)))
    out += x
    return net.q("conv2", net.relu(out))


def residual_downsample(net, x):
    out = net.bn2(net.conv2(net.q("conv1", F.relu(net.bn1(net.conv1(x)), inplace=True))))
    return net.q("conv2", torch.relu_(out + net.q("down.0", net.down(x))))


def scaled_residual(net, x):
    return net.q("conv1", x - 0.25 * net.conv1(x))


def unfused_addition(net, x):
    """Both operands of the first addition are read again, so no convolution can do it; the second one can be fused."""
    a = net.q("conv1", net.conv1(x))
    b = net.q("conv2", net.conv2(a))
    c = net.q("add", torch.relu(a + 2 * b))
    return net.q("conv3", (net.conv3(c) + b).clamp(-1, 2))


def dense(net, x):
    """BatchNorm with no convolution before it, and a concatenation."""
    a = net.q("conv1", net.conv1(net.q("bn1", F.relu(net.bn1(x)))))
    return net.q("bn2", F.relu(net.bn2(torch.cat([x, a], 1))))


def shared_module(net, x):
    return net.q("conv1#2", F.relu(net.conv1(net.q("conv1", F.relu(net.conv1(x))))))


def max_pool_before_relu(net, x):
    return F.relu(F.max_pool2d(net.q("conv1", net.conv1(x)), 3, 2, 1, ceil_mode=True))


def padding(net, x):
    y = net.q("conv1", net.conv1(F.pad(x, (1, 0, 2, 1))))
    return net.q("avg_pool2d", F.avg_pool2d(net.q("pad", F.pad(y, (1, 1, 0, 2))), 2))


def dropout(net, x):
    y = F.dropout(net.drop(net.conv1(net.drop2(x))), 0.5, training=net.training)
    return net.q("conv1", F.dropout(y, 0.1, net.training, inplace=True).relu_())


def view_and_in_place(net, x):
    """The view sees what the in-place operation does to its storage."""
    y = net.conv1(x)
    flat = y.view(x.shape[0], -1)
    y.relu_()
    return net.q("conv1", flat).reshape(x.shape)


def in_place_and_again(net, x):
    """`x` is read after it was changed in place; its clamp goes through the pool into the convolution before it."""
    x = F.max_pool2d(x, 2)
    y = net.conv1(x.clamp_(-0.5, 1))
    return net.q("conv1", y + x)


def strided_slice(net, x):
    return net.q("conv1", net.conv1(x) + x[:, :, ::2, ::2])


def scalars(net, x):
    return net.q("conv1", 1 - (2 * net.conv1(x) + 0.5) / 3)


def channel_constants(net, x):
    """An affine map per channel with nothing to fold it into."""
    y = (F.max_pool2d(x, 2) - net.offset) * torch.tensor([1.0, 2, -3, 4, 0.5, 1, 1, 2]).view(1, -1, 1, 1)
    return net.q("sub", y)


def convolutions(net, x):
    y = net.q("depthwise", net.depthwise(x))
    y = net.q("groups", net.groups(y))
    y = net.q("same", net.same(y))
    return net.q("valid", net.b(net.a(net.valid(y))))


def pools(net, x):
    y = F.max_pool2d(x, (3, 2), (2, 1), (1, 1), (1, 2), ceil_mode=True)
    y = net.q("avg_pool2d", F.avg_pool2d(y, 3, 2, 1, count_include_pad=False))
    y = net.q("avg_pool2d#2", F.avg_pool2d(y, 2, 1, 1))
    y = net.q("avg_pool2d#3", F.relu(F.avg_pool2d(y, 2, 2, ceil_mode=True, count_include_pad=False)))
    return net.q("avg_pool2d#4", 0.5 - F.avg_pool2d(y, 2, 1, divisor_override=3))


def adaptive(net, x):
    y = net.q("adaptive_avg_pool2d", F.adaptive_avg_pool2d(x, (6, 3)))
    y = F.adaptive_max_pool2d(F.adaptive_avg_pool2d(y, (None, 3)), (3, 3))  # the average changes nothing
    return net.q("sum", y.sum((2, 3), keepdim=True))


def reductions(net, x):
    a = net.q("mean", x.mean((-1, -2), keepdim=True))
    b = net.q("mean#2", x.flatten(2).mean(-1))[:, :, None, None]
    c = net.q("mean#3", x.mean(3)).amax(2)
    return torch.cat([a, b, c.view(c.size(0), -1, 1, 1)], 1)


def tables(net, x):
    y = F.silu(net.q("conv1", net.conv1(x)), inplace=True)
    y = net.q("mul", y * torch.sigmoid(y))  # one table with the function before it
    y = net.q("gelu", F.gelu(net.q("conv2", net.conv2(y)), approximate="tanh"))
    z = net.q("where", torch.where(y > 0, y, 0.1 * y))
    return net.q("add", net.q("div", y * F.relu6(y + 3) / 6) + F.max_pool2d(z, 1))


def table_of_functions(net, x):
    """Functions of functions are one table."""
    y = net.prelu(net.act(F.max_pool2d(x, 2)))
    y = torch.exp(-(y.abs() ** 1.5)).clamp(min=0.1)
    return net.q("rsub", 3 - torch.tanh(torch.maximum(y, torch.tensor(0.2))))


def squeeze_and_excitation(net, x):
    """The gate on the left, and a number on the product."""
    s = net.q("reduce", F.relu(net.reduce(net.q("mean", x.mean((2, 3), keepdim=True)))))
    gate = net.q("sigmoid", torch.sigmoid(net.q("expand", net.expand(s))))
    return net.q("mul", 2 * (gate * x))


def expanded_gate(net, x):
    s = net.q("fc1", net.fc1(net.q("mean", x.mean((2, 3)))))
    return net.q("mul", x * s.view(-1, 8, 1, 1).expand_as(x))


def hard_gate(net, x):
    """MobileNetV3's: the clamp is the layer's, its division by 6 is a number times the product."""
    s = net.q("expand", F.relu6(net.expand(net.q("pool1", net.pool1(x))) + 3)) / 6
    return net.q("mul", F.relu(x * s))


def product_of_branches(net, x):
    y = net.q("conv1", net.conv1(x)) * net.q("tanh", torch.tanh(net.q("conv2", net.conv2(x))))
    return net.q("mul", 1 - y)


def hard_swish_as_a_product(net, x):
    """A function of one tensor stays one table."""
    return net.q("div", x * F.relu6(x + 3) / 6)


FLOWS = {  # flow: its modules, and the operations of the file that it and the convolution before it become
    residual: (
        dict(
            conv1=conv(8, 8, bias=False),
            bn1=nn.BatchNorm2d(8),
            conv2=conv(8, 8),
            bn2=nn.BatchNorm2d(8),
            relu=nn.ReLU(True),
        ),
        "conv2d conv2d conv2d",
    ),
    residual_downsample: (
        dict(conv1=conv(8, 8), bn1=nn.BatchNorm2d(8), conv2=conv(8, 8, stride=2), bn2=nn.BatchNorm2d(8))
        | dict(down=nn.Sequential(conv(8, 8, 1, stride=2), nn.BatchNorm2d(8))),
        "conv2d conv2d conv2d conv2d",
    ),
    scaled_residual: (dict(conv1=conv(8, 8)), "conv2d conv2d"),
    unfused_addition: (
        dict(conv1=conv(8, 8), conv2=conv(8, 8, 1), conv3=conv(8, 8, 1)),
        "conv2d conv2d conv2d add conv2d",
    ),
    dense: (
        dict(bn1=nn.BatchNorm2d(8), conv1=conv(8, 4), bn2=nn.BatchNorm2d(12), channels=12),
        "conv2d conv2d conv2d concat conv2d",
    ),
    shared_module: (dict(conv1=conv(8, 8)), "conv2d conv2d conv2d"),
    max_pool_before_relu: (dict(conv1=conv(8, 8)), "conv2d conv2d max_pool2d"),
    padding: (dict(conv1=conv(8, 8)), "conv2d conv2d conv2d avg_pool2d"),
    dropout: (dict(conv1=conv(8, 8), drop=nn.Dropout(0.5), drop2=nn.Dropout2d(0.5)), "conv2d conv2d"),
    view_and_in_place: (dict(conv1=conv(8, 8)), "conv2d conv2d"),
    in_place_and_again: (dict(conv1=conv(8, 8)), "conv2d max_pool2d conv2d"),
    strided_slice: (dict(conv1=conv(8, 8, stride=2)), "conv2d max_pool2d conv2d"),
    scalars: (dict(conv1=conv(8, 8), unused=conv(8, 8)), "conv2d conv2d"),
    channel_constants: (
        dict(offset=nn.Parameter(torch.linspace(-1, 1, 8).view(8, 1, 1))),
        "conv2d max_pool2d conv2d",
    ),
    convolutions: (
        dict(depthwise=conv(8, 16, groups=8), groups=conv(16, 8, groups=4, dilation=2, padding=2))
        | dict(same=conv(8, 8, (2, 5), padding="same"), valid=conv(8, 8, (3, 1), stride=(2, 1), padding="valid"))
        | dict(a=nn.BatchNorm2d(8), b=nn.BatchNorm2d(8, affine=False)),
        "conv2d " * 5,
    ),
    pools: ({}, "conv2d max_pool2d avg_pool2d avg_pool2d avg_pool2d avg_pool2d"),
    adaptive: ({}, "conv2d avg_pool2d max_pool2d avg_pool2d"),
    reductions: (dict(channels=24), "conv2d avg_pool2d avg_pool2d avg_pool2d max_pool2d concat"),
    tables: (
        dict(conv1=conv(8, 8), conv2=conv(8, 8)),
        "conv2d conv2d table conv2d table table table max_pool2d add",
    ),
    table_of_functions: (dict(act=nn.ELU(), prelu=nn.PReLU()), "conv2d max_pool2d table"),
    squeeze_and_excitation: (
        dict(reduce=conv(8, 3, 1), expand=conv(3, 8, 1)),
        "conv2d avg_pool2d conv2d conv2d table mul",
    ),
    expanded_gate: (dict(fc1=nn.Linear(8, 8)), "conv2d avg_pool2d linear mul"),
    hard_gate: (dict(pool1=nn.AdaptiveAvgPool2d(1), expand=conv(8, 8, 1)), "conv2d avg_pool2d conv2d mul"),
    product_of_branches: (dict(conv1=conv(8, 8), conv2=conv(8, 8)), "conv2d conv2d conv2d table mul"),
    hard_swish_as_a_product: (dict(), "conv2d table avg_pool2d"),
}


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.__name__)
def test_flow(flow, path):
    modules, expected = FLOWS[flow]
    net = between(flow, **modules)
    report, graph = check(net, (3, 12, 9), path)
    assert report.output_sqnr_db > 25
    body = [op for op in ops(graph) if op != "reshape"]
    assert body[: len(expected.split())] == expected.split()


CLAMPS = [F.relu, nn.ReLU(), torch.relu_, F.relu6, nn.ReLU6(), nn.Hardtanh(-0.5, 0.75), lambda x: x.clamp(-0.3, 2),
          lambda x: x.clamp_min(0.1), lambda x: torch.clamp(x, max=0.5), lambda x: torch.clip_(x, 0, 1),
          lambda x: F.relu(x.clamp(-1, 1)), lambda x: x.clamp(2, 1)]  # fmt: skip


def test_clamps_cost_nothing(path):
    def flow(net, x):
        for i, clamp in enumerate(CLAMPS):
            x = net.q(f"convs.{i}", clamp(net.convs[i](x)))
            x = F.max_pool2d(x, 1) if i == len(CLAMPS) - 2 else x
        return x

    _, graph = check(between(flow, convs=nn.ModuleList(conv(8, 8, 1) for _ in CLAMPS)), (3, 6, 5), path)
    assert "table" not in ops(graph) and ops(graph).count("conv2d") == 1 + len(CLAMPS)


def mlp(net, x):
    """BatchNorm after a linear layer is folded; after a reshape it is a map of its own."""
    x = net.q("fc1", F.relu(net.bn1(net.fc1(x))))
    return net.fc2(net.q("bn2", net.bn2(x.view(-1, 6).view(x.shape))))


MLP = dict(fc1=nn.Linear(7, 6), bn1=nn.BatchNorm1d(6), bn2=nn.BatchNorm1d(6), fc2=nn.Linear(6, 3))
ENDS = {
    "global_pool": ((3, 6, 6), dict(conv=conv(3, 4)), lambda net, x: net.q("conv", F.relu(net.conv(x))).mean((2, 3))),
    "global_pool_4d": (
        (3, 6, 6),
        dict(conv=conv(3, 4)),
        lambda net, x: F.adaptive_avg_pool2d(net.q("conv", net.conv(x)), 1),
    ),
    "convolution": ((3, 4, 4), dict(conv=conv(3, 4, 4, padding=0)), lambda net, x: torch.flatten(net.conv(x), 1)),
    "feature_map": ((3, 6, 6), dict(conv=conv(3, 4)), lambda net, x: net.conv(x)),
    "relu": ((3, 6, 6), dict(conv=conv(3, 4)), lambda net, x: net.q("conv", F.relu(net.conv(x)))),
    "max_pool": ((3, 6, 6), dict(conv=conv(3, 4)), lambda net, x: F.max_pool2d(net.q("conv", net.conv(x)), 2)),
    "concat": ((3, 6, 6), dict(conv=conv(3, 4)), lambda net, x: torch.cat([net.q("conv", net.conv(x)), x], 1)),
    "residual": ((3, 6, 6), dict(conv=conv(3, 3)), lambda net, x: net.conv(x) + x),
    "table": ((3, 6, 6), dict(conv=conv(3, 3)), lambda net, x: torch.sigmoid(net.q("conv", net.conv(x)))),
    "vector": ((7,), MLP, mlp),
}


@pytest.mark.parametrize("name", ENDS)
def test_ends_in_float32(name, path):
    shape, modules, flow = ENDS[name]
    _, graph = check(quantized(Net(flow, **modules)), shape, path)
    assert graph.members[0].output.dtype == "f32"


class Followed(Net):
    """Goes on from the codes of the file, `taps`. Where a number lies at a tie they may be off by one: it is rounded in
    f32 there and in float64 here."""

    taps: dict[str, np.ndarray]

    def q(self, name, x):
        rounded = super().q(name, x)
        if self.grids is None or name not in self.taps:
            return rounded
        scale, zero_point, _, _ = self.grids[name]
        found = scale * (torch.from_numpy(self.taps[name]).double() - zero_point)
        assert (rounded - found).abs().max() <= 1.001 * scale
        return found


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_small_convolutional_network(tmp_path_factory, data):
    draw = data.draw
    c_in, size, bits = draw(st.integers(1, 4)), draw(st.integers(3, 9)), draw(st.integers(2, 8))
    modules, steps, channels, height = {}, [], c_in, size
    for i in range(draw(st.integers(1, 3))):
        kernel = draw(st.integers(1, min(3, height)))
        groups = draw(st.sampled_from([g for g in (1, channels) if channels % g == 0]))
        stride, pad = draw(st.integers(1, 2)), draw(st.integers(0, kernel // 2))
        width = channels * draw(st.integers(1, 2)) if groups > 1 else draw(st.integers(1, 6))
        modules[f"conv{i}"] = nn.Conv2d(channels, width, kernel, stride, pad, groups=groups, bias=draw(st.booleans()))
        modules[f"bn{i}"] = nn.BatchNorm2d(width)
        height = (height + 2 * pad - kernel) // stride + 1
        steps.append(
            (draw(st.booleans()), stride == 1 and 2 * pad == kernel - 1 and width == channels and draw(st.booleans()))
        )
        channels = width

    def flow(net, x):
        for i, (relu, shortcut) in enumerate(steps):
            y = getattr(net, f"bn{i}")(getattr(net, f"conv{i}")(x))
            y = y + x if shortcut else y
            x = net.q(f"conv{i}", F.relu(y) if relu else y)
        return x.mean((2, 3))

    per_channel = draw(st.booleans())
    net = quantized(Followed(flow, **modules), bits, per_channel=per_channel)
    path = tmp_path_factory.mktemp("any") / "net.safetensors"
    x = images((c_in, size, size), draw(st.integers(0, 99)))
    export(net, x[:1], path, x)
    graph = format.load(path)
    got, net.taps = reference.run(graph, x, [f"conv{i}" for i in range(len(steps))])
    assert np.array_equal(qdeploy.load_int_model(path)(x), got)
    expected = emulated(net, graph, x)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    for node in graph.members[0].nodes[:-1]:
        quantizer = getattr(net, node.name).parametrizations.weight[0]
        codes = quantizer.codes(getattr(net, node.name).parametrizations.weight.original)
        assert node.bits == bits and np.array_equal(node.constants["weight"], codes.numpy())


# ---- Learned activation quantizers -----------------------------------------------------------------------------------


def learned_activations(bits, learn=True):
    def flow(net, x):
        y = F.max_pool2d(net.q("conv1", net.conv1(x).relu()), 2)
        z = net.conv2(y) + y  # a quantized and a plain reader of one tensor
        return net.fc(net.q("mean", net.conv3(F.relu(z)).mean((2, 3))))

    net = Net(flow, conv1=conv(3, 8), conv2=conv(8, 8), conv3=conv(8, 8), fc=nn.Linear(8, 5))
    data = [torch.from_numpy(images((3, 8, 8)))]
    return quantized(net, 6, activation_bits=bits, calibration=data, init="mse")


@pytest.mark.parametrize("bits", [8, 4])
def test_learned_activation_grids(bits, path):
    net = learned_activations(bits)
    x = images((3, 8, 8))
    report = export(net, x[:1], path, x)
    graph = format.load(path)
    grids = {t.name: t for t in graph.members[0].tensors}
    step = {key: q.step.item() for key, q in quantizers(net).items() if key.endswith(".input")}
    assert grids["input"].scale == pytest.approx(step["conv1.input"]) and grids["input"].zero_point == (
        128 if bits == 8 else 8
    )
    assert grids["conv2"].scale == pytest.approx(step["conv3.input"]) and grids["conv2"].zero_point == 0
    conv2 = next(node for node in graph.members[0].nodes if node.name == "conv2")
    assert conv2.attributes["clamp"] == [0, 2**bits - 1]
    # With 4 bits the grid of conv2's input is too coarse for the addition: the tensor keeps 8 bits, whose step is an
    # odd fraction of the learned one, so that conv2, which reads it by a table, still gets the codes of training.
    assert ("conv2.input_quantizer" in grids) == (bits == 4)
    fraction = step["conv2.input"] / grids["conv1"].scale
    assert round(fraction) % 2 == 1 and fraction == pytest.approx(round(fraction))
    # The operand of the addition, the average and the classifier's input are rounded where the network does not round.
    # Of 8 bits some values lie on ties, and what one code more or less does is small; of 4 bits it is not.
    if bits == 8:
        assert report.output_sqnr_db > 35
    else:
        got, expected = reference.run(graph, x), emulated(net, graph, x)
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_without_calibration_every_tensor_needs_a_quantizer(path):
    net = quantized(Net(lambda net, x: net.fc2(F.relu(net.fc1(x))), fc1=nn.Linear(4, 6), fc2=nn.Linear(6, 3)), 8,
                    activation_bits=8, calibration=[torch.from_numpy(images((4,)))])  # fmt: skip
    x = images((4,))
    assert (
        export(net, x, path).output_sqnr_db > 60
    )  # the integers are the fake-quant network: only f32 rounding is left
    with pytest.raises(
        InputError, match=r"calibration data for 2 tensors without a quantizer \(from input to.*got none"
    ):
        export(quantized(Net(lambda net, x: net.fc2(net.fc1(x)), fc1=nn.Linear(4, 6), fc2=nn.Linear(6, 3))), x, path)


# ---- Weights ---------------------------------------------------------------------------------------------------------


def two_layers(**options):
    flow = lambda net, x: net.fc(F.relu(net.conv(x)).mean((2, 3)))  # noqa: E731
    return Net(flow, conv=conv(3, 8), fc=nn.Linear(8, 5)), images((3, 6, 6))


def bits_and_sources(report):
    return {layer.name: (layer.bits, layer.quantizer) for layer in report.layers if layer.bits}


def test_only_the_classifier_may_lack_a_quantizer(path):
    net, x = two_layers()
    text = r"learned quantizer \(quantize_\) or fallback_bits.*got a float32 weight - at weight of module `conv`"
    with pytest.raises(ExportError, match=text):
        export(net, x, path, x)
    assert not path.exists()
    assert bits_and_sources(export(net, x, path, x, fallback_bits=6)) == {"conv": (6, "rounded"), "fc": (6, "rounded")}
    named = export(net, x, path, x, fallback_bits={"conv": 5})
    assert bits_and_sources(named) == {"conv": (5, "rounded"), "fc": (8, "rounded")}
    with pytest.raises(
        ExportError, match=r"name of a module with a float32 weight \(conv, fc\), got 'cnov' - at fallback_bits"
    ):
        export(net, x, path, x, fallback_bits={"cnov": 8})
    with pytest.raises(InputError, match="2 to 8 bits, got 9 - at fallback_bits"):
        export(net, x, path, x, fallback_bits=9)
    quantize_(net, 4)
    assert bits_and_sources(export(net, x, path, x)) == {"conv": (4, "learned"), "fc": (8, "rounded")}


def test_bad_steps_are_named(path):
    net, x = two_layers()
    quantize_(net, 4)
    step = net.conv.parametrizations.weight[0].step
    for value, text in (
        (0.0, "got 0.0 of channel 3"),
        (-0.1, "got -0.1"),
        (float("nan"), "got nan"),
        (float("inf"), "got inf"),
    ):
        step.data[3] = value
        whole = rf"expected step sizes > 0 and finite, {text}.* - at weight of module `conv`"
        with pytest.raises(ExportError, match=whole):
            export(net, x, path, x)
    step.data.fill_(1)
    text = (
        r"expected trained step sizes, got 1.0 for all, as if never initialized: weights up to 0\.1\d* are all rounded "
        "to 0 - at weight of module `conv`"
    )
    with pytest.raises(ExportError, match=text):
        export(net, x, path, x)


def test_dead_channels_do_no_harm(path):
    net = between(lambda net, x: F.max_pool2d(F.relu(x), 1), channels=8)
    with torch.no_grad():
        net.conv.parametrizations.weight.original[0] = 0  # no signal, no variance
        net.bn.running_var[0] = 0
        net.bn.running_mean[0] = net.conv.bias[0]
        net.bn.weight[1] = 1e-42  # a multiplier that would be subnormal
        net.bn.weight[2] = 0
        net.bn.running_mean[3] = (
            1e12 * net.bn.weight[3].sign()
        )  # a bias that no input overcomes: below 0, so ReLU makes it 0
        net.bn.running_mean[4] = -1e4
    check(net, (3, 8, 8), path)


def test_a_multiplier_beyond_the_bounds_is_named(path):
    net = between(lambda net, x: F.relu(x))
    x = images((3, 8, 8))
    x[:, 0] = 0  # calibration data that does not show what channel 2 does with its only input
    with torch.no_grad():
        weight = net.conv.parametrizations.weight.original
        weight[2], weight[2, 0] = 0, 1
        net.conv.bias[2] = net.bn.running_mean[2] = 0
        net.bn.running_var[2] = net.bn.eps = 1e-24
    with pytest.raises(
        ExportError,
        match=r"results below 2\^30 times the output's scale, got up to .* in channel 2 .* - at module `conv`$",
    ):
        export(net, x, path, x)


def test_a_network_of_zeros(path):
    net = between(lambda net, x: net.q("conv1", F.relu(net.conv1(x))), conv1=conv(8, 8))
    with torch.no_grad():
        net.conv1.parametrizations.weight.original.zero_()
        net.conv1.bias.fill_(-1)
    check(net, (3, 6, 6), path)


# ---- Errors ----------------------------------------------------------------------------------------------------------


UNSUPPORTED = {
    "rms_norm": (
        nn.RMSNorm(6),
        r"an operator that the engine has \(conv1d, .*got RMSNorm \(LayerNorm, .*- at module `body`",
    ),
    "softmax": (nn.Softmax(1), r"got softmax \(export the network that ends in logits; .* - at module `body`"),
    "transposed": (
        nn.ConvTranspose2d(8, 8, 4, 2, 1),
        r"convolution by its kernel \[4, 4\] as stride, without .*, got stride \[2, 2\], padding \[1, 1, 1, 1\] - at",
    ),
    "padding_by_one": (nn.ConstantPad2d(1, 1.0), "expected padding by the constant 0, got padding by 1.0 - at module"),
    "batch_statistics": (
        nn.BatchNorm2d(8, track_running_stats=False),
        r"BatchNorm with running statistics \(in eval mode, .*, got statistics of the batch - at module `body`",
    ),
    "maximum_of_channels": (
        lambda x: x * torch.sigmoid(x.amax(1, keepdim=True)),
        r"expected a reduction over height, width or both, got a maximum over dimensions \[1\] of 4 - at module `amax`",
    ),
    "mean_of_all": (lambda x: x * x.mean((1, 2, 3), keepdim=True), r"got one over dimensions \[1, 2, 3\] of 4 - at"),
    "power": (
        lambda x: x ** x.mean((2, 3), keepdim=True),
        "functions of one tensor, a sum or a product, got two tensors .* - at module `pow`",
    ),
    "uneven": (
        nn.AdaptiveMaxPool2d(4),
        r"max pool to sizes that divide the input's, got \[6, 6\] to \[4, 4\] - at module `body`",
    ),
    "permute": (lambda x: x.permute(0, 2, 3, 1), "got one that takes rows into channels - at module `permute`"),
    "rows_into_channels": (
        lambda x: F.relu(x.permute(0, 2, 1, 3).reshape(-1, 8, 6, 6)) + x,
        r"expected a move of whole rows \(pixels, tokens\) or whole channels, got .* - at module `add`",
    ),
    "images_apart": (lambda x: x.flip(0), "expected an operator that keeps the .*batch .* - at module `flip`"),
    "matmul": (
        lambda x: x.flatten(1) @ torch.ones(288, 2),
        "got a matrix product outside a Linear - at module `matmul`",
    ),
    "undefined": (lambda x: torch.log(x - 100), "finite on the range of its input, got none at .* - at module `log`"),
    "five_dimensions": (
        lambda x: x.view(-1, 2, 4, 6, 6).sin(),
        r"an output \[N, F\], \[N, T, D\] or \[N, C, H, W\], got \[N, 2, 4, 6, 6\] - at module `sin`",
    ),
    "fixed_batch": (lambda x: x.view(len(x), -1), "traces for any batch size, got a batch size fixed in the code"),
    "double": (lambda x: x.double(), "float32 throughout, got torch.float64 - at module `to`"),
    "constant": (lambda x: torch.ones(2, 2), "an output that depends on the input, got a constant"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_operators_are_named(name, path):
    body, text = UNSUPPORTED[name]
    modules = {"body": body} if isinstance(body, nn.Module) else {}
    net = Net(lambda net, x: body(F.relu(net.conv(x))), conv=conv(3, 8), **modules).train()
    x = images((3, 6, 6))
    with pytest.raises(ExportError, match=text):
        export(net, x, path, x, fallback_bits=8)
    assert net.training and not path.exists()


class SqueezeExcite(nn.Module):
    def __init__(self, channels, reduced, act, gate):
        super().__init__()
        self.reduce, self.expand = conv(channels, reduced, 1), conv(reduced, channels, 1)
        self.act, self.gate = act, gate

    def forward(self, x):
        return x * self.gate(self.expand(self.act(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class GatedBlock(nn.Module):
    """An inverted bottleneck, or with groups a bottleneck: 1x1, 3x3, gate, 1x1, and the input added."""

    def __init__(self, width, inner, groups, act, gate):
        super().__init__()
        self.first = nn.Sequential(conv(width, inner, 1, bias=False), nn.BatchNorm2d(inner))
        self.spatial = nn.Sequential(conv(inner, inner, 3, groups=groups, bias=False), nn.BatchNorm2d(inner))
        self.se = SqueezeExcite(inner, inner // 4, nn.ReLU(), gate)
        self.last = nn.Sequential(conv(inner, width, 1, bias=False), nn.BatchNorm2d(width))
        self.act = act

    def forward(self, x):
        return x + self.last(self.se(self.act(self.spatial(self.act(self.first(x))))))


GATED = {  # inner width, groups, activation, gate
    "MobileNetV3": (48, 48, nn.Hardswish(), nn.Hardsigmoid()),
    "EfficientNet": (48, 48, nn.SiLU(), nn.Sigmoid()),
    "RegNet-Y": (16, 2, nn.ReLU(), nn.Sigmoid()),
    "SE-ResNet": (32, 1, nn.ReLU(), nn.Sigmoid()),
}


@pytest.mark.parametrize("family", GATED)
def test_networks_with_gates(family, path):
    """Exact on every instruction set, and close to the network that was trained."""
    stem = nn.Sequential(conv(3, 16, stride=2, bias=False), nn.BatchNorm2d(16), GATED[family][2])
    blocks = [GatedBlock(16, *GATED[family]) for _ in range(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    net = quantized(nn.Sequential(stem, *blocks, *head)).eval()
    x = images((3, 21, 17))
    report = export(net, x[:1], path, x)
    graph = format.load(path)
    assert format.lowest_version(graph) == 2 and ops(graph).count("mul") == 2
    expected = reference.run(graph, x)
    for isa in _engine.isas():
        for threads in (1, 2):
            model = qdeploy.load_int_model(path, threads, isa)
            assert model(x).tobytes() == expected.tobytes()
    assert report.output_sqnr_db > 20


def test_parameters_must_be_float32(path):
    net, x = two_layers()
    with pytest.raises(
        ExportError, match=r"float32 parameters \(call net.float\(\)\), got bfloat16 - at parameter `conv.weight`"
    ):
        export(net.bfloat16(), x, path, x)


def test_weights_must_be_finite(path):
    net, x = two_layers()
    net.conv.bias.data[1] = float("nan")
    with pytest.raises(
        ExportError, match="finite weights, bias and BatchNorm, got NaN or infinity in channel 1 - at module `conv`"
    ):
        export(net, x, path, calibration=x, fallback_bits=8)


def test_bad_calibration_data(path):
    net, x = two_layers()
    quantize_(net, 8)
    nan = x.copy()
    nan[3, 0, 0, 0] = np.nan
    bad = {
        r"shape \[N, 3, 6, 6\] as the example has, got \[8, 3, 5, 5\] - at batch 1 of the": [x, images((3, 5, 5))],
        r"shape \[N, 3, 6, 6\] as the example has, got \[6, 6\]": [x[0, 0]],
        r"expected float32 images, got int64 \(convert and scale .* - at batch 0": x.astype(np.int64),
        "expected float32 images, got uint8": np.zeros((4, 6, 6, 3), np.uint8),
        "expected finite numbers, got NaN or infinity - at batch 0": nan,
        "expected at least one image, got none": [],
        "expected at least one image, got none - at the calibration data": x[:0],
        "an array .* or an iterable of batches, got int - at calibration": 7,
        "arrays or tensors, or tuples that begin with one, got str": ["image.png"],
    }
    for text, data in bad.items():
        with pytest.raises(InputError, match=text):
            export(net, x, path, data)
    assert not path.exists()


def test_bad_options(path):
    net, x = two_layers()
    quantize_(net, 8)
    for text, arguments in {
        "observer minmax, percentile, mse, got 'max' - at export": dict(observer="max"),
        r"expected mean and std, .*got \['mean'\]": dict(preprocess={"mean": 0}),
        "numbers greater than 0, got 0 - at preprocess std": dict(preprocess={"mean": 0, "std": 0}),
        r"1 or 3 finite numbers, got \[1, 2\] - at preprocess mean": dict(preprocess={"mean": [1, 2], "std": 1}),
    }.items():
        with pytest.raises(InputError, match=text):
            export(net, x, path, x, **arguments)
    with pytest.raises(InputError, match="expected an array or tensor, got str - at the example"):
        export(net, "image", path, x)
    shapes = r"float32 \[N, C, H, W\], \[N, T, D\] or \[N, F\], or token ids \[N, T\], with N >= 1"
    for example in (x.astype(np.float64), x[None], x[:0], x.astype(np.int64)):
        with pytest.raises(InputError, match=rf"expected {shapes}, got .* - at the example"):
            export(net, example, path, x)
    with pytest.raises(InputError, match="expected 5 class names, got 2 - at classes"):
        export(net, x, path, x, classes=["a", "b"])
    with pytest.raises(InputError, match="two or more networks, got 1"):
        export_ensemble([net], x, path, x)
    with pytest.raises(InputError, match="combine logits or probs, got 'vote'"):
        export_ensemble([net, net], x, path, x, combine="vote")


def test_a_full_disk_leaves_the_old_file(path):
    import resource

    net, x = two_layers()
    export(net, x, path, x, fallback_bits=8)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(
            ModelError, match=r"expected to write \d+ bytes, got: File too large - at .*net.safetensors"
        ):
            export(net, x, path, x, fallback_bits=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


# ---- Calibration -----------------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_grid_holds_its_range_and_zero(a, b):
    low, high = min(a, b), max(a, b)
    grid = grid_of_range(low, high)
    assert grid.scale == np.float32(grid.scale) > 0 and 0 <= grid.zero_point <= 255
    assert grid.real(np.array(grid.zero_point)) == 0
    if low >= 0:
        assert grid.zero_point == 0
    if max(high, 0) - min(low, 0) > 1e-20:
        ends = np.array([min(low, 0), max(high, 0)])
        assert np.abs(grid.real(grid.codes(ends)) - ends).max() <= 0.500001 * grid.scale
        assert grid.scale <= np.float32((ends[1] - ends[0]) / 254)  # at most one code is lost to the zero point


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.randoms())
def test_a_histogram_does_not_depend_on_the_order(values, random):
    def histogram(values):
        result = Histogram()
        for value in values:
            result.add(np.array([value], np.float32))
        return result

    shuffled = list(values)
    random.shuffle(shuffled)
    a, b = histogram(values), histogram(shuffled)
    assert (a.low, a.high) == (b.low, b.high) == (min(0, *values), max(0, *values))
    if a.width and a.width == b.width:  # widths differ when the first numbers differ in size; then bins are merged
        assert np.array_equal(a.counts, b.counts)
    assert a.counts.sum() == b.counts.sum() or a.width == 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("rich", [True, False])
def test_progress_on_a_terminal(rich, monkeypatch, capsys):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("calibrating", 2) as advance:
        advance()
        advance()
    assert "calibrating" in sys.stderr.getvalue() and ("batch 2 of 2" in sys.stderr.getvalue()) != rich
    monkeypatch.undo()
    with progress("calibrating", 2) as advance:  # not a terminal: nothing
        advance()
    assert capsys.readouterr() == ("", "")


def test_observers_cut_outliers():
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    values[:3] = [40, -30, 25]
    histogram = Histogram()
    for chunk in np.array_split(values, 7):
        histogram.add(chunk)
    assert histogram.range("minmax") == (-30, 40)
    low, high = histogram.range("percentile")
    assert np.quantile(values, 1e-4) - histogram.width <= low < np.quantile(values, 2e-4)
    assert np.quantile(values, 1 - 2e-4) < high <= np.quantile(values, 1 - 1e-4) + histogram.width

    def error(observer):
        grid = grid_of_range(*histogram.range(observer))
        return np.square(grid.real(grid.codes(values)) - values).mean()

    assert error("mse") < 0.9 * min(error("minmax"), error("percentile"))


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_observers_end_in_the_file(observer, path):
    net, x = two_layers()
    quantize_(net, 8)
    data = np.concatenate([images((3, 6, 6), seed, 64) for seed in range(4)])
    data[0, 0, 0, 0] = 50
    scales = []
    for options in ({}, {"observer": observer}):
        export(net, x, path, iter(np.split(data, 4)), **options)
        scales.append(format.load(path).members[0].tensors[0].scale)
    assert scales[1] < scales[0]


# ---- Files and reports -----------------------------------------------------------------------------------------------


def test_report_counts(path):
    net = between(
        lambda net, x: net.q("conv1", F.relu(net.conv1(x))), conv1=conv(8, 12, 5, stride=2, bias=False), channels=12
    )
    report, graph = check(net, (3, 9, 9), path)
    rows = {layer.name: layer for layer in report.layers}
    assert rows["conv1"].macs == 12 * 8 * 25 * 5 * 5 and rows["conv1"].weights == 12 * 8 * 25
    assert rows["fc"].macs == 5 * 12 and rows["pool"].bits is None
    codes = 3 * 8 * 9 + 8 * 12 * 25 + 12 * 5
    other = 8 + 4 * 8 + 5  # biases and BatchNorm with its statistics
    steps = 8 + 12 + 5
    assert report.fp32_bytes == 4 * (codes + other)
    assert report.packed_bytes == sum(-(-n * 7 // 8) for n in (216, 2400, 60)) + 4 * (
        other + steps
    )  # training_spec, size accounting
    assert report.file_bytes == os.path.getsize(path)
    assert report.mac_share == {7: 1.0}
    loaded = json.loads(report.to_json())
    assert report.to_html() == page.of_export({**loaded, "mac_share": report.mac_share})
    assert loaded["packed_ratio"] == report.packed_bytes / report.fp32_bytes and len(loaded["layers"]) == len(
        graph.members[0].nodes
    )
    text = str(report)
    assert (
        "conv1" in text
        and "100.0% at 7 bits" in text
        and f"top-1 agreement with the fake-quant network: {report.top1_agreement:.2%} of 8" in text
    )


def test_file_holds_the_codes_of_training(path):
    net, x = two_layers()
    quantize_(net, {"conv": 3, "fc": 6})
    export(net, x, path, x)
    for node in format.load(path).members[0].nodes:
        if node.bits:
            module = net.get_submodule(node.name).parametrizations.weight
            quantizer = module[0]
            codes = lsq_codes(module.original, quantizer.step, quantizer.qmin, quantizer.qmax, quantizer.axis).numpy()
            assert np.array_equal(node.constants["weight"], codes)
            packed = format.pack_codes(codes, quantizer.bits).tobytes()
            assert packed in path.read_bytes() and len(packed) == -(-codes.size * quantizer.bits // 8)


@pytest.mark.parametrize("combine", COMBINE)
def test_ensemble(combine, path):
    nets = [between(lambda net, x: net.q("conv", F.relu(x))) for _ in range(2)]
    for seed, net in enumerate(nets):
        torch.manual_seed(seed)
        net.fc.parametrizations.weight.original.data.normal_()
    x = images((3, 6, 6))
    report = export_ensemble(nets, x, path, [x[:4], x[4:]], combine=combine, classes=list("abcde"))
    graph = format.load(path)
    assert [member.name for member in graph.members] == ["member0", "member1"] and graph.combine == combine
    got = reference.run(graph, x)
    assert np.array_equal(qdeploy.load_int_model(path)(x), got)
    logits = [emulated(net, graph, x, member=i) for i, net in enumerate(nets)]
    softmax = lambda v: np.exp(v) / np.exp(v).sum(1, keepdims=True)  # noqa: E731
    expected = softmax(sum(logits) / 2) if combine == "logits" else sum(map(softmax, logits)) / 2
    assert np.abs(got - expected).max() < 1e-5
    assert report.top1_agreement == 1 and {layer.member for layer in report.layers} == {"member0", "member1"}
    assert "member1/conv " in str(report)


def test_raw_images(path):
    net = between(lambda net, x: F.relu(x))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3), np.uint8)
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    x = images((3, 6, 6))
    export(net, x, path, pixels, preprocess=preprocess)
    graph = format.load(path)
    floats = ((pixels / np.float32(255) - np.float32(preprocess["mean"])) / np.float32(preprocess["std"])).transpose(
        0, 3, 1, 2
    )
    model = qdeploy.load_int_model(path)
    assert np.array_equal(model(pixels), model(np.ascontiguousarray(floats)))
    assert np.array_equal(model(pixels), reference.run(graph, pixels))


def test_twenty_steps_of_training_to_the_engine(path):
    from qdeploy.training import step_group
    from qdeploy.training.models import MODELS

    torch.manual_seed(0)
    labels = torch.arange(256) % 4
    x = torch.randn(256, 1, 16, 16) * 0.5
    for i, label in enumerate(labels):  # a bright quadrant says the class
        x[i, 0, 8 * (label // 2) : 8 * (label // 2) + 8, 8 * (label % 2) : 8 * (label % 2) + 8] += 1
    net = MODELS["nin"](4, 1, width=1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5  # 20 steps are few for running statistics
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)

    def train(steps):
        for _ in range(steps):
            batch = torch.randint(256, (32,))
            loss = F.cross_entropy(net.train()(x[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    train(10)
    quantize_(net, 7, skip=[])
    optimizer.add_param_group(step_group(net, 3e-5))
    train(10)
    parameters = {name: value.clone() for name, value in net.state_dict().items() if isinstance(value, torch.Tensor)}
    report = export(net, x[:1], path, x.split(64))
    assert net.training and all(
        torch.equal(value, parameters[name]) for name, value in net.state_dict().items() if name in parameters
    )
    model, graph = qdeploy.load_int_model(path), format.load(path)
    held_out = (x + 0.1 * torch.randn_like(x)).numpy()
    assert np.array_equal(model(held_out), reference.run(graph, held_out))
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(held_out)).argmax(1).numpy()
    assert (model.predict(held_out) == expected).mean() > 0.97 and report.top1_agreement > 0.97 and report.images == 256
    assert (expected == labels.numpy()).mean() > 0.5  # it did learn


def test_every_module_keeps_its_mode(path):
    net, x = two_layers()
    quantize_(net, 8)
    net.train()
    net.conv.eval()  # as with frozen BatchNorm
    export(net, x, path, x)
    assert net.training and not net.conv.training and net.fc.training
