"""The table of GAQAT's figures: what is in it, and each row once whatever happened to the process."""

import csv

import numpy as np
import pytest
import torch
from torch import nn

from qdeploy.errors import InputError
from qdeploy.training import project_steps_, quantize_, quantizers
from qdeploy.training.methods import scales
from qdeploy.training.methods.steps import GAQAT, SAGM, SAM, Plain

K, UPDATES = 3, 11


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def network(per_channel=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    quantize_(net, 3, 4, per_channel=per_channel, calibration=[torch.randn(8, 6)])
    quantizers(net)["0.input"].step.requires_grad_(False)
    return net


def loss_of(net, t):
    rng = torch.Generator().manual_seed(t)
    images, classes = torch.randn(8, 6, generator=rng), torch.randint(3, (8,), generator=rng)
    return nn.functional.cross_entropy(net(images), classes)


def begun(per_channel=False, **options):
    net = network(per_channel)
    return net, torch.optim.SGD(net.parameters(), lr=0.05), GAQAT(net, 0.5, K, rho=0.1, **options)


def train(folder, run, updates):
    net, optimizer, step = run
    for t in updates:
        step.gradients(lambda t=t: loss_of(net, t))
        if step.window is not None:
            scales.append(folder, t, net, step.window)
        optimizer.step()
        project_steps_(net)


def rows_of(folder):
    with (folder / "scales.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("per_channel", [False, True])
def test_rows_are_the_gradients_of_the_windows(tmp_path, per_channel):
    scales.begin(tmp_path, 0)
    net, optimizer, step = run = begun(per_channel)
    steps = {name: quantizer.step for name, quantizer in quantizers(net).items() if quantizer.step.requires_grad}
    assert [*steps] == ["0.weight", "2.weight", "2.input"]
    task, smooth, s = [], [], []
    flat = lambda values: np.concatenate([value.detach().double().flatten().numpy() for value in values])  # noqa: E731
    for t in range(UPDATES):
        other = network(per_channel)
        other.load_state_dict(net.state_dict())
        own = [quantizers(other)[name].step for name in steps]
        Plain(other).gradients(lambda t=t, other=other: loss_of(other, t))
        task.append(flat(step.grad for step in own))
        SAGM(other, 0.1).gradients(lambda t=t, other=other: loss_of(other, t))
        smooth.append(2 * flat(step.grad for step in own) - task[-1])
        s.append(flat(steps.values()))
        train(tmp_path, run, [t])
    rows = rows_of(tmp_path)
    names = [f"{name}[{i}]" if p.dim() else name for name, p in steps.items() for i in range(p.numel())]
    assert [(row["step"], row["scale"]) for row in rows] == [(str(t), name) for t in (3, 6, 9) for name in names]
    header = "step,scale,s,sum_task,sum_smooth,disorder_task,disorder_smooth,frozen"
    assert (tmp_path / "scales.csv").read_text().startswith(header + "\n")
    for window, t in enumerate((3, 6, 9)):
        found = rows[window * len(names) : (window + 1) * len(names)]
        column = lambda name, found=found: np.array([float(row[name]) for row in found])  # noqa: E731
        assert np.array_equal(column("s"), s[t])
        for kind, gradients in (("task", task), ("smooth", smooth)):
            part = np.array(gradients[t - K + 1 : t + 1])
            np.testing.assert_allclose(column(f"sum_{kind}"), part.sum(0), rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(
                column(f"disorder_{kind}"), (np.sign(part[1:]) != np.sign(part[:-1])).sum(0) / K
            )
        assert np.array_equal(column("frozen"), column("disorder_task") < 0.5)
    assert 0 < sum(int(row["frozen"]) for row in rows) < len(rows)


KILLS = [(stop, beyond, {}) for stop in (1, 3, 4, 6, 7, 10) for beyond in (0, 1, 4)]
VARIANTS = [(5, 4, {"reverse": True}), (5, 4, {"no_unfreeze": True})]


@pytest.mark.parametrize(("stop", "beyond", "options"), [*KILLS, *VARIANTS])
def test_each_row_is_there_once_after_a_kill(tmp_path, stop, beyond, options):
    (tmp_path / "whole").mkdir()
    scales.begin(tmp_path / "whole", 0)
    train(tmp_path / "whole", begun(**options), range(UPDATES))
    run = net, optimizer, step = begun(**options)
    scales.begin(tmp_path, 0)
    train(tmp_path, run, range(stop))
    state = [{**part.state_dict()} for part in run]
    torch.save(state, tmp_path / "state")
    train(tmp_path, run, range(stop, min(stop + beyond, UPDATES)))  # after the checkpoint, and lost
    if beyond:
        with (tmp_path / "scales.csv").open("a") as file:
            file.write("1")  # of a row that a full disk cut short
    again = begun(**options)
    for part, saved in zip(again, torch.load(tmp_path / "state", weights_only=True), strict=True):
        part.load_state_dict(saved)
    scales.begin(tmp_path, stop)
    train(tmp_path, again, range(stop, UPDATES))
    assert (tmp_path / "scales.csv").read_text() == (tmp_path / "whole" / "scales.csv").read_text()


def test_what_is_frozen_for_good_is_recorded_on(tmp_path):
    """Figure 4 of the paper: of step sizes that get no g_task any more, what they would have got."""
    scales.begin(tmp_path, 0)
    train(tmp_path, begun(no_unfreeze=True), range(UPDATES))
    by_window = [[row for row in rows_of(tmp_path) if row["step"] == str(t)] for t in (3, 6, 9)]
    frozen = [{row["scale"] for row in rows if row["frozen"] == "1"} for rows in by_window]
    assert frozen[0] and frozen[0] <= frozen[1] <= frozen[2]
    of_frozen = [row for rows in by_window[1:] for row in rows if row["scale"] in frozen[0]]
    assert all(float(row["sum_task"]) and float(row["sum_smooth"]) for row in of_frozen)
    assert any(float(row["disorder_task"]) >= 0.5 for row in of_frozen)  # it would unfreeze one


def test_a_run_begun_anew_starts_the_table_anew(tmp_path):
    (tmp_path / "scales.csv").write_text("step,scale\n0,a\n")
    scales.begin(tmp_path, 0)
    assert rows_of(tmp_path) == []


def test_a_table_that_was_lost_is_said(tmp_path, capsys):
    scales.begin(tmp_path, 3)
    expected = f"it has nothing before update 3 - at {tmp_path / 'scales.csv'}"
    assert capsys.readouterr().err == f"warning: the table of step sizes was gone: {expected}\n"
    assert rows_of(tmp_path) == []


def test_a_table_of_something_else_is_one_line(tmp_path):
    path = tmp_path / "scales.csv"
    path.write_text("a,b\none,two\n")
    with pytest.raises(InputError) as error:
        scales.begin(tmp_path, 3)
    assert str(error.value) == f"expected a file written by a run, got a damaged one: delete it - at {path}"


def test_other_steps_have_nothing_to_record():
    net = network()
    for step in (Plain(net), SAM(net), SAGM(net)):
        step.gradients(lambda: loss_of(net, 0))
        assert step.window is None
