"""Resize, and Upsample, which it replaced: nearest moves elements, linear and cubic are products by two matrices, as
which to_onnx writes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from qdeploy.exporter.elements import BATCH, numbered
from qdeploy.exporter.from_onnx.site import Site
from qdeploy.exporter.layers import Band, Layer, Resize
from qdeploy.exporter.lowering import windows
from qdeploy.exporter.lowering.moved import Value, image, index_of, layer_of, seen, sizes_of

ROUNDING: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda place: np.ceil(place - np.float32(0.5)),
    "round_prefer_ceil": lambda place: np.floor(place + np.float32(0.5)),
    "floor": np.floor,
    "ceil": np.ceil,
}
COPIES = 4  # of a matrix while its weights become integers
ONE = np.ones((1, 1), np.int64), 1.0  # of a dimension that stays, as windows.resize takes it


class Axis(NamedTuple):
    """One dimension of a resize."""

    size: int
    target: int
    scale: np.float32  # as the file has it: target / size, but for what rounding down took


def resize(site: Site, x: Value, *inputs: Any) -> Value:
    """Its inputs are scales up to opset 10, then a region, scales and sizes."""
    by_scales = site.node.op == "Upsample" or site.state.file.opset < 11
    scales, sizes = (inputs[0] if inputs else None, None) if by_scales else (*inputs[1:3], None, None)[:2]
    axes = _axes(site, x, scales, sizes)
    mode = site.text("mode", "nearest")
    if mode not in ("nearest", "linear", "cubic") or site.integer("antialias", 0):
        got = "antialias" if site.integer("antialias", 0) else mode[:20]
        site.fail("a resize that is nearest, linear or cubic", got)
    site.computes(math.prod(axis.target for axis in axes) * math.prod(sizes_of(x)[:2]))
    if mode != "nearest":
        return _by_matrices(site, x, axes, mode)
    index = index_of(x)
    for i, axis in enumerate(axes, 2):
        index = index.take(_nearest(site, axis), axis=i)
    return seen(layer_of(x), np.ascontiguousarray(index))


def _axes(site: Site, x: Value, scales: Any, sizes: Any) -> list[Axis]:
    """Of the dimensions behind the channels."""
    own = sizes_of(x)
    if site.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        site.fail("a resize to the sizes that it names", "keep_aspect_ratio_policy")
    chosen = [site.dimension(axis, len(own)) for axis in site.integers("axes") or range(len(own))]
    found = {axis: Axis(size, size, np.float32(1)) for axis, size in enumerate(own)}
    if sizes is not None:
        targets = [int(v) for v in site.constant(sizes, "sizes").reshape(-1)]
        factors = [np.float32(target / own[axis]) for axis, target in zip(chosen, targets, strict=True)]
    else:
        factors = list(_scales(site, scales))
        targets = [math.floor(factor * np.float32(own[axis])) for axis, factor in zip(chosen, factors, strict=True)]
    for axis, target, factor in zip(chosen, targets, factors, strict=True):
        found[axis] = Axis(own[axis], target, factor)
    kept = found[0].target in (BATCH, site.state.file.batch) and found[1].target == own[1]
    if not kept or len(own) not in (3, 4) or min(axis.target for axis in found.values()) < 1:
        site.fail("a resize of height, width or both", f"one to {[axis.target for axis in found.values()][1:]}")
    return [found[axis] for axis in range(2, len(own))]


def _scales(site: Site, scales: Any) -> np.ndarray:
    """An attribute up to opset 8."""
    given = site.node.attributes.get("scales") if scales is None else site.constant(scales, "scales")
    values = np.asarray([] if given is None else given, np.float32).reshape(-1)
    if not values.size or not (np.isfinite(values) & (values > 0) & (values < 2**31)).all():
        site.fail("scales > 0", f"{values[:4]}")
    return values


# ---- Where a place of the result lies in the input -------------------------------------------------------------------


def _coordinates(site: Site, axis: Axis) -> np.ndarray:
    """f32, as onnxruntime computes them: that decides on which side of a border a place is."""
    old = site.node.op == "Upsample" or site.state.file.opset < 11
    mode = "asymmetric" if old else site.text("coordinate_transformation_mode", "half_pixel")
    place, half = np.arange(axis.target, dtype=np.float32), np.float32(0.5)
    if axis.size == axis.target and axis.scale == 1:
        return place
    if mode == "half_pixel" or mode == "pytorch_half_pixel" and axis.target > 1:
        return (place + half) / axis.scale - half
    if mode == "half_pixel_symmetric":
        adjusted = np.float32(axis.target) / (axis.scale * np.float32(axis.size))
        return np.float32(axis.size) / 2 * (1 - adjusted) + (place + half) / axis.scale - half
    if mode == "align_corners":
        return place * np.float32(axis.size - 1) / np.float32(max(axis.target - 1, 1))
    if mode == "asymmetric":
        return place / axis.scale
    if mode == "tf_half_pixel_for_nn":
        return (place + half) / axis.scale
    if mode != "pytorch_half_pixel":
        site.fail("a coordinate_transformation_mode but tf_crop_and_resize", mode[:30])
    return np.zeros_like(place)


def _nearest(site: Site, axis: Axis) -> np.ndarray:
    place = _coordinates(site, axis)
    mode = site.text("nearest_mode", "round_prefer_floor")
    if site.node.op == "Upsample" or site.state.file.opset < 11:
        mode = "ceil" if axis.scale < 1 else "floor"
    rounding = ROUNDING.get(mode)
    if rounding is None:
        site.fail("a nearest_mode of ONNX", mode[:20])
    return np.clip(rounding(place), 0, axis.size - 1).astype(np.int64)


# ---- Weights ---------------------------------------------------------------------------------------------------------


def _by_matrices(site: Site, x: Value, axes: list[Axis], mode: str) -> Value:
    for axis in axes:
        site.computes(COPIES * axis.size * axis.target)
    matrices = [(windows.in_bits(weights(site, axis, mode)), 2.0**-windows.RESIZE_BITS) for axis in axes]
    resized: Layer = windows.resize(site, image(site, x), *(*matrices, ONE)[:2])
    return resized if len(axes) == 2 else seen(resized, numbered(resized.shape)[..., 0])


def weights(site: Site, axis: Axis, mode: str) -> np.ndarray:
    """f64 [target, size]."""
    place = _coordinates(site, axis)
    first = np.floor(place).astype(np.int64)
    part = place.astype(np.float64) - first
    if mode == "linear":
        taps = [(first, 1 - part), (first + 1, part)]
    else:
        a = site.number("cubic_coeff_a", -0.75)
        taps = [(first + i, _cubic(np.abs(part - i), a)) for i in (-1, 0, 1, 2)]
    matrix = np.zeros((axis.target, axis.size))
    for column, weight in taps:
        inside = (column >= 0) & (column < axis.size) if site.integer("exclude_outside", 0) else True
        np.add.at(matrix, (np.arange(axis.target), np.clip(column, 0, axis.size - 1)), np.where(inside, weight, 0))
    sums = matrix.sum(1, keepdims=True)
    if not np.isfinite(sums).all() or not sums.all():
        site.fail("weights of which each sum is a number but 0", "others")
    return matrix / sums


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel, of distances up to 2."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, far)


# ---- Two products by matrices ----------------------------------------------------------------------------------------


def of_rows(site: Site, matrix: np.ndarray, x: Value) -> Layer:
    """A constant [OH, H] times an image."""
    picture = image(site, x)
    _, height, width = picture.shape
    if matrix.shape[1] != height:
        site.fail(f"a matrix for {height} rows of pixels", f"one for {matrix.shape[1]}")
    site.computes(COPIES * (width**2 + matrix.size))
    return windows.resize(site, picture, _in_integers(matrix), (np.eye(width, dtype=np.int64), 1.0))


def of_columns(site: Site, rows: Resize, matrix: np.ndarray) -> Layer:
    """The same image times a constant [W, OW]: one resize."""
    _, height, width = rows.inputs[0].shape
    if matrix.shape[0] != width:
        site.fail(f"a matrix for {width} columns of pixels", f"one for {matrix.shape[0]}")
    site.computes(COPIES * matrix.size)
    dense = np.zeros((rows.shape[1], height), np.int64)
    places = rows.rows.start[:, None] + np.arange(rows.rows.weight.shape[1])
    np.put_along_axis(dense, places, rows.rows.weight.astype(np.int64), 1)
    return windows.resize(site, rows.inputs[0], (dense, float(rows.scale[0])), _in_integers(matrix.T))


def is_one(band: Band) -> bool:
    """Whether its product is what it is multiplied by."""
    return bool((band.weight == 1).all()) and np.array_equal(band.start, np.arange(len(band.start)))


def _in_integers(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    matrix = matrix.astype(np.float64)
    if np.array_equal(matrix, np.rint(matrix)) and np.abs(matrix).max(initial=0) < 2**31:
        return matrix.astype(np.int64), 1.0
    return windows.in_bits(matrix), 2.0**-windows.RESIZE_BITS
