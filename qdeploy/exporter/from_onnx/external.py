"""Constants that an ONNX file keeps in another file: only beside it, no link, and of the size that they need.

What a path out of a stranger's file can do is known: CVE-2022-25882 and CVE-2024-27318 (a path that leaves the folder),
CVE-2026-34446 and CVE-2026-34447 (links), CVE-2026-27489 (sizes).
"""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.checks import quoted
from qdeploy.errors import ExportError

if TYPE_CHECKING:
    import onnx

LARGEST = 2**31 - 1  # bytes of all constants


def external_bytes(tensor: onnx.TensorProto, folder: Path | None, at: str) -> bytes:
    """What the other file holds of the tensor. Raises ExportError unless that is a regular file in `folder`."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise ExportError(f"expected all constants in the file, got external data (give the path) - at {at}")
    if not location or "\0" in location or location in (".", "..") or os.path.basename(location) != location:
        got = quoted(location)
        raise ExportError(f"expected external data in a file beside the model, got {got} - at {at}")
    needed = _size(tensor, at)
    offset, length = (_number(entries, key, default, at) for key, default in (("offset", 0), ("length", needed)))
    if length != needed:
        raise ExportError(f"expected {needed} bytes of external data, got {length} - at {at}")
    try:
        descriptor = os.open(folder / location, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        got = "a link" if (folder / location).is_symlink() else str(error.strerror)
        raise ExportError(f"expected external data in {quoted(location)}, got {got} - at {at}") from None
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise ExportError(f"expected external data in a file of its own, got a link or device - at {at}")
        if offset + length > found.st_size:
            got = f"{found.st_size} bytes for {offset} + {length}"
            raise ExportError(f"expected external data within {quoted(location)}, got {got} - at {at}")
        file.seek(offset)
        return file.read(length)


def _size(tensor: onnx.TensorProto, at: str) -> int:
    from onnx import helper

    try:
        bits = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    except Exception:
        raise ExportError(f"expected numbers, got type {tensor.data_type} - at {at}") from None
    if tensor.data_type in (tensor.UINT4, tensor.INT4):
        bits = 4
    size = (math.prod(tensor.dims) * bits + 7) // 8
    if not 0 <= size <= LARGEST or min(tensor.dims, default=0) < 0:
        raise ExportError(f"expected at most 2 GiB of constants, got {size} bytes - at {at}")
    return size


def _number(entries: dict[str, str], key: str, default: int, at: str) -> int:
    text = entries.get(key, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ExportError(f"expected a number of bytes, got {quoted(text)} - at {key} of {at}")
    return int(text)
