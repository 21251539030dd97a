"""The local engine of a sweep: processes that are kept from job to job, each with its share of the cores."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait

from qdeploy.training.sweep_jobs import Job, Outcome, outcome_of, prepare


class Workers:
    """Does up to `slots` jobs at once, each by a process with so many `threads`. They are spawned: a fork of a process
    with threads, as torch has them, may hang."""

    def __init__(self, slots: int, threads: int):
        self.slots, self.threads = slots, threads
        self._idle: list[_Worker] = []
        self._busy: dict[_Worker, Job] = {}

    def start(self, job: Job) -> None:
        worker = self._idle.pop() if self._idle else _Worker(self.threads)
        self._busy[worker] = job
        worker.send(job)

    def ended(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """The jobs that ended; waits for the first so long."""
        found = []
        ready = wait([worker.connection for worker in self._busy], seconds)
        for worker in [worker for worker in self._busy if worker.connection in ready]:
            job, outcome = self._busy.pop(worker), worker.outcome()
            found.append((job, outcome))
            if outcome.kind != "died":
                self._idle.append(worker)
        return found

    def stop(self) -> None:
        """Has the running jobs write their checkpoints and end."""
        for worker in self._busy:
            worker.terminate()

    def close(self) -> None:
        for worker in self._idle:
            worker.dismiss()
        for worker in self._busy:
            worker.kill()
        self._idle, self._busy = [], {}


class _Worker:
    def __init__(self, threads: int):
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads))
        self._process.start()
        theirs.close()

    def send(self, job: Job) -> None:
        with suppress(OSError):  # it died while it was idle: `outcome` says so
            self.connection.send(job)

    def outcome(self) -> Outcome:
        try:
            found: Outcome = self.connection.recv()
            return found
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            return Outcome("died", signal.Signals(-code).name if code < 0 else f"exit code {code}")

    def terminate(self) -> None:
        self._process.terminate()

    def dismiss(self) -> None:
        self.connection.close()  # the end of its work
        self._process.join()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, threads: int) -> None:
    os.setsid()  # Ctrl-C reaches the sweep alone, which passes it on once
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(threads)
    try:
        while True:
            connection.send(outcome_of(connection.recv()))
    except (EOFError, OSError):  # no parent any more
        return


def _end_with_parent() -> None:
    """The job of a sweep that was killed ends with a checkpoint."""
    parent = parent_process()
    assert parent is not None  # this is no main process
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
