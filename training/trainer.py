"""The training loop: leave-one-domain-out, as DomainBed and SWAD define it, with exact resume.

Every random choice of update t is a pure function of (seed, t), so a run that was killed and started again writes the
same bits as one that was not: there is no state of a generator or a loader to restore.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.terminal import note
from qdeploy.training.algorithms import ALGORITHMS, ERM, Minibatches
from qdeploy.training.config import Config, differences
from qdeploy.training.domains import Benchmark
from qdeploy.training.processes import Interrupted, alone_of_all, by_first, signals_received
from qdeploy.training.progress import Progress, progress_of_run
from qdeploy.training.quantize import quantize_like_
from qdeploy.training.run_files import (
    CHECKPOINT,
    DONE,
    MODEL,
    append_log,
    check_record,
    check_same_run,
    is_untidy,
    read_done,
    read_state,
    restore_done,
    sound,
    write_done,
    write_log,
    write_state,
)
from qdeploy.training.start import build_network, seed_hash

HOLDOUT = 0.2  # share of each domain that is kept for validation
EVALUATION_BATCH = 256


def split(count: int, environment: int, split_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions for training (80%) and validation (20%) of a domain of `count` images, the very split of DomainBed."""
    keys = list(range(count))
    np.random.RandomState(seed_hash(split_seed, environment)).shuffle(keys)
    held_out = int(HOLDOUT * count)
    return np.array(keys[held_out:]), np.array(keys[:held_out])


def sample(seed: int, update: int, domain: int, count: int, size: int) -> np.ndarray:
    """`size` positions in 0..count-1, drawn with replacement by a counter-based generator."""
    stream = np.random.Philox(key=[seed, domain], counter=[0, 0, 0, update])
    return np.random.Generator(stream).integers(count, size=size)


def select(records: list[dict], first: int) -> dict | None:
    """Training-domain validation: the first record with the highest mean accuracy over the source domains' validation
    images, among those at or after update `first` (an earlier record is of a network that was not quantized yet)."""
    eligible = [record for record in records if record["update"] >= first]
    return max(eligible, key=lambda record: record["validation"], default=None)


class MinibatchLoader:
    """The minibatches of any update, loaded one update ahead on a thread of its own."""

    def __init__(self, config: Config, benchmark: Benchmark, fabric: Fabric):
        self._config, self._benchmark, self._fabric = config, benchmark, fabric
        target = benchmark.index(config.test_domain)
        sizes = {i: len(domain.labels) for i, domain in enumerate(benchmark.domains) if i != target}
        self._keys = {i: split(size, i, config.split_seed)[0] for i, size in sizes.items()}
        self._executor = ThreadPoolExecutor(1)
        self._next: tuple[int, Future] | None = None

    def at(self, update: int) -> Minibatches:
        """The minibatches of update `update`, on the device; a data-parallel process gets its share of each."""
        ahead = self._next
        batches = ahead[1].result() if ahead and ahead[0] == update else self._load(update)
        self._next = (update + 1, self._executor.submit(self._load, update + 1))
        return [(self._fabric.to_device(images), self._fabric.to_device(classes)) for images, classes in batches]

    def _load(self, update: int) -> Minibatches:
        batches = []
        for i, keys in self._keys.items():
            domain = self._benchmark.domains[i]
            drawn = sample(self._config.seed, update, i, len(keys), self._config.batch_size)
            mine = keys[drawn[self._fabric.global_rank :: self._fabric.world_size]]
            images = domain.batch(mine, augment=(self._config.seed, update, i))
            batches.append((images, torch.from_numpy(domain.labels[mine])))
        return batches

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


def evaluation_sets(config: Config, benchmark: Benchmark) -> dict[str, tuple[int, np.ndarray]]:
    """What an evaluation measures: {name: (domain, positions)}. The validation images of every source domain, and both
    parts of the held-out domain, whose 80% part is the number that is reported."""
    target = benchmark.index(config.test_domain)
    sets = {}
    for i, domain in enumerate(benchmark.domains):
        training, validation = split(len(domain.labels), i, config.split_seed)
        if not len(validation):
            raise InputError(f"expected 5 or more images, got {len(domain.labels)} - at domain `{domain.name}`")
        if i == target:
            sets[f"{domain.name}_in"] = (i, training)
        sets[f"{domain.name}_out"] = (i, validation)
    return sets


