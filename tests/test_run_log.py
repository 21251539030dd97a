"""What a run says of its evaluations: each once, in log.jsonl and in the logger beside it, whatever stopped the run."""

from __future__ import annotations

import csv
import errno
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from qdeploy import cli
from qdeploy.training import trainer
from qdeploy.training.config import Config, resolve
from qdeploy.training.domains import load_benchmark
from qdeploy.training.run_log import run_log

BENCHMARK = load_benchmark("debug")
NUMBERS = {"loss", "validation", "test", "tests/debug1", "machine/seconds", "machine/waiting"} | {
    f"{kind}/{part}" for kind in ("accuracy", "cross_entropy") for part in ("debug0_out", "debug1_in", "debug2_out")
}

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(logger: str) -> Config:
    given = {"updates": 9, "quantize_at": 3, "eval_every": 2, "batch_size": 4, "accelerator": "cpu"}
    return resolve(Config(data="debug", test_domain="debug1", logger=logger, **given))


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def points_of(folder: Path, logger: str) -> dict[str, list[tuple[int, float]]]:
    """The points of each number, as somebody finds them who opens the logger's files."""
    if logger == "csv":
        with (folder / "csv" / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {key: [(int(row["step"]), float(row[key])) for row in rows] for key in rows[0] if key != "step"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(params=["csv", "tensorboard"])
def logger(request) -> str:
    if request.param == "tensorboard":
        pytest.importorskip("tensorboard", reason="the `tensorboard` extra is not installed")
    return request.param


def test_every_evaluation_is_a_point_once_after_a_kill(tmp_path, fabric, monkeypatch, logger):
    """Killed when the third evaluation was logged and its checkpoint was not written yet."""
    calls, checkpoint = [], trainer._Run._checkpoint

    def killed(self):
        calls.append(self.state.update)
        if len(calls) == 3:
            raise KeyboardInterrupt
        checkpoint(self)

    monkeypatch.setattr(trainer._Run, "_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(settings(logger), BENCHMARK, tmp_path, fabric)
    assert [step for step, _ in points_of(tmp_path, logger)["loss"]] == [0, 2, 4]
    trainer.run(settings(logger), BENCHMARK, tmp_path, fabric)
    log, points = log_of(tmp_path), points_of(tmp_path, logger)
    assert [record["update"] for record in log] == [0, 2, 4, 6, 8]
    assert points.keys() >= NUMBERS
    for name, found in points.items():
        for record, (step, value) in zip(log, found, strict=True):
            expected = record
            for key in name.split("/"):
                expected = expected[key]
            assert step == record["update"] and np.float32(value) == np.float32(expected), name


@pytest.mark.parametrize("length", ["--updates 3", "--epochs 2"])
def test_the_settings_of_a_run_make_the_same_one(tmp_path, length):
    words = f"train --data debug --test-domain debug1 --accelerator cpu {length} --eval-every 1 --quantize-at 1".split()
    assert cli.main([*words, "--out", str(tmp_path / "one"), "--no-export"]) == 0
    settings = tmp_path / "one" / "seed0" / "settings.yaml"
    assert cli.main(["train", "--config", str(settings), "--out", str(tmp_path / "other"), "--no-export"]) == 0
    one, other = ((tmp_path / name / "seed0" / "done.json").read_text() for name in ("one", "other"))
    assert json.loads(one)["config"] == json.loads(other)["config"]
    assert settings.read_text() == (tmp_path / "other" / "seed0" / "settings.yaml").read_text()


def test_another_logger_begins_with_the_earlier_evaluations(tmp_path, fabric):
    records = [{"update": 0, "eligible": True, "loss": 2.0, "changed": {"updates": [5, 9]}}, {"update": 3, "loss": 1.0}]
    with run_log(settings("none"), tmp_path, [], fabric) as add:
        add(records[0])
    assert log_of(tmp_path) == records[:1] and not (tmp_path / "csv").exists()
    with run_log(settings("csv"), tmp_path, records[:1], fabric) as add:
        add(records[1])
    assert log_of(tmp_path) == records
    assert (tmp_path / "csv" / "metrics.csv").read_text().splitlines() == ["loss,step", "2.0,0", "1.0,3"]


def test_a_logger_whose_package_is_missing_is_one_line_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = [
        "train",
        "--data",
        "debug",
        "--test-domain",
        "debug1",
        "--accelerator",
        "cpu",
        "--out",
        str(tmp_path / "r"),
    ]
    assert cli.main([*words, "--logger", "tensorboard"]) == 2
    expected = 'the package tensorboard (pip install "qdeploy[tensorboard]"), got none - at --logger tensorboard'
    assert capsys.readouterr().err == f"qdeploy: error: expected {expected}\n"
    assert not (tmp_path / "r").exists()
    assert cli.main([*words, "--logger", "wandb"]) == 2
    assert "expected one of none, csv, tensorboard, got 'wandb' - at --logger\n" in capsys.readouterr().err


def test_a_full_disk_names_the_folder_of_the_logger(tmp_path, fabric, monkeypatch, logger):
    from lightning_fabric.loggers import CSVLogger, TensorBoardLogger

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with run_log(settings(logger), tmp_path, [], fabric) as add:
        add({"update": 0, "loss": 2.0})
        with monkeypatch.context() as patch:
            if logger == "csv":
                patch.setattr(CSVLogger, "save", full)
            else:
                patch.setattr(TensorBoardLogger, "experiment", type("Full", (), {"add_scalar": full})())
            with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / logger}'"):
                add({"update": 3, "loss": 1.0})
