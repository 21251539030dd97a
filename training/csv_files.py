"""Rows of csv files as others publish them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from qdeploy.errors import InputError

LONGEST = 2**24  # characters of a cell


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows by column; a cell that a short row lacks is None. Raises InputError for a column that is not there, and
    for what is no csv file in UTF-8."""
    try:
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise InputError(f"expected a column `{missing[0]}`, got none - at {path}")
            yield from reader
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        got = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"expected a csv file in UTF-8, got {got} - at {path}") from error
