"""Domains of texts: token ids in memory, made once by the tokenizer that the publisher of the network ships."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdeploy.errors import InputError, one_line
from qdeploy.terminal import note, progress
from qdeploy.training.text_files import TextFile

AT_ONCE = 1024  # texts that the tokenizer gets: its threads share them


@dataclass(frozen=True)
class TextDomain:
    """One domain: the ids of all texts, one after the other, and where each text begins; its classes [N].

    `environment` and `published` are as of `FolderDomain`. `users` [N]: who wrote each, where the result is by users.
    """

    name: str
    environment: int
    ids: np.ndarray  # i32
    starts: np.ndarray  # i64 [N + 1]
    labels: np.ndarray
    longest: int
    sources: Sequence[tuple[str, int]]  # files, and their bytes
    users: np.ndarray | None = None
    published: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def files(self) -> Sequence[tuple[str, int]]:
        """What stands for them in a fingerprint: another tokenizer makes other texts of the same files."""
        made = hashlib.sha256(self.ids.tobytes() + self.starts.tobytes()).hexdigest()
        return [*self.sources, (f"token ids {made[:16]}", self.ids.nbytes)]

    def batch(
        self, positions: np.ndarray, augment: tuple[int, int, int] | None = None, places: Iterable[int] | None = None
    ) -> Tensor:
        """The texts at `positions`, i32 [n, longest], -1 beyond their ends; texts are not augmented."""
        found = np.full((len(positions), self.longest), -1, np.int32)
        for row, position in zip(found, positions, strict=True):
            own = self.ids[self.starts[position] : self.starts[position + 1]]
            row[: len(own)] = own
        return torch.from_numpy(found)


def load_tokenizer(name: str) -> Any:
    """A tokenizer of transformers, from a folder or by its name. Raises InputError."""
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # there are many
        expected = "a tokenizer of transformers, a folder or a name"
        raise InputError(f"expected {expected}, got {one_line(error)[:200]} - at --tokenizer {name}") from error


def encoded(name: str, environment: int, file: TextFile, tokenizer: Any, longest: int) -> TextDomain:
    """The domain `name`; texts are cut to `longest` tokens. Raises InputError for a text of no tokens."""
    rows: list[np.ndarray] = []
    note(f"{name}: {len(file.texts):,} texts become token ids")
    with progress(f"token ids of {name}", len(file.texts)) as advance:
        for first in range(0, len(file.texts), AT_ONCE):
            some = [*file.texts[first : first + AT_ONCE]]
            made = tokenizer(some, truncation=True, max_length=longest)["input_ids"]
            rows += [np.array(ids, np.int32) for ids in made]
            advance(None, len(some))
    lengths = [len(row) for row in rows]
    if lengths and not min(lengths):
        number = lengths.index(0)
        got = f"none of {file.texts[number][:40]!r}"
        raise InputError(f"expected a token or more of every text, got {got} - at text {number + 1} of `{name}`")
    ids = np.concatenate([*rows, np.zeros(0, np.int32)])
    starts = np.cumsum([0, *lengths])
    return TextDomain(name, environment, ids, starts, file.labels, longest, file.files, file.users, file.published)
