"""Which images a run is made of: its classes, and the path and size of every file of every domain. And with which
network it begins.

Training and validation images are told apart by their numbers in the list of files, and classes are numbered by name:
a run that went on with another list would mix them. Where the root of the files lies does not matter.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ANY_SIZE = -1  # of a file that could not be read: another copy may take its place


def fingerprint(classes: Sequence[str], files: Mapping[str, Iterable[tuple[str, int]]]) -> dict[str, Any]:
    """For JSON and PyTorch's files. `files`: (path below the root, bytes) of each domain. Packed, because the files of
    DomainNet are 587,000."""
    return {"classes": list(classes), "files": {name: _pack(dict(listed)) for name, listed in files.items()}}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first thing in which the images `new` are not those of the fingerprint `old`, in words, or None.

    Raises what comes for an `old` that is no fingerprint.
    """
    for what, was, now in (("domain", old["files"], new["files"]), ("class", old["classes"], new["classes"])):
        if changed := sorted({*was} ^ {*now}):
            name = changed[0]
            return f"{what} `{name}`, which was not there" if name in now else f"no {what} `{name}`"
    for domain, packed in new["files"].items():
        if packed != old["files"][domain] and (found := _first_file(_unpack(old["files"][domain]), _unpack(packed))):
            return found
    return None


def with_any_size(old: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The fingerprint `old`, which from now on takes a file `path` of any size."""
    files = {name: _unpack(packed) for name, packed in old["files"].items()}
    for listed in files.values():
        if path in listed:
            listed[path] = ANY_SIZE
    return fingerprint(old["classes"], {name: listed.items() for name, listed in files.items()})


def _first_file(was: dict[str, int], now: dict[str, int]) -> str | None:
    for path in sorted({*was, *now}):
        if path not in was:
            return f"{path}, which was not there"
        if path not in now:
            return f"no {path}"
        if was[path] not in (now[path], ANY_SIZE):
            return f"{path} of {now[path]} bytes, which had {was[path]}"
    if list(was) != list(now):
        return "the same files in another order"
    return None


def _pack(files: Mapping[str, int]) -> str:
    text = "".join(f"{size} {path}\0" for path, size in files.items())  # a name may hold everything but a zero byte
    return base64.b64encode(zlib.compress(text.encode("utf-8", "surrogateescape"))).decode()


def _unpack(packed: str) -> dict[str, int]:
    text = zlib.decompress(base64.b64decode(packed)).decode("utf-8", "surrogateescape")
    lines = (line.partition(" ") for line in text.split("\0")[:-1])
    return {path: int(size) for size, _, path in lines}


def network_hash(net: nn.Module) -> str:
    """sha256 of the network's tensors in their order: names, types, shapes and bytes."""
    import torch

    found = hashlib.sha256()
    for name, value in net.state_dict().items():
        if isinstance(value, torch.Tensor):  # the extra state of a module may be anything
            found.update(f"{name!r} {value.dtype} {[*value.shape]}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data)  # numpy has no bfloat16
    return found.hexdigest()
