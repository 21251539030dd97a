"""CLIPood (arXiv 2302.00864): a CLIP image tower is fine-tuned against the fixed text features of the classes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn import functional

from qdeploy.errors import InputError
from qdeploy.training.methods.averages import OneMean
from qdeploy.training.methods.batches import Minibatches, joined
from qdeploy.training.methods.mean import averaged_tensors
from qdeploy.training.methods.objectives import Objective


class TextHead(nn.Module):
    """A network whose classifier are text features: logits = scale * f/||f|| . t_k, where f = tower(images), [N, C].

    Args:
        tower: gives f, or [N, C] in any other way.
        text_features: f32 [K, C], of any length; `read_text_features` reads them.
        scale: T, one over CLIP's temperature.
    """

    text_features: Tensor
    scale: Tensor

    def __init__(self, tower: nn.Module, text_features: Tensor, scale: float = 100.0):
        super().__init__()
        self.tower = tower
        self.register_buffer("text_features", functional.normalize(text_features.float(), dim=1))
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, images: Tensor) -> Tensor:
        features = self.tower(images)
        channels = self.text_features.shape[1]
        if features.shape[1:] != (channels,):
            got = [*features.shape]
            raise InputError(f"expected image features [N, {channels}], as those of the text, got {got} - at TextHead")
        return self.scale * functional.normalize(features, dim=1) @ self.text_features.T


def read_text_features(path: Path, classes: int) -> Tensor:
    """f32 [K, C] from a .npy file, or a .safetensors file of one tensor; raises InputError for anything else."""
    try:
        if path.suffix == ".safetensors":
            found = [*load_file(path).values()]
        else:
            with path.open("rb") as file:
                found = [np.lib.format.read_array(file, allow_pickle=False)]
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise InputError(f"expected text features in .npy or .safetensors, got {error} - at {path}") from error
    if len(found) != 1:
        raise InputError(f"expected one tensor of text features, got {len(found)} - at {path}")
    features = found[0]
    if features.ndim != 2 or len(features) != classes or features.dtype.kind != "f":
        got = f"{features.dtype} {[*features.shape]}"
        raise InputError(f"expected floats [K, C], text features of {classes} classes, got {got} - at {path}")
    if not np.isfinite(features).all() or not features.any(1).all():
        raise InputError(f"expected finite text features, not all 0 for any class, got others - at {path}")
    return torch.from_numpy(features.astype(np.float32))


class CLIPood(Objective):
    """Margin metric softmax (arXiv 2302.00864): the cross-entropy of T (f/||f|| - margin t_y) . t_k.

    So class k is to stay margin (1 - t_y . t_k) behind, more where its meaning is another one; evaluations have none of
    this. The network is a `TextHead`. Raises InputError for a margin below 0.
    """

    def __init__(self, margin: float = 0.3):
        if not 0 <= margin < math.inf:
            raise InputError(f"expected a margin of 0 or more, got {margin} - at CLIPood")
        self.margin = margin

    def loss(self, net: nn.Module, minibatches: Minibatches, rng: torch.Generator) -> Tensor:
        head = next((module for module in net.modules() if isinstance(module, TextHead)), None)
        if head is None:
            raise InputError(f"expected a network with a TextHead, got {type(net).__name__} without one - at CLIPood")
        images, classes = joined(minibatches)
        alike = head.text_features[classes] @ head.text_features.T
        return functional.cross_entropy(net(images) - self.margin * head.scale * alike, classes)


class BetaAverage(OneMean):
    """Beta moving average (arXiv 2302.00864), from the network that training begins with on.

    Of `updates` + 1 networks the i-th, from 0, weighs as the density of Beta(beta, beta) at (i + 1/2) / (updates + 1).
    With beta below 1 the first and the last ones weigh most. After a switch it begins with the first quantized one.
    Raises InputError for a beta that is not above 0.
    """

    def __init__(self, beta: float = 0.5, *, updates: int):
        if not 0 < beta < math.inf:
            raise InputError(f"expected beta above 0, got {beta} - at BetaAverage")
        super().__init__()
        self.beta, self.updates = beta, updates

    def begin(self, net: nn.Module) -> None:
        self._add(net, 0)

    def update(self, net: nn.Module, t: int) -> None:
        self._add(net, t + 1)

    def _add(self, net: nn.Module, i: int) -> None:
        place = (i + 0.5) / (self.updates + 1)
        self.mean.add(averaged_tensors(net), (place * (1 - place)) ** (self.beta - 1))
