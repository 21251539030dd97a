"""Sweeps as users run them: what is trained, what is refused before anything starts, and what fails, dies, stops or
waits on the way."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from qdeploy import cli
from qdeploy.training import run_files, sweep_board, sweep_command, sweep_schedule, sweep_workers, trainer
from qdeploy.training.sweep_jobs import Outcome, outcome_of

SETTINGS = {"data": "debug", "accelerator": "cpu", "model": {"name": "nin", "depth": 1, "width": 2}}
SETTINGS |= {"updates": 6, "quantize_at": 2, "eval_every": 2, "batch_size": 4}
ROWS = {
    "{method}": {"grid": {"method": ["erm", "qt-dog"]}},
    "qt-dog {bits} bits": {"method": "qt-dog", "seeds": [1], "grid": {"bits": [4, 3]}},
    "rtn": {"method": "rtn", "float_runs": "erm", "export": False},
    "eoq": {"combine": "qt-dog", "rule": "eoq"},
    "other rate": {"method": "erm", "lr": 0.01, "seeds": [1]},
    "diwa": {"combine": ["erm", "other *"], "rule": "diwa-uniform", "seeds": [1]},
}

pytestmark = pytest.mark.usefixtures("one_thread")


class Here:
    """An engine without processes of its own."""

    slots = threads = 1

    def __init__(self, slots, threads):
        self.job = None

    def start(self, job):
        self.job = job

    def ended(self, seconds):
        if self.job is None:
            time.sleep(0.01)
            return []
        job, self.job = self.job, None
        return [(job, outcome_of(job))]

    def stop(self):
        pass

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(sweep_workers, "Workers", Here)
    return Here


def written(path: Path, rows: dict, **more) -> Path:
    content = {"settings": SETTINGS, "targets": ["debug1"], "rows": rows, **more}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def states(out: Path) -> dict[str, str]:
    return {run["folder"]: run["state"] for run in json.loads((out / "sweep.json").read_text())["runs"]}


def network(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)["net"]


def same(a: Path, b: Path) -> bool:
    one, other = network(a), network(b)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def train(out: Path, *words: str, **settings: object) -> None:
    """`qdeploy train` with the settings of a sweep."""
    file = out.parent / "settings.yaml"
    file.write_text(yaml.safe_dump({**SETTINGS, "test_domain": "debug1", **settings}))
    assert cli.main(["train", "--config", str(file), "--out", str(out), *words]) == 0


# ---- What is trained ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished sweep, by two processes."""
    folder = tmp_path_factory.mktemp("sweep")
    file = written(folder / "tiny.yaml", ROWS, seeds=2)
    assert cli.main(["sweep", str(file), "--out", str(folder / "out"), "--jobs", "2"]) == 0
    return folder


def test_every_row_target_and_seed_has_the_folder_of_a_run(swept):
    found = states(swept / "out")
    assert {*found.values()} == {"done"}
    of_rows = {"erm": [0, 1], "qt-dog": [0, 1], "qt-dog_4_bits": [1], "qt-dog_3_bits": [1], "rtn": [0, 1]}
    of_rows |= {"eoq": [], "other_rate": [1], "diwa": []}
    expected = []
    for row, seeds in of_rows.items():
        expected += [f"{row}/debug1/seed{seed}" for seed in seeds] + [f"{row}/debug1"]
    assert [*found] == expected
    content = json.loads((swept / "out" / "sweep.json").read_text())
    assert content["version"] == 1
    names = ["erm", "qt-dog", "qt-dog 4 bits", "qt-dog 3 bits", "rtn", "eoq", "other rate", "diwa"]
    assert content["rows"] == names
    first = content["runs"][0]
    assert first.pop("seconds") > 0
    assert first == {"row": "erm", "target": "debug1", "seed": 0, "folder": "erm/debug1/seed0", "state": "done"}


