"""Channels of LayerNorms made alike: the same network in float, fewer wasted codes, and one norm twice in the file."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import qdeploy
from qdeploy import InputError, _engine, format, reference
from qdeploy.exporter import check
from qdeploy.training import equalize_, quantize_, quantize_like_, quantizers
from qdeploy.training.methods.quantizations import LSQ, RTN

WIDTH, TOKENS = 16, 6


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class PostNorm(nn.Module):
    """Two blocks whose residuals come from a norm, as in BERT. Two of its channels are far larger than the others, and
    matter no more than those."""

    def __init__(self, embedding: bool = False):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Embedding(20, WIDTH) if embedding else nn.Linear(8, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.one = nn.ModuleList(nn.Linear(WIDTH, 24) for _ in range(2))
        self.two = nn.ModuleList(nn.Linear(WIDTH, 24) for _ in range(2))
        self.back = nn.ModuleList(nn.Linear(24, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)
        for norm in self.norms[:2]:
            with torch.no_grad():
                norm.weight[:2] *= torch.tensor([40.0, 25.0])
        for layer in (*self.one, *self.two):
            with torch.no_grad():
                layer.weight[:, :2] /= torch.tensor([40.0, 25.0])

    def forward(self, x):
        x = self.norms[0](self.first(x))
        for i in range(2):
            y = torch.relu(self.one[i](x)) + torch.relu(self.two[i](x))
            x = self.norms[i + 1](self.back[i](y) + x)
        return self.head(x[:, 0])


def shown(n=64, seed=0):
    return torch.randn(n, TOKENS, 8, generator=torch.Generator().manual_seed(seed))


def test_in_float_the_network_stays_and_each_reader_is_found():
    net, images = PostNorm().eval(), shown()
    wanted, before = net(images), copy.deepcopy(net.state_dict())
    weights = [id(parameter) for parameter in net.parameters()]
    changed = equalize_(net, images)
    assert [id(one) for one in changed] == [id(net.get_submodule(f"{kind}.{i}").weight) for i in (0, 1)
                                            for kind in ("one", "two")]  # fmt: skip
    assert [id(parameter) for parameter in net.parameters()] == weights
    assert torch.allclose(net(images), wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        largest = net.norms[0](net.first(images)).abs().amax((0, 1))
    factor = (largest / largest.median()).sqrt()
    assert torch.equal(net.one[0].input_factor, 1 / factor)
    assert torch.equal(net.one[0].weight, before["one.0.weight"] * factor)
    assert "input_factor" not in net.head._buffers  # it reads a part of the last norm
    assert not net.back[0]._forward_pre_hooks


def test_exponent_one_gives_all_channels_one_range():
    net, images, seen = PostNorm().eval(), shown(), []
    equalize_(net, images, exponent=1)
    net.one[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0].abs().amax((0, 1))))
    net(images)
    assert torch.allclose(seen[0], seen[0][0].expand(WIDTH), rtol=1e-5)


@pytest.mark.parametrize(("exponent", "least", "most"), [(None, 0, 33.3), (0.5, 33.5, 99)])
def test_the_file_has_the_norm_in_8_bits_for_linear_layers_and_in_16_for_the_residual(tmp_path, exponent, least, most):
    net, images = PostNorm().eval(), shown()
    wanted, path = net(images).detach(), tmp_path / "m.safetensors"
    if exponent is not None:
        equalize_(net, images, exponent=exponent)
    qdeploy.export(net, images[:1], path, images, fallback_bits=8)
    graph = format.load(path)
    member = graph.members[0]
    norms = [member.tensors[node.output].dtype for node in member.nodes if node.op == "norm"]
    assert norms == (["u8", "u8", "u8"] if exponent is None else ["s16", "u8", "s16", "u8", "u8"])
    assert not [node for node in member.nodes if node.op == "conv2d"]
    test = shown(32, 7)
    expected = reference.run(graph, test.numpy())
    for isa in _engine.isas():
        assert qdeploy.load_int_model(path, 1, isa)(test.numpy()).tobytes() == expected.tobytes()
    found = torch.from_numpy(qdeploy.load_int_model(path)(images.numpy()))
    decibels = 10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum())
    assert least < decibels < most, decibels


def test_texts():
    net = PostNorm(embedding=True).eval()
    ids = torch.randint(20, (40, TOKENS), generator=torch.Generator().manual_seed(0))
    wanted = net(ids)
    equalize_(net, [{"input_ids": ids, "labels": torch.zeros(40)}])
    assert torch.allclose(net(ids), wanted, rtol=1e-4, atol=1e-4)
    quantize_(net, 8, 8, calibration=ids)
    assert "one.0.input" in quantizers(net)
    check(net, ids[:1])


def test_a_saved_state_a_copy_and_a_pickle_bring_the_factors_along():
    net, images = PostNorm(), shown()
    equalize_(net, images)
    quantize_(net, 7, 8, calibration=images)
    loaded = PostNorm()
    quantize_like_(loaded, net.state_dict())
    for other in (loaded, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other.eval()(images), net.eval()(images))
        assert [*other.state_dict()] == [*net.state_dict()]


@pytest.mark.parametrize("exponent", [0, -1, 1.5, float("nan")])
def test_exponents(exponent):
    with pytest.raises(InputError, match=r"expected an exponent greater than 0, at most 1, got .* - at equalize_"):
        equalize_(PostNorm(), shown(), exponent=exponent)


def test_refusals_leave_the_network_as_it_was():
    net, images = PostNorm(), shown()
    with pytest.raises(InputError, match="expected finite numbers, got NaN or infinity - at batch 0"):
        equalize_(net, torch.full((2, TOKENS, 8), torch.nan))
    with pytest.raises(InputError, match="expected inputs that the network takes"):
        equalize_(net, images[:, :, :3])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())
    equalize_(net, images)
    expected = "expected a network in float, got one quantized or equalized before - at equalize_"
    with pytest.raises(InputError, match=expected):
        equalize_(net, images)
    with pytest.raises(InputError, match=expected):
        equalize_(quantized := PostNorm(), quantize_(quantized, 7) and images)
    with pytest.raises(InputError, match="expected linear layers that read the output of a LayerNorm, got none"):
        equalize_(nn.Sequential(nn.LayerNorm(8), nn.Flatten(), nn.Linear(48, 2)), images)


def test_layers_that_read_more_than_one_norm_or_share_their_weight_stay():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
            self.twice, self.tied, self.own = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.other = nn.Linear(8, 8)
            self.other.weight = self.tied.weight

        def forward(self, x):
            a, b = self.norms[0](x), self.norms[1](x)
            return self.twice(a) + self.twice(b) + self.tied(a) + self.other(x) + self.own(a)

    net = Shared()
    assert [id(one) for one in equalize_(net, shown())] == [id(net.own.weight)]


def test_before_the_switch_of_a_run_and_of_finished_networks():
    net, images = PostNorm(), shown()
    optimizer = torch.optim.Adam(net.parameters())
    net(images).square().mean().backward()
    optimizer.step()
    moments = optimizer.state[net.back[0].weight]
    LSQ(0, 7, equalize=0.5).attach(net, optimizer, [(images, torch.zeros(len(images)))])
    assert torch.equal(net.one[0].input_factor, net.two[0].input_factor)
    assert net.one[0].parametrizations.weight.original not in optimizer.state
    assert optimizer.state[net.back[0].parametrizations.weight.original] is moments
    again = PostNorm()
    LSQ(0, 7, equalize=0.5).reattach(again, None, net.state_dict())
    assert torch.equal(again.eval()(images), net.eval()(images))
    finished = PostNorm()
    RTN(7, equalize=0.5).attach(finished, None, [(images, torch.zeros(len(images)))])
    assert "input_factor" in finished.one[0]._buffers and len(quantizers(finished)) == 7
