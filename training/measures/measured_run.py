"""A finished run as measures see it: its network, the one it began with, and images of each part."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qdeploy.errors import InputError
from qdeploy.training.config import Config
from qdeploy.training.domains import Benchmark, Domain
from qdeploy.training.evaluation import evaluation_sets, reported
from qdeploy.training.fingerprint import network_hash
from qdeploy.training.loader import load
from qdeploy.training.measures.losses import Batch
from qdeploy.training.minibatches import evaluation_batches, split_of, training_images
from qdeploy.training.run_files import DONE, Done
from qdeploy.training.seeds import seed_hash
from qdeploy.training.selected_network import load_trained
from qdeploy.training.start import build_network

Batches = list[Batch]  # on the device
Part = Mapping[str, tuple[int, np.ndarray]]  # by domain: its place in the benchmark, and positions in it


@dataclass(frozen=True)
class MeasuredRun:
    """Of the run in `folder`, whose DONE is `done`. What is loaded stays; networks are in eval mode, on the device.

    subset: at most so many images of a part, as many of each of its domains. Which they are follows from the data
    alone, so that runs of other seeds and methods are measured on the same.
    """

    folder: Path
    done: Done
    benchmark: Benchmark
    device: torch.device
    subset: int

    @property
    def config(self) -> Config:
        return self.done.config

    @cached_property
    def net(self) -> nn.Module:
        """The selected network, quantizers attached."""
        return load_trained(self.folder, self.benchmark).to(self.device)

    @cached_property
    def initial(self) -> nn.Module:
        """The network that the run began with, in float. Raises InputError where it cannot be made again: pretrained
        weights that are gone, or others in their place."""
        net = build_network(self.config, self.benchmark).eval()
        if network_hash(net) != self.done.initial:
            raise InputError(f"expected the network that the run began with, got another - at {self.folder / DONE}")
        return net.to(self.device)

    @cached_property
    def training_count(self) -> int:
        """The images that train, all of them: m of the papers."""
        return training_images(self.config, self.benchmark)[0]

    @cached_property
    def training(self) -> dict[str, Batches]:
        """Training images of each source domain, not augmented, by its name."""
        return self.batches(self.training_part)

    @property
    def all_training(self) -> Batches:
        """The same, of all source domains together."""
        return [batch for batches in self.training.values() for batch in batches]

    @cached_property
    def validation(self) -> dict[str, Batches]:
        """Validation images of each source domain."""
        return self.batches(self.validation_part)

    @cached_property
    def target(self) -> dict[str, Batches]:
        """Images of which a run's result is the accuracy: of each held-out domain the 80 % part; without one, the test
        images of each domain."""
        return self.batches(self.target_part)

    @property
    def training_part(self) -> Part:
        found = {domain.name: split_of(domain, self.config)[0] for domain in self._sources}
        return self._drawn({name: (self.benchmark.index(name), positions) for name, positions in found.items()})

    @property
    def validation_part(self) -> Part:
        sets = evaluation_sets(self.config, self.benchmark)
        return self._drawn({domain.name: sets[f"{domain.name}_out"] for domain in self._sources})

    @property
    def target_part(self) -> Part:
        sets = evaluation_sets(self.config, self.benchmark)
        return self._drawn({name: sets[part] for name, part in reported(self.config, self.benchmark).items()})

    def batches(self, part: Part) -> dict[str, Batches]:
        """The images of a part by domain, decoded, in batches of the size that evaluations have."""
        return {name: self._loaded(domain, positions) for name, (domain, positions) in part.items()}

    @property
    def _sources(self) -> list[Domain]:
        return self.benchmark.sources(self.config.targets)

    def _drawn(self, part: Part) -> Part:
        each = max(1, self.subset // len(part))
        drawn = {}
        for name, (domain, positions) in part.items():
            rng = np.random.default_rng(seed_hash(self.benchmark.domains[domain].environment, "measures"))
            drawn[name] = domain, rng.permutation(positions)[:each]
        return drawn

    def _loaded(self, domain: int, positions: np.ndarray) -> Batches:
        keys = evaluation_batches(self.benchmark, domain, positions)
        with closing(load(self.benchmark, keys, 0, self.config.workers)) as loaded:
            moved = ([one.to(self.device) for one in pair] for [pair] in loaded)
            return [(self.benchmark.inputs.for_network(images), classes) for images, classes in moved]


def first_of(domains: Mapping[str, Batches], count: int) -> dict[str, Batches]:
    """At most `count` images, as many of each domain. They come in random order: the first are a sample of all."""
    each = max(1, count // len(domains))
    return {name: _first(batches, each) for name, batches in domains.items()}


def _first(batches: Batches, count: int) -> Batches:
    found = []
    for inputs, labels in batches:
        if count > 0:
            found.append((inputs[:count], labels[:count]))
            count -= len(labels)
    return found
