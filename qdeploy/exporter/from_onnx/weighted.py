"""Conv, ConvTranspose, Gemm and MatMul by a constant."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qdeploy.errors import ExportError
from qdeploy.exporter.from_onnx import resize
from qdeploy.exporter.from_onnx.quantized import Stored, parts, weight
from qdeploy.exporter.from_onnx.site import MOST_COMPUTED, Site
from qdeploy.exporter.layers import QuantizedWeight, Resize
from qdeploy.exporter.lowering import elementwise, joined, weighted
from qdeploy.exporter.lowering.moved import Value, sizes_of

WINDOW = "windows of one or two dimensions"


def real(value: Any) -> np.ndarray:
    """A constant in float64."""
    if isinstance(value, np.ndarray) and value.size > MOST_COMPUTED and not any(value.strides):
        raise ExportError(f"expected at most {MOST_COMPUTED} elements of a constant, got {value.size} - at the graph")
    return value.real if isinstance(value, Stored) else np.asarray(value, np.float64)


def is_constant(value: Any) -> bool:
    return isinstance(value, (np.ndarray, Stored))


def spatial(site: Site, key: str, count: int, default: int) -> list[int]:
    """An attribute with a number for each of `count` dimensions."""
    values = site.integers(key)
    if values is not None and (len(values) != count or min(values, default=1) < 1):
        site.fail(f"{key} > 0 for {count} dimensions", f"{values}")
    return [default] * count if values is None else values


def padding(site: Site, sizes: tuple[int, ...], kernel: list[int], stride: list[int], gaps: list[int]) -> list[int]:
    """Before each dimension, then behind each."""
    mode, count = site.text("auto_pad", "NOTSET"), len(kernel)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
            for size, k, s, d in zip(sizes, kernel, stride, gaps, strict=True)
        ]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        return less + more if mode == "SAME_UPPER" else more + less
    if mode not in ("NOTSET", "VALID", ""):
        site.fail("auto_pad NOTSET, VALID, SAME_UPPER or SAME_LOWER", repr(mode[:20]))
    values = site.integers("pads") if mode != "VALID" else None
    if values is not None and (len(values) != 2 * count or min(values, default=0) < 0):
        site.fail(f"pads >= 0 on both sides of {count} dimensions", f"{values}")
    return [0] * 2 * count if values is None else values


def conv(site: Site, x: Value, kernel: Any, bias: Any = None) -> Value:
    held = weight(site, kernel, tuple(range(_rank(kernel))))
    count = len(held.shape) - 2
    if count not in (1, 2) or len(sizes_of(x)) != count + 2:
        site.fail(WINDOW, f"{count} for a tensor of {len(sizes_of(x))} dimensions")
    groups, size = site.integer("group", 1), _kernel(site, held)
    if groups < 1 or held.shape[0] % groups or held.shape[1] * groups != sizes_of(x)[1]:
        site.fail(f"a weight for {sizes_of(x)[1]} channels in {groups} groups", f"one of shape {list(held.shape)}")
    stride, gaps = spatial(site, "strides", count, 1), spatial(site, "dilations", count, 1)
    pads = padding(site, sizes_of(x)[2:], size, stride, gaps)
    window = {"stride": stride, "padding": pads, "dilation": gaps, "groups": groups}
    if _wide(held) and groups > 1:
        site.fail("weights less their zero point within -128..127 in groups (quantize with signed weights)", "more")
    x, held = _split(site, x, held, 1)
    return weighted.convolution(site, x, held, _shift(site, bias, held.shape[0]), window)


def transposed_conv(site: Site, x: Value, kernel: Any, bias: Any = None) -> Value:
    """The weight is [I, O, ...]. Where the stride is the kernel, SAME is no padding."""
    held = weight(site, kernel, (1, 0, *range(2, _rank(kernel))))
    count, size = len(held.shape) - 2, _kernel(site, held)
    if count not in (1, 2) or len(sizes_of(x)) != count + 2:
        site.fail(WINDOW, f"{count} for a tensor of {len(sizes_of(x))} dimensions")
    if held.shape[1] != sizes_of(x)[1]:
        site.fail(f"a weight for {sizes_of(x)[1]} channels", f"one for {held.shape[1]}")
    stride, gaps = spatial(site, "strides", count, 1), spatial(site, "dilations", count, 1)
    is_same = site.text("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")
    pads = [0] * 2 * count if is_same else padding(site, sizes_of(x)[2:], size, stride, gaps)
    groups = site.integer("group", 1)
    window = {"stride": stride, "padding": pads, "dilation": gaps, "groups": groups}
    more = site.integers("output_padding") or [0] * count
    x, held = _split(site, x, held, 1)
    result = weighted.transposed_convolution(site, x, held, _shift(site, bias, held.shape[0] * groups), window, more)
    if site.integers("output_shape") not in (None, list(sizes_of(result)[2:])):
        site.fail(f"output_shape {list(sizes_of(result)[2:])}", f"{site.integers('output_shape')}")
    return result


def _kernel(site: Site, held: Any) -> list[int]:
    size = list(held.shape[2:])
    if site.integers("kernel_shape") not in (None, size):
        site.fail(f"kernel_shape {size}, as its weight", f"{site.integers('kernel_shape')}")
    return size


def _rank(value: Any) -> int:
    return value.codes.ndim if isinstance(value, Stored) else np.ndim(value) if is_constant(value) else 0


def _shift(site: Site, bias: Any, channels: int, factor: float = 1.0) -> np.ndarray:
    if bias is None:
        return np.zeros(channels)
    if not is_constant(bias):
        site.fail("a bias that is a constant", "one that depends on the input")
    values = real(bias).reshape(-1) * factor
    if values.size not in (1, channels):
        site.fail(f"a bias for {channels} channels", f"{values.size} numbers")
    return np.broadcast_to(values, channels).copy()


def _wide(held: Any) -> bool:
    return isinstance(held, QuantizedWeight) and held.qmax > 127


def _split(site: Site, x: Value, held: Any, axis: int) -> tuple[Value, Any]:
    """Weights beyond s8 as sums of two or three, over copies of the input."""
    if not _wide(held):
        return x, held
    narrow, copies = parts(held)
    note = f"weights less their zero point are beyond 8 bits: {copies} times the MACs - at node `{site.name}`"
    site.state.notes.append(note)
    return joined.concat(site, [x] * copies, axis), narrow


def gemm(site: Site, a: Value, b: Any, c: Any = None) -> Value:
    if site.integer("transA", 0):
        site.fail("Gemm of rows of A", "transA")
    if len(sizes_of(a)) != 2 or _rank(b) != 2:
        site.fail("Gemm of [N, F] by a constant matrix", f"{len(sizes_of(a))} dimensions by {_rank(b)}")
    alpha, beta = site.number("alpha", 1.0), site.number("beta", 1.0)
    held = weight(site, b, (0, 1) if site.integer("transB", 0) else (1, 0))
    a, held = _split(site, a, held, 1)
    channels = held.shape[0]
    _check_inner(site, a, held)
    if alpha == 1:
        return weighted.linear(site, a, held, _shift(site, c, channels, beta))
    result = weighted.linear(site, a, held, np.zeros(channels))
    return elementwise.affine(site, result, alpha, _shift(site, c, channels, beta))


def matmul(site: Site, a: Any, b: Any) -> Value:
    """By a constant on the right; of images, a resize, by one on the left as well."""
    if isinstance(a, np.ndarray) and a.ndim == 2 and not is_constant(b) and len(sizes_of(b)) == 4:
        return resize.of_rows(site, a, b)
    if isinstance(a, Resize) and resize.is_one(a.columns) and isinstance(b, np.ndarray) and b.ndim == 2:
        return resize.of_columns(site, a, b)
    if is_constant(a) or not is_constant(b):
        site.fail("a product by a constant matrix on the right", "another")
    if _rank(b) != 2:
        site.fail("a product by one matrix", f"one by {_rank(b)} dimensions")
    held = weight(site, b, (1, 0))
    a, held = _split(site, a, held, len(sizes_of(a)) - 1)
    _check_inner(site, a, held)
    return weighted.linear(site, a, held, np.zeros(held.shape[0]))


def _check_inner(site: Site, a: Value, held: Any) -> None:
    if sizes_of(a)[-1] != math.prod(held.shape[1:]):
        site.fail(f"a matrix for {sizes_of(a)[-1]} features", f"one of shape {list(held.shape[::-1])}")
