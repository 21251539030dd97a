"""Runs that stop, change, meet bad files or other processes: what goes on, and what is said in one line."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from qdeploy import cli, files
from qdeploy.errors import ExportError, InputError
from qdeploy.training import command, domains, finished_runs, pretrained, processes, progress, run_files, start, trainer
from qdeploy.training.choices import Choice
from qdeploy.training.config import Config, plain, resolve, settings_of, stored
from qdeploy.training.decoding import UnreadableImage
from qdeploy.training.domains import load_benchmark
from qdeploy.training.evaluation import Evaluator, evaluation_sets
from qdeploy.training.learner import Learner
from qdeploy.training.methods import quantizations
from qdeploy.training.minibatches import split
from qdeploy.training.models import MODELS
from qdeploy.training.quantize import quantize_
from qdeploy.training.rehearsal import rehearse_export
from qdeploy.training.selected_network import load_trained

SMALL = resolve(
    Config(data="debug", test_domain="debug1", updates=5, quantize_at=1, eval_every=2, batch_size=4, accelerator="cpu")
)
BENCHMARK = load_benchmark("debug")
FLOAT = "train --method erm --data debug --test-domain debug1 --accelerator cpu --updates 5 --eval-every 2".split()
WORDS = [*FLOAT, "--method", "qt-dog", "--quantize-at", "1"]


def arguments(words):
    args, args.unknown = cli._parser().parse_known_args(words)
    return args


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A finished run, and one that stopped after its first update."""
    torch.set_num_threads(1)
    finished, stopped = tmp_path_factory.mktemp("finished"), tmp_path_factory.mktemp("stopped")
    fabric = Fabric(accelerator="cpu", devices=1)
    trainer.run(SMALL, BENCHMARK, finished, fabric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_agreed", lambda signals, fabric: signal.SIGTERM)
        with pytest.raises(processes.Interrupted):
            trainer.run(SMALL, BENCHMARK, stopped, fabric)
    return {"finished": finished, "stopped": stopped}


@pytest.fixture
def copy_of(folders, tmp_path):
    return lambda kind: Path(shutil.copytree(folders[kind], tmp_path / kind))


def network(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)["net"]


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@contextmanager
def limited(kind: int, most: int):
    """What the system grants this process, within the block."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGXFSZ, previous)
        resource.setrlimit(kind, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- Settings of another version -------------------------------------------------------------------------------------


def altered(path: Path, change) -> None:
    content = json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, weights_only=True)
    change(content)
    path.write_text(json.dumps(content)) if path.suffix == ".json" else torch.save(content, path)


@pytest.mark.parametrize(("kind", "name"), [("finished", "done.json"), ("stopped", "checkpoint.pt")])
def test_a_setting_that_an_old_run_does_not_know_has_its_default(copy_of, folders, fabric, kind, name):
    folder = copy_of(kind)
    altered(folder / name, lambda content: content["config"]["quantization"].__delitem__("grad_scale"))
    trainer.run(SMALL, BENCHMARK, folder, fabric)
    assert equal(network(folder), network(folders["finished"]))
    folder = shutil.rmtree(folder) or copy_of(kind)
    altered(folder / name, lambda content: content["config"]["quantization"].__delitem__("grad_scale"))
    with pytest.raises(
        InputError,
        match=f"quantization.grad_scale='tensor', got quantization.grad_scale='none': give another --out - at .*{name}",
    ):
        trainer.run(replace(SMALL, quantization={"grad_scale": "none"}), BENCHMARK, folder, fabric)


@pytest.mark.parametrize(("kind", "name"), [("finished", "done.json"), ("stopped", "checkpoint.pt")])
def test_a_setting_that_is_gone_had_its_default_or_is_named(copy_of, fabric, kind, name):
    folder = copy_of(kind)

    def gone(value):
        def change(content):
            content["config"]["momentum"], content["defaults"]["momentum"] = value, 0.9

        return change

    altered(folder / name, gone(0.5))
    expected = (
        "expected the settings of this version, got momentum=0.5, which this one has not: train anew with another"
    )
    with pytest.raises(InputError, match=f"{expected} --out - at .*{name}"):
        trainer.run(SMALL, BENCHMARK, folder, fabric)
    altered(folder / name, gone(0.9))
    assert trainer.run(SMALL, BENCHMARK, folder, fabric)["update"] >= 1


@pytest.mark.parametrize(
    ("kind", "name"), [("finished", "done.json"), ("finished", "model.pt"), ("stopped", "checkpoint.pt")]
)
def test_a_run_of_a_newer_version_is_one_line(copy_of, fabric, kind, name):
    folder = copy_of(kind)
    altered(folder / name, lambda content: content.update(version=2, config={"depth": {}}))
    if name == "model.pt":
        (folder / "done.json").unlink()  # so that it is made again from this file
    text = "expected a run of version 1 or older, got version 2: update qdeploy, or train anew with another --out"
    with pytest.raises(InputError, match=f"^{text} - at {folder / name}$"):
        trainer.run(SMALL, BENCHMARK, folder, fabric)


def test_settings_are_stored_with_their_defaults():
    config = resolve(Config(test_domain="pen", bits=4))
    content = json.loads(json.dumps(settings_of(config)))
    assert (content["config"]["bits"], content["defaults"]["bits"], content["defaults"]["updates"]) == (4, 7, 2001)
    assert stored(content, "here") == config
    for wrong in ({"bits": "seven"}, {"lr": []}, {"from_scratch": 1}, {"step": "uphill"}, {"step": 3}):
        with pytest.raises((TypeError, ValueError)):
            stored({**content, "config": {**content["config"], **wrong}}, "here")


# ---- What may change -------------------------------------------------------------------------------------------------


def test_more_updates_equal_as_many_from_the_beginning(copy_of, tmp_path, fabric, capsys):
    folder, longer = copy_of("stopped"), replace(SMALL, updates=9)
    trainer.run(longer, BENCHMARK, folder, fabric)
    assert "seed 0 goes on from update 1 with updates=9 instead of 5\n" in capsys.readouterr().err
    assert [record.get("changed") for record in log(folder)] == [None, {"updates": [5, 9]}, None, None, None]
    trainer.run(longer, BENCHMARK, tmp_path / "whole", fabric)
    assert equal(network(folder), network(tmp_path / "whole"))


def test_updates_that_are_made_cannot_be_taken_back(copy_of, fabric, monkeypatch):
    folder = copy_of("stopped")
    monkeypatch.setattr(trainer, "_agreed", lambda signals, fabric: signal.SIGTERM)
    for _ in range(3):
        with pytest.raises(processes.Interrupted):
            trainer.run(SMALL, BENCHMARK, folder, fabric)
    text = "expected at least 4 updates, which are made, got 3 at --updates - at .*checkpoint.pt"
    with pytest.raises(InputError, match=text):
        trainer.run(replace(SMALL, updates=3), BENCHMARK, folder, fabric)


def test_a_finished_run_has_the_updates_it_has(folders, fabric):
    text = "run begun here, updates=5, got updates=9: give another --out - at .*done.json"
    with pytest.raises(InputError, match=text):
        trainer.run(replace(SMALL, updates=9), BENCHMARK, folders["finished"], fabric)


def test_the_machine_may_change(copy_of, capsys):
    folder = copy_of("stopped")
    changed = replace(SMALL, precision="bf16-mixed", accelerator="auto")
    trainer.run(changed, BENCHMARK, folder, Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"))
    said = capsys.readouterr().err
    assert "with precision='bf16-mixed' instead of '32-true'" in said and "with accelerator='auto' instead" in said


def test_images_may_lie_elsewhere_but_are_no_other_data():
    old = resolve(Config(data="/a/PACS", test_domain="art"))
    path = Path("checkpoint.pt")
    run_files.check_same_run(old, replace(old, data="/b/PACS"), path)
    with pytest.raises(InputError, match="data='/a/PACS', got data='debug': give another --out - at checkpoint.pt"):
        run_files.check_same_run(old, replace(old, data="debug"), path)
    with pytest.raises(InputError, match="model='resnet50', got model='nin': give another --out - at checkpoint.pt"):
        run_files.check_same_run(old, replace(old, model=Choice("nin")), path)


def test_export_takes_runs_of_several_machines(copy_of, tmp_path):
    first, second = copy_of("finished"), tmp_path / "second"
    shutil.copytree(first, second)
    altered(second / "done.json", lambda content: content["config"].update(seed=1, precision="bf16-mixed"))
    assert finished_runs.read_runs([first, second])[first].config.precision == "32-true"
    altered(second / "done.json", lambda content: content["config"].update(split_seed=4))
    text = f"runs of one network, split, held-out domain and selection, split_seed=0, got split_seed=4 - at {second}"
    with pytest.raises(InputError, match=text):
        finished_runs.read_runs([first, second])


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minutes", "saved"), [(10, [1, 4, 7]), (0, [1, 1, 2, 3, 4, 5, 6, 7, 8]), (60, [1])])
def test_checkpoints_come_by_the_clock_between_evaluations(tmp_path, fabric, monkeypatch, minutes, saved):
    """Updates of four minutes each, and one evaluation, after the first of them."""
    config = replace(SMALL, updates=8, eval_every=100, quantize_at=0, checkpoint_minutes=minutes)
    now, found, update, write = [0.0], [], Learner.update, trainer.write_state

    def slow(self, t, minibatches):
        now[0] += 240
        return update(self, t, minibatches)

    def noted(path, config, state):
        found.append(state["update"])
        write(path, config, state)

    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(trainer, "write_state", noted)
    monkeypatch.setattr(Learner, "update", slow)
    trainer.run(config, BENCHMARK, tmp_path, fabric)
    assert found == saved


def test_updates_are_saved_before_a_long_evaluation(tmp_path, fabric, monkeypatch, folders):
    def killed(self, net):
        raise KeyboardInterrupt

    config = replace(SMALL, checkpoint_minutes=0)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.run(config, BENCHMARK, tmp_path, fabric)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["update"] == 1
    trainer.run(SMALL, BENCHMARK, tmp_path, fabric)  # another number of minutes is no other run
    assert equal(network(tmp_path), network(folders["finished"]))


# ---- Weights ---------------------------------------------------------------------------------------------------------


def nin(classes: int = 4, channels: int = 1) -> nn.Module:
    torch.manual_seed(classes)
    return MODELS["nin"](classes, channels, depth=1, width=1)


STATE = nin().state_dict()
PREFIXED = {f"module.encoder_q.{key}": value for key, value in STATE.items()}
MOCO = {"module.encoder_k.x": torch.zeros(1), **PREFIXED, "module.queue": torch.zeros(1)}
GOOD_WEIGHTS = {
    "a state dict": STATE,
    "state_dict": {"epoch": 3, "state_dict": STATE},
    "model": {"model": STATE, "optimizer": {"state": {}}},
    "of a run": {"config": {}, "net": STATE, "selected": {"update": 3}},
    "of DataParallel": {"state_dict": {f"module.{key}": value for key, value in STATE.items()}},
    "of MoCo": {"arch": "nin", "state_dict": MOCO},
    "of before num_batches_tracked": {key: value for key, value in STATE.items() if "num_batches" not in key},
}


@pytest.mark.parametrize("kind", GOOD_WEIGHTS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_weights_as_others_publish_them(tmp_path, kind, legacy):
    torch.save(GOOD_WEIGHTS[kind], tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    net = MODELS["nin"](4, 1, depth=1, width=1)
    said = pretrained.load_pretrained(net, tmp_path / "w.pth")
    assert equal(net.state_dict(), STATE)
    assert said == f"{len(STATE) if 'before' not in kind else len(STATE) - 4} tensors of {tmp_path / 'w.pth'}"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w"])
def test_safetensors_by_any_name(tmp_path, name):
    save_file(STATE, tmp_path / name)
    net = MODELS["nin"](4, 1, depth=1, width=1)
    pretrained.load_pretrained(net, tmp_path / name)
    assert equal(net.state_dict(), STATE)


def test_a_classifier_of_other_classes_is_left_out_and_said(tmp_path):
    torch.save({**nin(9).state_dict(), "extra": torch.zeros(1)}, tmp_path / "w.pth")
    net, fresh = nin(4), nin(4).state_dict()
    said = pretrained.load_pretrained(net, tmp_path / "w.pth")
    found, other = net.state_dict(), nin(9).state_dict()
    assert all(torch.equal(found[key], (fresh if key.startswith("classifier") else other)[key]) for key in found)
    left_out = "classifier.conv.weight, classifier.conv.bias, classifier.bn.weight, classifier.bn.bias and 4 more"
    assert said == f"21 tensors of {tmp_path / 'w.pth'}, without {left_out}; a new classifier"


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def without(*keys: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in STATE.items() if key not in keys}


SPOILT = torch.tensor([float("nan")]).expand(STATE["features.1.conv.bias"].shape).clone()
BAD_WEIGHTS = {
    "empty": (b"", "a file of weights, got an empty one - at .*w.pth$"),
    "cut": (saved(STATE)[:3000], "a file of weights, got a damaged one, maybe cut"),
    "text": (b"404: Not Found", "a file of weights, got another or a damaged one"),
    "cut safetensors": (
        b"\x90\x00\x00\x00\x00\x00\x00\x00{" + b" " * 20,
        "a file of weights, got another or a damaged",
    ),
    "a module": (
        saved(nn.ReLU()),
        r"a file of weights, got a pickled torch.nn.modules.activation.ReLU, which would run code: torch.save its",
    ),
    "a list": (saved([STATE]), r"weights by name \(a state dict\), got a list"),
    "a tensor": (saved(torch.zeros(3)), r"weights by name \(a state dict\), got a Tensor"),
    "an optimizer": (saved({"body": STATE}), r"weights by name \(a state dict\), got a OrderedDict for `body`"),
    "no names": (saved({0: torch.zeros(1)}), r"weights by name \(a state dict\), got a Tensor for `0`"),
    "numbers": (saved({"lr": 0.1}), r"weights by name \(a state dict\), got a float for `lr`"),
    "nothing": (
        saved({}),
        "the weights of a NiN, got no `features.0.conv.weight` and 17 more that lack or have another",
    ),
    "one less": (saved(without("features.1.bn.bias")), "the weights of a NiN, got no `features.1.bn.bias` - at"),
    "other images": (
        saved(nin(4, 3).state_dict()),
        r"the weights of a NiN, got shape \[25, 3, 3, 3\] instead of \[25, 1, 3, 3\] for `features.0.conv.weight` - at",
    ),
    "NaN": (
        saved({**STATE, "features.1.conv.bias": SPOILT}),
        "finite weights, got NaN or infinity in `features.1.conv.bias`",
    ),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_bad_weights_are_told_apart(tmp_path, kind):
    content, text = BAD_WEIGHTS[kind]
    (tmp_path / "w.pth").write_bytes(content)
    net = nin()
    with pytest.raises(InputError, match=f"^expected {text}"):
        pretrained.load_pretrained(net, tmp_path / "w.pth")
    assert equal(net.state_dict(), STATE)


def test_bad_safetensors(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(saved(STATE))
    with pytest.raises(InputError, match="got another or a damaged one|got a damaged one, maybe cut"):
        pretrained.load_pretrained(nin(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="expected a file of weights, got Is a directory - at"):
        pretrained.load_pretrained(nin(), tmp_path)


def tree(root: Path, names_of: dict[str, str]) -> Path:
    """Folders domain/class with 5 images in each."""
    rng = np.random.default_rng(0)
    for domain, classes in names_of.items():
        for label in classes.split():
            (root / domain / label).mkdir(parents=True)
            for i in range(5):
                pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / domain / label / f"{i}.png")
    return root


def test_a_folder_needs_weights_or_consent(tmp_path, capsys):
    data = tree(tmp_path / "data", {"art": "cat dog", "photo": "cat dog"})
    words = ["train", "--data", str(data), "--test-domain", "art", "--accelerator", "cpu", "--out", str(tmp_path / "r")]
    assert cli.main(words) == 2
    expected = "weights to fine-tune (torchvision's resnet50, say) or --from-scratch for a folder of images"
    assert capsys.readouterr().err == f"qdeploy: error: expected {expected}, got neither - at --weights\n"
    assert cli.main([*words, "--from-scratch", "--weights", "w.pth"]) == 2
    assert "expected --weights or --from-scratch, got both - at w.pth\n" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_finished_run_needs_its_weights_no_more(copy_of, tmp_path, fabric):
    torch.save(MODELS["nin"](4, 1).state_dict(), tmp_path / "w.pth")
    config = replace(SMALL, weights=str(tmp_path / "w.pth"), updates=3)
    trainer.run(config, BENCHMARK, tmp_path / "run", fabric)
    (tmp_path / "w.pth").unlink()
    assert equal(load_trained(tmp_path / "run", BENCHMARK).state_dict(), network(tmp_path / "run"))


# ---- Files that cannot be written or read ----------------------------------------------------------------------------


def test_a_full_disk_leaves_the_older_checkpoint(copy_of, fabric, monkeypatch, folders):
    folder = copy_of("stopped")
    before = (folder / "checkpoint.pt").read_bytes()
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 10_000:  # the checkpoint's, not the log's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*checkpoint.pt"):
        trainer.run(SMALL, BENCHMARK, folder, fabric)
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert names(folder) == ["checkpoint.pt", "log.jsonl", "settings.yaml"]
    monkeypatch.undo()
    trainer.run(SMALL, BENCHMARK, folder, fabric)
    assert equal(network(folder), network(folders["finished"]))


def test_what_is_appended_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    """On a disk that fills while a line is written, and after it."""
    path, fsync = tmp_path / "log.jsonl", os.fsync
    files.append(path, b"one\n")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        files.append(path, b"two\n")
    assert path.read_bytes() == b"one\n"
    monkeypatch.setattr(os, "fsync", fsync)
    with limited(resource.RLIMIT_FSIZE, 10), pytest.raises(OSError, match=f"File too large: '{path}'"):
        files.append(path, b"two, of which six bytes have room\n")
    assert path.read_bytes() == b"one\n"
    files.append(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"


def test_done_json_is_made_again(copy_of, folders, fabric):
    folder = copy_of("finished")
    (folder / "done.json").write_text("{")
    with pytest.raises(InputError, match="got a damaged one: delete it - at .*done.json"):
        trainer.run(SMALL, BENCHMARK, folder, fabric)
    (folder / "done.json").unlink()
    trainer.run(SMALL, BENCHMARK, folder, fabric)
    assert (folder / "done.json").read_text() == (folders["finished"] / "done.json").read_text()


@pytest.mark.parametrize("name", ["checkpoint.pt", "lock", files.TEMPORARY.format("0123abcd")])
def test_what_a_process_left_that_was_killed_when_all_was_done_is_removed(copy_of, fabric, name):
    folder = copy_of("finished")
    (folder / name).touch()
    trainer.run(SMALL, BENCHMARK, folder, fabric)
    assert names(folder) == ["done.json", "log.jsonl", "model.pt", "settings.yaml"]


def test_a_finished_run_without_its_network_is_named_before_others_train(copy_of, capsys):
    folder = copy_of("finished")
    shutil.copytree(folder, folder / "seed0")
    (folder / "seed0" / "model.pt").unlink()
    assert cli.main([*WORDS, "--batch-size", "4", "--seeds", "2", "--out", str(folder)]) == 2
    expected = "the network of a finished run, got none: delete done.json beside it to train anew"
    assert capsys.readouterr().err == f"qdeploy: error: expected {expected} - at {folder / 'seed0' / 'model.pt'}\n"
    assert not (folder / "seed1").exists()


# ---- One process a run -----------------------------------------------------------------------------------------------

TRAIN = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from lightning_fabric import Fabric
from qdeploy.training import trainer
from qdeploy.training.learner import Learner
from qdeploy.training.config import Config
from qdeploy.training.domains import load_benchmark
def wait(self, number, minibatches):
    print("trains", flush=True)
    sys.stdin.read()
Learner.update = wait
config, folder = Config(**eval(sys.argv[1])), Path(sys.argv[2])
trainer.run(config, load_benchmark("debug"), folder, Fabric(accelerator="cpu", devices=1))
"""


def test_two_processes_do_not_train_one_run(folders, fabric, tmp_path):
    arguments = [sys.executable, "-c", TRAIN, repr(plain(SMALL)), str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout.readline() == b"trains\n"
            holder = f"process {child.pid} on {os.uname().nodename}"
            text = f"expected a run that no process trains now, got one of {holder} - at {tmp_path}"
            with pytest.raises(InputError, match=text):
                trainer.run(SMALL, BENCHMARK, tmp_path, fabric)
        finally:
            child.kill()
    (tmp_path / files.TEMPORARY.format("0123abcd")).write_bytes(b"half a checkpoint")
    trainer.run(SMALL, BENCHMARK, tmp_path, fabric)  # the lock went with its process
    assert names(tmp_path) == ["done.json", "log.jsonl", "model.pt", "settings.yaml"]
    assert equal(network(tmp_path), network(folders["finished"]))


def test_a_run_that_another_process_just_finished_is_not_trained_again(folders, fabric, tmp_path, monkeypatch):
    alone = run_files.alone

    def late(folder):
        shutil.copytree(folders["finished"], folder, dirs_exist_ok=True)
        return alone(folder)

    monkeypatch.setattr(processes, "alone", late)
    monkeypatch.setattr(trainer, "build_network", pytest.fail)
    assert trainer.run(SMALL, BENCHMARK, tmp_path, fabric)["update"] >= 1


def test_a_lock_file_that_its_owner_removed_is_no_lock(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def removed_in_between(file, how):
        flock(file, how)
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / "lock").unlink()

    monkeypatch.setattr(fcntl, "flock", removed_in_between)
    with run_files.alone(tmp_path):
        assert len(calls) == 2 and (tmp_path / "lock").read_text().endswith(os.uname().nodename)
    assert names(tmp_path) == []


def test_without_locks_a_run_warns_and_goes_on(tmp_path, monkeypatch, capsys):
    def none(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / files.TEMPORARY.format("0123abcd")).touch()  # maybe of a process that lives
    with run_files.alone(tmp_path):
        pass
    text = f"warning: no lock (No locks available): do not train here with two processes - at {tmp_path}\n"
    assert capsys.readouterr().err == text
    assert names(tmp_path) == [files.TEMPORARY.format("0123abcd")]


# ---- Beginning and end -----------------------------------------------------------------------------------------------


def test_an_operator_that_no_file_holds_stops_a_run_before_its_first_update(tmp_path, monkeypatch, capsys):
    class Running(nn.Module):
        def __init__(self, classes: int, in_channels: int):
            super().__init__()
            self.conv, self.head = nn.Conv2d(in_channels, 8, 3), nn.Linear(8, classes)

        def forward(self, x):
            return self.head(torch.cumsum(self.conv(x), 2).mean((2, 3)))

    monkeypatch.setitem(MODELS, "running", Running)
    monkeypatch.setattr(trainer._Run, "_train", lambda *arguments: pytest.fail("an update"))
    assert cli.main([*WORDS, "--model", "running", "--out", str(tmp_path / "run")]) == 2
    assert "cumsum" in capsys.readouterr().err.splitlines()[-1]
    assert names(tmp_path / "run" / "seed0") == []
    monkeypatch.setattr(trainer._Run, "_train", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # what no file will hold may be anything
        command.main(arguments([*FLOAT, "--model", "running", "--out", str(tmp_path)]))


def test_a_class_of_weights_that_export_refuses_is_found_by_the_rehearsal(monkeypatch):
    monkeypatch.setattr(quantizations, "quantize_", lambda net, *rest, **more: quantize_(net, {"features.0.conv": 7}))
    with pytest.raises(ExportError, match="features.1.conv"):
        rehearse_export(SMALL, BENCHMARK)


def test_the_end_decodes_every_image_once_for_all_networks(tmp_path, monkeypatch, capsys):
    words = [*WORDS, "--batch-size", "4", "--seeds", "2", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    first = capsys.readouterr()
    decoded: list[int] = []
    batch = domains.ArrayDomain.batch

    def counting(self, positions, *rest):
        if self.name == "debug1":
            decoded.extend(positions.tolist())
        return batch(self, positions, *rest)

    monkeypatch.setattr(domains.ArrayDomain, "batch", counting)
    assert cli.main(words) == 0
    assert sorted(decoded) == sorted(split(60, 1, 0)[0].tolist())
    again = capsys.readouterr()
    assert again.out == first.out and again.err == ""


def test_a_run_says_first_what_it_has(tmp_path, capsys):
    data = tree(tmp_path / "data", {"art": "cat dog", "photo": "cat dog owl", "sketch": "cat dog"})
    torch.save(MODELS["nin"](9, 3).state_dict(), tmp_path / "w.pth")
    words = ["train", "--data", str(data), "--test-domain", "photo", "--accelerator", "cpu", "--model", "nin"]
    words += ["--image-size", "16", "--updates", "3", "--quantize-at", "1", "--eval-every", "2", "--batch-size", "2"]
    words += ["--activation-bits", "8", "--weights", str(tmp_path / "w.pth"), "--workers", "0"]
    words += ["--out", str(tmp_path / "run")]
    assert cli.main(words) == 0
    lines = capsys.readouterr().err.splitlines()
    left_out = "classifier.conv.weight, classifier.conv.bias, classifier.bn.weight, classifier.bn.bias and 3 more"
    assert lines[:9] == [
        "data: 3 classes (cat, dog, owl); preset: a folder of images",
        "domain  images  training  validation  use",
        "art         10         8           2  source",
        "sketch      10         8           2  source",
        "photo       15         -           -  held out",
        "nin: 34,909 parameters; 7-bit weights, 8-bit inputs in 6 layers from update 1 on; `classifier.conv` in float",
        "method qt-dog: objective erm, step plain, quantization lsq, average none, optimizer adam, schedule constant",
        f"weights: 42 tensors of {tmp_path / 'w.pth'}, without {left_out}; a new classifier",
        "3 updates of 4 images, 2 evaluations of 19; images are loaded by the training itself (--workers 0)",
    ]
    assert lines[9] == "warning: no source domain has images of owl"
    assert [line.split(" loss")[0] for line in lines[10:]] == ["seed 0 update 0 float", "seed 0 update 2 7 bit"]
    assert all(line.endswith("% waiting for data") for line in lines[10:])


def test_files_that_were_left_out_are_said():
    class Tree:
        left_out = [(f"photo/._{i}.jpg", "a file of macOS") for i in range(4)]
        name, classes, domains, inputs = BENCHMARK.name, BENCHMARK.classes, BENCHMARK.domains, BENCHMARK.inputs

    lines = start.describe(SMALL, Tree(), evaluation_sets(SMALL, BENCHMARK))
    named = "; ".join(f"photo/._{i}.jpg: a file of macOS" for i in range(3))
    assert lines[-1] == f"warning: left out 4 files: {named}; ..."


def test_long_evaluations_tell_how_far_they_are(fabric, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with progress.progress_of_run(SMALL, 0, fabric) as shown:
        with shown.waiting():
            now[0] += 3
        now[0] += 1
        shown.updated(40)
        for _ in range(3):
            now[0] += 16
            shown.evaluated(100, 300)
        assert shown.measured() == {"seconds": 52.0, "images_per_second": 6.538, "waiting": 0.0577}
        shown.recorded({"update": 3, "quantized": True, "loss": 1.0, "validation": 0.5, "test": 0.25})
    record = "seed 0 update 3 7 bit loss 1.0000 validation 0.5000 debug1 0.2500"
    assert capsys.readouterr().err.splitlines() == [
        "seed 0 evaluates: 200 of 300 images, 7 images/s, 8% waiting for data",
        f"{record}, 7 images/s, 6% waiting for data",
    ]


def test_the_end_tells_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with progress.counted("2 trained networks", 300, "images") as seen:
        for _ in range(3):
            now[0] += 16
            seen(100)
    assert capsys.readouterr().err == "2 trained networks: 200 of 300 images\n"


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--test-domain", "debug1,debug1"], "expected every domain once, got debug1,debug1 - at --test-domain"),
        (
            ["--test-domain", "debug0,debug1,debug2"],
            "expected a domain or more to train on, got all 3 - at --test-domain",
        ),
        (["--domains", "debug1"], "expected two or more domains, or --test-domain in-domain, got 1 - at --domains"),
        (
            ["--domains", "debug0,debug1", "--quantize-at", "5"],
            r"expected a switch in 0 .. 4 (the last evaluation), got 5",
        ),
    ],
)
def test_settings_that_leave_nothing_to_do(tmp_path, capsys, words, text):
    assert cli.main([*WORDS, *words, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_one_class_is_nothing_to_learn(tmp_path):
    data = str(tree(tmp_path, {"art": "cat", "photo": "cat"}))
    config = resolve(Config(data=data, test_domain="art", from_scratch=True))
    with pytest.raises(InputError, match="expected two or more classes, got cat - at "):
        load_benchmark(data, check=lambda outline: start.check_setting(config, outline))


@pytest.mark.parametrize("update", [0, 2, 3])
def test_a_corrupt_image_keeps_the_updates_before_it(tmp_path, fabric, capsys, update):
    """In a minibatch, or in the evaluation after an update."""
    data = tree(tmp_path / "data", {"art": "cat dog", "photo": "cat dog", "sketch": "cat dog"})
    settings = {"model": "nin", "image_size": 16, "updates": 5, "quantize_at": 1, "eval_every": 2, "batch_size": 2}
    config = resolve(Config(data=str(data), test_domain="photo", accelerator="cpu", workers=0, **settings))
    benchmark = load_benchmark(str(data), image_size=16)
    trainer.run(config, benchmark, tmp_path / "whole", fabric)

    batch = domains.FolderDomain.batch
    spoilt = data / "art" / "cat" / "0.png"
    evaluates = update % 2 == 0

    def spoiling(self, positions, augment=None, *rest):
        here = augment is None if evaluates else augment is not None and augment[1] == update
        if here and (not evaluates or made[0] > update):
            raise UnreadableImage(f"expected an image that can be read, got truncated - at {spoilt}")
        return batch(self, positions, augment, *rest)

    made, updated = [0], progress.Progress.updated

    def counting(self, images):
        made[0] += 1
        updated(self, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.Progress, "updated", counting)
        patch.setattr(domains.FolderDomain, "batch", spoiling)
        with pytest.raises(InputError, match=f"got truncated - at {spoilt}"):
            trainer.run(config, benchmark, tmp_path / "run", fabric)
    kept = update + 1 if evaluates else update
    assert f"stopped before update {kept}: run the same command again to continue - at" in capsys.readouterr().err
    trainer.run(config, benchmark, tmp_path / "run", fabric)
    assert equal(network(tmp_path / "run"), network(tmp_path / "whole"))
    assert [record["update"] for record in log(tmp_path / "run")] == [0, 2, 4]
