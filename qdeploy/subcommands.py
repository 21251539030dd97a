"""What the subcommands share: the types of their options, the packages they need, the files they write."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from qdeploy.arguments import integer
from qdeploy.errors import InputError
from qdeploy.files import atomic_file, check_regular

Report = dict
TRAIN = ("train", "torch", "lightning_fabric", "rich", "PIL", "pydantic", "yaml")  # the extra, and what it brings
MAX_BATCH = 2**31 - 1


def integer_of(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None


def list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Takes numbers with commas between."""

    def parse(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers with commas between, got {text!r}") from None

    return parse


def between(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            return integer(integer_of(text), least, most, "")
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error).removesuffix(" - at ")) from None

    return parse


at_most_a_batch = between(1, MAX_BATCH)


def require(extra: str, *modules: str) -> None:
    for module in modules:
        try:
            import_module(module)
        except ImportError:
            fix = f"pip install 'qdeploy[{extra}]'"
            raise InputError(f"expected the package {module} ({fix}), got none - at this Python environment") from None


def check_output(path: Path | None) -> None:
    """Raise OSError or InputError for a file that cannot be written, before anything is computed."""
    if path is not None:
        if not path.parent.is_dir():
            raise InputError(f"expected a folder to write {path.name} in, got none - at {path.parent}")
        check_regular(path)


def write_page(path: Path | None, page: Callable[[], str]) -> None:
    if path is not None:
        with atomic_file(path) as file:
            file.write(page().encode())
