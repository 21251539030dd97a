"""The files in the folder of a run. Whatever is wrong with one of them is an InputError that names it. Needs no torch
until a state is read."""

from __future__ import annotations

import fcntl
import io
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qdeploy.errors import InputError
from qdeploy.files import TEMPORARY, atomic_file, named_errors
from qdeploy.terminal import note
from qdeploy.training import fingerprint
from qdeploy.training.config import Config, first_difference, may_change, settings_of, stored

CHECKPOINT, MODEL, DONE, LOCK = "checkpoint.pt", "model.pt", "done.json", "lock"
SETTINGS, LOG = "settings.yaml", "log.jsonl"


class Done(NamedTuple):
    """What DONE says of a finished run."""

    config: Config
    selected: dict[str, Any]  # the record of its network
    images: dict[str, Any]  # their fingerprint
    initial: str  # `network_hash` of the network that it began with


class TrainedElsewhere(InputError):
    """Another process trains the run."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in `folder`, until this one ends, however it ends; removes the half-written
    files of one that was killed. Makes the folder. Raises TrainedElsewhere, naming host and process, where one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _locked(folder)
    if file is None:
        yield
        return
    try:
        for left in folder.glob(TEMPORARY.format("*")):  # nobody else writes here
            with suppress(OSError):
                left.unlink()
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        file.close()


def is_untidy(folder: Path) -> bool:
    """Whether a process was killed here when a run was as good as finished."""
    return any((folder / name).exists() for name in (CHECKPOINT, LOCK)) or any(folder.glob(TEMPORARY.format("*")))


def _locked(folder: Path) -> BinaryIO | None:
    """The open lock file of `folder`, with host and process in it; None, and a warning, where locks do not exist."""
    path = folder / LOCK
    while True:
        with named_errors(path):
            file = path.open("ab+", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it when the process ends
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace") or "another process"
            file.close()
            expected = "a run that no process trains now"
            raise TrainedElsewhere(f"expected {expected}, got one of {holder} - at {folder}") from None
        except OSError as error:
            file.close()
            path.unlink(missing_ok=True)
            note(f"warning: no lock ({error.strerror}): do not train here with two processes - at {folder}")
            return None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            with suppress(OSError):  # a full disk: the lock holds without a name
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        file.close()  # its owner removed it in between


@contextmanager
def sound(path: Path) -> Iterator[None]:
    """For what reads the file `path`, which may hold anything: all other exceptions say that it is damaged."""
    try:
        yield
    except MemoryError:
        raise
    except OSError as error:
        raise InputError(f"expected a readable file, got {error.strerror or error} - at {path}") from error
    except Exception as error:
        if isinstance(error, InputError) and str(error).endswith(f" - at {path}"):
            raise
        raise InputError(f"expected a file written by a run, got a damaged one: delete it - at {path}") from error


def read_done(folder: Path) -> Done | None:
    """What a finished run says of itself, or None."""
    path = folder / DONE
    with sound(path):
        if not path.exists():
            return None
        done = json.loads(path.read_bytes())
        found = Done(stored(done, path), done["selected"], done["images"], done["initial"])
        check_record(found.selected)
    if not (folder / MODEL).exists():
        expected = f"the network of a finished run, got none: delete {DONE} beside it to train anew"
        raise InputError(f"expected {expected} - at {folder / MODEL}")
    return found


def restore_done(folder: Path) -> Done | None:
    """What `read_done` returned before DONE was lost, which is written again; None for a run that is not finished."""
    if (folder / CHECKPOINT).exists() or not (folder / MODEL).exists():
        return None
    config, state = read_state(folder / MODEL)
    with sound(folder / MODEL):
        found = Done(config, state["selected"], state["images"], state["initial"])
        check_record(found.selected)
    write_done(folder, *found)
    return found


def write_done(folder: Path, config: Config, selected: dict[str, Any], images: dict[str, Any], initial: str) -> None:
    with atomic_file(folder / DONE) as file:
        done = {**settings_of(config), "selected": selected, "images": images, "initial": initial}
        file.write(json.dumps(done, indent=1).encode())


def check_record(record: dict[str, Any]) -> None:
    """Raise what comes unless `record` is what an evaluation says."""
    shares = (record["validation"], record["test"], *record["tests"].values())
    if not isinstance(record["update"], int) or not record["tests"] or not all(0 <= share <= 1 for share in shares):
        raise ValueError(record)


def read_state(path: Path) -> tuple[Config, dict[str, Any]]:
    """The settings in CHECKPOINT or MODEL, and all that the file holds."""
    import torch

    with sound(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch takes a damaged file for
        state = torch.load(path, map_location="cpu", weights_only=True)
        return stored(state, path), state


def write_state(path: Path, config: Config, state: dict[str, Any]) -> None:
    """Write CHECKPOINT or MODEL."""
    save_tensors(path, {**settings_of(config), **state})


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """As torch.save; in memory first, because on a full disk torch hides the error behind one of its own."""
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_file(path) as file:
        file.write(buffer.getbuffer())


def check_same_run(old: Config, config: Config, path: Path) -> None:
    """Raise InputError unless the run with the file `path` can go on with the settings `config`."""
    allowed = may_change(old)
    if path.name == DONE:  # what is finished does not go on
        allowed -= {"updates", "epochs"}
    found = first_difference(old, config, allowed)
    if found is not None:
        raise InputError(f"expected the settings of the run begun here, {found}: give another --out - at {path}")


def check_same_images(old: Any, new: dict[str, Any], path: Path, data: str) -> None:
    """Raise InputError unless `new`, the fingerprint of the images in `data`, is that in the run's file `path`."""
    with sound(path):
        found = fingerprint.difference(old, new)
    if found is not None:
        raise InputError(f"expected the images of the run in {path.parent}, got {found} - at {data}")