def apply(
    function: Callable[[Tensor], Tensor],
    benchmark: Benchmark,
    domain: int,
    positions: np.ndarray,
    waiting: Callable[[], AbstractContextManager] = nullcontext,
) -> Tensor:
    """What `function` makes of images of a domain, batch by batch; on the CPU, [len(positions), ...].

    While it works on a batch the next one is loaded; the time that this takes longer is spent in `waiting()`.
    """
    parts = np.array_split(positions, -(-len(positions) // EVALUATION_BATCH))
    results = []
    with ThreadPoolExecutor(1) as loader:
        ahead = loader.submit(benchmark.domains[domain].batch, parts[0])
        for following in [*parts[1:], None]:
            with waiting():
                images = ahead.result()
            if following is not None:
                ahead = loader.submit(benchmark.domains[domain].batch, following)
            results.append(function(images).cpu())
    return torch.cat(results)


def _evaluate(
    predict: Callable[[Tensor], Tensor], config: Config, benchmark: Benchmark, fabric: Fabric, progress: Progress
) -> dict:
    accuracy = {}
    sets = evaluation_sets(config, benchmark)
    total = sum(len(positions) for _, positions in sets.values())

    def classes_of(images: Tensor) -> Tensor:
        classes = predict(fabric.to_device(images)).argmax(1)
        progress.evaluated(len(images), total)
        return classes

    for name, (domain, positions) in sets.items():
        mine = positions[fabric.global_rank :: fabric.world_size]
        shown = mine if len(mine) else positions[:1]  # for a process without a share
        classes = apply(classes_of, benchmark, domain, shown, progress.waiting)[: len(mine)]
        right = (classes == torch.from_numpy(benchmark.domains[domain].labels[mine])).sum()
        accuracy[name] = _reduced(right, "sum", fabric) / len(positions)
    sources = [d.name for d in benchmark.domains if d.name != config.test_domain]
    validation = sum(accuracy[f"{name}_out"] for name in sources) / len(sources)
    return {"validation": validation, "test": accuracy[f"{config.test_domain}_in"], "accuracy": accuracy}


@dataclass
class _State:
    """Where a run stands, beside its algorithm: what the checkpoint holds."""

    update: int = 0  # the next one
    records: list[dict] = field(default_factory=list)
    best: dict[str, Tensor] | None = None  # the network at the selected record
    losses: list[float] = field(default_factory=list)  # since the last evaluation
    changed: dict[str, Any] = field(default_factory=dict)  # settings that changed since then: [old, new]

    def owes_evaluation(self, config: Config) -> bool:
        """Whether the evaluation after the last update is still to be made."""
        last = self.update - 1
        evaluated = self.records[-1]["update"] if self.records else -1
        return last > evaluated and last % config.eval_every == 0

    def add(self, record: dict[str, Any], config: Config, net: nn.Module) -> None:
        """After an evaluation."""
        if self.changed:
            record["changed"], self.changed = self.changed, {}
        self.losses.clear()
        self.records.append(record)
        if select(self.records, _first_eligible(config)) is record:
            self.best = {key: value.detach().clone() for key, value in net.state_dict().items()}

    def check(self, config: Config, net: nn.Module) -> None:
        """Raise what comes unless a run of `config` can go on from here with `net`."""
        for record in self.records:
            check_record(record)
        selected = select(self.records, _first_eligible(config))
        shapes = _shapes(net.state_dict()) if selected else None
        best = None if self.best is None else _shapes(self.best)
        if not 0 < self.update <= config.updates or best != shapes or not math.isfinite(sum(self.losses)):
            raise ValueError(self.update)


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {key: getattr(value, "shape", None) for key, value in state.items()}


def run(
    config: Config,
    benchmark: Benchmark,
    directory: Path,
    fabric: Fabric,
    before_updates: Callable[[bool], object] = lambda begun: None,
) -> dict:
    """Trains one network and returns its selected record; continues what an earlier process began in `directory`.

    Writes log.jsonl (a line for every evaluation), checkpoint.pt (at every evaluation, on SIGINT and on SIGTERM), and
    when it is finished model.pt (the selected state, for `load_trained`) and done.json (its record); a finished run
    returns at once. `before_updates` is called in the first process when all is ready for the next update, with whether
    earlier ones are made.

    Raises:
        InputError: a setting that does not fit the data, another run in `directory`, or a loss that is not finite.
        Interrupted: a signal came; everything up to it is in the checkpoint.
    """
    selected = _finished(config, directory)
    if selected is None or is_untidy(directory):
        with alone_of_all(directory, fabric):  # another process may have finished it until here
            selected = _finished(config, directory) or _run(config, benchmark, directory, fabric, before_updates)
            if fabric.is_global_zero:
                (directory / CHECKPOINT).unlink(missing_ok=True)
    return selected


def _finished(config: Config, directory: Path) -> dict | None:
    """The selected record of a finished run."""
    done = read_done(directory) or restore_done(directory)
    if done is None:
        return None
    check_same_run(done[0], config, directory / DONE)
    return done[1]


def _run(
    config: Config, benchmark: Benchmark, directory: Path, fabric: Fabric, before_updates: Callable[[bool], object]
) -> dict:
    algorithm = ALGORITHMS[config.algorithm](build_network(config, benchmark), config, fabric)
    minibatches = MinibatchLoader(config, benchmark, fabric)
    try:
        state = _resume(directory, config, algorithm)
        by_first(fabric, lambda: before_updates(state.update > 0))
        if fabric.is_global_zero:
            write_log(directory, state.records)
        _train(config, benchmark, directory, fabric, algorithm, minibatches, state)
    finally:
        minibatches.close()
    selected = select(state.records, _first_eligible(config))
    assert selected is not None  # `resolve` lets no run end before an evaluation that may be selected
    if fabric.is_global_zero:
        write_state(directory / MODEL, config, {"net": state.best, "selected": selected})
        write_done(directory, config, selected)
    fabric.barrier()
    return selected


def _train(
    config: Config,
    benchmark: Benchmark,
    directory: Path,
    fabric: Fabric,
    algorithm: ERM,
    minibatches: MinibatchLoader,
    state: _State,
) -> None:
    """Makes the updates that `state` still lacks; raises Interrupted after a checkpoint."""
    began = time.perf_counter()
    with signals_received() as signals, progress_of_run(config, state.update, fabric) as progress:
        while state.update < config.updates or state.owes_evaluation(config):
            if not state.owes_evaluation(config):
                update = state.update
                with _saved(directory, config, algorithm, state, fabric), progress.waiting():
                    batches = minibatches.at(update)
                torch.manual_seed(seed_hash(config.seed, update, fabric.global_rank))  # dropout and the like
                loss = algorithm.update(update, batches).item()
                if not math.isfinite(loss):
                    raise InputError(f"expected a finite loss, got {loss}: lower --lr - at update {update}")
                state.losses.append(loss)
                state.update = update + 1
                progress.updated(sum(len(classes) for _, classes in batches))
            if evaluated := state.owes_evaluation(config):
                with _saved(directory, config, algorithm, state, fabric):
                    found = _evaluate(algorithm.predict, config, benchmark, fabric, progress)
                record: dict[str, Any] = {"update": state.update - 1, "quantized": algorithm.quantized}
                record |= {"loss": statistics.fmean(state.losses), **found}
                record["seconds"] = round(time.perf_counter() - began, 3)
                state.add(record, config, algorithm.net)
                if fabric.is_global_zero:
                    append_log(directory, record)
                progress.recorded(record)
            signum = _agreed(signals, fabric)
            if evaluated or signum:
                _checkpoint(directory, config, algorithm, state, fabric)
            if signum:
                raise Interrupted(signum, state.update, directory)


@contextmanager
def _saved(directory: Path, config: Config, algorithm: ERM, state: _State, fabric: Fabric) -> Iterator[None]:
    """An image that cannot be read ends the process, not the run: it goes on from here when the file is whole again.

    Of several processes the others do not know, and cannot save; then the last checkpoint stays.
    """
    try:
        yield
    except InputError:
        if state.update and fabric.world_size == 1:
            _checkpoint(directory, config, algorithm, state, fabric)
            note(str(Interrupted(0, state.update, directory)))
        raise


def _first_eligible(config: Config) -> int:
    return config.quantize_at if config.algorithm == "qt-dog" else 0


def _checkpoint(directory: Path, config: Config, algorithm: ERM, state: _State, fabric: Fabric) -> None:
    if fabric.is_global_zero:
        write_state(directory / CHECKPOINT, config, {"algorithm": algorithm.state_dict(), **vars(state)})
    fabric.barrier()


def _resume(directory: Path, config: Config, algorithm: ERM) -> _State:
    """The state of the checkpoint in `directory`, loaded into the algorithm too, or a new one."""
    path = directory / CHECKPOINT
    if not path.exists():
        return _State()
    old, saved = read_state(path)
    check_same_run(old, config, path)
    with sound(path):
        if old.updates >= saved["update"] > config.updates:
            expected = f"at least {saved['update']} updates, which are made"
            raise InputError(f"expected {expected}, got {config.updates} at --updates - at {path}")
        algorithm.load_state_dict(saved["algorithm"])
        state = _State(**{entry.name: saved[entry.name] for entry in fields(_State)})
        state.check(config, algorithm.net)
    for key, (was, now) in differences(old, config).items():
        state.changed[key] = [was, now]
        note(f"seed {config.seed} goes on from update {state.update} with {key}={now!r} instead of {was!r}")
    return state


def load_trained(directory: Path, benchmark: Benchmark) -> nn.Module:
    """The selected network of a finished run, in eval mode on the CPU, quantizers attached."""
    config, state = read_state(directory / MODEL)
    net = build_network(replace(config, weights=None), benchmark)
    with sound(directory / MODEL):
        if config.algorithm == "qt-dog":
            quantize_like_(net, state["net"])
        else:
            net.load_state_dict(state["net"])
    return net.eval()


def calibration_images(config: Config, benchmark: Benchmark, count: int) -> Tensor:
    """The first `count` validation images of each source domain, not augmented: f32 [n, C, H, W]."""
    target = benchmark.index(config.test_domain)
    images = []
    for i, domain in enumerate(benchmark.domains):
        if i != target:
            images.append(domain.batch(split(len(domain.labels), i, config.split_seed)[1][:count]))
    return torch.cat(images)


def _agreed(signals: list[int], fabric: Fabric) -> int:
    """The signal that any process received, or 0: all stop after the same update."""
    signum = signals[0] if signals else 0
    if fabric.world_size == 1:
        return signum
    return _reduced(torch.tensor(signum, device=fabric.device), "max", fabric)


def _reduced(number: Tensor, how: str, fabric: Fabric) -> int:
    """Of all processes together."""
    reduced: Any = fabric.all_reduce(number, reduce_op=how)
    return int(reduced)
