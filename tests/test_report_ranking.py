"""`qdeploy report --table ranking`: how measures rank a pool of runs by their generalization gap."""

from __future__ import annotations

import csv
import json
from itertools import product
from pathlib import Path

import pytest
from test_report import write_run

from qdeploy import cli, page
from qdeploy.errors import InputError
from qdeploy.training.report import report_data
from qdeploy.training.report_text import markdown

MODELS = {width: {"model": {"name": "nin", "depth": 1, "width": width}} for width in (1, 2)}
RATES = {"sgd": 0.1, "adam": 0.001}  # one follows from the other
PRECISIONS = {None: {"method": "erm"}, 4: {"method": "lsq", "bits": 4, "quantize_at": 0}}


def write_measures(folder: Path, **measures: dict) -> None:
    (folder / "measures").mkdir()
    for name, content in measures.items():
        (folder / f"measures/{name.replace('_', '-')}.json").write_text(json.dumps({"version": 1, **content}))


def bound(name: str, value: float | None, saturated: bool = False) -> dict:
    return {"measure": name, "reading": "exact", "value": value, "saturated": saturated}


@pytest.fixture
def pool(tmp_path) -> Path:
    """16 runs, whose gap follows the width, then the bits, then the seed. So does pac-init; pac-orig the width, the
    other way round; of pac-mag-init two searches were saturated and one value is no number."""
    runs = [*product(MODELS, RATES, PRECISIONS, (0, 1))]
    for place, (width, optimizer, bits, seed) in enumerate(runs):
        given = {**MODELS[width], "optimizer": optimizer, "lr": RATES[optimizer], **PRECISIONS[bits], "seed": seed}
        folder = write_run(tmp_path / f"run{place}", given, 0.5)
        gap = 0.4 * width - 0.04 * (bits or 8) / 4 + 0.004 * seed
        clean = {"part": "target", "kind": "clean", "test_loss": 1 + gap, "gap": gap}
        other = {"part": "validation", "kind": "clean", "test_loss": 9, "gap": 8}
        rows = [bound("pac-init", 2 * gap + 3), bound("pac-orig", -width)]
        rows.append(bound("pac-mag-init", None if place == 2 else gap, saturated=place < 2))
        found = {"gaps": {"train_loss": 1.0, "table": [other, clean]}, "pac_bayes": {"distance": 7.0, "table": rows}}
        write_measures(folder, **found)
    return tmp_path


def test_measures_rank_a_pool(pool):
    ranking, gaps = report_data([pool], ["ranking"])["tables"]
    assert ranking["name"] == "ranking" and gaps["name"] == "ranking/gaps"
    assert ranking["title"] == "How measures rank 16 networks by their generalization gap"
    assert ranking["columns"] == ["tau_b", "Psi", "quantization", "optimizer", "model.width"]
    rows = {row["label"]: row for row in ranking["rows"]}
    assert [*rows] == [
        "pac-init, exact",
        "pac-orig, exact",
        "pac-mag-init, exact",
        "distance from the initial weights",
    ]
    means = {label: [cell and cell["mean"] for cell in row["cells"]] for label, row in rows.items()}
    counts = {label: [cell and cell["n"] for cell in row["cells"]] for label, row in rows.items()}
    assert means["pac-init, exact"] == [1, 1, 1, None, 1]  # the optimizer changes neither
    assert counts["pac-init, exact"] == [16, 2, 8, None, 8]
    # of 120 pairs 56 tie in the width; 8 groups of a pair each, in the gap of no bits
    assert means["pac-orig, exact"][0] == pytest.approx(-64 / (64 * 112) ** 0.5)
    assert means["pac-orig, exact"][1:] == [-1, None, None, -1] and counts["pac-orig, exact"][4] == 8
    assert counts["pac-mag-init, exact"] == [13, 2, 6, None, 5] and rows["pac-mag-init, exact"]["networks"] == 13
    assert means["distance from the initial weights"] == [None] * 5  # the same for all
    assert ranking["notes"][2:] == [
        "Without a column, as they follow from the others: bits, quantize_at, lr_step_size, lr.",
        "Left out, the search was saturated: 2 of pac-mag-init, exact.",
        "Left out, no number: 1 of pac-mag-init, exact.",
    ]


