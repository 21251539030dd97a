"""The files in the folder of a run. Whatever is wrong with one of them is an InputError that names it. Needs no torch
until a state is read."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qdeploy.errors import InputError
from qdeploy.files import atomic_file
from qdeploy.training import fingerprint
from qdeploy.training.config import Config, difference, stored

CHECKPOINT, LOG, MODEL, DONE = "checkpoint.pt", "log.jsonl", "model.pt", "done.json"


@contextmanager
def sound(path: Path) -> Iterator[None]:
    """For what reads the file `path`, which may hold anything: all other exceptions say that it is damaged."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except OSError as error:
        raise InputError(f"expected a readable file, got {error.strerror or error} - at {path}") from error
    except Exception as error:
        raise InputError(f"expected a file written by a run, got a damaged one: delete it - at {path}") from error


def read_done(folder: Path) -> tuple[Config, dict[str, Any], dict[str, Any]] | None:
    """The settings, the selected record and the fingerprint of the images of a finished run, or None."""
    path = folder / DONE
    with sound(path):
        if not path.exists():
            return None
        done = json.loads(path.read_bytes())
        config, selected = stored(done["config"]), done["selected"]
        check_record(selected)
        return config, selected, done["images"]


def write_done(folder: Path, config: Config, selected: dict[str, Any], images: dict[str, Any]) -> None:
    with atomic_file(folder / DONE) as file:
        done = {"config": asdict(config), "selected": selected, "images": images}
        file.write(json.dumps(done, indent=1).encode())


def check_record(record: dict[str, Any]) -> None:
    """Raise what comes unless `record` is what an evaluation says."""
    if not isinstance(record["update"], int) or not all(0 <= record[key] <= 1 for key in ("validation", "test")):
        raise ValueError(record)


def read_state(path: Path) -> tuple[Config, dict[str, Any]]:
    """The settings in CHECKPOINT or MODEL, and all that the file holds."""
    import torch

    with sound(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch takes a damaged file for
        state = torch.load(path, map_location="cpu", weights_only=True)
        return stored(state["config"]), state


def write_state(path: Path, config: Config, state: dict[str, Any]) -> None:
    """Write CHECKPOINT or MODEL. In memory first: on a full disk torch hides the error behind one of its own."""
    import torch

    buffer = io.BytesIO()
    torch.save({"config": asdict(config), **state}, buffer)
    with atomic_file(path) as file:
        file.write(buffer.getbuffer())


def check_same_run(old: Config, config: Config, path: Path) -> None:
    """Raise InputError unless the run with the file `path` has the settings `config`."""
    if (found := difference(old, config)) is not None:
        raise InputError(f"expected the settings of the run begun here, {found}: give another --out - at {path}")


def check_same_images(old: Any, new: dict[str, Any], path: Path, data: str) -> None:
    """Raise InputError unless `new`, the fingerprint of the images in `data`, is that in the run's file `path`."""
    with sound(path):
        found = fingerprint.difference(old, new)
    if found is not None:
        raise InputError(f"expected the images of the run in {path.parent}, got {found} - at {data}")


def forgive_size(folder: Path, image: str) -> None:
    """Lets the run in `folder`, if it has a checkpoint, go on with a file `image` of another size."""
    path = folder / CHECKPOINT
    if path.exists():
        config, state = read_state(path)
        with sound(path):
            images = fingerprint.with_any_size(state["images"], image)
        write_state(path, config, {**state, "images": images})
