"""Networks that are looked at and left as they were, or changed all at once or not at all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.utils import parametrize

from qdeploy.networks.quantizable import weight_name


@contextmanager
def all_or_nothing(net: nn.Module) -> Iterator[None]:
    """Where the block raises, each module of `net` is what it was: its class, parameters in order, hooks and mode."""
    before = []
    for module in net.modules():
        held = [vars(module), *(value for value in vars(module).values() if isinstance(value, dict))]
        before.append((module, type(module), is_computed(module), [(one, {**one}) for one in held]))
    try:
        yield
    except BaseException:
        for module, kind, computed, contents in before:
            if not computed and is_computed(module):
                parametrize.remove_parametrizations(module, weight_name(module), leave_parametrized=False)
            if type(module) is not kind:
                module.__class__ = kind
            for one, content in contents:  # in place: handles of hooks refer to these dicts
                one.clear()
                one.update(content)
        raise


def is_computed(module: nn.Module) -> bool:
    """Whether parametrizations compute the weight of this module itself: a compiled one answers for what it holds."""
    return "parametrizations" in module._modules and parametrize.is_parametrized(module, weight_name(module))


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode by its flags alone: a network's own `train` may merge weights or thaw what was frozen."""
    modes = {module: module.training for module in net.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """Runs in eval mode without gradients, after which mode, buffers and random numbers are those of before."""
    devices = {tensor.device for tensor in (*net.parameters(), *net.buffers()) if tensor.is_cuda}
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers() if not buffer.is_meta]
    try:
        with torch.random.fork_rng([*devices]), evaluating(net), _uncompiled(), torch.no_grad():
            yield
    finally:
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.detach().copy_(value)


def _uncompiled() -> AbstractContextManager:
    """Compiled layers run as they were written: compiling takes seconds, and anew for each hook that observes."""
    in_use = "torch._dynamo" in sys.modules  # the import alone takes a second
    return torch.compiler.set_stance("force_eager") if in_use else nullcontext()
