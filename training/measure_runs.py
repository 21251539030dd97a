"""Many finished runs measured, several at once by processes that are kept, as those of a sweep."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.training import sweep_workers
from qdeploy.training.measure_run import FOLDER, Asked, measure_run
from qdeploy.training.sweep_board import Board
from qdeploy.training.sweep_command import cores
from qdeploy.training.sweep_jobs import Job
from qdeploy.training.sweep_schedule import Schedule


@dataclass(frozen=True)
class Measuring(Job):
    """All that is asked of the run `row`; `folder` is the one in it with the files. What is there is told quickly: no
    need to know it before."""

    asked: Asked

    @property
    def name(self) -> str:
        return self.row

    def found(self) -> None:
        return None

    def make(self) -> dict[str, Any]:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # finished draws are kept
        try:
            measure_run(Path(self.row), self.asked)
        finally:
            signal.signal(signal.SIGTERM, before)
        return {}


def measure_runs(runs: Sequence[Path], asked: Asked, at_once: int) -> dict[str, Any]:
    """`measure_run` of each; what fails does not stop the rest.

    Returns {"runs": those that are measured now, "failed": [{"name", "error"}]}. After SIGINT or SIGTERM it raises
    SystemExit when the draws that are finished are kept; the same command goes on.
    """
    schedule = Schedule([Measuring(str(run), "", None, run / FOLDER, (), asked) for run in runs])
    with closing(sweep_workers.Workers(at_once, max(1, cores() // at_once))) as workers:
        board = Board(schedule, at_once)
        schedule.run(workers, board.changed, board.tick)
    return {
        "runs": [entry.job.name for entry in schedule.of("done")],
        "failed": [{"name": entry.job.name, "error": entry.error} for entry in schedule.of("failed")],
    }
