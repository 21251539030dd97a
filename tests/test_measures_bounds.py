"""The eight measures of PAC-Bayes and sharpness: formulas, searches and draws against numpy."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from qdeploy.errors import InputError
from qdeploy.training import MODELS, quantize_
from qdeploy.training.measures.bisection import bisected
from qdeploy.training.measures.bounds import Weights, measure
from qdeploy.training.measures.pac_bayes import pac_bayes, pac_bayes_bound
from qdeploy.training.measures.sharpness import sharpness, sharpness_bound
from qdeploy.training.seeds import seed_hash

pytestmark = pytest.mark.usefixtures("one_thread")
EPS, M = 1e-3, 5000


# ---- Formulas --------------------------------------------------------------------------------------------------------


def test_measures_of_the_paper():
    """NiN 4x10 in float, QGen's tables 2 and 3: ||W|| = 130.686 with sigma 17/128, and alpha at the end of its search.
    There are 2,205,780 weights; all of the norm stands in one of them."""
    w = torch.zeros(2_205_780, dtype=torch.float64)
    w[0] = 130.686
    one = Weights(w, torch.zeros_like(w))
    assert measure(pac_bayes_bound(one, "pac-orig", 17 / 128, 50_000), 50_000) == pytest.approx(2.20, abs=5e-3)
    assert measure(sharpness_bound(one, "sharp-orig", 2.0, 50_000), 50_000) == pytest.approx(0.572, abs=5e-4)


def bound(name: str, w: np.ndarray, w0: np.ndarray, size: float, denominator: str = "d") -> float:
    """As the paper prints them, term by term."""
    d, omega = w - w0, len(w)
    rest = math.log(M / 0.1) + 10
    r = sum(d**2) if name.endswith("init") else sum(w**2)
    below = w if denominator == "w" and name.endswith("orig") else d
    if name in ("pac-init", "pac-orig"):
        return r / (4 * size**2) + rest
    if name in ("sharp-init", "sharp-orig"):
        return r * math.log(2 * omega) / (4 * size**2) + rest
    numerator = size**2 + 1 if name.startswith("pac") else size**2 + 4 * math.log(2 * omega / 0.1)
    logs = [math.log((EPS**2 + numerator * r / omega) / (EPS**2 + size**2 * one**2)) for one in below]
    return sum(logs) / 4 + rest


NAMES = [
    f"{kind}-{aware}{origin}" for kind in ("pac", "sharp") for aware in ("", "mag-") for origin in ("init", "orig")
]


@pytest.mark.parametrize("denominator", ["d", "w"])
@pytest.mark.parametrize("name", NAMES)
def test_bounds_are_as_printed(name, denominator):
    rng = np.random.default_rng(0)
    w, w0 = rng.normal(0, 0.1, 40), rng.normal(0, 0.05, 40)
    weights = Weights(torch.from_numpy(w), torch.from_numpy(w0))
    function = pac_bayes_bound if name.startswith("pac") else sharpness_bound
    assert function(weights, name, 0.3, M, denominator) == pytest.approx(
        bound(name, w, w0, 0.3, denominator), rel=1e-12
    )


def test_the_denominator_counts_in_one_kind_alone():
    rng = np.random.default_rng(0)
    weights = Weights(*(torch.from_numpy(rng.normal(0, 0.1, 40)) for _ in range(2)))
    for name in NAMES:
        function = pac_bayes_bound if name.startswith("pac") else sharpness_bound
        same = function(weights, name, 0.3, M, "d") == function(weights, name, 0.3, M, "w")
        assert same == (not name.endswith("mag-orig"))


def test_a_negative_bound_has_no_root():
    assert math.isnan(measure(-1.0, M))


# ---- The search ------------------------------------------------------------------------------------------------------


def test_bisection_stops_where_accuracy_is_a_tenth_away():
    asked = []

    def accuracy_at(value: float) -> float:
        asked.append(value)
        return 0.9 - value / 4

    found = bisected(accuracy_at, 0.9)
    assert asked == [1.0, 0.5, 0.25, 0.375]  # changes of .25, .125, .0625 and .094, the first within .01
    assert (found.value, found.accuracy, found.steps, found.saturated) == (0.375, 0.80625, 4, False)


def test_accuracy_that_rises_counts_as_well():
    assert bisected(lambda value: 0.3 + value / 4, 0.3).value == 0.375


def test_a_search_without_end_is_saturated():
    found = bisected(lambda value: 0.9, 0.9)
    assert (found.value, found.steps, found.saturated) == (2 - 2**-14, 15, True)
    steep = bisected(lambda value: 0.0, 0.9)
    assert (steep.value, steep.steps, steep.saturated) == (2**-14, 15, False)


# ---- Draws -----------------------------------------------------------------------------------------------------------


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3)).eval()


def trained() -> tuple[nn.Module, list]:
    """A network that is right on most of two batches, whose classes another one made with noise."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(150, 4, generator=drawn)
    net = linear(1)
    with torch.no_grad():
        y = (net(x) + 0.1 * torch.randn(150, 3, generator=drawn)).argmax(1)
    return net, [(x[:90], y[:90]), (x[90:], y[90:])]


