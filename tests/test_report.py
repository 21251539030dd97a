"""Tables of finished runs: their numbers, the papers' figures beside, what must not be averaged, and the files."""

from __future__ import annotations

import csv
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

import qdeploy
from qdeploy import cli
from qdeploy.errors import InputError
from qdeploy.training import report_command, report_files, report_picture, tables
from qdeploy.training.config import Config, plain, resolve
from qdeploy.training.fingerprint import fingerprint
from qdeploy.training.report import report_data
from qdeploy.training.run_files import DONE, LOG, MODEL, write_done

PACS = ("art_painting", "cartoon", "photo", "sketch")
DEBUG = ("debug0", "debug1", "debug2")
MODEL_OF_PACS = {"model": "resnet50", "from_scratch": True}


def images(domains: tuple[str, ...], count: int = 60) -> dict[str, Any]:
    return fingerprint(["a", "b"], {name: [("images", count)] for name in domains})


def write_run(
    folder: Path, given: dict[str, Any], test: float | dict[str, float], validation: float = 0.5, **more: Any
) -> Path:
    """A finished run as a training leaves it, but for the content of its network."""
    config = resolve(Config(**{"data": "debug", "test_domain": "debug1", "accelerator": "cpu", **given}))
    tests = test if isinstance(test, dict) else {config.test_domain: test}
    record = {"update": 1000, "quantized": config.quantize_at is not None, "validation": validation}
    record |= {"test": statistics.fmean(tests.values()), "tests": tests}
    folder.mkdir(parents=True)
    (folder / LOG).write_text(f"{json.dumps(record)}\n")
    (folder / MODEL).touch()
    write_done(folder, config, record, more.get("images") or images(DEBUG), "0" * 64)
    return folder


def write_summary(folder: Path, given: dict[str, Any], test: float, members: int, **more: Any) -> None:
    """As `qdeploy train` and, with a "kind", `qdeploy combine` leave it."""
    config = resolve(Config(**{"data": "debug", "test_domain": "debug1", "accelerator": "cpu", **given}))
    tests = {config.test_domain: test}
    of_members = [
        {"seed": seed, "update": 1000, "validation": 0.5, "test": test, "tests": tests} for seed in range(members)
    ]
    content = {"config": plain(config), "members": of_members, **more}
    if members > 1 and "average" not in more:
        content["ensemble_tests"] = {"logits": tests}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(content))


def write_pacs(folder: Path, given: dict[str, Any], shares: dict[str, list[float]], validation: float = 0.9) -> None:
    """A run for every domain and seed."""
    for target, of_seeds in shares.items():
        for seed, share in enumerate(of_seeds):
            settings = {"data": "/data/PACS", "test_domain": target, "seed": seed, **MODEL_OF_PACS, **given}
            write_run(folder / target / f"seed{seed}", settings, share, validation, images=images(PACS))


