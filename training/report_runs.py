"""What a report is about: finished runs, what was made of several of them, and the runs that are missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qdeploy.errors import InputError
from qdeploy.training.command import SUMMARY
from qdeploy.training.config import Config, stored
from qdeploy.training.finished_runs import in_number_order
from qdeploy.training.run_files import CHECKPOINT, DONE, LOG, MODEL, SETTINGS, check_record, read_done, sound
from qdeploy.training.tables import data_set

SWEEP, SWEEP_VERSION = "sweep.json", 1
MEASURES, MEASURE_VERSION = "measures", 1

File = Mapping[str, Any]  # "file" of a summary: {"bytes", "test", "tests", "agreement"}


@dataclass(frozen=True)
class Result:
    """A finished run, or what was made of several (`kind`, of `members` networks), with its accuracies by domain.

    validation: the mean over the source domains; None of an ensemble. row: its name in a sweep. of_seeds: what
    `qdeploy train` makes of its seeds unasked. file: what a summary says of the model file. images: their fingerprint,
    where it is known.
    """

    folder: Path
    config: Config
    data: str
    tests: Mapping[str, float]
    validation: float | None
    row: str | None = None
    kind: str | None = None
    members: int = 1
    of_seeds: bool = False
    file: File | None = None
    images: Mapping[str, Any] | None = None
    records: Sequence[Mapping[str, Any]] = ()
    measures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Missing:
    """A run without a result; what is not known is None. `state` in words."""

    folder: Path
    state: str
    row: str | None = None
    target: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Sweep:
    """What SWEEP says of the runs of a sweep, by their resolved folders."""

    folder: Path
    runs: Mapping[Path, Mapping[str, Any]]

    def row(self, folder: Path) -> str:
        """The row of a folder of the sweep: folders are DIR/ROW/TARGET/seedN."""
        entry = self.runs.get(folder.resolve())
        return entry["row"] if entry else folder.relative_to(self.folder).parts[0]

    @property
    def rows(self) -> list[str]:
        return [*dict.fromkeys(entry["row"] for entry in self.runs.values())]


def find(folders: Sequence[Path]) -> tuple[list[Result], list[Missing]]:
    """All that is in `folders` and the folders in them, once each: by name, of a sweep in its order.

    Raises InputError for a folder that is not there or holds no run, for a damaged file and for one of a newer version.
    """
    found: dict[Path, Result | Missing] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"expected a folder of runs, got none - at {folder}")
        here = [*_sharing_images(_found(folder))]
        if not here:
            raise InputError(f"expected runs (--out of `qdeploy train`), got no {DONE} in the folder - at {folder}")
        for one in here:
            found.setdefault(one.folder.resolve(), one)
    results = [one for one in found.values() if isinstance(one, Result)]
    return _with_images(results), [one for one in found.values() if isinstance(one, Missing)]


def _sharing_images(found: Iterable[Result | Missing]) -> Iterator[Result | Missing]:
    """With equal fingerprints, of which that of DomainNet has megabytes, once in memory."""
    known: list[Mapping[str, Any]] = []
    for one in found:
        if isinstance(one, Result) and one.images is not None:
            images = next((other for other in known if other == one.images), one.images)
            known += [] if images is not one.images else [images]
            one = replace(one, images=images)
        yield one


def _with_images(results: Sequence[Result]) -> list[Result]:
    """A summary does not say of which images it is; runs beside it with the same data do."""
    known = {(one.config.data, one.config.domains): one for one in results if one.images is not None}
    full = []
    for one in results:
        like = known.get((one.config.data, one.config.domains))
        full.append(one if like is None or one.images else replace(one, data=like.data, images=like.images))
    return full


def _found(folder: Path, sweep: Sweep | None = None, file: File | None = None) -> Iterator[Result | Missing]:
    """`file`: what the summary of one run above this folder says of its model file."""
    if (folder / SWEEP).exists():
        yield from _of_sweep(read_sweep(folder))
    elif any((folder / name).exists() for name in (DONE, LOG, SETTINGS, CHECKPOINT, MODEL)):
        yield _run(folder, sweep, file)
    else:
        yield from _below(folder, sweep)


def _below(folder: Path, sweep: Sweep | None) -> Iterator[Result | Missing]:
    summary = _summary(folder)
    for below in sorted((path for path in folder.iterdir() if path.is_dir()), key=in_number_order):
        is_only = [f"seed{one['seed']}" for one in summary.get("members", ())] == [below.name]
        yield from _found(below, sweep, summary.get("file") if is_only else None)
    if len(summary.get("members", ())) > 1:
        yield _combined(folder, summary, sweep)


# ---- Sweeps --------------------------------------------------------------------------------------------------------


def read_sweep(folder: Path) -> Sweep:
    """Raises InputError for a damaged file and for one of a newer version."""
    path = folder / SWEEP
    with sound(path):
        content = _of_version(json.loads(path.read_bytes()), SWEEP_VERSION, path)
        runs = {(folder / entry["folder"]).resolve(): entry for entry in content["runs"]}
        for entry in runs.values():
            entry["row"], entry["target"], entry["state"]  # noqa: B018 - what is missing is said here
    return Sweep(folder, runs)


def _of_sweep(sweep: Sweep) -> Iterator[Result | Missing]:
    """In the order of its rows; what has no result with its state."""
    found = {one.folder.resolve(): one for one in _below(sweep.folder, sweep)}
    have_runs = {(entry["row"], entry["target"]) for entry in sweep.runs.values() if entry.get("seed") is not None}
    for path, entry in sweep.runs.items():
        is_summary = entry.get("seed") is None and (entry["row"], entry["target"]) in have_runs
        if not isinstance(found.get(path), Result) and not (is_summary and entry["state"] != "failed"):
            state = "done, but its files are gone" if entry["state"] == "done" else entry["state"]
            state += f": {entry['error']}" if entry.get("error") else ""
            folder = sweep.folder / entry["folder"]
            found[path] = Missing(folder, state, entry["row"], entry["target"], entry.get("seed"))
    places = {row: place for place, row in enumerate(sweep.rows)}
    yield from sorted(found.values(), key=lambda one: places.get(one.row or "", len(places)))


# ---- Runs ----------------------------------------------------------------------------------------------------------


def _run(folder: Path, sweep: Sweep | None, file: File | None) -> Result | Missing:
    row = sweep.row(folder) if sweep else None
    done = read_done(folder)
    if done is None:
        return Missing(folder, _progress(folder), row)
    with sound(folder / DONE):
        data = data_set(done.config, [*done.images["files"]])
    return Result(
        folder,
        done.config,
        data,
        tests=done.selected["tests"],
        validation=done.selected["validation"],
        row=row,
        images=done.images,
        file=_summary(folder).get("file") or file,
        records=_records(folder),
        measures=_measures(folder),
    )


def _combined(folder: Path, summary: Mapping[str, Any], sweep: Sweep | None) -> Result:
    """What `qdeploy combine` made of runs, or `qdeploy train` of its seeds."""
    from qdeploy.training.reducers import ensemble_of

    path = folder / SUMMARY
    with sound(path):
        config = stored(summary, path)
        average = summary.get("average")
        tests = average["tests"] if average else summary["ensemble_tests"]["logits"]
        found = Result(
            folder,
            config,
            data_set(config, ()),
            tests,
            validation=average["validation"] if average else None,
            row=sweep.row(folder) if sweep else None,
            kind=summary.get("kind") or ensemble_of([config], "layers" in summary),
            members=len(summary["members"]),
            of_seeds="kind" not in summary,
            file=summary.get("file"),
        )
        if not found.tests or not all(0 <= share <= 1 for share in tests.values()):
            raise ValueError(tests)
    return found


def _summary(folder: Path) -> Mapping[str, Any]:
    """What there is of it."""
    path = folder / SUMMARY
    with sound(path):
        found: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
        if found:
            found["config"], [one["seed"] for one in found["members"]]  # noqa: B018 - what is missing is said here
        if "file" in found:
            _ = {**found["file"]["tests"]}, found["file"]["bytes"] + found["file"]["agreement"]
    return found


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / LOG
    with sound(path):
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for record in found:
            check_record(record)
            record["quantized"]  # noqa: B018 - what is missing is said here
    return found


def _progress(folder: Path) -> str:
    """How far a run came; the last line of its log may be half written."""
    path = folder / LOG
    with sound(path):
        lines = path.read_text().splitlines() if path.exists() else []
        for line in reversed(lines):
            try:
                return f"not finished, evaluated after update {json.loads(line)['update']}"
            except ValueError:
                continue
    return "not finished, no evaluation yet"


def _measures(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted((folder / MEASURES).glob("*.json")):
        if not path.stem.endswith(".partial"):  # of a command that goes on
            with sound(path):
                found[path.stem] = _of_version(json.loads(path.read_bytes()), MEASURE_VERSION, path)
    return found


def _of_version(content: dict[str, Any], known: int, path: Path) -> dict[str, Any]:
    if content["version"] > known:
        expected = f"a file of version {known}"
        raise InputError(f"expected {expected}, got version {content['version']} of a newer qdeploy - at {path}")
    return content
