"""Files that are there as a whole or not at all, and the folder for what can be made again."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """Where qdeploy keeps downloads and tuned tiles: $XDG_CACHE_HOME/qdeploy, else ~/.cache/qdeploy."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdeploy"


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file written beside `path` and renamed to it at the end: whenever this process dies, there is the old
    file or the new one. A link is followed.

    Raises OSError for what cannot be written and for a path that is something else than a file.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise OSError("something that is not a regular file")
    temporary = os.path.join(os.path.dirname(target), f".qdeploy-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
