"""What people see of a sweep: a table that lives on a terminal, a line for each job where standard error is a file."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from qdeploy.terminal import note, on_terminal, printable
from qdeploy.training.run_files import LOG
from qdeploy.training.sweep_schedule import Entry, Schedule

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table


@contextmanager
def board_of(schedule: Schedule, slots: int) -> Iterator[Board]:
    if not on_terminal():
        yield Board(schedule, slots)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), auto_refresh=False, redirect_stdout=False) as live:
        yield Board(schedule, slots, live)


class Board:
    def __init__(self, schedule: Schedule, slots: int, live: Live | None = None):
        self._schedule, self._slots, self._live = schedule, slots, live

    def changed(self, entry: Entry) -> None:
        """After a job ended, or has to wait for another process."""
        if self._live is not None and entry.state == "done":
            return
        done, total = len(self._schedule.of("done")), len(self._schedule.entries)
        text = f"[{done} of {total}] {entry.job.name} {entry.state}"
        if entry.state == "done":
            text += f" in {entry.seconds:.1f} s"
            text += "".join(f", {key} {value:.4f}" for key, value in entry.found.items())
            text += f"; {self._left()} left"
        else:
            text += f": {entry.error}"
        if self._live is None:
            note(text)
        else:
            self._live.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def tick(self) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        from rich.table import Table

        columns = ("held out", "done", "running", "failed", "left", "best by validation")
        table = Table(
            *columns, caption="\n".join([f"{self._left()} left", *map(_running, self._schedule.of("running"))])
        )
        targets = dict.fromkeys(entry.job.target for entry in self._schedule.entries.values())
        for target in targets:
            entries = [entry for entry in self._schedule.entries.values() if entry.job.target == target]
            table.add_row(printable(target), *_counts(entries), _best(entries))
        if len(targets) > 1:
            table.add_row("all", *_counts([*self._schedule.entries.values()]), "")
        return table

    def _left(self) -> str:
        """The time that the other jobs will take, if they are like those that are done."""
        times = [entry.seconds for entry in self._schedule.of("done") if entry.seconds is not None]
        if not times:
            return "unknown time"
        now = time.monotonic()
        seconds = statistics.fmean(times) * len(self._schedule.of("waiting"))
        for entry in self._schedule.of("running"):
            seconds += max(0.0, statistics.fmean(times) - (now - entry.began))
        minutes = seconds / self._slots / 60
        return (
            f"{60 * minutes:.0f} s"
            if minutes < 1
            else f"{minutes:.0f} min"
            if minutes < 120
            else f"{minutes / 60:.1f} h"
        )


def _counts(entries: Sequence[Entry]) -> list[str]:
    states = [entry.state for entry in entries]
    waiting = states.count("waiting") + states.count("left out")
    return [str(count) for count in (*map(states.count, ("done", "running", "failed")), waiting)]


def _best(entries: Sequence[Entry]) -> str:
    """The row with the highest mean of validation accuracy, the measure of which is not what it is held out for."""
    rows: dict[str, list[float]] = {}
    for entry in entries:
        if entry.state == "done" and "validation" in entry.found:
            rows.setdefault(entry.job.row, []).append(entry.found["validation"])
    if not rows:
        return "-"
    name = max(rows, key=lambda row: statistics.fmean(rows[row]))
    return printable(f"{name} {statistics.fmean(rows[name]):.1%}")


def _running(entry: Entry) -> str:
    """A job and its last evaluation."""
    text = entry.job.name
    with suppress(OSError, ValueError, LookupError):  # none yet
        record = json.loads((entry.job.folder / LOG).read_text().splitlines()[-1])
        text += f": update {record['update']}, validation {record['validation']:.4f}"
    return printable(text)
