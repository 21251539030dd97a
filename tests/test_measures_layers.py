"""Measures of the weights of layers: noise of rounding, widths of bins, norms, and the first-order regularizer."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from qdeploy.errors import InputError
from qdeploy.training import MODELS, quantize_
from qdeploy.training.attached_quantizers import quantizers
from qdeploy.training.measures.bin_widths import bin_widths
from qdeploy.training.measures.norms import norms
from qdeploy.training.measures.quantization_noise import kl_to_uniform, ks_distance, quantization_noise, sides
from qdeploy.training.measures.regularizer import regularizer

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)


def small():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    for norm in (net[1], net[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
    return net.eval()


def quantized(bits=7, per_channel=True, activation_bits=None):
    net = small()
    quantize_(net, bits, activation_bits, per_channel=per_channel, calibration=torch.randn(8, 3, 6, 6))
    return net


def batches(count=2):
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(5, 3, 6, 6, generator=generator) for _ in range(count)]
    return [(one, torch.randint(5, (5,), generator=generator)) for one in inputs]


# ---- Noise of rounding ----------------------------------------------------------------------------------------------


def test_kl_of_known_histograms():
    assert kl_to_uniform(np.linspace(0, 1, 1000), 100) == pytest.approx(0, abs=1e-12)  # 10 in each bin
    assert kl_to_uniform(np.array([0.0] * 3 + [1.0]), 100) == pytest.approx(
        0.75 * math.log(75) + 0.25 * math.log(25)
    )  # two bins of a hundred
    assert kl_to_uniform(np.array([2.0, 2.0]), 100) is None
    assert kl_to_uniform(np.empty(0), 100) is None


def test_kl_of_a_triangular_density():
    """Of the density 2x on [0, 1]: the integral of 2x log 2x is log 2 - 1/2."""
    x = np.sqrt(np.linspace(0, 1, 200_001))
    assert kl_to_uniform(x, 200) == pytest.approx(math.log(2) - 0.5, abs=1e-4)


def test_kl_of_uniform_draws_is_what_bins_cost():
    found = [kl_to_uniform(RNG.random(5000), 100) for _ in range(400)]
    assert np.mean(found) == pytest.approx(99 / 10_000, rel=0.03)


def test_sides_and_their_distance():
    lower, upper = sides(np.array([5.0, 1, 2, 4, 9]))
    assert lower.tolist() == [3, 2] and upper.tolist() == [5, 1]
    lower, upper = sides(np.array([-3.0, 3, 1, -1]))
    assert lower.tolist() == upper.tolist() == [3, 1] and ks_distance(lower, upper) == 0
    assert ks_distance(np.array([1.0, 2, 3, 4]), np.array([3.0, 4, 5, 6])) == 0.5
    assert ks_distance(np.array([1.0]), np.array([2.0, 3])) == 1


def test_noise_of_a_layer():
    net = quantized(4)
    with torch.no_grad():
        net[3].parametrizations.weight.original[::3, 0] *= 4  # beyond the range
    found = quantization_noise(net, bins=16)
    assert [row["layer"] for row in found["table"]] == ["0", "3"]
    weight = net[3].parametrizations.weight.original.detach().double().numpy()
    step = net[3].parametrizations.weight[0].step.detach().double().numpy().reshape(-1, 1, 1, 1)
    codes = weight / step
    inside = (codes >= -8) & (codes <= 7)
    noise = (weight - np.clip(np.rint(codes), -8, 7) * step)[inside]
    row, curves = found["table"][1], found["curves"]["3"]
    assert row["bits"] == 4 and row["weights"] == 576 and row["clipped"] == pytest.approx(1 - inside.mean())
    assert 0 < row["clipped"] < 0.2
    shares = np.histogram(noise, 16)[0] / noise.size
    assert row["kl"] == pytest.approx(sum(p * math.log(p * 16) for p in shares if p), rel=1e-4)
    assert row["kl_of_uniform"] == 15 / (2 * noise.size)
    assert row["kl_in_steps"] < row["kl"]  # which eight different steps make larger
    assert curves["noise"]["counts"] == np.histogram(noise, 16)[0].tolist()
    assert sum(curves["weights"]["counts"]) == 576 and curves["weights"]["low"] == weight.min()
    ordered, median = np.sort(weight.ravel()), np.median(weight)
    gap = np.mean([abs(x + y - 2 * median) for x, y in zip(ordered[:288], ordered[::-1], strict=False)])
    assert row["asymmetry"] == pytest.approx(gap / weight.std())
    assert len(curves["symmetry"]["lower"]) == len(curves["symmetry"]["upper"]) == 200
    assert curves["symmetry"]["lower"][0] == pytest.approx(median - weight.min())
    json.dumps(found)


def test_weights_on_the_grid_have_no_noise():
    net = quantized(4)
    with torch.no_grad():
        for index in (0, 3):
            net[index].parametrizations.weight.original.zero_()
    row = quantization_noise(net)["table"][0]
    assert row["kl"] is row["kl_in_steps"] is row["asymmetry"] is row["asymmetry_ks"] is None and row["clipped"] == 0


@pytest.mark.parametrize("measure", [quantization_noise, bin_widths])
def test_networks_in_float_are_refused(measure):
    with pytest.raises(
        InputError, match="^expected a network with quantized weights, got one in float - at the network$"
    ):
        measure(small())


def test_too_few_bins():
    with pytest.raises(InputError, match="^expected at least 2, got 1 - at bins$"):
        quantization_noise(quantized(), bins=1)


# ---- Widths and norms -----------------------------------------------------------------------------------------------


def test_bin_widths_are_the_steps():
    net = quantized(6)
    first, second = bin_widths(net)["table"]
    step = quantizers(net)["3.weight"].step.detach().double()
    assert second["layer"] == "3" and second["bits"] == 6 and second["steps"] == 8
    assert (second["smallest"], second["largest"]) == (step.min().item(), step.max().item())
    assert second["step"] == step.median().item() and first["step"] != second["step"]
    weight = net[3].parametrizations.weight.original.detach().numpy()
    assert second["relative"] == pytest.approx(second["step"] / float(weight.std()))


def test_bins_are_wider_for_fewer_bits():
    widths = [bin_widths(quantized(bits, per_channel=False))["table"][0]["step"] for bits in (8, 4, 2)]
    # 2 mean|w| / sqrt(qmax): LSQ's initial step
    assert widths[0] * 127**0.5 == pytest.approx(widths[1] * 7**0.5) == pytest.approx(widths[2] * 1)


def test_norms_before_and_after_folding():
    net = small()
    found = norms(net, torch.randn(2, 3, 6, 6))
    plain = [net[i].weight.detach().double().numpy() for i in (0, 3, 8)]
    gains = [(net[i].weight / (net[i].running_var + net[i].eps).sqrt()).detach().double().numpy() for i in (1, 4)]
    folded = [w * g[:, None, None, None] for w, g in zip(plain, gains, strict=False)] + plain[2:]
    assert found["weights"] == sum(w.size for w in plain) and len(found["table"]) == 3
    assert found["norm"] == pytest.approx(np.linalg.norm(np.concatenate([w.ravel() for w in plain])))
    assert found["norm_folded"] == pytest.approx(np.linalg.norm(np.concatenate([w.ravel() for w in folded])), rel=1e-6)
    assert [row["layer"] for row in found["table"]] == ["0.weight", "3.weight", "8.weight"]
    by_layer = [np.linalg.norm(w) for w in folded]
    assert [row["norm_folded"] for row in found["table"]] == pytest.approx(by_layer, rel=1e-6)


def test_norms_of_quantized_weights_are_of_the_grid():
    net = quantized(2, per_channel=False)
    row = norms(net, torch.randn(2, 3, 6, 6))["table"][1]
    step = quantizers(net)["3.weight"].step.item()
    codes = np.clip(np.rint(net[3].parametrizations.weight.original.detach().numpy() / step), -2, 1)
    assert row["norm"] == pytest.approx(step * np.sqrt((codes**2).sum()), rel=1e-6)


# ---- Regularizer ----------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Linear in its first matrix, so that the first order is all there is; the second one is the classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.first(x))


def test_the_first_order_of_a_linear_network_is_exact():
    net = Linear()
    data = [(torch.randn(7, 6), torch.arange(7) % 3), (torch.randn(3, 6), torch.tensor([0, 2, 1]))]
    found = regularizer(net, data)
    x, labels = (torch.cat(parts).numpy() for parts in zip(*data, strict=True))
    rest = net(torch.from_numpy(x)).detach().numpy() - np.eye(3)[labels]
    assert found["loss"] == pytest.approx((rest**2).sum(1).mean(), rel=1e-6)
    assert [(row["steps"], row["bits"]) for row in found["table"]] == [("initial", 8), ("initial", 4), ("initial", 2)]
    weight = net.first.weight.detach().numpy()
    for row, qmax in zip(found["table"], (127, 7, 1), strict=True):
        step = 2 * np.abs(weight).mean() / math.sqrt(qmax)
        change = np.clip(np.rint(weight / step), -qmax - 1, qmax) * step - weight
        along = x @ change.T @ net.head.weight.detach().numpy().T
        assert row["regularizer"] == pytest.approx((along**2).sum(1).mean(), rel=1e-4)
        assert row["cross"] == pytest.approx(2 * (rest * along).sum(1).mean(), rel=1e-4)
        assert row["predicted"] == found["loss"] + row["regularizer"]
        assert row["loss_quantized"] == pytest.approx(row["first_order"], rel=1e-5)
    json.dumps(found)


def test_the_regularizer_is_the_slope_along_the_noise():
    """Against a difference of the network's outputs, in double."""
    net, data = quantized(4), batches()
    before = copy.deepcopy(net.state_dict())
    row = regularizer(net, data)["table"][0]
    assert (row["steps"], row["bits"]) == ("trained", 4)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items() if torch.is_tensor(value))
    plain = small().double()
    change = {i: net[i].weight.detach().double() - plain[i].weight.detach() for i in (0, 3)}
    x = torch.cat([inputs for inputs, _ in data]).double()
    outputs = []
    for share in (-1e-6, 1e-6):
        moved = copy.deepcopy(plain)
        for i, noise in change.items():
            moved[i].weight.data += share * noise
        outputs.append(moved(x).detach())
    along = (outputs[1] - outputs[0]) / 2e-6
    assert row["regularizer"] == pytest.approx(along.square().sum(1).mean().item(), rel=1e-4)
    labels = torch.cat([one for _, one in data])
    rest = (net(x.float()) - functional.one_hot(labels, 5)).detach()
    assert row["loss_quantized"] == pytest.approx(rest.square().sum(1).mean().item(), rel=1e-5)


def test_the_regularizer_of_few_bits_is_larger():
    sizes = [row["regularizer"] for row in regularizer(small(), batches())["table"]]
    assert sizes[0] < sizes[1] < sizes[2]


def test_quantized_inputs_go_through():
    found = regularizer(quantized(4, activation_bits=8), batches(1), bits=())
    (row,) = found["table"]
    assert row["regularizer"] > 0 and row["predicted"] == found["loss"] + row["regularizer"]


def test_layers_of_different_bits_have_none_in_common():
    assert regularizer(quantized({"0": 4, "3": 6}), batches(1), bits=())["table"][0]["bits"] is None


def test_a_network_of_the_zoo():
    net = MODELS["nin"](4, 1, depth=1, width=1).eval()
    quantize_(net, 4, per_channel=False)
    data = [(torch.randn(4, 1, 8, 8), torch.arange(4))]
    assert len(regularizer(net, data)["table"]) == 4
    assert norms(net, data[0][0])["norm"] > 0
