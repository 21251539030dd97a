"""Losses against numpy, what the taps of features see, and what several devices make of it."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from qdeploy.errors import InputError
from qdeploy.training import quantize_, quantizers
from qdeploy.training.methods.features import pooled, tap, tap_features
from qdeploy.training.methods.objectives import CORAL, ERM, Bins, MixStyle, SelfDistillation
from qdeploy.training.methods.steps import SAGM
from qdeploy.training.models import MODELS


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def minibatches(*sizes, shape=(1, 4, 4), classes=3):
    rng = generator(len(sizes))
    draw = [
        (torch.randn(size, *shape, generator=rng), torch.randint(classes, (size,), generator=rng)) for size in sizes
    ]
    return [(images + domain, labels) for domain, (images, labels) in enumerate(draw)]


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))


def float64(tensor):
    return tensor.detach().double().numpy()


def cross_entropies(logits, classes):
    z = float64(logits)
    return np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), classes.numpy()]


# ERM and CORAL


def test_erm_is_the_mean_over_all_images():
    net, batches = small(), minibatches(3, 6, 2)
    each = [cross_entropies(net(images), classes) for images, classes in batches]
    assert ERM().loss(net, batches, generator()).item() == pytest.approx(np.concatenate(each).mean(), rel=1e-6)


@pytest.mark.parametrize("sizes", [(4, 6), (4, 4, 4), (3, 5, 2, 6)])
def test_coral(sizes):
    net, batches = small(), minibatches(*sizes)
    weight, bias = float64(net[1].weight), float64(net[1].bias)
    features = [np.maximum(float64(images).reshape(len(images), -1) @ weight.T + bias, 0) for images, _ in batches]
    errors = [cross_entropies(net(images), classes).mean() for images, classes in batches]
    gaps = [
        ((a.mean(0) - b.mean(0)) ** 2).mean() + ((np.cov(a, rowvar=False) - np.cov(b, rowvar=False)) ** 2).mean()
        for i, a in enumerate(features)
        for b in features[:i]
    ]
    n = len(sizes)
    expected = np.mean(errors) + 0.7 * 2 / (n * (n - 1)) * np.sum(gaps)
    assert CORAL(0.7).loss(net, batches, generator()).item() == pytest.approx(expected, rel=1e-5)


def test_coral_of_one_domain_is_its_cross_entropy():
    net, batches = small(), minibatches(5)
    assert torch.equal(CORAL().loss(net, batches, generator()), ERM().loss(net, batches, generator()))


def test_coral_reaches_the_features_of_all_layers_before_the_classifier():
    net, batches = small(), minibatches(5, 5)
    penalty = CORAL(1.0).loss(net, batches, generator()) - CORAL(0.0).loss(net, batches, generator())
    gradient = torch.autograd.grad(penalty, [*net.parameters()])
    assert gradient[0].norm() > 1e-3 and gradient[1].norm() > 1e-3
    assert gradient[2].norm() < 1e-6 and gradient[3].norm() < 1e-6


# Features


def test_features_of_networks():
    images = torch.rand(2, 1, 32, 32, generator=generator())
    nin, resnet = MODELS["nin"](3, 1).eval(), MODELS["resnet18"](3, 1).eval()
    with tap_features(nin) as tapped:
        nin(images)
    assert torch.equal(tapped.value, nin.features(images))
    assert torch.equal(pooled(tapped.value), nin.features(images).flatten(2).mean(2))
    with tap_features(resnet) as tapped:
        logits = resnet(images)
    assert tapped.value.shape == (2, 512) and torch.equal(pooled(tapped.value), tapped.value)
    assert torch.equal(resnet.fc(tapped.value), logits)


def test_a_tap_keeps_what_a_layer_that_works_in_place_takes_away():
    net, images = small(), torch.randn(4, 1, 4, 4, generator=generator())
    with tap(net, "1") as tapped:
        net(images)
    assert torch.equal(tapped.value, net[1](images.flatten(1))) and tapped.value.min() < 0


def test_taps_work_in_a_wrapper_and_before_quantizers_and_end_with_the_block():
    fabric = Fabric(accelerator="cpu", devices=1)
    net, images = small(), torch.randn(4, 1, 4, 4, generator=generator())
    quantize_(net, 4, 2, skip=[], calibration=images)
    wrapped = fabric.setup_module(net)
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in net.modules()]
    with tap(wrapped, "3", "input") as read, tap(wrapped, "2") as given:
        wrapped(images)
    assert torch.equal(read.value, given.value)
    assert not torch.equal(read.value, quantizers(net)["3.input"](read.value))
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in net.modules()] == hooks


def test_what_a_tap_refuses():
    net = small()
    with pytest.raises(InputError) as error, tap(net, "layer1"):
        pass
    assert str(error.value) == "expected a module of the network (0, 1, 2, 3, ...), got `layer1` - at features"
    with pytest.raises(InputError) as error, tap(net, "1") as tapped:
        tapped.value  # noqa: B018
    assert str(error.value) == "expected a module that is called once, got 0 calls - at `1`"
    with pytest.raises(InputError) as error, tap_features(nn.Flatten()):
        pass
    assert str(error.value) == "expected a network with a classifier, got Flatten without layers - at features"


# MixStyle


class Maps(nn.Module):
    """Gives what MixStyle makes of the images themselves."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2 = nn.Identity(), nn.Identity()
        self.head = nn.Linear(1, 3)

    def forward(self, x):
        self.mixed = self.layer2(self.layer1(x))
        return self.head(self.mixed.mean((1, 2, 3))[:, None])


