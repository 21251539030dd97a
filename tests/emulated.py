"""Networks that say themselves, by `net.q(name, x)`, after which operations the integers are rounded; an independent
emulation rounds there, in float64 with the scales of the file, and the file must agree with it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import qdeploy
from qdeploy import export, format, reference
from qdeploy.training import quantize_


class Net(nn.Module):
    """A network of the given modules whose forward is `flow(net, x)`."""

    def __init__(self, flow, **modules):
        super().__init__()
        self.flow = flow
        self.grids = None  # while emulating: {tensor name: (scale, zero point, lowest and highest code)} of the file
        for name, module in modules.items():
            setattr(self, name, module)

    def q(self, name, x):
        if self.grids is None:
            return x
        scale, zero_point, low, high = self.grids[name]
        return scale * (torch.clamp(torch.round(x / scale + zero_point), low, high) - zero_point)

    def forward(self, x):
        return self.flow(self, self.q("input", x))


def conv(c_in, c_out, kernel=3, **options):
    return nn.Conv2d(c_in, c_out, kernel, **{"padding": kernel // 2 if isinstance(kernel, int) else 0, **options})


def randomized(net, seed=0):
    """Random weights; BatchNorm with gains of both signs and statistics that matter."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor, low, high):
        tensor.data = torch.rand(tensor.shape, generator=generator) * (high - low) + low

    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            draw(module.running_mean, -1, 1)
            draw(module.running_var, 0.1, 2)
            if module.affine:
                draw(module.weight, -1.5, 1.5)
                draw(module.bias, -1, 1)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            bound = 1.7 * module.weight[0].numel() ** -0.5
            draw(module.weight, -bound, bound)
            if module.bias is not None:
                draw(module.bias, -0.5, 0.5)
    return net


def quantized(net, bits=7, **options):
    quantize_(randomized(net), bits, **{"skip": [], **options})
    return net


def images(shape, seed=0, count=8):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def emulated(net, graph, x, member=0):
    """The network in float64, rounded where it says with the scales of the file."""
    net.grids = {
        t.name: (float(np.float32(t.scale)), t.zero_point, *((-32767, 32767) if t.dtype == "s16" else (0, 255)))
        for t in graph.members[member].tensors
    }
    try:
        with torch.no_grad():
            return net.double().eval()(torch.from_numpy(x).double()).numpy()
    finally:
        net.grids = None
        net.float()


def check(net, shape, path, tolerance=1e-5, **options):
    """Exports, runs the file by engine and reference, and compares with the emulation; returns report and graph.

    The f32 constants of the file and the float64 of the emulation can differ at a rounding tie only, by one code. All
    inputs are fixed and none meets such a tie, so what is left is the f32 rounding of the last operation: 1e-5 of the
    largest output.
    """
    x = images(shape)
    report = export(net, x[:1], path, x, **options)
    graph = format.load(path)
    got = reference.run(graph, x)
    assert np.array_equal(qdeploy.load_int_model(path)(x), got)
    expected = emulated(net, graph, x)
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()
    return report, graph


def ops(graph):
    return [node.op for node in graph.members[0].nodes]


def between(flow, channels=8, **modules):
    """A convolution with BatchNorm before `flow`; global pooling and a linear layer after it."""

    def whole(net, x):
        x = flow(net, net.q("conv", net.bn(net.conv(x))))
        x = net.q("pool", net.pool(x)) if x[0, 0].numel() > 1 else net.pool(x)
        return net.fc(torch.flatten(x, 1))

    ends = dict(conv=conv(3, 8), bn=nn.BatchNorm2d(8), pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(channels, 5))
    return quantized(Net(whole, **ends, **modules))
