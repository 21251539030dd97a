"""What a run leaves for people to read while it goes on: settings.yaml, log.jsonl with a line for each evaluation, and,
with `--logger`, the same numbers by Lightning Fabric's loggers: csv/metrics.csv, or TensorBoard's file in tensorboard/.

All of it begins anew with the records of the checkpoint when a run goes on: a process that was killed after it may have
written points beyond, which will come again.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.errors import InputError
from qdeploy.files import append, atomic_file, named_errors
from qdeploy.training.config import Config
from qdeploy.training.run_files import LOG, SETTINGS
from qdeploy.training.settings_files import written

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Record = dict[str, Any]


@contextmanager
def run_log(config: Config, folder: Path, records: list[Record], fabric: Fabric) -> Iterator[Callable[[Record], None]]:
    """Yields what adds a record after the `records` of the checkpoint; in the first process alone it does something.

    Raises OSError, naming the file or folder that cannot be written.
    """
    if not fabric.is_global_zero:
        yield lambda record: None
        return
    with atomic_file(folder / SETTINGS) as file:
        file.write(written(config).encode())
    with atomic_file(folder / LOG) as file:
        file.writelines(map(_line, records))
    with nullcontext() if config.logger == "none" else closing(_Points(config.logger, folder, records)) as points:

        def add(record: Record) -> None:
            append(folder / LOG, _line(record))
            if points is not None:
                points.add(record)

        yield add


def check_logger(name: str) -> None:
    """Raise InputError where the packages that a logger needs are not there."""
    if name == "tensorboard" and not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
        expected = 'the package tensorboard (pip install "qdeploy[tensorboard]")'
        raise InputError(f"expected {expected}, got none - at --logger tensorboard")


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


class _Points:
    """The numbers of records, as a logger of Lightning Fabric has them in a folder of its name."""

    def __init__(self, name: str, folder: Path, records: list[Record]):
        from lightning_fabric.loggers.csv_logs import CSVLogger
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        check_logger(name)
        self._path = folder / name
        with named_errors(self._path):
            if self._path.exists():
                shutil.rmtree(self._path)
        kind: type[Any] = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}[name]
        self._logger = kind(folder, name="", version=name)
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        numbers = _numbers({key: value for key, value in record.items() if key != "update"})
        with named_errors(self._path):
            try:
                self._logger.log_metrics(numbers, record["update"])
            except ValueError as error:  # TensorBoardLogger's, whatever its writer met
                raise error.__cause__ or error from None
            self._logger.save()

    def close(self) -> None:
        with named_errors(self._path):
            self._logger.finalize("success")


def _numbers(record: Record, path: str = "") -> dict[str, float]:
    """By their place: {"loss": ..., "accuracy/art_in": ...}."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{path}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[path + key] = value
    return found