def test_a_row_is_what_train_makes_of_its_settings(swept, tmp_path):
    train(tmp_path / "qt-dog", "--seeds", "2", method="qt-dog")
    here, there = tmp_path / "qt-dog", swept / "out" / "qt-dog" / "debug1"
    for seed in ("seed0", "seed1"):
        assert same(here / seed, there / seed)
    ours, theirs = [json.loads((folder / "summary.json").read_text()) for folder in (here, there)]
    for summary in (ours, theirs):
        summary["file"].pop("path")
    assert ours == theirs
    assert (here / "eoq.safetensors").read_bytes() == (there / "eoq.safetensors").read_bytes()


def test_rows_that_need_others_are_made_of_them(swept):
    out = swept / "out"
    of_rtn = json.loads((out / "rtn" / "debug1" / "seed1" / "done.json").read_text())["config"]
    assert of_rtn["float_runs"] == str(out / "erm" / "debug1")
    assert not (out / "rtn" / "debug1" / "eoq.safetensors").exists()  # export: false
    eoq = json.loads((out / "eoq" / "debug1" / "summary.json").read_text())
    assert (eoq["kind"], [Path(run).name for run in eoq["runs"]]) == ("EoQ", ["seed0", "seed1"])
    assert Path(eoq["file"]["path"]) == out / "eoq" / "debug1" / "model.safetensors"
    diwa = json.loads((out / "diwa" / "debug1" / "summary.json").read_text())
    assert diwa["kind"] == "DiWA, uniform"
    assert diwa["runs"] == [str(out / row / "debug1" / "seed1") for row in ("erm", "other_rate")]


def test_a_shared_setting_reaches_the_methods_that_take_it(swept):
    for row, expected in {"erm": None, "qt-dog": 2}.items():
        done = json.loads((swept / "out" / row / "debug1" / "seed0" / "done.json").read_text())
        assert done["config"]["quantize_at"] == expected


