"""Convolutions that standardize their weight within forward: the quantizer comes behind, the rest stays as it was."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import qdeploy
from qdeploy import InputError, format, reference
from qdeploy.training import quantize_, quantize_like_, quantizers, step_group, summary
from qdeploy.training.attached_quantizers import weight_before, weight_quantizer
from qdeploy.training.methods.inq import INQ
from qdeploy.training.methods.quantizations import OBC, UniformNoise
from qdeploy.training.standardized import StandardizedConv2d

torch.set_num_threads(1)
X = torch.randn(8, 3, 13, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


class Standard(nn.Conv2d):
    """As BiT has them."""

    def __init__(self, *args, eps=1e-6, **options):
        super().__init__(*args, **options)
        self.eps = eps

    def standardized(self, gain=None):
        rows = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(rows, None, None, gain, training=True, momentum=0.0, eps=self.eps).reshape_as(self.weight)

    def forward(self, x):
        weight = self.standardized()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledSame(Standard):
    """As NFNets have them, padded for ceil(size / stride) rows and columns."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scale = 1.7 * self.weight[0].numel() ** -0.5
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        margins = []
        for axis in (1, 0):
            size, stride = x.shape[2 + axis], self.stride[axis]
            total = max((math.ceil(size / stride) - 1) * stride + self.kernel_size[axis] - size, 0)
            margins += [total // 2, total - total // 2]
        weight = self.standardized((self.gain * self.scale).view(-1))
        return F.conv2d(F.pad(x, margins), weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def make():
    return nn.Sequential(
        *(Standard(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()),
        *(ScaledSame(8, 8, (3, 2), stride=2, bias=False), nn.ReLU(), ScaledSame(8, 12, 3, groups=4), nn.ReLU()),
        *(nn.Conv2d(12, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


STANDARDIZED = ("0", "3", "5")


def trained(net, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(X + step), torch.arange(8) % 5).backward()
        optimizer.step()
    return net


def quantized(bits=6):
    net = make()
    quantize_(net, bits)
    return trained(net, torch.optim.SGD(net.parameters(), 0.05), 3).eval()


def test_codes_in_the_file_are_those_of_training(tmp_path):
    net, path = quantized(), tmp_path / "net.safetensors"
    report = qdeploy.export(net, X[:1], path, X)
    graph = format.load(path)
    nodes = {node.name: node for node in graph.members[0].nodes}
    for name in (*STANDARDIZED, "7"):
        layer = net.get_submodule(name)
        quantizer = weight_quantizer(layer)
        codes = quantizer.codes(weight_before(layer, quantizer).detach())
        assert np.array_equal(nodes[name].constants["weight"], codes.numpy())
        step = quantizer.step.detach().reshape(-1, 1, 1, 1)
        assert torch.equal(layer.weight.detach(), codes * step)  # what the convolution multiplies with
    assert [layer.quantizer for layer in report.layers if layer.weights] == ["learned"] * 4 + ["rounded"]
    assert np.array_equal(qdeploy.load_int_model(path)(X.numpy()), reference.run(graph, X.numpy()))
    assert report.output_sqnr_db > 25


@pytest.mark.parametrize("size", [(13, 12), (12, 13), (7, 7), (8, 16)])
def test_without_quantizers_the_network_is_what_it_was(size):
    net, images = make(), torch.randn(2, 3, *size)
    before = net(images)
    quantize_(net, 4)
    assert not torch.equal(net(images), before)
    for name in (*STANDARDIZED, "7"):
        net.get_submodule(name).parametrizations.weight[-1] = nn.Identity()
    assert torch.equal(net(images), before)


def test_parameters_stay_and_all_of_them_train():
    net = make()
    parameters = {id(parameter) for parameter in net.parameters()}
    quantize_(net, 5)
    assert parameters < {id(parameter) for parameter in net.parameters()}
    assert [name for name, _ in net[3].named_parameters()] == [
        *("parametrizations.weight.original", "parametrizations.weight.0.gain", "parametrizations.weight.1.step")
    ]
    trained(net, torch.optim.SGD(net.parameters(), 0.0), 1)
    assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())


def test_gradients_are_those_through_quantizer_and_standardization():
    layer, upstream = ScaledSame(3, 4, 3, stride=2), torch.randn(4, 3, 3, 3)
    weight, gain, before = layer.weight, layer.gain, copy.deepcopy(layer)
    net = nn.Sequential(layer, nn.Linear(6, 2))
    quantize_(net, 4)
    quantizer = weight_quantizer(layer)
    rounded = quantizer(before.standardized((before.gain * before.scale).view(-1)))
    expected = torch.autograd.grad((rounded * upstream).sum(), [before.weight, before.gain, quantizer.step])
    got = torch.autograd.grad((layer.weight * upstream).sum(), [weight, gain, quantizer.step])
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_first_steps_and_the_summary_are_of_the_standardized_weight():
    net = make()
    with torch.no_grad():
        weights = {"0": net[0].standardized(), "3": net[3].standardized((net[3].gain * net[3].scale).view(-1))}
    quantize_(net, 7)
    rows = {row.name: row for row in summary(net)}
    for name, weight in weights.items():
        quantizer = quantizers(net)[f"{name}.weight"]
        torch.testing.assert_close(quantizer.step, 2 * weight.abs().mean((1, 2, 3)) / 63**0.5)
        error = (quantizer(weight) - weight).norm() / weight.norm()
        assert rows[name].error == pytest.approx(error.item(), rel=1e-5) and rows[name].bits == 7


def test_a_run_goes_on_as_if_it_had_never_stopped():
    def started(net):
        return torch.optim.Adam(net.parameters(), 0.01)

    net = make()
    optimizer = started(net)
    trained(net, optimizer, 2)
    quantize_(net, 5)
    optimizer.add_param_group(step_group(net, 0.01))
    trained(net, optimizer, 2)
    state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    trained(net, optimizer, 2)

    other = make()
    resumed = started(other)
    quantize_like_(other, state[0])
    resumed.add_param_group(step_group(other, 0.01))
    resumed.load_state_dict(state[1])
    trained(other, resumed, 2)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies(copied):
    net = quantized()
    other = copied(net)
    assert torch.equal(other(X), net(X))
    with torch.no_grad():
        other[3].parametrizations.weight[0].gain.mul_(2)
    assert not torch.equal(other(X), net(X))


def test_a_network_that_is_refused_is_as_it_was():
    net = make()
    before, kinds = net(X), [type(module) for module in net]
    with pytest.raises(InputError, match="expected inputs that the network takes"):
        quantize_(net, 4, 4, calibration=X.numpy()[:, :2])
    assert [type(module) for module in net] == kinds
    assert torch.equal(net(X), before) and [*net.state_dict()] == [*make().state_dict()]


def test_layers_left_in_float_keep_their_class():
    net = make()
    quantize_(net, {"3": 4})
    assert type(net[0]) is Standard and isinstance(net[3], StandardizedConv2d) and type(net[5]) is ScaledSame


def test_layers_that_share_weight_and_gain_share_the_quantizer():
    net = nn.Sequential(ScaledSame(3, 3, 3), ScaledSame(3, 3, 3, bias=False), nn.Flatten(), nn.Linear(3 * 13 * 12, 2))
    net[1].weight, net[1].gain = net[0].weight, net[0].gain
    quantize_(net, 5)
    assert quantizers(net)["0.weight"] is quantizers(net)["1.weight"]
    assert torch.equal(net[0].weight, net[1].weight)


class OutsideOfTheRoot(Standard):
    def standardized(self):
        dims = (1, 2, 3)
        spread = self.weight.std(dims, unbiased=False, keepdim=True)
        return (self.weight - self.weight.mean(dims, keepdim=True)) / (spread + self.eps)


class Twice(Standard):
    def forward(self, x):
        return super().forward(super().forward(x))


class OfTwo(Standard):
    def forward(self, x, y):
        return super().forward(x) + y


OTHERS = {
    "eps elsewhere": lambda: OutsideOfTheRoot(3, 3, 3),
    "more in its forward": lambda: Twice(3, 3, 3),
    "more inputs": lambda: OfTwo(3, 3, 3),
    "one element a channel": lambda: Standard(3, 3, 1, groups=3),
    "a parametrization": lambda: parametrizations.weight_norm(Standard(3, 3, 3)),
    "no eps": lambda: nn.Conv2d(3, 3, 3),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_quantized_as_they_are(name):
    net = nn.Sequential(OTHERS[name](), nn.Linear(3, 2))
    quantize_(net, 4)
    assert not isinstance(net[0], StandardizedConv2d) and weight_quantizer(net[0]) is net[0].parametrizations.weight[-1]


@pytest.mark.parametrize("quantization", [INQ(0, 4), OBC(), UniformNoise(1e-3)])
def test_methods_that_round_parameters_refuse_them(quantization):
    with pytest.raises(InputError) as error:
        quantization.attach(make(), None, [(X, torch.arange(8) % 5)])
    got = "one that its forward standardizes"
    assert str(error.value) == f"expected a weight that is a Parameter, got {got} - at layer `0`"


def test_what_a_layer_is_does_not_depend_on_its_weights():
    """Gains of NFNets begin at 0, where every standardization gives the same; pretrained weights may be of any size."""
    for layer in (ScaledSame(3, 4, 3, stride=2), OutsideOfTheRoot(3, 4, 3, stride=2)):
        is_known = isinstance(layer, ScaledSame)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.zero_()
        net = nn.Sequential(layer, nn.Linear(6, 2)).to(torch.bfloat16)
        quantize_(net, 4)
        assert isinstance(net[0], StandardizedConv2d) is is_known
