"""The sweeps of QGen, sweeps/qgen_*.yaml: their settings as they are, on tiny data."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qdeploy.training.finished_runs import varied
from qdeploy.training.image_sets import SETS
from qdeploy.training.sweep_file import read_sweep
from qdeploy.training.sweep_jobs import Training, _benchmark
from qdeploy.training.sweep_plan import plan

SWEEPS = Path(__file__).parent.parent / "sweeps"
SHAPES = {"digits-dg": (1, 16, 16), "cifar10": (3, 32, 32)}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The data sets with 160 images of noise in a domain."""
    for data, shape in SHAPES.items():

        def load(names, shape=shape):
            return {name: (np.zeros((160, *shape), np.uint8), np.arange(160) % 10) for name in names}

        monkeypatch.setitem(SETS, data, replace(SETS[data], load=load))
    _benchmark.cache_clear()
    yield
    _benchmark.cache_clear()


def configs(name: str, out: Path) -> list:
    return [job.config for job in plan(read_sweep(SWEEPS / name), out, 1) if isinstance(job, Training)]


def test_the_pool_has_all_combinations_once(tmp_path):
    found = configs("qgen_pool.yaml", tmp_path)
    seen = Counter(
        (one.optimizer.name, one.model.options["depth"], one.model.options["width"], one.bits, one.seed)
        for one in found
    )
    assert len(found) == len(seen) == 64
    assert {one.bits for one in found} == {None, 8, 4, 2}
    assert {one.quantization.options.get("per_channel") for one in found} == {None, False}  # one step size a layer
    assert {(one.epochs, one.selection, one.test_domain) for one in found} == {(30, "lowest-train-loss", "in-domain")}
    followed = {"method", "quantization", "quantize_at", "lr", "lr_step_size"}
    assert {*varied(found)} - followed == {"bits", "optimizer", "model.depth", "model.width", "seed"}


def test_networks_of_cifar_10_differ_in_their_precision_alone(tmp_path):
    found = configs("qgen_cifar10.yaml", tmp_path)
    assert [one.bits for one in found] == [None, 8, 4, 2]
    assert {one.test_domain for one in found} == {"test"}
    assert {*varied(found)} == {"method", "quantization", "bits", "quantize_at", "lr_step_size"}
