"""The training loop: leave-one-domain-out, as DomainBed and SWAD define it, with exact resume.

Every random choice of update t is a pure function of (seed, t), so a run that was killed and started again writes the
same bits as one that was not: there is no state of a generator or a loader to restore.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.terminal import note
from qdeploy.training.algorithms import ALGORITHMS, ERM
from qdeploy.training.config import Config, differences, resolve
from qdeploy.training.decoding import UnreadableImage
from qdeploy.training.domains import Benchmark
from qdeploy.training.fingerprint import with_any_size
from qdeploy.training.loader import WorkerLost, load
from qdeploy.training.minibatches import RunImages, evaluation_batches, in_domain_split, split_of
from qdeploy.training.processes import Interrupted, alone_of_all, by_first, raise_in_all, reduced, signals_received
from qdeploy.training.progress import Progress, progress_of_run
from qdeploy.training.quantize_like import quantize_like_
from qdeploy.training.run_files import (
    CHECKPOINT,
    DONE,
    MODEL,
    append_log,
    check_record,
    check_same_images,
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


def select(records: list[dict], first: int) -> dict | None:
    """Training-domain validation: the first record with the highest mean accuracy over the source domains' validation
    images, among those at or after update `first` (an earlier record is of a network that was not quantized yet)."""
    eligible = [record for record in records if record["update"] >= first]
    return max(eligible, key=lambda record: record["validation"], default=None)


def evaluation_sets(config: Config, benchmark: Benchmark) -> dict[str, tuple[int, np.ndarray]]:
    """What an evaluation measures: {name: (domain, positions)}. The validation images of every source domain, and both
    parts of a held-out domain, whose 80% part is the number that is reported; without one the test images of each."""
    targets = {benchmark.index(name) for name in config.targets}
    sets = {}
    for i, domain in enumerate(benchmark.domains):
        training, validation = split_of(domain, config)
        if domain.published is None and not len(validation):
            raise InputError(f"expected 5 or more images, got {len(domain.labels)} - at domain `{domain.name}`")
        if i in targets:
            sets[f"{domain.name}_in"] = (i, training)
        elif not len(validation):
            raise InputError(f"expected {domain.name} held out, which has no images to validate - at --test-domain")
        if len(validation):
            sets[f"{domain.name}_out"] = (i, validation)
        if not targets:
            test = in_domain_split(len(domain.labels), domain.environment, config.split_seed)[2]
            sets[f"{domain.name}_test"] = (i, test)
    return sets


def reported(config: Config, benchmark: Benchmark) -> dict[str, str]:
    """{domain: the evaluation set whose accuracy is its result}."""
    if config.targets:
        return {name: f"{name}_in" for name in config.targets}
    return {domain.name: f"{domain.name}_test" for domain in benchmark.domains}


def apply(
    function: Callable[[Tensor], Tensor],
    benchmark: Benchmark,
    domain: int,
    positions: np.ndarray,
    workers: int = 0,
) -> Tensor:
    """What `function` makes of normalized images of a domain, batch by batch; on the CPU, [len(positions), ...]."""
    with closing(load(benchmark, evaluation_batches(benchmark, domain, positions), 0, workers)) as batches:
        return torch.cat([function(benchmark.normalized(images)).cpu() for [(images, _)] in batches])


def _evaluate(
    predict: Callable[[Tensor], Tensor],
    config: Config,
    benchmark: Benchmark,
    fabric: Fabric,
    images: RunImages,
    progress: Progress,
) -> dict:
    accuracy = {}
    sets = evaluation_sets(config, benchmark)
    total = sum(len(positions) for _, positions in sets.values())
    if fabric.world_size > 1:  # in its first forward pass DDP exchanges the statistics of BatchNorm: all together
        predict(fabric.to_device(torch.zeros(1, *benchmark.input_shape)))
    for name, (_, positions) in sets.items():
        failure: UnreadableImage | WorkerLost | None = None
        right = torch.tensor(0, device=fabric.device)
        try:
            for pixels, classes in images.evaluation(name, progress.waiting):
                right += (predict(pixels).argmax(1) == classes).sum()
                progress.evaluated(len(classes), total)
        except (UnreadableImage, WorkerLost) as error:
            failure = error
        raise_in_all(failure, fabric)
        accuracy[name] = reduced(right, "sum", fabric) / len(positions)
    sources = benchmark.sources(config.targets)
    validation = sum(accuracy[f"{domain.name}_out"] for domain in sources) / len(sources)
    tests = {name: accuracy[part] for name, part in reported(config, benchmark).items()}
    return {"validation": validation, "test": statistics.fmean(tests.values()), "tests": tests, "accuracy": accuracy}


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
    resolve(replace(config, devices=fabric.world_size))  # a batch that the processes divide, whoever made them
    selected = _finished(config, benchmark, directory)
    if selected is None or is_untidy(directory):
        with alone_of_all(directory, fabric):  # another process may have finished it until here
            selected = _finished(config, benchmark, directory)
            selected = selected or _run(config, benchmark, directory, fabric, before_updates)
            if fabric.is_global_zero:
                (directory / CHECKPOINT).unlink(missing_ok=True)
    return selected


def _finished(config: Config, benchmark: Benchmark, directory: Path) -> dict | None:
    """The selected record of a finished run."""
    done = read_done(directory) or restore_done(directory)
    if done is None:
        return None
    check_same_run(done[0], config, directory / DONE)
    check_same_images(done[2], benchmark.fingerprint, directory / DONE, config.data)
    return done[1]


def _run(
    config: Config, benchmark: Benchmark, directory: Path, fabric: Fabric, before_updates: Callable[[bool], object]
) -> dict:
    algorithm = ALGORITHMS[config.algorithm](build_network(config, benchmark), config, fabric)
    state = _resume(directory, config, benchmark, algorithm)
    by_first(fabric, lambda: before_updates(state.update > 0))
    if fabric.is_global_zero:
        write_log(directory, state.records)
    sets = evaluation_sets(config, benchmark)
    with closing(RunImages(config, benchmark, fabric, sets, state.update, state.owes_evaluation(config))) as images:
        _train(config, benchmark, directory, fabric, algorithm, images, state)
    selected = select(state.records, _first_eligible(config))
    assert selected is not None  # `resolve` lets no run end before an evaluation that may be selected
    if fabric.is_global_zero:
        fingerprint = benchmark.fingerprint
        write_state(directory / MODEL, config, {"net": state.best, "selected": selected, "images": fingerprint})
        write_done(directory, config, selected, fingerprint)
    fabric.barrier()
    return selected


def _train(
    config: Config,
    benchmark: Benchmark,
    directory: Path,
    fabric: Fabric,
    algorithm: ERM,
    images: RunImages,
    state: _State,
) -> None:
    """Makes the updates that `state` still lacks; raises Interrupted after a checkpoint."""
    began = time.perf_counter()
    with signals_received() as signals, progress_of_run(config, state.update, fabric) as progress:
        while state.update < config.updates or state.owes_evaluation(config):
            if not state.owes_evaluation(config):
                update = state.update
                with _saved(directory, config, algorithm, benchmark, state, signals):
                    batches = images.minibatches(progress.waiting)
                torch.manual_seed(seed_hash(config.seed, update, fabric.global_rank))  # dropout and the like
                loss = reduced(algorithm.update(update, batches), "mean", fabric)
                if not math.isfinite(loss):
                    raise InputError(f"expected a finite loss, got {loss}: lower --lr - at update {update}")
                state.losses.append(loss)
                state.update = update + 1
                progress.updated(sum(len(classes) for _, classes in batches))
            if evaluated := state.owes_evaluation(config):
                with _saved(directory, config, algorithm, benchmark, state, signals):
                    found = _evaluate(algorithm.predict, config, benchmark, fabric, images, progress)
                record: dict[str, Any] = {"update": state.update - 1, "quantized": algorithm.quantized}
                record |= {"loss": statistics.fmean(state.losses), **found}
                record["seconds"] = round(time.perf_counter() - began, 3)
                state.add(record, config, algorithm.net)
                if fabric.is_global_zero:
                    append_log(directory, record)
                progress.recorded(record)
            signum = _agreed(signals, fabric)
            if evaluated or signum:
                _checkpoint(directory, config, algorithm, benchmark, state, fabric)
            if signum:
                raise Interrupted(signum, state.update, directory)


@contextmanager
def _saved(
    directory: Path, config: Config, algorithm: ERM, benchmark: Benchmark, state: _State, signals: list[int]
) -> Iterator[None]:
    """Images that do not come end the process, not the run: it goes on from here when a good copy is there."""
    try:
        yield
    except (UnreadableImage, WorkerLost) as error:  # of several processes in the first one alone
        images = benchmark.fingerprint
        if isinstance(error, UnreadableImage):
            images = with_any_size(images, error.file)
        if state.update:
            _save(directory, config, algorithm, images, state)
        stop = Interrupted(signals[0] if signals else 0, state.update, directory)
        if signals and isinstance(error, WorkerLost):  # SIGTERM went to the workers, too
            raise stop from None
        if state.update:
            note(str(stop))
        raise


def _first_eligible(config: Config) -> int:
    return config.quantize_at if config.algorithm == "qt-dog" else 0


def _checkpoint(
    directory: Path, config: Config, algorithm: ERM, benchmark: Benchmark, state: _State, fabric: Fabric
) -> None:
    if fabric.is_global_zero:
        _save(directory, config, algorithm, benchmark.fingerprint, state)
    fabric.barrier()


def _save(directory: Path, config: Config, algorithm: ERM, images: dict[str, Any], state: _State) -> None:
    saved = {"algorithm": algorithm.state_dict(), "images": images, **vars(state)}
    write_state(directory / CHECKPOINT, config, saved)


def _resume(directory: Path, config: Config, benchmark: Benchmark, algorithm: ERM) -> _State:
    """The state of the checkpoint in `directory`, loaded into the algorithm too, or a new one."""
    path = directory / CHECKPOINT
    if not path.exists():
        return _State()
    old, saved = read_state(path)
    check_same_run(old, config, path)
    check_same_images(saved.get("images"), benchmark.fingerprint, path, config.data)
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
    check_same_images(state.get("images"), benchmark.fingerprint, directory / MODEL, config.data)
    net = build_network(replace(config, weights=None), benchmark)
    with sound(directory / MODEL):
        if config.algorithm == "qt-dog":
            quantize_like_(net, state["net"])
        else:
            net.load_state_dict(state["net"])
    return net.eval()


def calibration_images(config: Config, benchmark: Benchmark, count: int) -> Tensor:
    """The first `count` validation images of each source domain, not augmented: f32 [n, C, H, W]."""
    sources = benchmark.sources(config.targets)
    return benchmark.normalized(torch.cat([domain.batch(split_of(domain, config)[1][:count]) for domain in sources]))


def _agreed(signals: list[int], fabric: Fabric) -> int:
    """The signal that any process received, or 0: all stop after the same update."""
    signum = signals[0] if signals else 0
    if fabric.world_size == 1:
        return signum
    return reduced(torch.tensor(signum, device=fabric.device), "max", fabric)
