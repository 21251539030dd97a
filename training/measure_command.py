"""`qdeploy measure`: what papers measure of a finished network, in files beside it."""

from __future__ import annotations

import argparse
import csv
import inspect
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.arguments import integer
from qdeploy.errors import InputError
from qdeploy.files import atomic_file
from qdeploy.terminal import columns, note, on_terminal, status, write
from qdeploy.training.figures import Measured, check_matplotlib, draw
from qdeploy.training.measures import MEASURES
from qdeploy.training.run_files import alone, sound

if TYPE_CHECKING:
    import torch

    from qdeploy.training.measures.measured_run import MeasuredRun

FOLDER, FIGURES = "measures", "figures"  # in that of the run
VERSION = 1  # of the files in it
SAVE_EVERY = 2.0  # seconds: what is lost at most where the process is killed; Ctrl-C loses the draw in work alone
SHOWN = 30  # rows of a table

Options = dict[str, dict[str, Any]]  # by measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "the folder of a finished run: OUT/seed0 of `qdeploy train`"
    parser.add_argument("folder", type=Path, metavar="RUN", help=text)
    names = "; ".join(f"{name}: {measure.text}" for name, measure in MEASURES.items())
    text = f"what to measure, with commas; {names}"
    parser.add_argument("--what", required=True, metavar="NAME,...", help=text)
    text = "at most so many images of each part, training, validation or target (default: 2000)"
    parser.add_argument("--subset", type=int, default=2000, metavar="N", help=text)
    parser.add_argument("--device", default="cpu", help="cpu (default), or cuda or cuda:N for a GPU")
    text = "an option of a measure, such as flatness.directions=20; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="NAME.OPTION=VALUE", help=text)
    text = "also draw the figure of a paper that shows a measure: RUN/figures/FIGURE.png and .svg (needs matplotlib)"
    parser.add_argument("--figures", action="store_true", help=text)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Writes RUN/measures/NAME.json and NAME.csv of each measure, but of those that are there with the same settings;
    the same command goes on after Ctrl-C, from the last finished draw, to the same bits.

    Returns {"run": folder, "measures": {name: content of NAME.json}, "figures": paths}. Raises InputError for an
    unknown measure or option, for a run that is not finished, and for files of a newer version, before anything is
    measured.
    """
    names = _names(args.what)
    if args.figures:
        check_matplotlib("--figures")
    subset = integer(args.subset, 1, 2**31 - 1, "--subset")
    given = _given(args.set, names)
    _keep_freed_memory()
    run = _opened(args.folder, subset, _device(args.device))
    options = {name: _options(name, given.get(name, {})) for name in names}
    with alone(run.folder / FOLDER):
        files = {name: _Files(run, name, options[name]) for name in names}
        there = {name: files[name].finished() for name in names}
        measured = {name: there[name] or _measured(run, name, options[name], files[name]) for name in names}
    figures = [path for name in names for path in _drawn(run, name, measured[name])] if args.figures else []
    return {"run": str(args.folder), "measures": measured, "figures": [str(path) for path in figures]}


def _names(what: str) -> list[str]:
    names = what.split(",")
    for name in names:
        if name not in MEASURES:
            raise InputError(f"expected one of {', '.join(MEASURES)}, got {name!r} - at --what")
    return [*dict.fromkeys(names)]


def _given(words: Sequence[str], names: Sequence[str]) -> Options:
    """{measure: {option: text}} of --set."""
    found: Options = {}
    for word in words:
        key, _, value = word.partition("=")
        name, _, option = key.partition(".")
        if name not in names or not option or "=" not in word:
            raise InputError(f"expected NAME.OPTION=VALUE with a NAME of --what, got {word!r} - at --set")
        found.setdefault(name, {})[option.replace("-", "_")] = value
    return found


def _options(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """All options of a measure, with their defaults where none is given."""
    from qdeploy.training.choices import converted

    parameters = inspect.signature(MEASURES[name].of_run, eval_str=True).parameters
    known = {key: one for key, one in parameters.items() if one.kind is inspect.Parameter.KEYWORD_ONLY}
    for key in given:
        if key not in known:
            raise InputError(f"expected an option of {name}: {', '.join(known) or 'none'}, got {key!r} - at --set")
    return {
        key: converted(given[key], one.annotation, f"--set {name}.{key}") if key in given else one.default
        for key, one in known.items()
    }


def _device(text: str) -> torch.device:
    import torch

    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        got = str(error).splitlines()[0]
        raise InputError(f"expected a device of this machine, got {got} - at --device") from error
    return device


def _keep_freed_memory() -> None:
    """glibc gives the memory of each activation back to the system, which clears it page by page for the next one: a
    third of all time for a NiN. It keeps blocks up to the largest of its own that was freed, 32 MiB at most."""
    import torch

    torch.empty(31 * 2**20, dtype=torch.uint8)


def _opened(folder: Path, subset: int, device: torch.device) -> MeasuredRun:
    from qdeploy.training.domains import benchmark_of
    from qdeploy.training.finished_runs import read_runs
    from qdeploy.training.measures.measured_run import MeasuredRun
    from qdeploy.training.run_files import DONE, check_same_images

    (done,) = read_runs([folder]).values()
    benchmark = benchmark_of(done.config)
    check_same_images(done.images, benchmark.fingerprint, folder / DONE, done.config.data)
    return MeasuredRun(folder, done, benchmark, device, subset)


def _measured(run: MeasuredRun, name: str, options: dict[str, Any], files: _Files) -> dict[str, Any]:
    with files:
        found = MEASURES[name].of_run(run, files.draw, **options)
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
        self.name, self.path, self.table = name, folder / f"{name}.json", folder / f"{name}.csv"
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


def show(report: dict[str, Any]) -> None:
    """Prints the tables of the report of `main`."""
    for name, content in report["measures"].items():
        write(f"{name}: {report['run']}/{FOLDER}/{name}.json")
        table = [{key: _shown(value) for key, value in row.items()} for row in content["table"]]
        write(columns(table[:SHOWN]))
        if len(table) > SHOWN:
            write(f"... and {len(table) - SHOWN:,} more in {name}.csv")
    for path in report["figures"]:
        write(f"wrote {path}")


def _shown(value: Any) -> Any:
    return ("no", "yes")[value] if isinstance(value, bool) else value
