"""Typed checks of what a graph or a file holds; each raises ModelError "expected X, got Y - at Z".

The C++ reader (csrc/json.h) has the same checks with the same words: tests/test_hostile_files.py compares the texts.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from qdeploy.errors import ModelError

MAX_NAME_BYTES = 512
_PRINTABLE = bytes(c if 32 <= c <= 126 and c != ord("`") else ord("?") for c in range(256))  # of every byte
_UNFIT = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")  # for a name: control characters and halves of pairs
_KINDS: list[tuple[Any, str]] = [
    (type(None), "null"),
    ((bool, np.bool_), "boolean"),
    ((int, float, np.integer, np.floating), "number"),
    (str, "string"),
    ((list, tuple), "array"),
    (dict, "object"),
]
_FILE_DTYPES = {"float32": "F32", "uint8": "U8", "int8": "I8", "int32": "I32"}  # as safetensors calls them


class Facts:
    """What is known of a file: its version, its vocabulary where it reads text, and what was computed of arrays.

    The next node that shares an array finds that again: a file may name one tensor 65,536 times.
    """

    def __init__(self, version: int, vocabulary: int | None = None) -> None:
        self.version = version
        self.vocabulary = vocabulary
        self._known: dict[tuple[Any, ...], tuple[Any, tuple[np.ndarray, ...]]] = {}

    def of(self, compute: Callable[..., Any], *arrays: np.ndarray) -> Any:
        """`compute(*arrays)`, once. Arrays are the same where they are one object; it is kept, and with it its id."""
        key = (compute, *map(id, arrays))
        if key not in self._known:
            self._known[key] = compute(*arrays), arrays
        return self._known[key][0]


def expect(condition: bool, expected: str, got: object, at: str) -> None:
    """Raise ModelError unless `condition` holds."""
    if not condition:
        raise ModelError(f"expected {expected}, got {got} - at {at}")


def key_of(key: str, at: str) -> str:
    """The place of a key of the object at `at`."""
    return f"key {quoted(key)} of {at}"


def quoted(name: str) -> str:
    """At most 60 printable characters of a name out of a file, for error texts."""
    data = name.encode("utf-8", "surrogatepass")
    text = data[:60].translate(_PRINTABLE).decode()
    return f"`{text}...`" if len(data) > 60 else f"`{text}`"


def shape_text(shape: Sequence[int]) -> str:
    """[64, 3, 7, 7]; -1 is any size."""
    return f"[{', '.join('any' if d == -1 else str(d) for d in shape)}]"


def alternatives(texts: Sequence[str]) -> str:
    """a, b or c."""
    return " or ".join([text for text in (", ".join(texts[:-1]), texts[-1]) if text])


def kind(value: object) -> str:
    """The type of a value as JSON calls it."""
    return next((name for types, name in _KINDS if isinstance(value, types)), type(value).__name__)


def check_name(value: Any, at: str) -> None:
    """Names reach terminals and other tools: 1 to 512 bytes of UTF-8 without control characters."""
    expect(isinstance(value, str), "a string", kind(value), at)
    valid = not _UNFIT.search(value) and 1 <= len(value.encode()) <= MAX_NAME_BYTES
    expect(valid, "a name of 1 to 512 bytes without control characters", quoted(value), at)


def check_keys(found: Iterable[str], known: Sequence[str], at: str) -> None:
    """Exactly the known keys: nothing that a reader does not understand is passed over."""
    found = sorted(found)
    for key in found:
        expect(key in known, "no keys but the known ones", quoted(key), at)
    for key in sorted(known):
        expect(key in found, f"the key `{key}`", "none", at)


def integer(value: Any, low: int, high: int, at: str) -> int:
    """An integer of [low, high]; bool and float are none, nor is what no 64 bits hold."""
    expected = f"an integer in [{low}, {high}]"
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    expect(whole and -(2**63) <= int(value) < 2**64, expected, kind(value), at)
    result = operator.index(value)
    expect(low <= result <= high, expected, result, at)
    return result


def integers(value: Any, fewest: int, most: int, low: int, high: int, at: str) -> list[int]:
    """`fewest` to `most` integers of [low, high]."""
    return [integer(v, low, high, at) for v in _entries(value, fewest, most, at)]


def number(value: Any, at: str) -> float:
    """A finite f32, as a Python float."""
    expect(kind(value) == "number", "a number", kind(value), at)
    try:
        double = float(value)
    except OverflowError:  # of an integer
        double = math.inf
    with np.errstate(over="ignore"):
        result = float(np.float32(double))
    expect(math.isfinite(result), "a finite f32", f"{double:.3g}", at)
    return result


def numbers(value: Any, count: int, at: str) -> list[float]:
    """`count` finite f32."""
    values = _entries(value, 0, count, at)
    expect(len(values) == count, f"{count} numbers", len(values), at)
    return [number(v, at) for v in values]


def array(value: Any, dtype: type, shape: Sequence[int], at: str) -> np.ndarray:
    """An array of this dtype and shape, in which -1 is any size."""
    expected = f"{_FILE_DTYPES[np.dtype(dtype).name]} {shape_text(shape)}"
    is_array = isinstance(value, np.ndarray)
    got = f"{_FILE_DTYPES.get(value.dtype.name, value.dtype)} {shape_text(value.shape)}" if is_array else kind(value)
    fits = is_array and value.dtype.name == np.dtype(dtype).name and value.ndim == len(shape)
    fits = fits and all(wanted in (-1, size) for wanted, size in zip(shape, value.shape, strict=True))
    expect(fits, expected, got, at)
    return value


def finite(value: np.ndarray, facts: Facts, at: str) -> None:
    if not facts.of(_is_finite, value):
        wrong = value[~np.isfinite(value)][0]
        expect(False, "finite constants", f"{wrong:.3g}", at)


def _is_finite(value: np.ndarray) -> bool:
    return bool(np.isfinite(value).all())


def _entries(value: Any, fewest: int, most: int, at: str) -> Sequence[Any]:
    expect(isinstance(value, (list, tuple)), "an array", kind(value), at)
    expect(len(value) <= most, f"at most {most} entries", len(value), at)
    expect(len(value) >= fewest, f"at least {fewest} entries", len(value), at)
    return value
