"""All weights of a network quantized in one launch on a GPU.

A forward pre-hook of the network quantizes its float32 weights together (`lsq_many`), and the quantizers hand out the
results; a forward hook takes them away. The gradients of all these weights come together too, when that of the first
layer is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.kernels.lsq import lsq_many, on_gpu
from qdeploy.training.attached_quantizers import parametrized_weight, weight_quantizer
from qdeploy.training.quantizer import Prepared, Quantizer, state_of


def quantize_together(net: nn.Module) -> None:
    """Has the weights of `net` quantized in one launch in every forward pass on a GPU."""
    if not hasattr(net, "_quantized_weights"):
        net.register_forward_pre_hook(_prepare_weights)
        net.register_forward_hook(_forget_weights, always_call=True)
    weights = {}
    for module in net.modules():
        quantizer = weight_quantizer(module)
        if quantizer is not None and parametrized_weight(module)[0] is quantizer:
            weights[quantizer] = parametrized_weight(module)
    pairs: Any = list(weights.items())
    net._quantized_weights = pairs  # an attribute, so that a copy of the network has its own


def _prepare_weights(net: nn.Module, args: tuple) -> None:
    if torch.compiler.is_exporting():
        return
    groups: dict[tuple[torch.device, bool], list[tuple[Quantizer, Tensor]]] = {}
    weights: Any = net._quantized_weights
    for quantizer, weight in weights:
        value = weight.original
        # Replicas of nn.DataParallel and torch.func have plain tensors or subclasses, without an address of their own.
        if type(value) is nn.Parameter and on_gpu(value) and value.dtype == torch.float32:
            # Frozen weights apart: among others their results would require a gradient, and so all activations.
            trains = torch.is_grad_enabled() and (value.requires_grad or quantizer.step.requires_grad)
            groups.setdefault((value.device, trains), []).append((quantizer, value))
    traced = torch.compiler.is_compiling()
    for (_, trains), pairs in groups.items():
        made, values = zip(*pairs, strict=True)
        ranges, scales = [(q.qmin, q.qmax) for q in made], [q.grad_scale for q in made]
        with torch.set_grad_enabled(trains):
            results = lsq_many(values, [q.step for q in made], ranges, scales)
        for quantizer, value, result in zip(made, values, results, strict=True):
            state = () if traced else state_of(value, quantizer.step)
            quantizer.prepared = Prepared(result, value, state, traced)


def _forget_weights(net: nn.Module, args: tuple, output: object) -> None:
    weights: Any = net._quantized_weights
    for quantizer, _ in weights:
        if quantizer.prepared is not None:  # torch.export reports every assignment
            quantizer.prepared = None
