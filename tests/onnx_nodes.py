"""Every node of an ONNX graph from the codes that ours reads, so that no difference is passed on to the next one."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from qdeploy import reference
from qdeploy.graph import Activation, Graph

TYPES = {"u8": TensorProto.UINT8, "s16": TensorProto.INT16}


def session(model: onnx.ModelProto, optimized: bool = False) -> onnxruntime.InferenceSession:
    """Exact where a CPU would saturate; without optimizations the graph runs as it is written."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def from_given_codes(model: onnx.ModelProto, activations: dict[str, Activation]) -> onnx.ModelProto:
    """The model with an input `name/given` for the codes of each of these nodes, which is read in their place; its
    outputs are `name/codes`, and `name/unrounded` where that was rounded."""
    forced = onnx.ModelProto()
    forced.CopyFrom(model)
    written = {output: node for node in forced.graph.node for output in node.output}
    renamed = {f"{name}/codes": f"{name}/given" for name in activations}
    for node in forced.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    outputs = list(renamed) + ["y"]
    for name, tensor in activations.items():
        forced.graph.input.append(
            helper.make_tensor_value_info(f"{name}/given", TYPES[tensor.dtype], [None] * (len(tensor.shape) + 1))
        )
        rounding = written[f"{name}/codes"]
        if rounding.op_type == "Clip":
            rounding = written[rounding.input[0]]
        if rounding.op_type == "QuantizeLinear":
            forced.graph.node.append(helper.make_node("Identity", [rounding.input[0]], [f"{name}/unrounded"]))
            outputs.append(f"{name}/unrounded")
    del forced.graph.output[:]
    forced.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return forced


def node_by_node(
    model: onnx.ModelProto, graph: Graph, feeds: dict[str, np.ndarray], optimized: bool = False
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None, Activation]]:
    """Of every node, and of the input: our codes, theirs, theirs before the rounding or None, and the grid."""
    first = next(iter(feeds.values()))
    activations, ours = {}, {}
    lengths = feeds["mask"].sum(axis=1) if "mask" in feeds else np.full(len(first), first.shape[1])
    for member in graph.members:
        prefix = f"{member.name}/" if graph.combine else ""
        values = (
            reference.run_member(member, first)
            if graph.vocabulary is None
            else reference.run_texts(member, first.astype(np.int32), lengths)
        )
        named = {0: "input"} | {node.output: node.name for node in member.nodes}
        for i, name in named.items():
            if member.tensors[i].dtype in TYPES:
                activations[prefix + name], ours[prefix + name] = member.tensors[i], values[i]
    forced = from_given_codes(model, activations)
    given = {f"{name}/given": ours[name] for name in activations}
    names = [output.name for output in forced.graph.output]
    found = dict(zip(names, session(forced, optimized).run(names, {**feeds, **given}), strict=True))
    result = {}
    for name, tensor in activations.items():
        unrounded = found.get(f"{name}/unrounded")
        if unrounded is not None:
            unrounded = unrounded.astype(np.float64) / tensor.scale + tensor.zero_point
        result[name] = ours[name], found[f"{name}/codes"], unrounded, tensor
    return result
