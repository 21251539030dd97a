"""What an update reads: one minibatch of each source domain, images or texts."""

from __future__ import annotations

import torch
from torch import Tensor

Minibatches = list[tuple[Tensor, Tensor]]  # f32 [B, C, H, W] or i64 [B, T], and classes int64 [B]


def joined(minibatches: Minibatches) -> tuple[Tensor, Tensor]:
    """Images and classes of all domains, one after the other."""
    images, classes = zip(*minibatches, strict=True)
    return torch.cat(images), torch.cat(classes)
