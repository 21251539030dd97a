"""An int8 file beside onnxruntime, in float32 and in its dynamic int8: for the two examples with real weights."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from qdeploy.peers import alternate

Run = Callable[[Any], np.ndarray]  # from an input to features [N, D]
Runs = dict[str, tuple[Run, int]]  # and the bytes of its file


def session(content: bytes) -> ort.InferenceSession:
    """On one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # no warnings
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def float32_onnx(net: nn.Module, example: tuple[Tensor, ...], names: list[str], dynamic: dict | None = None) -> bytes:
    """By PyTorch's exporter that needs no other package."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: Any = {"input_names": names, "dynamic_axes": dynamic, "opset_version": 17, "dynamo": False}
        torch.onnx.export(net, example, content, **options)
    return content.getvalue()


def dynamic_int8(content: bytes) -> bytes:
    """Weights in int8, a scale for each channel; activations are scaled anew in each call; attention stays float."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        before.write_bytes(content)
        quantize_dynamic(before, after, per_channel=True, weight_type=QuantType.QInt8)
        return after.read_bytes()


def report(wanted: np.ndarray, runs: Runs, samples: Sequence[Any], timed: Any, rounds: int) -> str:
    """A table: size, how near `wanted`, the float32 features [N, D] of PyTorch, and milliseconds of one call.

    samples: N inputs of one row each, for the comparison; timed: the input whose time is taken, all runs in turn.
    """
    timings = alternate({name: partial(run, timed) for name, (run, _) in runs.items()}, rounds)
    rows = [f"{'':22}{'MB':>7}{'SQNR dB':>9}{'cosine':>9}{'lowest':>9}{'ms':>9}"]
    for name, (run, size) in runs.items():
        found = np.concatenate([run(sample) for sample in samples])
        cosines = cosine(wanted, found)
        figures = f"{sqnr(wanted, found):9.1f}{cosines.mean():9.4f}{cosines.min():9.4f}{timings[name].median:9.1f}"
        rows.append(f"{name:22}{size / 1e6:7.1f}{figures}")
    return "\n".join(rows)


def sqnr(wanted: np.ndarray, found: np.ndarray) -> float:
    """Signal to quantization noise, in dB."""
    return float(10 * np.log10(np.square(wanted).sum() / np.square(found - wanted).sum()))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the last axes."""
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
