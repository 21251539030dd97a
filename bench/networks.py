"""The networks that are timed: random weights, sane statistics, exported once a session."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import qdeploy
from qdeploy import format
from qdeploy.demo import MODEL
from qdeploy.graph import Graph

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

# classes, pixels of a side, options of the constructor
IMAGENET = (1000, 224, {})
OTHERS = {"nin": (10, 32, {"depth": 4, "width": 10})}


IMAGES = 4  # that calibrate a network


@cache
def float_net(name: str) -> Module:
    """Freshly initialized, with running statistics as after ten batches of `images_for`: float32 and integers then
    agree closely, while a network with random statistics amplifies the rounding."""
    import torch
    from torch import nn

    from qdeploy.training.models import MODELS

    torch.manual_seed(0)
    classes, _, options = OTHERS.get(name, IMAGENET)
    net = MODELS[name](classes, **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1 - 0.9**10
    with torch.no_grad():
        net(images_for(name))
    return net.eval()


def images_for(name: str) -> Tensor:
    import torch

    size = OTHERS.get(name, IMAGENET)[1]
    return torch.randn((IMAGES, 3, size, size), generator=torch.Generator().manual_seed(1))


class Networks:
    """Model files in a folder, written when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def exported(self, name: str, bits: int = 7) -> Path:
        path = self.folder / f"{name}_{bits}.safetensors"
        return path if path.exists() else _export(name, bits, path)

    def full_range(self, name: str, bits: int) -> Path:
        """The network with codes that fill their bits: the worst case without VNNI, as no sum of them fits 16 bits."""
        path = self.folder / f"{name}_{bits}_full.safetensors"
        graph = format.load(self.exported(name, bits))
        rng = np.random.default_rng(0)
        for node in graph.members[0].nodes:
            if "weight" not in node.constants:
                continue
            codes, most = node.constants["weight"], 2 ** (node.bits - 1) - 1
            full = rng.integers(-most, most + 1, codes.shape, np.int8)
            node.constants["weight"] = full
            node.constants["multiplier"] = (node.constants["multiplier"] * codes.std() / full.std()).astype(np.float32)
        format.save(graph, path)
        return path

    def ensemble_of(self, name: str, count: int) -> Path:
        """Copies of one network: each packs its own weights, so they cost as much as different ones."""
        single = format.load(self.exported(name))
        members = [replace(single.members[0], name=f"member{i}") for i in range(count)]
        path = self.folder / f"{count}x{name}.safetensors"
        format.save(Graph(members, "logits"), path)
        return path

    def tiny(self) -> Path:
        """One member of the packaged demo: 0.8 MMAC."""
        ensemble = format.load(MODEL)
        path = self.folder / "tiny.safetensors"
        format.save(Graph(ensemble.members[:1], preprocess=ensemble.preprocess), path)
        return path


def _export(name: str, bits: int, path: Path) -> Path:
    from qdeploy.training import quantize_

    net, images = deepcopy(float_net(name)), images_for(name)
    quantize_(net, weight_bits=bits)
    qdeploy.export(net, images[:1], path, calibration=images.numpy())
    return path