def rows_of(markdown: str) -> dict[str, list[str]]:
    """The cells of the rows of the first table by label; "" are the headers."""
    lines = [line for line in markdown.split("\n## ")[1].splitlines() if line.startswith("|") and "---" not in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {label: others for label, *others in cells}


def markdown_of(*folders: Path, names: tuple[str, ...] = ()) -> str:
    from qdeploy.training.report_text import markdown

    return markdown(report_data(folders, names))


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def test_all_runs_as_markdown(tmp_path: Path):
    for target, shares in {"debug1": (0.5, 0.7, 0.9), "debug2": (0.2, 0.3)}.items():
        for seed, share in enumerate(shares):
            write_run(
                tmp_path / "erm" / target / f"seed{seed}",
                {"method": "erm", "seed": seed, "test_domain": target},
                share,
                0.8,
            )
    write_run(tmp_path / "qt-dog/seed0", {"method": "qt-dog", "bits": 4}, 0.625)
    assert markdown_of(tmp_path) == (
        f"# Runs in {tmp_path}\n\n"
        "## all: All runs of debug\n\n"
        "|  | debug1 | debug2 | mean | validation | seeds | bits |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| erm | 70.0 ± 11.5 | 25.0 ± 5.0 | 42.5 ± 7.5 | 80.0 ± 0.0 | 2 to 3 | 32 |\n"
        "| qt-dog | 62.5 | - | - | - | 1 | 4 |\n\n"
        "- Mean and standard error over seeds; selection: training-domain validation; split 0.\n"
        "- A mean is over all held-out domains, or it is missing.\n"
    )


def test_rows_are_what_differs_within_a_method(tmp_path: Path):
    given = [{"bits": 8}, {"bits": 7}, {"bits": 7, "lr": 0.5}, {"bits": 7, "quantization": {"per_channel": False}}]
    for number, settings in enumerate(given):
        write_run(tmp_path / str(number), {"method": "qt-dog", **settings}, 0.5)
    write_run(tmp_path / "other", {"method": "erm", "lr": 0.1}, 0.5)
    assert [*rows_of(markdown_of(tmp_path))][1:] == [
        *("qt-dog, bits 8", "qt-dog", "qt-dog, lr 0.5", "qt-dog, per_channel False", "erm"),
    ]


def test_runs_are_found_once_in_any_depth_and_in_the_order_of_seeds(tmp_path: Path):
    for seed in (10, 9, 2):
        write_run(tmp_path / f"a/b/seed{seed}", {"method": "erm", "seed": seed}, 0.5)
    found = report_data([tmp_path, tmp_path / "a", tmp_path / "a/b/seed9"])
    assert [run["seed"] for run in found["runs"]] == [2, 9, 10]
    assert found["runs"][0] == {
        **{"row": "erm", "target": "debug1", "seed": 2, "folder": str(tmp_path / "a/b/seed2")},
        "records": [{"update": 1000, "quantized": False, "validation": 0.5, "test": 0.5, "tests": {"debug1": 0.5}}],
        "config": plain(resolve(Config(data="debug", test_domain="debug1", accelerator="cpu", method="erm", seed=2))),
        "measures": {},
    }


def test_domains_held_out_together_have_a_column_each(tmp_path: Path):
    given = {"method": "erm", "test_domain": "debug1,debug2"}
    write_run(tmp_path / "seed0", given, {"debug1": 0.25, "debug2": 0.75}, 0.5)
    assert rows_of(markdown_of(tmp_path))["erm"] == ["25.0", "75.0", "50.0", "50.0", "1", "32"]


def test_ensembles_averages_and_their_files(tmp_path: Path):
    file = {"path": "x", "bytes": 12_345, "test": 0.5, "tests": {"debug1": 0.5}, "agreement": 0.9975}
    write_summary(tmp_path / "one", {"method": "qt-dog"}, 0.51, 1, layers=[], file=file)
    write_run(tmp_path / "one/seed0", {"method": "qt-dog"}, 0.51)
    write_summary(tmp_path / "qt-dog", {"method": "qt-dog"}, 0.75, 3, layers=[], file=file)
    write_summary(tmp_path / "erm", {"method": "erm"}, 0.625, 2)
    average = {"validation": 0.875, "test": 0.5, "tests": {"debug1": 0.5}}
    write_summary(tmp_path / "diwa", {"method": "erm"}, 0.5, 6, kind="DiWA, uniform", average=average)
    assert rows_of(markdown_of(tmp_path)) == {
        "": ["debug1", "validation", "seeds", "networks", "bits", "file, bytes", "int8 engine", "agreement"],
        "DiWA, uniform of 6: erm": ["50.0", "87.5", "-", "6", "32", "-", "-", "-"],
        "ERM ensemble of 2: erm": ["62.5", "-", "-", "2", "32", "-", "-", "-"],
        "qt-dog": ["51.0", "50.0", "1", "-", "7", "12,345", "50.0", "99.75 %"],
        "EoQ of 3: qt-dog": ["75.0", "-", "-", "3", "7", "12,345", "50.0", "99.75 %"],
    }


@pytest.mark.usefixtures("one_thread")
def test_a_true_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = ["--model", "nin", "--model.depth", "1", "--model.width", "1"]
    schedule = ["--updates", "5", "--eval-every", "2", "--quantize-at", "2", "--batch-size", "4"]
    command = ["train", "--data", "debug", "--test-domain", "debug1", "--accelerator", "cpu", *model, *schedule]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    (row,) = found["tables"][0]["rows"]
    ours, validation = row.pop("cells")
    assert (ours["mean"], ours["n"]) == (100 * summary["members"][0]["test"], 1)
    assert validation["mean"] == 100 * summary["members"][0]["validation"]
    file = summary["file"]
    assert row == {
        **{"label": "qt-dog", "seeds": "1", "networks": 1, "bits": "7", "size": file["bytes"]},
        "int8": {"mean": 100 * file["test"], "error": None, "n": 1},
        "agreement": 100 * file["agreement"],
        "file": {"path": str(tmp_path / "out/model.safetensors"), "layers": file["layers"]},
    }
    log = [json.loads(line) for line in (tmp_path / "out/seed0/log.jsonl").read_text().splitlines()]
    assert found["runs"][0]["records"] == log and len(log) == 3
    (shown,) = report_files.timed(found)["files"]
    assert shown["label"] == "qt-dog" and [layer["sqnr_db"] for layer in shown["layers"]]
    nodes = qdeploy.load_int_model(tmp_path / "out/model.safetensors").plan()
    assert [layer["name"] for layer in shown["layers"]] == [node["name"] for node in nodes]
    assert {layer["name"]: layer["sqnr_db"] for layer in shown["layers"]} == {
        layer["name"]: layer["sqnr_db"] for layer in file["layers"]
    }
    assert all(layer["microseconds"] > 0 for layer in shown["layers"])
    assert cli.main(["report", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert all(text in page for text in ("Layers of the files", "signal over error, SQNR in dB", "time, \u00b5s"))


# ---- The tables of the papers ----------------------------------------------------------------------------------------


def test_every_table_has_a_figure_for_each_column():
    for name in tables.names():
        one = tables.table(name)
        assert all(len(row.published) == len(one.columns) for row in one.rows), name
        assert len({row.label for row in one.rows}) == len(one.rows), name
        assert len({column.label for column in one.columns}) == len(one.columns), name


# What the papers print is not what their other figures give (or rounded figures are on the edge).
WRONG = {("qt-dog/1", "ERM"): 0.4, ("qt-dog/7", "QT-DoG"): 0.13, ("qt-dog/11", "ERM"): 0.1}


@pytest.mark.parametrize("name", ["qt-dog/1", "qt-dog/6", "qt-dog/7", "qt-dog/8", "qt-dog/11"])
def test_published_averages_are_those_of_the_other_figures(name: str):
    for row in tables.table(name).rows:
        *others, mean = [figure for figure, _ in row.published]
        if mean is not None:
            assert statistics.fmean(others) == pytest.approx(mean, abs=WRONG.get((name, row.label), 0.076)), row.label


@pytest.mark.parametrize("name", ["gaqat/2", "gaqat/3", "gaqat/4", "gaqat/5", "gaqat/6"])
def test_published_averages_of_pairs(name: str):
    for row in tables.table(name).rows:
        *others, validation, test = [figure for figure, _ in row.published]
        assert statistics.fmean(others[::2]) == pytest.approx(validation, abs=0.1), row.label
        assert statistics.fmean(others[1::2]) == pytest.approx(test, abs=0.1), row.label


def test_published_gaps_are_differences_of_losses():
    for row in tables.table("qgen/1").rows:
        *_, train, test, gap = [figure for figure, _ in row.published]
        assert test - train == pytest.approx(gap, abs=0.0145), row.label


@pytest.mark.parametrize(
    ("name", "row", "column", "expected"),
    [
        ("qt-dog/1", "QT-DoG", "TerraInc", (50.8, 0.2)),
        ("qt-dog/1", "EoQ", "Avg.", (68.4, None)),
        ("qt-dog/3", "QT-DoG", "Camelyon out-dist", (78.4, 2.2)),
        ("qt-dog/4", "INQ", "PACS in-domain", (97.1, 0.2)),
        ("qt-dog/14", "after 80 % (4000)", "PACS", (85.1, 0.3)),
        ("qt-dog/15", "half a step of 7 bits", "PACS", (None, None)),
        ("gaqat/2", "GAQAT 3/3", "Avg.", (57.13, None)),
        ("gaqat/3", "GAQAT 3/3", "Avg. val", (59.81, None)),
        ("qgen/1", "CIFAR-10 NiN Int2", "Gap", (0.224, None)),
        ("qgen/2", "CIFAR-10 NiN (4x10) FP32", "L2 norm", (130.686, None)),
        ("qgen/3", "CIFAR-10 NiN (4x10) FP32", "PAC orig", (2.2, None)),
        ("qgen/5", "CIFAR-100 VGG-19 Int2", "JPEG", (0.427, None)),
    ],
)
def test_published_figures(name: str, row: str, column: str, expected: tuple[float | None, float | None]):
    one = tables.table(name)
    figures = next(found.published for found in one.rows if found.label == row)
    place = [found.label for found in one.columns].index(column)
    assert figures[place] == expected


def test_published_figures_beside_ours(tmp_path: Path):
    write_pacs(tmp_path / "erm", {"method": "erm"}, {target: [0.8, 0.84] for target in PACS})
    write_pacs(tmp_path / "lsq", {"method": "qt-dog"}, {target: [0.875] for target in PACS[:3]})
    found = markdown_of(tmp_path, names=("qt-dog/10", "qt-dog/1"))
    rows = rows_of(found)
    assert rows[""] == ["PACS", "seeds", "bits"]
    assert rows["ERM"] == ["82.0 ± 2.0 (84.7 ± 0.5)", "2", "32"]
    assert rows["QT-DoG (7)"] == ["- (87.8 ± 0.3)", "-", "7"]  # the mean lacks a domain
    assert rows["QT-DoG (2)"] == ["- (82.8 ± 0.2)", "-", "-"]
    assert "| ERM | 82.0 ± 2.0 (84.7 ± 0.5) | (77.4 ± 0.3) | (67.5 ± 0.5) |" in found
    assert "\n- In brackets the published figures: QT-DoG (ICML 2025), table 1.\n" in found


def test_an_average_over_data_sets_needs_all_of_them(tmp_path: Path):
    write_pacs(tmp_path / "erm", {"method": "erm"}, {target: [0.8] for target in PACS})
    (table,) = report_data([tmp_path], ["qt-dog/1"])["tables"]
    cells = dict(zip(table["columns"], table["rows"][0]["cells"], strict=True))
    assert cells["PACS"] == {"mean": 80.0, "error": None, "n": 1, "published": 84.7, "published_error": 0.5}
    assert cells["Avg."] == {"mean": None, "error": None, "n": 0, "published": 63.8, "published_error": None}


def test_runs_of_other_data_have_columns_of_their_own(tmp_path: Path):
    for target, share in {"debug1": 0.25, "debug2": 0.75}.items():
        write_run(tmp_path / target, {"method": "gaqat", "test_domain": target, "selection": "oracle"}, share, 0.5)
    found = markdown_of(tmp_path, names=("gaqat/2",))
    rows = rows_of(found)
    assert rows[""][:5] == ["debug debug1", "debug debug2", "debug mean", "debug validation", "(Art val)"]
    assert rows["GAQAT 4/4"][:6] == ["25.00", "75.00", "50.00", "50.00", "(86.75)", "(49.24)"]
    assert "another rule" not in found


def test_many_rows_that_a_table_does_not_have(tmp_path: Path):
    for number in range(14):
        write_run(tmp_path / f"{number:02}", {"method": "sam", "lr": 0.01 * (1 + number)}, 0.5)
    *_, note = report_data([tmp_path], ["qt-dog/1"])["tables"][0]["notes"]
    assert note.startswith("In no row of this table: sam, lr 0.01; sam, lr 0.02; ")
    assert note.endswith("; sam, lr 0.12 and 2 more.")


def test_another_selection_than_that_of_the_paper_is_said(tmp_path: Path):
    write_run(tmp_path / "a", {"method": "gaqat"}, 0.5)
    write_run(tmp_path / "b", {"method": "sam"}, 0.5)
    notes = report_data([tmp_path], ["gaqat/2"])["tables"][0]["notes"]
    rule = "The published ones were selected by another rule: images of the held-out domains (oracle)."
    assert notes[-2:] == [rule, "In no row of this table: sam."]


@pytest.mark.parametrize(
    ("name", "row", "given"),
    [
        ("qt-dog/1", "QT-DoG", {"method": "qt-dog"}),
        ("qt-dog/1", "CORAL", {"method": "coral"}),
        ("qt-dog/1", None, {"method": "qt-dog", "bits": 6}),
        ("qt-dog/1", None, {"method": "qt-dog", "quantize_at": 100}),
        ("qt-dog/1", None, {"method": "qt-dog", "quantization": {"scope": "bn_head"}}),
        ("qt-dog/1", None, {"method": "erm", "test_domain": "in-domain"}),
        ("qt-dog/9", "QT-DoG (6)", {"method": "qt-dog", "bits": 6}),
        ("qt-dog/12", "SAM", {"method": "sam", "test_domain": "in-domain"}),
        ("qt-dog/12", None, {"method": "sam"}),
        ("qt-dog/13", "By layer", {"method": "qt-dog", "quantization": {"per_channel": False}}),
        ("qt-dog/14", "after 20 % (1000)", {"method": "qt-dog", "updates": 1001, "quantize_at": 200}),
        ("qt-dog/15", "5e-6", {"method": "uniform-noise", "quantization": {"amplitude": 5e-6}}),
        ("qt-dog/15", "half a step of 7 bits", {"method": "uniform-noise"}),
        ("gaqat/2", "LSQ 3/3", {"method": "lsq-4/4", "bits": 3, "activation_bits": 3}),
        ("gaqat/4", "GAQAT reversed", {"method": "gaqat", "step": {"reverse": True}}),
        ("gaqat/5", "K = 400", {"method": "gaqat", "step": {"K": 400}}),
    ],
)
def test_the_row_of_a_run(tmp_path: Path, name: str, row: str | None, given: dict[str, Any]):
    write_run(tmp_path / "seed0", given, {"debug1": 0.5})
    (found,) = report_data([tmp_path], [name])["tables"]
    having = [one["label"] for one in found["rows"] if any(cell and cell["mean"] is not None for cell in one["cells"])]
    assert having == ([] if row is None else [row])


def test_measures_of_runs_in_a_table(tmp_path: Path):
    given = {"data": "cifar10", "domains": "train", "test_domain": "in-domain", "method": "lsq", "bits": 4}
    rows = [("target", "clean", 0.5), ("validation", "clean", 9.0), ("target", "fog", 9.0)]
    gaps = {"version": 1, "train_loss": 0.125, "train_accuracy": 0.96875}
    gaps["table"] = [{"part": part, "kind": kind, "test_loss": loss, "gap": loss - 0.125} for part, kind, loss in rows]
    for number, width in enumerate((1, 2)):  # a pool: the runs of a cell differ in more than their seeds
        model = {"name": "nin", "width": width}
        folder = write_run(tmp_path / str(number), {**given, "model": model}, {"train": 0.5}, images=images(("train",)))
        (folder / "measures").mkdir()
        (folder / "measures/gaps.json").write_text(json.dumps(gaps))
        (folder / "measures/surface.partial.json").write_text("{")
    (table,) = report_data([tmp_path], ["qgen/1"])["tables"]
    cells = next(row["cells"] for row in table["rows"] if row["label"] == "CIFAR-10 NiN Int4")
    assert [cell["mean"] for cell in cells] == [96.875, None, 0.125, 0.5, 0.375]
    assert [cell["n"] for cell in cells] == [2, 0, 2, 2, 2]
    assert cells[4]["published"] == 0.288
    (table,) = report_data([tmp_path / "0"], ["qgen/3"])["tables"]
    assert all(row["cells"][0]["mean"] is None for row in table["rows"])  # of 4x10 and 4x12 networks


def test_a_saturated_search_is_missing(tmp_path: Path):
    given = {"data": "cifar10", "domains": "train", "test_domain": "in-domain", "method": "erm"}
    given["model"] = {"name": "nin", "depth": 4, "width": 10}
    folder = write_run(tmp_path / "seed0", given, {"train": 0.5}, images=images(("train",)))
    (folder / "measures").mkdir()
    found = [("pac-init", "rgm", 2.25, False), ("pac-init", "exact", 9.0, False), ("pac-orig", "rgm", 3.0, True)]
    rows = [dict(zip(("measure", "reading", "value", "saturated"), row, strict=True)) for row in found]
    (folder / "measures/pac-bayes.json").write_text(json.dumps({"version": 1, "table": rows}))
    rows = rows_of(markdown_of(tmp_path, names=("qgen/3",)))
    assert rows[""][:2] == ["PAC init", "(PAC orig)"]
    assert rows["CIFAR-10 NiN (4x10) FP32"][:2] == ["2.250 (2.264)", "(2.200)"]


# ---- What must not be averaged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {"split_seed": 1}, "runs of one table, split_seed=0 as in {a}, got split_seed=1 - at {b}"),
        (
            {},
            {"selection": "oracle"},
            "runs of one table, selection='validation' as in {a}, got selection='oracle' - at {b}",
        ),
        (
            {},
            {"data": "cifar10"},
            "runs of one data set, debug as in {a}, got CIFAR-10: give --table, or report each alone - at {b}",
        ),
        (
            {},
            {"test_domain": "debug1,debug2"},
            "runs of one table, test_domain='debug1' as in {a}, got test_domain='debug1,debug2' - at {b}",
        ),
        ({"seed": 1}, {"seed": 1}, "every run of a row once, debug1 with seed 1 as in {a}, got it twice - at {b}"),
    ],
)
def test_refused(tmp_path: Path, first: dict, second: dict, expected: str):
    a = write_run(tmp_path / "a", {"method": "erm", **first}, {"debug1": 0.5})
    b = write_run(tmp_path / "b", {"method": "erm", "seed": 1, **second}, {"debug1": 0.5})
    with pytest.raises(InputError, match=f"^{re.escape('expected ' + expected.format(a=a, b=b))}$"):
        report_data([tmp_path])


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"model": "resnet18"}, "model='resnet50' as in {a}, got model='resnet18'"),
        ({"image_size": 96}, "image_size=224 as in {a}, got image_size=96"),
        ({"lr": 0.001}, "lr=5e-05 as in {a}, got lr=0.001"),
        ({"updates": 4001}, "updates=5001 as in {a}, got updates=4001"),
    ],
)
def test_refused_in_a_row_of_a_table(tmp_path: Path, second: dict[str, Any], expected: str):
    write_pacs(tmp_path / "a", {"method": "erm"}, {"photo": [0.8]})
    write_pacs(tmp_path / "b", {"method": "erm", **second}, {"sketch": [0.8]})
    a, b = tmp_path / "a/photo/seed0", tmp_path / "b/sketch/seed0"
    line = f"expected runs of one row that differ in their seeds alone, {expected.format(a=a)} - at {b}"
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        report_data([tmp_path], ["qt-dog/1"])


