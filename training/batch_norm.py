"""The statistics of BatchNorm: kept as they are, made anew, or made of the minibatches of all devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qdeploy.errors import InputError
from qdeploy.networks.wrappers import plain_names
from qdeploy.training.untouched import evaluating


def freeze_(net: nn.Module) -> None:
    """Normalizes with the statistics that are there, those of pretraining; gains and shifts still train (DomainBed's
    freeze_bn). `net.train()` undoes it: call it after each."""
    for layer in _batch_norms(net):
        layer.eval()


@torch.no_grad()
def reestimate_(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Makes all running statistics anew: the means over `batches` of mean and unbiased variance of each batch.

    Only BatchNorm is in train mode meanwhile. Parameters do not change, nor does the mode that `net` was in.

    Args:
        net: with or without quantizers, perhaps wrapped.
        batches: images f32 [N, C, H, W], on the device of `net`; all of them are used.

    Raises:
        InputError: no batch; the statistics are then what they were, as where `batches` or `net` raises.
    """
    layers = _batch_norms(net)
    momenta = [layer.momentum for layer in layers]
    buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    before, count = [buffer.clone() for buffer in buffers], 0
    try:
        with evaluating(net):
            for layer in layers:
                layer.reset_running_stats()
                layer.training, layer.momentum = True, None  # a cumulative average
            for images in batches:
                net(images)
                count += 1
        if not count:
            raise InputError("expected one batch or more, got none - at the statistics of BatchNorm")
    except BaseException:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def synchronize_(net: nn.Module) -> None:
    """In train mode statistics are from now on those of the images of all devices. Names, Parameters and hooks stay.

    `net` is on its device, and not wrapped yet. Raises InputError, before anything changes, for a BatchNorm of a class
    of its own: it may compute something else.
    """
    names = plain_names(net)
    layers = [(names[path], module) for path, module in net.named_modules() if isinstance(module, _BatchNorm)]
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SynchronizedOnCPU)
    for name, layer in layers:
        if type(layer) not in plain:
            expected = "a BatchNorm of torch to synchronize"
            raise InputError(f"expected {expected}, got {type(layer).__name__} - at layer `{name}`")
    for _, layer in layers:
        on_cpu = all(tensor.device.type == "cpu" for tensor in (*layer.parameters(), *layer.buffers()))
        layer.__class__ = SynchronizedOnCPU if on_cpu else nn.SyncBatchNorm  # as it is but for its forward pass
        vars(layer)["process_group"] = None  # which torch's asks for: all devices


class SynchronizedOnCPU(_BatchNorm):
    """What torch's SyncBatchNorm computes, which takes tensors of accelerators alone."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if not (several and self.training):
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims, shape = [0, *range(2, x.dim())], [-1, *[1] * (x.dim() - 2)]
        count = _summed(x.new_tensor(x.numel() // x.shape[1]))
        mean = _summed(x.sum(dims)) / count
        centered = x - mean.reshape(shape)
        variance = _summed(centered.square().sum(dims)) / count
        self._count_in(mean.detach(), variance.detach() * count / (count - 1))
        y = centered * (variance + self.eps).rsqrt().reshape(shape)
        if self.affine:
            y = y * self.weight.reshape(shape) + self.bias.reshape(shape)
        return y.to(input.dtype)

    def _count_in(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def _summed(value: Tensor) -> Tensor:
    """Over all devices."""
    return _Summed.apply(value)


class _Summed(torch.autograd.Function):
    """What each device makes of the sum depends on the values of all: gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        distributed.all_reduce(gradient)
        return gradient


def _batch_norms(net: nn.Module) -> list[_BatchNorm]:
    return [module for module in net.modules() if isinstance(module, _BatchNorm)]
