"""What a run starts from: settings that fit the data, and its network; and what it says of them."""

from __future__ import annotations

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
from qdeploy.training.config import IN_DOMAIN, Config, made
from qdeploy.training.domains import Benchmark, Outline
from qdeploy.training.learner import train_only_
from qdeploy.training.loader import PREFETCH
from qdeploy.training.methods.clipood import TextHead, read_text_features
from qdeploy.training.networks_by_name import build
from qdeploy.training.presets import NAMED, preset_of
from qdeploy.training.pretrained import load_pretrained
from qdeploy.training.seeds import seed_hash


def build_network(
    config: Config, benchmark: Benchmark | Outline, said: Callable[[str], object] = lambda text: None
) -> nn.Module:
    """The network of a run at its start: seeded random weights, or the pretrained ones, of which `said` hears."""
    torch.manual_seed(seed_hash(config.seed, "weights"))
    inputs = benchmark.inputs
    classes, text = len(benchmark.classes), None
    if config.text_features is not None:
        text = read_text_features(Path(config.text_features), classes)
    outputs = classes if text is None else text.shape[1]
    net = build(config.model.name, outputs, inputs.channels, **config.model.options)
    if config.weights is not None:
        said(load_pretrained(net, Path(config.weights)))
    return inputs.adapted(net if text is None else TextHead(net, text), config.model.name)


def check_setting(config: Config, outline: Outline) -> None:
    """Raise InputError where a run would: two domains, the one held out, the network and its weights, data that it can
    take, and a batch that fits the memory."""
    if config.targets and len(outline.domains) < 2:
        expected = f"two or more domains, or --test-domain {IN_DOMAIN}"
        raise InputError(f"expected {expected}, got {len(outline.domains)} - at --domains")
    if len(outline.classes) < 2:
        raise InputError(f"expected two or more classes, got {', '.join(outline.classes)} - at {outline.name}")
    sources = {*range(len(outline.domains))} - {outline.index(name) for name in config.targets}
    if not sources:
        raise InputError(f"expected a domain or more to train on, got all {len(config.targets)} - at --test-domain")
    _check_weights_given(config)
    if config.updates is not None:  # else they follow from the number of images
        check_selectable(config)
    inputs, images = outline.inputs, config.batch_size * len(sources)
    bytes_each = 4 + 1 + PREFETCH * config.workers  # as floats, and those loaded ahead
    check_memory(bytes_each * images * math.prod(inputs.shape), f"{images} {inputs.what}", "--batch-size")
    net = build_network(config, outline)
    train_only_(net, config.train_only)
    share = images // config.devices
    try:
        inputs.check(net.train(config.batch_norm != "frozen"), share)
    except (RuntimeError, ValueError, IndexError) as error:
        got = f"{inputs.text(share)}: {str(error).splitlines()[0]}"
        expected = f"{inputs.what} that {config.model.name} can take"
        raise InputError(f"expected {expected}, got {got} - at {inputs.option}") from error


def check_selectable(config: Config) -> None:
    """Raise InputError for what the choices on the axes refuse, and unless the network of an evaluation is one that the
    method makes."""
    made(config, "objective", progress=lambda: 0.0)
    made(config, "step", net=nn.Identity())
    made(config, "schedule")
    made(config, "optimizer", params=[nn.Parameter(torch.zeros(1))])
    quantization, average = made(config, "quantization"), made(config, "average")
    times = range(0, config.updates, config.eval_every)
    if not any(quantization.eligible(t) and average.eligible(t) for t in times):
        names = f"quantization {config.quantization.name}, average {config.average.name}"
        got = f"none in {config.updates} updates with one every {config.eval_every} ({names})"
        raise InputError(f"expected an evaluation of what the method makes, got {got} - at --eval-every")


def _check_weights_given(config: Config) -> None:
    if config.weights is not None and config.from_scratch:
        raise InputError(f"expected --weights or --from-scratch, got both - at {config.weights}")
    if config.weights is None and not config.from_scratch and config.data not in NAMED:
        weights = f"weights to fine-tune (torchvision's {config.model.name}, say)"
        expected = f"{weights} or --from-scratch for a folder of {config.what}"
        raise InputError(f"expected {expected}, got neither - at --weights")


def describe(config: Config, benchmark: Benchmark, sets: Mapping[str, tuple[int, np.ndarray]]) -> list[str]:
    """What a run has, a line each; `sets` as `evaluation_sets` returns them. Warnings come last."""
    pretrained: list[str] = []
    net = build_network(config, benchmark, pretrained.append)
    rows, trained = [], set()
    for domain in benchmark.domains:
        row: dict[str, Any] = {"domain": domain.name, config.what: len(domain.labels)}
        held_out = domain.name in config.targets
        if not held_out:
            tested = len(sets[f"{domain.name}_test"][1]) if f"{domain.name}_test" in sets else 0
            validation = len(sets[f"{domain.name}_out"][1])
            row |= {"training": len(domain.labels) - validation - tested, "validation": validation}
            row |= {"test": tested} if tested else {}
            trained |= {*domain.labels.tolist()}
        rows.append(row | {"use": "held out" if held_out else "source"})
    rows.sort(key=lambda row: row["use"] == "held out")  # the first row has all columns
    parameters = sum(parameter.numel() for parameter in net.parameters())
    images = config.batch_size * (len(benchmark.domains) - len(config.targets))
    evaluated, evaluations = sum(len(part) for _, part in sets.values()), -(-config.updates // config.eval_every)
    by = f"{config.workers} worker(s)" + (" of each device" if config.devices > 1 else "")
    what = config.what
    loaded = f"{what} are loaded by {by if config.workers else 'the training itself (--workers 0)'}"
    left_out = benchmark.left_out
    named = "; ".join(f"{file}: {reason}" for file, reason in left_out[:3]) + ("; ..." if len(left_out) > 3 else "")
    missing = [name for i, name in enumerate(benchmark.classes) if i not in trained]
    classes = f"{len(benchmark.classes)} classes ({_shortened(benchmark.classes)})"
    return [
        f"{benchmark.name}: {classes}; preset: {preset_of(config.data).name}",
        *columns(rows).splitlines(),
        f"{config.model}: {parameters:,} parameters; {_mode(config, net)}",
        _method(config),
        *(f"weights: {text}" for text in pretrained),
        f"{config.updates:,} updates of {images:,} {what}, {evaluations:,} evaluations of {evaluated:,}; {loaded}",
        *([f"warning: left out {len(left_out):,} files: {named}"] if left_out else []),
        *([f"warning: no source domain has {what} of {_shortened(missing)}"] if missing else []),
    ]


def _mode(config: Config, net: nn.Module) -> str:
    """How the network is quantized, in words."""
    if config.bits is None:
        return "in float"
    switch = "" if config.quantize_at is None else f" from update {config.quantize_at} on"
    if isinstance(config.bits, Mapping) or isinstance(config.activation_bits, Mapping):
        return f"bits of weights {config.bits}, of inputs {config.activation_bits}{switch}"
    inputs = f", {config.activation_bits}-bit inputs" if config.activation_bits else ""
    layers = f"{config.bits}-bit weights{inputs} in {len(quantizable_layers(net)) - 1} layers{switch}"
    return f"{layers}; `{classifier(net)}` in float"


def _method(config: Config) -> str:
    """What stands on the axes, in words."""
    axes = ("objective", "step", "quantization", "average", "optimizer", "schedule")
    return f"method {config.method}: " + ", ".join(f"{axis} {getattr(config, axis).name}" for axis in axes)


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
