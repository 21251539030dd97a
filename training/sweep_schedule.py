"""What a sweep does next: jobs whose needs are met, on an engine, until all are done or cannot be; DIR/sweep.json says
how far a sweep is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qdeploy.errors import InputError
from qdeploy.files import atomic_file
from qdeploy.terminal import note
from qdeploy.training.processes import signals_received
from qdeploy.training.run_files import sound
from qdeploy.training.sweep_jobs import Job, Outcome

STATE, VERSION = "sweep.json", 1
TICK = 0.5  # seconds between looks at signals and at what people see
AGAIN = 2.0  # seconds until a run is tried again that another process trains
DEATHS = 2  # of the process of one job, after which it counts as failed


class Engine(Protocol):
    """Does jobs in other processes. `close` ends what still runs; `stop` lets it write checkpoints first."""

    slots: int

    def start(self, job: Job) -> None: ...
    def ended(self, seconds: float) -> list[tuple[Job, Outcome]]: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


@dataclass
class Entry:
    """A job and how it stands: "waiting", "running", "done", "failed", or "left out" because one that it needs is."""

    job: Job
    state: str = "waiting"
    error: str | None = None  # why it failed or is left out; of a waiting one, who has its lock
    seconds: float | None = None
    found: Mapping[str, Any] = field(default_factory=dict)
    deaths: int = 0
    not_before: float = 0.0
    began: float = 0.0


class Schedule:
    """Jobs, each behind those that it needs. Raises InputError where something else was begun in a folder of theirs."""

    def __init__(self, jobs: Sequence[Job]):
        self.entries = {job.folder: Entry(job) for job in jobs}
        for entry in self.entries.values():
            found = entry.job.found()
            if found is not None and all(self.entries[need].state == "done" for need in entry.job.needs):
                entry.state, entry.found = "done", found

    def of(self, state: str) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.state == state]

    def run(self, engine: Engine, changed: Callable[[Entry], object], tick: Callable[[], object]) -> None:
        """Has the engine do what is left. `changed` hears of every job that ended or has to wait, `tick` is called
        twice a second.

        Raises SystemExit after SIGINT or SIGTERM, and InputError for a full disk; what was computed is there then.
        """
        full, stopping = "", False
        self._write()
        with signals_received() as signals:
            while self.of("running") or not stopping and self.of("waiting"):
                if not stopping and (signals or full):
                    stopping = True
                    if self.of("running"):
                        note("stopping: what runs writes its checkpoint; the same command goes on")
                    engine.stop()
                if not stopping:
                    self._start(engine)
                tick()
                for job, outcome in engine.ended(TICK):
                    entry = self.entries[job.folder]
                    if self._settle(entry, outcome, stopping):
                        changed(entry)
                    self._write()
                    full = outcome.line if outcome.kind == "full" else full
        tick()
        if full:
            raise InputError(full)
        if signals:
            raise SystemExit(128 + signals[0])

    def _start(self, engine: Engine) -> None:
        now = time.monotonic()
        ready = [
            entry
            for entry in self.of("waiting")
            if entry.not_before <= now and all(self.entries[need].state == "done" for need in entry.job.needs)
        ]
        for entry in ready[: engine.slots - len(self.of("running"))]:
            entry.state, entry.began = "running", now
            engine.start(entry.job)
            self._write()

    def _settle(self, entry: Entry, outcome: Outcome, stopping: bool) -> bool:
        """Takes in how a job ended; whether that is news."""
        said, entry.error = entry.error, outcome.line or None
        entry.state = "waiting"
        if outcome.kind == "done":
            entry.state, entry.found, entry.seconds = "done", outcome.found, round(outcome.seconds, 1)
        elif outcome.kind == "failed":
            entry.state = "failed"
        elif outcome.kind == "elsewhere":
            entry.not_before = time.monotonic() + AGAIN
            return said != entry.error
        elif stopping:  # however it ended, the same command goes on with it
            entry.error = None
        elif outcome.kind == "died":
            entry.deaths += 1
            entry.error = (
                f"expected a process that finishes, got one that died ({outcome.line}) - at {entry.job.folder}"
            )
            entry.state = "failed" if entry.deaths == DEATHS else "waiting"
        self._leave_out()
        return entry.error is not None or entry.state == "done"

    def _leave_out(self) -> None:
        for entry in self.of("waiting"):  # in an order in which needs come first
            for need in entry.job.needs:
                if self.entries[need].state in ("failed", "left out"):
                    entry.state, entry.error = "left out", f"left out: it needs {self.entries[need].job.name}"

    def _write(self) -> None:
        """Whoever would like to keep how it stands does it here."""


class SweepSchedule(Schedule):
    """The jobs of a sweep in its folder `out`, where STATE tells how each stands."""

    def __init__(self, out: Path, rows: Sequence[str], jobs: Sequence[Job]):
        self.out, self.rows = out, rows
        super().__init__(jobs)
        seconds = _seconds(out / STATE)
        for entry in self.of("done"):
            entry.seconds = seconds.get(self._name(entry.job.folder))

    def _name(self, folder: Path) -> str:
        return str(folder.relative_to(self.out))

    def _write(self) -> None:
        runs = []
        for folder, entry in self.entries.items():
            job = entry.job
            run: dict[str, Any] = {"row": job.row, "target": job.target, "seed": job.seed, "folder": self._name(folder)}
            run["state"] = "waiting" if entry.state == "left out" else entry.state
            more = {"error": entry.error, "seconds": entry.seconds}
            runs.append(run | {key: value for key, value in more.items() if value is not None})
        with atomic_file(self.out / STATE) as file:
            file.write(json.dumps({"version": VERSION, "rows": [*self.rows], "runs": runs}, indent=1).encode())


def _seconds(path: Path) -> dict[str, float]:
    """What the jobs took that were done before, by their folders."""
    with sound(path):
        if not path.exists():
            return {}
        content = json.loads(path.read_bytes())
        if content["version"] != VERSION:
            raise InputError(f"expected a sweep of version {VERSION}, got {content['version']} - at {path}")
        return {run["folder"]: run["seconds"] for run in content["runs"] if "seconds" in run}
