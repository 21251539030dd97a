"""Runs that make no update: the network of a finished run in float, quantized as it is (RTN, OBC)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from qdeploy.errors import InputError
from qdeploy.training.attached_quantizers import quantizers
from qdeploy.training.config import Config, differences, made
from qdeploy.training.domains import Benchmark
from qdeploy.training.minibatches import split_of
from qdeploy.training.run_files import DONE, MODEL, check_same_images, read_done, read_state
from qdeploy.training.run_log import run_log
from qdeploy.training.seeds import seed_hash
from qdeploy.training.selected_network import evaluated, load_trained, write_selected

IMAGES = 1024  # OBC's; training images, not augmented


def float_run(config: Config) -> Path:
    """The folder of the finished run whose network is to be quantized.

    Raises InputError where there is none, or one of other data, another split or another network.
    """
    if config.float_runs is None:
        expected = (
            f"the folder --out of finished float runs (`--method erm`), which {config.quantization.name} quantizes"
        )
        raise InputError(f"expected {expected}, got none - at --float-runs")
    folder = Path(config.float_runs) / f"seed{config.seed}"
    done = read_done(folder)
    if done is None:
        raise InputError(f"expected a finished run in float, got no {DONE} - at {folder}")
    found, selected, *_ = done
    if selected["attached"]:
        raise InputError(f"expected a finished run in float, got one of {found.quantization.name} - at {folder}")
    alike = ("test_domain", "domains", "image_size", "tokens", "model", "seed", "split_seed")
    for key, (was, now) in differences(found, config).items():
        if key.partition(".")[0] in alike:
            raise InputError(f"expected a run like this one, got {key}={was!r} instead of {now!r} - at {folder}")
    return folder


def quantize_finished(config: Config, benchmark: Benchmark, directory: Path, fabric: Fabric) -> dict:
    """Makes the run in `directory` of the one that `float_run` names; returns its record."""
    source = float_run(config)
    _, state = read_state(source / MODEL)
    check_same_images(state["images"], benchmark.fingerprint, source / MODEL, config.data)
    net = load_trained(source, benchmark).to(fabric.device)
    shown = training_sample(config, benchmark)
    made(config, "quantization").attach(net, None, [(shown, torch.zeros(len(shown), dtype=torch.long))])
    assert quantizers(net)  # or it would be float still
    record = {**state["selected"], **evaluated(config, benchmark, fabric, net), "quantized": True, "attached": True}
    with run_log(config, directory, [], fabric) as log:
        log(record)
    if fabric.is_global_zero:
        tensors = {key: value.detach().cpu() for key, value in net.state_dict().items()}
        write_selected(directory, config, benchmark, tensors, record, state["initial"])
    fabric.barrier()
    return record


def training_sample(config: Config, benchmark: Benchmark) -> Tensor:
    """IMAGES of the training images, as many of each source domain, drawn by the seed, as for calibration."""
    sources = benchmark.sources(config.targets)
    drawn = []
    for domain in sources:
        training = split_of(domain, config)[0]
        rng = np.random.default_rng(seed_hash(config.seed, domain.environment, "quantize"))
        drawn.append(domain.batch(rng.permutation(training)[: -(-IMAGES // len(sources))]))
    return benchmark.inputs.for_calibration(torch.cat(drawn))
