"""Texts with their classes as files hold them: a folder of csv files, one a domain, or Amazon's reviews of WILDS. Needs
no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdeploy.errors import InputError
from qdeploy.training import wilds
from qdeploy.training.csv_files import csv_rows

COLUMNS = ("text", "label")


@dataclass(frozen=True)
class TextFile:
    """The texts of a domain and their classes [N]; `users` [N], who wrote them, where the result is one by users;
    `published` as of a domain."""

    texts: Sequence[str]
    labels: np.ndarray
    files: Sequence[tuple[str, int]]  # names and bytes
    users: np.ndarray | None = None
    published: tuple[np.ndarray, np.ndarray] | None = None


def holds_texts(root: Path) -> bool:
    """Whether a folder is Amazon's, or has csv files and no folders beside them, as one of images has."""
    if wilds.is_amazon(root):
        return True
    if not root.is_dir():
        return False
    return bool(_csv_files(root)) and not any(path.is_dir() for path in root.iterdir() if path.name[0] not in "._")


def read_texts(root: Path) -> tuple[list[str], dict[str, TextFile]]:
    """Classes, sorted, and domains by name, sorted. Raises InputError for a file of another form."""
    if wilds.is_amazon(root):
        return wilds.STARS, _amazon(root)
    found = {path.stem: _labelled(path) for path in _csv_files(root)}
    classes = sorted({label for _, labels in found.values() for label in labels})
    number = {name: place for place, name in enumerate(classes)}
    domains = {}
    for path in _csv_files(root):
        texts, labels = found[path.stem]
        codes = np.array([number[label] for label in labels], np.int64)
        domains[path.stem] = TextFile(texts, codes, [(path.name, path.stat().st_size)])
    return classes, domains


def _csv_files(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*.csv") if path.name[0] not in "._")


def _labelled(path: Path) -> tuple[list[str], list[str]]:
    texts, labels = [], []
    for number, row in enumerate(csv_rows(path, COLUMNS)):
        for column in COLUMNS:
            if not (row[column] or "").strip():
                raise InputError(f"expected a {column}, got none - at row {number + 1} of {path}")
        texts.append(row["text"])
        labels.append(row["label"])
    return texts, labels


def _amazon(root: Path) -> dict[str, TextFile]:
    """The splits: `train` validates on "id_val", reviews of the same users; the others are there to be held out."""
    reviews = wilds.amazon(root)
    parts = {**reviews.splits, "train": np.concatenate([reviews.splits["train"], reviews.splits["id_val"]])}
    own = len(reviews.splits["train"])
    del parts["id_val"]
    files = [(name, (root / name).stat().st_size) for name in ("reviews.csv", "splits/user.csv")]
    domains = {}
    for name in sorted(parts):
        part, training = parts[name], own if name == "train" else len(parts[name])
        published = np.arange(training), np.arange(training, len(part))
        texts = [reviews.texts[i] for i in part]
        if len(part):
            domains[name] = TextFile(texts, reviews.labels[part], files, reviews.users[part], published)
    return domains
