"""Operators that only move elements, as functions of numpy: of constants, and of the numbers of elements.

Each is f(site, array, *constants); what makes more elements than it was given asks the site before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from qdeploy.exporter.from_onnx.site import Site

Moved = np.ndarray | tuple[np.ndarray, ...]


def _reshape(site: Site, x: np.ndarray, shape: Any = None) -> np.ndarray:
    target = site.axes(shape, "shape") or []
    copied = not site.integer("allowzero", 0)
    return x.reshape([x.shape[i] if d == 0 and copied else d for i, d in enumerate(target)])


def _transpose(site: Site, x: np.ndarray) -> np.ndarray:
    return x.transpose(site.integers("perm"))


def _flatten(site: Site, x: np.ndarray) -> np.ndarray:
    axis = site.integer("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1) if x.size else x.reshape(math.prod(x.shape[:axis]), 0)


def _squeeze(site: Site, x: np.ndarray, axes: Any = None) -> np.ndarray:
    found = site.axes(axes)
    return x.squeeze() if found is None else x.squeeze(tuple(found))


def _unsqueeze(site: Site, x: np.ndarray, axes: Any = None) -> np.ndarray:
    return np.expand_dims(x, tuple(site.axes(axes) or []))


def _slice(site: Site, x: np.ndarray, *inputs: Any) -> np.ndarray:
    """Attributes up to opset 9."""
    starts, ends, axes, steps = (
        site.axes(value, key) for value, key in zip([*inputs, None, None, None, None], KEYS, strict=False)
    )
    picked = [slice(None)] * x.ndim
    starts, ends = starts or [], ends or []
    axes = axes if axes is not None else list(range(len(starts)))
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts), strict=True):
        end = None if step < 0 and end < -x.shape[axis] else end  # type: ignore[assignment]
        picked[axis] = slice(start, end, step)
    return x[tuple(picked)]


KEYS = ("starts", "ends", "axes", "steps")


def _gather(site: Site, x: np.ndarray, indices: Any) -> np.ndarray:
    index, axis = site.constant(indices, "indices"), site.integer("axis", 0)
    site.computes(index.size * (x.size // max(x.shape[axis], 1)), x.size)
    return x.take(index.astype(np.int64), axis)


def _split(site: Site, x: np.ndarray, sizes: Any = None) -> tuple[np.ndarray, ...]:
    axis, given = site.integer("axis", 0), site.axes(sizes, "split")
    count = len(site.node.outputs)
    part = -(-x.shape[axis] // count)
    widths = given if given is not None else [part] * (count - 1) + [x.shape[axis] - part * (count - 1)]
    if sum(widths) != x.shape[axis] or min(widths) < 0 or len(widths) != count:
        site.fail(f"parts that make {x.shape[axis]}", f"{widths}")
    return tuple(np.split(x, np.cumsum(widths[:-1]), axis))


def _expand(site: Site, x: np.ndarray, shape: Any) -> np.ndarray:
    sizes = np.broadcast_shapes(x.shape, tuple(site.axes(shape) or []))
    site.computes(math.prod(sizes), x.size)
    return np.broadcast_to(x, sizes)


def _tile(site: Site, x: np.ndarray, repeats: Any) -> np.ndarray:
    times = site.axes(repeats) or []
    site.computes(x.size * math.prod(times), x.size)
    return np.tile(x, times)


def _depth_to_space(site: Site, x: np.ndarray) -> np.ndarray:
    size, mode = site.integer("blocksize", 1), site.text("mode", "DCR")
    n, c, h, w = x.shape
    if mode == "DCR":
        return x.reshape(n, size, size, -1, h, w).transpose(0, 3, 4, 1, 5, 2).reshape(n, -1, h * size, w * size)
    return x.reshape(n, -1, size, size, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, -1, h * size, w * size)


def _space_to_depth(site: Site, x: np.ndarray) -> np.ndarray:
    size = site.integer("blocksize", 1)
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // size, size, w // size, size).transpose(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, -1, h // size, w // size)


def _same(site: Site, x: np.ndarray, *_: Any) -> np.ndarray:
    return x


MOVES: dict[str, Callable[..., Moved]] = {
    "Identity": _same,
    "Dropout": _same,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Slice": _slice,
    "Gather": _gather,
    "Split": _split,
    "Expand": _expand,
    "Tile": _tile,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
}
