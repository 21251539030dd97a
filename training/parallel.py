"""A map by several processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any

from qdeploy.errors import InputError


def cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def parallel_map(processes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yields `map` by so many processes. They are spawned: a fork of one with threads, as torch has them, may hang.
    None is left when this one ends, whatever ended it.

    Raises InputError where one of them dies.
    """
    if processes == 1:
        yield map
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin_worker) as pool:
        try:
            yield pool.map
        except BrokenProcessPool:
            found = "one that died (no memory, or a script that does not check `__name__`)"
            raise InputError(f"expected {processes} processes that finish, got {found} - at workers") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it, too; its parent ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker would wait for ever for a parent that was killed."""
    parent = parent_process()
    assert parent is not None  # this is no main process
    parent.join()
    os._exit(1)
