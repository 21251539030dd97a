"""CLIPood against numpy: logits, margins, the average, and files of text features."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from safetensors.numpy import save_file
from torch import nn

from qdeploy.errors import InputError
from qdeploy.training import quantize_
from qdeploy.training.methods.averages import SMA
from qdeploy.training.methods.clipood import BetaAverage, CLIPood, TextHead, read_text_features

CLASSES, CHANNELS = 5, 8


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def text(seed=0):
    return torch.randn(CLASSES, CHANNELS, generator=torch.Generator().manual_seed(seed))


def small(scale=20.0):
    torch.manual_seed(0)
    return TextHead(nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, CHANNELS)), text(), scale)


def minibatches():
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 1, 4, 4, generator=rng), torch.randint(CLASSES, (n,), generator=rng)) for n in (4, 6)]


def unit(x):
    return x / np.sqrt((x**2).sum(1, keepdims=True))


def test_logits_are_scaled_cosines():
    net, images = small(), minibatches()[0][0]
    features = net.tower(images).detach().double().numpy()
    expected = 20 * unit(features) @ unit(text().double().numpy()).T
    np.testing.assert_allclose(net(images).detach(), expected, rtol=1e-5, atol=1e-5)
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == {"tower"}
    assert {"text_features", "scale"} < net.state_dict().keys()


@pytest.mark.parametrize("margin", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_features_moved_by_the_margin(margin):
    net, batches = small(), minibatches()
    images, classes = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]).numpy()
    t = unit(text().double().numpy())
    f = unit(net.tower(images).detach().double().numpy())
    z = 20 * (f - margin * t[classes]) @ t.T
    expected = np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(10), classes])
    for model in (net, Fabric(accelerator="cpu", devices=1).setup_module(net)):
        assert CLIPood(margin).loss(model, batches, torch.Generator()).item() == pytest.approx(expected, rel=1e-5)
    # The margin is 0 for the class itself and grows with the distance of its text from others.
    behind = z - 20 * f @ t.T
    expected = 20 * margin * (1 - t[classes] @ t.T)
    np.testing.assert_allclose(behind - behind[np.arange(10), classes, None], expected, atol=1e-12)


def test_evaluations_have_no_margin_and_the_tower_trains():
    net = small()
    CLIPood().loss(net, minibatches(), torch.Generator()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())
    assert torch.equal(net.eval()(torch.ones(1, 1, 4, 4)), net.train()(torch.ones(1, 1, 4, 4)))


def passed(updates):
    random = np.random.default_rng(0)
    for _ in range(updates + 1):
        net = nn.Linear(3, 2)
        net.weight.data = torch.from_numpy(random.normal(size=(2, 3)).astype(np.float32))
        yield net


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_average_weighs_as_a_beta_density(beta):
    updates, average, seen = 12, BetaAverage(beta, updates=12), []
    place = (np.arange(updates + 1) + 0.5) / (updates + 1)
    density = (place * (1 - place)) ** (beta - 1) * math.gamma(2 * beta) / math.gamma(beta) ** 2
    for i, net in enumerate(passed(updates)):
        average.begin(net) if i == 0 else average.update(net, i - 1)
        seen.append(net.weight.detach().double().numpy())
        expected = np.average(seen, axis=0, weights=density[: i + 1])
        np.testing.assert_allclose(average.network(net).weight.detach(), expected, atol=1e-6)
        if i == 5:
            file = io.BytesIO()
            torch.save(average.state_dict(), file)
            file.seek(0)
            average = BetaAverage(beta, updates=updates)
            average.load_state_dict(torch.load(file, weights_only=True))
    np.testing.assert_allclose(density, density[::-1])  # the zero-shot network as much as the last one


def test_the_average_goes_on_with_the_first_quantized_network():
    net, average = small(), BetaAverage(updates=3)
    average.begin(net)
    average.update(net, 0)
    quantize_(net, 4)
    average.update(net, 1)
    first = copy.deepcopy(net.state_dict())
    got = average.network(net).state_dict()
    assert got.keys() == first.keys() and all(torch.equal(value, first[name]) for name, value in got.items())
    with torch.no_grad():
        net.tower[3].bias += 1
    average.update(net, 2)
    weights = [(0.625 * 0.375) ** -0.5, (0.875 * 0.125) ** -0.5]
    moved = average.network(net).tower[3].bias - first["tower.3.bias"]
    np.testing.assert_allclose(moved.detach(), weights[1] / sum(weights), rtol=1e-5)


def test_other_averages_begin_with_the_first_update():
    average, (first, second) = SMA(1), passed(1)
    average.begin(first)
    average.update(second, 0)
    assert torch.equal(average.network(second).weight, second.weight)


def test_text_features_come_from_files(tmp_path):
    features = text().numpy()
    np.save(tmp_path / "text.npy", features.astype(np.float16))
    save_file({"features": features}, tmp_path / "text.safetensors")
    assert torch.equal(read_text_features(tmp_path / "text.npy", CLASSES), text().half().float())
    assert torch.equal(read_text_features(tmp_path / "text.safetensors", CLASSES), text())


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: np.save(path, text(0)[:4]), "floats [K, C], text features of 5 classes, got float32 [4, 8]"),
        (lambda path: np.save(path, np.ones(5)), "floats [K, C], text features of 5 classes, got float64 [5]"),
        (
            lambda path: np.save(path, np.ones((5, 8), np.int64)),
            "floats [K, C], text features of 5 classes, got int64 [5, 8]",
        ),
        (
            lambda path: np.save(path, np.eye(5, 8, 1) * np.arange(5)[:, None]),
            "finite text features, not all 0 for any class, got others",
        ),
        (
            lambda path: np.save(path, np.full((5, 8), np.nan)),
            "finite text features, not all 0 for any class, got others",
        ),
    ],
)
def test_files_that_hold_no_text_features_of_the_classes(tmp_path, write, message):
    path = tmp_path / "text.npy"
    write(path)
    with pytest.raises(InputError) as error:
        read_text_features(path, CLASSES)
    assert str(error.value) == f"expected {message} - at {path}"


@pytest.mark.parametrize(
    "name, content",
    [("a.npy", b""), ("a.npy", b"text"), ("a.npz", b"PK\3\4 and so on"), ("a.safetensors", b"text"), ("no.npy", None)],
)
def test_files_that_are_none_are_one_line(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_text_features(path, CLASSES)
    assert str(error.value).startswith("expected text features in .npy or .safetensors, got ")
    assert str(error.value).endswith(f" - at {path}") and "\n" not in str(error.value)


def two_tensors(path):
    save_file({"a": text().numpy(), "b": text().numpy()}, path)
    return read_text_features(path, CLASSES)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: CLIPood(-0.1), "expected a margin of 0 or more, got -0.1 - at CLIPood"),
        (lambda path: BetaAverage(0.0, updates=3), "expected beta above 0, got 0.0 - at BetaAverage"),
        (
            lambda path: CLIPood().loss(small().tower, minibatches(), torch.Generator()),
            "expected a network with a TextHead, got Sequential without one - at CLIPood",
        ),
        (
            lambda path: TextHead(nn.Flatten(), text())(torch.ones(2, 1, 4, 4)),
            "expected image features [N, 8], as those of the text, got [2, 16] - at TextHead",
        ),
        (two_tensors, "expected one tensor of text features, got 2 - at {}"),
    ],
)
def test_what_is_refused(tmp_path, make, message):
    path = tmp_path / "text.safetensors"
    with pytest.raises(InputError) as error:
        make(path)
    assert str(error.value) == message.format(path)