def test_ensembles_of_other_sizes_are_refused(tmp_path: Path):
    for members, target in ((5, "debug1"), (4, "debug2")):
        given = {"method": "qt-dog", "test_domain": target}
        write_summary(tmp_path / target, given, 0.5, members, kind="EoQ", layers=[])
    at = f"5 networks as in {tmp_path}/debug1, got 4 - at {tmp_path}/debug2"
    with pytest.raises(InputError, match=f"^{re.escape(f'expected ensembles of one row of {at}')}$"):
        report_data([tmp_path], ["qt-dog/1"])


def test_other_images_of_one_name_are_refused(tmp_path: Path):
    a = write_run(tmp_path / "a", {"method": "erm"}, 0.5)
    b = write_run(tmp_path / "b", {"method": "sam"}, 0.5, images=images(DEBUG, 61))
    line = f"expected the images of {a}, got images of 61 bytes, which had 60 - at {b}"
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        report_data([tmp_path])


def test_machines_and_places_of_data_may_differ(tmp_path: Path):
    write_run(tmp_path / "a", {"method": "erm"}, 0.5)
    write_run(tmp_path / "b", {"method": "erm", "seed": 1, "devices": 2, "precision": "bf16-mixed"}, 0.75)
    assert rows_of(markdown_of(tmp_path))["erm"][0] == "62.5 ± 12.5"
    for folder, data in (("c", "/one/PACS"), ("d", "/two/PACS")):
        given = {"method": "sam", "data": data, "seed": len(folder), "test_domain": "photo", **MODEL_OF_PACS}
        write_run(tmp_path / "pacs" / folder, {**given, "seed": ord(folder)}, 0.5, images=images(PACS))
    assert rows_of(markdown_of(tmp_path / "pacs"))["sam"][2] == "50.0 ± 0.0"


