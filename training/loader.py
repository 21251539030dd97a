"""Images by torch's DataLoader: decoded by processes of their own, one batch ahead of another, or by this one.

Which images, and with which augmentation, is said by keys; so the outcome does not depend on who decodes them. The
processes import this module alone: no Lightning, no network.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from qdeploy.errors import InputError
from qdeploy.training.decoding import UnreadableImage
from qdeploy.training.domains import Benchmark, Domain

PREFETCH = 2  # batches that every worker decodes ahead
# Imported once, by the process that all workers are forked from: importing torch takes each of them 2 s otherwise.
PRELOADED = (__name__, "PIL.Image", "PIL.ImageEnhance", "PIL.ImageOps")


class WorkerLost(InputError):
    """Not the fault of an image: a worker was killed, or has no memory to put its images in."""


class Keys(NamedTuple):
    """Images of one domain: those at `positions`, as they are or, with `update`, augmented for their `places` in the
    whole minibatch of that update."""

    domain: int  # its place in `Benchmark.domains`
    positions: np.ndarray
    update: int | None = None
    places: np.ndarray | None = None


class _Images(Dataset):
    """What a worker holds: the domains, of which it makes the images of any keys."""

    def __init__(self, domains: Sequence[Domain], seed: int):
        self._domains, self._seed = domains, seed

    def __getitems__(self, batch: Sequence[Keys]) -> Tensor | Exception:
        """u8 [N, C, H, W], or i32 [N, T] of texts. A refusal is returned: raised, torch would make it a traceback."""
        try:
            images = torch.cat([self._of(keys) for keys in batch])
            if get_worker_info() is not None:
                _share(images)
            return images
        except (UnreadableImage, WorkerLost, MemoryError) as refusal:
            return refusal

    def _of(self, keys: Keys) -> Tensor:
        domain = self._domains[keys.domain]
        augment = None if keys.update is None else (self._seed, keys.update, domain.environment)
        return domain.batch(keys.positions, augment, keys.places)


def _share(images: Tensor) -> None:
    """Now, where it can be refused. Torch does it on a thread of its queue, where the batch would be lost silently."""
    try:
        images.share_memory_()
    except RuntimeError as error:
        got = f"no room for a batch of {images.nbytes:,}: give less to --workers"
        raise WorkerLost(f"expected shared memory for the images of all workers, got {got} - at /dev/shm") from error


def load(
    benchmark: Benchmark, order: Iterable[Sequence[Keys]], seed: int, workers: int, pin_memory: bool = False
) -> Generator[list[tuple[Tensor, Tensor]], None, None]:
    """Images, u8 [n, C, H, W], or texts, i32 [n, T], and classes, i64 [n], of every keys of every batch, in this order.

    `workers` processes decode; 0: this one does. They start with the first batch and end when the generator is closed.
    Raises UnreadableImage, WorkerLost and MemoryError.
    """
    sent: deque[Sequence[Keys]] = deque()

    def sampler() -> Iterator[Sequence[Keys]]:
        for batch in order:
            sent.append(batch)
            yield batch

    iterator = _started(_Images(benchmark.domains, seed), sampler(), workers, pin_memory)
    try:
        while (images := _next(iterator, workers)) is not None:
            if isinstance(images, Exception):
                raise images
            batch = sent.popleft()
            parts = images.split([len(keys.positions) for keys in batch])
            yield [(part, _classes(benchmark, keys)) for part, keys in zip(parts, batch, strict=True)]
    finally:
        del iterator  # which ends the workers


def _as_it_is(images: Tensor | Exception) -> Tensor | Exception:
    return images


def _classes(benchmark: Benchmark, keys: Keys) -> Tensor:
    return torch.from_numpy(benchmark.domains[keys.domain].labels[keys.positions])


def _started(
    images: _Images, sampler: Iterator[Sequence[Keys]], workers: int, pin_memory: bool
) -> Iterator[Tensor | Exception]:
    options: dict[str, Any] = {}
    if workers:  # forked from a process without threads, because torch's do not survive a fork
        options = {"multiprocessing_context": "forkserver", "prefetch_factor": PREFETCH}
        options["worker_init_fn"] = _end_with_the_run
        multiprocessing.set_forkserver_preload(list(PRELOADED))
    with warnings.catch_warnings(), _unreached_by_ctrl_c(), _without_the_program():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: as asked for
        options |= {"batch_sampler": sampler, "collate_fn": _as_it_is, "pin_memory": pin_memory}
        return iter(DataLoader(images, num_workers=workers, **options))


def _end_with_the_run(worker: int) -> None:
    """Of a run that is killed, too: torch watches for the death of the process that forked the worker, which lives as
    long as its workers."""
    run = multiprocessing.parent_process()
    assert run is not None

    def wait() -> None:
        run.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _unreached_by_ctrl_c() -> Iterator[None]:
    """For the start of processes: a terminal sends SIGINT to all of them, but the run needs them until its checkpoint.
    The mask is inherited, also by what they start."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_the_program() -> Iterator[None]:
    """For the start of processes: they need this module alone, but would import the program that trains. Without
    `if __name__ == "__main__"` it would begin to train in each of them."""
    program = vars(sys.modules["__main__"])
    held: dict[str, Any] = {name: program.pop(name) for name in ("__spec__", "__file__") if name in program}
    program["__spec__"] = None
    try:
        yield
    finally:
        program.update(held)


def _next(iterator: Iterator[Tensor | Exception], workers: int) -> Tensor | Exception | None:
    """None at the end. The error of a lost worker is returned, so that nobody but the caller holds the iterator."""
    try:
        return next(iterator, None)
    except (RuntimeError, OSError, EOFError) as error:
        by_torch = str(error).startswith(("DataLoader worker", "Pin memory thread"))
        if not workers or isinstance(error, RuntimeError) and not by_torch:
            raise
        got = "one that was killed: there may be too little memory for so many"
        return WorkerLost(f"expected {workers} worker(s) that load images, got {got} - at --workers")
