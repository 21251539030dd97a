"""attention: products, a softmax, products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from qdeploy.graph import Activation, Node
from qdeploy.onnx_nodes.writer import Value, Writer

UNSEEN = float(np.finfo(np.float32).min)  # beside a logit: its weight is 0


def attention(writer: Writer, node: Node, inputs: Sequence[Value], output: Activation) -> Value:
    """Ours rounds the weights to 15 bits, the softmax of ONNX does not."""
    q, k, v = inputs
    block, heads = node.attributes["block"], node.attributes["heads"]
    rows = block or 0

    def split(value: Value, what: str, perm: Sequence[int]) -> str:
        """[N, rows, channels] to [N or N*blocks, ...] in the order `perm` of segment, row, head, channel."""
        sizes = [-1 if block else 0, rows, heads, value.tensor.shape[1] // heads]
        shape = writer.integers(sizes, f"{what}_shape")
        return writer.add(
            "Transpose", [writer.add("Reshape", [writer.real(value), shape], f"{what}_split")], what, perm=list(perm)
        )

    logits = writer.add("MatMul", [split(q, "q", (0, 2, 1, 3)), split(k, "k", (0, 2, 3, 1))], "products")
    factor = node.attributes["logit_multiplier"] * math.log(2) / (q.tensor.scale * k.tensor.scale)
    logits = writer.add("Mul", [logits, writer.number(factor, "logit_factor")], "logits")
    if "logit_bias" in node.constants:
        bias = (node.constants["logit_bias"].astype(np.float64) * math.log(2)).astype(np.float32)
        table = writer.rows_of(writer.constant(bias, "logit_bias"), q.rows, 1)
        logits = writer.add("Add", [logits, writer.rows_of(table, k.rows, 2)], "biased")
    if "regions" in node.constants:
        logits = _of_regions(writer, logits, node.constants["regions"], heads, block)
    if k.rows is not None:
        seen = writer.add("Sub", [writer.mask(k.rows, (1, 1, -1)), writer.number(1, "one")], "seen")
        hidden = writer.add("Mul", [seen, writer.number(-UNSEEN, "far")], "hidden")
        logits = writer.add("Add", [logits, hidden], "masked")
    weights = writer.add("Softmax", [logits], "weights", axis=-1)
    product = writer.add("MatMul", [weights, split(v, "v", (0, 2, 1, 3))])
    product = writer.add("Transpose", [product], "by_rows", perm=[0, 2, 1, 3])
    sizes = [-1, output.shape[0], output.shape[1]] if block else [0, 0, output.shape[1]]
    joined = writer.add("Reshape", [product, writer.integers(sizes, "shape")], "joined")
    real = writer.scaled(joined, node.attributes["multiplier"] * output.scale / v.tensor.scale, "scaled")
    real = writer.shifted(real, node.attributes["bias"] - output.zero_point, output)
    return writer.value(real, node, output, q.rows)


def _of_regions(writer: Writer, logits: str, regions: np.ndarray, heads: int, block: int | None) -> str:
    """Without the keys of other regions, segment by segment."""
    size = block or len(regions)
    by_segment = regions.reshape(-1, 1, size)
    apart = by_segment[..., :, None] != by_segment[..., None, :]  # [segments, 1, rows, keys]
    mask = writer.constant(np.where(apart, np.float32(UNSEEN), np.float32(0)), "regions")
    if len(apart) == 1:
        return writer.add("Add", [logits, mask], "of_regions")
    shape = writer.integers([-1, len(apart), heads, size, size], "segments_shape")
    by_image = writer.add("Reshape", [logits, shape], "by_segments")
    masked = writer.add("Add", [by_image, mask], "of_regions")
    return writer.add(
        "Reshape", [masked, writer.integers([-1, heads, size, size], "logits_shape")], "logits_of_regions"
    )


OPS = {"attention": attention}