# ---- Sweeps and what is missing --------------------------------------------------------------------------------------


def write_sweep(folder: Path, runs: list[tuple[Any, ...]], version: int = 1) -> None:
    keys = ("row", "target", "seed", "state", "error")
    entries = [dict(zip(keys, run, strict=False)) for run in runs]
    for entry in entries:
        seed = "" if entry["seed"] is None else f"/seed{entry['seed']}"
        entry["folder"] = f"{entry['row']}/{entry['target']}{seed}"
    rows = [*dict.fromkeys(run[0] for run in runs)]
    (folder / "sweep.json").write_text(json.dumps({"version": version, "rows": rows, "runs": entries}))


def test_a_sweep_has_its_rows_and_what_is_missing(tmp_path: Path):
    for row, given in {"z": {"method": "erm"}, "a": {"method": "qt-dog"}}.items():
        write_run(tmp_path / row / "debug1/seed0", given, 0.5)
    write_summary(tmp_path / "z/debug1", {"method": "erm"}, 0.5, 1)
    write_summary(tmp_path / "ens/debug1", {"method": "erm"}, 0.625, 5, kind="ERM ensemble")
    runs = [("z", "debug1", 0, "done"), ("z", "debug1", None, "done"), ("z", "debug1", 1, "failed", "expected more")]
    runs += [("ens", "debug1", None, "done"), ("a", "debug1", 0, "done"), ("late", "debug1", 0, "waiting")]
    runs += [("late", "debug1", 1, "waiting"), ("late", "debug1", None, "waiting")]
    write_sweep(tmp_path, runs)
    found = markdown_of(tmp_path)
    assert [*rows_of(found).items()][1:] == [
        ("z", ["50.0", "50.0", "1", "-", "32"]),
        ("ens", ["62.5", "-", "-", "5", "32"]),
        ("a", ["50.0", "50.0", "1", "-", "7"]),
        ("late", ["-", "-", "-", "-", "-"]),
    ]
    assert "\n- Missing: z (debug1 seed 1): failed: expected more.\n" in found
    assert "\n- Missing: late (debug1 seed 0, debug1 seed 1): waiting.\n" in found
    assert found.count("Missing") == 2