def mixed(batches, seed=0, net=None, places=("layer1",), p=1.0, **options):
    net = net or Maps()
    MixStyle(places=places, p=p, **options).loss(net, batches, generator(seed))
    return net.mixed


def moments(maps):
    flat = float64(maps).reshape(*maps.shape[:2], -1)
    return flat.mean(2), np.sqrt(flat.var(2, ddof=1) + 1e-6)


def partners_and_shares(images, maps):
    """The one partner of each image, and its own share, of which both moments of all channels are made."""
    (mu, sigma), (mu_mix, _) = moments(images), moments(maps)
    sigma_mix = float64(maps).reshape(*maps.shape[:2], -1).std(2, ddof=1)
    found = []
    for i in range(len(mu)):
        fits = []
        for j in range(len(mu)):
            own, other = np.concatenate([mu[i], sigma[i]]), np.concatenate([mu[j], sigma[j]])
            gap = own - other
            share = ((np.concatenate([mu_mix[i], sigma_mix[i]]) - other) @ gap) / (gap @ gap) if i != j else 1.0
            error = np.abs(share * own + (1 - share) * other - np.concatenate([mu_mix[i], sigma_mix[i]])).max()
            fits.append((error, j, share))
        found.append(min(fits))
    assert max(error for error, _, _ in found) < 1e-5
    return [j for _, j, _ in found], [share for _, _, share in found]


def test_mixstyle_mixes_both_moments_with_one_partner_and_one_share():
    batches = minibatches(5, 5, shape=(4, 6, 6))
    images = torch.cat([images for images, _ in batches])
    maps = mixed(batches, seed=3, alpha=2.0)  # shares well between 0 and 1
    partners, shares = partners_and_shares(images, maps)
    assert all(0 < share < 1 or share == 1 for share in shares) and len({*shares}) > 5
    moved = [j for i, j in enumerate(partners) if i != j]
    assert len(moved) > 5 and len({*partners}) == 10  # a permutation
    (mu, sigma), (mu_mix, sigma_mix) = moments(images), moments(maps)
    shape = (*mu.shape, 1, 1)
    expected = (float64(images) - mu.reshape(shape)) / sigma.reshape(shape) * sigma_mix.reshape(shape)
    np.testing.assert_allclose(float64(maps), expected + mu_mix.reshape(shape), atol=2e-5)


