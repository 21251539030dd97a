"""Images by workers: the same bits with any number of them, errors in one line, and no process that is left."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image

from qdeploy import _engine, cli
from qdeploy.errors import InputError
from qdeploy.training import loader, trainer
from qdeploy.training.config import Config, resolve
from qdeploy.training.decoding import UnreadableImage
from qdeploy.training.domains import load_benchmark
from qdeploy.training.learner import Learner
from qdeploy.training.loader import Keys, WorkerLost
from qdeploy.training.minibatches import RunImages, evaluation_batches
from qdeploy.training.processes import Interrupted
from qdeploy.training.trainer import evaluation_sets

SIZE = 16


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three domains of ten images."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for domain in ("art", "photo", "sketch"):
        for label in ("cat", "dog"):
            (root / domain / label).mkdir(parents=True)
            for i in range(5):
                pixels = rng.integers(0, 256, (20, 20 + 5 * i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / domain / label / f"{i}.png")
    return root


def words(data, out, workers, updates=4):
    given = {"data": data, "test-domain": "photo", "model": "nin", "image-size": SIZE, "accelerator": "cpu"}
    given |= {"updates": updates, "quantize-at": 1, "eval-every": 2, "batch-size": 4, "workers": workers, "out": out}
    return ["train", "--from-scratch", *(str(word) for key, value in given.items() for word in (f"--{key}", value))]


def settings(data, **changes):
    names = {"data": str(data), "test_domain": "photo", "model": "nin", "image_size": SIZE, "from_scratch": True}
    numbers = {"updates": 4, "quantize_at": 1, "eval_every": 2, "batch_size": 4, "workers": 2}
    return resolve(Config(**{**names, **numbers, "accelerator": "cpu", **changes}))


def train(config, folder):
    benchmark = load_benchmark(config.data, None, SIZE)
    return trainer.run(config, benchmark, folder, Fabric(accelerator="cpu", devices=1))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run without workers."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    assert cli.main(words(data, out, 0)) == 0
    return out


def network(folder):
    return torch.load(folder / "model.pt", weights_only=True)["net"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- The same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_writes_the_same_model(data, whole, tmp_path, monkeypatch, capsys, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})  # more workers than cores are not warned of
    assert cli.main(words(data, tmp_path, workers)) == 0
    assert f"; images are loaded by {workers} worker(s)\n" in capsys.readouterr().err
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stopped_with_two_workers_and_gone_on_with_none(data, whole, tmp_path, monkeypatch, capsys, stop):
    calls = iter([0] * (stop - 1) + [signal.SIGTERM])
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_agreed", lambda signals, fabric: next(calls))
        with pytest.raises(Interrupted):
            train(settings(data), tmp_path)
    train(settings(data, workers=0), tmp_path)
    assert equal(network(tmp_path), network(whole / "seed0"))
    assert f"seed 0 goes on from update {stop} with workers=0 instead of 2" in capsys.readouterr().err


class Device:
    """One of several data-parallel processes, as the loader sees it."""

    device = torch.device("cpu")

    def __init__(self, rank, count):
        self.global_rank, self.world_size = rank, count

    def to_device(self, moved):
        return moved


def taken(config, begin, owes_evaluation, rank=0, count=1):
    """All minibatches and evaluated images from an update on: images and classes."""
    benchmark = load_benchmark(config.data, None, SIZE)
    sets = evaluation_sets(config, benchmark)
    found = []
    with closing(RunImages(config, benchmark, Device(rank, count), sets, begin, owes_evaluation)) as images:

        def evaluate():
            found.extend(pair for name in sets for pair in images.evaluation(name, nullcontext))

        if owes_evaluation:
            evaluate()
        for update in range(begin, config.updates):
            found.extend(images._next(nullcontext))
            if update % config.eval_every == 0:
                evaluate()
    return found


def test_devices_with_workers_share_the_images_of_one_without(data):
    config = settings(data, updates=6)
    entire = taken(settings(data, updates=6, workers=0), 3, True)
    shares = [taken(config, 3, True, rank, 2) for rank in range(2)]
    for rank, share in enumerate(shares):
        assert len(share) == len(entire)
        for mine, of_all in zip(share, entire, strict=True):
            assert all(torch.equal(part, both[rank::2]) for part, both in zip(mine, of_all, strict=True))


def test_workers_take_arrays_too(tmp_path):
    benchmark = load_benchmark("debug")
    batches = [[Keys(0, np.arange(5)), Keys(2, np.arange(3))], [Keys(1, np.array([59]))]]
    with closing(loader.load(benchmark, batches, 0, 1)) as loaded:
        for batch, keys in zip(loaded, batches, strict=True):
            for (images, classes), (domain, positions, *_) in zip(batch, keys, strict=True):
                assert images.dtype == torch.uint8 and classes.dtype == torch.int64
                assert np.array_equal(images, benchmark.domains[domain].images[positions])
                assert np.array_equal(classes, benchmark.domains[domain].labels[positions])


@pytest.mark.parametrize(
    ("size", "lengths"), [(16, [172, 172, 171]), (224, [65, 65, 65, *[64] * 5]), (2000, [1] * 515)]
)
def test_evaluations_are_cut_into_batches(data, size, lengths):
    benchmark, positions = load_benchmark(str(data), None, size), np.arange(515)
    batches = evaluation_batches(benchmark, 1, positions)
    assert [len(keys.positions) for [keys] in batches] == lengths
    assert np.array_equal(np.concatenate([keys.positions for [keys] in batches]), positions)
    assert evaluation_batches(benchmark, 1, positions[:0]) == []


@pytest.mark.parametrize(
    ("changes", "cores", "workers"),
    [({}, 1, 0), ({}, 4, 3), ({}, 64, 16), ({"devices": 2}, 8, 3), ({"devices": 4}, 2, 0), ({"workers": 5}, 2, 5)],
)
def test_workers_are_those_that_the_cores_suffice_for(data, monkeypatch, changes, cores, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    monkeypatch.setattr(_engine, "cpu_quota", lambda: cores + 0.5)
    assert settings(data, **{"workers": None, **changes}).workers == workers
    assert resolve(Config(data="debug", test_domain="debug0")).workers == 0


# ---- Errors ----------------------------------------------------------------------------------------------------------


def test_a_damaged_image_is_named_and_the_updates_before_it_are_kept(data, whole, tmp_path, capsys):
    file = data / "photo/dog/3.png"  # evaluated after update 0
    good = file.read_bytes()
    try:
        file.write_bytes(bytes(len(good)))
        assert cli.main(words(data, tmp_path, 2)) == 2
    finally:
        file.write_bytes(good)
    stopped, error = capsys.readouterr().err.splitlines()[-2:]
    assert stopped.startswith("stopped before update 1: run the same command again to continue - at ")
    got = "a file that Pillow does not know: put a good copy in its place"
    assert error == f"qdeploy: error: expected an image that can be read, got {got} - at {file}"
    assert multiprocessing.active_children() == []
    assert cli.main(words(data, tmp_path, 2)) == 0
    assert equal(network(tmp_path / "seed0"), network(whole / "seed0"))


def test_a_refusal_keeps_its_file_on_the_way_from_a_worker(tmp_path):
    refusal = UnreadableImage("expected an image")
    refusal.file = "art/cat/1.png"
    copy = multiprocessing.reduction.ForkingPickler.loads(multiprocessing.reduction.ForkingPickler.dumps(refusal))
    assert (type(copy), str(copy), copy.file) == (UnreadableImage, "expected an image", "art/cat/1.png")


def test_a_worker_that_is_killed_ends_the_run_with_one_line(data, tmp_path, monkeypatch, capsys):
    update = Learner.update

    def killing(self, number, minibatches):
        for worker in multiprocessing.active_children() if number == 1 else ():
            os.kill(worker.pid, signal.SIGKILL)
        return update(self, number, minibatches)

    monkeypatch.setattr(Learner, "update", killing)
    expected = "expected 2 worker(s) that load images, got one that was killed: there may be too little memory for so"
    with pytest.raises(InputError, match=f"^{re.escape(expected)} many - at --workers$"):
        train(settings(data, updates=60), tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["update"]
    assert 2 <= kept < 60 and f"stopped before update {kept}: " in capsys.readouterr().err
    assert multiprocessing.active_children() == []


def test_workers_that_end_by_the_signal_of_the_run_are_no_error(data, tmp_path):
    """SIGTERM goes to all processes of a job: some schedulers do so."""
    benchmark = load_benchmark(str(data), None, SIZE)
    run = SimpleNamespace(state=trainer._State(), benchmark=benchmark, directory=tmp_path)
    with pytest.raises(Interrupted) as stop:
        with trainer._Run._saved(run, [signal.SIGTERM]):
            raise WorkerLost("expected 2 worker(s)")
    assert stop.value.signum == signal.SIGTERM
    with pytest.raises(WorkerLost), trainer._Run._saved(run, []):
        raise WorkerLost("expected 2 worker(s)")


def test_a_worker_without_memory_says_so_in_one_line(data, monkeypatch):
    def exhausted(*arguments):
        raise MemoryError

    monkeypatch.setattr("qdeploy.training.domains.load_image", exhausted)
    benchmark, batch = load_benchmark(str(data)), [Keys(0, np.arange(2))]
    assert isinstance(loader._Images(benchmark.domains, 0).__getitems__(batch), MemoryError)
    with pytest.raises(MemoryError), closing(loader.load(benchmark, [batch], 0, 0)) as loaded:
        next(loaded)


def test_other_errors_of_workers_stay_what_they_are():
    def failing(error):
        raise error
        yield

    for error in (RuntimeError("out of memory"), KeyError("x")):
        with pytest.raises(type(error)):
            loader._next(failing(error), 2)
    with pytest.raises(ConnectionError):
        loader._next(failing(ConnectionError()), 0)
    assert isinstance(loader._next(failing(ConnectionError()), 2), WorkerLost)  # it was killed while it sent a batch


def test_shared_memory_that_is_full_is_said(data, monkeypatch):
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(loader, "get_worker_info", object)
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    refusal = loader._Images(load_benchmark(str(data), None, SIZE).domains, 0).__getitems__([Keys(0, np.arange(2))])
    text = "expected shared memory for the images of all workers, got no room for a batch of 1,536: give less to"
    assert isinstance(refusal, WorkerLost) and str(refusal) == f"{text} --workers - at /dev/shm"


# ---- Processes -------------------------------------------------------------------------------------------------------


def processes_of(session):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_a_script_needs_no_guard(data, whole, tmp_path):
    """Workers do not import the program that trains: it would begin to train in each of them."""
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom qdeploy import cli\nprint('begins')\nsys.exit(cli.main(sys.argv[1:]))\n")
    arguments = [sys.executable, script, *words(data, tmp_path / "out", 1)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=one_thread)
    assert done.stdout.count("begins") == 1 and "error" not in done.stderr
    assert (tmp_path / "out/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left(data, tmp_path, signum):
    """After Ctrl-C, which a terminal sends to all processes, and when the run is killed."""
    program = "import sys; from qdeploy import cli; sys.exit(cli.main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", program, *words(data, tmp_path, 2, updates=1_000_000)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True) as child:
        while not child.stderr.readline().startswith("seed 0 update 0"):
            assert child.poll() is None
        assert len(processes_of(child.pid)) >= 4  # the run, what forks its workers, and they
        if signum == signal.SIGINT:
            os.killpg(child.pid, signum)
        else:
            child.kill()
        said = child.stderr.read()  # until the last of them is gone
    assert child.returncode == (130 if signum == signal.SIGINT else -signum)
    if signum == signal.SIGINT:
        assert re.search(r"^stopped before update \d+: run the same command again to continue - at ", said, re.M)
        assert said.count("\n") <= 3  # some evaluations, no traceback
    else:
        assert "Traceback" not in said
    deadline = time.monotonic() + 60
    while processes_of(child.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
