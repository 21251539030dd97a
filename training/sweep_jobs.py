"""What a sweep has done for it, one job at a time, by any process that sees its folders: a run, what all seeds of a row
are together, what is made of the runs of others."""

from __future__ import annotations

import argparse
import errno
import json
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qdeploy.errors import QdeployError, one_line
from qdeploy.files import atomic_file
from qdeploy.training.combine_command import AVERAGES, ENSEMBLES
from qdeploy.training.command import SUMMARY, check_begun, check_folders, fabric_of, summarize, trained
from qdeploy.training.config import Config, made
from qdeploy.training.run_files import DONE, TrainedElsewhere, read_done, sound

if TYPE_CHECKING:
    from qdeploy.training.domains import Benchmark

OUTPUT = "output.txt"  # in the folder of a job: what `qdeploy train` would say there
# What determines the images.
_OF_DATA = ("data", "domains", "image_size", "skip_unreadable", "tokenizer", "tokens", "normalization")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Job:
    """One piece of work, which leaves its files in `folder`."""

    row: str
    target: str
    seed: int | None  # None: of several seeds together
    folder: Path
    needs: tuple[Path, ...]  # the folders of the jobs that come before

    @property
    def name(self) -> str:
        return "/".join([self.row, self.target] + ([] if self.seed is None else [f"seed{self.seed}"]))

    def found(self) -> dict[str, Any] | None:
        """What it found, where it is done. Raises InputError where something else was done or begun in its folder."""
        raise NotImplementedError

    def make(self) -> dict[str, Any]:
        """Does it, or what is left of it; returns what it found: {"validation", "test"} of a run.

        Raises SystemExit after a signal, when a checkpoint is written."""
        raise NotImplementedError


@dataclass(frozen=True)
class Training(Job):
    """A run, as `qdeploy train` makes it."""

    config: Config
    exports: bool

    def found(self) -> dict[str, Any] | None:
        check_begun({self.folder: self.config})
        done = read_done(self.folder)
        return None if done is None else done.selected

    def make(self) -> dict[str, Any]:
        from qdeploy.training.quantize_finished import float_run

        check_folders(self.folder.parent, [self.folder])
        if made(self.config, "quantization").of_finished_runs:
            float_run(self.config)
        runs = {self.folder: self.config}
        [member] = trained(runs, benchmark_for(self.config), fabric_of(self.config), self.exports)
        return member


@dataclass(frozen=True)
class Summary(Job):
    """All seeds of a row on a target together, as `qdeploy train --seeds` ends: OUT/summary.json and the model file."""

    configs: tuple[Config, ...]
    exports: bool

    def found(self) -> dict[str, Any] | None:
        return _read_summary(self.folder, self.needs)

    def make(self) -> dict[str, Any]:
        runs = dict(zip(self.needs, self.configs, strict=True))
        check_folders(self.folder, self.needs)
        benchmark, fabric = benchmark_for(self.configs[0]), fabric_of(self.configs[0])
        return summarize(runs, trained(runs, benchmark, fabric, self.exports), benchmark, fabric, self.exports)


@dataclass(frozen=True)
class Combining(Job):
    """What is made of the runs `needs`, as by `qdeploy combine`: OUT/summary.json, and the file of quantized ones."""

    rule: str
    accelerator: str

    def found(self) -> dict[str, Any] | None:
        summary = _read_summary(self.folder, self.needs)
        if summary is None or summary["runs"] != [*map(str, self.needs)]:
            return None
        return summary if self.rule in ENSEMBLES or summary["kind"] == AVERAGES[self.rule] else None

    def make(self) -> dict[str, Any]:
        from qdeploy.training import combine_command

        done = [read_done(folder) for folder in self.needs]
        quantized = all(one is not None and one.selected["quantized"] for one in done)
        self.folder.mkdir(parents=True, exist_ok=True)
        args = argparse.Namespace(runs=[*self.needs], rule=self.rule, accelerator=self.accelerator)
        args.out = self.folder / "model.safetensors" if quantized else None
        args.combine = args.fallback_bits = args.state = None
        summary = combine_command.main(args)
        with atomic_file(self.folder / SUMMARY) as file:
            file.write(json.dumps(summary, indent=1).encode())
        return summary


def _read_summary(folder: Path, runs: tuple[Path, ...]) -> dict[str, Any] | None:
    """The summary of finished runs, where it came after the last of them."""
    path, done = folder / SUMMARY, [run / DONE for run in runs]
    if not path.exists() or not all(one.exists() and one.stat().st_mtime <= path.stat().st_mtime for one in done):
        return None
    with sound(path):
        summary = json.loads(path.read_bytes())
        seeds = [member["seed"] for member in summary["members"]]
    complete = seeds == [int(run.name.removeprefix("seed")) for run in runs]
    there = "file" not in summary or Path(summary["file"]["path"]).exists()
    return summary if complete and there else None


def benchmark_for(config: Config) -> Benchmark:
    """The data of a run; those of the one before are still there."""
    return _benchmark(Config(**{name: getattr(config, name) for name in _OF_DATA}))


@lru_cache(maxsize=2)
def _benchmark(data: Config) -> Benchmark:
    from qdeploy.training.domains import benchmark_of

    return benchmark_of(data)


class Outcome(NamedTuple):
    """How a job ended: "done", "failed", "stopped" by a signal, "elsewhere" (another process has the lock), "full"
    (the disk), or, as its engine knows, "died"."""

    kind: str
    line: str = ""  # why, in one line
    seconds: float = 0.0
    found: Mapping[str, Any] = {}


def prepare(threads: int) -> None:
    """Has this process ready for jobs: what takes seconds to import, and its share of the cores."""
    import torch

    from qdeploy.training import trainer  # noqa: F401

    torch.set_num_threads(threads)


def outcome_of(job: Job) -> Outcome:
    """Makes a job in this process. What it says goes to a file in its folder."""
    began = time.perf_counter()
    try:
        with _output_in(job.folder / OUTPUT):
            try:
                found = job.make()
                kept: dict[str, Any] = {key: found[key] for key in ("validation", "test") if key in found}
                return Outcome("done", "", time.perf_counter() - began, kept)
            except Exception as error:
                if not isinstance(error, (QdeployError, OSError)):
                    traceback.print_exc()
                raise
    except (SystemExit, KeyboardInterrupt):
        return Outcome("stopped")
    except TrainedElsewhere as error:
        return Outcome("elsewhere", str(error))
    except OSError as error:
        at = "" if error.filename is None else f" - at {os.fsdecode(error.filename)}"
        line = f"expected to read or write a file, got: {error.strerror or error}{at}"
        return Outcome("full" if error.errno in _FULL else "failed", line)
    except QdeployError as error:
        return Outcome("failed", " ".join(str(error).split()))
    except Exception as error:
        return Outcome("failed", f"{type(error).__name__}: {one_line(error)}")


@contextmanager
def _output_in(path: Path) -> Iterator[None]:
    """Standard output and error of this process go to the end of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [os.dup(1), os.dup(2)]  # what is no Python writes there
    try:
        with path.open("a", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
            yield
    finally:
        for descriptor, before in zip((1, 2), kept, strict=True):
            os.dup2(before, descriptor)
            os.close(before)
