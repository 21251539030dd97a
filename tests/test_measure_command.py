"""`qdeploy measure`: what it reads of a run, its files, what is kept when it stops, and bad input."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from qdeploy import cli, files
from qdeploy.training import measure_command, measure_run, trainer
from qdeploy.training.config import Config, resolve
from qdeploy.training.domains import load_benchmark
from qdeploy.training.measures import MEASURES, Measure, bisection, flatness, sharpness, surface
from qdeploy.training.measures.losses import accuracy
from qdeploy.training.measures.measured_run import MeasuredRun, first_of
from qdeploy.training.minibatches import split
from qdeploy.training.run_files import read_done
from qdeploy.training.start import build_network

BENCHMARK = load_benchmark("debug")
SETTINGS = {"data": "debug", "test_domain": "debug1", "accelerator": "cpu", "updates": 9, "eval_every": 4}
SETTINGS |= {"model": {"name": "nin", "depth": 1, "width": 1}, "batch_size": 8, "lr": 0.02}
RUNS = {"quantized": {"method": "qt-dog", "quantize_at": 3, "bits": 4}, "in-domain": {"test_domain": "in-domain"}}
DRAWN = ("flatness", "pac-bayes", "sharpness", "surface")  # at random
FLATNESS = ("--what", "flatness", "--set", "flatness.directions=3")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def short_searches(monkeypatch):
    """What they find is the matter of other tests."""
    monkeypatch.setattr(bisection, "STEPS", 3)
    monkeypatch.setattr(sharpness, "ASCENT", 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.set_num_threads(1)
    folder, fabric = tmp_path_factory.mktemp("runs"), Fabric(accelerator="cpu", devices=1)
    for name, given in RUNS.items():
        trainer.run(resolve(Config(**{**SETTINGS, "method": "erm", **given})), BENCHMARK, folder / name, fabric)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A run of its own."""
    return Path(shutil.copytree(finished / "quantized", tmp_path / "run"))


@pytest.fixture
def measure(run, capsys):
    """Runs the command; returns its report."""

    def made(*words: object) -> dict:
        capsys.readouterr()
        assert cli.main(["measure", "--json", str(run), *map(str, words)]) == 0
        return json.loads(capsys.readouterr().out)

    return made


