"""An ONNX file in float32, quantized by onnxruntime: u8 activations from calibration, s8 weights per channel."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np


def quantized_statically(source: Path, path: Path, batches: Iterable[np.ndarray], reduce_range: bool = False) -> None:
    """Writes `path` of `source`, whose input is `x`. `reduce_range`: 7 bits, which do not saturate without VNNI."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        remaining = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({"x": batch} for batch in self.remaining), None)

    prepared = path.with_name(f"{path.stem}_prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, path, Reader(), per_channel=True, reduce_range=reduce_range, **types)
