"""ONNX files as networks of ours, beside onnxruntime: node by node from equal inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy import reference
from qdeploy.exporter.calibrate import Grids
from qdeploy.exporter.emit import check_shapes, emit
from qdeploy.exporter.from_onnx import lower
from qdeploy.exporter.fusion import fuse
from qdeploy.exporter.layers import Layer, Network
from qdeploy.exporter.weights import quantize_weights
from qdeploy.graph import Activation, Graph, Member, Node

FILES = Path(__file__).resolve().parent / "data/onnx"


def images(count: int, shape: tuple[int, ...] = (3, 12, 12)) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, *shape)).astype(np.float32)


def converted(
    model: Any, data: np.ndarray | None = None, shape: tuple[int, ...] | None = None, bits: int | None = None
) -> tuple[Network, dict[Layer, Any], Member]:
    """The fused network, the grid of each of its layers, and what is written of both; with `data` for the rest."""
    network = fuse(lower(model, shape))
    check_shapes(network)
    quantize_weights(network, bits)
    grids = Grids(network, "minmax")
    if data is None:
        assert grids.missing() == []
    else:
        network.run(data, grids.observers())
    chosen = grids.chosen()
    layers = list(network.layers)
    member = emit("net", network, chosen)
    assert len(layers) >= len(network.layers)
    return network, chosen, member


def differences(network: Network, grids: Mapping[Layer, Any], member: Member, x: np.ndarray) -> tuple[int, int, float]:
    """Of all codes that the nodes write, each from the codes that onnxruntime rounds its tensors to: how many differ,
    how many there are, and the largest difference. At a tie, as means of codes have many, both sides are right."""
    values: dict[Layer, np.ndarray] = {}

    def keep(layer: Layer) -> Any:
        return lambda array: values.__setitem__(layer, array.copy())

    made = [layer for layer in network.layers if not layer.same_grid and layer not in network.outputs]
    network.run(x, {layer: keep(layer) for layer in made})
    nodes = {node.output: node for node in member.nodes}
    codes: dict[int, np.ndarray] = {}
    different = count = 0
    largest = 0.0
    for i, layer in enumerate(network.layers):
        if layer in values:
            real = values[layer] / np.float32(grids[layer].scale)  # in f32, as QuantizeLinear
            grid = grids[layer]
            expected = np.clip(np.rint(real) + grid.zero_point, grid.low, grid.high)
        if i in nodes:
            inputs = [member.tensors[k] for k in nodes[i].inputs]
            operands = [codes[k] for k in nodes[i].inputs]
            ours = reference.run_node(nodes[i], operands, inputs, member.tensors[nodes[i].output])
            codes[i] = ours
        if layer not in values:
            continue
        codes[i] = expected.astype(np.uint8)
        if i in nodes:
            apart = np.abs(ours - expected)
            if "inner_clamp" in nodes[i].attributes:
                apart = np.ceil(apart / max(1, abs(nodes[i].attributes["inner_multiplier"])))  # in inner codes
                apart = np.where(at_tie(inner_numbers(nodes[i], operands, inputs)), np.maximum(apart - 1, 0), apart)
            apart = np.where(at_tie(real), np.maximum(apart - 1, 0), apart)
            different, count, largest = (
                different + int((apart > 0).sum()),
                count + apart.size,
                max(largest, apart.max()),
            )
    return different, count, largest


def at_tie(real: np.ndarray) -> np.ndarray:
    return np.abs(np.abs(real - np.rint(real)) - 0.5) < 1e-4


def inner_numbers(node: Node, operands: list[np.ndarray], inputs: list[Activation]) -> np.ndarray:
    """What becomes the inner codes of a node."""
    alone = {key: value for key, value in node.attributes.items() if key in ("stride", "padding", "dilation", "groups")}
    node = replace(node, inputs=node.inputs[:1], attributes=alone)
    return reference.run_node(node, operands[:1], inputs[:1], Activation("inner", operands[1].shape[1:], "f32"))


def graph_of(member: Member) -> Graph:
    return Graph([member])