def test_both_losses_stand_beside_the_gap(pool):
    gaps = report_data([pool], ["ranking"])["tables"][1]
    assert gaps["columns"] == ["gap", "training loss", "test loss"]
    found = {row["label"]: [cell["mean"] for cell in row["cells"]] for row in gaps["rows"]}
    assert len(found) == 8
    assert sorted(found.values())[0] == pytest.approx([0.4 - 0.08 + 0.002, 1, 1 + 0.4 - 0.08 + 0.002])
    assert {row["cells"][0]["n"] for row in gaps["rows"]} == {2}


def test_files_and_page_have_the_count_of_groups(pool, capsys):
    assert cli.main(["report", str(pool), "--table", "ranking", "--html", str(pool / "page.html")]) == 0
    lines = (pool / "report.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| pac-init, exact")]
    assert line == "| pac-init, exact | 1.000 | 1.000 | 1.000, n 8 | - | 1.000, n 8 | 16 |"
    with (pool / "report.csv").open() as file:
        found = {(row["row"], row["column"]): row for row in csv.DictReader(file) if row["table"] == "ranking"}
    assert found["pac-mag-init, exact", "quantization"]["n"] == "6"
    assert found["pac-init, exact", "optimizer"]["mean"] == ""
    shown = (pool / "page.html").read_text()
    assert "How measures rank 16 networks" in shown and ">n 8</span>" in shown
    assert capsys.readouterr().out.startswith("# Runs in ")


def test_runs_without_a_gap_or_a_measure_are_said(pool, capsys):
    write_run(pool / "bare", {"method": "erm", "seed": 7}, 0.5)
    (pool / "run3/measures/pac-bayes.json").unlink()
    tables = report_data([pool], ["ranking"])["tables"]
    assert tables[0]["title"].startswith("How measures rank 16 networks")
    assert any(note.startswith("Left out, not measured: 1 of pac-init, exact; ") for note in tables[0]["notes"])
    assert "1 of 17 runs have no gap and are left out." in tables[0]["notes"]


def test_what_is_no_pool_is_refused(tmp_path):
    for seed in (0, 1):
        folder = write_run(tmp_path / f"seed{seed}", {"method": "erm", "seed": seed}, 0.5)
        message = "expected two runs or more with a gap .`qdeploy measure DIR --what gaps`., got 0 - at --table ranking"
        with pytest.raises(InputError, match=message):
            report_data([tmp_path], ["ranking"])
    for seed in (0, 1):
        clean = {"part": "target", "kind": "clean", "test_loss": 1.5, "gap": 0.5}
        write_measures(tmp_path / f"seed{seed}", gaps={"train_loss": 1.0, "table": [clean]})
    message = "expected runs that are measured .`qdeploy measure DIR --what pac-bayes,sharpness`., got none"
    with pytest.raises(InputError, match=message):
        report_data([tmp_path], ["ranking"])
    (folder / "measures/norms.json").write_text(json.dumps({"version": 1, "norm_folded": 3.0, "table": []}))
    ranking = report_data([tmp_path], ["ranking"])["tables"][0]
    assert ranking["columns"] == ["tau_b", "Psi"]
    assert "The networks differ in no setting, so that there is no Psi." in ranking["notes"]


def test_a_page_of_a_ranking_can_be_made_of_json(pool):
    data = json.loads(json.dumps(report_data([pool], ["ranking"])))
    assert "ranking: How measures rank 16 networks" in page.of_report(data)
    assert "## ranking/gaps: The gaps" in markdown(data)
