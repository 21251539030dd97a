"""The weights that measures move: quantizers bypassed, BatchNorm folded, one order for all networks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from qdeploy.errors import InputError
from qdeploy.training import MODELS, quantize_
from qdeploy.training.attached_quantizers import quantizers
from qdeploy.training.fingerprint import network_hash
from qdeploy.training.measures.weights import Place, bare, folded, normal, parameters, uniform, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def nin() -> nn.Module:
    """With statistics, gains (some negative) and shifts that are not those of a new network."""
    torch.manual_seed(0)
    net = MODELS["nin"](4, 1, depth=1, width=1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval()


IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def quantized(net: nn.Module, **options: object) -> nn.Module:
    net = copy.deepcopy(net)
    quantize_(net, 3, calibration=[IMAGES], **options)
    return net.eval()


@torch.no_grad()
def answers(net: nn.Module) -> Tensor:
    return net(IMAGES)


@pytest.mark.parametrize("options", [{}, {"activation_bits": 4}])
def test_bare_copies_compute_what_the_quantized_network_does(options):
    net = quantized(nin(), **options)
    before = network_hash(net)
    plain = bare(net)
    assert torch.equal(answers(plain), answers(net))
    assert network_hash(net) == before and len(quantizers(net)) == (6 if options else 3)
    assert {name.rpartition(".")[2] for name in quantizers(plain)} == ({"input"} if options else set())
    assert not any(isinstance(layer, nn.Conv2d) and hasattr(layer, "parametrizations") for layer in plain.modules())


def test_moved_weights_are_not_rounded_again():
    net = quantized(nin())
    place = Place(bare(net))
    names = [*parameters(place.net)]
    moved = place.center + 1e-5
    place.move(moved)
    found = torch.cat([parameters(place.net)[name].detach().reshape(-1) for name in names])
    assert torch.equal(found, moved)
    assert not torch.equal(answers(place.net), answers(net))
    place.move(place.center)
    torch.testing.assert_close(answers(place.net), answers(net), rtol=0, atol=1e-5)  # channels last: other sums


def test_a_network_in_float_a_quantized_one_and_its_copy_have_one_order():
    net = nin()
    four = quantized(net, activation_bits=4)
    assert [*parameters(net)] == [*parameters(four)] == [*parameters(bare(four))] == sorted(parameters(net))
    assert len(parameters(net)) == len([*net.parameters()])
    assert [*weights(net)] == [name for name in parameters(net) if name.endswith("conv.weight")]


def test_weights_that_layers_share_stay_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2))
    net[1].weight = net[0].weight
    quantize_(net, 4)
    plain = bare(net)
    assert plain[0].weight is plain[1].weight and [*parameters(plain)] == [*parameters(net)]
    assert sum(one.numel() for one in parameters(plain).values()) == 25 + 10 + 12


def test_computed_weights_are_what_they_compute():
    torch.manual_seed(0)
    net = nn.Sequential(weight_norm(nn.Linear(5, 3)), nn.Linear(3, 2))
    plain = bare(net)
    assert torch.equal(plain[0].weight, net[0].weight) and type(plain[0]) is nn.Linear
    assert len([*net.parameters()]) == 5 and len(parameters(plain)) == 4


def test_batch_norm_is_folded_as_the_formula_has_it():
    net = nin()
    found = folded(net, IMAGES[:2])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in found.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    state = {name: value.double().numpy() for name, value in net.state_dict().items()}
    for name, now in weights(found).items():
        unit = name.removesuffix("conv.weight")
        gain = state[f"{unit}bn.weight"] / np.sqrt(state[f"{unit}bn.running_var"] + 1e-5)
        shift = (state[f"{unit}conv.bias"] - state[f"{unit}bn.running_mean"]) * gain + state[f"{unit}bn.bias"]
        np.testing.assert_allclose(now.detach().numpy(), state[name] * gain[:, None, None, None], rtol=1e-6)
        np.testing.assert_allclose(parameters(found)[f"{unit}conv.bias"].detach().numpy(), shift, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(answers(found), answers(net), rtol=1e-4, atol=1e-4)


def test_folding_a_quantized_network_starts_from_its_grid():
    net = quantized(nin())
    torch.testing.assert_close(answers(folded(net, IMAGES)), answers(net), rtol=1e-4, atol=1e-4)


class Branches(nn.Module):
    """A convolution with a norm of its own, and one over a concatenation or over what is read twice."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.conv, self.bn = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.late, self.head = nn.BatchNorm2d(3), nn.Linear(3, 2)
        self.bn.running_mean += 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y) + (y if self.kind == "read twice" else 0)
        return self.head(self.late(torch.cat([x, z], 1)).mean((2, 3)))


def test_norms_that_read_no_layer_stay():
    torch.manual_seed(0)
    net = Branches("once").eval()
    assert [name for name, module in folded(net, IMAGES).named_modules() if isinstance(module, nn.BatchNorm2d)] == [
        "late"
    ]


def test_what_cannot_be_folded_is_said():
    torch.manual_seed(0)
    net = Branches("read twice").eval()
    with pytest.raises(
        InputError, match=r"^expected the same outputs with BatchNorm folded, got \S+ away - at the netw"
    ):
        folded(net, IMAGES)


def test_random_vectors_are_those_of_their_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(normal(4, 7), torch.randn(4, generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(normal(4, 7), normal(4, 8))
    many = uniform(10_000, 0)
    assert -1 <= many.min() < -0.99 and 0.99 < many.max() < 1
    assert torch.equal(torch.get_rng_state(), state)
