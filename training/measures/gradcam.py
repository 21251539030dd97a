"""Where a network looks: GradCAM (Selvaraju et al., ICCV 2017) at the last convolutional stage (QT-DoG, figure 6).

    map = relu( sum over channels k of a_k A_k ),   a_k = mean over positions of d y_c / d A_k

A are the features of the stage, y_c the output for the class that the network predicts. The map is enlarged to the
image (bilinear) and scaled to [0, 1] for each image; one that is zero everywhere stays so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qdeploy.errors import InputError
from qdeploy.networks.quantizable import classifier
from qdeploy.networks.wrappers import plain_names
from qdeploy.training.inputs import Images
from qdeploy.training.measures.draws import Draws
from qdeploy.training.measures.losses import Batch
from qdeploy.training.measures.measured_run import MeasuredRun
from qdeploy.training.untouched import evaluating, undisturbed


@dataclass(frozen=True)
class GradCAM:
    """maps: f32 [N, H, W] in [0, 1]. predicted: i64 [N]. peaks: f32 [N], the largest value of each map before it was
    scaled, 0 where nothing speaks for the class."""

    maps: Tensor
    predicted: Tensor
    peaks: Tensor


def gradcam(net: nn.Module, images: Tensor, stage: str | None = None) -> GradCAM:
    """Of `images` [N, C, H, W] as the network takes them.

    net: any, quantized or not; it is left as it is. stage: the name of a module; None: `last_stage`.

    Raises InputError for a stage that is not there, or whose output has not the form [N, channels, height, width].
    """
    name = last_stage(net, images) if stage is None else stage
    features: list[Tensor] = []
    handle = _module(net, name).register_forward_hook(lambda module, args, output: features.append(output))
    try:
        with evaluating(net), torch.enable_grad():
            outputs = net(images.detach().requires_grad_())
            predicted = outputs.argmax(1)
            maps = _maps(features[-1] if features else outputs, outputs, predicted, name)
    finally:
        handle.remove()
    maps = functional.interpolate(maps[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    peaks, floors = maps.amax((1, 2), keepdim=True), maps.amin((1, 2), keepdim=True)
    scaled = (maps - floors) / torch.where(peaks > floors, peaks - floors, 1)
    return GradCAM(torch.where(peaks > floors, scaled, 0), predicted, peaks.flatten())


def _maps(features: Tensor, outputs: Tensor, predicted: Tensor, stage: str) -> Tensor:
    if not isinstance(features, Tensor) or features.dim() != 4:
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(f"expected features [N, channels, height, width], got {got} - at stage `{stage}`")
    (gradient,) = torch.autograd.grad(outputs.gather(1, predicted[:, None]).sum(), features)
    return (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu().detach().float()


def _module(net: nn.Module, name: str) -> nn.Module:
    modules = {plain: net.get_submodule(path) for path, plain in plain_names(net).items()}
    if name not in modules:
        raise InputError(f"expected the name of a module of the network, got {name!r} - at stage")
    return modules[name]


def last_stage(net: nn.Module, images: Tensor) -> str:
    """The module that is done last, before the classifier begins, of those whose output are maps of more than one
    position: `layer4` of a ResNet. Raises InputError where there is none, as in a transformer."""
    names, head = plain_names(net), classifier(net)
    found: list[str] = []
    begun: list[bool] = []

    def note_stage(path: str, module: nn.Module, args: tuple, output: Any) -> None:
        if not begun and isinstance(output, Tensor) and output.dim() == 4 and output[0, 0].numel() > 1:
            found.append(names[path])

    handles = []
    for path, module in net.named_modules():
        if names[path] == head:
            handles.append(module.register_forward_pre_hook(lambda module, args: begun.append(True)))
        elif path:
            handles.append(module.register_forward_hook(partial(note_stage, path)))
    try:
        with undisturbed(net):
            net(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise InputError("expected a stage that makes maps [N, channels, height, width], got none - at the network")
    return found[-1]


def pictures(
    net: nn.Module,
    domains: Iterable[tuple[str, Batch, Tensor]],
    classes: Sequence[str],
    stage: str | None = None,
) -> dict[str, Any]:
    """GradCAM of batches, each with the name of its domain and its pixels, u8 [n, C, H, W], for a picture.

    Returns {"stage", "classes", "table": rows of "domain", "label", "predicted" and "peak"; "images": [{"pixels": u8
    [C][H][W], "map": [H][W] to three decimals}, ...]}.
    """
    table, images = [], []
    for domain, (inputs, labels), pixels in domains:
        stage = stage or last_stage(net, inputs)
        found = gradcam(net, inputs, stage)
        for i, label in enumerate(labels.tolist()):
            row = {"domain": domain, "label": label, "predicted": found.predicted[i].item()}
            table.append({**row, "peak": found.peaks[i].item()})
            levels = (found.maps[i].cpu().double() * 1000).round() / 1000
            images.append({"pixels": pixels[i].tolist(), "map": levels.tolist()})
    return {"stage": stage, "classes": [*classes], "table": table, "images": images}


def of_run(run: MeasuredRun, draws: Draws, *, images: int = 6, stage: str = "") -> dict[str, Any]:
    """Of the first images of each part of the target, `images` of each domain."""
    if not isinstance(run.benchmark.inputs, Images):
        raise InputError("expected a run with images, got one with texts - at gradcam")
    shown = []
    for name, (domain, positions) in run.target_part.items():
        inputs, labels = run.target[name][0]
        pixels = run.benchmark.domains[domain].batch(positions[:images])
        shown.append((name, (inputs[:images], labels[:images]), pixels))
    return pictures(run.net, shown, run.benchmark.classes, stage or None)
