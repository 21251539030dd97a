"""Typed checks of what a graph holds; each raises ModelError in the form of all errors: expected X, got Y - at Z."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from qdeploy.errors import ModelError

MAX_NAME_BYTES = 512


def expect(condition: bool, expected: str, got: object, at: str) -> None:
    """Raise ModelError unless `condition` holds."""
    if not condition:
        text = repr(got)
        raise ModelError(f"expected {expected}, got {text if len(text) <= 100 else text[:97] + '...'} - at {at}")


def check_name(name: Any, at: str) -> None:
    """Names reach terminals and other tools: 1 to 512 bytes of UTF-8 without control characters."""
    valid = isinstance(name, str) and not any(c < " " or c == "\x7f" or "\ud800" <= c <= "\udfff" for c in name)
    valid = valid and 1 <= len(name.encode()) <= MAX_NAME_BYTES
    expect(valid, f"a name of 1 to {MAX_NAME_BYTES} bytes of UTF-8 without control characters", name, at)


def unique_names(names: list[str], at: str) -> None:
    """Valid names, none of them twice."""
    for name in names:
        check_name(name, at)
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        expect(False, "unique names", twice, at)


def integers(value: Any, count: int, low: int, high: int, what: str, at: str) -> list[int]:
    """`count` integers of [low, high]; bool and float are not integers here."""
    try:
        values = [operator.index(v) for v in value if not isinstance(v, (bool, np.bool_))]
    except TypeError:
        values = []
    expected = f"{what} of {count} integers in {low}..{high}"
    expect(len(values) == count == len(value if values else ()), expected, value, at)
    expect(all(low <= v <= high for v in values), expected, value, at)
    return values


def f32(value: Any, what: str, at: str) -> float:
    """A finite f32, as a Python float."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    with np.errstate(over="ignore"):
        result = float(np.float32(value)) if number and abs(value) < 2.0**128 else math.nan
    expect(math.isfinite(result), f"{what} to be a finite f32 number", value, at)
    return result


def array(value: Any, what: str, dtype: type, ndim: int, at: str) -> np.ndarray:
    """An array of this dtype and rank; floats are finite."""
    expect(isinstance(value, np.ndarray), f"constant '{what}'", type(value).__name__, at)
    got = (value.dtype.name, value.ndim)
    expect(got == (np.dtype(dtype).name, ndim), f"constant '{what}' of {np.dtype(dtype).name}, rank {ndim}", got, at)
    if dtype is np.float32:
        expect(bool(np.isfinite(value).all()), f"finite constant '{what}'", "NaN or infinity", at)
    return value
