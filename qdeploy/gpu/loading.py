"""From a model file to what runs it on a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from qdeploy import format
from qdeploy.gpu.devices import checked_device
from qdeploy.gpu.model import GpuModel
from qdeploy.gpu.texts import GpuTextModel


def load(path: str | os.PathLike[str], device: str | torch.device = "cuda", content: bytes | None = None) -> GpuModel:
    """Load a model file onto a GPU of compute capability 8.0 or newer; `path` only names its `content` where given.

    Raises ModelError for a file that cannot be run, InputError for a device that is not there.
    """
    device = checked_device(device)
    return build(format.read(path) if content is None else content, Path(os.fsdecode(path)), device)


def build(content: bytes, path: Path, device: torch.device) -> GpuModel:
    """The model in the content of a file: one of texts where it reads token ids."""
    graph = format.parse(content, path)
    return (GpuTextModel if graph.vocabulary else GpuModel)(graph, content, path, device)
