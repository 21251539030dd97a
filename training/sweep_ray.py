"""The Ray engine of a sweep: its jobs as tasks of a cluster whose nodes see the folders of the sweep and the data."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from qdeploy.errors import InputError, QdeployError, one_line
from qdeploy.training.sweep_jobs import Job, Outcome, Training, benchmark_for, outcome_of, prepare

SILENT = 10.0  # seconds until an address that does not answer is given up
# What a client of HTTP/2 begins with (RFC 9113, 3.4): gRPC, which the head of Ray speaks, answers with its settings.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4


class RayTasks:
    """Does up to `slots` jobs at once, each with so many `threads`: an equal share of the CPUs of the cluster.

    Raises InputError where ray is not installed or nothing answers at `address`.
    """

    def __init__(self, address: str | None, slots: int | None):
        try:
            self._ray: Any = import_module("ray")
        except ImportError:
            fix = "pip install 'qdeploy[ray]'"
            raise InputError(f"expected the package ray ({fix}), got none - at this Python environment") from None
        if address is None:
            raise InputError("expected HOST:PORT of the head of Ray, got none - at --address")
        check_answers(address)
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (RuntimeError, ConnectionError, ValueError) as error:
            raise InputError(f"expected the head of Ray, got {one_line(error)} - at --address {address}") from error
        cpus = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        self.slots = cpus if slots is None else slots
        self.threads = max(1, cpus // self.slots)
        self._do = self._ray.remote(num_cpus=self.threads, max_retries=0)(_do)  # a lost one is tried again by the sweep
        self._running: dict[Any, Job] = {}

    def check(self, out: Path, jobs: Sequence[Job]) -> None:
        """Raise InputError for a node that has no qdeploy, or does not see the sweep's folder or the data."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        look = self._ray.remote(num_cpus=0, max_retries=0)(_look)
        for node in self._ray.nodes():
            if not node["Alive"]:
                continue
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            try:
                line = self._ray.get(look.options(scheduling_strategy=place).remote(os.getcwd(), out, jobs))
            except self._ray.exceptions.RayError as error:
                known = "No module named 'qdeploy" in str(error)
                line = "expected qdeploy, got none" if known else f"expected a worker, got {one_line(error)}"
            if line is not None:
                raise InputError(f"{line} - at the node {node['NodeManagerAddress']} of Ray")

    def start(self, job: Job) -> None:
        self._running[self._do.remote(job, self.threads, os.getcwd())] = job

    def ended(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """The jobs that ended; waits for the first so long."""
        if not self._running:
            time.sleep(seconds)
            return []
        ready, _ = self._ray.wait([*self._running], num_returns=1, timeout=seconds)
        return [(self._running.pop(task), self._outcome(task)) for task in ready]

    def _outcome(self, task: Any) -> Outcome:
        errors = self._ray.exceptions
        try:
            found: Outcome = self._ray.get(task)
            return found
        except errors.TaskCancelledError:
            return Outcome("stopped")
        except errors.RayTaskError as error:
            return Outcome("failed", one_line(error))
        except errors.RayError as error:
            return Outcome("died", type(error).__name__)

    def stop(self) -> None:
        """Has the running jobs write their checkpoints and end."""
        for task in self._running:
            self._ray.cancel(task)  # as Ctrl-C in its process

    def close(self) -> None:
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._ray.shutdown()


def check_answers(address: str) -> None:
    """Raise InputError unless there is something at HOST:PORT that speaks gRPC."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"expected HOST:PORT of the head of Ray, got {address!r} - at --address")
    try:
        with socket.create_connection((host, int(port)), SILENT) as connection:
            connection.settimeout(SILENT)
            connection.sendall(_PREFACE)
            greeting = connection.recv(9)  # length, type, ...
    except (OSError, OverflowError) as error:
        silent = f"silence for {SILENT:.0f} s"
        got = silent if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)
        raise InputError(f"expected the head of Ray (`ray start --head`), got {got} - at --address {address}") from None
    if len(greeting) < 9 or greeting[3] != _SETTINGS:
        raise InputError(f"expected the head of Ray (`ray start --head`), got another - at --address {address}")


# ---- In the workers of Ray ------------------------------------------------------------------------------------------


def _do(job: Job, threads: int, folder: str) -> Outcome:
    os.chdir(folder)  # relative paths of data and weights
    prepare(threads)
    return outcome_of(job)


def _look(folder: str, out: Path, jobs: Sequence[Job]) -> str | None:
    """What a node lacks, in words."""
    for place in (Path(folder), out):
        if not place.is_dir():
            return f"expected a folder that all nodes see, got none at {place}"
    os.chdir(folder)
    try:
        for job in jobs:
            if isinstance(job, Training):
                benchmark_for(job.config)
    except QdeployError as error:
        return f"expected the data of the sweep, got this: {one_line(error)}"
    return None
