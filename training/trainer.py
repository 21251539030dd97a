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

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.terminal import note
from qdeploy.training.attached_quantizers import quantizers
from qdeploy.training.config import Config, differences, made, resolve
from qdeploy.training.decoding import UnreadableImage
from qdeploy.training.domains import Benchmark
from qdeploy.training.evaluation import Evaluator, evaluation_sets, select
from qdeploy.training.fingerprint import network_hash, with_any_size
from qdeploy.training.learner import Learner
from qdeploy.training.loader import WorkerLost
from qdeploy.training.methods import scales
from qdeploy.training.methods.batches import Minibatches
from qdeploy.training.minibatches import RunImages
from qdeploy.training.processes import Interrupted, alone_of_all, by_first, reduced, signals_received
from qdeploy.training.progress import Progress, progress_of_run
from qdeploy.training.quantize_finished import quantize_finished
from qdeploy.training.run_files import (
    CHECKPOINT,
    DONE,
    check_record,
    check_same_images,
    check_same_run,
    is_untidy,
    read_done,
    read_state,
    restore_done,
    sound,
    write_state,
)
from qdeploy.training.run_log import run_log
from qdeploy.training.selected_network import reestimated, write_selected
from qdeploy.training.start import build_network


def run(
    config: Config,
    benchmark: Benchmark,
    directory: Path,
    fabric: Fabric,
    before_updates: Callable[[bool], object] = lambda begun: None,
) -> dict:
    """Trains one network and returns its selected record; continues what an earlier process began in `directory`.

    Writes log.jsonl (a line for every evaluation), checkpoint.pt (at every evaluation, when `checkpoint_minutes` are
    over, on SIGINT and on SIGTERM), and when it is finished model.pt (the selected state, for `load_trained`) and
    done.json (its record); a finished run returns at once. `before_updates` is called in the first process when all is
    ready for the next update, with whether earlier ones are made.

    Raises:
        InputError: a setting that does not fit the data, another run in `directory`, or a loss that is not finite.
        Interrupted: a signal came; everything up to it is in the checkpoint.
    """
    resolve(replace(config, devices=fabric.world_size))  # a batch that the processes divide, whoever made them
    config = resolve(config)
    selected = _finished(config, benchmark, directory)
    if selected is None or is_untidy(directory):
        with alone_of_all(directory, fabric):  # another process may have finished it until here
            selected = _finished(config, benchmark, directory)
            selected = selected or _made(config, benchmark, directory, fabric, before_updates)
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


def _made(
    config: Config, benchmark: Benchmark, directory: Path, fabric: Fabric, before_updates: Callable[[bool], object]
) -> dict:
    if made(config, "quantization").of_finished_runs:
        by_first(fabric, lambda: before_updates(False))
        return quantize_finished(config, benchmark, directory, fabric)
    return _Run(config, benchmark, directory, fabric).made(before_updates)


@dataclass
class _State:
    """Where a run stands, beside its learner: what the checkpoint holds."""

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
        if self.selected(config) is record:
            self.best = {key: value.detach().clone() for key, value in net.state_dict().items()}

    def selected(self, config: Config) -> dict | None:
        """The record of the network that the run would keep if it ended here."""
        return select(self.records, config.selection, config.targets)

    def check(self, config: Config, net: nn.Module) -> None:
        """Raise what comes unless a run of `config` can go on from here with `net`."""
        for record in self.records:
            check_record(record)
        shapes = _shapes(net.state_dict()) if self.selected(config) else None
        best = None if self.best is None else _shapes(self.best)
        if not 0 < self.update <= config.updates or best != shapes or not math.isfinite(sum(self.losses)):
            raise ValueError(self.update)


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {key: getattr(value, "shape", None) for key, value in state.items()}


