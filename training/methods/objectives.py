"""The loss of one update: what is minimized, whatever makes the gradients and whatever is quantized.

Every random draw comes from the generator of the update, so an objective called twice with generators of one seed (a
step that moves uphill does so) gives one and the same loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from qdeploy.errors import InputError
from qdeploy.networks.wrappers import unwrapped
from qdeploy.training.attached_quantizers import weight_before, weight_quantizer
from qdeploy.training.methods.batches import Minibatches, joined
from qdeploy.training.methods.features import changed_output, module_of, of_all_devices, pooled, tap, tap_features
from qdeploy.training.quantizer import Quantizer


class Objective(Protocol):
    """What is minimized."""

    def loss(self, net: nn.Module, minibatches: Minibatches, rng: torch.Generator) -> Tensor:
        """The loss of one update, shape [].

        Args:
            net: gives logits [N, K]; in train mode, and perhaps wrapped. It is called once, on all domains together.
            minibatches: one of each source domain.
            rng: on the CPU, seeded for this update.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on: tensors, numbers and None."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        return None


class ERM(Objective):
    """Empirical risk minimization: the mean cross-entropy of the images of all domains."""

    def loss(self, net: nn.Module, minibatches: Minibatches, rng: torch.Generator) -> Tensor:
        images, classes = joined(minibatches)
        return functional.cross_entropy(net(images), classes)


class CORAL(Objective):
    """Deep CORAL (arXiv 1607.01719, equations 1 to 3, and means as well): features of all domains are to look alike.

    Mean over domains of the cross-entropy, plus gamma times the mean over pairs of domains of
    mean((mu_i - mu_j)^2) + mean((C_i - C_j)^2). Here mu and C are mean and unbiased covariance of the features in front
    of the classifier, averaged over positions, of the images on all devices.
    Raises InputError for a gamma below 0 and for domains of one image.
    """

    def __init__(self, gamma: float = 1.0):
        if not 0 <= gamma < math.inf:
            raise InputError(f"expected gamma of 0 or more, got {gamma} - at CORAL")
        self.gamma = gamma

    def loss(self, net: nn.Module, minibatches: Minibatches, rng: torch.Generator) -> Tensor:
        sizes = [len(classes) for _, classes in minibatches]
        with tap_features(net) as tapped:
            logits = net(joined(minibatches)[0])
        pairs = zip(logits.split(sizes), minibatches, strict=True)
        losses = [functional.cross_entropy(own, classes) for own, (_, classes) in pairs]
        features = [of_all_devices(own) for own in pooled(tapped.value).to(logits.dtype).split(sizes)]
        if min(map(len, features)) < 2:
            raise InputError("expected 2 images or more of each domain, got 1 - at CORAL")
        moments = [(own.mean(0), own.T.cov()) for own in features]
        gaps = [(m - n).square().mean() + (c - d).square().mean() for (m, c), (n, d) in combinations(moments, 2)]
        loss = torch.stack(losses).mean()
        return loss + self.gamma * torch.stack(gaps).mean() if gaps else loss


class Around(Objective):
    """Around another objective, ERM by default; it has no state but that one's."""

    def __init__(self, inner: Objective | None):
        self.inner = inner or ERM()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


