"""`qdeploy measure` of many runs: which ones are meant, what is there already, what fails and what stops on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from test_sweep import Here

from qdeploy import cli
from qdeploy.training import sweep_workers, trainer
from qdeploy.training.config import Config, resolve
from qdeploy.training.domains import load_benchmark
from qdeploy.training.measure_run import Asked
from qdeploy.training.measure_runs import Measuring
from qdeploy.training.measures import flatness, norms
from qdeploy.training.sweep_jobs import outcome_of

SETTINGS = {"data": "debug", "test_domain": "debug1", "accelerator": "cpu", "updates": 4, "eval_every": 2}
SETTINGS |= {"model": {"name": "nin", "depth": 1, "width": 1}, "batch_size": 8, "method": "erm"}
RUNS = {"erm/seed2": {"seed": 2}, "erm/seed10": {"seed": 10}, "qt-dog": {"method": "qt-dog", "quantize_at": 2}}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(sweep_workers, "Workers", Here)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    folder, fabric, benchmark = tmp_path_factory.mktemp("trained"), Fabric(accelerator="cpu"), load_benchmark("debug")
    for name, given in RUNS.items():
        trainer.run(resolve(Config(**{**SETTINGS, **given})), benchmark, folder / name, fabric)
    return folder


@pytest.fixture
def pool(trained, tmp_path) -> Path:
    """A folder of three finished runs and one that is not."""
    folder = Path(shutil.copytree(trained, tmp_path / "pool"))
    (folder / "begun").mkdir()
    (folder / "begun" / "settings.yaml").touch()
    return folder


def measured(capsys, code: int, *words: object) -> dict:
    capsys.readouterr()
    assert cli.main(["measure", "--json", *map(str, words)]) == code
    return json.loads(capsys.readouterr().out)


def test_all_finished_runs_in_a_folder_are_measured(pool, capsys):
    capsys.readouterr()
    assert cli.main(["measure", str(pool), "--what", "norms,gaps", "--subset", "20"]) == 0
    said = capsys.readouterr()
    assert said.out == "3 runs measured\n"
    lines = said.err.splitlines()
    assert lines[0] == f"1 runs are not finished, and left out - in {pool}"
    names = ["erm/seed2", "erm/seed10", "qt-dog"]
    assert [line.split(" done in ")[0] for line in lines[1:]] == [
        f"[{place} of 3] {pool / name}" for place, name in enumerate(names, 1)
    ]
    for name in names:
        assert {"norms.json", "norms.csv", "gaps.json", "gaps.csv"} <= {
            path.name for path in (pool / name / "measures").iterdir()
        }
    alone = json.loads((pool / "qt-dog/measures/gaps.json").read_text())
    (pool / "qt-dog/measures/gaps.json").unlink()
    one = measured(capsys, 0, pool / "qt-dog", "--what", "gaps", "--subset", 20)
    assert one["measures"]["gaps"] == alone


def test_several_folders_are_measured_once_each(pool, capsys):
    found = measured(capsys, 0, pool / "qt-dog", pool / "erm", pool / "erm" / "seed2", "--what", "norms")
    assert found == {"runs": [str(pool / name) for name in ("qt-dog", "erm/seed2", "erm/seed10")], "failed": []}


def test_what_is_there_is_not_measured_again(pool, capsys, monkeypatch):
    measured(capsys, 0, pool / "erm" / "seed2", "--what", "norms")
    monkeypatch.delattr(norms, "norms")
    report = measured(capsys, 1, pool / "erm", "--what", "norms")
    assert report["runs"] == [str(pool / "erm" / "seed2")]
    assert [entry["name"] for entry in report["failed"]] == [str(pool / "erm" / "seed10")]


def test_a_run_that_fails_does_not_stop_the_others(pool, capsys):
    words = ["measure", str(pool), "--what", "bin-widths"]
    assert cli.main(words) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1 runs measured" and len(said) == 3
    for line, name in zip(said[1:], ("erm/seed2", "erm/seed10"), strict=True):
        assert line.startswith(f"{pool / name} failed: expected ")


def test_a_signal_keeps_the_finished_draws(pool, monkeypatch):
    options = {"directions": 3, "latent": False, "seed": 0}
    asked = Asked({"flatness": options}, 20, torch.device("cpu"), figures=False)
    run = pool / "qt-dog"
    job = Measuring(str(run), "", None, run / "measures", (), asked)
    drawn, handler = flatness.normal, signal.getsignal(signal.SIGTERM)

    def second_stops(count, seed):
        if len(seeds) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        seeds.append(seed)
        return drawn(count, seed)

    seeds: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(flatness, "normal", second_stops)
        assert outcome_of(job).kind == "stopped"
    partial = json.loads((run / "measures/flatness.partial.json").read_text())
    assert [*partial["draws"]] == ["at the weights", "direction 1 of 3"]
    assert signal.getsignal(signal.SIGTERM) is handler
    assert outcome_of(job).kind == "done"
    assert "flatness goes on after 2 finished draws\n" in (run / "measures/output.txt").read_text()


def test_bad_words_are_one_line(pool, tmp_path, capsys):
    for words, line in {
        (pool, "--jobs", 0): "expected at least 1, got 0 - at --jobs",
        (pool, tmp_path / "nowhere"): "expected the folder of a finished run (OUT/seed0 of `qdeploy train`), got no"
        f" done.json - at {tmp_path / 'nowhere'}",
        (pool / "begun",): "expected the folder of a finished run (OUT/seed0 of `qdeploy train`), got no"
        f" done.json - at {pool / 'begun'}",
    }.items():
        assert cli.main(["measure", *map(str, words), "--what", "norms"]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"qdeploy: error: {line}"
    assert not (tmp_path / "nowhere").exists() and not [*pool.rglob("measures")]
