"""Convolutional networks that need format version 3: what moves rows or channels, norms, gates and resizes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulated import between, check, conv, ops
from torch import nn

torch.set_num_threads(1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def split(net, x):
    left, right = F.max_pool2d(x, 2, 1).chunk(2, 1)
    return torch.cat([left, net.q("body", net.body(right))], 1)


def split_of_a_convolution(net, x):
    left, right = net.body(x).split([2, 6], 1)
    return torch.cat([net.q("body", left), net.q("body", right)], 1)


def shuffle(net, x):
    x = F.max_pool2d(x, 2, 1)
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def crop_flip_and_roll(net, x):
    return x[:, :, 1:, :-2].flip(3).roll((1, 2), (2, 3))


def reversed_channels(net, x):
    return x[:, [7, 6, 5, 4, 3, 2, 1, 0]]


def padded(mode):
    return lambda net, x: net.q("body", net.body(F.pad(x, (1, 2, 2, 1), mode)))


def nearest(net, x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


def pixel_shuffle(net, x):
    return net.q("body", net.body(F.pixel_shuffle(x, 2)))


def pixel_unshuffle(net, x):
    return net.q("body", net.body(F.pixel_unshuffle(x, 2)))


def group_norm(net, x):
    return net.q("body", net.body(x))


def norm_of_channels(net, x):
    return net.q("body", net.body(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def linear_of_channels(net, x):
    """As in ConvNeXt: a linear layer is a 1x1 convolution."""
    x = net.q("body", net.body(x.permute(0, 2, 3, 1)))
    return x.permute(0, 3, 1, 2)


def spatial_gate(net, x):
    gate = net.q("sigmoid", torch.sigmoid(net.q("body", net.body(x))))
    return net.q("mul", x * gate)


def gate_of_mean(net, x):
    gate = net.q("sigmoid", torch.sigmoid(net.q("mean", x.mean(1, keepdim=True))))
    return net.q("mul", x * gate)


def gated_linear_unit(net, x):
    x = net.body(x)
    value, gate = net.q("body#2", x[:, :8]), net.q("body", x[:, 8:])
    return net.q("mul", value * net.q("sigmoid", torch.sigmoid(gate)))


def gate_by_linear(net, x):
    gate = net.q("body", net.body(net.q("mean", x.mean((2, 3)))))
    gate = net.q("sigmoid", torch.sigmoid(gate))
    return net.q("mul", x * gate.view(-1, 8, 1, 1).expand_as(x))


def row_gate(net, x):
    return net.q("mul", x * net.q("mean", x.mean(3, keepdim=True)).expand_as(x))


def sum_with_a_row(net, x):
    return net.q("add", x + net.q("mean", x.mean((2, 3), keepdim=True)))


def product(net, x):
    return net.q("mul", x * net.q("body", net.body(x)))


def pixel_constant(net, x):
    return net.q("add", x + torch.linspace(-1, 1, x.shape[2] * x.shape[3]).to(x.dtype).reshape(x.shape[2:]))


def uneven_pool(net, x):
    return net.q("body", net.body(x))


def one_dimension(net, x):
    x = net.q("body", net.body(x.flatten(2)))
    return x.unsqueeze(-1)


def mixing_of_rows(net, x):
    """A linear layer over the pixels, as in MLP-Mixer."""
    y = net.q("body", net.body(x.flatten(2)))
    return y.reshape(x.shape)


def mixing_of_tokens(net, x):
    x = net.q("norm", net.norm(x.flatten(2).transpose(1, 2)))
    return net.q("body", net.body(x.transpose(1, 2))).reshape(-1, 8, 8, 8)


def difference_of_parts(net, x):
    """Of a part and a whole tensor, in this order."""
    return net.q("body", x[:, :4] - net.body(x))


def difference_of_functions(net, x):
    """x - f(x) is a table, and so is f(x) - 2x."""
    y = x - torch.sigmoid(x)
    return net.q("rsub", torch.rsub(y, torch.sigmoid(y), alpha=2))


def pixel_factor(net, x):
    factor = torch.linspace(-1, 2, 64).reshape(8, 8).to(x.dtype)
    if net.grids is not None:
        factor = net.q("expand_as", factor)
    return net.q("mul", x * factor)


def fused_product(net, x):
    gate = net.q("body", net.body(x))
    return net.q("add", torch.addcmul(x, x, gate) if net.grids is None else x + net.q("mul", x * gate))


FLOWS = {  # flow, modules, the ops that must be there, and those that must not
    "split": (split, {"body": conv(4, 4)}, {"gather"}, set()),
    "split_of_a_convolution": (split_of_a_convolution, {"body": conv(8, 8)}, {"concat"}, {"gather"}),
    "shuffle": (shuffle, {}, {"gather"}, set()),
    "crop_flip_and_roll": (crop_flip_and_roll, {}, {"gather"}, set()),
    "reversed_channels": (reversed_channels, {}, set(), {"gather"}),
    "reflect": (padded("reflect"), {"body": conv(8, 8)}, {"gather"}, set()),
    "replicate": (padded("replicate"), {"body": conv(8, 8)}, {"gather"}, set()),
    "nearest": (nearest, {}, {"gather"}, set()),
    "pixel_shuffle": (pixel_shuffle, {"body": conv(2, 8)}, {"tokens", "reshape", "gather"}, {"concat"}),
    "pixel_unshuffle": (pixel_unshuffle, {"body": conv(32, 8, 1)}, {"gather", "reshape", "image"}, {"concat"}),
    "group_norm": (group_norm, {"body": nn.GroupNorm(2, 8)}, {"norm"}, set()),
    "instance_norm": (group_norm, {"body": nn.InstanceNorm2d(8, affine=True)}, {"norm"}, set()),
    "norm_of_channels": (norm_of_channels, {"body": nn.LayerNorm(8)}, {"norm"}, {"gather", "tokens"}),
    "linear_of_channels": (linear_of_channels, {"body": nn.Linear(8, 8)}, set(), {"gather", "tokens", "linear"}),
    "spatial_gate": (spatial_gate, {"body": conv(8, 1)}, {"mul"}, {"gather"}),
    "gate_of_mean": (gate_of_mean, {}, {"mul"}, {"gather"}),
    "gated_linear_unit": (gated_linear_unit, {"body": conv(8, 16)}, {"mul"}, {"gather"}),
    "gate_by_linear": (gate_by_linear, {"body": nn.Linear(8, 8)}, {"mul"}, {"gather"}),
    "row_gate": (row_gate, {}, {"mul", "gather"}, set()),
    "sum_with_a_row": (sum_with_a_row, {}, {"add", "gather"}, set()),
    "product": (product, {"body": conv(8, 8)}, {"mul"}, {"gather"}),
    "pixel_constant": (pixel_constant, {}, {"position", "image"}, set()),
    "mixing_of_rows": (mixing_of_rows, {"body": nn.Linear(64, 64)}, {"linear"}, {"gather"}),
    "mixing_of_tokens": (
        mixing_of_tokens,
        {"norm": nn.LayerNorm(8), "body": nn.Linear(64, 64)},
        {"reshape", "linear"},
        {"gather"},
    ),
    "difference_of_functions": (difference_of_functions, {}, {"table"}, {"add"}),
    "pixel_factor": (pixel_factor, {}, {"position", "mul"}, {"gather"}),
    "fused_product": (fused_product, {"body": conv(8, 8)}, {"mul", "add"}, set()),
    "uneven_pool": (uneven_pool, {"body": nn.AdaptiveAvgPool2d((4, 3))}, {"resize"}, set()),
    "one_dimension": (one_dimension, {"body": nn.Conv1d(8, 8, 3, padding=1)}, set(), {"gather", "linear#2"}),
}


@pytest.mark.parametrize("name", FLOWS)
def test_flow(name, path):
    flow, modules, there, absent = FLOWS[name]
    torch.manual_seed(0)
    for module in modules.values():
        if getattr(module, "affine", False) or isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
    report, graph = check(between(flow, **modules), (3, 8, 8), path)
    body = {*ops(graph)[1:-2]}
    assert there <= body and not absent & body, ops(graph)
    assert report.output_sqnr_db > 20


def choice(net, x):
    """Between two branches, as in SKNet and ResNeSt. The file holds the difference of the scores, and two sigmoids."""
    a, b = x, net.q("body", net.body(x))
    scores = net.score(net.q("mean", net.q("add", a + b).mean((2, 3), keepdim=True))).reshape(-1, 2, 8, 1, 1)
    if net.grids is None:
        return (torch.stack([a, b], 1) * scores.softmax(1)).sum(1)
    difference = net.q("score#2", net.q("score", scores[:, 0]) - scores[:, 1])
    first, second = net.q("sigmoid", difference.sigmoid()), net.q("sigmoid#2", (-difference).sigmoid())
    return net.q("add#2", net.q("mul", a * first) + net.q("mul", b * second))


def test_softmax_over_two_is_a_sigmoid(path):
    torch.manual_seed(0)
    report, graph = check(between(choice, body=conv(8, 8), score=conv(8, 16, 1)), (3, 8, 8), path)
    assert ops(graph).count("table") == 2 and "mul" in ops(graph) and report.output_sqnr_db > 35


def test_difference_of_a_part_and_a_whole(path):
    report, graph = check(between(difference_of_parts, 4, body=conv(8, 4)), (3, 8, 8), path)
    assert "conv2d" in ops(graph)[1:] and report.output_sqnr_db > 25


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "options", [{"size": (13, 5)}, {"scale_factor": 2.0}, {"size": (15, 15), "align_corners": True}]
)
def test_resize(mode, options, path):
    """Weights have 11 bits."""

    def flow(net, x):
        return net.q(f"upsample_{mode}2d", F.interpolate(x, mode=mode, **options))

    report, graph = check(between(flow), (3, 8, 8), path, 2e-2)
    assert "resize" in ops(graph) and report.output_sqnr_db > 25
    constants = next(node.constants for node in graph.members[0].nodes if node.op == "resize")
    assert (constants["row_weight"].sum(1) == 2048).all() and (constants["column_weight"].sum(1) == 2048).all()
    assert constants["row_weight"].dtype == np.int32
