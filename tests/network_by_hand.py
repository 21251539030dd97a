"""A network whose layers no front end made: what the rest of the exporter asks of one, in numpy alone.

A linear layer with a learned quantizer, a Hardswish, and a linear layer in float32 that is rounded as the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

import numpy as np

from qdeploy import format, load_int_model
from qdeploy.exporter.calibrate import Grids, observe
from qdeploy.exporter.elements import Value
from qdeploy.exporter.emit import emit
from qdeploy.exporter.fusion import fuse
from qdeploy.exporter.layers import Input, Linear, Network, QuantizedWeight, Table
from qdeploy.exporter.report import compare
from qdeploy.exporter.weights import quantize_weights
from qdeploy.graph import Graph

SIZES = (6, 8, 5)
STEP = np.float32(0.25)


def hardswish(x: np.ndarray) -> np.ndarray:
    return x * np.clip(x + 3, 0, 6) / 6


class ByHand:
    """The float network, whose tensors have names."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        codes = random.integers(-7, 8, SIZES[1::-1])
        self.first = (codes * STEP).astype(np.float32)
        self.second = random.normal(size=SIZES[:0:-1]).astype(np.float32)
        self.images = random.normal(size=(64, SIZES[0])).astype(np.float32)
        self.codes = codes

    def run(self, images: np.ndarray, observe: Mapping[Hashable, Callable[[np.ndarray], None]]) -> None:
        values = {"x": images, "linear": images @ self.first.T}
        values["hardswish"] = hardswish(values["linear"])
        values["scores"] = values["hardswish"] @ self.second.T
        for name, function in observe.items():
            function(values[str(name)])

    def stored(self) -> tuple[int, int]:
        return 4 * (self.first.size + self.second.size), self.first.size // 2 + 4 * (1 + self.second.size)

    def network(self) -> Network:
        def exact(channels: int) -> dict[str, np.ndarray]:
            return {"scale": np.ones(channels), "shift": np.zeros(channels)}

        x = Input("input", [], SIZES[:1], Value("x"))
        weight = QuantizedWeight(self.first, np.array(STEP), -8, 7)
        first = Linear("first", [x], SIZES[1:2], Value("linear"), weight=weight, **exact(SIZES[1]))
        act = Table("act", [first], SIZES[1:2], Value("hardswish"), function=hardswish)
        fc = Linear("fc", [act], SIZES[2:], Value("scores"), weight=self.second, **exact(SIZES[2]))
        return Network(self, [x, first, act, fc], fc, classifier="fc")


def check(folder: str) -> None:
    """From layers to a file, its report and its scores."""
    source = ByHand()
    network = fuse(source.network())
    quantize_weights(network, None)
    grids = Grids(network, "minmax")
    images = observe([grids], source.images, source.images[:1], None, 32)
    graph = Graph([emit("net", network, grids.chosen())])
    content = format.dump(graph)
    path = Path(folder) / "net.safetensors"
    format.write(content, path)
    report = compare(graph, [network], [grids], content, path, images)
    assert [(row.name, row.bits, row.quantizer, row.grid) for row in report.layers] == [
        ("first", 4, "learned", "calibration"),
        ("act", None, "", "calibration"),
        ("fc", 8, "rounded", ""),
    ]
    assert (report.images, report.top1_agreement) == (32, 1.0)
    assert (report.fp32_bytes, report.packed_bytes) == source.stored()
    assert np.array_equal(graph.members[0].nodes[0].constants["weight"], source.codes)
    expected: list[np.ndarray] = []
    source.run(images, {"scores": expected.append})
    assert np.abs(load_int_model(path)(images) - expected[0]).max() < 0.02 * np.ptp(expected[0])
