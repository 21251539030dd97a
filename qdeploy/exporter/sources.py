"""What `export` takes: which front end reads it, and what its input looks like where no example says so."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from qdeploy.errors import InputError
from qdeploy.exporter.layers import Embedding, Network


def is_one(source: object) -> bool:
    """Whether it is one network, not a list of them."""
    from qdeploy.exporter import from_onnx

    if from_onnx.is_onnx(source):
        return True
    if "torch" not in sys.modules:  # then nobody can hold a network of PyTorch
        return False
    from qdeploy.exporter import from_torch

    return from_torch.is_network(source)


def lowered(source: Any, example: np.ndarray | None, shape: Sequence[int] | None) -> Network:
    """The layers of a network, for inputs like `example` [N, ...], or of `shape` without the batch; where both are
    None, as the source says."""
    if example is not None and shape is not None:
        raise InputError(f"expected an example or its shape, got both - at shape {tuple(shape)}")
    from qdeploy.exporter import from_onnx

    sizes = _checked_shape(shape if example is None else example.shape[1:])
    if from_onnx.is_onnx(source):
        return from_onnx.lower(source, sizes)
    from qdeploy.exporter.from_torch import exported, lower  # loads PyTorch

    return lower(source, exported.example_of(source, sizes) if example is None else example)


def random_inputs(network: Network, count: int) -> np.ndarray:
    """Inputs of the network's shape, to be compared on where nobody gave any: f32 noise, or int64 token ids."""
    random = np.random.default_rng(0)
    shape = (count, *network.layers[0].shape)
    if not network.ids:
        return random.normal(size=shape).astype(np.float32)
    return random.integers(min(x.channels for x in network.layers if isinstance(x, Embedding)), size=shape)


def _checked_shape(shape: Sequence[int] | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        expected = "sizes > 0 of one input, without the batch, as (3, 224, 224)"
        raise InputError(f"expected {expected}, got {shape!r} - at shape")
    return sizes