NET, BATCHES = trained()
X, Y = (np.concatenate([one[i].numpy() for one in BATCHES]) for i in range(2))
WEIGHT, BIAS = NET[0].weight.detach().numpy(), NET[0].bias.detach().numpy()
CENTER = np.concatenate([BIAS, WEIGHT.reshape(-1)])  # sorted by name


def logits(vector: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x @ vector[3:].reshape(3, 4).T + vector[:3]


def accuracy(vector: np.ndarray) -> float:
    return float((logits(vector, X).argmax(1) == Y).mean())


def search(accuracy_at) -> float:
    low, high = 0.0, 2.0
    for _ in range(15):
        middle = (low + high) / 2
        change = abs(accuracy_at(middle) - accuracy(CENTER))
        if abs(change - 0.1) < 0.01:
            break
        low, high = (low, middle) if change > 0.1 else (middle, high)
    return middle


def generator(*of: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_hash(0, *of))


def sigma(deviation) -> float:
    noise = [torch.randn(15, generator=generator("noise", i)).numpy() for i in range(10)]
    return search(lambda size: np.mean([accuracy(CENTER + z * deviation(size)) for z in noise]))


DEVIATIONS = {
    ("exact", "pac"): lambda size: size,
    ("exact", "pac-mag"): lambda size: np.sqrt(size**2 * CENTER**2 + EPS**2),
    ("rgm", "pac"): lambda size: size**2,
    ("rgm", "pac-mag"): lambda size: size**2 * CENTER**2 + EPS**2,
}


def test_pac_bayes_against_numpy():
    found = pac_bayes(NET, linear(2), BATCHES, m=M)
    initial = linear(2)[0].weight.detach().double().numpy().reshape(-1)
    final = WEIGHT.astype(np.float64).reshape(-1)
    assert found["accuracy"] == accuracy(CENTER) and (found["omega"], found["m"]) == (12, M)
    assert found["norm"] == pytest.approx(np.linalg.norm(final)) and len(found["table"]) == 8
    assert found["distance"] == pytest.approx(np.linalg.norm(final - initial))
    for row in found["table"]:
        kind, _, _ = row["measure"].rpartition("-")
        expected = sigma(DEVIATIONS[row["reading"], kind])
        assert row["searched"] == expected and row["saturated"] == (expected > 1.99)
        value = math.sqrt(bound(row["measure"], final, initial, expected) / M)
        assert row["value"] == pytest.approx(value, rel=1e-9)
        assert row["change"] == row["accuracy"] - found["accuracy"]
    assert len({row["searched"] for row in found["table"]}) > 2


def climbed(size: float, aware: bool, number: int, auto: bool) -> float:
    box = np.abs(CENTER) * np.float32(size) + np.float32(EPS) if aware else np.full_like(CENTER, size)
    moved = np.zeros_like(CENTER)
    if number:
        moved = (torch.rand(15, generator=generator("start", number)).numpy() * 2 - 1) * box
    order = np.tile(torch.randperm(150, generator=generator("minibatches", number)).numpy(), 18)
    for step in range(20):
        part = order[128 * step : 128 * step + 128]
        x, y = X[part], Y[part]
        shares = np.exp(logits(CENTER + moved, x))
        shares /= shares.sum(1, keepdims=True)
        shares[np.arange(128), y] -= 1
        gradient = np.concatenate([shares.mean(0), (shares.T @ x / 128).reshape(-1)])
        step = np.sign(gradient) * box / 10 if auto else gradient * 1e-4
        moved = np.clip(moved + step, -box, box)
    return accuracy(CENTER + moved)


@pytest.mark.parametrize("rate", [1e-4, "auto"])
def test_sharpness_against_numpy(rate):
    found = sharpness(NET, linear(2), BATCHES, m=M, ascent_lr=rate)
    initial = linear(2)[0].weight.detach().double().numpy().reshape(-1)
    final = WEIGHT.astype(np.float64).reshape(-1)
    for row in found["table"]:
        reading = {"mean": np.mean, "min": np.min}[row["reading"]]
        aware = "mag" in row["measure"]
        expected = search(lambda size: reading([climbed(size, aware, i, rate == "auto") for i in range(10)]))  # noqa: B023
        assert row["searched"] == expected
        value = math.sqrt(bound(row["measure"], final, initial, expected) / M)
        assert row["value"] == pytest.approx(value, rel=1e-9)
    at = {(row["reading"], row["measure"]): row["searched"] for row in found["table"]}
    assert at["min", "sharp-init"] < at["mean", "sharp-init"]


@pytest.mark.parametrize("function", [pac_bayes, sharpness])
def test_draws_follow_from_the_seed_alone(function):
    initial = linear(2)
    first = function(NET, initial, BATCHES, m=M)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert function(NET, initial, BATCHES, m=M) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert function(NET, initial, BATCHES, m=M, seed=1) != first


@pytest.mark.parametrize("function", [pac_bayes, sharpness])
def test_draws_that_are_kept_are_not_made_again(function):
    kept: dict = {}

    def draws(name, make):
        if name not in kept:
            kept[name] = make()
        return kept[name]

    first = function(NET, linear(2), BATCHES, m=M, draws=draws)
    assert first == function(NET, linear(2), BATCHES, m=M)
    assert {name.partition("draw ")[2] for name in kept} == {f"{i} of 10" for i in range(1, 11)}

    def none_left(name, make):
        return kept[name]

    assert function(NET, linear(2), BATCHES, m=M, draws=none_left) == first


def test_networks_as_they_are_come_and_go():
    """Quantized, with BatchNorm, on images: the weights are those of the folded grid, and nothing changes."""
    torch.manual_seed(0)
    net = MODELS["nin"](3, 1, depth=1, width=1).eval()
    initial = copy.deepcopy(net)
    images = torch.randn(40, 1, 8, 8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    quantize_(net, 4)
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        labels = net(images).argmax(1)
    found = pac_bayes(net, initial, [(images, labels)], m=M)
    assert found["accuracy"] == pytest.approx(1.0) and found["omega"] == 9 * 25 + 2 * 625 + 75
    square = 0.0
    for layer in [*net.features, net.classifier]:
        gain = (layer.bn.weight / (layer.bn.running_var + 1e-5).sqrt()).detach().double()
        square += float((layer.conv.weight.detach().double() * gain[:, None, None, None]).square().sum())
    assert found["norm"] == pytest.approx(square**0.5, rel=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InputError, match=r"^expected the weights that the network began with, got others - at the in"):
        pac_bayes(NET, nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), BATCHES, m=M)
    with pytest.raises(InputError, match=r"^expected training images, got none - at the measure$"):
        sharpness(NET, linear(2), [], m=M)