def test_mixstyle_across_domains_takes_partners_of_the_next():
    batches = minibatches(4, 4, 4, shape=(4, 6, 6))
    images = torch.cat([images for images, _ in batches])
    seen = []
    for seed in range(6):
        partners, _ = partners_and_shares(images, mixed(batches, seed, partners="crossdomain", alpha=2.0))
        assert [j // 4 for j in partners] == [1] * 4 + [2] * 4 + [0] * 4 and len({*partners}) == 12
        seen.append(tuple(partners))
    assert len({*seen}) > 3


def test_shares_are_beta_distributed():
    one = torch.tensor([-1.0, 1.0]).reshape(1, 1, 2, 1)
    count = 20000
    batches = [(one.repeat(count, 1, 1, 1) + shift, torch.zeros(count, dtype=torch.int64)) for shift in (0.0, 1.0)]
    shares = 1 - mixed(batches, partners="crossdomain")[:count].mean((1, 2, 3))
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    assert shares.mean().item() == pytest.approx(0.5, abs=0.01)
    assert shares.var().item() == pytest.approx(1 / (4 * 1.2), abs=0.005)


def test_styles_have_no_gradient():
    (images, classes), *rest = minibatches(4, 4, shape=(2, 5, 5))
    images.requires_grad_()
    maps = mixed([(images, classes), *rest])
    upstream = torch.randn(maps.shape, generator=generator(1))
    (gradient,) = torch.autograd.grad((maps * upstream).sum(), images)
    sigma, sigma_mix = moments(images)[1], moments(maps)[1][:4]
    np.testing.assert_allclose(
        gradient.numpy(), upstream[:4].numpy() * (sigma_mix / sigma)[:, :, None, None], rtol=1e-3, atol=1e-6
    )


def test_each_place_has_a_coin_of_its_own():
    batches, counts = minibatches(3, shape=(1, 2, 2)), np.zeros(2)
    for seed in range(400):
        for place, name in enumerate(("layer1", "layer2")):
            net, seen = Maps(), []
            getattr(net, name).register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0]))
            mixed(batches, seed, net, (name,), p=0.5)
            counts[place] += not torch.equal(seen[0], net.mixed)
    assert ((160 < counts) & (counts < 240)).all()
    both = [
        not torch.equal(mixed(batches, seed, places=("layer1", "layer2"), p=0.5), batches[0][0]) for seed in range(400)
    ]
    assert 0.70 < np.mean(both) < 0.80  # 3/4 where the two are independent


def test_mixstyle_in_eval_mode_or_without_chance_is_the_objective_within():
    batches, net = minibatches(4, 4, shape=(2, 3, 3)), Maps()
    plain = ERM().loss(net, batches, generator())
    assert torch.equal(MixStyle(p=0.0, places=("layer1",)).loss(net, batches, generator()), plain)
    assert not torch.equal(MixStyle(p=1.0, places=("layer1",)).loss(net, batches, generator()), plain)
    assert torch.equal(MixStyle(p=1.0, places=("layer1",)).loss(net.eval(), batches, generator()), plain)


def test_draws_are_those_of_the_generator():
    batches = minibatches(4, 4, shape=(2, 3, 3))
    torch.manual_seed(0)
    first, state = mixed(batches, 5), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(mixed(batches, 5, partners="random"), first) and not torch.equal(mixed(batches, 6), first)
    torch.manual_seed(0)
    Maps()
    assert torch.equal(torch.get_rng_state(), state)  # nothing but the network drew


def test_mixstyle_around_coral_reads_mixed_features():
    batches, net = minibatches(5, 5), small()
    net[1].weight.data[:] = 0  # features see styles through the bias alone: none
    styled = nn.Sequential(nn.Identity(), net)
    around = MixStyle(CORAL(), places=("0",), p=1.0).loss(styled, batches, generator())
    assert torch.equal(around, CORAL().loss(net, batches, generator()))
    net[1].weight.data[:] = 0.1
    around = MixStyle(CORAL(), places=("0",), p=1.0).loss(styled, batches, generator())
    assert not torch.equal(around, CORAL().loss(net, batches, generator()))


# Self-distillation


class Tokens(nn.Module):
    """A transformer in small: blocks with a shortcut over a class token and the rest, norm, head."""

    def __init__(self, depth=3, width=4, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images):
        tokens = images.flatten(2)[:, 0].reshape(len(images), 4, 4)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_self_distillation():
    net, batches = Tokens().double(), [(images.double(), classes) for images, classes in minibatches(4, 3)]
    x = np.concatenate([float64(images).reshape(-1, 4, 4) for images, _ in batches])
    classes = torch.cat([classes for _, classes in batches])
    logits = []
    for block in net.blocks:
        x = x @ float64(block.weight).T + float64(block.bias)
        token = x[:, 0]
        token = (token - token.mean(1, keepdims=True)) / np.sqrt(token.var(1, keepdims=True) + 1e-5)
        logits.append(token @ float64(net.head.weight).T + float64(net.head.bias))
    plain = cross_entropies(torch.from_numpy(logits[-1]), classes).mean()
    p = softmax(logits[-1] / 5)
    possible = [plain + 0.2 * 25 * (p * (np.log(p) - np.log(softmax(z / 5)))).sum() / p.size for z in logits]
    assert possible[2] == plain and len({round(one, 9) for one in possible}) == 3
    drawn = []
    for seed in range(60):
        loss = SelfDistillation(0.2, 5.0).loss(net, batches, generator(seed)).item()
        drawn.append(int(np.argmin(np.abs(np.array(possible) - loss))))
        assert loss == pytest.approx(possible[drawn[-1]], rel=1e-12)
    assert min(drawn.count(block) for block in range(3)) > 10


