"""Measures of what networks do: gaps, GradCAM, step sizes of two objectives, stability, and how measures rank."""

from __future__ import annotations

import itertools
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
from qdeploy.training.corruptions import KINDS, available, corrupt
from qdeploy.training.measures.gaps import corrupted_images, gaps
from qdeploy.training.measures.gradcam import gradcam, last_stage, pictures
from qdeploy.training.measures.losses import loss_and_accuracy
from qdeploy.training.measures.ranking import kendall_tau_b, ranking
from qdeploy.training.measures.scales import perturbed, scales
from qdeploy.training.measures.stability import stability

pytestmark = pytest.mark.usefixtures("one_thread")


class Bias(nn.Module):
    """Logits that do not depend on the images, but for how bright they are: class 1 is as likely as they are bright."""

    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), x.mean((1, 2, 3))], 1)


def entropy(logit, label):
    return math.log(1 + math.exp(logit)) - logit * label


# ---- Gaps -----------------------------------------------------------------------------------------------------------


def bright(*levels, label=1):
    return [(torch.full((1, 1, 2, 2), level), torch.tensor([label])) for level in levels]


def test_loss_and_accuracy_are_means_over_domains():
    domains = {"one": bright(1.0), "two": bright(-1.0, 3.0, 2.0)}
    loss, accuracy = loss_and_accuracy(Bias(), domains)
    two = (entropy(-1, 1) + entropy(3, 1) + entropy(2, 1)) / 3
    assert loss == pytest.approx((entropy(1, 1) + two) / 2) and accuracy == pytest.approx((1 + 2 / 3) / 2)


def test_gaps_stand_beside_both_losses():
    asked = []

    def corrupted(kind, severity):
        asked.append((kind, severity))
        return {"there": bright(-float(severity) if kind == "fog" else 0.0)}

    tests = {"validation": {"here": bright(1.0)}, "target": {"there": bright(0.5, -1.0)}}
    found = gaps(Bias(), {"here": bright(2.0)}, tests, corrupted, ("fog", "snow"))
    assert asked == [(kind, severity) for kind in ("fog", "snow") for severity in (1, 2, 3, 4, 5)]
    assert found["train_loss"] == pytest.approx(entropy(2, 1)) and found["train_accuracy"] == 1
    rows = {(row["part"], row["kind"], row["severity"]): row for row in found["table"]}
    assert len(rows) == len(found["table"]) == 12
    clean = rows["target", "clean", 0]
    assert clean["test_loss"] == pytest.approx((entropy(0.5, 1) + entropy(-1, 1)) / 2) and clean["test_accuracy"] == 0.5
    for row in rows.values():
        assert row["train_loss"] == found["train_loss"] and row["gap"] == row["test_loss"] - row["train_loss"]
    gap = {s: (entropy(-s, 1) + entropy(0, 1)) / 2 - entropy(2, 1) for s in range(1, 6)}
    assert found["corruption_gaps"] == pytest.approx({str(s): one for s, one in gap.items()})
    assert found["corruption_gap"] == pytest.approx(sum(gap.values()) / 5) and found["kinds"] == ["fog", "snow"]
    json.dumps(found)


def test_gaps_of_clean_images_alone():
    found = gaps(Bias(), {"here": bright(2.0)}, {"target": {"there": bright(1.0)}})
    assert len(found["table"]) == 1 and "corruption_gap" not in found and found["kinds"] == []


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_corrupted_by_their_numbers(channels):
    images = np.random.default_rng(0).integers(0, 256, (40, channels, 8, 9), dtype=np.uint8)
    numbers = np.arange(40) * 7
    for kind in ("gaussian_noise", "contrast"):
        found = corrupted_images(images, numbers, kind, 3)
        assert found.shape == images.shape and found.dtype == np.uint8
        for i in (0, 33):
            expected = corrupt(images[i].transpose(1, 2, 0).copy(), kind, 3, 7 * i)
            assert np.array_equal(found[i].transpose(1, 2, 0), expected)
    assert len(available()) == 14 and len(KINDS) == 15


# ---- GradCAM --------------------------------------------------------------------------------------------------------


