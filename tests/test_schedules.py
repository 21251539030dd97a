"""Learning rates by update: exact values, and those of torch's schedulers."""

import math

import pytest
import torch

from qdeploy.errors import InputError
from qdeploy.training.methods.schedules import Constant, Cosine, Linear, MultiStep


def of_torch(make, updates):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(updates):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant():
    assert [Constant().factor(t) for t in (0, 1, 10**6)] == [1, 1, 1]


def test_multi_step_changes_at_its_shares_of_the_run():
    schedule = MultiStep(updates=8)
    assert [schedule.factor(t) for t in range(8)] == [1, 1, 1, 1, 0.1, 0.1, 0.1**2, 0.1**2]


@pytest.mark.parametrize(
    "shares, updates, firsts",
    [
        ((1 / 3, 2 / 3), 300, [100, 200]),
        ((0.4, 0.8), 200, [80, 160]),
        ((0.25, 0.5, 0.75), 120, [30, 60, 90]),
        ((0.07, 0.29), 100, [7, 29]),  # products that are a rounding error above 7 and below 29
        ((1 / 3, 2 / 3), 117300, [39100, 78200]),
        ((0.75, 0.25), 4, [1, 3]),
    ],
)
def test_milestones_are_exact(shares, updates, firsts):
    schedule = MultiStep(shares, 0.5, updates=updates)
    changes = [t for t in range(1, updates) if schedule.factor(t) != schedule.factor(t - 1)]
    assert changes == firsts
    assert schedule.factor(0) == 1 and schedule.factor(updates - 1) == 0.5 ** len(firsts)
    expected = of_torch(
        lambda own: torch.optim.lr_scheduler.MultiStepLR(own, firsts, 0.5), updates if updates < 500 else 0
    )
    assert expected == [schedule.factor(t) for t in range(len(expected))]


def test_cosine_goes_from_1_to_0():
    schedule = Cosine(updates=6)
    expected = [1, (2 + math.sqrt(3)) / 4, 0.75, 0.5, 0.25, (2 - math.sqrt(3)) / 4]
    assert [schedule.factor(t) for t in range(6)] == pytest.approx(expected, abs=1e-15)
    assert schedule.factor(6) == 0
    of_a_run = of_torch(lambda own: torch.optim.lr_scheduler.CosineAnnealingLR(own, 90), 90)
    assert [Cosine(updates=90).factor(t) for t in range(90)] == pytest.approx(of_a_run, abs=1e-12)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"milestones": (0.5, 1.5)}, "expected milestones from 0 to 1, shares of the run, got 1.5 - at MultiStep"),
        ({"milestones": (math.nan,)}, "expected milestones from 0 to 1, shares of the run, got nan - at MultiStep"),
        ({"gamma": 0.0}, "expected gamma above 0, got 0.0 - at MultiStep"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InputError) as error:
        MultiStep(updates=10, **options)
    assert str(error.value) == message


def test_linear():
    assert [Linear(updates=4).factor(t) for t in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert [Linear(0.5, updates=4).factor(t) for t in range(5)] == [0, 0.5, 1, 0.5, 0]
    with pytest.raises(InputError, match="expected a share of the run from 0 to below 1, got 1.0 - at Linear"):
        Linear(1.0, updates=4)
