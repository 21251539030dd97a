"""From the file of a sweep to its jobs: the settings of every run, complete and checked before the first one starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdeploy.errors import InputError
from qdeploy.training.choices import SHARED
from qdeploy.training.config import MACHINE, Config, made, plain, resolve, taken, with_updates
from qdeploy.training.presets import NAMED
from qdeploy.training.sweep_file import Combination, Row, SweepFile, merged, safe
from qdeploy.training.sweep_jobs import Combining, Job, Summary, Training, benchmark_for

MOST_WORKERS = 16  # processes that decode images


def plan(sweep: SweepFile, out: Path, threads: int) -> list[Job]:
    """The jobs, in the order of the rows, each after those that it needs. `threads`: the cores of a run.

    Raises InputError for settings that `qdeploy train` would refuse, and for a run that would be made twice.
    """
    configs: dict[Path, Config] = {}
    jobs: dict[Path, Job] = {}
    for row in sweep.rows:
        for target in sweep.targets:
            if isinstance(row, Row):
                for job in _runs(row, target, sweep, out, threads):
                    jobs[job.folder] = job
                    if isinstance(job, Training):
                        configs[job.folder] = job.config
    _check_once(configs, out)
    for row in sweep.rows:
        for target in sweep.targets:
            if isinstance(row, Combination):
                job = _combined(row, target, out, configs)
                jobs[job.folder] = job
    return _ordered(sweep, jobs)


def _runs(row: Row, target: str, sweep: SweepFile, out: Path, threads: int) -> list[Job]:
    """The runs of a row on a target, and their summary."""
    folder, needs = _folder(out, row.name, target), {}
    given = merged(row.settings, sweep.shared) | {"test_domain": target, "devices": 1}
    if given.get("data") not in (None, *NAMED):
        given.setdefault("workers", min(MOST_WORKERS, threads - 1))
    if (of := given.get("float_runs")) is not None:
        source = next((one for one in sweep.rows if isinstance(one, Row) and one.name == of), None)
        if source is None or "float_runs" in source.settings or {*row.seeds} - {*source.seeds}:
            expected = "a row of runs in float with all of its seeds"
            raise InputError(f"expected {expected}, got {of!r} - at float_runs of row {row.name!r}")
        given["float_runs"] = str(_folder(out, source.name, target))
        needs = {seed: (_folder(out, source.name, target) / f"seed{seed}",) for seed in row.seeds}
    try:
        config = _complete(resolve(Config(**_fitting(given, row.settings))))
    except InputError as error:
        raise InputError(f"{error} of row {row.name!r}, {target}") from error
    if made(config, "quantization").of_finished_runs and not needs:
        raise InputError(f"expected the row whose runs {row.name!r} quantizes, got none - at float_runs")
    configs = {seed: replace(config, seed=seed) for seed in row.seeds}
    runs: list[Job] = [
        Training(row.name, target, seed, folder / f"seed{seed}", needs.get(seed, ()), one, row.exports)
        for seed, one in configs.items()
    ]
    folders = tuple(job.folder for job in runs)
    return [*runs, Summary(row.name, target, None, folder, folders, tuple(configs.values()), row.exports)]


def _fitting(given: Mapping[str, Any], of_row: Mapping[str, Any]) -> dict[str, Any]:
    """Without those shared settings that the method of the row does not take, such as the switch of one in float."""
    takes = taken(Config(**given))
    left_out = {*SHARED, "quantize_at"} - takes - {*of_row}
    return {name: value for name, value in given.items() if name not in left_out}


def _complete(config: Config) -> Config:
    """The settings with the updates that `epochs` make of its data, when all that can be is checked."""
    from qdeploy.training.domains import Outline
    from qdeploy.training.minibatches import training_images
    from qdeploy.training.start import check_selectable, check_setting

    benchmark = benchmark_for(config)
    names = [domain.name for domain in benchmark.domains]
    check_setting(config, Outline(benchmark.name, benchmark.classes, names, benchmark.inputs))
    if config.epochs is None:
        return config
    config = with_updates(config, *training_images(config, benchmark))
    check_selectable(config)
    return config


def _combined(row: Combination, target: str, out: Path, configs: Mapping[Path, Config]) -> Combining:
    runs = tuple(_folder(out, one.name, target) / f"seed{seed}" for one in row.members for seed in row.seeds)
    if len(runs) < 2:
        raise InputError(f"expected two or more runs, got {len(runs)} - at row {row.name!r}")
    folder = _folder(out, row.name, target)
    return Combining(row.name, target, None, folder, runs, row.rule, configs[runs[0]].accelerator)


def _check_once(configs: Mapping[Path, Config], out: Path) -> None:
    """Raise InputError for two runs of the same settings, whatever their methods are called."""
    seen: dict[str, Path] = {}
    for folder, config in configs.items():
        values = {key: value for key, value in plain(config).items() if key not in MACHINE | {"method", "from_scratch"}}
        same = seen.setdefault(json.dumps(values, sort_keys=True), folder)
        if same != folder:
            got = f"the settings of {same.relative_to(out)} in {folder.relative_to(out)}"
            raise InputError(f"expected every run once, got {got} - at rows")


def _ordered(sweep: SweepFile, jobs: Mapping[Path, Job]) -> list[Job]:
    """Those that others need come first, else in the order of the file."""
    found: dict[Path, Job] = {}

    def add(job: Job) -> None:
        for folder in job.needs:
            add(jobs[folder])
        found.setdefault(job.folder, job)

    places = {row.name: place for place, row in enumerate(sweep.rows)}
    for job in sorted(jobs.values(), key=lambda job: places[job.row]):
        add(job)
    return [*found.values()]


def _folder(out: Path, row: str, target: str) -> Path:
    return out / safe(row) / safe(target)
