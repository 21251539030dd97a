"""What a run of hours might end in, tried before its first update: the switch and the export."""

from __future__ import annotations

import torch

from qdeploy.training.attached_quantizers import quantizers
from qdeploy.training.config import Config, made
from qdeploy.training.domains import Benchmark
from qdeploy.training.start import build_network


def rehearse_export(config: Config, benchmark: Benchmark) -> None:
    """Raise what the switch, and the export after the training, would; nothing is written. A method whose networks stay
    float has its switch tried alone."""
    from qdeploy.exporter import rehearse
    from qdeploy.training.finished_runs import fallback_for, file_options
    from qdeploy.training.selected_network import calibration_images

    quantization = made(config, "quantization")
    if quantization.of_finished_runs:  # the network is there, and its export minutes away
        return
    net, shown = build_network(config, benchmark), calibration_images(config, benchmark, 2)
    quantization.check_export(net)
    if quantization.start is None:
        return
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    quantization.attach(net, optimizer, [(shown, torch.zeros(len(shown), dtype=torch.long))])
    if quantizers(net):
        # Weights that come onto their grids later are float yet.
        complete = quantization.eligible(quantization.start)
        fallback = fallback_for(net, config) if complete else 8
        rehearse(net.eval(), shown[:2], shown, fallback_bits=fallback, **file_options(benchmark))
