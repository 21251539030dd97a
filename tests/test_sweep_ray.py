"""Sweeps on Ray: the same folders and bits as without, and what is said where Ray is not as it has to be."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from test_sweep import SETTINGS, same, states, train, written

from qdeploy import cli
from qdeploy.errors import InputError
from qdeploy.training import sweep_ray
from qdeploy.training.sweep_file import read_sweep
from qdeploy.training.sweep_jobs import _benchmark
from qdeploy.training.sweep_plan import plan

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_ray_that_is_not_installed_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    file = written(tmp_path / "a.yaml", {"erm": {"method": "erm"}})
    assert cli.main(["sweep", str(file), "--engine", "ray", "--address", "127.0.0.1:1"]) == 2
    expected = "expected the package ray (pip install 'qdeploy[ray]'), got none - at this Python environment"
    assert capsys.readouterr().err == f"qdeploy: error: {expected}\n"


def test_an_address_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(sweep_ray, "SILENT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InputError, match=f"got silence for 0 s - at --address {address}"):
            sweep_ray.check_answers(address)
    with pytest.raises(InputError, match=f"got Connection refused - at --address {address}"):
        sweep_ray.check_answers(address)
    with pytest.raises(InputError, match="expected HOST:PORT of the head of Ray, got 'head' - at --address"):
        sweep_ray.check_answers("head")


def test_what_a_node_lacks_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {**SETTINGS, "data": "photos", "from_scratch": True, "image_size": 8}
    file = written(tmp_path / "a.yaml", {"erm": {"method": "erm"}}, settings=settings, targets=["a"])
    for name in ("a/cat", "a/dog", "b/cat", "b/dog"):
        Path("photos", name).mkdir(parents=True)
        for i in range(5):
            Path("photos", name, f"{i}.png").write_bytes(b"not looked at")
    jobs = plan(read_sweep(file), tmp_path / "out", 1)
    shutil.rmtree("photos")
    _benchmark.cache_clear()  # as in a process of its own
    here, out = str(tmp_path), tmp_path / "out"
    assert sweep_ray._look(here, out, jobs) == f"expected a folder that all nodes see, got none at {out}"
    out.mkdir()
    said = sweep_ray._look(here, out, jobs)
    assert said.startswith("expected the data of the sweep, got this: expected") and "got 'photos' - at --data" in said


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def head():
    """The address of a head with two CPUs."""
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # Ray's sockets need a short path
        words = ["start", "--head", "--block", "--port", address.rpartition(":")[2], "--node-ip-address", "127.0.0.1"]
        words += ["--num-cpus", "2", "--include-dashboard", "false", "--disable-usage-stats", "--temp-dir", folder]
        command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", *words]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, start_new_session=True, **quiet) as process:
            try:
                while True:
                    assert process.poll() is None
                    try:
                        sweep_ray.check_answers(address)
                        break
                    except InputError:
                        time.sleep(0.2)
                yield address
            finally:
                os.killpg(process.pid, signal.SIGKILL)


def sweep(file: Path, out: Path, address: str) -> subprocess.Popen:
    """Elsewhere than in the checkout, which Ray would hand to its workers as a place to import from."""
    command = [sys.executable, "-m", "qdeploy.cli", "sweep", str(file), "--out", str(out), "--engine", "ray"]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "--address", address], cwd=file.parent, **pipes)


@needs_ray
def test_a_killed_worker_of_ray_and_ctrl_c_change_no_bit(head, tmp_path):
    settings = {**SETTINGS, "updates": 160, "eval_every": 4}
    file, out = written(tmp_path / "a.yaml", {"qt-dog": {}}, settings=settings), tmp_path / "out"
    run = out / "qt-dog" / "debug1" / "seed0"

    def trains(lines: int) -> int:
        """The process that trains, when there are so many lines in its log."""
        while not (run / "log.jsonl").exists() or (run / "log.jsonl").read_text().count("\n") < lines:
            assert process.poll() is None
            time.sleep(0.01)
        return int((run / "lock").read_text().split()[1])

    with sweep(file, out, head) as process:
        os.kill(trains(5), signal.SIGKILL)
        trains(12)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130, said
    assert "2 at once with 1 thread(s) each" in said and "got one that died (WorkerCrashedError)" in said
    assert [*states(out).values()] == ["waiting"] * 2
    assert (run / "checkpoint.pt").exists() and not (run / "lock").exists()
    with sweep(file, out, head) as process:
        _, said = process.communicate()
    assert process.returncode == 0, said
    train(tmp_path / "alone", method="qt-dog", updates=160, eval_every=4)
    assert same(run, tmp_path / "alone" / "seed0")
