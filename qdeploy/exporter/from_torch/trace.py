"""torch.export of a network: its ATen operators, and what they compute."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, fields, is_dataclass
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import OutputKind
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from qdeploy.errors import ExportError
from qdeploy.exporter.elements import BATCH
from qdeploy.exporter.from_torch.exported import freeze_quantizers, is_exported, replay, traceable_quantizers
from qdeploy.exporter.from_torch.operators import arguments, gives_real_numbers, quantizer_arguments
from qdeploy.exporter.from_torch.rewriting import rewrite
from qdeploy.networks.wrappers import plain_names, unwrapped


@dataclass
class Trace:
    """The network as a graph of ATen operators, and the value of every node that depends neither on the input nor on a
    quantizer: what follows a quantizer must show as it is, or a weight would be rounded twice."""

    module: fx.GraphModule
    constants: dict[fx.Node, Any]
    output: fx.Node
    batch: Any  # the symbol of the batch size
    shape: tuple[int, ...]  # of the input, without the batch
    names: dict[str, str]  # path of each module of the traced network: its name for the user
    stateful: set[fx.Node]  # operators that write into a buffer
    ids: bool  # the input is token ids

    def sizes(self, tensor: Tensor) -> tuple[int, ...]:
        """Of a tensor of the trace, for a batch of BATCH."""
        return tuple(map(self.size, tensor.shape))

    def size(self, size: Any) -> int:
        """A size of the trace, for a batch of BATCH."""
        return size if isinstance(size, int) else int(size.node.expr.subs({self.batch.node.expr: BATCH}))

    def run(self, images: np.ndarray, observe: Mapping[Any, Callable[[np.ndarray], None]]) -> None:
        """As layers.Source: an in-place operator may follow a node that is observed."""
        with torch.no_grad():
            _Observed(self.module, observe).run(torch.from_numpy(images.copy()), initial_env=dict(self.constants))

    def stored(self) -> tuple[int, int]:
        """As layers.Source."""
        nodes = [node for node in self.module.graph.nodes if gives_real_numbers(node)]
        quantizers = [quantizer_arguments(node.target, node.args, node.kwargs) for node in nodes]
        steps = {own[key] for own in quantizers for key in ("scale", "zero_point") if key in own}
        packed = {own["self"]: (own["quant_max"] - own["quant_min"]).bit_length() for own in quantizers}
        packed = {node: bits for node, bits in packed.items() if node in self.constants}  # weights, no activations
        floats = {
            node: value.numel()
            for node, value in self.constants.items()
            if node.op == "placeholder" and node.users and isinstance(value, Tensor)
            if value.is_floating_point() or node in packed
        }
        fp32 = 4 * sum(count for node, count in floats.items() if node not in steps)
        # A weight may be computed, from direction and gain for example: packed, it stands for these.
        inside = _sources(list(packed))
        rest = _sources([node for node in self.module.graph.nodes if node.op == "output"], stop=set(packed))
        learned = sum((self.constants[node].numel() * bits + 7) // 8 for node, bits in packed.items())
        return fp32, learned + 4 * sum(count for node, count in floats.items() if node in rest or node not in inside)


def _sources(nodes: list[fx.Node], stop: Container[fx.Node] = ()) -> set[fx.Node]:
    """`nodes` and all that they are computed from, but for `stop`."""
    found, waiting = set(nodes), list(nodes)
    while waiting:
        new = {node for node in waiting.pop().all_input_nodes if node not in found and node not in stop}
        found |= new
        waiting += new
    return found


class _Observed(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, observe: Mapping[Any, Callable[[np.ndarray], None]]):
        super().__init__(module)
        self.observe = observe

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.observe:
            self.observe[n](result.numpy())
        return result


class _Forward(nn.Module):
    """From one tensor to one tensor, whatever the arguments and results of the network's forward are."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return _one_tensor(replay(self.net, x) if is_exported(self.net) else self.net(x))


def _one_tensor(output: Any) -> Tensor:
    """The tensor of what a forward returned: the only one in it, or the one that is named `logits`."""
    found = dict(_named_tensors(output, ""))
    only = found if len(found) == 1 else {name: t for name, t in found.items() if name.split(".")[-1] == "logits"}
    if len(only) == 1:
        return next(iter(only.values()))
    got = f"{len(found)} ({', '.join(found)})" if found else type(output).__name__
    expected = "one output tensor, or one named logits"
    raise ExportError(f"expected {expected}, got {got} - at the network's forward")


