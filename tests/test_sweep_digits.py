"""The sweep of all rows on Digits-DG, sweeps/digits.yaml: its settings as they are, and all of it on tiny data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_sweep import Here, states

from qdeploy import cli
from qdeploy.training import sweep_workers
from qdeploy.training.image_sets import SETS
from qdeploy.training.sweep_file import Row, read_sweep
from qdeploy.training.sweep_jobs import Training, _benchmark
from qdeploy.training.sweep_plan import plan

FILE = Path(__file__).parent.parent / "sweeps" / "digits.yaml"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def tiny_digits(monkeypatch):
    """The data set with 40 images of noise in a domain."""

    def load(names):
        rng = np.random.default_rng(0)
        return {name: (rng.integers(0, 256, (40, 1, 16, 16), np.uint8), np.arange(40) % 10) for name in names}

    monkeypatch.setitem(SETS, "digits-dg", replace(SETS["digits-dg"], load=load))
    _benchmark.cache_clear()
    yield
    _benchmark.cache_clear()


def test_the_settings_of_all_runs_resolve(tmp_path):
    sweep = read_sweep(FILE)
    assert sweep.targets == [
        "mfeat",
        "optdigits",
        "pen",
    ]  # the domains whose terms allow it, as docs/training.md has it
    of_runs = [job for job in plan(sweep, tmp_path, 1) if isinstance(job, Training)]
    assert len(sweep.rows) == 48 and len(of_runs) == 390
    assert {job.config.updates for job in of_runs} == {1001}
    switched = {job.config.quantize_at for job in of_runs if job.row == "qt-dog 7 bits"}
    assert switched == {400}
    for row in sweep.rows:
        if isinstance(row, Row):
            expected = 1 if row.name.startswith("diwa") else 5 if row.name in ("erm", "sma", "qt-dog 7 bits") else 3
            assert len(row.seeds) == expected, row.name


def test_every_row_trains_and_its_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_workers, "Workers", Here)
    content = yaml.safe_load(FILE.read_text())
    content["settings"] |= {"updates": 6, "quantize_at": 2, "eval_every": 1, "batch_size": 2}
    content["targets"], content["seeds"] = ["pen"], 1
    for row in content["rows"].values():
        row.pop("eval_every", None)
        if row.get("seeds") == 5:
            row["seeds"] = 2
        for setting in {"bits", "quantize_at", "lr", "weight_decay"} & {*row.get("grid", {})}:
            row["grid"][setting] = row["grid"][setting][:1]
    file, out = tmp_path / "digits.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    assert cli.main(["sweep", str(file), "--out", str(out)]) == 0
    assert {*states(out).values()} == {"done"}
    float_rows = {
        "erm",
        "sma",
        "coral",
        "mixstyle",
        "sam",
        "sagm",
        "swa",
        "swad",
        "noise",
        "erm_ensemble",
        "eoa",
        "diwa",
    }
    without = {path.name for path in out.iterdir() if path.is_dir() and not [*path.glob("pen/*.safetensors")]}
    assert {name for name in without if not name.startswith("diwa_member")} == float_rows
