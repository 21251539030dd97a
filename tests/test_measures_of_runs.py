"""Measures of finished runs that need more than a network: corrupted images, files of GAQAT, pictures."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from qdeploy import cli
from qdeploy.training import trainer
from qdeploy.training.config import Config, resolve
from qdeploy.training.corruptions import corrupt
from qdeploy.training.domains import load_benchmark
from qdeploy.training.measures import gaps, gradcam, scales, stability
from qdeploy.training.measures.draws import anew
from qdeploy.training.measures.measured_run import MeasuredRun
from qdeploy.training.run_files import read_done

BENCHMARK = load_benchmark("debug")
SETTINGS = {"data": "debug", "test_domain": "debug1", "accelerator": "cpu", "updates": 13, "eval_every": 4}
SETTINGS |= {"model": {"name": "nin", "depth": 1, "width": 1}, "batch_size": 8, "lr": 0.02}
GAQAT = {"method": "gaqat", "quantize_at": 3, "step": {"name": "gaqat", "K": 2}}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    trainer.run(resolve(Config(**{**SETTINGS, **GAQAT})), BENCHMARK, folder, Fabric(accelerator="cpu", devices=1))
    return MeasuredRun(folder, read_done(folder), BENCHMARK, torch.device("cpu"), 20)


def test_gaps_of_a_run_are_of_its_images_corrupted(run):
    found = gaps.of_run(run, anew)
    assert len(found["kinds"]) == 14 and len(found["table"]) == 2 + 14 * 5
    (row,) = [row for row in found["table"] if (row["kind"], row["severity"]) == ("fog", 4)]
    domain, positions = run.target_part["debug1"]
    images = [corrupt(BENCHMARK.domains[domain].images[p].transpose(1, 2, 0), "fog", 4, int(p)) for p in positions]
    x = BENCHMARK.inputs.for_network(torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2)))
    labels = torch.from_numpy(BENCHMARK.domains[domain].labels[positions])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(run.net(x), labels).item()
    assert row["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert row["gap"] == row["test_loss"] - found["train_loss"]


def test_step_sizes_of_a_run(run):
    found = scales.of_run(run, anew, factors=(0.8,))
    lines = (run.folder / "scales.csv").read_text().splitlines()
    assert len(found["table"]) == len(lines) - 1 == found["windows"] * len(found["scales"])
    first = lines[1].split(",")
    assert [str(value) for value in [*found["table"][0].values()][:2]] == first[:2]
    assert {row["part"] for row in found["perturbed"]} == {"validation", "target"}
    assert len(found["perturbed"]) == 2 + 2 * len(found["scales"])


def test_stability_of_a_run_is_that_of_its_log(run):
    found = stability.of_run(run, anew)
    assert [row["update"] for row in found["table"]] == [0, 4, 8, 12]
    assert found["switch"] == 4 and found["selected"] == run.done.selected["test"]


def test_maps_of_a_run_lie_on_its_pixels(run):
    found = gradcam.of_run(run, anew, images=3)
    domain, positions = run.target_part["debug1"]
    assert found["stage"] == "features" and len(found["images"]) == 3 and found["classes"] == BENCHMARK.classes
    assert found["images"][1]["pixels"] == BENCHMARK.domains[domain].images[positions[1]].tolist()
    labels = BENCHMARK.domains[domain].labels[positions]
    assert [row["label"] for row in found["table"]] == labels[:3].tolist()


def test_the_command_draws_what_papers_show(run, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib draws them: pip install 'qdeploy[plots]'")
    words = ["measure", "--json", str(run.folder), "--what", "stability,norms", "--figures", "--subset", "20"]
    assert cli.main(words) == 0
    paths = [run.folder / f"figures/qt_dog_figure_4.{suffix}" for suffix in ("png", "svg")]
    assert json.loads(capsys.readouterr().out)["figures"] == [str(path) for path in paths]
    assert [*sorted((run.folder / "figures").iterdir())] == paths


def test_without_matplotlib_nothing_is_measured_for_figures(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["measure", str(run.folder), "--what", "bin-widths", "--figures"]) == 2
    expected = "expected matplotlib (pip install 'qdeploy[plots]'), got none - at --figures"
    assert capsys.readouterr().err == f"qdeploy: error: {expected}\n"
    assert not (run.folder / "measures/bin-widths.json").exists()