def _named_tensors(output: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield name, output
        return
    parts: Mapping[Any, Any] = {}
    if isinstance(output, Mapping):
        parts = output
    elif is_dataclass(output):
        parts = {part.name: getattr(output, part.name) for part in fields(output)}
    elif hasattr(output, "_asdict"):
        parts = output._asdict()
    elif isinstance(output, (tuple, list)):
        parts = dict(enumerate(output))
    for key, value in parts.items():
        yield from _named_tensors(value, f"{name}.{key}" if name else str(key))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export says beside its error (a graph, log lines) and deprecations inside of it."""
    with warnings.catch_warnings(), redirect_stderr(StringIO()) as said:
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
    sys.stderr.write(said.getvalue())  # of a network that prints


@contextmanager
def _calls() -> Iterator[list[nn.Module]]:
    """The modules whose forward runs, outermost first; after an error still those in which it happened."""
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _left_as_it_was(net: nn.Module) -> Iterator[None]:
    """Puts back the modes of the modules and what forward writes into them: under torch.export these are numbers of the
    trace, with which the network could not run again (window_size in the Swin of transformers)."""
    before = {module: vars(module).copy() for module in net.modules()}
    try:
        yield
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)


def trace(net: nn.Module, example: Tensor) -> Trace:
    """`net` in eval mode, for inputs like `example` [N, C, H, W] or [N, F] in batches of any size; `net` is left as it
    was. Raises ExportError where torch.export cannot."""
    if not isinstance(net, nn.Module) or isinstance(net, torch.jit.ScriptModule):
        raise ExportError(f"expected a torch.nn.Module in Python, got {type(net).__name__} - at the network")
    net = unwrapped(net)
    _check_tensors(net)
    names = {"": ""} | {f"net.{path}".rstrip("."): name for path, name in plain_names(net).items()}
    device = next((p.device for p in net.parameters()), example.device)
    pair = example[:1].expand(2, *example.shape[1:]).contiguous().to(device)  # a batch of 1 would become a constant
    try:
        with _left_as_it_was(net), torch.no_grad(), traceable_quantizers(), _quiet(), _calls() as calls:
            if not is_exported(net):
                net.eval()
            freeze_quantizers(net)
            program = torch.export.export(_Forward(net), (pair,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            _inline_regions(program.graph_module, names)
            if _reads_stale_alias(program.graph):
                program = program.run_decompositions({})  # every operator functional; as slow as two traces
            rewrite(program.graph)
    except ExportError:
        raise
    except Exception as error:
        paths = {module: name for name, module in net.named_modules()}
        inside = [names[f"net.{paths[module]}"] for module in calls if paths.get(module)]
        at = f"module `{inside[-1]}`" if inside else type(net).__name__
        raise ExportError(
            f"expected a network that torch.export traces for any batch size, got {_reason(error)} - at {at}"
        ) from error
    return _constants_folded(program, names)


def _reason(error: Exception) -> str:
    """What torch says, in one line."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "Constraints violated" in reason:
        return "a batch size fixed in the code (write x.shape[0], not len(x) or a number)"
    if "data-dependent" in reason:
        return "a branch or size that depends on the numbers of the input"
    return reason


def _check_tensors(net: nn.Module) -> None:
    """Float32 all through; a buffer that is wider shows in the trace, if it is read at all."""
    for kind, tensors in (("parameter", net.named_parameters()), ("buffer", net.named_buffers())):
        for name, tensor in tensors:
            dtype = str(tensor.dtype).removeprefix("torch.")
            expected, got = f"float32 {kind}s (call net.float())", dtype
            if nn.parameter.is_lazy(tensor):
                expected, got = "initialized parameters (run the network once)", "a lazy one"
            elif tensor.is_meta:
                expected, got = "tensors with values (load the weights first)", "one on the device meta"
            elif tensor.dtype == torch.float32 or kind == "buffer" and not dtype.endswith("float16"):
                continue
            raise ExportError(f"expected {expected}, got {got} - at {kind} `{name}`")


def modules_of(node: fx.Node, names: dict[str, str]) -> list[tuple[str, str]]:
    """Name and class of the modules whose forward holds the operator, outermost first."""
    found = []
    for path, kind in (node.meta.get("nn_module_stack") or {"": ("", "")}).values():
        kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        found.append((names.get(path.split("@")[0], path), kind))
    return found


def _inline_regions(module: fx.GraphModule, names: dict[str, str]) -> None:
    """Puts the operators of regions with their own autocast or gradient mode where the region stands.

    torch has switched off the autocast of other devices than this machine's; one that is on would change the results.
    """
    regions = torch.ops.higher_order
    for node in list(module.graph.nodes):
        if node.target is regions.wrap_with_autocast:
            _, dtype, enabled, _, body, *inputs = node.args
            if enabled:
                name, kind = modules_of(node, names)[-1]
                got = f"autocast to {str(dtype).removeprefix('torch.')}"
                at = f"module `{name}`" if name else f"the forward of {kind.split('.')[-1]}"
                raise ExportError(f"expected float32 throughout (autocast disabled in eval mode), got {got} - at {at}")
        elif node.target is regions.wrap_with_set_grad_enabled:
            _, body, *inputs = node.args
        else:
            continue
        inner = getattr(module, body.target)
        _inline_regions(inner, names)
        _inline(module.graph, node, inner.graph, inputs)


def _inline(graph: fx.Graph, region: fx.Node, body: fx.Graph, inputs: list[Any]) -> None:
    places = [node for node in body.nodes if node.op == "placeholder"]
    with graph.inserting_before(region):
        results: Any = graph.graph_copy(body, dict(zip(places, inputs, strict=True)))
    for user in list(region.users):  # operator.getitem: a region returns a tuple
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(region)


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _storages(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The node that made the memory of each node."""
    storage: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        schema = _schema(node)
        aliases = schema is not None and bool(schema.returns) and schema.returns[0].alias_info is not None
        aliases = aliases or "dropout" in str(node.target)  # in eval mode it returns its argument
        storage[node] = storage.get(source, source) if aliases and source is not None else node
    return storage


def _writes(node: fx.Node) -> bool:
    schema = _schema(node)
    return schema is not None and schema.is_mutable and isinstance(node.args[0], fx.Node)


def _reads_stale_alias(graph: fx.Graph) -> bool:
    """Whether an in-place operator changes a tensor that is read later under another name, as a view made before.

    Where the tensor itself is read later, the trace already names the operator's result.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    storage = _storages(graph)
    for node in filter(_writes, graph.nodes):
        others = [x for x, made in storage.items() if made is storage[node] and position[x] < position[node]]
        if any(position[user] > position[node] for other in others for user in other.users):
            return True
    return False


def _constants_folded(program: torch.export.ExportedProgram, names: dict[str, str]) -> Trace:
    tensors = {**dict(program.named_parameters()), **dict(program.named_buffers()), **program.constants}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    outputs = next(node for node in program.graph.nodes if node.op == "output").args[0]
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    results = [x for x, kind in zip(outputs, kinds, strict=True) if kind is OutputKind.USER_OUTPUT]
    storage = _storages(program.graph)
    stateful = {x for x in outputs if x not in results}
    stateful |= {x for x in filter(_writes, program.graph.nodes) if getattr(specs.get(storage[x].name), "target", None)}
    constants: dict[fx.Node, Any] = {}
    inputs = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.target is None:
                inputs.append(node)
            else:
                constants[node] = tensors[spec.target].detach().cpu()
        elif node.op == "call_function" and node not in stateful and _is_constant(node, constants):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: constants[n])
            if "device" in kwargs:
                kwargs = {**kwargs, "device": torch.device("cpu")}
            if _writes(node):
                args = (args[0].clone(), *args[1:])
            with torch.no_grad():
                constants[node] = node.target(*args, **kwargs)
    if len(inputs) != 1 or len(results) != 1 or not isinstance(results[0], fx.Node):
        raise ExportError(
            f"expected one input and one output tensor, got {len(inputs)} and {len(results)} - at the network's forward"
        )
    x = inputs[0].meta["val"]
    ids = not x.is_floating_point()
    return Trace(program.graph_module, constants, results[0], x.shape[0], tuple(x.shape[1:]), names, stateful, ids)


def _is_constant(node: fx.Node, constants: dict[fx.Node, Any]) -> bool:
    """Whether the operator gives the same in every call, and no quantizer stands right before it."""
    return not is_random(node) and all(x in constants and not gives_real_numbers(x) for x in node.all_input_nodes)


def is_random(node: fx.Node) -> bool:
    """Whether the operator draws random numbers, called as it is: dropout in eval mode does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    values = arguments(node.target, node.args, node.kwargs)
    return all(values[name] for name in ("p", "dropout_p", "train", "training") if name in values)
