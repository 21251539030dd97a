"""The process that trains: signals that stop it, and others that train the same network or would like to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from qdeploy.errors import QdeployError
from qdeploy.training.run_files import alone


class Interrupted(Exception):
    """A signal stopped the run after a checkpoint; `signum` is its number."""

    def __init__(self, signum: int, update: int, directory: Path):
        super().__init__(f"stopped before update {update}: run the same command again to continue - at {directory}")
        self.signum = signum


@contextmanager
def signals_received() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM; the second one does what it always does."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def receive(signum: int, frame: object) -> None:
        received.append(signum)
        restore()

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, receive)
    try:
        yield received
    finally:
        restore()


def by_first(fabric: Fabric, action: Callable[[], object]) -> None:
    """Has the first of several processes do `action`; where it is refused, all end and none waits for another."""
    refused: Exception | None = None
    if fabric.is_global_zero:
        try:
            action()
        except (QdeployError, OSError) as error:
            refused = error
    if (refused := fabric.broadcast(refused)) is not None:
        raise refused if fabric.is_global_zero else SystemExit(2)  # it is said once


def reduced(number: Tensor, how: str, fabric: Fabric) -> Any:
    """Of all processes together ("sum", "mean", "max"), as a Python number of the type of `number`."""
    result: Any = fabric.all_reduce(number, reduce_op=how)
    return result.item()


def raise_in_all(failure: QdeployError | None, fabric: Fabric) -> None:
    """Raises what one process met, and ends the others, which would wait for its share of the work."""
    if fabric.world_size > 1:
        rank = -1 if failure is None else fabric.global_rank
        rank = reduced(torch.tensor(rank, device=fabric.device), "max", fabric)
        failure = None if rank < 0 else fabric.broadcast(failure, rank)
    if failure is not None:
        raise failure if fabric.is_global_zero else SystemExit(2)  # it is said once


@contextmanager
def alone_of_all(directory: Path, fabric: Fabric) -> Iterator[None]:
    """`alone` of the first process, for all of them."""
    with ExitStack() as stack:
        by_first(fabric, lambda: stack.enter_context(alone(directory)))
        yield
