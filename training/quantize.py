"""Attaches LSQ quantizers to the weights and layer inputs of a network, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdeploy.calibration import doubt
from qdeploy.errors import InputError, one_line
from qdeploy.networks.quantizable import float_only_layers, quantizable_layers, weight_name
from qdeploy.networks.wrappers import plain_names
from qdeploy.training.attached_quantizers import (
    attach,
    attach_input,
    identity,
    input_quantizer,
    quantizers,
    step_parameters,
    weight_before,
    weight_quantizer,
)
from qdeploy.training.initial_steps import initial_step, training_scale
from qdeploy.training.one_launch import quantize_together
from qdeploy.training.quantize_checks import Layers, check_input, check_weight, checked_network, select
from qdeploy.training.quantizer import Quantizer
from qdeploy.training.ranges import first_batches, observe
from qdeploy.training.standardized import parametrize_standardized
from qdeploy.training.untouched import all_or_nothing, evaluating, undisturbed

INITS, GRAD_SCALES = ("lsq", "mse", "minmax"), ("tensor", "channel", "none")


def quantize_(
    net: nn.Module,
    weight_bits: int | Mapping[str, int | None] = 7,
    activation_bits: int | Mapping[str, int | None] | None = None,
    *,
    per_channel: bool = True,
    init: str = "lsq",
    grad_scale: str = "tensor",
    skip: Iterable[str] | None = None,
    calibration: object = None,
    allow_float: Iterable[str] = (),
) -> list[nn.Parameter]:
    """Quantizes the weights of the convolutions, linear layers and embeddings of any network, in place, among them the
    projections of nn.MultiheadAttention; on request the inputs of convolutions and linear layers, too.

    All of it or nothing: where it raises, whatever for, the network is as it was before. It warns of layers that train
    but that `qdeploy.export` cannot write.

    Args:
        net: the network, or one in torch.compile, DataParallel, AveragedModel or Fabric. Its Parameter objects stay the
            same; shared modules and tied weights share one quantizer. Quantize before DistributedDataParallel.
            Convolutions that standardize their weight get the quantizer behind the standardization.
        weight_bits: 2 to 8 bits, signed, for every layer; or bits by layer, and then only those layers. A key is a
            name or a pattern (`layer1.*`, `*.conv1`), the last one that matches counts, and None is float. Patterns
            leave the classifier out, or what `skip` names; the exact name takes it.
        activation_bits: 2 to 8 bits for the inputs of the layers whose weights are quantized; or bits by layer, of any
            layers; or None. A tensor has one step size, which all layers that read it share. Its range is unsigned
            where calibration saw no negative value, else signed.
        per_channel: one step size per output channel of a weight (QT-DoG appendix B), or one per weight.
        init: the first step sizes: "lsq" 2*mean|v|/sqrt(qmax), "mse" (least squared error), "minmax" (nothing clipped).
        grad_scale: "tensor" 1/sqrt(numel(weight)*qmax), "channel" with the elements of one channel, "none" 1.
        skip: names of layers to leave alone. None leaves the classifier: the quantizable layer registered last.
        calibration: inputs in any form that `export` takes; required where inputs are quantized. The first 4 batches
            are used (of an array, 128 images), converted to the type of the network's first parameter.
        allow_float: names or patterns (`*.in_proj_weight`) of matrices outside of these layers that may stay float.
            Any other is refused, so that none does in silence; see `qdeploy.training.float_matrices`.

    Returns:
        The trainable step sizes, in order; `step_group` makes an optimizer group of them.

    Raises:
        InputError: bits out of range, an unknown layer or option, nothing to quantize, a layer quantized before, a
            weight that is no Parameter, not float or not finite, a matrix outside of the layers, missing or bad
            calibration data, different bits for layers that read one tensor, or DistributedDataParallel around the
            network.
    """
    net = checked_network(net)
    weights, inputs = select(net, weight_bits, activation_bits, skip, allow_float, quantizable_layers(net))
    for value, choices, name in ((init, INITS, "init"), (grad_scale, GRAD_SCALES, "grad_scale")):
        if value not in choices:
            known = f"{', '.join(choices[:-1])} or {choices[-1]}"
            raise InputError(f"expected {name} {known}, got {value!r} - at quantize_")
    if inputs and calibration is None:
        got = "none (a saved state needs none: quantize_like_)"
        raise InputError(f"expected calibration batches for quantized activations, got {got} - at quantize_")
    with all_or_nothing(net):
        parametrize_standardized(layer for layer, _ in weights.values())
        made = _weight_quantizers(net, weights, per_channel, init, grad_scale)
        for name, (layer, _) in inputs.items():
            check_input(layer, f"layer `{name}`")
        images = first_batches(net, calibration) if inputs else []
        for name, (layer, _) in weights.items():
            attach(layer, made[name])
        quantize_together(net)
        if inputs:
            _attach_input_quantizers(net, inputs, init, grad_scale, images)
        if reason := _refusal_of_export(net, images[:1]):
            expected = "a network that qdeploy.export can write (this one only trains)"
            warnings.warn(f"expected {expected}, got {reason} - at quantize_", stacklevel=2)
    return step_parameters(net)


def _refusal_of_export(net: nn.Module, images: list[Tensor]) -> str:
    """Why `export` will refuse the network, from a trace where there are `images`, else from the types of its layers;
    "" where nothing is known against it."""
    if not images:
        return "; ".join(float_only_layers(net))
    from qdeploy.exporter import check  # takes half a second

    try:
        with undisturbed(net):
            check(net, images[0].float() if images[0].is_floating_point() else images[0])
    except Exception as error:  # whatever it is, the network trains
        return f"a refusal: {one_line(error)}"
    return ""


@torch.no_grad()
def _weight_quantizers(
    net: nn.Module, targets: Layers, per_channel: bool, init: str, grad_scale: str
) -> dict[str, Quantizer]:
    """A quantizer for the weight of each layer, or that of the layer with which it shares the weight."""
    made: dict[str, Quantizer] = {}
    by_weight = {identity(m): (name, q) for name, m in quantizable_layers(net).items() if (q := weight_quantizer(m))}
    with evaluating(net):  # a spectral norm in training is another one every time
        for name, (layer, bits) in targets.items():
            weight = check_weight(layer, f"layer `{name}`")
            key = identity(layer)
            if key not in by_weight:
                by_weight[key] = name, _make_weight_quantizer(weight, bits, per_channel, init, grad_scale)
            other, made[name] = by_weight[key]
            if made[name].bits != bits:
                got = f"{made[name].bits} for `{other}` and {bits}"
                raise InputError(
                    f"expected the same bits for layers that share a weight, got {got} - at layer `{name}`"
                )
    return made


def _make_weight_quantizer(weight: Tensor, bits: int, per_channel: bool, init: str, grad_scale: str) -> Quantizer:
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows = _rows(weight.float(), 0 if per_channel else -1)
    step = initial_step(rows, qmin, qmax, init)
    scale = training_scale(weight.numel(), weight.numel() // len(rows), qmax, grad_scale)
    return Quantizer(step if per_channel else step[0], qmin, qmax, scale)


def _rows(value: Tensor, axis: int) -> Tensor:
    """The elements that share a step size, one row each."""
    return value.reshape(1, -1) if axis == -1 else value.flatten(1)


def _attach_input_quantizers(net: nn.Module, targets: Layers, init: str, grad_scale: str, images: list[Tensor]) -> None:
    observed, bundle_of = observe(net, {name: layer for name, (layer, _) in targets.items()}, images)
    made: dict[str, tuple[str, Quantizer]] = {}
    numbers = [0, *(quantizer.bundle for quantizer in quantizers(net).values())]
    silent = [f"`{name}`" for name in targets if not any(part.any() for part in observed[bundle_of[name]].samples)]
    if silent:
        expected = "inputs in calibration that are not all zero (the first step sizes would be 1e-8)"
        warnings.warn(f"expected {expected}, got zeros - at layer {', '.join(silent)}", stacklevel=3)
    elif len({batch.shape[1:] for batch in images}) == 1 and (found := doubt(torch.cat(images).float().numpy())):
        warnings.warn(f"{found} - at the calibration data", stacklevel=3)
    for name, (layer, bits) in targets.items():
        bundle = bundle_of[name]
        if bundle not in made:
            seen = observed[bundle]
            values = torch.cat(seen.samples)
            qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if values.amin() < 0 else (0, 2**bits - 1)
            step = initial_step(values[None], qmin, qmax, init)[0]
            # Features of one sample, not of the batch (LSQ section 2.2): the scale does not change with the batch.
            scale = training_scale(seen.features, seen.features, qmax, grad_scale)
            made[bundle] = name, Quantizer(step, qmin, qmax, scale, max(numbers) + 1 + len(made))
        other, quantizer = made[bundle]
        if quantizer.bits != bits:
            got = f"{quantizer.bits} for `{other}` and {bits}"
            raise InputError(f"expected the same bits for layers that read one tensor, got {got} - at layer `{name}`")
        attach_input(layer, quantizer)


@dataclass(frozen=True)
class LayerSummary:
    """One layer of which something is quantized. None and 0 stand for what a weight in float or an input in float has
    not. Step sizes are medians over channels; `error` is rms(w - Q(w)) / rms(w)."""

    name: str
    shape: tuple[int, ...]
    bits: int | None  # None: the weight is in float
    input_bits: int | None  # None: the input is in float
    step: float | None
    mse_step: float | None  # what init="mse" would choose for the weights as they are
    error: float
    clipped: float  # share of weights outside the range


@torch.no_grad()
def summary(net: nn.Module) -> list[LayerSummary]:
    """What is quantized, how finely, and how far the step sizes are from the ones of least squared error."""
    rows = []
    names = plain_names(net)
    for path, layer in net.named_modules():
        quantizer, inputs = weight_quantizer(layer), input_quantizer(layer)
        input_bits = inputs.bits if inputs is not None else None
        if quantizer is not None:
            rows.append(_summary_of_weight(names[path], layer, quantizer, input_bits))
        elif inputs is not None:
            weight = getattr(layer, weight_name(layer))
            rows.append(LayerSummary(names[path], tuple(weight.shape), None, input_bits, None, None, 0.0, 0.0))
    return rows


def _summary_of_weight(name: str, layer: nn.Module, quantizer: Quantizer, input_bits: int | None) -> LayerSummary:
    weight = weight_before(layer, quantizer).float()
    rest = weight / quantizer.step.reshape(-1, *[1] * (weight.dim() - 1))
    best = initial_step(_rows(weight, quantizer.axis), quantizer.qmin, quantizer.qmax, "mse")
    return LayerSummary(
        name=name,
        shape=tuple(weight.shape),
        bits=quantizer.bits,
        input_bits=input_bits,
        step=quantizer.step.median().item(),
        mse_step=best.median().item(),
        error=((quantizer(weight) - weight).norm() / weight.norm().clamp(min=1e-30)).item(),
        clipped=((rest < quantizer.qmin) | (rest > quantizer.qmax)).float().mean().item(),
    )