def test_a_table_takes_the_plainest_row_of_a_sweep(tmp_path: Path):
    """Members of an average have other rates, and the ensemble of a row's own seeds was not asked for."""
    runs = []
    for row, given in {"rate": {"lr": 0.5}, "erm": {}}.items():
        write_run(tmp_path / row / "debug1/seed0", {"method": "erm", **given}, 0.5 if given else 0.75)
        runs.append((row, "debug1", 0, "done"))
    file = {"path": "x", "bytes": 9, "test": 0.125, "tests": {"debug1": 0.125}, "agreement": 1.0}
    write_summary(tmp_path / "erm/debug1", {"method": "erm"}, 0.125, 3, file=file)
    write_summary(tmp_path / "rate/debug1", {"method": "erm", "lr": 0.5}, 0.125, 3)
    write_summary(tmp_path / "of 5/debug1", {"method": "erm"}, 0.625, 5, kind="ERM ensemble")
    write_sweep(tmp_path, [*runs, ("erm", "debug1", None, "done"), ("of 5", "debug1", None, "done")])
    found = markdown_of(tmp_path, names=("qt-dog/1",))
    assert rows_of(found)["ERM"][0] == "75.0" and rows_of(found)["ERM ensemble"][0] == "62.5"
    assert "\n- In no row of this table: rate.\n" in found
    assert [*rows_of(markdown_of(tmp_path))][1:] == ["rate", "erm", "erm: ERM ensemble of 3", "of 5"]


