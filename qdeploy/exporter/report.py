"""What an export wrote and how close its integers are to the fake-quant network: per layer, in sizes and in classes."""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from qdeploy import page, reference
from qdeploy.calibration import doubt
from qdeploy.errors import InputError
from qdeploy.exporter.calibrate import Grids
from qdeploy.exporter.grid import Grid
from qdeploy.exporter.layers import Input, Layer, Network, Weighted
from qdeploy.files import AnyPath
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
    quantizer: str  # of the weight: "learned", "file", "rounded" (fallback_bits) or ""
    sqnr_db: float | None
    grid: str  # of its output: "learned", "file", "calibration", or "" where it has none of its own


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote. Compared on `images` images of the calibration data; sizes in bytes, MACs of one image."""

    path: str
    layers: list[LayerReport]
    images: int
    top1_agreement: float | None  # of the integer model with the fake-quant network; None where that cannot run here
    output_sqnr_db: float | None
    fp32_bytes: int  # of all parameters and BatchNorm statistics
    packed_bytes: int  # learned weights at their width, their step sizes and everything else in f32
    file_bytes: int
    warnings: list[str] = field(default_factory=list)  # why these figures may say little
    notes: list[str] = field(default_factory=list)  # what was made of the network, in words

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
        return json.dumps(self._fields(), indent=2)

    def to_html(self) -> str:
        """The same as a page: one HTML file that loads nothing."""
        return page.of_export(self._fields())

    def _fields(self) -> dict[str, Any]:
        ratios = {"packed_ratio": self.packed_ratio, "file_ratio": self.file_ratio}
        return {**asdict(self), "mac_share": self.mac_share, **ratios}

    def __str__(self) -> str:
        width = max(len(self._label(layer)) for layer in self.layers)
        numbers = f"bits  {'weights':>10}  {'MMACs':>8}"
        lines = [f"{'layer':{width}}  {'op':10}  {numbers}  {'quantizer':9}  {'grid':11}  SQNR dB"]
        for layer in self.layers:
            if layer.bits is None and layer.sqnr_db is None:
                continue
            bits, weights = (layer.bits, f"{layer.weights:,}") if layer.weights else ("", "")
            macs = f"{layer.macs / 1e6:.2f}" if layer.macs else ""
            sqnr = "" if layer.sqnr_db is None else f"{layer.sqnr_db:7.1f}"
            numbers = f"{bits:>4}  {weights:>10}  {macs:>8}"
            origins = f"{layer.quantizer:9}  {layer.grid:11}"
            lines.append(f"{self._label(layer):{width}}  {layer.op:10}  {numbers}  {origins}  {sqnr}".rstrip())
        shares = ", ".join(f"{share:.1%} at {bits} bits" for bits, share in self.mac_share.items())
        sqnr = "" if self.output_sqnr_db is None else f", output SQNR {self.output_sqnr_db:.1f} dB"
        lines.append(f"MACs in int8: {shares}")
        if self.top1_agreement is not None:
            share = f"{self.top1_agreement:.2%} of {self.images} images{sqnr}"
            lines.append(f"top-1 agreement with the fake-quant network: {share}")
        lines += [
            f"size: FP32 {self.fp32_bytes:,} B, packed {self.packed_bytes:,} B ({self.packed_ratio:.3f}x), "
            f"file {self.file_bytes:,} B ({self.file_ratio:.3f}x)",
            *(f"note: {text}" for text in self.notes),
            *(f"warning: {text}" for text in self.warnings),
        ]
        return "\n".join(lines)

    def _label(self, layer: LayerReport) -> str:
        several = self.layers[0].member != self.layers[-1].member
        return f"{layer.member}/{layer.name}" if several else layer.name


def images_to_compare(networks: list[Network]) -> int:
    """How many images `compare` should get: 2 to 256, fewer of large networks."""
    macs = sum(layer.macs for network in networks for layer in network.layers if isinstance(layer, Weighted))
    return int(np.clip(REPORT_MACS / max(macs, 1), 2, REPORT_IMAGES))


def compare(
    graph: Graph,
    networks: list[Network],
    grids: list[Grids],
    content: bytes,
    path: AnyPath,
    images: np.ndarray,
) -> ExportReport:
    """Runs `content`, the file to be, in the engine and the networks in float32 on f32 `images`.

    grids: of each network. Layers whose output has the grid of a quantizer are compared behind it: what training
        rounded there is no error.
    """
    compared = [
        [layer for layer in network.layers if not layer.same_grid and not isinstance(layer, Input)]
        for network in networks
    ]
    prefixes = [f"{member.name}/" if graph.combine else "" for member in graph.members]
    taps = [prefix + layer.name for prefix, layers in zip(prefixes, compared, strict=True) for layer in layers]
    output, integers = load_int_model(content)(images, taps=taps)
    rows, floats = [], []
    unable: list[str] = []
    for i, (member, network) in enumerate(zip(graph.members, networks, strict=True)):
        values: dict[Layer, np.ndarray] = {}
        try:
            values = _float_values(network, images, compared[i])
            floats.append(values[network.output])
        except InputError as error:  # of a source that cannot run here
            unable.append(f"not compared with the network: {error}")
        tensors = {node.name: member.tensors[node.output] for node in member.nodes}
        for layer in network.layers[1:]:
            sqnr = None
            if layer in values:
                fixed = grids[i].fixed.get(layer)
                expected = values[layer] if fixed is None else _rounded(values[layer], fixed)
                sqnr = _sqnr(expected, _real(integers[prefixes[i] + layer.name], tensors[layer.name]))
            codes = layer is network.output or layer.same_grid  # it has no grid, or its input's
            origin = "" if codes else grids[i].origins.get(layer, "calibration")
            rows.append(_row(member.name, layer, sqnr, origin))
    sizes = [network.source.stored() for network in networks]
    report = ExportReport(
        path=os.fsdecode(path),
        layers=rows,
        images=0 if unable else len(images),
        top1_agreement=None,
        output_sqnr_db=None,
        fp32_bytes=sum(fp32 for fp32, _ in sizes),
        packed_bytes=sum(packed for _, packed in sizes),
        file_bytes=len(content),
        warnings=unable,
        notes=[note for network, own in zip(networks, grids, strict=True) for note in _notes(network, own)],
    )
    if unable:
        return report
    if graph.combine:
        expected, _ = reference.combine([logits.astype(np.float32) for logits in floats], graph.combine)
    else:
        expected, output = floats[0], _real(output, graph.members[0].output)
    expected, output = (scores.reshape(len(images), -1) for scores in (expected, output))
    return replace(
        report,
        top1_agreement=float((_classes(expected) == _classes(output)).mean()),
        output_sqnr_db=_sqnr(expected, output),
        warnings=_doubts(images, expected, output),
    )


def _notes(network: Network, grids: Grids) -> list[str]:
    calibrated = grids.missing() if "file" in grids.origins.values() else []
    text = f"calibrated, as the file has no grid there: from {', '.join(calibrated)}"
    return [*network.notes, *([text] if calibrated else [])]


def _classes(scores: np.ndarray) -> np.ndarray:
    """The class of each image; of one logit its sign decides."""
    return scores.argmax(1) if scores.shape[1] > 1 else scores[:, 0] > 0


def _doubts(images: np.ndarray, expected: np.ndarray, got: np.ndarray) -> list[str]:
    """What makes the figures of the report say little; data that can fit no range are a Python warning, too."""
    if (found := doubt(images)) is not None:
        warnings.warn(found, stacklevel=5)
        return [found]
    count, doubts = len(images), []
    if count == 1:
        return []
    error, spread = (float(np.sqrt(np.square(x).mean())) for x in (got - expected, expected - expected.mean(0)))
    if error > spread:
        doubts.append(f"the scores of the {count} images differ by {spread:.3g}, the integers are off by {error:.3g}")
    if len(set(_classes(expected).tolist())) == 1:
        doubts.append(f"all {count} images are of one class for the network: their top-1 agreement says little")
    return doubts


def _rounded(values: np.ndarray, grid: Grid) -> np.ndarray:
    """As LSQ does it: one f32 division."""
    return grid.real(np.clip(np.rint(values / np.float32(grid.scale)) + grid.zero_point, grid.low, grid.high))


def _row(member: str, layer: Layer, sqnr: float | None, origin: str) -> LayerReport:
    if not isinstance(layer, Weighted):
        return LayerReport(member, layer.name, layer.op, None, 0, 0, "", sqnr, origin)
    codes = layer.codes
    weights = codes.values.size if codes.quantizer else 0
    return LayerReport(member, layer.name, layer.op, codes.bits, weights, layer.macs, codes.quantizer, sqnr, origin)


def _float_values(network: Network, images: np.ndarray, layers: list[Layer]) -> dict[Layer, np.ndarray]:
    """What each layer computes in the fake-quant network."""
    values: dict[Layer, np.ndarray] = {}
    network.run(images, {layer: functools.partial(values.__setitem__, layer) for layer in layers})
    return values


def _real(values: np.ndarray, tensor: Activation) -> np.ndarray:
    return values if tensor.dtype == "f32" else Grid(tensor.scale, tensor.zero_point).real(values)


def _sqnr(expected: np.ndarray, got: np.ndarray) -> float | None:
    """10*log10 of signal over error power, in dB."""
    signal = np.square(expected, dtype=np.float64).sum()
    error = np.square(expected.reshape(-1).astype(np.float64) - got.reshape(-1)).sum()
    return None if signal == 0 or error == 0 else float(10 * np.log10(signal / error))
