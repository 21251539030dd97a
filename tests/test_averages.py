"""Averages of networks against their definitions, written once more in numpy."""

import copy
import io
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from qdeploy.errors import InputError
from qdeploy.training import quantize_, quantizers
from qdeploy.training.methods.averages import SMA, SWA, SWAD, NoAverage

UPDATES, EVERY = 40, 3


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def walk(seed, updates=UPDATES):
    """Networks of a float parameter and a float and an integer buffer, one after each update."""
    random = np.random.default_rng(seed)
    for t in range(updates):
        net = nn.Sequential(nn.BatchNorm1d(2))
        with torch.no_grad():
            net[0].weight.copy_(torch.from_numpy(random.normal(size=2)))
            net[0].running_mean.copy_(torch.from_numpy(random.normal(size=2)))
            net[0].num_batches_tracked.fill_(t)
        yield net


def values(net):
    return np.concatenate([net[0].weight.detach().numpy(), net[0].running_mean.numpy()]).astype(np.float64)


def follow(average, seed=0, losses=None, updates=UPDATES):
    """What `network` gives after each update; records come as a run has them."""
    found = []
    for t, net in enumerate(walk(seed, updates)):
        average.update(net, t)
        if t % EVERY == 0 and losses is not None:
            average.record(t, [losses[t // EVERY] - 1, losses[t // EVERY] + 1])
        found.append(average.network(net))
    return found


def test_without_an_average_the_network_is_that_of_training():
    net = nn.Linear(2, 2)
    average = NoAverage()
    average.update(net, 0)
    average.record(0, [1.0])
    assert average.network(net) is net and average.eligible(0) and average.state_dict() == {}


def test_sma_is_the_mean_from_the_update_before_its_first():
    passed = np.array([values(net) for net in walk(0)])
    for t, net in enumerate(follow(SMA(first=10))):
        expected = passed[t] if t + 1 < 10 else passed[10 - 2 : t + 1].mean(0)
        np.testing.assert_allclose(values(net), expected, rtol=0, atol=1e-6)
        assert net[0].num_batches_tracked == t


def test_sma_begins_as_its_paper_does():
    passed = np.array([values(net) for net in walk(0, 103)])
    found = follow(SMA(), updates=103)
    assert np.array_equal(values(found[98]), passed[98])  # update 99, counted from 1
    np.testing.assert_allclose(values(found[99]), (passed[98] + passed[99]) / 2, atol=1e-6)
    np.testing.assert_allclose(values(found[100]), (2 * (passed[98] + passed[99]) / 2 + passed[100]) / 3, atol=1e-6)


def test_swa_is_the_mean_of_the_evaluated_networks_of_the_last_quarter():
    passed = np.array([values(net) for net in walk(1)])
    average = SWA(UPDATES, EVERY)
    found = follow(average, 1)
    assert np.array_equal(values(found[29]), passed[29])  # nothing averaged yet
    assert [average.eligible(t) for t in (29, 30)] == [False, True]
    for t in range(30, UPDATES):
        np.testing.assert_allclose(values(found[t]), passed[30 : t + 1 : EVERY].mean(0), atol=1e-6)


def swad(means, losses, converge, patience, tolerance):
    """The valley from all segments at once: its mean, or the last segment."""
    windows = range(len(losses) - converge + 1)
    converged = [i for i in windows if losses[i] < min(losses[i + 1 : i + converge])]
    if not converged:
        return means[-1], []
    at = converged[0]
    threshold = np.mean(losses[at : at + converge]) * (1 + tolerance)
    valley = [at]
    for i in range(at - 1, max(at - (patience - converge), 0) - 1, -1):
        if losses[i] > threshold:
            break
        valley.insert(0, i)
    for i in range(at + 1, len(losses)):
        if min(losses[i : i + patience]) > threshold:
            break
        valley.append(i)
    return means[valley].mean(0), valley


@pytest.mark.parametrize("options", [(3, 6, 0.3), (2, 2, 0.1), (3, 3, 0.05), (2, 5, 0.01)])
def test_swad_is_the_mean_of_the_valley(options):
    lengths, converged = set(), 0
    for seed in range(25):
        random = np.random.default_rng(seed)
        losses = random.choice([1.0, 1.25, 1.5, 2.0, 3.0], size=-(-UPDATES // EVERY))  # many of them equal
        passed = np.array([values(net) for net in walk(seed)])
        ends = range(0, UPDATES, EVERY)
        means = np.array([passed[max(end - EVERY + 1, 0) : end + 1].mean(0) for end in ends])
        average = SWAD(0, UPDATES, EVERY, *options)
        found = follow(average, seed, losses)
        for index, end in enumerate(ends):  # as if the run had ended there
            expected, valley = swad(means[: index + 1], losses[: index + 1], *options)
            np.testing.assert_allclose(values(found[end]), expected, atol=1e-6)
        lengths.add(len(valley))
        converged += bool(valley)
        assert len(average.valley.queue) < options[1]
    assert converged >= 15 and len(lengths) > 3


def test_swad_on_a_valley_by_hand():
    # Converges at .9, at the third record after it; threshold (.9 + 1 + 1) / 3 * 1.3 = 1.2567. The 1.25 before it is
    # in, the 1.3 before that ends it. After it come 1, 1, 1.4 (a 1.2 follows within six), 1.2; all others are above.
    losses = [1.4, 1.3, 1.25, 0.9, 1.0, 1.0, 1.4, 1.2, 2, 2, 2, 2, 2, 2]
    random = [values(net) for net in walk(5)]
    means = [np.mean(random[max(3 * i - 2, 0) : 3 * i + 1], 0) for i in range(14)]
    assert swad(np.array(means), losses, 3, 6, 0.3)[1] == [2, 3, 4, 5, 6, 7]
    average = SWAD(0, UPDATES, EVERY)
    np.testing.assert_allclose(values(follow(average, 5, losses)[-1]), np.mean(means[2:8], 0), atol=1e-6)
    assert average.valley.ended and not average.valley.queue
    assert [average.eligible(t) for t in (36, 39)] == [False, True]


def authors(losses, converge, patience, tolerance):
    """The segments that count in the published code, one after the other, from indices alone."""
    recent, counted, converged, threshold = deque(maxlen=patience), [], None, None
    for i in range(len(losses)):
        recent.append(i)
        if converged is None:
            window = losses[max(i - converge + 1, 0) : i + 1]
            if len(window) == converge and np.argmin(window) == 0:
                converged, threshold = i - converge + 1, np.mean(window) * (1 + tolerance)
                seen = [*recent][: patience - converge + 1] if patience > converge else []
                while any(losses[j] > threshold for j in seen):
                    del seen[0]
                counted += seen[1:]
        elif recent[0] >= converged:
            if all(losses[j] > threshold for j in recent):
                return counted or [converged]
            counted.append(recent[0])
    if converged is None:
        return [i]
    recent.popleft()
    while any(losses[j] <= threshold for j in recent):
        counted.append(recent.popleft())
    return counted or [converged]


@pytest.mark.parametrize("options", [(3, 6, 0.3), (2, 2, 0.1), (3, 3, 0.05), (2, 5, 0.01), (4, 5, 0.6)])
def test_swad_of_the_published_code(options):
    found, differs = set(), 0
    for seed in range(25):
        random = np.random.default_rng(seed)
        losses = random.choice([1.0, 1.25, 1.5, 2.0, 3.0], size=-(-UPDATES // EVERY))
        passed = np.array([values(net) for net in walk(seed)])
        ends = range(0, UPDATES, EVERY)
        means = np.array([passed[max(end - EVERY + 1, 0) : end + 1].mean(0) for end in ends])
        average = SWAD(0, UPDATES, EVERY, *options, compat=True)
        followed = follow(average, seed, losses)
        for index, end in enumerate(ends):
            counted = authors(losses[: index + 1], *options)
            np.testing.assert_allclose(values(followed[end]), means[counted].mean(0), atol=1e-6)
        found.add(len(counted))
        differs += not np.allclose(means[counted].mean(0), swad(means, losses, *options)[0])
        assert len(average.valley.queue) <= options[1]
    assert differs >= 10 and len(found) > 3


def test_swad_of_the_published_code_by_hand():
    # Converges as above. Of .9, 1.25 before it and nothing older the first is left out; .9 counts again as the oldest
    # of six, then 1, 1, 1.4 and 1.2.
    losses = np.array([1.4, 1.3, 1.25, 0.9, 1.0, 1.0, 1.4, 1.2, 2, 2, 2, 2, 2, 2])
    assert authors(losses, 3, 6, 0.3) == [3, 3, 4, 5, 6, 7]
    passed = [values(net) for net in walk(5)]
    means = np.array([np.mean(passed[max(3 * i - 2, 0) : 3 * i + 1], 0) for i in range(14)])
    average = SWAD(0, UPDATES, EVERY, compat=True)
    followed = follow(average, 5, losses)
    np.testing.assert_allclose(values(followed[-1]), means[[3, 3, 4, 5, 6, 7]].mean(0), atol=1e-6)
    assert average.valley.ended and not average.valley.queue
    # Equal losses converge: at the third one. Two of the first three count at once, and at the end two of those left.
    followed = follow(SWAD(0, 7, 3, compat=True), 5, [1, 1, 1], 7)
    np.testing.assert_allclose(values(followed[-1]), means[[1, 2, 1, 2]].mean(0), atol=1e-6)


def quantized_walk():
    """One network in training, quantized before update 20; yields it after each update."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    for t in range(UPDATES):
        if t == 20:
            quantize_(net, 4)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape))
        net(torch.randn(5, 1, 4, 4))  # BatchNorm's statistics
        yield net


@pytest.mark.parametrize("make", [lambda: SMA(5), lambda: SWA(UPDATES, 2), lambda: SWAD(20, UPDATES, 2, 2, 3)])
def test_a_quantized_network_is_averaged_from_the_switch_and_quantized_once(make):
    average, weights, steps = make(), [], []
    for t, net in enumerate(quantized_walk()):
        average.update(net, t)
        if t % 2 == 0:
            average.record(t, [40 - t])  # never converges
        if t >= 20:
            weights.append(net[0].parametrizations.weight.original.detach().clone())
            steps.append(quantizers(net)["0.weight"].step.detach().clone())
        averaged = average.network(net)
        assert quantizers(averaged).keys() == quantizers(net).keys()
    part = {SMA: slice(None), SWA: slice(10, None, 2), SWAD: slice(17, 19)}[type(average)]
    weight, step = torch.stack(weights[part]).mean(0), torch.stack(steps[part]).mean(0)
    quantizer = quantizers(averaged)["0.weight"]
    torch.testing.assert_close(averaged[0].parametrizations.weight.original, weight)
    torch.testing.assert_close(quantizer.step, step)
    codes = quantizer.codes(averaged[0].parametrizations.weight.original)
    assert torch.equal(averaged[0].weight, codes * quantizer.step[:, None, None, None])
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        averaged[0].parametrizations.weight.original.zero_()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())  # a copy


RESUMED = [
    lambda: SMA(5),
    lambda: SWA(UPDATES, 2),
    lambda: SWAD(20, UPDATES, 2, 2, 3),
    lambda: SWAD(20, UPDATES, 2, 2, 3, compat=True),
]


@pytest.mark.parametrize("stop", [0, 4, 11, 19, 20, 23, 33])
@pytest.mark.parametrize("make", RESUMED)
def test_an_average_goes_on_from_its_state(make, stop):
    losses = np.random.default_rng(3).uniform(1, 2, UPDATES)

    def final(stopping):
        average = make()
        for t, net in enumerate(quantized_walk()):
            average.update(net, t)
            if t == stopping:  # after the update and before its evaluation
                file = io.BytesIO()
                torch.save(average.state_dict(), file)
                file.seek(0)
                average = make()
                average.load_state_dict(torch.load(file, weights_only=True))
            if t % 2 == 0:
                average.record(t, [losses[t]])
        return average.network(net).state_dict()

    expected, got = final(None), final(stop)
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


def test_the_mean_of_equal_networks_is_that_network():
    net = nn.Linear(50, 50)
    for average in (SMA(1), SWA(9, 1), SWAD(0, 9, 1)):
        for t in range(9):
            average.update(net, t)
            average.record(t, [1.0])
        assert torch.equal(average.network(net).weight, net.weight)


@pytest.mark.parametrize(
    "make, expected, got",
    [
        (lambda: SWAD(2000, 2700, 300), "3 evaluations or more of the network that is averaged", "2 - at SWAD"),
        (lambda: SWAD(0, 5001, 300, 6, 3), "2 <= converge <= patience", "6 and 3 - at SWAD"),
        (
            lambda: SWA(100, 70),
            "an evaluation in the last quarter of the run",
            "none in 100 updates, with one every 70 - at SWA",
        ),
    ],
)
def test_settings_that_average_nothing_are_refused(make, expected, got):
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value) == f"expected {expected}, got {got}"


def test_the_last_evaluation_may_be_the_only_one_of_swa():
    assert SWA(100, 90).eligible(90)