def test_unfinished_runs_are_missing(tmp_path: Path):
    write_run(tmp_path / "seed0", {"method": "erm"}, 0.5)
    for name, log in {"seed1": '{"update": 300}\n{"upd', "seed2": ""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / LOG).write_text(log)
    assert report_data([tmp_path])["tables"][0]["notes"][-2:] == [
        f"Missing: {tmp_path}/seed1: not finished, evaluated after update 300.",
        f"Missing: {tmp_path}/seed2: not finished, no evaluation yet.",
    ]


def test_only_unfinished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / LOG).write_text("")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "No run is finished" in capsys.readouterr().out


# ---- Damaged and newer files -----------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of an error."""
    assert cli.main(["report", *map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err.removeprefix("qdeploy: error: ").rstrip()


def test_folders_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    expected = f"expected runs (--out of `qdeploy train`), got no done.json in the folder - at {tmp_path}"
    assert refused(capsys, tmp_path) == expected
    assert refused(capsys, tmp_path / "x") == f"expected a folder of runs, got none - at {tmp_path / 'x'}"
    assert [*tmp_path.iterdir()] == []


def test_unknown_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = refused(capsys, tmp_path, "--table", "qt-dog/16")
    assert line == f"expected one of {', '.join(tables.names())} or ranking, got 'qt-dog/16' - at --table"


DAMAGED = "expected a file written by a run, got a damaged one: delete it - at {}"
HALF = '{"half": '


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (DONE, HALF),
        (LOG, HALF),
        (LOG, '{"update": 1, "quantized": true, "validation": 2, "test": 0, "tests": {"a": 0}}'),
        ("summary.json", HALF),
        ("summary.json", '{"members": [{}]}'),
        ("../summary.json", '{"config": {}, "members": [{"seed": 0}], "file": {"bytes": 1}}'),
        ("../sweep.json", '{"version": 1, "runs": [{}]}'),
        ("measures/gaps.json", "[]"),
    ],
)
def test_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str):
    path = write_run(tmp_path / "out/seed0", {"method": "erm"}, 0.5) / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    at = path.resolve() if ".." in name else path
    assert refused(capsys, tmp_path / "out") == DAMAGED.format(at)


