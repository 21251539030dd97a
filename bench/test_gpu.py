"""The cases of gpu.py, where there is a GPU. pytest-benchmark's own column is the time of a whole case."""

from __future__ import annotations

from pathlib import Path

import pytest
from networks import Networks

pytest.importorskip("torch", reason="the GPU is reached through PyTorch: pip install 'qdeploy[train]'")
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU that PyTorch can use", allow_module_level=True)

import gpu
from gpu_timer import ROUNDS, Timer

pytestmark = pytest.mark.filterwarnings("default")  # the peers' own warnings are theirs


@pytest.mark.parametrize("name", gpu.cases(Networks(Path())))
def test_gpu(benchmark, results, networks, rounds, progress, name):
    progress("running")
    case = gpu.cases(networks)[name]
    report = benchmark.pedantic(case, args=(Timer("cuda", rounds(ROUNDS)),), rounds=1)
    results.gpu_report(report)
    results.reports[report.title]["machine"] = gpu.machine()
    gpu.free_memory()
    assert not report.wrong