@pytest.fixture
def refused(run, capsys):
    """Runs the command; returns the one line of its error."""

    def made(*words: object, folder: Path | None = None) -> str:
        capsys.readouterr()
        assert cli.main(["measure", str(folder or run), *map(str, words)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("qdeploy: error: expected ") and said.err.count("\n") == 1
        return said.err.removeprefix("qdeploy: error: ").rstrip()

    return made


def opened(folder: Path, subset: int = 1000) -> MeasuredRun:
    return MeasuredRun(folder, read_done(folder), BENCHMARK, torch.device("cpu"), subset)


# ---- The run ---------------------------------------------------------------------------------------------------------


def test_a_run_as_measures_see_it(finished):
    found = opened(finished / "quantized")
    assert found.training_count == 96 and found.config.bits == 4
    splits = {i: split(60, i, 0) for i in range(3)}
    parts = {"training": {0: 0, 2: 0}, "validation": {0: 1, 2: 1}, "target": {1: 0}}
    for name, domains in parts.items():
        images = getattr(found, name)
        assert [*images] == [f"debug{i}" for i in domains]
        for i, half in domains.items():
            x, y = (torch.cat(one).numpy() for one in zip(*images[f"debug{i}"], strict=True))
            expected = BENCHMARK.domains[i].images[splits[i][half]] / np.float32(255)
            assert sorted(x.reshape(len(x), -1).tolist()) == sorted(expected.reshape(len(x), -1).tolist())
            assert sorted(y) == sorted(BENCHMARK.domains[i].labels[splits[i][half]])
    assert sum(len(labels) for _, labels in found.all_training) == 96
    test = found.done.selected["test"]
    assert accuracy(found.net, found.target["debug1"]) == pytest.approx(test, abs=1e-9)
    expected = build_network(found.config, BENCHMARK).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.initial.state_dict().items())
    assert not found.net.training and not found.initial.training


def test_a_subset_is_a_sample_that_larger_ones_begin_with(finished):
    few, more = opened(finished / "quantized", 9), opened(finished / "quantized", 40)
    assert {name: len(one[1]) for name, one in few.training_part.items()} == {"debug0": 4, "debug2": 4}
    for name, (_, positions) in few.training_part.items():
        assert np.array_equal(positions, more.training_part[name][1][:4])
    taken = first_of(more.training, 9)
    for name, batches in taken.items():
        assert torch.equal(batches[0][0], few.training[name][0][0]) and len(batches) == 1


def test_runs_without_a_held_out_domain_have_test_images(finished):
    found = opened(finished / "in-domain")
    assert {name: len(positions) for name, (_, positions) in found.target_part.items()} == {
        f"debug{i}": 12 for i in range(3)
    }
    assert [*found.training] == ["debug0", "debug1", "debug2"] and found.training_count == 108


def test_another_initial_network_is_refused(run, refused):
    done = json.loads((run / "done.json").read_text())
    (run / "done.json").write_text(json.dumps({**done, "initial": "0" * 64}))
    assert refused("--what", "pac-bayes") == (
        f"expected the network that the run began with, got another - at {run / 'done.json'}"
    )


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MEASURES if name != "scales"])  # which only GAQAT has
def test_every_measure_writes_its_table_twice(run, name, monkeypatch):
    monkeypatch.setattr(measure_command, "SHOWN", 2)
    few = {"flatness": ["--set", "flatness.directions=2"], "surface": ["--set", "surface.points=2"]}
    assert cli.main(["measure", str(run), "--what", name, "--subset", "40", *few.get(name, [])]) == 0
    content = json.loads((run / f"measures/{name}.json").read_text())
    assert (
        content["measure"] == name
        and content["settings"]["subset"] == 40
        and content["settings"].get("seed") == (0 if name in DRAWN else None)
    )
    with (run / f"measures/{name}.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    expected = [{key: "" if value is None else str(value) for key, value in row.items()} for row in content["table"]]
    assert rows == expected and len(rows) > 2
    assert {path.name for path in (run / "measures").iterdir()} == {f"{name}.json", f"{name}.csv"}


def test_options_reach_the_measure(measure):
    report = measure(*FLATNESS, "--set", "flatness.latent=true", "--set", "flatness.seed=3", "--subset", 30)
    found = report["measures"]["flatness"]
    options = {"directions": 3, "latent": True, "seed": 3}
    assert found["settings"] == {"subset": 30, "device": "cpu", **options}


def test_what_is_measured_stays(measure, run, monkeypatch):
    first = measure(*FLATNESS)
    before = {path: path.stat().st_mtime_ns for path in (run / "measures").iterdir()}

    def never(*args: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(flatness, "flatness", never)
    assert measure(*FLATNESS) == first
    assert {path: path.stat().st_mtime_ns for path in (run / "measures").iterdir()} == before
    monkeypatch.undo()
    assert measure(*FLATNESS, "--subset", 20)["measures"]["flatness"]["loss"] != first["measures"]["flatness"]["loss"]


def test_another_network_is_measured_anew(measure, run):
    first = measure(*FLATNESS)
    state = torch.load(run / "model.pt", weights_only=True)
    state["net"]["classifier.conv.bias"] += 1
    torch.save(state, run / "model.pt")
    assert measure(*FLATNESS)["measures"]["flatness"]["network"] != first["measures"]["flatness"]["network"]


def test_numbers_that_are_none_become_null(measure, run, monkeypatch):
    monkeypatch.setattr(surface, "mean_cross_entropy", lambda net, domains: float("inf"))
    found = measure("--what", "surface", "--set", "surface.points=2")["measures"]["surface"]
    assert found["loss"] is None and [row["loss"] for row in found["table"]] == [None] * 4
    assert (run / "measures/surface.csv").read_text().splitlines()[:2] == ["a,b,loss", "-1.0,-1.0,"]


@pytest.mark.parametrize("name", ["flatness", "pac-bayes", "sharpness", "surface"])
def test_what_stops_goes_on_to_the_same_bits(measure, run, name, monkeypatch, capsys):
    words = ["--what", name, "--subset", 20]
    words += {"flatness": ["--set", "flatness.directions=6"], "surface": ["--set", "surface.points=3"]}.get(name, [])
    measure(*words)
    whole = {path.name: path.read_bytes() for path in (run / "measures").iterdir()}
    shutil.rmtree(run / "measures")
    made: list[str] = []
    draw = measure_run._Files.draw

    def stops_at_the_fifth(self, name, make):
        def counted():
            if len(made) in (4, 7):
                made.append("stopped")
                raise KeyboardInterrupt
            made.append(name)
            return make()

        return draw(self, name, counted)

    monkeypatch.setattr(measure_run._Files, "draw", stops_at_the_fifth)
    for kept in (4, 6):
        assert cli.main(["measure", str(run), *map(str, words)]) == 130
        assert [path.name for path in (run / "measures").iterdir()] == [f"{name}.partial.json"]
        assert len(json.loads((run / f"measures/{name}.partial.json").read_text())["draws"]) == kept
    capsys.readouterr()
    assert cli.main(["measure", str(run), *map(str, words)]) == 0
    assert f"{name} goes on after 6 finished draws\n" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (run / "measures").iterdir()} == whole
    names = [one for one in made if one != "stopped"]
    assert len(names) == len(set(names))


def test_draws_of_other_settings_are_not_taken(measure, run, monkeypatch):
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(flatness, "normal", stop)
        assert cli.main(["measure", str(run), *FLATNESS, "--subset", "20"]) == 130
    whole = measure(*FLATNESS)
    assert (
        whole["measures"]["flatness"]["loss"]
        == flatness.flatness(
            opened(run).net, {"source": opened(run).training, "target": opened(run).target}, directions=1
        )["loss"]
    )
    assert not (run / "measures/flatness.partial.json").exists()


def test_a_full_disk_loses_nothing(run, refused, measure, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        assert refused(*FLATNESS).startswith("expected to read or write a file, got: No space left on device - at ")
    assert [*(run / "measures").iterdir()] == []
    assert len(measure(*FLATNESS)["measures"]["flatness"]["table"]) == 40


# ---- Bad input -------------------------------------------------------------------------------------------------------


def test_bad_options_are_one_line(refused):
    names = ", ".join(MEASURES)
    assert refused("--what", "flatness,curvature") == f"expected one of {names}, got 'curvature' - at --what"
    assert refused("--what", "") == f"expected one of {names}, got '' - at --what"
    assert refused(*FLATNESS, "--subset", 0) == "expected at least 1, got 0 - at --subset"
    assert refused(*FLATNESS, "--device", "abacus").endswith(" - at --device")
    assert refused(*FLATNESS, "--set", "flatness.points=3") == (
        "expected an option of flatness: directions, latent, seed, got 'points' - at --set"
    )
    assert refused(*FLATNESS, "--set", "flatness.directions=many") == (
        "expected an integer, got 'many' - at --set flatness.directions"
    )
    for word in ("surface.points=3", "points=3", "flatness.directions", "flatness.=3"):
        expected = f"expected NAME.OPTION=VALUE with a NAME of --what, got {word!r} - at --set"
        assert refused(*FLATNESS, "--set", word) == expected
    assert refused("--what", "surface", "--set", "surface.points=1") == (
        "expected 2 points or more along an axis, got 1 - at surface"
    )
    assert refused("--what", "pac-bayes", "--set", "pac-bayes.orig_denominator=x").endswith(
        "got 'x' - at --set pac-bayes.orig_denominator"
    )


def test_an_unfinished_run_is_refused(run, refused, tmp_path):
    (run / "done.json").unlink()
    for folder in (run, tmp_path / "nowhere"):
        expected = "the folder of a finished run (OUT/seed0 of `qdeploy train`), got no done.json"
        assert refused(*FLATNESS, folder=folder) == f"expected {expected} - at {folder}"
    assert not (run / "measures").exists() and not (tmp_path / "nowhere").exists()


def test_a_run_of_a_newer_version_is_refused(run, refused):
    done = json.loads((run / "done.json").read_text())
    done["config"]["temperature"] = 2
    (run / "done.json").write_text(json.dumps(done))
    assert "temperature=2" in refused(*FLATNESS) and not (run / "measures").exists()


@pytest.mark.parametrize("file", ["flatness.json", "flatness.partial.json"])
def test_files_of_a_newer_version_and_damaged_ones_are_refused(run, refused, file):
    path = run / "measures" / file
    path.parent.mkdir()
    path.write_text(json.dumps({"measure": "flatness", "version": 2}))
    assert refused(*FLATNESS) == f"expected a file of version 1 or older, got version 2: upgrade qdeploy - at {path}"
    path.write_text("{")
    assert refused(*FLATNESS) == f"expected a file written by a run, got a damaged one: delete it - at {path}"
    assert path.read_text() == "{"


def test_two_processes_do_not_measure_one_run(run, refused):
    with measure_run.alone(run / "measures"):
        assert refused(*FLATNESS).endswith(f" - at {run / 'measures'}")


def test_the_table_of_a_measure_may_have_gaps(measure, run, monkeypatch):
    class Told:
        @staticmethod
        def of_run(run: MeasuredRun, draws: object) -> dict:
            return {"table": [{"name": "a", "value": 1}, {"name": "b", "good": True}], "pair": (1.0, float("nan"))}

    monkeypatch.setitem(MEASURES, "told", Measure("told", "what is told"))
    monkeypatch.setattr(Measure, "of_run", property(lambda self: Told.of_run))
    found = measure("--what", "told")["measures"]["told"]
    assert found["pair"] == [1.0, None]
    assert (run / "measures/told.csv").read_text() == "name,value,good\na,1,\nb,,True\n"