class MixStyle(Around):
    """MixStyle (arXiv 2104.02008) around another objective: images borrow each other's style.

    After each of `places`, with one chance `p` a forward pass: (x - mu) / sigma * sigma_mix + mu_mix. Here mu and sigma
    are mean and unbiased deviation of each image and channel over positions, 1e-6 within the root, without gradient;
    mix is lambda of the image's own and 1 - lambda of a partner's, lambda drawn from Beta(alpha, alpha) for each image.
    In train mode only.

    Args:
        inner: the objective of the network with mixed styles.
        places: names of modules that give maps [N, C, H, W]; by default all `stages` of the network but the last, of a
            ResNet layer1 to layer3, as in the paper.
        partners: "random", a permutation of all images, or "crossdomain", one of the next domain's for each image.

    Raises InputError for an option out of range, domains of unequal sizes or maps of one position.
    """

    def __init__(
        self,
        inner: Objective | None = None,
        places: Sequence[str] | None = None,
        partners: str = "random",
        p: float = 0.5,
        alpha: float = 0.1,
    ):
        if partners not in ("random", "crossdomain"):
            raise InputError(f"expected partners random or crossdomain, got {partners!r} - at MixStyle")
        if not 0 <= p <= 1 or not 0 < alpha < math.inf:
            raise InputError(f"expected p from 0 to 1 and alpha above 0, got {p} and {alpha} - at MixStyle")
        super().__init__(inner)
        self.places, self.partners, self.p, self.alpha = places, partners, p, alpha

    def loss(self, net: nn.Module, minibatches: Minibatches, rng: torch.Generator) -> Tensor:
        sizes = [len(classes) for _, classes in minibatches]
        with ExitStack() as places:
            for name in (self.places or stages_before_last(net)) if net.training else ():
                if torch.rand((), generator=rng) < self.p:
                    shares, partners = self._draw(sizes, rng)
                    places.enter_context(changed_output(net, name, partial(mix_styles, shares, partners, name)))
            return self.inner.loss(net, minibatches, rng)

    def _draw(self, sizes: list[int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Lambda [N, 1, 1, 1] and the partner [N] of each image."""
        # numpy's Beta takes alpha near 0, where the quotient of two gammas is 0 / 0; torch's has no generator.
        seed = int(torch.randint(2**63 - 1, (), generator=rng))
        shares = np.random.default_rng(seed).beta(self.alpha, self.alpha, (sum(sizes), 1, 1, 1))
        if self.partners == "random":
            return torch.from_numpy(shares), torch.randperm(sum(sizes), generator=rng)
        if len(sizes) < 2 or len({*sizes}) > 1:
            raise InputError(f"expected 2 domains or more, as many images of each, got {sizes} - at MixStyle")
        own = [part[torch.randperm(len(part), generator=rng)] for part in torch.arange(sum(sizes)).split(sizes)]
        return torch.from_numpy(shares), torch.cat([*own[1:], own[0]])


def stages_before_last(net: nn.Module) -> Sequence[str]:
    """The names of all stages of a network but the last; raises InputError where it does not name its stages."""
    stages = getattr(unwrapped(net), "stages", None)
    if stages is None:
        got = f"a {type(unwrapped(net)).__name__}: name them with --objective.places"
        raise InputError(f"expected a network that names its stages, got {got} - at MixStyle")
    return stages[:-1]


def mix_styles(shares: Tensor, partners: Tensor, name: str, x: Tensor) -> Tensor:
    """The maps [N, C, H, W] of module `name` with the styles that `MixStyle` describes; shares [N, 1, 1, 1]."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[2] * x.shape[3] < 2:
        got = [*x.shape] if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"expected maps [N, C, H, W] of 2 positions or more, got {got} - at `{name}`")
    variance, mu = (part.detach() for part in torch.var_mean(x, (2, 3), keepdim=True))
    sigma = (variance + 1e-6).sqrt()
    own, partners = shares.to(x), partners.to(x.device)
    sigma_mix, mu_mix = (own * one + (1 - own) * one[partners] for one in (sigma, mu))
    return (x - mu) / sigma * sigma_mix + mu_mix


class SelfDistillation(Objective):
    """Self-distilled vision transformer (arXiv 2207.12392): one block is to know what the last knows.

    Cross-entropy plus weight T^2 mean(p (log p - log q)) over all logits. Here p = softmax(o_L / T) is the network's,
    not detached, and q = softmax(o_l / T) that of the class token after block l, through the network's own norm and
    head. One l of 1 to L is drawn for an update; L adds 0. Raises InputError for an option out of range.

    Args:
        weight: 0.1, 0.2 or 0.5 in the paper. temperature: T, 3 or 5.
        blocks, norm, head: names of the list of blocks, which give tokens [N, tokens, C], and of what follows it.
    """

    def __init__(
        self,
        weight: float = 0.1,
        temperature: float = 3.0,
        blocks: str = "blocks",
        norm: str = "norm",
        head: str = "head",
    ):
        if not 0 <= weight < math.inf or not 0 < temperature < math.inf:
            got = f"{weight} and {temperature}"
            raise InputError(f"expected weight of 0 or more and temperature above 0, got {got} - at SelfDistillation")
        self.weight, self.temperature = weight, temperature
        self.blocks, self.norm, self.head = blocks, norm, head

    def loss(self, net: nn.Module, minibatches: Minibatches, rng: torch.Generator) -> Tensor:
        images, classes = joined(minibatches)
        names = [name for name, _ in module_of(net, self.blocks).named_children()]
        drawn = names[int(torch.randint(len(names), (), generator=rng))]
        norm, head = module_of(net, self.norm), module_of(net, self.head)
        with tap(net, f"{self.blocks}.{drawn}") as tapped:
            logits = net(images)
        early = head(norm(tapped.value.to(logits.dtype))[:, 0])  # mixed precision ends with the forward pass
        p, q = (functional.log_softmax(one / self.temperature, 1) for one in (logits, early))
        distance = (p.exp() * (p - q)).mean()
        return functional.cross_entropy(logits, classes) + self.weight * self.temperature**2 * distance


class Bins(Around):
    """The bins of VVTQ (arXiv 2307.00331), on top of another objective: weights gather around their quantized values.

    For every quantized weight, v = clip(w / s) s: mean((v - w_q)^2), w_q detached, plus the sum over codes of the
    unbiased variance of the v with that code, two or more; codes of different step sizes are different ones. The sum
    over weights counts 0.01 (1 - cos(pi u)) / 2, where u goes from 0 to 1 over the last three quarters of training.

    Args:
        inner: the objective that it is added to.
        progress: tells the share of training that is done, 0 to 1; the trainer's.
    """

    def __init__(self, progress: Callable[[], float], inner: Objective | None = None):
        super().__init__(inner)
        self.progress = progress

    def loss(self, net: nn.Module, minibatches: Minibatches, rng: torch.Generator) -> Tensor:
        loss = self.inner.loss(net, minibatches, rng)
        u = (self.progress() - 0.25) / 0.75
        if u <= 0:
            return loss
        layers = {quantizer: layer for layer in net.modules() if (quantizer := weight_quantizer(layer))}
        scatter = [scatter_in_bins(weight_before(layer, own), own) for own, layer in layers.items()]
        return loss + 0.005 * (1 - math.cos(math.pi * u)) * sum(scatter)


def scatter_in_bins(weight: Tensor, quantizer: Quantizer) -> Tensor:
    """Squared distance of the clipped weights from their codes, and their variances within each code, shape []."""
    step = quantizer.step.reshape(-1, 1)
    codes = quantizer.codes(weight).reshape(len(step), -1).long()
    clipped = (weight.reshape(len(step), -1) / step).clamp(quantizer.qmin, quantizer.qmax) * step
    levels = quantizer.qmax - quantizer.qmin + 1
    own_bins = levels * torch.arange(len(step), device=codes.device).reshape(-1, 1)
    bins, values = (codes - quantizer.qmin + own_bins).flatten(), clipped.flatten()
    counts = torch.bincount(bins, minlength=levels * len(step))
    means = values.new_zeros(len(counts)).index_add(0, bins, values) / counts.clamp(min=1)
    variances = ((values - means[bins]).square() / (counts - 1).clamp(min=1)[bins]).sum()
    return (clipped - (codes * step).detach()).square().mean() + variances
