"""F_gamma and the loss surface, against numpy and closed forms."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from qdeploy.errors import InputError
from qdeploy.training import quantize_
from qdeploy.training.measures import flatness as flatness_module
from qdeploy.training.measures.flatness import flatness
from qdeploy.training.measures.surface import filter_normalized, surface
from qdeploy.training.measures.weights import parameters
from qdeploy.training.seeds import seed_hash

pytestmark = pytest.mark.usefixtures("one_thread")


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3)).eval()


def some(seed: int, count: int) -> list:
    """Two batches of `count` vectors and classes, of different sizes."""
    drawn = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 4, generator=drawn), torch.randint(3, (count,), generator=drawn)
    return [(x[:3], y[:3]), (x[3:], y[3:])]


PARTS = {"source": {"a": some(1, 8), "b": some(2, 14)}, "target": {"c": some(3, 9)}}


def loss(vector: np.ndarray, domains: dict) -> float:
    """The mean over domains of the cross-entropy of biases [3] and weights [3, 4], in float64."""
    bias, weight = vector[:3], vector[3:].reshape(3, 4)
    found = []
    for batches in domains.values():
        x = np.concatenate([x.double().numpy() for x, _ in batches])
        y = np.concatenate([y.numpy() for _, y in batches])
        logits = x @ weight.T + bias
        found.append(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]))
    return float(np.mean(found))


def center(net: nn.Module) -> np.ndarray:
    """Sorted by name: biases come first."""
    return np.concatenate([net[0].bias.detach().double().numpy(), net[0].weight.detach().double().numpy().reshape(-1)])


def direction(number: int, count: int, seed: int = 0) -> np.ndarray:
    drawn = torch.Generator().manual_seed(seed_hash(seed, "direction", number))
    z = torch.randn(count, generator=drawn).double().numpy()
    return z / np.sqrt((z**2).sum())


def test_flatness_is_the_mean_rise_along_whole_directions():
    net = linear()
    found = flatness(net, PARTS, radii=(1, 4), relative=(0.5,), directions=3)
    w = center(net)
    norm = np.sqrt((w**2).sum())
    assert found["norm"] == pytest.approx(norm, rel=1e-6) and found["parameters"] == 15
    assert found["loss"] == {part: pytest.approx(loss(w, domains), rel=1e-5) for part, domains in PARTS.items()}
    expected = [(part, "absolute", gamma) for part in PARTS for gamma in (0, 1, 4)]
    expected += [(part, "relative", share * norm) for part in PARTS for share in (0, 0.5)]
    assert {(row["part"], row["kind"], round(row["gamma"], 4)) for row in found["table"]} == {
        (part, kind, round(gamma, 4)) for part, kind, gamma in expected
    }
    for row in found["table"]:
        domains = PARTS[row["part"]]
        rises = [loss(w + row["gamma"] * direction(i, 15), domains) - loss(w, domains) for i in range(3)]
        assert row["mean"] == pytest.approx(np.mean(rises), rel=1e-4, abs=1e-6)
        assert row["std"] == pytest.approx(np.std(rises, ddof=1), rel=1e-4, abs=1e-6)
        assert row["standard_error"] == pytest.approx(np.std(rises, ddof=1) / 3**0.5, rel=1e-4, abs=1e-6)
        assert row["gamma_relative"] == pytest.approx(row["gamma"] / norm, rel=1e-6)


def test_flatness_of_a_quadratic_in_closed_form(monkeypatch):
    """Of 1/2 sum h_i w_i^2 it is gamma sum h_i w_i d_i + gamma^2/2 sum h_i d_i^2, in the mean gamma^2/2 trace(H)/n."""
    net = linear()
    h = np.arange(1, 16.0)

    def quadratic(net: nn.Module, domains: dict) -> float:
        vector = np.concatenate([one.detach().double().numpy().reshape(-1) for one in parameters(net).values()])
        return float((h * vector**2).sum() / 2)

    monkeypatch.setattr(flatness_module, "mean_cross_entropy", quadratic)
    found = flatness(net, {"source": {}}, radii=(2, 5), relative=(), directions=400)
    w = center(net)
    directions = np.stack([direction(i, 15) for i in range(400)])
    for row in found["table"][1:3]:
        gamma = row["gamma"]
        rises = gamma * directions @ (h * w) + gamma**2 / 2 * directions**2 @ h
        assert row["mean"] == pytest.approx(rises.mean(), rel=1e-5)
        assert row["std"] == pytest.approx(rises.std(ddof=1), rel=1e-5)
        assert abs(row["mean"] - gamma**2 / 2 * h.mean()) < 3 * row["standard_error"]


def test_directions_follow_from_the_seed_alone():
    net = linear()
    options = {"radii": (3,), "relative": (), "directions": 2}
    torch.manual_seed(1)
    first = flatness(net, PARTS, **options)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert flatness(net, PARTS, **options) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert flatness(net, PARTS, seed=1, **options) != first


def test_a_quantized_network_is_moved_off_its_grid():
    net = linear()
    quantize_(net, 3, skip=())
    options = {"radii": (1e-3,), "relative": (), "directions": 2}
    steps = net[0].parametrizations.weight[0].step.clone()
    moved = flatness(net, PARTS, **options)
    latent = flatness(net, PARTS, latent=True, **options)
    weights = net[0].weight.detach().double().numpy().reshape(-1)
    on_grid = np.concatenate([net[0].bias.detach().double().numpy(), weights])
    assert moved["norm"] == pytest.approx(np.sqrt((on_grid**2).sum()), rel=1e-6)
    assert moved["loss"] == latent["loss"]
    trained = torch.cat([net[0].bias.detach(), net[0].parametrizations.weight.original.detach().reshape(-1)])
    assert latent["norm"] == pytest.approx(float(trained.double().norm()), rel=1e-6)
    assert torch.equal(net[0].parametrizations.weight[0].step, steps)
    for row, of_bias in zip(moved["table"], latent["table"], strict=True):
        expected, of_bias_alone = [], []
        for number in range(2):
            d = row["gamma"] * direction(number, 15)
            at = loss(on_grid, PARTS[row["part"]])
            expected.append(loss(on_grid + d, PARTS[row["part"]]) - at)
            of_bias_alone.append(loss(on_grid + np.where(np.arange(15) < 3, d, 0), PARTS[row["part"]]) - at)
        assert row["mean"] == pytest.approx(np.mean(expected), rel=2e-2, abs=1e-7)
        assert of_bias["mean"] == pytest.approx(np.mean(of_bias_alone), rel=2e-2, abs=1e-7)  # the rest is rounded away


def test_one_direction_has_no_error():
    (row, *_) = flatness(linear(), PARTS, radii=(1,), relative=(), directions=1)["table"]
    assert row["std"] is row["standard_error"] is None


def test_there_is_a_direction_or_more():
    with pytest.raises(InputError, match=r"^expected a direction or more, got 0 - at flatness$"):
        flatness(linear(), PARTS, directions=0)


def test_a_loss_beyond_float32_is_told_as_it_is():
    net = linear()
    (_, row, *_) = flatness(net, PARTS, radii=(3e38,), relative=(), directions=3)["table"]
    assert not np.isfinite(row["mean"]) and np.isnan(row["std"]) and np.isnan(row["standard_error"])


# ---- The surface -----------------------------------------------------------------------------------------------------


def test_directions_have_the_norm_of_every_filter():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        net[3].weight[1] = 0
    held = [*parameters(net).values()]
    vector = filter_normalized(held, 3)
    for part, parameter in zip(vector.split([one.numel() for one in held]), held, strict=True):
        if parameter.dim() == 1:
            assert not part.any()
            continue
        found = np.linalg.norm(part.reshape(len(parameter), -1).numpy(), axis=1)
        expected = np.linalg.norm(parameter.detach().reshape(len(parameter), -1).numpy(), axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(held) == 6 and not torch.equal(vector, filter_normalized(held, 4))


def test_surface_is_the_loss_on_the_plane():
    net = linear()
    found = surface(net, PARTS["source"], points=3)
    w, planes = center(net), []
    for axis in range(2):
        drawn = torch.Generator().manual_seed(seed_hash(0, "surface", axis))
        z = torch.randn(15, generator=drawn).double().numpy()
        rows, filters = z[3:].reshape(3, 4), w[3:].reshape(3, 4)
        rows = rows * np.linalg.norm(filters, axis=1, keepdims=True) / np.linalg.norm(rows, axis=1, keepdims=True)
        planes.append(np.concatenate([np.zeros(3), rows.reshape(-1)]))
    grid = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    assert [(row["a"], row["b"]) for row in found["table"]] == grid
    for row, (a, b) in zip(found["table"], grid, strict=True):
        assert row["loss"] == pytest.approx(loss(w + a * planes[0] + b * planes[1], PARTS["source"]), rel=1e-5)
    assert found["loss"] == found["table"][4]["loss"] and found["points"] == 3
    assert np.array_equal(center(net), w)


def test_surface_of_a_quantized_network_is_smooth():
    net = linear()
    quantize_(net, 2, skip=())
    losses = [row["loss"] for row in surface(copy.deepcopy(net), PARTS["source"], points=5)["table"]]
    assert len(set(losses)) == 25  # 2 bits would leave few


def test_a_surface_has_two_points_or_more():
    with pytest.raises(InputError, match=r"^expected 2 points or more along an axis, got 1 - at surface$"):
        surface(linear(), PARTS["source"], points=1)
