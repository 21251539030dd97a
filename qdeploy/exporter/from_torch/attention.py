"""Attention: one layer from queries, keys and values, as an operator of its own or as two products around a softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdeploy.exporter.elements import BATCH, around_batch
from qdeploy.exporter.from_torch.site import OPERATOR, Site, float64
from qdeploy.exporter.layers import Attention, Gather, Layer, Position
from qdeploy.exporter.lowering.moved import Value, index_of, layer_of, regrouped, seen
from qdeploy.ops.op import channels_of

HIDDEN = -50.0  # a mask takes weights below e^-50 of the largest away, whatever number it is
LOGITS = "export the network that ends in logits; predict and ensembles apply softmax themselves"
LEAST = -1e6  # in place of an infinite mask

Heads = np.ndarray  # of one image: the elements [blocks, heads, rows, channels]


@dataclass(frozen=True, eq=False)
class Scores:
    """factor * q k^T + bias, between two operators of an attention."""

    q: Value
    k: Value  # [..., S, channels]
    sizes: tuple[int, ...]  # [..., T, S], of the product
    factor: float = 1.0
    bias: np.ndarray | None = None  # f64 of these sizes
    is_softmax: bool = False


def product(site: Site, a: Any, b: Any) -> Any:
    if isinstance(a, Scores) and a.is_softmax and not isinstance(b, (Tensor, Scores)):
        return _attention(site, a, b)
    a = _queries(site, a)
    if isinstance(a, (Tensor, Scores)) or isinstance(b, (Tensor, Scores)):
        site.fail("a product of queries and keys, or of softmax and values", "a matrix product outside a Linear")
    if index_of(a).ndim < 3 or index_of(a).ndim != index_of(b).ndim:
        site.fail("a product of queries and keys [..., T, C]", f"one of {index_of(a).ndim} dimensions")
    return Scores(a, seen(layer_of(b), index_of(b).swapaxes(-1, -2)), site.sizes)


def added_product(site: Site, constant: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """aten.baddbmm."""
    scores = product(site, a, b)
    if not isinstance(scores, Scores) or not isinstance(constant, Tensor):
        site.fail("attention scores plus a constant", "another sum")
    return _with_bias(site, replace(scores, factor=float(alpha)), constant * beta)


def scaled(site: Site, a: Any, b: Any) -> Scores:
    scores, number = (a, b) if isinstance(a, Scores) else (b, a)
    if isinstance(number, Tensor) and number.numel() == 1:
        number = float(number)
    if scores.is_softmax or not isinstance(number, (int, float)):
        site.fail("attention scores times a number", "another product")
    bias = None if scores.bias is None else scores.bias * number
    return replace(scores, factor=scores.factor * number, bias=bias)


def biased(site: Site, a: Any, b: Any) -> Scores:
    scores, constant = (a, b) if isinstance(a, Scores) else (b, a)
    if scores.is_softmax or not isinstance(constant, (Tensor, int, float)):
        site.fail("attention scores plus a constant", "another sum")
    return _with_bias(site, scores, torch.as_tensor(constant))


def _with_bias(site: Site, scores: Scores, constant: Tensor) -> Scores:
    spread = np.broadcast_to(float64(constant), site.sizes).reshape(scores.sizes)
    return replace(scores, bias=spread if scores.bias is None else scores.bias + spread)


def masked(site: Site, scores: Any, mask: Any, value: float) -> Any:
    """aten.masked_fill with a constant mask."""
    if not isinstance(scores, Scores) or not isinstance(mask, Tensor):
        site.fail("a constant mask of attention scores", "another one")
    return _with_bias(site, scores, torch.where(mask, float(value), 0.0))


def reshaped_scores(site: Site, scores: Scores) -> Scores:
    if site.sizes[-2:] != scores.sizes[-2:] or math.prod(site.sizes) != math.prod(scores.sizes):
        got = "scores of several heads mixed (talking heads)" if site.operator == "permute" else f"aten.{site.operator}"
        site.fail("attention scores of each head by itself", got)
    return scores


def softmax(site: Site, x: Any, dim: int, *_: Any, **__: Any) -> Any:
    if not isinstance(x, Scores):
        site.fail(OPERATOR, f"softmax ({LOGITS})")
    if dim not in (-1, len(site.sizes) - 1) or x.is_softmax:
        site.fail("softmax over the keys", f"one over dimension {dim}")
    return replace(x, is_softmax=True)


def scaled_dot_product(
    site: Site,
    q: Value,
    k: Value,
    v: Value,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    q = _queries(site, q)
    for x in (q, k, v):
        if isinstance(x, (Tensor, Scores)):
            site.fail("keys and values that depend on the input", "constant ones")
    if enable_gqa:
        times = index_of(q).shape[-3] // index_of(k).shape[-3]
        k, v = (seen(layer_of(x), np.repeat(index_of(x), times, axis=-3)) for x in (k, v))
    lead = np.broadcast_shapes(*(index_of(x).shape[:-2] for x in (q, k, v)))  # one head of keys for all queries
    q, k, v = (seen(layer_of(x), np.broadcast_to(index_of(x), (*lead, *index_of(x).shape[-2:]))) for x in (q, k, v))
    sizes = (*index_of(q).shape[:-1], index_of(k).shape[-2])
    scores = Scores(q, k, sizes, index_of(q).shape[-1] ** -0.5 if scale is None else float(scale), None, True)
    if is_causal:
        mask = torch.ones(sizes[-2:], dtype=torch.bool).tril()
    if mask is not None:
        if not isinstance(mask, Tensor):
            site.fail("a mask that is a constant", "one that depends on the input")
        bias = float64(torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask)
        scores = replace(scores, bias=np.broadcast_to(bias, sizes))
    return _attention(site, scores, v)


def _queries(site: Site, q: Any) -> Any:
    """Learned queries, of a pool by attention, are rows that take nothing from the input."""
    if not isinstance(q, Tensor) or q.dim() < 3 or len(q) % BATCH:
        return q
    *_, count, width = q.shape
    by_image = float64(q).reshape(BATCH, -1, count, width)
    if (by_image[0] != by_image[1]).any():
        site.fail("the same queries for all images", "others")
    heads = by_image.shape[1]
    shape = (count, heads * width)
    index = np.arange(q.numel()).reshape(BATCH, count, heads, width).swapaxes(1, 2).reshape(q.shape)
    at = Site(site.argument(0), site.trace, site.layers)
    source = next(layer for layer in site.layers if layer.op != "input" or not site.trace.ids)
    rows = at.layer(Gather, [source], (count, channels_of(source.shape)), axis="rows", index=np.full(count, -1))
    empty = at.layer(Gather, [rows], shape, axis="channels", index=np.full(shape[1], -1))
    table = by_image[0].swapaxes(0, 1).reshape(shape)
    return seen(at.layer(Position, [empty], shape, index, factor=0.0, rows=table), index)


# ---- The layer -------------------------------------------------------------------------------------------------------


def _attention(site: Site, scores: Scores, v: Value) -> Value:
    entries, _ = _by_image(site, scores.q)
    heads = _count_heads(scores.q, entries, scores.bias is not None)
    q, k, v_heads = (_heads(site, x, heads) for x in (scores.q, scores.k, v))
    blocks, _, rows, _ = q.shape
    if k.shape[:2] != v_heads.shape[:2] or k.shape[0] != blocks:
        site.fail("as many blocks and heads of queries, keys and values", f"{q.shape}, {k.shape} and {v_heads.shape}")
    layers = [_tokens(site, x, part) for x, part in ((scores.q, q), (scores.k, k), (v, v_heads))]
    bias, regions = _bias_and_regions(site, scores, blocks, heads)
    width = v_heads.shape[3]
    shape = (blocks * rows, heads * width)
    index = _placed(site, scores.q, blocks, heads, rows, width)
    block = rows if blocks > 1 else None
    fields = {"heads": heads, "factor": scores.factor, "block": block, "bias": bias, "regions": regions}
    return seen(site.layer(Attention, layers, shape, index, **fields), index)


def _by_image(site: Site, x: Value) -> tuple[np.ndarray, np.ndarray]:
    """The elements of one image [entries, rows, channels]; and where in all entries those of each image are."""
    index, size = index_of(x), math.prod(layer_of(x).shape)
    flat = index.reshape(-1, *index.shape[-2:])
    images = flat // size
    order = np.argsort(images[:, 0, 0], kind="stable")
    local = (flat % size)[order]
    alike = flat.min() >= 0 and (images == images[:, :1, :1]).all() and around_batch(images[:, 0, 0]) is not None
    parts = local.reshape(BATCH, -1, *local.shape[1:]) if alike else None
    if parts is None or (parts != parts[:1]).any():
        site.fail("attention within each image", "one over several")
    return parts[0], order


def _heads(site: Site, x: Value, heads: int) -> Heads:
    entries, _ = _by_image(site, x)
    if len(entries) % heads:
        site.fail("as many heads in each block", f"{len(entries)} of {heads}")
    return entries.reshape(-1, heads, *entries.shape[1:])


def _count_heads(x: Value, entries: np.ndarray, is_biased: bool) -> int:
    """Heads are entries that have the same rows. Of rows that are channels, and where each head has rows of its own,
    each head is a block; but a bias is one for all blocks, and then the sizes say how many heads there are."""
    width = channels_of(layer_of(x).shape)
    row = entries[:, :, 0] // width
    if row.shape[1] > 1 and (row == row[:, :1]).all():
        return 1
    if is_biased and width == entries.shape[2] and index_of(x).ndim > 3:
        return index_of(x).shape[-3]
    differs = (row != row[:1]).any(1)
    return int(np.argmax(differs)) if differs.any() else len(entries)


def _tokens(site: Site, x: Value, part: Heads) -> Layer:
    blocks, heads, rows, channels = part.shape
    elements = part.swapaxes(1, 2).reshape(blocks * rows, heads * channels)
    return regrouped(site, layer_of(x), elements, elements.shape)


def _placed(site: Site, q: Value, blocks: int, heads: int, rows: int, width: int) -> np.ndarray:
    """Where the elements of the output are in [..., T, channels of a head]."""
    _, order = _by_image(site, q)
    own = np.arange(BATCH * blocks * rows * heads * width).reshape(BATCH * blocks, rows, heads, width)
    entries = np.empty((len(order), rows, width), np.int64)
    entries[order] = own.swapaxes(1, 2).reshape(-1, rows, width)
    return entries.reshape(*index_of(q).shape[:-1], width)


def _bias_and_regions(
    site: Site, scores: Scores, blocks: int, heads: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What is added to the scores of every block, and which rows of a block do not see each other."""
    if scores.bias is None:
        return None, None
    _, order = _by_image(site, scores.q)
    queries, keys = scores.sizes[-2:]
    entries = scores.bias.reshape(-1, queries, keys)[order].reshape(BATCH, blocks, heads, queries, keys)
    if not np.array_equal(entries[0], entries[1]):
        site.fail("the same mask for all images", "others")
    bias, regions = np.maximum(entries[0], LEAST), None
    hidden = (bias < HIDDEN + bias.max(0)).any(1)  # [blocks, T, S], of what another block or head shows
    if (bias != bias[:1]).any():
        regions = _regions(site, hidden)
        bias = np.where(hidden[:, None], -math.inf, bias)
    common = bias.max(0)
    known = np.where(np.isinf(bias), common, bias)
    if np.abs(known - common).max() > 1e-3:
        site.fail("one bias for all blocks", "several")
    return (common if common.any() else None), regions


def _regions(site: Site, hidden: np.ndarray) -> np.ndarray:
    """A number for each row, [blocks*T]: the first row of the block that it sees."""
    first = (~hidden).argmax(2)
    if (hidden != (first[:, :, None] != first[:, None, :])).any():
        site.fail("a mask that parts a block into regions", "another")
    return first.reshape(-1).astype(np.int32)
