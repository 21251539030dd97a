"""What a run starts from: settings that fit the data, and its network; and what it says of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qdeploy.errors import InputError
from qdeploy.memory import check_memory
from qdeploy.networks.quantizable import classifier, quantizable_layers
from qdeploy.terminal import columns
from qdeploy.training.config import IN_DOMAIN, Config
from qdeploy.training.domains import Benchmark, Outline
from qdeploy.training.loader import PREFETCH
from qdeploy.training.models import MODELS
from qdeploy.training.presets import NAMED, preset_of
from qdeploy.training.pretrained import load_pretrained


def seed_hash(*args: object) -> int:
    """DomainBed's seed of a tuple: its md5 modulo 2^31."""
    return int(hashlib.md5(str(args).encode()).hexdigest(), 16) % 2**31


def build_network(
    config: Config, benchmark: Benchmark | Outline, said: Callable[[str], object] = lambda text: None
) -> nn.Module:
    """The network of a run at its start: seeded random weights, or the pretrained ones, of which `said` hears."""
    if config.model not in MODELS:
        raise InputError(f"expected one of {', '.join(MODELS)}, got {config.model!r} - at --model")
    torch.manual_seed(seed_hash(config.seed, "weights"))
    net = MODELS[config.model](len(benchmark.classes), in_channels=benchmark.input_shape[0])
    if config.weights is not None:
        said(load_pretrained(net, Path(config.weights)))
    return net


def check_setting(config: Config, outline: Outline) -> None:
    """Raise InputError where a run would: two domains, the one held out, the network and its weights, images that it
    can take, and a batch that fits the memory."""
    if config.targets and len(outline.domains) < 2:
        expected = f"two or more domains, or --test-domain {IN_DOMAIN}"
        raise InputError(f"expected {expected}, got {len(outline.domains)} - at --domains")
    if len(outline.classes) < 2:
        raise InputError(f"expected two or more classes, got {', '.join(outline.classes)} - at {outline.name}")
    sources = {*range(len(outline.domains))} - {outline.index(name) for name in config.targets}
    if not sources:
        raise InputError(f"expected a domain or more to train on, got all {len(config.targets)} - at --test-domain")
    _check_weights_given(config)
    shape, images = outline.input_shape, config.batch_size * len(sources)
    bytes_each = 4 + 1 + PREFETCH * config.workers  # as floats, and those loaded ahead
    check_memory(bytes_each * images * math.prod(shape), f"{images} images", "--batch-size")
    net = build_network(config, outline).to("meta").train(config.weights is None)
    try:
        net(torch.empty(images // config.devices, *shape, device="meta"))
    except (RuntimeError, ValueError) as error:
        got = f"{images // config.devices} of {list(shape)}: {str(error).splitlines()[0]}"
        raise InputError(f"expected images that {config.model} can take, got {got} - at --image-size") from error


def _check_weights_given(config: Config) -> None:
    if config.weights is not None and config.from_scratch:
        raise InputError(f"expected --weights or --from-scratch, got both - at {config.weights}")
    if config.weights is None and not config.from_scratch and config.data not in NAMED:
        expected = f"weights to fine-tune (torchvision's {config.model}, say) or --from-scratch for a folder of images"
        raise InputError(f"expected {expected}, got neither - at --weights")


def describe(config: Config, benchmark: Benchmark, sets: Mapping[str, tuple[int, np.ndarray]]) -> list[str]:
    """What a run has, a line each; `sets` as `evaluation_sets` returns them. Warnings come last."""
    pretrained: list[str] = []
    net = build_network(config, benchmark, pretrained.append)
    rows, trained = [], set()
    for domain in benchmark.domains:
        row: dict[str, Any] = {"domain": domain.name, "images": len(domain.labels)}
        held_out = domain.name in config.targets
        if not held_out:
            tested = len(sets[f"{domain.name}_test"][1]) if f"{domain.name}_test" in sets else 0
            validation = len(sets[f"{domain.name}_out"][1])
            row |= {"training": len(domain.labels) - validation - tested, "validation": validation}
            row |= {"test": tested} if tested else {}
            trained |= {*domain.labels.tolist()}
        rows.append(row | {"use": "held out" if held_out else "source"})
    rows.sort(key=lambda row: row["use"] == "held out")  # the first row has all columns
    layers = list(quantizable_layers(net))
    mode = "in float"
    if config.algorithm == "qt-dog":
        inputs = f", {config.activation_bits}-bit inputs" if config.activation_bits else ""
        mode = f"{config.bits}-bit weights{inputs} in {len(layers) - 1} layers from update {config.quantize_at} on"
        mode += f"; `{classifier(net)}` in float"
    parameters = sum(parameter.numel() for parameter in net.parameters())
    images = config.batch_size * (len(benchmark.domains) - len(config.targets))
    evaluated, evaluations = sum(len(part) for _, part in sets.values()), -(-config.updates // config.eval_every)
    by = f"{config.workers} worker(s)" + (" of each device" if config.devices > 1 else "")
    loaded = f"images are loaded by {by if config.workers else 'the training itself (--workers 0)'}"
    left_out = benchmark.left_out
    named = "; ".join(f"{file}: {reason}" for file, reason in left_out[:3]) + ("; ..." if len(left_out) > 3 else "")
    missing = [name for i, name in enumerate(benchmark.classes) if i not in trained]
    classes = f"{len(benchmark.classes)} classes ({_shortened(benchmark.classes)})"
    return [
        f"{benchmark.name}: {classes}; preset: {preset_of(config.data).name}",
        *columns(rows).splitlines(),
        f"{config.model}: {parameters:,} parameters; {mode}",
        *(f"weights: {text}" for text in pretrained),
        f"{config.updates:,} updates of {images:,} images, {evaluations:,} evaluations of {evaluated:,}; {loaded}",
        *([f"warning: left out {len(left_out):,} files: {named}"] if left_out else []),
        *([f"warning: no source domain has images of {_shortened(missing)}"] if missing else []),
    ]


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
