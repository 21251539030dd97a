"""What an update reads: one minibatch of each source domain."""

from __future__ import annotations

import torch
from torch import Tensor

Minibatches = list[tuple[Tensor, Tensor]]  # images f32 [B, C, H, W] and classes int64 [B] of each source domain


def joined(minibatches: Minibatches) -> tuple[Tensor, Tensor]:
    """Images and classes of all domains, one after the other."""
    images, classes = zip(*minibatches, strict=True)
    return torch.cat(images), torch.cat(classes)
