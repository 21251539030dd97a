"""Blocks of transformers with random constants, as files hold them: what the kernels of tokens are checked with."""

from __future__ import annotations

import sys

import numpy as np
from checkout import ROOT

# isort: split
from qdeploy.graph import Graph

sys.path.append(str(ROOT / "tests"))
from builder import Builder


def vision(size: int, width: int, heads: int, classes: int) -> Graph:
    """Patches of 16 of an image of this size, a class token, a block; an image again, and a block of windows of it."""
    side = size // 16
    net = Builder(np.random.default_rng(0), (3, size, size), (0.02, 110))
    x = net.conv2d(0, width, (16, 16), (16, 16), dtype="s16")
    x = _block(net, net.position(net.tokens(x), prefix=1), heads)
    x = net.gather(x, "rows", np.random.default_rng(0).permutation(side * side) + 1)
    x = net.norm(net.image(_block(net, x, heads, block=side, logit_bias=True, regions=3), side), groups=heads)
    x = net.resize(x, (side // 2, side // 2), (4, 4))
    x = net.mul(x, net.avg_pool2d(x, (side // 2, side // 2), (1, 1), (0, 0, 0, 0)))
    x = net.gather(net.tokens(x), "channels", np.arange(width)[::-1])
    net.linear(net.mean(x), classes, dtype="f32")
    return Graph([net.member()])


def text(longest: int, width: int, heads: int, vocabulary: int) -> Graph:
    """A block, and the mean of the tokens, of texts of any length."""
    net = Builder(np.random.default_rng(1), (longest,), None)
    x = _block(net, net.embedding(vocabulary, width), heads)
    net.linear(net.mean(net.rescale(x)), 2, dtype="f32")
    return Graph([net.member()], vocabulary=vocabulary, variable=True)


def _block(net: Builder, x: int, heads: int, **attention: object) -> int:
    width = net.shape(x)[1]
    y = net.norm(x)
    y = net.attention(*(net.linear(y, width) for _ in range(3)), heads, **attention)
    x = net.linear(y, width, residual=x, dtype="s16")
    y = net.linear(net.table(net.linear(net.norm(x), 4 * width)), width, dtype="s16")
    return net.add(x, y, "s16")
