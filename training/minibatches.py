"""Which images train and which validate, and those of every update.

All of update t is a pure function of (seed, t), so there is no state to restore in a run that goes on.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from lightning_fabric import Fabric

from qdeploy.training.algorithms import Minibatches
from qdeploy.training.config import Config
from qdeploy.training.decoding import UnreadableImage
from qdeploy.training.domains import ArrayDomain, Benchmark, FolderDomain
from qdeploy.training.processes import raise_in_all
from qdeploy.training.start import seed_hash

HOLDOUT = 0.2  # share of each domain that is kept for validation


def split(count: int, environment: int, split_seed: int, held_out: float = HOLDOUT) -> tuple[np.ndarray, np.ndarray]:
    """Positions for training (80%) and validation (20%) of a domain of `count` images, the very split of DomainBed."""
    keys = list(range(count))
    np.random.RandomState(seed_hash(split_seed, environment)).shuffle(keys)
    size = int(held_out * count)
    return np.array(keys[size:], np.int64), np.array(keys[:size], np.int64)


def in_domain_split(count: int, environment: int, split_seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions for training (60%), validation and test: the held-out 40% are halved by the same shuffle again."""
    training, held_out = split(count, environment, split_seed, 2 * HOLDOUT)
    test, validation = split(len(held_out), environment, split_seed, 0.5)
    return training, held_out[validation], held_out[test]


def split_of(domain: ArrayDomain | FolderDomain, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The training and validation positions of a domain in a run: those of a published split, all and none of a domain
    whose images are there to be held out."""
    if config.targets and domain.published is not None:
        return domain.published
    place = len(domain.labels), domain.environment, config.split_seed
    return split(*place) if config.targets else in_domain_split(*place)[:2]


def sample(seed: int, update: int, environment: int, count: int, size: int) -> np.ndarray:
    """`size` positions in 0..count-1, drawn with replacement by a counter-based generator."""
    stream = np.random.Philox(key=[seed, environment], counter=[0, 0, 0, update])
    return np.random.Generator(stream).integers(count, size=size)


class MinibatchLoader:
    """The minibatches of any update, loaded one update ahead on a thread of its own."""

    def __init__(self, config: Config, benchmark: Benchmark, fabric: Fabric):
        self._config, self._fabric = config, fabric
        self._sources = benchmark.sources(config.targets)
        self._keys = [split_of(domain, config)[0] for domain in self._sources]
        self._executor = ThreadPoolExecutor(1)
        self._next: tuple[int, Future] | None = None

    def at(self, update: int) -> Minibatches:
        """The minibatches of update `update`, on the device; a data-parallel process gets its share of each."""
        ahead, failure = self._next, None
        batches: Minibatches = []
        try:
            batches = ahead[1].result() if ahead and ahead[0] == update else self._load(update)
        except UnreadableImage as error:
            failure = error
        raise_in_all(failure, self._fabric)
        self._next = (update + 1, self._executor.submit(self._load, update + 1))
        return [(self._fabric.to_device(images), self._fabric.to_device(classes)) for images, classes in batches]

    def _load(self, update: int) -> Minibatches:
        batches = []
        seed, size = self._config.seed, self._config.batch_size
        places = np.arange(size)[self._fabric.global_rank :: self._fabric.world_size]  # of this process's share
        for domain, keys in zip(self._sources, self._keys, strict=True):
            mine = keys[sample(seed, update, domain.environment, len(keys), size)[places]]
            images = domain.batch(mine, (seed, update, domain.environment), places)
            batches.append((images, torch.from_numpy(domain.labels[mine])))
        return batches

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)