def test_files_of_a_newer_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_run(tmp_path / "out/seed0", {"method": "erm"}, 0.5)
    write_sweep(tmp_path / "out", [], version=2)
    path = tmp_path / "out/sweep.json"
    newer = "expected a file of version 1, got version 2 of a newer qdeploy - at {}"
    assert refused(capsys, tmp_path / "out") == newer.format(path)
    path.unlink()
    (folder / "measures").mkdir()
    (folder / "measures/gaps.json").write_text('{"version": 2}')
    assert refused(capsys, tmp_path / "out") == newer.format(folder / "measures/gaps.json")
    (folder / "measures/gaps.json").unlink()
    done = json.loads((folder / DONE).read_text())
    done["config"]["new"] = 1
    (folder / DONE).write_text(json.dumps(done))
    expected = "expected the settings of this version, got new=1, which this one has not: train anew with another --out"
    assert refused(capsys, tmp_path / "out") == f"{expected} - at {folder / DONE}"


# ---- The files -------------------------------------------------------------------------------------------------------


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_files_are_the_same_for_the_same_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_pacs(tmp_path / "runs", {"method": "erm"}, {target: [0.8, 0.9] for target in PACS})
    command = ["report", str(tmp_path / "runs"), "--table", "qt-dog/1", "qt-dog/10"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    first = files_in(tmp_path / "runs")
    assert sorted(first) == ["report.csv", "report.md", "report.png", "report.svg"]
    assert printed.startswith(first["report.md"].decode().rstrip())
    assert cli.main([*command, "--out", str(tmp_path / "there/deep")]) == 0
    assert files_in(tmp_path / "there/deep") == first
    assert first["report.png"].startswith(b"\x89PNG") and b"<svg" in first["report.svg"]
    lines = [*csv.DictReader(first["report.csv"].decode().splitlines())]
    assert len(lines) == 10 * 6 + 7
    assert lines[0] == {
        **{"table": "qt-dog/1", "row": "ERM", "column": "PACS", "mean": lines[0]["mean"], "error": lines[0]["error"]},
        **{"n": "2", "published": "84.7", "published_error": "0.5", "networks": "1", "bits": "32", "size": ""},
        "agreement": "",
    }
    assert float(lines[0]["mean"]) == pytest.approx(85) and float(lines[0]["error"]) == pytest.approx(5)
    missing = next(line for line in lines if line["row"] == "DiWA, uniform")
    assert [missing[key] for key in ("mean", "error", "n", "published")] == [""] * 4


def test_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_pacs(tmp_path / "runs", {"method": "erm"}, {target: [0.8, 0.9] for target in PACS})
    page = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "runs"), "--table", "qt-dog/10", "--html", str(page)]) == 0
    assert "Few bits" in page.read_text() and "85.0" in page.read_text()
    capsys.readouterr()
    at = tmp_path / "none/page.html"
    line = refused(capsys, tmp_path / "runs", "--html", at)
    assert line == f"expected a folder to write page.html in, got none - at {at.parent}"


