"""What an export wrote and how close its integers are to the fake-quant network: per layer, in sizes and in classes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, fx

from qdeploy import reference
from qdeploy.exporter.grid import Grid
from qdeploy.exporter.layers import Input, Layer, Network, Weighted
from qdeploy.graph import Activation, Graph
from qdeploy.model import load_int_model

REPORT_MACS = 16e9  # in all: an integer and a float run of so many take seconds
REPORT_IMAGES = 256


@dataclass(frozen=True)
class LayerReport:
    """One node of the file. `sqnr_db`: its integers against the fake-quant network; None without error or signal."""

    member: str
    name: str
    op: str
    bits: int | None
    weights: int
    macs: int
    quantizer: str  # of the weight: "learned", "rounded" (fallback_bits) or ""
    sqnr_db: float | None


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote. Compared on `images` images of the calibration data; sizes in bytes, MACs of one image."""

    path: str
    layers: list[LayerReport]
    images: int
    top1_agreement: float  # of the integer model with the fake-quant network
    output_sqnr_db: float | None
    fp32_bytes: int  # of all parameters and BatchNorm statistics
    packed_bytes: int  # learned weights at their width, their step sizes and everything else in f32
    file_bytes: int

    @property
    def mac_share(self) -> dict[int, float]:
        """Share of the multiply-accumulates by bits of the weight; all of them are int8 arithmetic."""
        total = sum(layer.macs for layer in self.layers)
        bits = sorted({layer.bits for layer in self.layers if layer.bits is not None and layer.macs})
        return {b: sum(layer.macs for layer in self.layers if layer.bits == b) / total for b in bits}

    @property
    def packed_ratio(self) -> float:
        return self.packed_bytes / self.fp32_bytes

    @property
    def file_ratio(self) -> float:
        return self.file_bytes / self.fp32_bytes

    def to_json(self) -> str:
        """The fields, `mac_share` and the two ratios as one JSON object."""
        ratios = {"packed_ratio": self.packed_ratio, "file_ratio": self.file_ratio}
        return json.dumps({**asdict(self), "mac_share": self.mac_share, **ratios}, indent=2)

    def __str__(self) -> str:
        width = max(len(self._label(layer)) for layer in self.layers)
        lines = [f"{'layer':{width}}  {'op':10}  bits  {'weights':>10}  {'MMACs':>8}  {'quantizer':9}  SQNR dB"]
        for layer in self.layers:
            if layer.bits is None and layer.sqnr_db is None:
                continue
            bits, weights = (layer.bits, f"{layer.weights:,}") if layer.weights else ("", "")
            macs = f"{layer.macs / 1e6:.2f}" if layer.macs else ""
            sqnr = "" if layer.sqnr_db is None else f"{layer.sqnr_db:7.1f}"
            numbers = f"{bits:>4}  {weights:>10}  {macs:>8}"
            lines.append(
                f"{self._label(layer):{width}}  {layer.op:10}  {numbers}  {layer.quantizer:9}  {sqnr}".rstrip()
            )
        shares = ", ".join(f"{share:.1%} at {bits} bits" for bits, share in self.mac_share.items())
        sqnr = "" if self.output_sqnr_db is None else f", output SQNR {self.output_sqnr_db:.1f} dB"
        lines += [
            f"MACs in int8: {shares}",
            f"top-1 agreement with the fake-quant network: {self.top1_agreement:.2%} of {self.images} images{sqnr}",
            f"size: FP32 {self.fp32_bytes:,} B, packed {self.packed_bytes:,} B ({self.packed_ratio:.3f}x), "
            f"file {self.file_bytes:,} B ({self.file_ratio:.3f}x)",
        ]
        return "\n".join(lines)

    def _label(self, layer: LayerReport) -> str:
        several = self.layers[0].member != self.layers[-1].member
        return f"{layer.member}/{layer.name}" if several else layer.name


def images_to_compare(networks: list[Network]) -> int:
    """How many images `compare` should get: 2 to 256, fewer of large networks."""
    macs = sum(layer.macs for network in networks for layer in network.layers if isinstance(layer, Weighted))
    return int(np.clip(REPORT_MACS / max(macs, 1), 2, REPORT_IMAGES))


