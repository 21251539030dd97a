"""What calibration data show of the inputs of layers, and which layers read one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdeploy.calibration import batches
from qdeploy.errors import InputError, QdeployError, one_line
from qdeploy.training.untouched import undisturbed

CALIBRATION_BATCHES = 4
SAMPLES_PER_BATCH = 65536


def first_batches(net: nn.Module, calibration: object) -> list[Tensor]:
    """On the CPU: token ids as int64, all else of the type of the network's first parameter."""
    dtype = next(parameter.dtype for parameter in net.parameters() if parameter.is_floating_point())
    with undisturbed(net):  # a loader that shuffles draws random numbers
        found = batches(calibration, most=CALIBRATION_BATCHES, ids=None)
        return [torch.tensor(batch, dtype=None if batch.dtype.kind == "i" else dtype) for batch in found]


@dataclass
class Observed:
    """What calibration saw of the tensors that share one step size."""

    samples: list[Tensor]
    features: int = 1  # elements of one sample of the batch

    def add(self, value: Tensor, generator: torch.Generator) -> None:
        flat = value.detach().float().flatten()
        count = min(flat.numel(), SAMPLES_PER_BATCH)
        picks = torch.randint(flat.numel(), (count,), generator=generator, device="cpu")  # where the generator is
        self.samples += [flat[picks.to(flat.device)], flat.amin()[None], flat.amax()[None]]
        self.features = value[0].numel()


def observe(
    net: nn.Module, layers: dict[str, nn.Module], images: list[Tensor]
) -> tuple[dict[str, Observed], dict[str, str]]:
    """Runs batches in eval mode; returns what was seen by bundle, and the bundle of each layer. Leaves `net` as it was.

    Layers that read the very same tensor (the first convolution and the shortcut of a residual block) form a bundle:
    one tensor can have only one integer code.
    """
    parent = {name: name for name in layers}
    by_layer: dict[str, Observed] = {name: Observed([]) for name in layers}
    generator = torch.Generator().manual_seed(0)
    readers: dict[tuple[int, int], tuple[str, Tensor]] = {}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    def observer(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            value = args[0] if args else kwargs["input"]
            _check_input(module, value, name)
            key = (id(value), value._version)
            if key in readers:
                parent[root(name)] = root(readers[key][0])
            else:
                readers[key] = (name, value)  # the reference keeps the id from being used again
            by_layer[name].add(value, generator)

        return hook

    handles = [layer.register_forward_pre_hook(observer(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with undisturbed(net):
            for index, batch in enumerate(images):
                readers.clear()
                run(net, batch, index)
    finally:
        for handle in handles:
            handle.remove()
    if idle := [f"`{name}`" for name in layers if not by_layer[name].samples]:
        expected = "calibration to reach every layer (skip those that the network does not call)"
        raise InputError(f"expected {expected}, got no input - at layer {', '.join(idle)}")
    bundle_of = {name: root(name) for name in layers}
    merged: dict[str, Observed] = {}
    for name, bundle in bundle_of.items():
        merged.setdefault(bundle, Observed([])).samples += by_layer[name].samples
        merged[bundle].features = by_layer[name].features
    return merged, bundle_of


def _check_input(layer: nn.Module, value: Tensor, name: str) -> None:
    wanted = {nn.Conv1d: 3, nn.Conv2d: 4}
    if any(isinstance(layer, kind) and value.dim() != rank for kind, rank in wanted.items()):
        got = f"one without a batch, {list(value.shape)}"
        raise InputError(f"expected inputs [N, C, ...] in calibration, got {got} - at layer `{name}`")
    if not value.isfinite().all():
        raise InputError(f"expected finite inputs in calibration, got NaN or infinity - at layer `{name}`")


def run(net: nn.Module, images: Tensor, index: int) -> None:
    """Shows the network the batch `index` of the calibration data."""
    try:
        net(images.to(next(net.parameters()).device))
    except QdeployError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {one_line(error)}"
        at = f"batch {index} of the calibration data, {list(images.shape)}"
        raise InputError(f"expected inputs that the network takes, got {got} - at {at}") from error
