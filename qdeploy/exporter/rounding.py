"""Weights that come in float32, rounded by what calibration data say of the inputs of their layers.

Of each output channel, `w` the row of its weight and q that of its codes times the step:

    step      of least squared error, |w - q|^2, or that which clips nothing: whichever has less of (w - q)^2 E[x^2]
    codes     nearest, or by Optimal Brain Compression (obc.py)
    shift     + (w - q) E[x]: no channel is off in the mean
"""

from __future__ import annotations

import numpy as np

from qdeploy import _engine
from qdeploy.errors import InputError
from qdeploy.exporter.calibrate import Observers, together
from qdeploy.exporter.layer_inputs import Columns, columns_of
from qdeploy.exporter.layers import Codes, Conv2d, Linear
from qdeploy.exporter.least_squares import least_squares_step
from qdeploy.exporter.obc import MAX_COLUMNS, quantize_rows
from qdeploy.exporter.weights import Rounded, largest_step, nearest_codes
from qdeploy.terminal import progress

ROUNDINGS = ("nearest", "obc")
DAMPING = 0.01  # of the mean of the diagonal of H: a few thousand positions say little of a thousand columns


class Rounding:
    """Of one network. `rounded`: its weights in float32; `method` of ROUNDINGS."""

    def __init__(self, rounded: list[Rounded], method: str, correct_bias: bool):
        layers = [one.layer for one in rounded if isinstance(one.layer, (Conv2d, Linear))]
        self.columns = columns_of(layers, products=method == "obc")
        self.rounded = [one for one in rounded if one.layer in self.columns]
        self.method, self.correct_bias = method, correct_bias

    def observers(self) -> Observers:
        return together(columns.observers() for columns in {id(c): c for c in self.columns.values()}.values())

    def apply(self) -> None:
        """After the data were seen: new codes, scales and shifts."""
        with progress(f"rounding ({self.method})", len(self.rounded)) as advance:
            for one in self.rounded:
                advance(f"rounding ({self.method}) {one.layer.name}", 0)
                self._round(one, self.columns[one.layer])
                advance()

    def _round(self, one: Rounded, columns: Columns) -> None:
        layer, bits, means = one.layer, one.bits, columns.means()
        rows = one.weight.reshape(len(means), -1, means.shape[1])
        step = _step(rows, columns.mean_squares(), bits)
        if self.method == "obc":
            hessian = _damped(columns.mean_products())
            codes = quantize_rows(one.weight, step, hessian, bits, natural_order=hessian.shape[1] > MAX_COLUMNS)
        else:
            codes = nearest_codes(one.weight, step, bits)
        layer.weight, layer.scale = Codes(codes, bits, "rounded"), one.scale * step
        if self.correct_bias:
            lost = rows - codes.reshape(rows.shape) * step.reshape(*rows.shape[:2], 1)
            layer.shift = layer.shift + one.scale * (lost @ means[:, :, None]).reshape(-1)


def _step(rows: np.ndarray, mean_squares: np.ndarray, bits: int) -> np.ndarray:
    """The step sizes, float64 [channels], for rows [groups, channels of a group, columns] and the mean squares of what
    the columns see, [groups, columns]."""
    half, flat = 2 ** (bits - 1), np.ascontiguousarray(rows.reshape(-1, rows.shape[2]))

    def error(step: np.ndarray) -> np.ndarray:
        found = np.empty(len(flat))
        _engine.lsq_errors(flat.reshape(-1), step, -half, half - 1, found, _engine.default_threads())
        return found

    def error_on_data(step: np.ndarray) -> np.ndarray:
        wrong = (nearest_codes(flat, step, bits) * step[:, None] - flat).reshape(rows.shape)
        return (np.square(wrong) @ mean_squares[:, :, None]).reshape(-1)

    largest = largest_step(flat, bits)
    least = least_squares_step(error, largest.astype(np.float32)).astype(np.float64)
    return np.where(error_on_data(least) < error_on_data(largest), least, largest)


def _damped(products: np.ndarray) -> np.ndarray:
    """H of each group, of full rank; of columns that saw nothing but 0, that of nearest rounding."""
    diagonal = products.diagonal(0, 1, 2)
    damping = DAMPING * diagonal.mean(1)
    return products + np.eye(products.shape[1]) * np.where(damping > 0, damping, 1)[:, None, None]


def check_rounding(method: str, has_data: bool) -> None:
    """Raise InputError unless `export` knows the method and has what it needs."""
    if method not in ROUNDINGS:
        raise InputError(f"expected rounding {' or '.join(ROUNDINGS)}, got {method!r} - at export")
    if method == "obc" and not has_data:
        raise InputError("expected calibration data for rounding obc, got none - at export")
