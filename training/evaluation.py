"""What a run measures: accuracy and cross-entropy on the images that do not train, and which evaluation is selected."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional

from qdeploy.errors import InputError
from qdeploy.training.config import Config
from qdeploy.training.decoding import UnreadableImage
from qdeploy.training.domains import Benchmark, Domain
from qdeploy.training.loader import WorkerLost, load
from qdeploy.training.minibatches import RunImages, evaluation_batches, in_domain_split, split_of
from qdeploy.training.processes import raise_in_all, reduced
from qdeploy.training.progress import Progress
from qdeploy.training.wilds import user_percentile

Sets = Mapping[str, tuple[int, np.ndarray]]


def select(records: list[dict], rule: str, targets: list[str]) -> dict | None:
    """The record of the network that a run keeps, among those of networks as the method makes them ("eligible").

    rule: "validation", the highest mean accuracy on the validation images of the source domains (DomainBed's
    training-domain validation); "oracle", that on the 20 % of the held-out domains (it looks at the target); "last";
    or "lowest-train-loss". The first of equals, but for "last".
    """
    eligible = [record for record in records if record["eligible"]]
    if rule == "last":
        return eligible[-1] if eligible else None
    scores: dict[str, Callable[[dict], float]] = {
        "validation": lambda record: record["validation"],
        "oracle": lambda record: statistics.fmean(record["accuracy"][f"{name}_out"] for name in targets),
        "lowest-train-loss": lambda record: -record["loss"],
    }
    return max(eligible, key=scores[rule], default=None)


def evaluation_sets(config: Config, benchmark: Benchmark) -> dict[str, tuple[int, np.ndarray]]:
    """What an evaluation measures: {name: (domain, positions)}. The validation images of every source domain, and both
    parts of a held-out domain, whose 80% part is the number that is reported; without one the test images of each."""
    targets = {benchmark.index(name) for name in config.targets}
    sets = {}
    for i, domain in enumerate(benchmark.domains):
        training, validation = split_of(domain, config)
        if domain.published is None and not len(validation):
            raise InputError(f"expected 5 or more {config.what}, got {len(domain.labels)} - at domain `{domain.name}`")
        if i in targets:
            sets[f"{domain.name}_in"] = (i, training)
        elif not len(validation):
            raise InputError(
                f"expected {domain.name} held out, which has no {config.what} to validate - at --test-domain"
            )
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


def accuracy_of(right: np.ndarray, domain: Domain, positions: np.ndarray) -> float:
    """Of bool [n], whether what is at `positions` was classified right: the share of it, or, of a domain with users,
    the share of the user at the 10th percentile."""
    return float(right.mean()) if domain.users is None else user_percentile(right, domain.users[positions])


def apply(
    function: Callable[[Tensor], Tensor],
    benchmark: Benchmark,
    domain: int,
    positions: np.ndarray,
    workers: int = 0,
) -> Tensor:
    """What `function` makes of a domain at `positions`, as networks take it, batch by batch; on the CPU, [n, ...]."""
    with closing(load(benchmark, evaluation_batches(benchmark, domain, positions), 0, workers)) as batches:
        return torch.cat([function(benchmark.inputs.for_network(images)).cpu() for [(images, _)] in batches])


class Evaluator:
    """Judges networks on all sets of a run, by all its processes together."""

    def __init__(self, config: Config, benchmark: Benchmark, fabric: Fabric, images: RunImages, progress: Progress):
        self._config, self._benchmark, self._fabric = config, benchmark, fabric
        self._images, self._progress = images, progress
        self._sets = evaluation_sets(config, benchmark)
        self._total = sum(len(positions) for _, positions in self._sets.values())

    @torch.no_grad()
    def __call__(self, net: nn.Module) -> dict:
        """Accuracies and cross-entropies of `net`, in eval mode; the same in every process."""
        if self._fabric.world_size > 1:  # of statistics that each process gathers the first one's count
            for buffer in net.buffers():
                torch.distributed.broadcast(buffer, 0)
        accuracy, loss = {}, {}
        for name, (i, positions) in self._sets.items():
            right, entropy = self._judged(net.eval(), name)
            accuracy[name] = accuracy_of(right, self._benchmark.domains[i], positions)
            loss[name] = reduced(entropy, "sum", self._fabric) / len(positions)
        sources = self._benchmark.sources(self._config.targets)
        validation = sum(accuracy[f"{domain.name}_out"] for domain in sources) / len(sources)
        tests = {name: accuracy[part] for name, part in reported(self._config, self._benchmark).items()}
        found = {"validation": validation, "test": statistics.fmean(tests.values()), "tests": tests}
        return {**found, "accuracy": accuracy, "cross_entropy": loss}

    def _judged(self, net: nn.Module, name: str) -> tuple[np.ndarray, Tensor]:
        """Which of all images of a set are classified right, bool [n], and the sum of the cross-entropies of this
        process's share."""
        failure: UnreadableImage | WorkerLost | None = None
        share = slice(self._fabric.global_rank, None, self._fabric.world_size)
        found: list[Tensor] = []
        entropy = torch.tensor(0.0, device=self._fabric.device)
        try:
            for pixels, classes in self._images.evaluation(name, self._progress.waiting):
                with self._fabric.autocast():
                    logits = net(pixels).float()
                found.append(logits.argmax(1) == classes)
                entropy += functional.cross_entropy(logits, classes, reduction="sum")
                self._progress.evaluated(len(classes), self._total)
        except (UnreadableImage, WorkerLost) as error:
            failure = error
        raise_in_all(failure, self._fabric)
        right = torch.zeros(len(self._sets[name][1]), dtype=torch.int32, device=self._fabric.device)
        right[share] = torch.cat(found).int() if found else 0
        summed: Any = self._fabric.all_reduce(right, reduce_op="sum")
        return summed.cpu().numpy() > 0, entropy

    def source_losses(self, found: dict) -> list[float]:
        """The cross-entropies of an evaluation on the validation images of each source domain."""
        return [found["cross_entropy"][f"{one.name}_out"] for one in self._benchmark.sources(self._config.targets)]
