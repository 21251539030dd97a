"""Two sets of WILDS (Koh et al., ICML 2021) from the csv files that they unpack to; no package of WILDS is needed.

camelyon17_v1.0/metadata.csv and patches/: tissue from five hospitals, with or without a tumor. Hospitals 0, 3 and 4
have a published split: their rows with split 0 train, those with split 1 validate ("id_val"). Hospital 2 is the test
of another distribution ("test"), hospital 1 its validation.

amazon_v2.1/reviews.csv and splits/user.csv: reviews of one to five stars. The result is the accuracy of the user at the
10th percentile.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qdeploy.errors import InputError
from qdeploy.training.csv_files import csv_rows
from qdeploy.training.image_tree import ImageFile, Tree

CLASSES = ["normal", "tumor"]
STARS = ["1", "2", "3", "4", "5"]
PUBLISHED = (0, 3, 4)  # hospitals with a split of their own
COLUMNS = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
SPLITS = {0: "train", 1: "val", 2: "id_val", 3: "test", 4: "id_test"}  # of Amazon; -1: left out


class Hospital(NamedTuple):
    """Images, their classes, and the positions of those that train and those that validate: all and none of a hospital
    without a published split."""

    files: list[ImageFile]
    labels: np.ndarray
    training: np.ndarray
    validation: np.ndarray


def is_camelyon17(root: Path) -> bool:
    return (root / "metadata.csv").is_file() and (root / "patches").is_dir()


def camelyon17(root: Path, skip: Collection[str] = ()) -> dict[int, Hospital]:
    """The hospitals by number, without the images in `skip`, which are paths below the root.

    Raises InputError for a csv file of another kind, an image that is not there, and a path in `skip` that is none.
    """
    missing = {*skip}
    files: dict[int, list[ImageFile]] = {}
    labels: dict[int, list[int]] = {}
    splits: dict[int, list[int]] = {}
    for number, row in enumerate(csv_rows(root / "metadata.csv", COLUMNS)):
        where = f"line {number + 2} of {root / 'metadata.csv'}"
        center, label, split = (_integer(row[key], most, f"`{key}` in {where}") for key, most in _MOST.items())
        slide = f"patient_{row['patient']}_node_{row['node']}"
        path = f"patches/{slide}/patch_{slide}_x_{row['x_coord']}_y_{row['y_coord']}.png"
        if path in missing:
            missing.discard(path)
            continue
        try:
            size = (root / path).stat().st_size
        except OSError as error:
            raise InputError(f"expected an image at {root / path}, got {error.strerror} - at {where}") from error
        files.setdefault(center, []).append(ImageFile(path, size))
        labels.setdefault(center, []).append(label)
        splits.setdefault(center, []).append(split if center in PUBLISHED else 0)
    if missing:
        raise InputError(f"expected paths of images of {root}, got {sorted(missing)[0][:80]!r} - at --skip-unreadable")
    if not files:
        raise InputError(f"expected images, got none - at {root / 'metadata.csv'}")
    return {
        center: Hospital(
            files[center],
            np.array(labels[center]),
            np.flatnonzero(np.array(splits[center]) == 0),
            np.flatnonzero(np.array(splits[center]) == 1),
        )
        for center in sorted(files)
    }


def camelyon17_tree(root: Path) -> Tree:
    """The hospitals as `qdeploy data` lists a tree."""
    tree = Tree()
    for number, hospital in camelyon17(root).items():
        of_classes: dict[str, list[ImageFile]] = {name: [] for name in CLASSES}
        for file, label in zip(hospital.files, hospital.labels, strict=True):
            of_classes[CLASSES[label]].append(file)
        tree.domains[name_of(number)] = {name: files for name, files in of_classes.items() if files}
    return tree


def name_of(hospital: int) -> str:
    """Of the domain."""
    return f"hospital{hospital}"


_MOST = {"center": 4, "tumor": 1, "split": 1}


def is_amazon(root: Path) -> bool:
    return (root / "reviews.csv").is_file() and (root / "splits" / "user.csv").is_file()


@dataclass(frozen=True)
class Reviews:
    """Texts, their stars less one (0 to 4), the user who wrote each, and the positions of each split by name."""

    texts: Sequence[str]
    labels: np.ndarray
    users: np.ndarray
    splits: dict[str, np.ndarray]


def amazon(root: Path) -> Reviews:
    """The reviews of the split by users; those that it leaves out are not kept. Raises InputError for other files."""
    texts, labels, users, splits = [], [], [], []
    split_file = root / "splits" / "user.csv"
    parts = csv_rows(split_file, ("split",))
    numbers: dict[str, int] = {}
    for number, row in enumerate(csv_rows(root / "reviews.csv", ("reviewerID", "overall", "reviewText"))):
        where = f"line {number + 2}"
        if (part := next(parts, None)) is None:
            raise InputError(f"expected a line for every review, got {number} - at {split_file}")
        if part["split"] == "-1":
            continue
        splits.append(_integer(part["split"], 4, f"`split` in {where} of {split_file}"))
        stars = _integer(row["overall"].removesuffix(".0"), 5, f"`overall` of review {number} in {root}")
        texts.append(row["reviewText"])
        labels.append(stars - 1)
        users.append(numbers.setdefault(row["reviewerID"], len(numbers)))
    which = np.array(splits)
    positions = {name: np.flatnonzero(which == code) for code, name in SPLITS.items()}
    return Reviews(texts, np.array(labels), np.array(users), positions)


def user_percentile(right: np.ndarray, users: np.ndarray, percentile: float = 10) -> float:
    """The accuracy at that percentile of the users, each with all of their reviews.

    Args:
        right: bool [N], whether a review was classified rightly.
        users: int [N], who wrote it.
    """
    _, place = np.unique(users, return_inverse=True)
    accuracies = np.bincount(place, weights=right) / np.bincount(place)
    return float(np.percentile(accuracies, percentile))


def _integer(text: str | None, most: int, at: str) -> int:
    if text is None or not text.isascii() or not text.isdigit() or int(text) > most:
        raise InputError(f"expected a number from 0 to {most}, got {text!r} - at {at}")
    return int(text)
