"""The training loop: leave-one-domain-out, as DomainBed and SWAD define it, with exact resume.

Every random choice of update t is a pure function of (seed, t), so a run that was killed and started again writes the
same bits as one that was not: there is no state of a generator or a loader to restore.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.files import atomic_file, named_errors
from qdeploy.memory import check_memory
from qdeploy.networks.quantizable import classifier
from qdeploy.terminal import note, on_terminal, progress
from qdeploy.training.algorithms import ALGORITHMS, ERM, Minibatches, attach_quantizers
from qdeploy.training.config import Config, resolve
from qdeploy.training.domains import ArrayDomain, Benchmark, FolderDomain, Outline
from qdeploy.training.images import UnreadableImage
from qdeploy.training.models import MODELS
from qdeploy.training.run_files import (
    CHECKPOINT,
    DONE,
    LOG,
    MODEL,
    check_record,
    check_same_images,
    check_same_run,
    forgive_size,
    read_done,
    read_state,
    sound,
    write_done,
    write_state,
)

HOLDOUT = 0.2  # share of each domain that is kept for validation
EVALUATION_BATCH = 256


class Interrupted(Exception):
    """A signal stopped the run after a checkpoint; `signum` is its number."""

    def __init__(self, signum: int, update: int, directory: Path):
        super().__init__(f"stopped before update {update}: run the same command again to continue - at {directory}")
        self.signum = signum


def seed_hash(*args: object) -> int:
    """DomainBed's seed of a tuple: its md5 modulo 2^31."""
    return int(hashlib.md5(str(args).encode()).hexdigest(), 16) % 2**31


