"""WILDS from its csv files, in small: Camelyon17 trains and is judged on hospitals held out; Amazon is read."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from qdeploy import cli
from qdeploy.errors import InputError
from qdeploy.training.config import Config, resolve
from qdeploy.training.domains import load_benchmark
from qdeploy.training.minibatches import split_of
from qdeploy.training.trainer import evaluation_sets
from qdeploy.training.wilds import amazon, user_percentile


@pytest.fixture
def camelyon(tmp_path):
    """Four images a hospital, of each class one with split 0 and one with split 1."""
    root = tmp_path / "camelyon17_v1.0"
    rng = np.random.default_rng(0)
    rows = []
    for center in range(5):
        for i in range(4):
            row = {"patient": f"{center:03}", "node": i % 2, "x_coord": 96 * i, "y_coord": 7, "tumor": i % 2}
            slide = f"patient_{row['patient']}_node_{row['node']}"
            folder = root / "patches" / slide
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (96, 96, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"patch_{slide}_x_{row['x_coord']}_y_7.png")
            rows.append({"": len(rows), **row, "slide": center, "center": center, "split": i // 2})
    write(root / "metadata.csv", rows)
    return root


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)


def test_hospitals_have_the_published_split(camelyon):
    benchmark = load_benchmark(str(camelyon), image_size=96)
    assert benchmark.classes == ["normal", "tumor"]
    assert [domain.name for domain in benchmark.domains] == [f"hospital{i}" for i in range(5)]
    config = resolve(Config(test_domain="hospital1,hospital2", data=str(camelyon), model="resnet18", from_scratch=True))
    parts = {domain.name: [part.tolist() for part in split_of(domain, config)] for domain in benchmark.domains}
    assert parts["hospital0"] == parts["hospital3"] == parts["hospital4"] == [[0, 1], [2, 3]]
    assert parts["hospital1"] == parts["hospital2"] == [[0, 1, 2, 3], []]
    assert benchmark.domains[3].labels.tolist() == [0, 1, 0, 1]
    assert benchmark.domains[3].files[1].path == "patches/patient_003_node_1/patch_patient_003_node_1_x_96_y_7.png"
    sets = evaluation_sets(config, benchmark)
    assert sorted(sets) == ["hospital0_out", "hospital1_in", "hospital2_in", "hospital3_out", "hospital4_out"]


def test_a_run_reports_both_hospitals(camelyon, tmp_path, capsys):
    words = f"--data {camelyon} --model resnet18 --from-scratch --image-size 32 --batch-size 2 --updates 2 --workers 0"
    words += f" --quantize-at 1 --eval-every 1 --test-domain hospital1,hospital2 --out {tmp_path / 'run'}"
    assert cli.main(["train", *words.split()]) == 0
    record = json.loads((tmp_path / "run/seed0/done.json").read_text())["selected"]
    assert sorted(record["tests"]) == ["hospital1", "hospital2"]
    assert "hospital0  " in capsys.readouterr().err


def test_unreadable_images_are_listed_and_left_out(camelyon, tmp_path, capsys):
    bad = "patches/patient_003_node_1/patch_patient_003_node_1_x_96_y_7.png"
    (camelyon / bad).write_bytes(b"x")
    assert cli.main(["data", str(camelyon), "--write-list", str(tmp_path / "bad"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["domains"]["hospital3"] == {"normal": 2, "tumor": 2} and found["images"] == 20
    assert [path for path, _ in found["unreadable"]] == [bad]
    benchmark = load_benchmark(str(camelyon), image_size=96, skip=str(tmp_path / "bad"))
    assert [len(domain.labels) for domain in benchmark.domains] == [4, 4, 4, 3, 4]
    assert [part.tolist() for part in benchmark.domains[3].published] == [[0], [1, 2]]
    assert benchmark.left_out == [(bad, "in bad")]
    (tmp_path / "bad").write_text("patches/none.png\n")
    with pytest.raises(InputError, match="expected paths of images of .*, got 'patches/none.png' - at --skip-unread"):
        load_benchmark(str(camelyon), image_size=96, skip=str(tmp_path / "bad"))


def test_hospitals_without_a_split_are_held_out(camelyon, tmp_path, capsys):
    words = f"--data {camelyon} --model resnet18 --from-scratch --test-domain hospital2 --out {tmp_path / 'run'}"
    assert cli.main(["train", *words.split()]) == 2
    expected = "expected hospital1 held out, which has no images to validate - at --test-domain"
    assert capsys.readouterr().err.splitlines()[-1] == f"qdeploy: error: {expected}"


def test_damaged_metadata_is_an_error(camelyon):
    table = camelyon / "metadata.csv"
    good = table.read_text()
    for damaged, text in [
        (good.replace("tumor", "label", 1), "expected a column `tumor`, got none - at .*metadata.csv"),
        (good.replace(",96,7,", ",95,7,", 1), "expected an image at .*x_95_y_7.png, got No such file.* - at line 3 of"),
        (
            good.rstrip()[:-1] + "7\n",
            "expected a number from 0 to 1, got '7' - at `split` in line 21 of .*metadata.csv",
        ),
        (good.splitlines()[0] + "\n", "expected images, got none - at .*metadata.csv"),
        (good.rstrip()[:-2] + "\n", "expected a number from 0 to 1, got None - at `split` in line 21"),
    ]:
        table.write_text(damaged)
        with pytest.raises(InputError, match=text):
            load_benchmark(str(camelyon), image_size=96)


@pytest.fixture
def reviews(tmp_path):
    root = tmp_path / "amazon_v2.1"
    users = ["ann", "bob", "ann", "eve", "bob"]
    texts = ["good", "bad, and\nlong", "x" * 200_000, 'a "quote"', ""]
    stars = ["5.0", "1.0", "3", "4.0", "2.0"]
    rows = [{"reviewerID": u, "overall": s, "reviewText": t} for u, t, s in zip(users, texts, stars, strict=True)]
    write(root / "reviews.csv", rows)
    write(root / "splits/user.csv", [{"": i, "split": code} for i, code in enumerate([0, 3, 2, -1, 4])])
    return root


def test_reviews_of_the_split_by_users(reviews):
    found = amazon(reviews)
    assert [len(text) for text in found.texts] == [4, 13, 200_000, 0]
    assert found.labels.tolist() == [4, 0, 2, 1] and found.users.tolist() == [0, 1, 0, 1]
    positions = {name: part.tolist() for name, part in found.splits.items()}
    assert positions == {"train": [0], "val": [], "id_val": [2], "test": [1], "id_test": [3]}


def test_reviews_and_split_of_different_lengths_are_an_error(reviews):
    lines = (reviews / "splits/user.csv").read_text().splitlines(keepends=True)
    (reviews / "splits/user.csv").write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match=r"expected a line for every review, got 4 - at .*user.csv"):
        amazon(reviews)


def test_percentile_of_users():
    users = np.repeat(np.arange(11) * 7, 10)
    right = np.concatenate([np.arange(10) < i for i in range(11)])  # accuracies 0, 0.1 ... 1
    assert user_percentile(right, users) == pytest.approx(0.1)
    assert user_percentile(right, users, 50) == pytest.approx(0.5)
    assert user_percentile(np.array([True, False, True]), np.array([5, 5, 9]), 0) == 0.5
