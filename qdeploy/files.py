"""Files that are there as a whole or not at all, and the folder for what can be made again."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from qdeploy.errors import InputError

TEMPORARY = ".qdeploy-{}.tmp"  # what `atomic_file` writes, and leaves where its process is killed
AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def cache_folder() -> Path:
    """Where qdeploy keeps downloads and tuned tiles: $XDG_CACHE_HOME/qdeploy, else ~/.cache/qdeploy."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdeploy"
    except RuntimeError:
        raise InputError("expected a home folder or XDG_CACHE_HOME, got neither - at the cache") from None


@contextmanager
def named_errors(path: AnyPath) -> Iterator[None]:
    """Every OSError that leaves names `path`: those of writing and closing name no file, others a temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), os.fsdecode(path)) from error


def check_regular(path: AnyPath) -> None:
    """Raise OSError for a path that no file can have: what is there is a folder, a device or a pipe; it is too long."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "something that is not a regular file", os.fsdecode(path))


@contextmanager
def atomic_file(path: AnyPath) -> Iterator[BinaryIO]:
    """A binary file written beside `path` and renamed to it at the end: whenever this process dies, there is the old
    file or the new one. A link is followed.

    Raises OSError, naming `path`, for what cannot be written and for a path that is something else than a file.
    """
    with named_errors(path), _renamed_at_the_end(os.fsdecode(path)) as file:
        yield file


def append(path: AnyPath, content: bytes) -> None:
    """Adds `content` to a file, or makes it: all of it, which then is on the disk, or nothing. Only a process that is
    killed within the write itself can leave a part.

    Raises OSError, naming `path`.
    """
    with named_errors(path), open(path, "ab", buffering=0) as file:  # a buffer would be written again when it closes
        size, left = file.tell(), memoryview(content)
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.truncate(size)
            raise


@contextmanager
def _renamed_at_the_end(path: str) -> Iterator[BinaryIO]:
    if "\0" in path:
        raise OSError(errno.EINVAL, "a path with a byte 0", path)
    target = os.path.realpath(path)
    check_regular(target)
    temporary = os.path.join(os.path.dirname(target), TEMPORARY.format(secrets.token_hex(4)))
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
