"""What a network makes of batches: cross-entropy and accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]  # inputs as the network takes them, and classes i64 [n]
Domains = Mapping[str, Iterable[Batch]]


@torch.no_grad()
def cross_entropy(net: nn.Module, batches: Iterable[Batch]) -> float:
    """The mean over all images."""
    found, count = torch.zeros((), dtype=torch.float64), 0
    for inputs, labels in batches:
        found += functional.cross_entropy(net(inputs).float(), labels, reduction="sum").double().cpu()
        count += len(labels)
    return float(found) / count


def mean_cross_entropy(net: nn.Module, domains: Domains) -> float:
    """The mean over domains of that of their images."""
    return statistics.fmean(cross_entropy(net, batches) for batches in domains.values())


@torch.no_grad()
def accuracy(net: nn.Module, batches: Iterable[Batch]) -> float:
    """The share of images that are classified right."""
    right = [net(inputs).argmax(1) == labels for inputs, labels in batches]
    return float(torch.cat(right).double().mean())


@torch.no_grad()
def loss_and_accuracy(net: nn.Module, domains: Domains) -> tuple[float, float]:
    """Cross-entropy and accuracy, both in one pass: means over domains of those of their images."""
    losses, accuracies = [], []
    for batches in domains.values():
        loss, right, count = 0.0, 0, 0
        for inputs, labels in batches:
            logits = net(inputs).float()
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
            count += len(labels)
        losses.append(loss / count)
        accuracies.append(right / count)
    return statistics.fmean(losses), statistics.fmean(accuracies)
