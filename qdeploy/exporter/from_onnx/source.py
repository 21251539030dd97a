"""The network of an ONNX file in onnxruntime, with any of its tensors as outputs. Needs onnxruntime where it is run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qdeploy.errors import InputError, one_line
from qdeploy.exporter.from_onnx.model import File
from qdeploy.exporter.layers import Layer, QuantizedWeight, Scaled, Weighted

AT_ONCE = 16  # images


@dataclass
class Source:
    """As layers.Source. Tensors are named as in the file; without optimizations, which would merge them."""

    file: File
    rows_first: bool  # the file reads [N, H, W, C]
    sizes: tuple[int, int]

    def run(self, images: np.ndarray, observe: Mapping[Hashable, Callable[[np.ndarray], None]]) -> None:
        given = [str(name) for name in observe if name == self.file.input]
        names = [str(name) for name in observe if name != self.file.input]
        session = _session(self.file, names)
        batch = self.file.batch or AT_ONCE
        whole: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for i in range(0, len(images), batch):
            part = images[i : i + batch]
            count = len(part)
            if self.file.batch is not None and count < batch:
                part = np.concatenate([part, np.repeat(part[-1:], batch - count, 0)])
            x = np.ascontiguousarray(part.transpose(0, 2, 3, 1)) if self.rows_first else part
            for name, values in zip(names, session.run(names, {self.file.input: x}) if names else [], strict=True):
                whole[name].append(values[: count * (len(values) // batch)] if self.file.batch is not None else values)
        for name in names:
            observe[name](np.concatenate(whole[name]))
        for name in given:
            observe[name](np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if self.rows_first else images)

    def stored(self) -> tuple[int, int]:
        return self.sizes


def _session(file: File, names: list[str]) -> Any:
    try:
        import onnxruntime
    except ImportError:
        expected = "the package onnxruntime, which runs the network of the file (pip install onnxruntime)"
        raise InputError(f"expected {expected}, got none - at this Python environment") from None
    model = type(file.proto)()
    model.CopyFrom(file.proto)
    del model.graph.output[:]
    for name in names:
        model.graph.output.add(name=name)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"expected a file that onnxruntime loads, got: {one_line(error)} - at the network") from None


def bytes_of(layers: list[Layer]) -> tuple[int, int]:
    """The parameters in float32, and with the weights that the file has in codes packed."""
    fp32 = packed = 0
    for layer in layers:
        if isinstance(layer, Scaled):
            fp32 += 4 * layer.shift.size
            packed += 4 * layer.shift.size
        if isinstance(layer, Weighted):
            weight = layer.weight
            count = int(np.prod(weight.shape))
            fp32 += 4 * count
            if isinstance(weight, QuantizedWeight):
                packed += (count * (weight.qmax - weight.qmin).bit_length() + 7) // 8 + 4 * weight.step.size
            else:
                packed += 4 * count
    return fp32, packed