def test_what_is_done_is_not_made_again(swept, capsys, monkeypatch):
    monkeypatch.setattr(sweep_workers.Workers, "start", lambda *args: pytest.fail("started"))
    capsys.readouterr()
    out = str(swept / "out")
    assert cli.main(["sweep", str(swept / "tiny.yaml"), "--out", out, "--jobs", "2", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"out": out, "done": 17, "failed": [], "left_out": []}
    threads = max(1, sweep_command.cores() // 2)
    assert said.err == f"17 jobs, 17 of them done; 2 at once with {threads} thread(s) each - in {out}\n"


def test_another_setting_needs_another_folder(swept, capsys):
    file = written(swept / "other.yaml", {"erm": {"method": "erm", "lr": 0.5}})
    capsys.readouterr()
    assert cli.main(["sweep", str(file), "--out", str(swept / "out")]) == 2
    expected = "expected the settings of the run begun here, lr=0.001, got lr=0.5: give another --out"
    assert capsys.readouterr().err == f"qdeploy: error: {expected} - at {swept}/out/erm/debug1/seed0/done.json\n"


# ---- What is refused before anything starts ------------------------------------------------------------------------

REFUSED = {
    "targes: [a]": "one of settings, targets, seeds, rows, got 'targes' (did you mean targets?) - at FILE",
    "rows: {erm: {}}": "a list of domains to hold out, got None - at targets of FILE",
    "targets: [debug1]": "rows by name, got None - at FILE",
    "targets: [debug1, debug1]": "every value once, got 'debug1' twice - at targets of FILE",
    "targets: [a]\nseeds: [1, 1]": "every value once, got 1 twice - at seeds of FILE",
    "targets: [a]\nseeds: x": "an integer, got 'x' - at seeds of FILE",
    "targets: [a]\nrows: {erm: 3}": "settings by name, got 3 - at row 'erm' of FILE",
    "targets: [a]\nrows: {a: {}, a: {lr: 1}}": "every name once, got 'a' twice - at FILE",
    "targets: [a]\nrows: {a b: {}, a_b: {lr: 1}}": "every value once, got 'a_b' twice - at rows of FILE",
    "targets: [a]\nrows: {a: {grid: {lr: [1, 2]}}}": "{lr} in the name of a row for each lr, got none - at "
    "row 'a' of FILE",
    "targets: [a]\nrows: {'{lr}': {grid: {lr: 1}}}": "{setting: [value, ...]}, got {'lr': 1} - at grid of row "
    "'{lr}' of FILE",
    "targets: [a]\nrows: {'{lr}': {grid: {lr: [1, 1]}}}": "every value once, got '1' twice - at rows of FILE",
    "targets: [a]\nrows: {'{lr}': {lr: 1, grid: {lr: [1]}}}": "lr once, got it in the grid and beside it - at row "
    "'{lr}' of FILE",
    "targets: [a]\nrows: {a: {export: 1}}": "true or false, got 1 - at export of row 'a' of FILE",
    "targets: [a]\nrows: {a: {step: [sam]}}": "a name, or a name and options, got ['sam'] - at step of row 'a' of FILE",
    "targets: [a]\nrows: {a: {}, b: {combine: c}}": "one of a, or *, got 'c' - at combine of row 'b' of FILE",
    "targets: [a]\nrows: {a: {}, b: {combine: a, rule: mean}}": "one of ensemble, eoq, eoa, erm-ensemble, "
    "diwa-uniform, "
    "diwa-restricted, got 'mean' - at rule of row 'b' of FILE",
    "targets: [a]\nrows: {a: {}, b: {combine: a, seeds: 2}}": "seeds of 'a', [0], got 1 - at row 'b' of FILE",
    "targets: [a]\nrows: {a: {}, b: {combine: a, lr: 1}}": "one of seeds, combine, rule, got 'lr' - at row 'b' of FILE",
}
RUNS_REFUSED = {
    "{erm: {mehtod: erm}}": "'mehtod' (did you mean method?) - at row 'erm' of FILE",
    "{erm: {seed: 1}}": "'seed' (did you mean seeds?) - at row 'erm' of FILE",
    "{erm: {method: erms}}": "'erms' - at --method of row 'erm', debug1",
    "{sam: {method: sam, step.roh: 1}}": "expected an option of sam: rho, got 'roh' - at --step of row 'sam', debug1",
    "{qt-dog: {quantize_at: 6}}": "expected a switch in 0 .. 4 (the last evaluation), got 6 - at --quantize-at of row "
    "'qt-dog', debug1",
    "{erm: {method: erm, bits: 3}}": "average none, optimizer adam, schedule constant) - at --bits "
    "of row 'erm', debug1",
    "{a: {method: erm}, b: {method: erm, lr: 0.001}}": "expected every run once, got the settings of a/debug1/seed0 in "
    "b/debug1/seed0 - at rows",
    "{rtn: {method: rtn}}": "expected the row whose runs 'rtn' quantizes, got none - at float_runs",
    "{rtn: {method: rtn, float_runs: erm}}": "expected a row of runs in float with all of its seeds, got 'erm' - at "
    "float_runs of row 'rtn'",
    "{erm: {method: erm}, one: {combine: erm}}": "expected two or more runs, got 1 - at row 'one'",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_file_of_another_form_is_one_line(text, tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert cli.main(["sweep", str(file)]) == 2
    assert capsys.readouterr().err == f"qdeploy: error: expected {REFUSED[text].replace('FILE', str(file))}\n"


@pytest.mark.parametrize("rows", RUNS_REFUSED)
def test_settings_that_train_refuses_are_one_line_before_the_first_run(rows, tmp_path, capsys, here):
    file = written(tmp_path / "a.yaml", yaml.safe_load(rows))
    out = tmp_path / "out"
    assert cli.main(["sweep", str(file), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.endswith(f"{RUNS_REFUSED[rows].replace('FILE', str(file))}\n") and said.count("\n") == 1
    assert not out.exists()


def test_a_domain_that_is_not_there_is_one_line(tmp_path, capsys):
    file = written(tmp_path / "a.yaml", {"erm": {"method": "erm"}}, targets=["debug1", "debug7"])
    assert cli.main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 2
    expected = "expected one of debug0, debug1, debug2, got 'debug7' - at the domains of debug of row 'erm', debug7"
    assert capsys.readouterr().err == f"qdeploy: error: {expected}\n"


@pytest.mark.parametrize("words", [["--jobs", "0"], ["--address", "a:1"]])
def test_options_that_do_not_fit(words, tmp_path, capsys):
    file = written(tmp_path / "a.yaml", {"erm": {"method": "erm"}})
    assert cli.main(["sweep", str(file), *words]) == 2
    expected = {"--jobs": "at least 1, got 0 - at --jobs", "--address": "--engine ray, got local - at --address a:1"}
    assert capsys.readouterr().err == f"qdeploy: error: expected {expected[words[0]]}\n"


# ---- What goes wrong on the way ------------------------------------------------------------------------------------


def test_a_failed_run_stops_only_what_needs_it(tmp_path, capsys, here):
    rows = {
        "wild": {"method": "erm", "lr": 1e30},
        "rtn": {"method": "rtn", "float_runs": "wild"},
        "erm": {"method": "erm"},
    }
    file, out = written(tmp_path / "a.yaml", rows), tmp_path / "out"
    assert cli.main(["sweep", str(file), "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert states(out) == {
        **{"wild/debug1/seed0": "failed", "wild/debug1": "waiting", "rtn/debug1/seed0": "waiting"},
        **{"rtn/debug1": "waiting", "erm/debug1/seed0": "done", "erm/debug1": "done"},
    }
    *others, last = said.out.splitlines()
    assert others == [
        f"{out}: 2 jobs done",
        "wild/debug1: left out: it needs wild/debug1/seed0",
        "rtn/debug1/seed0: left out: it needs wild/debug1/seed0",
        "rtn/debug1: left out: it needs rtn/debug1/seed0",
    ]
    assert last.startswith("wild/debug1/seed0 failed: expected a finite loss, got ")
    assert "[0 of 6] wild/debug1/seed0 failed: expected a finite loss" in said.err
    assert "update 2" in (out / "erm" / "debug1" / "seed0" / "output.txt").read_text()


def test_a_bug_is_one_line_and_its_traceback_in_the_folder(tmp_path, here, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(trainer, "_made", broken)
    file, out = written(tmp_path / "a.yaml", {"erm": {"method": "erm"}}), tmp_path / "out"
    assert cli.main(["sweep", str(file), "--out", str(out)]) == 1
    run = json.loads((out / "sweep.json").read_text())["runs"][0]
    assert run["error"] == "ZeroDivisionError: of all things"
    assert "Traceback" in (out / "erm" / "debug1" / "seed0" / "output.txt").read_text()


def test_a_run_that_another_process_trains_is_waited_for(tmp_path, capsys, here, monkeypatch):
    monkeypatch.setattr(sweep_schedule, "AGAIN", 0.1)
    rows = {"erm": {"method": "erm"}, "sam": {"method": "sam"}}
    file, out = written(tmp_path / "a.yaml", rows), tmp_path / "out"
    locked, others = run_files.alone(out / "erm" / "debug1" / "seed0"), out / "sam" / "debug1" / "summary.json"
    locked.__enter__()

    def release():
        while not others.exists():
            time.sleep(0.01)
        locked.__exit__(None, None, None)

    thread = threading.Thread(target=release)
    thread.start()
    assert cli.main(["sweep", str(file), "--out", str(out)]) == 0
    thread.join()
    expected = "expected a run that no process trains now, got one of process"
    assert capsys.readouterr().err.count(f"erm/debug1/seed0 waiting: {expected}") == 1
    assert {*states(out).values()} == {"done"}


def test_a_second_sweep_in_the_folder_is_refused(tmp_path, capsys, here):
    file, out = written(tmp_path / "a.yaml", {"erm": {"method": "erm"}}), tmp_path / "out"
    with run_files.alone(out):
        assert cli.main(["sweep", str(file), "--out", str(out)]) == 2
    assert "expected a run that no process trains now, got one of process" in capsys.readouterr().err


def test_a_full_disk_ends_the_sweep_and_the_same_command_goes_on(tmp_path, capsys, here, monkeypatch):
    rows = {"erm": {"method": "erm"}, "sam": {"method": "sam"}}
    file, out = written(tmp_path / "a.yaml", rows), tmp_path / "out"

    def write_state(path, config, state):
        if config.step.name == "sam":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return kept(path, config, state)

    kept = trainer.write_state
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_state", write_state)
        assert cli.main(["sweep", str(file), "--out", str(out)]) == 2
    line = f"expected to read or write a file, got: No space left on device - at {out}/sam/debug1/seed0/checkpoint.pt"
    assert capsys.readouterr().err.splitlines()[-1] == f"qdeploy: error: {line}"
    assert [*states(out).values()] == ["done", "done", "waiting", "waiting"]
    assert cli.main(["sweep", str(file), "--out", str(out)]) == 0


def test_a_process_that_dies_is_tried_again_once(tmp_path, here, monkeypatch):
    rows = {"erm": {"method": "erm"}, "sam": {"method": "sam"}}
    file, out = written(tmp_path / "a.yaml", rows), tmp_path / "out"
    times = {"erm": 1, "sam": 2}
    ended = Here.ended

    def dies(self, seconds):
        if self.job is not None and self.job.seed is not None and times[self.job.row]:
            times[self.job.row] -= 1
            return [(self.job, Outcome("died", "SIGKILL"))]
        return ended(self, seconds)

    monkeypatch.setattr(Here, "ended", dies)
    assert cli.main(["sweep", str(file), "--out", str(out)]) == 1
    assert states(out)["erm/debug1/seed0"] == "done"
    [failed] = [run for run in json.loads((out / "sweep.json").read_text())["runs"] if run["state"] == "failed"]
    assert (
        failed["error"] == f"expected a process that finishes, got one that died (SIGKILL) - at {out}/sam/debug1/seed0"
    )


def test_a_killed_worker_and_ctrl_c_change_no_bit(tmp_path):
    settings = {**SETTINGS, "updates": 160, "eval_every": 4}
    file, out = written(tmp_path / "a.yaml", {"qt-dog": {}}, settings=settings), tmp_path / "out"
    command = [sys.executable, "-m", "qdeploy.cli", "sweep", str(file), "--out", str(out), "--jobs", "2"]
    run = out / "qt-dog" / "debug1" / "seed0"

    def trains(lines: int) -> int:
        """The process that trains, when there are so many lines in its log."""
        while not (run / "log.jsonl").exists() or (run / "log.jsonl").read_text().count("\n") < lines:
            time.sleep(0.01)
        return int((run / "lock").read_text().split()[1])

    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sweep:
        os.kill(trains(5), signal.SIGKILL)
        worker = trains(12)
        sweep.send_signal(signal.SIGINT)
        _, said = sweep.communicate()
    assert sweep.returncode == 130, said
    assert "died (SIGKILL)" in said
    assert "stopping: what runs writes its checkpoint; the same command goes on\n" in said
    assert [*states(out).values()] == ["waiting"] * 2
    assert (run / "checkpoint.pt").exists() and not (run / "lock").exists()
    assert not Path(f"/proc/{worker}").exists()
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sweep:
        _, said = sweep.communicate()
    assert sweep.returncode == 0, said
    train(tmp_path / "alone", method="qt-dog", updates=160, eval_every=4)
    assert same(run, tmp_path / "alone" / "seed0")


def test_the_table_on_a_terminal(tmp_path, here, monkeypatch):
    from rich.console import Console

    shown = []
    monkeypatch.setattr(sweep_board, "on_terminal", lambda: True)
    tick = sweep_board.Board.tick

    def ticked(board):
        tick(board)
        console = Console(width=100, file=io.StringIO())
        console.print(board._table())
        shown.append(console.file.getvalue())

    monkeypatch.setattr(sweep_board.Board, "tick", ticked)
    rows = {"erm": {"method": "erm"}, "sam": {"method": "sam", "lr": 1e30}}
    file = written(tmp_path / "a.yaml", rows, targets=["debug1", "debug2"])
    assert cli.main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "held out" in shown[0] and "erm/debug1/seed0" in shown[0] and "unknown time left" in shown[0]
    cells = [line.replace("│", "").split() for line in shown[-1].splitlines() if "debug" in line or " all " in line]
    assert [line[:5] for line in cells[:2]] == [["debug1", "2", "0", "1", "1"], ["debug2", "2", "0", "1", "1"]]
    assert cells[2][:5] == ["all", "4", "0", "2", "2"]
    assert cells[0][5] == "erm" and cells[0][6].endswith("%")
