"""What all tests share."""

from __future__ import annotations

import functools
import os

import pytest

from qdeploy import _engine

os.environ.setdefault("TRITON_INTERPRET", "1")  # before any test imports triton, which reads it then
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # of `pytest -n`: they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))  # which torch reads


@pytest.fixture(autouse=True, scope="session")
def threads_for_small_networks():
    """Small networks run on as many threads as a test asks for, so that it sees how work is split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "Session", functools.partial(_engine.Session, macs_per_thread=1))
        yield


@pytest.fixture
def one_thread():
    """Tests that train small networks: threads would cost more than they gain."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def fabric():
    """One device, the CPU."""
    from lightning_fabric import Fabric

    return Fabric(accelerator="cpu", devices=1)