def compare(graph: Graph, networks: list[Network], path: str | os.PathLike[str], images: np.ndarray) -> ExportReport:
    """Runs the file written to `path` by the engine and the networks in float32 on f32 `images`."""
    compared = [
        [layer for layer in network.layers if not layer.same_grid and not isinstance(layer, Input)]
        for network in networks
    ]
    prefixes = [f"{member.name}/" if graph.combine else "" for member in graph.members]
    taps = [prefix + layer.name for prefix, layers in zip(prefixes, compared, strict=True) for layer in layers]
    output, integers = load_int_model(path)(images, taps=taps)
    rows, floats = [], []
    for member, network, prefix, measured in zip(graph.members, networks, prefixes, compared, strict=True):
        values = _float_values(network, images, measured)
        floats.append(values[network.output])
        tensors = {node.name: member.tensors[node.output] for node in member.nodes}
        for layer in network.layers[1:]:
            sqnr = None
            if layer in values:
                sqnr = _sqnr(values[layer], _real(integers[prefix + layer.name], tensors[layer.name]))
            rows.append(_row(member.name, layer, sqnr))
    if graph.combine:
        expected, _ = reference.combine([logits.astype(np.float32) for logits in floats], graph.combine)
    else:
        expected, output = floats[0], _real(output, graph.members[0].output)
    top1 = [scores.reshape(len(images), -1).argmax(1) for scores in (expected, output)]
    sizes = [_sizes(network) for network in networks]
    return ExportReport(
        path=os.fspath(path),
        layers=rows,
        images=len(images),
        top1_agreement=float((top1[0] == top1[1]).mean()),
        output_sqnr_db=_sqnr(expected, output),
        fp32_bytes=sum(fp32 for fp32, _ in sizes),
        packed_bytes=sum(packed for _, packed in sizes),
        file_bytes=os.path.getsize(path),
    )


def _row(member: str, layer: Layer, sqnr: float | None) -> LayerReport:
    if not isinstance(layer, Weighted):
        return LayerReport(member, layer.name, layer.op, None, 0, 0, "", sqnr)
    codes = layer.codes
    weights = codes.values.size if codes.quantizer else 0
    return LayerReport(member, layer.name, layer.op, codes.bits, weights, layer.macs, codes.quantizer, sqnr)


def _float_values(network: Network, images: np.ndarray, layers: list[Layer]) -> dict[Layer, np.ndarray]:
    """What each layer computes in the fake-quant network."""
    nodes: dict[fx.Node, np.ndarray] = {}

    def keep(node: fx.Node) -> Callable[[Tensor], None]:
        return lambda value: nodes.update({node: value.numpy().copy()})

    network.trace.run(images, {layer.value: keep(layer.value) for layer in layers})
    return {layer: np.clip(nodes[layer.value], layer.low, layer.high) for layer in layers}


def _real(values: np.ndarray, tensor: Activation) -> np.ndarray:
    return values if tensor.dtype == "f32" else Grid(tensor.scale, tensor.zero_point).real(values)


def _sqnr(expected: np.ndarray, got: np.ndarray) -> float | None:
    """10*log10 of signal over error power, in dB."""
    signal = np.square(expected, dtype=np.float64).sum()
    error = np.square(expected.reshape(-1).astype(np.float64) - got.reshape(-1)).sum()
    return None if signal == 0 or error == 0 else float(10 * np.log10(signal / error))


def _sizes(network: Network) -> tuple[int, int]:
    """Bytes of the network in float32, and with learned weights packed at their width, all the rest in float32."""
    constants = network.trace.constants
    quantizers = [node for node in network.trace.module.graph.nodes if node.target is torch.ops.qdeploy.lsq.default]
    steps = {node.args[1] for node in quantizers}
    packed = {
        node.args[0]: (node.args[3] - node.args[2]).bit_length() for node in quantizers if node.args[0] in constants
    }
    floats = {
        node: value.numel()
        for node, value in constants.items()
        if node.op == "placeholder" and node.users and isinstance(value, Tensor) and value.is_floating_point()
    }
    fp32 = 4 * sum(count for node, count in floats.items() if node not in steps)
    learned = sum((floats[node] * bits + 7) // 8 for node, bits in packed.items())
    return fp32, learned + 4 * sum(count for node, count in floats.items() if node not in packed)
