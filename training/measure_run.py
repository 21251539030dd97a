"""A finished run measured: the files of each measure in its folder, and what is kept of one that stops."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.errors import InputError
from qdeploy.files import atomic_file
from qdeploy.terminal import note, on_terminal, status
from qdeploy.training.figures import Measured, draw
from qdeploy.training.measures import MEASURES
from qdeploy.training.run_files import alone, sound

if TYPE_CHECKING:
    import torch

    from qdeploy.training.measures.measured_run import MeasuredRun

FOLDER, FIGURES = "measures", "figures"  # in that of the run
VERSION = 1  # of the files in it
SAVE_EVERY = 2.0  # seconds: what is lost at most where the process is killed; Ctrl-C loses the draw in work alone


@dataclass(frozen=True)
class Asked:
    """What is to be measured: all options of each measure by its name; the rest as on the command line."""

    options: Mapping[str, dict[str, Any]]
    subset: int
    device: torch.device
    figures: bool


def measure_run(folder: Path, asked: Asked) -> dict[str, Any]:
    """Writes the files of each measure, but of those that are there with the same settings.

    Returns {"run": folder, "measures": {name: content of NAME.json}, "figures": paths}. Raises InputError for a run
    that is not finished and for files of a newer version, before anything is measured.
    """
    _keep_freed_memory()
    run = _opened(folder, asked)
    with alone(run.folder / FOLDER):
        files = {name: _Files(run, name, options) for name, options in asked.options.items()}
        there = {name: one.finished() for name, one in files.items()}
        measured = {name: there[name] or _measured(run, one) for name, one in files.items()}
    figures = [path for name in measured for path in _drawn(run, name, measured[name])] if asked.figures else []
    return {"run": str(folder), "measures": measured, "figures": [str(path) for path in figures]}


def _keep_freed_memory() -> None:
    """glibc gives the memory of each activation back to the system, which clears it page by page for the next one: a
    third of all time for a NiN. It keeps blocks up to the largest of its own that was freed, 32 MiB at most."""
    import torch

    torch.empty(31 * 2**20, dtype=torch.uint8)


def _opened(folder: Path, asked: Asked) -> MeasuredRun:
    from qdeploy.training.finished_runs import read_runs
    from qdeploy.training.measures.measured_run import MeasuredRun
    from qdeploy.training.run_files import DONE, check_same_images
    from qdeploy.training.sweep_jobs import benchmark_for

    (done,) = read_runs([folder]).values()
    benchmark = benchmark_for(done.config)
    check_same_images(done.images, benchmark.fingerprint, folder / DONE, done.config.data)
    return MeasuredRun(folder, done, benchmark, asked.device, asked.subset)


def _measured(run: MeasuredRun, files: _Files) -> dict[str, Any]:
    with files:
        found = MEASURES[files.name].of_run(run, files.draw, **files.options)
    return files.write(found)


def _drawn(run: MeasuredRun, name: str, content: dict[str, Any]) -> list[Path]:
    figure, panel = MEASURES[name].figure, ", ".join(run.config.targets)
    shown = [Measured(run.config.method, content, run.config.seed, panel)]
    return draw(figure, shown, run.folder / FIGURES) if figure is not None else []


class _Files:
    """Those of one measure. As a context it keeps the draws that are finished when the block raises."""

    def __init__(self, run: MeasuredRun, name: str, options: dict[str, Any]):
        from qdeploy.training.fingerprint import network_hash

        folder = run.folder / FOLDER
        self.name, self.options = name, options
        self.path, self.table = folder / f"{name}.json", folder / f"{name}.csv"
        self.partial = folder / f"{name}.partial.json"
        network = network_hash(run.net)
        settings = {"subset": run.subset, "device": run.device.type, **options}
        self.head = {"measure": name, "version": VERSION, "network": network, "settings": settings}
        self._draws: dict[str, Any] = {}
        self._saved = self._said = time.perf_counter()

    def finished(self) -> dict[str, Any] | None:
        """The content of the file that is there, of this network and with these settings."""
        found = self._read(self.path)
        return found if found is not None and self.table.exists() else None

    def _read(self, path: Path) -> dict[str, Any] | None:
        """What a file holds of this very measure, or None."""
        with sound(path):
            if not path.exists():
                return None
            content = json.loads(path.read_bytes())
            version = content["version"]
            if version > VERSION:
                expected = f"a file of version {VERSION} or older"
                raise InputError(f"expected {expected}, got version {version}: upgrade qdeploy - at {path}")
            return content if all(content[key] == value for key, value in self.head.items()) else None

    def __enter__(self) -> None:
        kept = self._read(self.partial)
        self._draws = {} if kept is None else kept["draws"]
        if self._draws:
            note(f"{self.name} goes on after {len(self._draws):,} finished draws")

    def __exit__(self, *raised: object) -> None:
        status()
        if raised[0] is not None and self._draws:
            self._save()

    def draw(self, name: str, make: Callable[[], Any]) -> Any:
        """A `Draws`."""
        if name not in self._draws:
            self._say(name)
            self._draws[name] = make()
            if time.perf_counter() - self._saved > SAVE_EVERY:
                self._save()
        return self._draws[name]

    def _say(self, name: str) -> None:
        from qdeploy.training.progress import EVERY

        status(f"{self.name}: {name}")
        if not on_terminal() and time.perf_counter() - self._said > EVERY:
            note(f"{self.name}: {name}")
            self._said = time.perf_counter()

    def _save(self) -> None:
        _write(self.partial, {**self.head, "draws": self._draws})
        self._saved = time.perf_counter()

    def write(self, found: dict[str, Any]) -> dict[str, Any]:
        """Writes both files; the json comes last, so that where it is the csv is there, too."""
        content = {**self.head, **_finite(found)}
        text = io.StringIO()
        table = content["table"]
        rows = csv.DictWriter(text, [*dict.fromkeys(key for row in table for key in row)], lineterminator="\n")
        rows.writeheader()
        rows.writerows(table)
        with atomic_file(self.table) as file:
            file.write(text.getvalue().encode())
        _write(self.path, content)
        self.partial.unlink(missing_ok=True)
        return content


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def _finite(value: Any) -> Any:
    """With None in place of numbers that are infinite or none: JSON has only others."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value
