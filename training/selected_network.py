"""The network that a run keeps: its file, and what is done with it after the last update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from qdeploy.training.batch_norm import reestimate_
from qdeploy.training.config import Config, made
from qdeploy.training.domains import Benchmark
from qdeploy.training.evaluation import Evaluator, evaluation_sets
from qdeploy.training.minibatches import RunImages, split_of
from qdeploy.training.progress import progress_of_run
from qdeploy.training.run_files import MODEL, check_same_images, read_state, sound, write_done, write_state
from qdeploy.training.start import build_network

REESTIMATION_BATCHES = 200


def write_selected(
    directory: Path, config: Config, benchmark: Benchmark, state: dict[str, Tensor], selected: dict, initial: str
) -> None:
    """Writes model.pt and done.json: the network whose record is `selected`; `initial` is the hash of that which the
    run began with."""
    content = {"net": state, "selected": selected, "images": benchmark.fingerprint, "initial": initial}
    write_state(directory / MODEL, config, content)
    write_done(directory, config, selected, benchmark.fingerprint, initial)


def load_trained(directory: Path, benchmark: Benchmark) -> nn.Module:
    """The selected network of a finished run, in eval mode on the CPU, quantizers attached."""
    config, state = read_state(directory / MODEL)
    check_same_images(state.get("images"), benchmark.fingerprint, directory / MODEL, config.data)
    with sound(directory / MODEL):
        return rebuilt(config, benchmark, state["net"], state["selected"]["attached"])


def rebuilt(config: Config, benchmark: Benchmark, state: dict[str, Tensor], attached: bool) -> nn.Module:
    """The network of a run with the tensors `state`, in eval mode on the CPU; `attached`: whether its quantization had
    changed it."""
    net = build_network(replace(config, weights=None), benchmark)
    if attached:
        made(config, "quantization").reattach(net, None, state)
    else:
        net.load_state_dict(state)
    return net.eval()


def reestimated(
    config: Config, benchmark: Benchmark, fabric: Fabric, selected: dict, state: dict[str, Tensor]
) -> tuple[dict, dict[str, Tensor]]:
    """Record and tensors of the selected network with the statistics of BatchNorm of 200 minibatches anew, the mean of
    all of them, in place of an average that fades while weights train."""
    net = rebuilt(config, benchmark, state, selected["attached"]).to(fabric.device)
    reestimate_(net, _images_after(config, benchmark, fabric))
    judged = {**selected, **evaluated(config, benchmark, fabric, net)}
    return judged, {key: value.detach().clone() for key, value in net.state_dict().items()}


def _images_after(config: Config, benchmark: Benchmark, fabric: Fabric) -> Iterator[Tensor]:
    """Those of the minibatches that would come after the last update."""
    more = replace(config, updates=config.updates + REESTIMATION_BATCHES, eval_every=2**31 - 1)
    with closing(RunImages(more, benchmark, fabric, {}, config.updates, False)) as images:
        with progress_of_run(more, config.updates, fabric) as progress:
            for _ in range(REESTIMATION_BATCHES):
                yield torch.cat([part for part, _ in images.minibatches(progress.waiting)])


def evaluated(config: Config, benchmark: Benchmark, fabric: Fabric, net: nn.Module) -> dict[str, Any]:
    """What an evaluation finds of a network that no update changes any more."""
    sets = evaluation_sets(config, benchmark)
    none_left = replace(config, updates=0)
    with closing(RunImages(none_left, benchmark, fabric, sets, 0, True)) as images:
        with progress_of_run(config, config.updates, fabric) as progress:
            return Evaluator(config, benchmark, fabric, images, progress)(net)


def calibration_images(config: Config, benchmark: Benchmark, count: int) -> Tensor:
    """The first `count` validation images of each source domain, not augmented: f32 [n, C, H, W]; or rows of texts,
    i64 [n, T], as `Texts.for_calibration` makes them."""
    sources = benchmark.sources(config.targets)
    shown = torch.cat([domain.batch(split_of(domain, config)[1][:count]) for domain in sources])
    return benchmark.inputs.for_calibration(shown)
