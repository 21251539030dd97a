"""Optimal Brain Compression (arXiv 2208.11580): weights rounded one at a time, the others making up for each error.

A layer's error is measured on its own inputs X, as |W X - Q X|^2, whose second derivative with respect to a row of W is
H = 2 X X^T. All rows of a layer (of a group of a grouped convolution) have the same H and are independent.
"""

from __future__ import annotations

import numpy as np

MAX_COLUMNS = 1200  # of layers whose order is chosen: the work on a row grows with the cube
BLOCK = 64  # weights whose effect on all the others is one product of matrices
ELEMENTS_AT_ONCE = 2**25  # of the inverses, one for each row: 0.27 GB


def quantize_rows(
    weight: np.ndarray, step: np.ndarray, hessian: np.ndarray, bits: int, natural_order: bool = False
) -> np.ndarray:
    """The integer codes of a weight, int8 of its shape.

    Args:
        weight: output channels first.
        step: a step size for each output channel.
        hessian: H of each group, [groups, columns, columns], a column for each weight of a channel; of a scale that
            does not matter. Where it is singular 1 is added to its diagonal. Weights of inputs that are always 0
            become 0.
        bits: 2 to 8; codes are -2^(bits - 1) to 2^(bits - 1) - 1.
        natural_order: columns from first to last (GPTQ, arXiv 2210.17323), for layers too wide to choose the order.
    """
    rows, scale = weight.reshape(len(weight), -1).astype(np.float64), step.astype(np.float64)
    half = 2 ** (bits - 1)
    groups = []
    count = len(rows) // len(hessian)
    for first, h in zip(range(0, len(rows), count), hessian, strict=True):
        some, scales = rows[first : first + count], scale[first : first + count, None]
        dead = h.diagonal() == 0
        full, alive = _positive(h.astype(np.float64) + np.diag(dead)), np.where(dead, 0, some)
        if natural_order:
            groups.append(_in_order(alive, full, scales, -half, half - 1))
            continue
        inverse, at_once = np.linalg.inv(full), max(1, ELEMENTS_AT_ONCE // full.size)
        parts = [slice(i, i + at_once) for i in range(0, count, at_once)]
        groups += [_greedy(alive[part], inverse, scales[part], -half, half - 1) for part in parts]
    return np.concatenate(groups).reshape(weight.shape).astype(np.int8)


def _positive(hessian: np.ndarray) -> np.ndarray:
    try:
        np.linalg.cholesky(hessian)
    except np.linalg.LinAlgError:  # inputs that depend on each other
        return hessian + np.eye(len(hessian))
    return hessian


def _codes(value: np.ndarray, step: np.ndarray, qmin: int, qmax: int) -> np.ndarray:
    return np.rint(np.clip(value / step, qmin, qmax))


def _greedy(rows: np.ndarray, inverse: np.ndarray, step: np.ndarray, qmin: int, qmax: int) -> np.ndarray:
    """Codes of `rows` [R, n]; in each row the weight goes next whose rounding costs the least, (w - q)^2 / H^-1_pp.

    A weight that the others have pushed beyond the range, more than half a step from its code, goes before: it would
    be pushed further. Without weight p the inverse is H^-1 - v v^T, v = H^-1_p / sqrt(H^-1_pp); the v of a block are
    subtracted together.
    """
    rows, codes, at = rows.copy(), np.zeros_like(rows), np.arange(len(rows))
    inverse = np.repeat(inverse[None], len(rows), 0)
    diagonal, done = inverse.diagonal(0, 1, 2).copy(), np.zeros(rows.shape, bool)
    for first in range(0, rows.shape[1], BLOCK):
        removed = np.zeros((len(rows), min(BLOCK, rows.shape[1] - first), rows.shape[1]))
        for i in range(removed.shape[1]):
            error = np.square(rows - _codes(rows, step, qmin, qmax) * step)
            cost = np.where(error > np.square(step) / 4, -error, error / diagonal)
            cost[done] = np.inf
            p = cost.argmin(1)
            code = _codes(rows[at, p], step[:, 0], qmin, qmax)
            column = inverse[at, p] - (removed[at, :i, p][:, None] @ removed[:, :i])[:, 0]
            column /= np.sqrt(column[at, p])[:, None]
            removed[:, i] = column
            rows -= ((rows[at, p] - code * step[:, 0]) / column[at, p])[:, None] * column
            diagonal -= np.square(column)
            codes[at, p], done[at, p], diagonal[at, p] = code, True, 1
        inverse -= removed.swapaxes(1, 2) @ removed
    return codes


def _in_order(rows: np.ndarray, hessian: np.ndarray, step: np.ndarray, qmin: int, qmax: int) -> np.ndarray:
    """Codes of `rows` [R, n], columns from first to last.

    H = N N^T with N upper triangular, so that the error of a row is |(w - q) N|^2, of which column k depends on the
    first k + 1 weights alone: each is rounded to what makes its own column least.
    """
    upper = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    upper = upper / upper.diagonal()
    codes, error = np.zeros_like(rows), np.zeros_like(rows)
    for first in range(0, rows.shape[1], BLOCK):
        block = slice(first, first + BLOCK)
        wanted = rows[:, block] + error[:, :first] @ upper[:first, block]
        for k in range(first, first + wanted.shape[1]):
            value = wanted[:, k - first] + error[:, first:k] @ upper[first:k, k]
            codes[:, k] = _codes(value, step[:, 0], qmin, qmax)
            error[:, k] = rows[:, k] - codes[:, k] * step[:, 0]
    return codes