def test_nothing_is_written_unless_all_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path / "runs/seed0", {"method": "erm"}, 0.5)

    def fails(data: dict, kind: str) -> bytes:
        raise OSError("no picture")

    monkeypatch.setattr(report_picture, "draw", fails)
    assert cli.main(["report", str(tmp_path / "runs")]) == 2
    assert files_in(tmp_path / "runs") == {}


def test_what_is_in_the_way_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path / "runs/seed0", {"method": "erm"}, 0.5)
    (tmp_path / "runs/report.svg").mkdir()
    assert "something that is not a regular file" in refused(capsys, tmp_path / "runs")
    assert files_in(tmp_path / "runs") == {}


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path / "runs/seed0", {"method": "erm"}, 0.5)
    monkeypatch.setattr(report_command, "find_spec", lambda name: None)
    assert cli.main(["report", str(tmp_path / "runs")]) == 0
    assert sorted(files_in(tmp_path / "runs")) == ["report.csv", "report.md"]
    assert capsys.readouterr().err == "no picture without matplotlib: pip install 'qdeploy[plots]'\n"


def test_names_of_strangers_stay_in_their_cells(tmp_path: Path):
    write_run(tmp_path / "a|b/seed0", {"method": "erm"}, 0.5)
    write_sweep(tmp_path, [])
    found = markdown_of(tmp_path)
    assert "| a\\|b | 50.0 | 50.0 | 1 | 32 |" in found
