"""How right finished networks, alone or as an ensemble, and their model file are on the images that did not train."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qdeploy
from qdeploy.kernels.ensemble import RULES, combine
from qdeploy.training.config import Config
from qdeploy.training.domains import Benchmark
from qdeploy.training.evaluation import accuracy_of, apply, evaluation_sets, reported
from qdeploy.training.progress import counted

Parts = Mapping[str, tuple[int, np.ndarray]]  # {name: (domain, positions)}


def judge(
    nets: Sequence[nn.Module],
    config: Config,
    benchmark: Benchmark,
    device: torch.device,
    path: Path | None = None,
    rule: str = "logits",
) -> dict[str, Any]:
    """What `nets` make of the images that `config` holds out, and the file `path` in which they are combined by `rule`.

    Returns {"rules": {rule: {"test", "tests"}}} for each of RULES, which agree for a single network: "test" is the mean
    accuracy over the domains in "tests". With a file also {"file": {"path", "bytes", "test", "tests", "agreement"}},
    the last of which is the share of images for which file and networks say the same. The networks are moved to the
    device.
    """
    sets = evaluation_sets(config, benchmark)
    held_out = {name: sets[part] for name, part in reported(config, benchmark).items()}
    logits, int8 = _answers(nets, path, benchmark, held_out, device, config.workers)
    classes = {by: {name: combine(scores, by)[1] for name, scores in logits.items()} for by in RULES}
    found: dict[str, Any] = {"rules": {by: _accuracy(classes[by], benchmark, held_out) for by in RULES}}
    if path is not None:
        same = torch.cat([int8[name] == classes[rule][name] for name in held_out])
        size = {"path": str(path), "bytes": path.stat().st_size}
        found["file"] = {**size, **_accuracy(int8, benchmark, held_out), "agreement": same.float().mean().item()}
    return found


def validation(net: nn.Module, config: Config, benchmark: Benchmark, device: torch.device) -> float:
    """The mean accuracy of `net`, which is moved to the device, on the validation images of the source domains."""
    sets = evaluation_sets(config, benchmark)
    parts = {domain.name: sets[f"{domain.name}_out"] for domain in benchmark.sources(config.targets)}
    logits, _ = _answers([net], None, benchmark, parts, device, config.workers, "the validation images")
    classes = {name: scores[0].argmax(-1) for name, scores in logits.items()}
    return _accuracy(classes, benchmark, parts)["test"]


def _accuracy(classes: Mapping[str, Tensor], benchmark: Benchmark, parts: Parts) -> dict[str, Any]:
    """{"test": the mean over domains, "tests": {domain: accuracy}}."""
    tests = {}
    for name, (i, positions) in parts.items():
        domain = benchmark.domains[i]
        tests[name] = accuracy_of(classes[name].numpy() == domain.labels[positions], domain, positions)
    return {"test": statistics.fmean(tests.values()), "tests": tests}


def _answers(
    nets: Sequence[nn.Module],
    path: Path | None,
    benchmark: Benchmark,
    parts: Parts,
    device: torch.device,
    workers: int,
    what: str = "what is held out",
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """For each part the logits of each network, [M, N, K], and the classes of the model file at `path`, [N], on the
    CPU; the images are decoded once for all of them."""
    model = None if path is None else qdeploy.load_int_model(path)
    nets = [net.to(device) for net in nets]
    classes: list[Tensor] = []
    files = " and their file" if len(nets) > 1 else " and its file"
    text = f"{len(nets)} trained network(s){files if model else ''} on {what}"

    def answer(images: Tensor) -> Tensor:
        if model is not None:
            classes.append(torch.from_numpy(benchmark.inputs.predict(model, images)))
        logits = torch.stack([net(images.to(device)).cpu() for net in nets], 1)
        seen(len(images))
        return logits

    logits, int8 = {}, {}
    total = sum(len(positions) for _, positions in parts.values())
    with torch.no_grad(), counted(text, total, benchmark.inputs.what) as seen:
        for name, part in parts.items():
            logits[name] = apply(answer, benchmark, *part, workers).transpose(0, 1).contiguous()
            if model is not None:
                int8[name] = torch.cat(classes)
                classes.clear()
    return logits, int8
