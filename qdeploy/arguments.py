"""Checks of what a caller gives. Each raises InputError: "expected X, got Y - at Z"."""

from __future__ import annotations

import operator
import os

import numpy as np

from qdeploy.errors import InputError, ModelError
from qdeploy.files import AnyPath


def integer(value: object, least: int, most: int, at: str) -> int:
    """An int, or a number of numpy that is one, in [least, most]; True and 1.0 are none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # the answer is a TypeError
    except TypeError:
        raise InputError(f"expected an integer, got {value!r} - at {at}") from None
    if number < least:
        raise InputError(f"expected at least {least}, got {number} - at {at}")
    if number > most:
        raise InputError(f"expected at most {most}, got {number} - at {at}")
    return number


def checked_bits(bits: object, at: str) -> int:
    """`bits` as an int: 2 to 8, an integer of Python or numpy; raises InputError for anything else."""
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or not 2 <= bits <= 8:
        raise InputError(f"expected 2 to 8 bits, got {bits!r} - at {at}")
    return int(bits)


def path_text(path: AnyPath, at: str = "path") -> str:
    """A path as text; bytes that are no UTF-8 become what `os.fsencode` turns back into them.

    Raises InputError for what is no path, ModelError for one that no file can have.
    """
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise InputError(f"expected a path, got {type(path).__name__} - at {at}")
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise ModelError(f"expected a path, got {'one with a byte 0' if text else 'an empty one'} - at {at}")
    return text
