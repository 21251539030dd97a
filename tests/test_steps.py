"""How the gradients of an update are made: formulas against numpy, what moves and what comes back, resuming."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from qdeploy.errors import InputError
from qdeploy.training import project_steps_, quantize_, quantizers, step_group
from qdeploy.training.methods.freezing import Disorder
from qdeploy.training.methods.steps import GAQAT, SAGM, SAM, Plain
from qdeploy.training.models import MODELS

CURVATURE = np.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
STEPS = {
    "plain": Plain,
    "sam": lambda net: SAM(net, 0.5),
    "sagm": lambda net: SAGM(net, 0.5, 0.01),
    "gaqat": lambda net: GAQAT(net, 0.5, 3, rho=0.5),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Quadratic(nn.Module):
    """1/2 x A x, whose gradient is A x; x lies in two parameters, and no norm may be that of one alone."""

    def __init__(self):
        super().__init__()
        self.two = nn.Parameter(torch.tensor([0.5, -2.0], dtype=torch.float64))
        self.one = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self):
        x = torch.cat([self.two, self.one])
        return x @ torch.from_numpy(CURVATURE) @ x / 2


def gradient_of(net):
    return torch.cat([net.two.grad, net.one.grad]).numpy()


def tiny(bits=None, **options):
    """A network with BatchNorm that trains, and the loss of one minibatch."""
    torch.manual_seed(0)
    net = MODELS["nin"](4, 1, depth=1, width=1)
    if bits is not None:
        quantize_(net, bits, **options)
    return net


def loss_of(net, update=0):
    rng = torch.Generator().manual_seed(update)
    images, classes = torch.rand(6, 1, 8, 8, generator=rng), torch.randint(4, (6,), generator=rng)
    return functional.cross_entropy(net(images), classes)


def gradients(net):
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_sam_is_the_gradient_at_rho_uphill():
    net, x = Quadratic(), np.array([0.5, -2.0, 1.5])
    loss = SAM(net, rho=0.3).gradients(net)
    g = CURVATURE @ x
    np.testing.assert_allclose(gradient_of(net), CURVATURE @ (x + 0.3 * g / math.sqrt((g**2).sum())), rtol=1e-12)
    assert loss.item() == pytest.approx(x @ CURVATURE @ x / 2, rel=1e-14)
    assert not loss.requires_grad and net.unused.grad is None


def test_sagm_is_the_mean_of_two_gradients():
    net, x = Quadratic(), np.array([0.5, -2.0, 1.5])
    loss = SAGM(net, rho=0.3, alpha=0.02).gradients(net)
    g = CURVATURE @ x
    uphill = CURVATURE @ (x + (0.3 / math.sqrt((g**2).sum()) - 0.02) * g)
    np.testing.assert_allclose(gradient_of(net), (g + uphill) / 2, rtol=1e-12)
    assert loss.item() == pytest.approx(x @ CURVATURE @ x / 2, rel=1e-14)


def test_a_second_update_starts_from_no_gradient():
    for make in STEPS.values():
        net = Quadratic()
        step = make(net)
        step.gradients(net)
        first = gradient_of(net).copy()
        step.gradients(net)
        np.testing.assert_array_equal(gradient_of(net), first)


def test_a_zero_gradient_moves_nothing():
    net = Quadratic()
    for step in (SAM(net), SAGM(net)):
        step.gradients(lambda: net() * 0)
        assert not gradient_of(net).any()


@pytest.mark.parametrize("bits", [None, 4])
def test_sagm_without_rho_and_alpha_is_plain(bits):
    one, other = tiny(bits), tiny(bits)
    one_loss, other_loss = (
        Plain(one).gradients(lambda: loss_of(one)),
        SAGM(other, 0, 0).gradients(lambda: loss_of(other)),
    )
    assert torch.equal(one_loss, other_loss) and equal(gradients(one), gradients(other))


@pytest.mark.parametrize("name", ["sam", "sagm", "gaqat"])
def test_weights_and_statistics_are_those_of_the_pass_at_the_weights(name):
    plain, net = tiny(4), tiny(4)
    Plain(plain).gradients(lambda: loss_of(plain))
    seen = []

    def closure():
        seen.append({key: value.clone() for key, value in net.state_dict().items() if key.endswith("original")})
        return loss_of(net)

    STEPS[name](net).gradients(closure)
    assert len(seen) == 2 and not any(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])
    assert equal(plain.state_dict(), net.state_dict())  # running statistics and the count of batches, too
    assert net.features[0].bn.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["sam", "sagm", "gaqat"])
def test_weights_come_back_where_the_second_pass_fails(name):
    net, calls = tiny(), []
    before = copy.deepcopy([*net.parameters()])

    def closure():
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss_of(net)

    with pytest.raises(KeyboardInterrupt):
        STEPS[name](net).gradients(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_step_sizes_are_neither_in_the_norm_nor_moved():
    net, plain = tiny(3, per_channel=False), tiny(3, per_channel=False)
    Plain(plain).gradients(lambda: loss_of(plain))
    g = {name: value.numpy() for name, value in gradients(plain).items() if not name.endswith("step")}
    assert len(g) < len(gradients(plain))
    norm = math.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in g.values()))
    moved = []

    def closure():
        moved.append({name: value.detach().numpy().copy() for name, value in net.named_parameters()})
        return loss_of(net)

    SAM(net, rho=0.5).gradients(closure)
    for name, value in moved[0].items():
        expected = value + 0.5 / norm * g[name] if name in g else value
        np.testing.assert_allclose(moved[1][name], expected, rtol=1e-6, atol=1e-7)
    assert all(moved[1][name] == value for name, value in moved[0].items() if name not in g)


def test_the_trainers_backward_is_used():
    for make in (Plain, SAM, SAGM, lambda net, backward: GAQAT(net, 0.3, 5, backward=backward)):
        net, losses = Quadratic(), []

        def backward(loss, losses=losses):
            losses.append(loss)
            (3 * loss).backward()

        once = Quadratic()
        Plain(once).gradients(once)
        make(net, backward=backward).gradients(net)
        assert len(losses) == (1 if make is Plain else 2)
        if make is Plain:
            np.testing.assert_array_equal(gradient_of(net), 3 * gradient_of(once))


# Disorder, from its definition: the share of sign changes within each window.


def by_definition(gradients, K):
    windows = [np.sign(gradients[start : start + K]) for start in range(1, len(gradients) - K + 1, K)]
    return [sum(window[j] != window[j + 1] for j in range(K - 1)) / K for window in windows]


@pytest.mark.parametrize("K", [2, 3, 7])
def test_disorder_of_random_gradients(K):
    values = np.random.default_rng(0).integers(-1, 2, (4 * K + 1, 5)) * 0.7
    disorder = Disorder(K)
    found = [disorder.add(torch.from_numpy(value)) for value in values]
    assert [update for update, value in enumerate(found) if value is not None] == [K, 2 * K, 3 * K, 4 * K]
    np.testing.assert_array_equal([value.numpy() for value in found if value is not None], by_definition(values, K))


def test_disorder_of_alternating_constant_and_vanishing_gradients():
    K, disorder = 6, Disorder(6)
    found = [disorder.add(torch.tensor([(-1.0) ** t, 5.0, 0.0, float(t % 2)])) for t in range(2 * K + 1)]
    for last in (found[K], found[2 * K]):
        assert last.tolist() == [(K - 1) / K, 0, 0, (K - 1) / K]


# GAQAT


class TwoChannels(nn.Module):
    """y = Q(w) x, of which the loss takes a signed sum: what the step size of each channel sees can be given a sign."""

    def __init__(self, per_channel=True):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(5, 2, bias=False)
        self.head = nn.Linear(2, 2)
        quantize_(self, {"layer": 3}, per_channel=per_channel)

    @property
    def scale(self):
        return quantizers(self)["layer.weight"].step

    def loss(self, signs):
        return self.layer(torch.linspace(-1, 2, 5)) @ torch.tensor(signs) * 0.1 + self.head.bias.square().sum()


def test_gaqat_freezes_where_signs_stay_and_thaws_where_they_alternate():
    net, uphill = TwoChannels(), TwoChannels()
    step, K = GAQAT(net, r=0.5, K=4, rho=0.2, alpha=0), 4
    smooth_of, both_of = SAM(uphill, rho=0.2), SAGM(copy.deepcopy(uphill), rho=0.2, alpha=0)

    def update(signs):
        """The gradient of the step sizes, the uphill half of it, and what both halves make."""
        step.gradients(lambda: net.loss(signs))
        smooth_of.gradients(lambda: uphill.loss(signs))
        both_of.gradients(lambda: both_of.net.loss(signs))
        return net.scale.grad, uphill.scale.grad / 2, both_of.net.scale.grad

    for t in range(K + 1):  # channel 0 alternates, channel 1 does not
        grad, half, both = update([(-1.0) ** t, 1.0])
        assert torch.equal(grad, both) and both.ne(half).all()
    assert step.freezing.frozen.tolist() == [False, True]
    for t in range(K):  # now the other way round: what is frozen is counted all the same
        grad, half, both = update([1.0, (-1.0) ** t])
        assert torch.equal(grad, torch.stack([both[0], half[1]]))
        assert torch.equal(net.head.bias.grad, both_of.net.head.bias.grad)
    assert step.freezing.frozen.tolist() == [True, False]
    grad, half, both = update([1.0, 1.0])
    assert torch.equal(grad, torch.stack([half[0], both[1]]))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("reverse, no_unfreeze", [(False, False), (True, False), (False, True), (True, True)])
def test_variants_of_gaqat(per_channel, reverse, no_unfreeze):
    net = TwoChannels(per_channel)
    step = GAQAT(net, r=0.5, K=4, reverse=reverse, no_unfreeze=no_unfreeze)
    decided = []
    for t in range(13):  # two windows of one sign, one that alternates
        step.gradients(lambda t=t: net.loss([1.0, 1.0] if t < 9 else [(-1.0) ** t] * 2))
        decided.append(None if step.freezing.frozen is None else step.freezing.frozen.unique().item())
    last = no_unfreeze or reverse
    assert decided == [None] * 4 + [not reverse] * 8 + [last]
    assert step.freezing.frozen.numel() == (2 if per_channel else 1)


def test_r_is_compared_with_the_exact_share():
    net = TwoChannels(per_channel=False)
    step = GAQAT(net, r=0.3, K=10)
    for t in range(11):  # 3 changes of 10: not below 0.3, though float32's 0.3 is above it
        step.gradients(lambda t=t: net.loss([-1.0 if t in (3, 4, 9, 10) else 1.0] * 2))
    assert step.freezing.frozen.tolist() == [False]


def test_gaqat_without_step_sizes_is_sagm_and_counts_from_the_first():
    net, other = tiny(), tiny()
    step = GAQAT(net, 0.5, 2, rho=0.3)
    step.gradients(lambda: loss_of(net))
    SAGM(other, 0.3).gradients(lambda: loss_of(other))
    assert equal(gradients(net), gradients(other)) and step.freezing.disorder.updates == 0
    quantize_(net, 4)
    for _ in range(3):
        assert step.freezing.frozen is None
        step.gradients(lambda: loss_of(net))
    assert (
        step.freezing.frozen.sum()
        == step.freezing.frozen.numel()
        == sum(q.step.numel() for q in quantizers(net).values())
    )


def test_step_sizes_that_do_not_train_have_no_gradient_and_no_place():
    net = TwoChannels()
    net.scale.requires_grad_(False)
    step = GAQAT(net, 0.5, 2)
    step.gradients(lambda: net.loss([1.0, 1.0]))
    assert net.scale.grad is None and step.freezing.disorder.updates == 0


# Resuming


def saved(*parts):
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    return buffer


def load(buffer, *parts):
    buffer.seek(0)
    for part, state in zip(parts, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)


def training(name):
    net = tiny(3)
    scales = {id(q.step) for q in quantizers(net).values()}
    optimizer = torch.optim.Adam([p for p in net.parameters() if id(p) not in scales], lr=0.01)
    optimizer.add_param_group(step_group(net, 1e-3))
    return net, optimizer, STEPS[name](net)


def train(net, optimizer, step, updates):
    for update in updates:
        step.gradients(lambda update=update: loss_of(net, update))
        optimizer.step()
        project_steps_(net)


@pytest.mark.parametrize("name", STEPS)
def test_a_run_stopped_at_any_update_goes_on_bit_for_bit(name):
    whole, states = training(name), []
    for update in range(8):
        states.append(saved(*whole))
        train(*whole, [update])
    for update, state in enumerate(states):
        parts = training(name)
        load(state, *parts)
        train(*parts, range(update, 8))
        assert equal(parts[0].state_dict(), whole[0].state_dict())
        assert saved(*parts[1:]).getvalue() == saved(*whole[1:]).getvalue()


# Bad options


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda net: SAM(net, -1.0), "expected rho of 0 or more, got -1.0 - at the step of a method"),
        (lambda net: SAM(net, math.nan), "expected rho of 0 or more, got nan - at the step of a method"),
        (lambda net: SAGM(net, 0.1, math.inf), "expected alpha of 0 or more, got inf - at the step of a method"),
        (lambda net: GAQAT(net, 1.5, 300), "expected r from 0 to 1, got 1.5 - at GAQAT"),
        (lambda net: GAQAT(net, math.nan, 300), "expected r from 0 to 1, got nan - at GAQAT"),
        (lambda net: GAQAT(net, 0.3, 1), "expected K of 2 updates or more, got 1 - at GAQAT"),
        (lambda net: GAQAT(net, 0.3, 300, rho=-1), "expected rho of 0 or more, got -1 - at the step of a method"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(InputError) as error:
        make(Quadratic())
    assert str(error.value) == message
