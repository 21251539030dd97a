"""Runs on a folder of images: on several devices, with other files than they began with, with damaged ones."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image

from qdeploy.errors import InputError
from qdeploy.training import trainer
from qdeploy.training.config import Config, plain, resolve
from qdeploy.training.domains import load_benchmark
from qdeploy.training.evaluation import evaluation_sets
from qdeploy.training.minibatches import split_of
from qdeploy.training.models import MODELS
from qdeploy.training.selected_network import load_trained
from qdeploy.training.trainer import run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def root(tmp_path):
    """Three domains of ten images, of 5:2, so that crops are drawn as well as centred."""
    rng = np.random.default_rng(0)
    for domain in ("art", "photo", "sketch"):
        for label in ("cat", "dog"):
            (tmp_path / "data" / domain / label).mkdir(parents=True)
            for i in range(5):
                pixels = rng.integers(0, 256, (16, 20 + 5 * i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / domain / label / f"{i}.png")
    torch.manual_seed(1)
    torch.save(MODELS["nin"](2, 3).state_dict(), tmp_path / "weights.pth")
    return tmp_path


def settings(root, **changes):
    """Fine-tuning, so that BatchNorm is frozen."""
    names = {"data": str(root / "data"), "test_domain": "photo", "weights": str(root / "weights.pth"), "model": "nin"}
    steps = {"updates": 4, "quantize_at": 2, "eval_every": 1, "image_size": 16, "batch_size": 6}
    return resolve(Config(**{**names, **steps, "accelerator": "cpu", "workers": 0, **changes}))


def train(config, directory):
    benchmark = load_benchmark(config.data, None, config.image_size)
    return run(config, benchmark, directory, Fabric(accelerator="cpu", devices=1))


@pytest.fixture
def stop_after(monkeypatch):
    """Has the next run stop after that update."""

    def stop(update):
        calls = iter([0] * update + [15])
        monkeypatch.setattr(trainer, "_agreed", lambda signals, fabric: next(calls, 0))

    return stop


# ---- Devices ---------------------------------------------------------------------------------------------------------

# Trains with the settings argv[1] in a folder of argv[2] for each number of processes that follows. 1 comes last: a
# process that has trained does not fork well.
CHILD = """
import sys, torch
torch.set_num_threads(1)
from dataclasses import replace
from pathlib import Path
from lightning_fabric import Fabric
from qdeploy.errors import InputError
from qdeploy.training import trainer
from qdeploy.training.config import Config
from qdeploy.training.domains import load_benchmark
config = Config(**eval(sys.argv[1]))
def train(fabric, devices):
    benchmark = load_benchmark(config.data, None, config.image_size)
    try:
        trainer.run(replace(config, devices=devices), benchmark, Path(sys.argv[2], str(devices)), fabric)
    except (InputError, SystemExit) as error:
        sys.stdout.write(f"{error}\\n")  # at once: two processes write
for devices in map(int, sys.argv[3:]):
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto")
    fabric.launch(train, devices)
"""


def train_on(config, folder, *devices):
    """What ends the processes before the run does."""
    command = [sys.executable, "-c", CHILD, repr(plain(config)), str(folder), *map(str, devices)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_a_run_does_not_depend_on_the_number_of_devices(root):
    """Crops, flips and colors, inputs' ranges, losses and accuracies; two validation images are shared by three."""
    config = settings(root, activation_bits=8, lr=1e-4)
    assert train_on(config, root, 2, 3, 1) == []

    def outcome(devices):
        folder = root / str(devices)
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return torch.load(folder / "model.pt", weights_only=True)["net"], log

    net, log = outcome(1)
    assert len(log) == 4
    for devices in (2, 3):
        other_net, other_log = outcome(devices)
        assert [record["accuracy"] for record in other_log] == [record["accuracy"] for record in log]
        assert [r["loss"] for r in other_log] == pytest.approx([r["loss"] for r in log], abs=1e-4)
        assert net.keys() == other_net.keys()
        for key, value in net.items():
            torch.testing.assert_close(other_net[key], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("positions", [0, 1])  # of the training images of a source, of its validation images
def test_a_damaged_image_stops_all_devices_with_one_line(root, positions):
    config = settings(root)
    art = load_benchmark(config.data).domains[0]
    for position in split_of(art, config)[positions][::2]:  # of the second process none
        file = root / "data" / art.files[position].path
        file.write_bytes(b"damaged")
    errors = train_on(config, root, 2)
    line, ended = sorted(errors, key=len, reverse=True)
    assert line.startswith("expected an image that can be read, got a file that Pillow does not know: put a good copy")
    assert ended == "2"  # the exit status of the other process, which says nothing


@pytest.mark.parametrize(("devices", "batch_size"), [(2, 7), (4, 3), (3, 1)])
def test_a_batch_that_the_devices_do_not_divide_is_an_error_of_settings(devices, batch_size):
    expected = f"expected a multiple of {devices} images, as many for each device, got {batch_size} - at --batch-size"
    with pytest.raises(InputError, match=f"^{expected}$"):
        resolve(Config(test_domain="mfeat", devices=devices, batch_size=batch_size))


# ---- Other files -----------------------------------------------------------------------------------------------------


def test_domains_keep_their_split_where_others_are_left_out(root):
    config, alone = settings(root), settings(root, domains="photo,sketch")
    every, two = load_benchmark(config.data), load_benchmark(config.data, ["photo", "sketch"])
    sets, fewer = evaluation_sets(config, every), evaluation_sets(alone, two)
    for name, (_, positions) in fewer.items():
        assert np.array_equal(positions, sets[name][1])


def test_a_run_goes_on_with_the_same_files_elsewhere_only(root, stop_after):
    config, directory = settings(root), root / "run"
    stop_after(1)
    with pytest.raises(trainer.Interrupted):
        train(config, directory)
    added = root / "data/sketch/dog/7.png"
    shutil.copy(root / "data/sketch/dog/0.png", added)
    got = "sketch/dog/7.png, which was not there"
    text = f"expected the images of the run in {directory}, got {got} - at {config.data}"
    with pytest.raises(InputError, match=f"^{text}$"):
        train(config, directory)
    added.unlink()
    benchmark = load_benchmark(str((root / "data").rename(root / "moved")), None, 16)
    run(config, benchmark, directory, Fabric(accelerator="cpu", devices=1))
    load_trained(directory, benchmark)

    (root / "moved/art/dog").rename(root / "moved/art/ant")  # finished: neither said to be done, nor exported
    other = load_benchmark(str(root / "moved"), None, 16)
    with pytest.raises(InputError, match="got class `ant`, which was not there - at "):
        run(config, other, directory, Fabric(accelerator="cpu", devices=1))
    with pytest.raises(InputError, match="got class `ant`, which was not there - at "):
        load_trained(directory, other)


def test_a_run_goes_on_when_a_damaged_image_was_replaced(root, stop_after):
    config = settings(root, updates=6)
    expected = train(config, root / "whole")
    image = root / "data/art/cat/2.png"
    good = image.read_bytes()
    stop_after(2)
    with pytest.raises(trainer.Interrupted):
        train(config, root / "run")
    image.write_bytes(bytes(len(good)))  # of the same size: the run goes on until it comes
    trouble = "expected an image that can be read, got .*: put a good copy in its place - at"
    with pytest.raises(InputError, match=f"{trouble} {image}$"):
        train(config, root / "run")
    image.write_bytes(good + bytes(7))  # the same pixels in more bytes
    found = train(config, root / "run")
    assert {**found, "machine": 0} == {**expected, "machine": 0}
