"""Which images train and which validate, and those of a run in its order.

All of update t is a pure function of (seed, t), so there is no state to restore in a run that goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import numpy as np
from lightning_fabric import Fabric
from torch import Tensor

from qdeploy.training.config import Config
from qdeploy.training.decoding import UnreadableImage
from qdeploy.training.domains import Benchmark, Domain
from qdeploy.training.loader import Keys, WorkerLost, load
from qdeploy.training.methods.batches import Minibatches
from qdeploy.training.processes import raise_in_all
from qdeploy.training.seeds import seed_hash

HOLDOUT = 0.2  # share of each domain that is kept for validation
# At most: every worker has three batches in shared memory, of which a container gets 64 MB unless it is told to.
EVALUATION_BATCH, EVALUATION_BYTES = 256, 10_000_000

Waiting = Callable[[], AbstractContextManager]


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


def split_of(domain: Domain, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The training and validation positions of a domain in a run: those of a published split, all and none of a domain
    whose images are there to be held out."""
    if config.targets and domain.published is not None:
        return domain.published
    place = len(domain.labels), domain.environment, config.split_seed
    return split(*place) if config.targets else in_domain_split(*place)[:2]


def training_images(config: Config, benchmark: Benchmark) -> tuple[int, int]:
    """How many images all source domains train on, and how many such domains there are."""
    sources = benchmark.sources(config.targets)
    return sum(len(split_of(domain, config)[0]) for domain in sources), len(sources)


def sample(seed: int, update: int, environment: int, count: int, size: int) -> np.ndarray:
    """`size` positions in 0..count-1, drawn with replacement by a counter-based generator."""
    stream = np.random.Philox(key=[seed, environment], counter=[0, 0, 0, update])
    return np.random.Generator(stream).integers(count, size=size)


def evaluation_batches(benchmark: Benchmark, domain: int, positions: np.ndarray) -> list[list[Keys]]:
    """The images of a domain at `positions`, which may be none, in batches of about the same size."""
    size = min(EVALUATION_BATCH, max(1, EVALUATION_BYTES // math.prod(benchmark.inputs.shape)))
    count = -(-len(positions) // size)
    return [[Keys(domain, part)] for part in np.array_split(positions, count)] if count else []


class RunImages:
    """All images of a run from update `begin` on, in the order in which it asks for them: its workers go on with the
    next minibatches while it evaluates, and the other way round.

    sets: what an evaluation measures, as `evaluation_sets` returns it. owes_evaluation: whether the run begins with the
    evaluation after update `begin` - 1. evaluations: how many networks are judged after an update.
    """

    def __init__(
        self,
        config: Config,
        benchmark: Benchmark,
        fabric: Fabric,
        sets: Mapping[str, tuple[int, np.ndarray]],
        begin: int,
        owes_evaluation: bool,
        evaluations: Callable[[int], int] = lambda update: 1,
    ):
        self._config, self._benchmark, self._fabric, self._sets = config, benchmark, fabric, sets
        self._sources = [benchmark.index(domain.name) for domain in benchmark.sources(config.targets)]
        self._training = {i: split_of(benchmark.domains[i], config)[0] for i in self._sources}
        order = self._order(begin, owes_evaluation, evaluations)
        self._loaded = load(benchmark, order, config.seed, config.workers, fabric.device.type == "cuda")

    def minibatches(self, waiting: Waiting) -> Minibatches:
        """Those of the next update; a data-parallel process gets its share of each. `waiting()` is entered until they
        are decoded."""
        failure: UnreadableImage | WorkerLost | None = None
        batches: Minibatches = []
        try:
            batches = self._next(waiting)
        except (UnreadableImage, WorkerLost) as error:
            failure = error
        raise_in_all(failure, self._fabric)
        return batches

    def evaluation(self, name: str, waiting: Waiting) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and classes of the next set of an evaluation, this process's share of them, in batches."""
        for _ in self._batches_of(name):
            yield from self._next(waiting)

    def _next(self, waiting: Waiting) -> Minibatches:
        """On the device, where bytes become floats: they are a quarter of what has to go there."""
        with waiting():
            decoded = next(self._loaded)
        moved = ([self._fabric.to_device(part) for part in pair] for pair in decoded)
        return [(self._benchmark.inputs.for_network(images), classes) for images, classes in moved]

    def _order(self, begin: int, owes_evaluation: bool, evaluations: Callable[[int], int]) -> Iterator[list[Keys]]:
        evaluation = [batch for name in self._sets for batch in self._batches_of(name)]
        if owes_evaluation:
            yield from evaluation * evaluations(begin - 1)
        for update in range(begin, self._config.updates):
            yield self._keys(update)
            if update % self._config.eval_every == 0:
                yield from evaluation * evaluations(update)

    def _keys(self, update: int) -> list[Keys]:
        seed, size = self._config.seed, self._config.batch_size
        places = np.arange(size)[self._fabric.global_rank :: self._fabric.world_size]  # of this process's share
        keys = []
        for i in self._sources:
            training = self._training[i]
            drawn = sample(seed, update, self._benchmark.domains[i].environment, len(training), size)
            keys.append(Keys(i, training[drawn[places]], update, places))
        return keys

    def _batches_of(self, name: str) -> list[list[Keys]]:
        domain, positions = self._sets[name]
        return evaluation_batches(
            self._benchmark, domain, positions[self._fabric.global_rank :: self._fabric.world_size]
        )

    def close(self) -> None:
        """Ends the workers."""
        self._loaded.close()
