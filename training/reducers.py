"""What several finished networks become: an ensemble, which decides by the rules of `qdeploy.kernels.ensemble`, or one
network, their average.

The functions take networks with the names that errors call them by, and read no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from qdeploy.errors import InputError
from qdeploy.training.attached_quantizers import quantizers
from qdeploy.training.config import Config
from qdeploy.training.methods.mean import Mean, averaged_tensors

Named = tuple[str, nn.Module]


def are_quantized(nets: Sequence[Named]) -> bool:
    """Whether the members of an ensemble carry quantizers. Raises InputError where some do and others do not."""
    (first, net), *others = nets
    found = bool(quantizers(net))
    for name, other in others:
        if bool(quantizers(other)) != found:
            words = ("a float", "a quantized") if found else ("a quantized", "a float")
            raise InputError(f"expected {words[1]} network as in {first}, got {words[0]} one - at {name}")
    return found


def ensemble_of(configs: Sequence[Config], quantized: bool) -> str:
    """The name that papers have for the ensemble of the networks of such runs.

    EoQ (QT-DoG, ICML 2025, equation 6) of quantized networks; EoA (arXiv 2110.10832) of moving averages; ERM ensemble
    of networks as plain training leaves them.
    """
    if quantized:
        return "EoQ"
    if all(config.average.name == "sma" for config in configs):
        return "EoA"
    plain = {"objective": "erm", "step": "plain", "quantization": "none", "average": "none"}
    if all(getattr(config, axis).name == name for config in configs for axis, name in plain.items()):
        return "ERM ensemble"
    return "ensemble"


def diwa_uniform(nets: Iterable[Named]) -> nn.Module:
    """DiWA (arXiv 2205.09739, algorithm 1, "uniform"): the mean of the parameters and float buffers of all networks.

    They share the network that they began with; of everything else, integer buffers say, it has what the first one has.
    Raises InputError for quantized networks and for those with other tensors. Holds two networks at a time.
    """
    mean, template = Mean(), None
    for name, net in nets:
        template = net if template is None else template
        mean.add(_tensors(name, net, mean))
    if template is None:
        raise InputError("expected a network or more, got none - at DiWA")
    return mean.network(template)


def diwa_restricted(nets: Iterable[Named], accuracy: Callable[[nn.Module], float]) -> tuple[nn.Module, list[str]]:
    """DiWA (arXiv 2205.09739, algorithm 1, "restricted"): as uniform, of some of the networks.

    They come by falling validation accuracy; the first is in, and each one after it where the `accuracy` of the average
    does not fall by it. Returns the average and the names of those that are in.
    """
    mean, kept, best, average = Mean(), list[str](), 0.0, None
    for name, net in nets:
        wider = mean.copy()
        wider.add(_tensors(name, net, mean))
        candidate = wider.network(net if average is None else average)
        found = accuracy(candidate)
        if average is None or found >= best:
            mean, best, average = wider, found, candidate
            kept.append(name)
    if average is None:
        raise InputError("expected a network or more, got none - at DiWA")
    return average, kept


def _tensors(name: str, net: nn.Module, mean: Mean) -> dict:
    """What of a network is averaged; raises InputError unless it is in float and goes with the `mean` so far."""
    if quantizers(net):
        raise InputError(f"expected a network in float, which DiWA averages, got a quantized one - at {name}")
    tensors = averaged_tensors(net)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    if mean.tensors and shapes != {key: tensor.shape for key, tensor in mean.tensors.items()}:
        raise InputError(f"expected the tensors of the networks before it, got others - at {name}")
    return tensors
