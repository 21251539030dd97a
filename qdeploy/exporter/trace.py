"""torch.export of a network: its ATen operators, and what they compute."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

import qdeploy.kernels.lsq  # noqa: F401  (registers the operator qdeploy::lsq)
from qdeploy.errors import ExportError


@dataclass
class Trace:
    """The network as a graph of ATen operators, and the value of every node that does not depend on the input."""

    module: fx.GraphModule
    constants: dict[fx.Node, Any]
    output: fx.Node
    batch: Any  # the symbol of the batch size
    shape: tuple[int, ...]  # of the input, without the batch

    def run(self, images: np.ndarray, observe: dict[fx.Node, Callable[[Tensor], None]]) -> None:
        """Runs the fake-quant network in float32 on `images` and hands the value of each node in `observe` to its
        function.

        The function must copy what it keeps: an in-place operator may follow.
        """
        with torch.no_grad():
            _Observed(self.module, observe).run(torch.from_numpy(images.copy()), initial_env=dict(self.constants))


class _Observed(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, observe: dict[fx.Node, Callable[[Tensor], None]]):
        super().__init__(module)
        self.observe = observe

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.observe:
            self.observe[n](result)
        return result


def trace(net: nn.Module, example: Tensor) -> Trace:
    """`net` in eval mode, for inputs like `example` [N, C, H, W] or [N, F] in batches of any size; `net` is left as it
    was. Raises ExportError where torch.export cannot."""
    for name, parameter in net.named_parameters():
        if parameter.dtype != torch.float32:
            expected = "float32 parameters (call net.float())"
            raise ExportError(f"expected {expected}, got {parameter.dtype} - at parameter `{name}`")
    modes = {module: module.training for module in net.modules()}
    device = next((p.device for p in net.parameters()), example.device)
    pair = example[:1].expand(2, *example.shape[1:]).contiguous().to(device)  # a batch of 1 would become a constant
    net.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch.export itself
            program = torch.export.export(net, (pair,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            if _reads_stale_alias(program.graph):
                program = program.run_decompositions({})  # every operator functional; as slow as two traces
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "Constraints violated" in reason:
            reason = "a batch size fixed in the code (write x.shape[0], not len(x) or a number)"
        raise ExportError(
            f"expected a network that torch.export traces for any batch size, got {reason} - at {type(net).__name__}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return _constants_folded(program)


def _reads_stale_alias(graph: fx.Graph) -> bool:
    """Whether an in-place operator changes a tensor that is read later under another name, as a view made before.

    Where the tensor itself is read later, the trace already names the operator's result.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    storage: dict[fx.Node, fx.Node] = {}  # the node that made the memory of each node
    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        schema = getattr(node.target, "_schema", None)
        aliases = schema is not None and bool(schema.returns) and schema.returns[0].alias_info is not None
        aliases = aliases or "dropout" in str(node.target)  # in eval mode it returns its argument
        storage[node] = storage.get(source, source) if aliases and source is not None else node
        if schema is not None and schema.is_mutable:
            others = [other for other, made in storage.items() if made is storage[node] and other is not node]
            if any(position[user] > position[node] for other in others for user in other.users):
                return True
    return False


def _constants_folded(program: torch.export.ExportedProgram) -> Trace:
    tensors = {**dict(program.named_parameters()), **dict(program.named_buffers()), **program.constants}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    constants: dict[fx.Node, Any] = {}
    inputs = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.target is None:
                inputs.append(node)
            else:
                constants[node] = tensors[spec.target].detach().cpu()
        elif node.op == "call_function" and all(source in constants for source in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: constants[n])
            if "device" in kwargs:
                kwargs = {**kwargs, "device": torch.device("cpu")}
            if node.target._schema.is_mutable:
                args = (args[0].clone(), *args[1:])
            with torch.no_grad():
                constants[node] = node.target(*args, **kwargs)
    results = next(node for node in program.graph.nodes if node.op == "output").args[0]
    if len(inputs) != 1 or len(results) != 1 or not isinstance(results[0], fx.Node):
        raise ExportError(
            f"expected one input and one output tensor, got {len(inputs)} and {len(results)} - at the network's forward"
        )
    shape = inputs[0].meta["val"].shape
    return Trace(program.graph_module, constants, results[0], shape[0], tuple(shape[1:]))
