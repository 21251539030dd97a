"""The networks that are timed, and the table at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before torch is imported: its OpenMP threads would spin on the cores of whoever has the next turn.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SECTIONS: list[str] = []


@pytest.fixture
def report() -> Callable[[str], None]:
    """Adds a section to what is printed after the run."""
    return SECTIONS.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for section in SECTIONS:
        terminalreporter.write_line("\n" + section)


@dataclass
class Exported:
    """A float network and the model file made of it."""

    net: Callable
    path: Path


@pytest.fixture(scope="session")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """ResNet-50 with random 7-bit weights and sane BatchNorm statistics, exported like a trained one."""
    torch = pytest.importorskip("torch", reason="exporting ResNet-50 needs PyTorch: pip install 'qdeploy[train]'")
    import qdeploy
    from qdeploy.training import quantize_
    from qdeploy.training.models import MODELS

    torch.manual_seed(0)
    net = MODELS["resnet50"](1000)
    images = torch.randn(4, 3, 224, 224)
    with torch.no_grad():
        for _ in range(10):  # running statistics of these images
            net(images)
    net.eval()
    path = tmp_path_factory.mktemp("bench") / "resnet50.safetensors"
    quantized = MODELS["resnet50"](1000)
    quantized.load_state_dict(net.state_dict())
    quantize_(quantized.eval(), weight_bits=7)
    qdeploy.export(quantized, images[:1], path, calibration=images.numpy())
    return Exported(net.to(memory_format=torch.channels_last), path)
