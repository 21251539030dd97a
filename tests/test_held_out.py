"""What is held out of training: one domain, several, or a share of each."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from qdeploy.cli import main
from qdeploy.training.config import Config, resolve
from qdeploy.training.domains import Outline, load_benchmark
from qdeploy.training.evaluation import evaluation_sets, reported
from qdeploy.training.minibatches import in_domain_split, split
from qdeploy.training.start import check_setting, describe, seed_hash

BENCHMARK = load_benchmark("debug")  # debug0, debug1, debug2, 60 images each
OUTLINE = Outline("debug", BENCHMARK.classes, [domain.name for domain in BENCHMARK.domains], BENCHMARK.inputs)
SHORT = ("--data", "debug", "--updates", "2", "--quantize-at", "1", "--eval-every", "1", "--accelerator", "cpu")


def settings(test_domain, **given):
    return resolve(Config(data="debug", test_domain=test_domain, **given))


def test_in_domain_halves_the_held_out_share_by_the_same_shuffle():
    for count, environment, seed in ((1003, 2, 0), (60, 0, 3), (5, 1, 0)):
        training, validation, test = in_domain_split(count, environment, seed)
        keys = list(range(count))
        np.random.RandomState(seed_hash(seed, environment)).shuffle(keys)
        held_out = keys[: int(0.4 * count)]
        again = list(range(len(held_out)))
        np.random.RandomState(seed_hash(seed, environment)).shuffle(again)
        half = len(held_out) // 2
        assert training.tolist() == keys[int(0.4 * count) :]
        assert validation.tolist() == [held_out[i] for i in again[:half]]
        assert test.tolist() == [held_out[i] for i in again[half:]]


def test_sets_of_several_targets():
    config = settings("debug2,debug0")
    sets = evaluation_sets(config, BENCHMARK)
    assert list(sets) == ["debug0_in", "debug0_out", "debug1_out", "debug2_in", "debug2_out"]
    assert sets["debug2_in"][0] == 2 and sets["debug2_in"][1].tolist() == split(60, 2, 0)[0].tolist()
    assert reported(config, BENCHMARK) == {"debug2": "debug2_in", "debug0": "debug0_in"}
    assert [domain.name for domain in BENCHMARK.sources(config.targets)] == ["debug1"]


def test_sets_within_domains():
    config = settings("in-domain", split_seed=4)
    sets = evaluation_sets(config, BENCHMARK)
    assert list(sets) == [f"debug{i}_{part}" for i in range(3) for part in ("out", "test")]
    for name, (i, positions) in sets.items():
        assert positions.tolist() == in_domain_split(60, i, 4)[1 if name.endswith("out") else 2].tolist()
    assert reported(config, BENCHMARK) == {f"debug{i}": f"debug{i}_test" for i in range(3)}
    assert BENCHMARK.sources(config.targets) == BENCHMARK.domains


@pytest.mark.parametrize(
    ("targets", "header"),
    [
        ("debug2,debug0", "    seed update  validation      debug2      debug0        mean"),
        ("in-domain", "    seed update  validation      debug0      debug1      debug2        mean"),
    ],
)
def test_every_result_has_a_column_for_each(tmp_path, capsys, targets, header):
    args = ["train", *SHORT, "--test-domain", targets, "--seeds", "2", "--out", str(tmp_path / "run")]
    assert main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == header and len(lines) == 10
    names = header.split()[3:-1]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for seed, member in enumerate(summary["members"]):
        tests = member["tests"]
        done = json.loads((tmp_path / f"run/seed{seed}/done.json").read_text())["selected"]
        assert list(tests) == names and tests == done["tests"] and member["test"] == done["test"]
        assert member["test"] == pytest.approx(sum(tests.values()) / len(tests))
        cells = [f"{share:.2%}" for share in (member["validation"], *tests.values(), member["test"])]
        assert lines[2 + seed].split() == [str(seed), str(member["update"]), *cells]
        suffix = "test" if targets == "in-domain" else "in"
        assert tests == {name: done["accuracy"][f"{name}_{suffix}"] for name in names}
    assert list(summary["file"]["tests"]) == names == list(summary["ensemble_tests"]["vote"])
    rule = summary["ensemble_tests"]["logits"]
    assert lines[5].split()[2:] == [f"{share:.2%}" for share in (*rule.values(), summary["ensemble"]["logits"])]
    assert main(args) == 0  # finished: the same table
    assert capsys.readouterr().out.splitlines() == lines


def test_one_domain_alone_is_trained_within(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "tree/photo" / label).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (16, 16), (20 * i, 90, 60)).save(tmp_path / "tree/photo" / label / f"{i}.png")
    benchmark = load_benchmark(str(tmp_path / "tree"), image_size=16)
    config = resolve(Config(data="digits-dg", test_domain="in-domain"))
    assert {name: len(positions) for name, (_, positions) in evaluation_sets(config, benchmark).items()} == {
        "photo_out": 2,
        "photo_test": 2,
    }


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        ("debug1,debug1", "expected every domain once, got debug1,debug1 - at --test-domain"),
        ("debug1,debug2,debug0", "expected a domain or more to train on, got all 3 - at --test-domain"),
        ("debug1,", "expected one of debug0, debug1, debug2, got '' - at the domains of debug"),
        ("debug1,moon", "expected one of debug0, debug1, debug2, got 'moon' - at the domains of debug"),
    ],
)
def test_targets_that_leave_nothing_or_are_none(tmp_path, capsys, targets, text):
    assert main(["train", *SHORT, "--test-domain", targets, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"qdeploy: error: {text}\n"
    assert not (tmp_path / "run").exists()


def test_a_minibatch_of_one_source_is_small(monkeypatch):
    """The memory that is asked for counts sources, not domains."""
    config = settings("debug0,debug1", batch_size=1000)
    asked = []
    monkeypatch.setattr("qdeploy.training.start.check_memory", lambda size, what, at: asked.append(what))
    check_setting(config, OUTLINE)
    check_setting(replace(config, test_domain="in-domain"), OUTLINE)
    assert asked == ["1000 images", "3000 images"]


@pytest.mark.parametrize(
    ("targets", "uses"),
    [
        ("debug0,debug2", ["debug1 60 48 12 source", "debug0 60 - - held out", "debug2 60 - - held out"]),
        ("in-domain", [f"debug{i} 60 36 12 12 source" for i in range(3)]),
    ],
)
def test_a_run_says_what_is_held_out(targets, uses):
    config = settings(targets, batch_size=8)
    lines = describe(config, BENCHMARK, evaluation_sets(config, BENCHMARK))
    assert lines[0] == "debug: 4 classes (a, b, c, d); preset: Digits-DG"
    assert [" ".join(line.split()) for line in lines[2:5]] == uses
    images = 8 if targets != "in-domain" else 24
    assert lines[-1].startswith(f"2,001 updates of {images} images, ")