class _Run:
    """One run in its folder, of which this process has the lock."""

    def __init__(self, config: Config, benchmark: Benchmark, directory: Path, fabric: Fabric):
        self.config, self.benchmark, self.directory, self.fabric = config, benchmark, directory, fabric
        net = build_network(config, benchmark)
        self.initial = network_hash(net)
        self.learner = Learner(net, config, fabric)
        self.state = self._resumed()
        self.saved = time.monotonic()  # the last checkpoint, or this beginning

    def made(self, before_updates: Callable[[bool], object]) -> dict:
        """Makes what is left of the run; returns its selected record."""
        config, state = self.config, self.state
        by_first(self.fabric, lambda: before_updates(state.update > 0))
        if self.fabric.is_global_zero and self.learner.step.has_windows:
            scales.begin(self.directory, state.update)
        sets, owes = evaluation_sets(config, self.benchmark), state.owes_evaluation(config)
        evaluations = self.learner.evaluations
        images = RunImages(config, self.benchmark, self.fabric, sets, state.update, owes, evaluations)
        with closing(images), signals_received() as signals:
            with (
                run_log(config, self.directory, state.records, self.fabric) as log,
                progress_of_run(config, state.update, self.fabric) as progress,
            ):
                self._train(images, log, progress, signals)
        selected = state.selected(config)
        assert selected is not None and state.best is not None  # `check_setting` lets no run end without
        if config.batch_norm == "re-estimated":
            selected, state.best = reestimated(config, self.benchmark, self.fabric, selected, state.best)
        if self.fabric.is_global_zero:
            write_selected(self.directory, config, self.benchmark, state.best, selected, self.initial)
        self.fabric.barrier()
        return selected

    def _train(self, images: RunImages, log: Callable[[dict], None], progress: Progress, signals: list[int]) -> None:
        """Makes the updates that the state still lacks; raises Interrupted after a checkpoint."""
        config, state = self.config, self.state
        evaluate = Evaluator(config, self.benchmark, self.fabric, images, progress)
        while state.update < config.updates or state.owes_evaluation(config):
            if not state.owes_evaluation(config):
                with self._saved(signals):
                    batches = images.minibatches(progress.waiting)
                self._make_update(batches)
                progress.updated(sum(len(classes) for _, classes in batches))
                self._checkpoint_by_time()
            if evaluated := state.owes_evaluation(config):
                with self._saved(signals):
                    net, found = self._judged(evaluate)
                record = self._recorded(net, found, progress)
                log(record)
                progress.recorded(record)
            signum = _agreed(signals, self.fabric)
            if evaluated or signum:
                self._checkpoint()
            if signum:
                raise Interrupted(signum, state.update, self.directory)

    def _make_update(self, batches: Minibatches) -> None:
        update = self.state.update
        loss = reduced(self.learner.update(update, batches), "mean", self.fabric)
        if not math.isfinite(loss):
            raise InputError(f"expected a finite loss, got {loss}: lower --lr - at update {update}")
        if self.fabric.is_global_zero and (window := self.learner.step.window) is not None:
            scales.append(self.directory, update, self.learner.net, window)
        self.state.losses.append(loss)
        self.state.update = update + 1

    def _judged(self, evaluate: Evaluator) -> tuple[nn.Module, dict]:
        """The network that stands for the run after the last update, and what its evaluation found.

        An average that goes by the losses of the network in training has that one judged first.
        """
        learner, t = self.learner, self.state.update - 1
        before, found = learner.average.state_dict(), {}
        try:
            if learner.average.goes_by_losses:
                found = evaluate(learner.net)
                learner.average.record(t, evaluate.source_losses(found))
            net = learner.candidate(t)
            if learner.evaluations(t) == 2 or not found:
                found = evaluate(net)
        except BaseException:
            learner.average.load_state_dict(before)  # the whole evaluation is to be made again
            raise
        return net, found

    def _recorded(self, net: nn.Module, found: dict, progress: Progress) -> dict[str, Any]:
        t = self.state.update - 1
        learner, loss = self.learner, statistics.fmean(self.state.losses)
        record: dict[str, Any] = {"update": t, "quantized": bool(quantizers(net)), "attached": learner.attached}
        record["eligible"] = learner.eligible(t)
        record |= {"loss": loss, **found, "machine": progress.measured()}
        self.state.add(record, self.config, net)
        return record

    @contextmanager
    def _saved(self, signals: list[int]) -> Iterator[None]:
        """Images that do not come end the process, not the run: it goes on from here when a good copy is there."""
        try:
            yield
        except (UnreadableImage, WorkerLost) as error:  # of several processes in the first one alone
            images = self.benchmark.fingerprint
            if isinstance(error, UnreadableImage):
                images = with_any_size(images, error.file)
            if self.state.update:
                self._save(images)
            stop = Interrupted(signals[0] if signals else 0, self.state.update, self.directory)
            if signals and isinstance(error, WorkerLost):  # SIGTERM went to the workers, too
                raise stop from None
            if self.state.update:
                note(str(stop))
            raise

    def _checkpoint(self) -> None:
        if self.fabric.is_global_zero:
            self._save(self.benchmark.fingerprint)
        self.fabric.barrier()

    def _checkpoint_by_time(self) -> None:
        """By the clock of the first process: no other one is needed, for all stand alike after an update."""
        is_due = time.monotonic() - self.saved >= 60 * self.config.checkpoint_minutes
        if is_due and self.fabric.is_global_zero:
            self._save(self.benchmark.fingerprint)

    def _save(self, images: dict[str, Any]) -> None:
        saved = {"learner": self.learner.state_dict(), "images": images, **vars(self.state)}
        write_state(self.directory / CHECKPOINT, self.config, saved)
        self.saved = time.monotonic()

    def _resumed(self) -> _State:
        """The state of the checkpoint, loaded into the learner too, or a new one."""
        config, path = self.config, self.directory / CHECKPOINT
        if not path.exists():
            return _State()
        old, saved = read_state(path)
        check_same_run(old, config, path)
        check_same_images(saved.get("images"), self.benchmark.fingerprint, path, config.data)
        with sound(path):
            if old.updates >= saved["update"] > config.updates:
                expected = f"at least {saved['update']} updates, which are made"
                raise InputError(f"expected {expected}, got {config.updates} at --updates - at {path}")
            self.learner.load_state_dict(saved["learner"])
            state = _State(**{entry.name: saved[entry.name] for entry in fields(_State)})
            state.check(config, self.learner.net)
        for key, (was, now) in differences(old, config).items():
            state.changed[key] = [was, now]
            note(f"seed {config.seed} goes on from update {state.update} with {key}={now!r} instead of {was!r}")
        return state


def _agreed(signals: list[int], fabric: Fabric) -> int:
    """The signal that any process received, or 0: all stop after the same update."""
    signum = signals[0] if signals else 0
    if fabric.world_size == 1:
        return signum
    return reduced(torch.tensor(signum, device=fabric.device), "max", fabric)