def split(count: int, environment: int, split_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions for training (80%) and validation (20%) of a domain of `count` images, the very split of DomainBed."""
    keys = list(range(count))
    np.random.RandomState(seed_hash(split_seed, environment)).shuffle(keys)
    held_out = int(HOLDOUT * count)
    return np.array(keys[held_out:]), np.array(keys[:held_out])


def split_of(domain: ArrayDomain | FolderDomain, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The training and validation positions of a domain in a run."""
    return split(len(domain.labels), domain.environment, config.split_seed)


def sample(seed: int, update: int, environment: int, count: int, size: int) -> np.ndarray:
    """`size` positions in 0..count-1, drawn with replacement by a counter-based generator."""
    stream = np.random.Philox(key=[seed, environment], counter=[0, 0, 0, update])
    return np.random.Generator(stream).integers(count, size=size)


def select(records: list[dict], first: int) -> dict | None:
    """Training-domain validation: the first record with the highest mean accuracy over the source domains' validation
    images, among those at or after update `first` (an earlier record is of a network that was not quantized yet)."""
    eligible = [record for record in records if record["update"] >= first]
    return max(eligible, key=lambda record: record["validation"], default=None)


def build_network(config: Config, benchmark: Benchmark | Outline) -> nn.Module:
    """The network of a run at its start: seeded random weights, or the pretrained ones with a new classifier."""
    if config.model not in MODELS:
        raise InputError(f"expected one of {', '.join(MODELS)}, got {config.model!r} - at --model")
    torch.manual_seed(seed_hash(config.seed, "weights"))
    net = MODELS[config.model](len(benchmark.classes), in_channels=benchmark.input_shape[0])
    if config.weights is not None:
        _load_pretrained(net, Path(config.weights))
    return net


def check_setting(config: Config, outline: Outline) -> None:
    """Raise InputError where a run would: two domains, the one held out, the network and its weights, images that it
    can take, and a batch that fits the memory."""
    if len(outline.domains) < 2:
        raise InputError(f"expected two or more domains, got {len(outline.domains)} - at --domains")
    outline.index(config.test_domain)
    shape, images = outline.input_shape, config.batch_size * (len(outline.domains) - 1)
    check_memory(2 * 4 * images * math.prod(shape), f"{images} images", "--batch-size")  # one update is loaded ahead
    net = build_network(config, outline).to("meta").train(config.weights is None)
    try:
        net(torch.empty(images // config.devices, *shape, device="meta"))
    except (RuntimeError, ValueError) as error:
        got = f"{images // config.devices} of {list(shape)}: {str(error).splitlines()[0]}"
        raise InputError(f"expected images that {config.model} can take, got {got} - at --image-size") from error


def _load_pretrained(net: nn.Module, path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what torch takes a damaged file for
                state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError(type(state).__name__)
    except OSError as error:
        raise InputError(f"expected a file of weights, got {error.strerror or error} - at {path}") from error
    except Exception as error:  # the two readers have many
        raise InputError(f"expected a file of weights, got another or a damaged one - at {path}") from error
    last = classifier(net)
    own = {key: value for key, value in net.state_dict().items() if key.startswith(f"{last}.")}
    try:
        net.load_state_dict(state | own)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise InputError(f"expected the weights of a {type(net).__name__}, got {said[:300]} - at {path}") from error


class MinibatchLoader:
    """The minibatches of any update, loaded one update ahead on a thread of its own."""

    def __init__(self, config: Config, benchmark: Benchmark, fabric: Fabric):
        self._config, self._fabric = config, fabric
        self._sources = benchmark.sources(config.test_domain)
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
        _raise_everywhere(failure, self._fabric)
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


def evaluation_sets(config: Config, benchmark: Benchmark) -> dict[str, tuple[int, np.ndarray]]:
    """What an evaluation measures: {name: (domain, positions)}. The validation images of every source domain, and both
    parts of the held-out domain, whose 80% part is the number that is reported."""
    target = benchmark.index(config.test_domain)
    sets = {}
    for i, domain in enumerate(benchmark.domains):
        training, validation = split_of(domain, config)
        if not len(validation):
            raise InputError(f"expected 5 or more images, got {len(domain.labels)} - at domain `{domain.name}`")
        if i == target:
            sets[f"{domain.name}_in"] = (i, training)
        sets[f"{domain.name}_out"] = (i, validation)
    return sets


def apply(function: Callable[[Tensor], Tensor], benchmark: Benchmark, domain: int, positions: np.ndarray) -> Tensor:
    """What `function` makes of images of a domain, batch by batch; on the CPU, [len(positions), ...]."""
    parts = np.array_split(positions, -(-len(positions) // EVALUATION_BATCH))
    return torch.cat([function(benchmark.domains[domain].batch(part)).cpu() for part in parts])


def _evaluate(predict: Callable[[Tensor], Tensor], config: Config, benchmark: Benchmark, fabric: Fabric) -> dict:
    accuracy = {}
    if fabric.world_size > 1:  # in its first forward pass DDP exchanges the statistics of BatchNorm: all together
        predict(fabric.to_device(torch.zeros(1, *benchmark.input_shape)))
    for name, (domain, positions) in evaluation_sets(config, benchmark).items():
        mine = positions[fabric.global_rank :: fabric.world_size]
        failure, right = None, torch.tensor(0)
        try:
            if len(mine):
                logits = apply(lambda images: predict(fabric.to_device(images)), benchmark, domain, mine)
                right = (logits.argmax(1) == torch.from_numpy(benchmark.domains[domain].labels[mine])).sum()
        except UnreadableImage as error:
            failure = error
        _raise_everywhere(failure, fabric)
        accuracy[name] = _reduced(right, "sum", fabric) / len(positions)
    sources = benchmark.sources(config.test_domain)
    validation = sum(accuracy[f"{domain.name}_out"] for domain in sources) / len(sources)
    return {"validation": validation, "test": accuracy[f"{config.test_domain}_in"], "accuracy": accuracy}


@dataclass
class _State:
    """Where a run stands, beside its algorithm: what the checkpoint holds."""

    update: int = 0  # the next one
    records: list[dict] = field(default_factory=list)
    best: dict[str, Tensor] | None = None  # the network at the selected record
    losses: list[float] = field(default_factory=list)  # since the last evaluation

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


def run(config: Config, benchmark: Benchmark, directory: Path, fabric: Fabric) -> dict:
    """Trains one network and returns its selected record; continues what an earlier process began in `directory`.

    Writes log.jsonl (a line for every evaluation), checkpoint.pt (at every evaluation, on SIGINT and on SIGTERM), and
    when it is finished model.pt (the selected state, for `load_trained`) and done.json (its record); a finished run
    returns at once.

    Raises:
        InputError: a setting that does not fit the data, another run in `directory`, or a loss that is not finite.
        Interrupted: a signal came; everything up to it is in the checkpoint.
    """
    resolve(replace(config, devices=fabric.world_size))  # a batch that the processes divide, whoever made them
    if (done := read_done(directory)) is not None:
        check_same_run(done[0], config, directory / DONE)
        check_same_images(done[2], benchmark.fingerprint, directory / DONE, config.data)
        return done[1]
    algorithm = ALGORITHMS[config.algorithm](build_network(config, benchmark), config, fabric)
    minibatches = MinibatchLoader(config, benchmark, fabric)
    try:
        state = _resume(directory, config, algorithm, benchmark, minibatches)
        _write_log(directory, state.records, fabric)
        _train(config, benchmark, directory, fabric, algorithm, minibatches, state)
    except UnreadableImage as error:
        if fabric.is_global_zero:
            forgive_size(directory, error.file)  # of the good copy
        raise
    finally:
        minibatches.close()
    selected = select(state.records, _first_eligible(config))
    assert selected is not None  # `resolve` lets no run end before an evaluation that may be selected
    if fabric.is_global_zero:
        write_state(directory / MODEL, config, {"net": state.best, "images": benchmark.fingerprint})
        write_done(directory, config, selected, benchmark.fingerprint)
        (directory / CHECKPOINT).unlink(missing_ok=True)
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
    with _signals() as signals, _progress(config, state.update, fabric) as show:
        for update in range(state.update, config.updates):
            torch.manual_seed(seed_hash(config.seed, update, fabric.global_rank))  # dropout and the like
            loss = _reduced(algorithm.update(update, minibatches.at(update)), "mean", fabric)
            if not math.isfinite(loss):
                raise InputError(f"expected a finite loss, got {loss}: lower --lr - at update {update}")
            state.losses.append(loss)
            state.update = update + 1
            record: dict[str, Any] | None = None
            if update % config.eval_every == 0:
                record = {"update": update, "quantized": algorithm.quantized, "loss": statistics.fmean(state.losses)}
                record |= _evaluate(algorithm.predict, config, benchmark, fabric)
                record["seconds"] = round(time.perf_counter() - began, 3)
                state.losses.clear()
                _append_log(directory, record, fabric)
                state.records.append(record)
                if select(state.records, _first_eligible(config)) is record:
                    state.best = {key: value.detach().clone() for key, value in algorithm.net.state_dict().items()}
            show(record)
            signum = _agreed(signals, fabric)
            if record or signum:
                _checkpoint(directory, config, algorithm, benchmark, state, fabric)
            if signum:
                raise Interrupted(signum, state.update, directory)


def _first_eligible(config: Config) -> int:
    return config.quantize_at if config.algorithm == "qt-dog" else 0


def _checkpoint(
    directory: Path, config: Config, algorithm: ERM, benchmark: Benchmark, state: _State, fabric: Fabric
) -> None:
    if fabric.is_global_zero:
        saved = {"algorithm": algorithm.state_dict(), "images": benchmark.fingerprint, **vars(state)}
        write_state(directory / CHECKPOINT, config, saved)
    fabric.barrier()


def _resume(
    directory: Path, config: Config, algorithm: ERM, benchmark: Benchmark, minibatches: MinibatchLoader
) -> _State:
    """The state of the checkpoint in `directory`, loaded into the algorithm too, or a new one."""
    path = directory / CHECKPOINT
    if not path.exists():
        return _State()
    old, saved = read_state(path)
    check_same_run(old, config, path)
    check_same_images(saved.get("images"), benchmark.fingerprint, path, config.data)
    batches = minibatches.at(config.quantize_at)
    with sound(path):
        algorithm.load_state_dict(saved["algorithm"], batches)
        state = _State(**{entry.name: saved[entry.name] for entry in fields(_State)})
        state.check(config, algorithm.net)
    return state


def load_trained(directory: Path, benchmark: Benchmark) -> nn.Module:
    """The selected network of a finished run, in eval mode on the CPU, quantizers attached."""
    config, state = read_state(directory / MODEL)
    check_same_images(state.get("images"), benchmark.fingerprint, directory / MODEL, config.data)
    net = build_network(config, benchmark)
    if config.algorithm == "qt-dog":
        attach_quantizers(net, config, [calibration_images(config, benchmark, 8)])
    with sound(directory / MODEL):
        net.load_state_dict(state["net"])
    return net.eval()


def calibration_images(config: Config, benchmark: Benchmark, count: int) -> Tensor:
    """The first `count` validation images of each source domain, not augmented: f32 [n, C, H, W]."""
    sources = benchmark.sources(config.test_domain)
    return torch.cat([domain.batch(split_of(domain, config)[1][:count]) for domain in sources])


def _write_log(directory: Path, records: list[dict], fabric: Fabric) -> None:
    """Starts the log again from the checkpoint: a process killed after it may have written lines beyond."""
    if fabric.is_global_zero:
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_file(directory / LOG) as file:
            file.writelines(json.dumps(record).encode() + b"\n" for record in records)


def _append_log(directory: Path, record: dict, fabric: Fabric) -> None:
    if fabric.is_global_zero:
        with named_errors(directory / LOG), (directory / LOG).open("a") as file:
            file.write(json.dumps(record) + "\n")


@contextmanager
def _signals() -> Iterator[list[int]]:
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


def _agreed(signals: list[int], fabric: Fabric) -> int:
    """The signal that any process received, or 0: all stop after the same update."""
    signum = signals[0] if signals else 0
    if fabric.world_size == 1:
        return signum
    return _reduced(torch.tensor(signum, device=fabric.device), "max", fabric)


def _reduced(number: Tensor, how: str, fabric: Fabric) -> Any:
    """Of all processes together, as a Python number of the type of `number`."""
    reduced: Any = fabric.all_reduce(number, reduce_op=how)
    return reduced.item()


def _raise_everywhere(failure: UnreadableImage | None, fabric: Fabric) -> None:
    """Raises what one process met in all of them: the others would wait for its share of the update."""
    if fabric.world_size > 1:
        rank = -1 if failure is None else fabric.global_rank
        rank = _reduced(torch.tensor(rank, device=fabric.device), "max", fabric)
        failure = None if rank < 0 else fabric.broadcast(failure, rank)
    if failure is not None:
        raise failure


@contextmanager
def _progress(config: Config, start: int, fabric: Fabric) -> Iterator[Callable[[dict | None], None]]:
    """A progress bar on a terminal, else one line for each evaluation, on standard error."""

    def line(record: dict) -> str:
        mode = f"{config.bits} bit" if record["quantized"] else "float"
        text = f"seed {config.seed} update {record['update']} {mode} loss {record['loss']:.4f}"
        return f"{text} validation {record['validation']:.4f} {config.test_domain} {record['test']:.4f}"

    if not fabric.is_global_zero:
        yield lambda record: None
    elif not on_terminal():
        yield lambda record: note(line(record)) if record else None
    else:
        with progress(f"seed {config.seed}", config.updates, start, keep=True) as advance:
            yield lambda record: advance(line(record) if record else None)
