"""Networks that torch.export or torch.ao had in hand before: programs, what PT2E converted, fake quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx import traceback

from qdeploy.errors import ExportError, InputError

Source = nn.Module | torch.export.ExportedProgram
aten = torch.ops.aten
WITH_MASK = (
    "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "fake_quantize_per_channel_affine_cachemask",
)
LEARNABLE = ("_fake_quantize_learnable_per_tensor_affine", "_fake_quantize_learnable_per_channel_affine")


def module_of(source: Source) -> nn.Module:
    return source.module() if isinstance(source, torch.export.ExportedProgram) else source


def is_exported(net: nn.Module) -> TypeGuard[fx.GraphModule]:
    """Whether torch.export made it: a graph of operators, which has no training mode to leave."""
    return isinstance(net, fx.GraphModule) and any(isinstance(n.target, torch._ops.OpOverload) for n in net.graph.nodes)


class _Replay(fx.Interpreter):
    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == "_guards_fn":  # that the batch has the size of the example it was exported with
            return None
        return super().call_module(target, args, kwargs)


def replay(net: fx.GraphModule, *inputs: Tensor) -> Any:
    """What it computes; in a trace its operators stay in the modules that they came from."""
    with traceback.preserve_node_meta():
        return _Replay(net).run(*inputs)


def classifier(net: fx.GraphModule) -> str | None:
    """As quantizable.classifier: the module of a convolution or linear operator that was registered last."""
    weighted = (aten.conv1d.default, aten.conv2d.default, aten.linear.default)
    stacks = [node.meta.get("nn_module_stack") for node in net.graph.nodes if node.target in weighted]
    paths = {list(stack.values())[-1][0] for stack in stacks if stack}
    registered = [name.rpartition(".")[0] for name, _ in net.named_parameters()]
    return next((path for path in reversed(registered) if path in paths), None)


# ---- The shape of the input ------------------------------------------------------------------------------------------


def example_of(source: Source, shape: tuple[int, ...] | None) -> np.ndarray:
    """Zeros as the source takes them: f32 or int64 [1, *shape], where `shape` says what the source leaves open."""
    net = module_of(source)
    if is_exported(net):
        return _example_of_graph(net, shape)
    if shape is None:
        got = f"neither for a {type(net).__name__}"
        raise InputError(f"expected an example of the input, or shape=(3, 224, 224), got {got} - at export")
    return np.zeros((1, *shape), np.float32)


def _example_of_graph(net: fx.GraphModule, shape: tuple[int, ...] | None) -> np.ndarray:
    inputs = [node.meta["val"] for node in net.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise ExportError(f"expected one input tensor, got {len(inputs)} - at the network's forward")
    own = inputs[0].shape[1:]
    sizes = shape if shape is not None else own
    fits = len(sizes) == len(own) and all(a == b for a, b in zip(sizes, own, strict=True) if isinstance(b, int))
    if not fits or not all(isinstance(size, int) for size in sizes):
        got = "none" if shape is None else str(list(sizes))
        raise InputError(f"expected shape={_described(own)}, as the source takes it, got {got} - at export")
    return np.zeros((1, *sizes), np.float32 if inputs[0].is_floating_point() else np.int64)


def _described(own: Any) -> str:
    return f"({', '.join(str(size) if isinstance(size, int) else 'any' for size in own)})"


# ---- Fake quantization of torch.ao -----------------------------------------------------------------------------------


def freeze_quantizers(net: nn.Module) -> None:
    """Lets the fake-quantize modules compute with the scales that they have, as `convert` takes them over: in eval mode
    they would go on observing, and they ask their own buffers what to do, which torch.export cannot know.

    Sets `forward` of the modules. Raises ExportError for an observer outside of them: nothing is quantized there yet.
    """
    inside: set[nn.Module] = set()
    for name, module in net.named_modules():
        kinds = [kind.__name__ for kind in type(module).__mro__]
        if "FakeQuantizeBase" in kinds:
            inside.update(module.modules())
            module.forward = _fake_quantize(module)
        elif "ObserverBase" in kinds and module not in inside:
            expected = "a converted network (call convert_pt2e first)"
            raise ExportError(f"expected {expected}, got an observer, {kinds[0]} - at module `{name}`")


def _fake_quantize(module: Any) -> Callable[[Tensor], Tensor]:
    if not module.fake_quant_enabled[0]:
        return lambda x: x
    codes, scale, zero_point = (module.quant_min, module.quant_max), module.scale, module.zero_point.round().int()
    if scale.numel() > 1:
        return lambda x: torch.fake_quantize_per_channel_affine(x, scale, zero_point, module.ch_axis, *codes)
    return lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *codes)


@contextmanager
def traceable_quantizers() -> Iterator[None]:
    """Gives fake quantization the shape functions that torch 2.13 lacks for a batch of any size."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in WITH_MASK:
            library.impl(name, lambda x, *_: (torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)), "Meta")
        for name in LEARNABLE:
            library.impl(name, lambda x, *_: torch.empty_like(x), "Meta")
        yield