class Known(nn.Module):
    """Two features, the image itself and its negative; class c gets `weights[c]` of their means over positions."""

    def __init__(self, weights):
        super().__init__()
        self.stage = nn.Conv2d(1, 2, 1, bias=False)
        self.stage.weight = nn.Parameter(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
        self.head = nn.Linear(2, len(weights), bias=False)
        self.head.weight = nn.Parameter(torch.tensor(weights))

    def forward(self, x):
        return self.head(self.stage(x).mean((2, 3)))


IMAGE = torch.tensor([[4.0, 1.0], [0.0, -3.0]]).reshape(1, 1, 2, 2)


def test_gradcam_of_a_network_whose_maps_are_known():
    """Outputs are w0 * mean(x) - w1 * mean(x); a_k = w_k / 4, so that the map is relu((w0 - w1) x) / 4."""
    net = Known([[3.0, 1.0], [0.0, 0.0]])
    found = gradcam(net, IMAGE)
    assert last_stage(net, IMAGE) == "stage" and found.predicted.tolist() == [0]
    assert found.peaks.item() == pytest.approx(2 * 4 / 4)
    assert torch.allclose(found.maps[0], torch.tensor([[1.0, 0.25], [0.0, 0.0]]))
    dark = gradcam(net, -IMAGE)  # the mean is below zero: class 1, of which nothing speaks
    assert dark.predicted.tolist() == [1] and dark.peaks.item() == 0 and not dark.maps.any()


def test_gradcam_is_of_the_class_that_is_predicted():
    found = gradcam(Known([[0.0, 0.0], [2.0, 0.0]]), torch.cat([IMAGE, IMAGE * 2]))
    assert found.predicted.tolist() == [1, 1]
    assert torch.allclose(found.peaks, torch.tensor([2.0, 4.0])) and torch.equal(found.maps[0], found.maps[1])


def test_maps_are_enlarged_to_the_image():
    net = nn.Sequential(nn.AvgPool2d(2), *Known([[1.0, 0.0], [0.0, 0.0]]).children())
    net.insert(2, nn.AdaptiveAvgPool2d(1))
    net.insert(3, nn.Flatten())
    found = gradcam(net, IMAGE.repeat_interleave(2, 2).repeat_interleave(2, 3))
    small = torch.tensor([[1.0, 0.25], [0.0, 0.0]]).reshape(1, 1, 2, 2)
    assert found.maps.shape == (1, 4, 4)
    assert torch.allclose(found.maps, functional.interpolate(small, (4, 4), mode="bilinear")[0], atol=1e-6)


@pytest.mark.parametrize(("name", "size", "stage"), [("nin", 16, "features"), ("resnet18", 64, "layer4")])
def test_the_last_stage_of_networks(name, size, stage):
    torch.manual_seed(0)
    net = MODELS[name](4, 3)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    images = torch.randn(3, 3, size, size)
    assert last_stage(net, images) == stage
    found = gradcam(net, images)
    assert found.maps.shape == (3, size, size) and 0 <= found.maps.min() and found.maps.max() == 1
    assert net.training and all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    one = gradcam(net, images[1:2])
    assert torch.allclose(one.maps[0], found.maps[1], atol=1e-4)


def test_gradcam_of_a_quantized_network():
    net = MODELS["nin"](4, 1, depth=1, width=1).eval()
    quantize_(net, 4)
    with torch.no_grad():
        found = gradcam(net, torch.randn(2, 1, 8, 8))
    assert found.maps.shape == (2, 8, 8)


def test_bad_stages():
    net = Known([[1.0, 0.0], [0.0, 0.0]])
    with pytest.raises(InputError, match="^expected the name of a module of the network, got 'layer4' - at stage$"):
        gradcam(net, IMAGE, "layer4")
    with pytest.raises(InputError, match=r"^expected features \[N, channels, .*, got \[1, 2\] - at stage `head`$"):
        gradcam(net, IMAGE, "head")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(InputError, match="^expected a stage that makes maps .*, got none - at the network$"):
        gradcam(flat, IMAGE)


def test_pictures_hold_pixels_and_maps():
    net, pixels = Known([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8)
    found = pictures(net, [("art", (IMAGE, torch.tensor([1])), pixels.reshape(1, 1, 2, 2))], ["dog", "cat"])
    assert found["stage"] == "stage" and found["classes"] == ["dog", "cat"]
    assert found["table"] == [{"domain": "art", "label": 1, "predicted": 0, "peak": 1.0}]
    assert found["images"] == [{"pixels": [[[0, 1], [2, 255]]], "map": [[1.0, 0.25], [0.0, 0.0]]}]
    json.dumps(found)


# ---- Step sizes of two objectives -----------------------------------------------------------------------------------


def window(step, scale, task, smooth, disorder=0.5, frozen=0):
    return {
        "step": str(step),
        "scale": scale,
        "s": "0.125",
        "sum_task": repr(task),
        "sum_smooth": repr(smooth),
        "disorder_task": repr(disorder),
        "disorder_smooth": "0.25",
        "frozen": str(frozen),
    }


def test_scales_say_where_objectives_are_opposed():
    rows = [window(2, "a", 1.0, -2.0, 0.4), window(2, "b", 1.0, 2.0), window(4, "a", -1.0, -2.0, 0.1, 1)]
    found = scales([*rows, window(4, "b", 0.0, 2.0)])
    assert found["windows"] == 2 and [row["agreement"] for row in found["table"]] == [-1, 1, 1, 0]
    assert found["table"][2] == {
        "step": 4,
        "scale": "a",
        "s": 0.125,
        "sum_task": -1.0,
        "sum_smooth": -2.0,
        "disorder_task": 0.1,
        "disorder_smooth": 0.25,
        "frozen": 1,
        "agreement": 1,
    }
    first, second = found["scales"]
    assert first == {
        "scale": "a",
        "opposed": 0.5,
        "frozen": 0.5,
        "disorder_task_first": 0.4,
        "disorder_task_last": 0.1,
    }
    assert (second["opposed"], second["frozen"]) == (0, 0)
    with pytest.raises(InputError, match="^expected windows of step sizes, got none - at scales$"):
        scales([])


def test_each_step_size_is_changed_by_itself():
    torch.manual_seed(0)
    net = MODELS["nin"](4, 1, depth=1, width=1).eval()
    quantize_(net, 3, per_channel=False)
    domains = {"one": [(torch.randn(40, 1, 8, 8), torch.arange(40) % 4)]}
    steps = {name: quantizer.step.clone() for name, quantizer in quantizers(net).items()}
    rows = perturbed(net, {"target": domains}, (0.8, 1.2))
    assert all(torch.equal(quantizer.step, steps[name]) for name, quantizer in quantizers(net).items())
    assert [row["scale"] for row in rows] == [None, *(name for name in steps for _ in range(2))]
    assert [row["factor"] for row in rows] == [1.0] + [0.8, 1.2] * len(steps)
    loss, accuracy = loss_and_accuracy(net, domains)
    as_it_is = {"scale": None, "factor": 1.0, "part": "target", "loss": loss, "accuracy": accuracy, "change": 0.0}
    assert rows[0] == as_it_is
    with torch.no_grad():
        quantizers(net)[rows[-1]["scale"]].step.mul_(1.2)
    loss, accuracy = loss_and_accuracy(net, domains)
    assert (rows[-1]["loss"], rows[-1]["accuracy"]) == (loss, accuracy) and loss != rows[0]["loss"]
    assert rows[-1]["change"] == accuracy - rows[0]["accuracy"]
    with pytest.raises(InputError, match="^expected a network with quantizers, got one in float - at scales$"):
        perturbed(Bias(), {"target": domains})


# ---- Stability ------------------------------------------------------------------------------------------------------


def record(update, test, quantized=True, eligible=True):
    return {
        "update": update,
        "validation": 0.9,
        "test": test,
        "quantized": quantized,
        "eligible": eligible,
        "tests": {"art": test},
    }


def test_stability_of_a_run():
    values = [0.9, 0.8, *(0.1 * (i % 2) + 0.5 for i in range(10))]
    records = [record(i, test, quantized=i > 1, eligible=i > 1) for i, test in enumerate(values)]
    found = stability(records, records[4])
    assert found["switch"] == 2 and found["last_records"] == 10 and found["std_of_last"] == pytest.approx(0.05)
    assert found["best"] == 0.6 and found["selected"] == 0.5  # not 0.9, which was before the switch
    assert found["best_minus_selected"] == pytest.approx(0.1) and found["selected_update"] == 4
    row = {"update": 1, "validation": 0.9, "test": 0.8, "quantized": False, "eligible": False}
    assert found["table"][1] == row and len(found["table"]) == 12


def test_stability_of_a_short_run_in_float():
    found = stability([record(0, 0.5, quantized=False), record(1, 0.7, quantized=False)], record(1, 0.7))
    assert found["switch"] is None and found["last_records"] == 2 and found["std_of_last"] == pytest.approx(0.1)
    with pytest.raises(InputError, match="^expected the records of a run, got none - at stability$"):
        stability([], record(0, 0.5))


# ---- Ranking --------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(3)


def by_hand(x, y):
    """Pair by pair, as the definition has it."""
    score = ties_x = ties_y = 0
    pairs = [*itertools.combinations(range(len(x)), 2)]
    for i, j in pairs:
        score += np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
        ties_x += x[i] == x[j]
        ties_y += y[i] == y[j]
    return score / math.sqrt((len(pairs) - ties_x) * (len(pairs) - ties_y))


@pytest.mark.parametrize("levels", [3, 10, 10**9])
def test_tau_is_that_of_the_definition(levels):
    x, y = RNG.integers(levels, size=(2, 41))
    assert kendall_tau_b(x, y) == pytest.approx(by_hand(x, y), abs=1e-12)


@pytest.mark.parametrize(
    ("x", "y", "tau"),  # of scipy 1.17.1: stats.kendalltau(x, y).statistic
    [
        ([12, 2, 1, 12, 2], [1, 4, 7, 1, 0], -0.47140452079103173),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.6),
        ([0.1, 0.1, 0.3, 0.2, 0.5, 0.4], [1, 2, 2, 4, 3, 3], 0.44474958999666075),
        ([1, 2, 3], [3, 2, 1], -1.0),
    ],
)
def test_tau_is_that_of_scipy(x, y, tau):
    assert kendall_tau_b(x, y) == pytest.approx(tau, abs=1e-12)


def test_tau_that_is_not_there():
    assert math.isnan(kendall_tau_b([1, 1, 1], [1, 2, 3])) and math.isnan(kendall_tau_b([1], [1]))
    with pytest.raises(
        InputError, match=r"^expected two vectors of one length, got \[2\] and \[1\] - at kendall_tau_b$"
    ):
        kendall_tau_b([1, 2], [1])
    with pytest.raises(InputError, match="^expected numbers, got NaN - at kendall_tau_b$"):
        kendall_tau_b([1, math.nan], [1, 2])


def pool():
    """The gap follows the width alone. So does one measure, and another one the learning rate."""
    for width, lr, seed in itertools.product((1, 2, 3), (0.1, 0.01), (0, 1)):
        yield {"width": width, "lr": lr, "seed": seed, "gap": 10 * width + lr, "wide": width, "fast": -lr}


def test_psi_looks_at_one_setting_at_a_time():
    found = ranking([*pool()], ["wide", "fast"], ["width", "lr", "seed"])
    wide, fast = found["table"]
    assert wide["networks"] == 12 and wide["left_out"] == 0
    # of 66 pairs 18 tie in width, 6 in the gap
    assert wide["tau"] == pytest.approx(48 / math.sqrt(48 * 60))
    rows = {(row["measure"], row["setting"]): row for row in found["granulated"]}
    assert (rows["wide", "width"]["groups"], rows["wide", "width"]["tau"]) == (4, 1)
    assert (rows["wide", "lr"]["groups"], rows["wide", "lr"]["tau"]) == (0, None)  # the measure is the same for all
    assert (rows["wide", "seed"]["groups"], rows["fast", "width"]["groups"]) == (0, 0)
    assert (rows["fast", "lr"]["groups"], rows["fast", "lr"]["tau"]) == (6, -1)
    assert (wide["psi"], fast["psi"]) == (1, -1)
    json.dumps(found)


def test_networks_without_a_measure_are_left_out_of_it():
    networks = [*pool()]
    networks[0]["wide"] = None
    wide, fast = ranking(networks, ["wide", "fast"], ["width", "lr", "seed"])["table"]
    assert (wide["networks"], wide["left_out"]) == (11, 1) and (fast["networks"], fast["left_out"]) == (12, 0)
    networks[3]["gap"] = None
    with pytest.raises(InputError, match="^expected `gap` of every network, got none - at {'width': 1"):
        ranking(networks, ["wide"], ["width"])


def test_a_measure_without_networks():
    (row,) = ranking([{"gap": 1.0, "width": 1}], ["wide"], ["width"])["table"]
    assert row == {"measure": "wide", "networks": 0, "left_out": 1, "tau": None, "psi": None}