@pytest.mark.parametrize("seed", range(4))  # draws of the last block among them, and of others
def test_self_distillation_has_gradients_through_both_predictions(seed):
    batches = [(images.double(), classes) for images, classes in minibatches(2, 2)]
    net = Tokens().double()

    def loss(weight):
        with torch.no_grad():
            net.head.weight.zero_()
        net.head.bias.requires_grad_(False)
        handle = net.head.register_forward_hook(lambda module, args, output: output + args[0] @ weight.T)
        value = SelfDistillation(0.5, 3.0).loss(net, batches, generator(seed))
        handle.remove()
        return value

    weight = torch.randn(3, 4, dtype=torch.float64, generator=generator(2), requires_grad=True)
    assert torch.autograd.gradcheck(loss, [weight])


# Bins


def bins_by_loops(weight, quantizer):
    """The scatter of one weight, and its gradients in weight and step sizes."""
    w, step = float64(weight), np.atleast_1d(float64(quantizer.step))
    rows = w.reshape(len(step), -1)
    total, by_weight, by_step = 0.0, np.zeros_like(rows), np.zeros_like(step)
    for i, (row, s) in enumerate(zip(rows, step, strict=True)):
        inside = (row / s >= quantizer.qmin) & (row / s <= quantizer.qmax)
        v = np.clip(row / s, quantizer.qmin, quantizer.qmax) * s
        codes = np.rint(v / s)
        total += ((v - codes * s) ** 2).sum() / rows.size
        by_value = 2 * (v - codes * s) / rows.size
        for code in np.unique(codes):
            own = codes == code
            if own.sum() > 1:
                total += v[own].var(ddof=1)
                by_value[own] += 2 * (v[own] - v[own].mean()) / (own.sum() - 1)
        by_weight[i] = by_value * inside  # v is w within the range, and a multiple of s outside
        by_step[i] = (by_value * codes * ~inside).sum()
    return total, by_weight.reshape(w.shape), by_step.reshape(quantizer.step.shape)


@pytest.mark.parametrize("bits, per_channel", [(2, False), (3, True), (4, False), (8, True)])
def test_bins(bits, per_channel):
    net, batches = small(), minibatches(4, 4)
    quantize_(net, bits, per_channel=per_channel, skip=[])
    layers = [net[1], net[3]]
    quantizer = [layer.parametrizations.weight[0] for layer in layers]
    expected = [
        bins_by_loops(layer.parametrizations.weight.original, own) for layer, own in zip(layers, quantizer, strict=True)
    ]
    for progress, factor in ((0.0, 0), (0.25, 0), (0.625, 0.005), (1.0, 0.01)):
        plain = ERM().loss(net, batches, generator())
        loss = Bins(lambda progress=progress: progress).loss(net, batches, generator())
        added = factor * sum(value for value, _, _ in expected)
        assert (loss - plain).item() == pytest.approx(added, rel=1e-4, abs=2e-7)
        if factor:
            trained = [part for layer in layers for part in layer.parametrizations.weight.parameters()]
            got = torch.autograd.grad(loss - plain.detach(), trained)
            without = torch.autograd.grad(plain, trained)
            gradients = [gradient for _, *both in expected for gradient in both]
            for one, other, gradient in zip(got, without, gradients, strict=True):
                np.testing.assert_allclose((one - other).numpy(), factor * gradient, rtol=1e-3, atol=2e-7)


def test_bins_of_a_float_network_and_of_a_shared_weight():
    net, batches = small(), minibatches(4)
    assert torch.equal(Bins(lambda: 1.0).loss(net, batches, generator()), ERM().loss(net, batches, generator()))
    shared = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    shared[2].weight = shared[1].weight
    quantize_(shared, 3)
    scatter, *_ = bins_by_loops(shared[1].parametrizations.weight.original, shared[1].parametrizations.weight[0])
    more = Bins(lambda: 1.0).loss(shared, batches, generator()) - ERM().loss(shared, batches, generator())
    assert more.item() == pytest.approx(0.01 * scatter, rel=1e-4)


# State, several devices, bad options


class Counting(ERM):
    """An objective of a user's, with a state."""

    count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_states():
    for objective in (ERM(), CORAL(), MixStyle(), SelfDistillation(), Bins(lambda: 0.0)):
        assert objective.state_dict() == {}
        objective.load_state_dict({})
    for kind in (MixStyle, lambda inner: Bins(lambda: 0.0, inner)):
        objective = kind(Counting())
        objective.inner.count = 3
        other = kind(Counting())
        other.load_state_dict(objective.state_dict())
        assert other.inner.count == 3


TWO_DEVICES = """
import sys
import torch
from torch import distributed, nn
from qdeploy.training.methods.objectives import CORAL
from qdeploy.training.methods.steps import SAGM
from test_objectives import generator, minibatches, small

torch.set_num_threads(1)
rank, count, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
net = small()
wrapped = nn.parallel.DistributedDataParallel(net)
batches = [(images[rank::count], classes[rank::count]) for images, classes in minibatches(6, 6)]
SAGM(net, rho=0.5, alpha=0.01).gradients(lambda: CORAL().loss(wrapped, batches, generator()))
torch.save([parameter.grad for parameter in net.parameters()], f"{store}.{rank}")
distributed.destroy_process_group()
"""


def test_two_devices_make_the_gradients_of_one(tmp_path):
    store = tmp_path / "store"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-W", "error", "-c", TWO_DEVICES]
    processes = [subprocess.Popen([*command, str(rank), "2", str(store)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    net = small()
    SAGM(net, rho=0.5, alpha=0.01).gradients(lambda: CORAL().loss(net, minibatches(6, 6), generator()))
    for rank in range(2):
        for got, parameter in zip(torch.load(f"{store}.{rank}"), net.parameters(), strict=True):
            np.testing.assert_allclose(got.numpy(), parameter.grad.numpy(), rtol=1e-5, atol=1e-6)


def refused_loss(objective, batches):
    return lambda: objective.loss(Maps(), batches, generator())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CORAL(-1.0), "expected gamma of 0 or more, got -1.0 - at CORAL"),
        (lambda: CORAL(math.nan), "expected gamma of 0 or more, got nan - at CORAL"),
        (refused_loss(CORAL(), minibatches(3, 1)), "expected 2 images or more of each domain, got 1 - at CORAL"),
        (lambda: MixStyle(p=1.5), "expected p from 0 to 1 and alpha above 0, got 1.5 and 0.1 - at MixStyle"),
        (lambda: MixStyle(alpha=0), "expected p from 0 to 1 and alpha above 0, got 0.5 and 0 - at MixStyle"),
        (
            lambda: MixStyle(partners="cross"),
            "expected partners random or crossdomain, got 'cross' - at MixStyle",
        ),
        (
            refused_loss(MixStyle(places=["layer1"], p=1.0, partners="crossdomain"), minibatches(3, 2)),
            "expected 2 domains or more, as many images of each, got [3, 2] - at MixStyle",
        ),
        (
            refused_loss(MixStyle(places=["layer1"], p=1.0, partners="crossdomain"), minibatches(3)),
            "expected 2 domains or more, as many images of each, got [3] - at MixStyle",
        ),
        (
            refused_loss(MixStyle(places=["layer1"], p=1.0), minibatches(3, shape=(2, 1, 1))),
            "expected maps [N, C, H, W] of 2 positions or more, got [3, 2, 1, 1] - at `layer1`",
        ),
        (
            refused_loss(MixStyle(places=["layer3"], p=1.0), minibatches(3)),
            "expected a module of the network (layer1, layer2, head, ...), got `layer3` - at features",
        ),
        (
            refused_loss(MixStyle(p=1.0), minibatches(3)),
            "expected a network that names its stages, got a Maps: name them with --objective.places - at MixStyle",
        ),
        (
            lambda: SelfDistillation(0.1, 0.0),
            "expected weight of 0 or more and temperature above 0, got 0.1 and 0.0 - at SelfDistillation",
        ),
    ],
)
def test_options_and_data_refused(make, message):
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value) == message
