"""Grids of activations from calibration data: one pass, a streaming histogram per tensor, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qdeploy.calibration import Preprocess, batches, count_batches
from qdeploy.errors import ExportError, InputError
from qdeploy.exporter.grid import Grid, grid_of_range, stream_grid
from qdeploy.exporter.layers import Add, Layer, Network, Norm, Position, Quantize, Weighted
from qdeploy.ops import OPS
from qdeploy.terminal import progress

Observer = Callable[[np.ndarray], None]  # of what a layer computes for a batch, f32 [N, *shape]
Observers = Mapping[Layer, Observer]
OBSERVERS = ("minmax", "percentile", "mse")
PERCENTILE = 99.99  # of the elements on each side of zero stay inside the range


@dataclass
class Histogram:
    """Counts of a stream of numbers of unknown range, with exact minimum and maximum.

    Bin k counts [k*width, (k+1)*width) for -BINS <= k < BINS. When a number does not fit, the width doubles and bins
    2k and 2k+1 become bin k: zero stays a bin edge, no count is ever split, so the result does not depend on the
    order of the data.
    """

    BINS = 2048
    exact: bool = False  # only minimum and maximum are wanted
    low: float = 0.0
    high: float = 0.0
    width: float = 0.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(2 * Histogram.BINS, np.int64))

    def add(self, values: np.ndarray) -> None:
        low, high = float(values.min()), float(values.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        extent = max(-low, high)
        if self.exact or extent == 0:
            return
        if self.width == 0:
            self.width = float(2.0 ** np.ceil(np.log2(extent / self.BINS)))
        while extent >= self.BINS * self.width:
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), self.BINS // 2)
            self.width *= 2
        bins = np.floor(values.ravel() * np.float64(1 / self.width)).astype(np.int64) + self.BINS
        self.counts += np.bincount(bins, minlength=2 * self.BINS)

    def range(self, observer: str) -> tuple[float, float]:
        """The range [low, high] that `observer` keeps; what lies outside saturates."""
        if observer == "minmax" or self.width == 0:
            return self.low, self.high
        return self._percentile() if observer == "percentile" else self._least_square_error()

    def _percentile(self) -> tuple[float, float]:
        allowed = self.counts.sum() * (1 - PERCENTILE / 100)
        first, last = (int(np.argmax(np.cumsum(counts) > allowed)) for counts in (self.counts, self.counts[::-1]))
        low, high = (first - self.BINS) * self.width, (self.BINS - last) * self.width
        return max(self.low, min(low, 0.0)), min(self.high, max(high, 0.0))

    def _least_square_error(self) -> tuple[float, float]:
        """Shrinks both ends together by 1..100 % and keeps the range whose grid has the least squared error."""
        used = np.flatnonzero(self.counts)
        centres, counts = (used - self.BINS + 0.5) * self.width, self.counts[used]

        def error(shrink: float) -> float:
            grid = grid_of_range(self.low * shrink, self.high * shrink)
            return float(np.sum(counts * (grid.real(grid.codes(centres)) - centres) ** 2))

        best = min(np.arange(100, 0, -1) / 100, key=error)
        return self.low * best, self.high * best


class Grids:
    """The grids of one network: which tensors share one, what calibration must observe, and what follows.

    Tensors whose codes are the same (before and after a max pool, the parts of a concatenation) form a bundle with one
    grid. It is that of the quantizer where all that writes or all that reads the bundle is one. Other bundles are
    observed.
    """

    def __init__(self, network: Network, observer: str):
        self.network, self.observer = network, observer
        self.bundle_of: dict[Layer, list[Layer]] = {x: [x] for x in network.layers if x not in network.outputs}
        if network.ids:
            del self.bundle_of[network.layers[0]]
        for layer in self.bundle_of:
            for source in layer.inputs if layer.same_grid else ():
                if self.bundle_of[source] is not self.bundle_of[layer]:
                    merged = self.bundle_of[source] + self.bundle_of[layer]
                    self.bundle_of |= dict.fromkeys(merged, merged)
        self.streams = _streams(network, self.bundle_of)
        self.fixed: dict[Layer, Grid] = {}
        self.origins: dict[Layer, str] = {}  # of the grids of those: "learned" or "file"
        self.observed: list[tuple[list[Layer], Histogram]] = []
        for bundle in {id(bundle): bundle for bundle in self.bundle_of.values()}.values():
            only = self._only_quantizer(bundle)
            if only is None:
                exact = observer == "minmax" or bundle[0] in self.streams
                self.observed.append((bundle, Histogram(exact=exact)))
            else:
                self.fixed |= dict.fromkeys(bundle, only[0])
                self.origins |= dict.fromkeys(bundle, only[1])

    def _readers(self, bundle: list[Layer]) -> list[Layer]:
        return [x for x in self.network.layers if x not in bundle and any(source in bundle for source in x.inputs)]

    def _of_input(self, grid: Grid, bundle: list[Layer]) -> Grid:
        """Nothing clamps the codes of the network's input."""
        return replace(grid, low=0, high=255) if self.network.layers[0] in bundle else grid

    def _learned(self, bundle: list[Layer]) -> list[Grid]:
        return self._grids(bundle, [*_sources(bundle), *self._readers(bundle)])

    def _grids(self, bundle: list[Layer], layers: list[Layer]) -> list[Grid]:
        grids = [self._of_input(layer.grid, bundle) for layer in layers if isinstance(layer, Quantize)]
        return list(dict.fromkeys(grids))

    def _only_quantizer(self, bundle: list[Layer]) -> tuple[Grid, str] | None:
        """Grid and origin of the one which writes the bundle, whatever reads it; else of the one through which all read
        it: a writer that rounds to another grid is a table then. Clamps of several are no obstacle."""
        for side in (_sources(bundle), self._readers(bundle)):
            quantizers = [layer for layer in side if isinstance(layer, Quantize)]
            grids = self._grids(bundle, side)
            if grids and len(quantizers) == len(side) and all(grid.same_steps(grids[0]) for grid in grids):
                low, high = min(grid.low for grid in grids), max(grid.high for grid in grids)
                return replace(grids[0], low=low, high=high), quantizers[0].origin
        return None

    def missing(self) -> list[str]:
        """The tensors that need calibration data, each by the names of both its ends."""
        ends = [(_sources(bundle), self._readers(bundle) or self.network.outputs) for bundle, _ in self.observed]
        return [f"{layer.name} to {readers[0].name}" for sources, readers in ends for layer in sources]

    def observers(self) -> Observers:
        """What adds the outputs of layers to the histograms."""
        sources = [(layer, histogram) for bundle, histogram in self.observed for layer in _sources(bundle)]
        return {layer: _adder(layer, histogram) for layer, histogram in sources}

    def chosen(self) -> dict[Layer, Grid]:
        """The grid of what each layer writes but for the outputs, which are float."""
        result = dict(self.fixed)
        for bundle, histogram in self.observed:
            if bundle[0] in self.streams:
                result |= dict.fromkeys(bundle, stream_grid(histogram.low, histogram.high))
                continue
            observed = histogram.range(self.observer)
            finer = [grid for learned in self._learned(bundle) if (grid := _finer_grid(learned, *observed))]
            result |= dict.fromkeys(bundle, min(finer, key=lambda grid: grid.scale, default=grid_of_range(*observed)))
        return result


def _streams(network: Network, bundle_of: dict[Layer, list[Layer]]) -> set[Layer]:
    """The layers whose output is s16: all that reads it can, and a norm or a position does, or reads what it leads to.

    8 bits of a residual stream that grows from block to block cost 30 dB.
    """
    leads = leading_to_norms(network)
    found: set[Layer] = set()
    for bundle in {id(bundle): bundle for bundle in bundle_of.values()}.values():
        fits = all(_may_write(x) and all(_may_read(reader, x) for reader in network.users(x)) for x in bundle)
        if fits and any(layer in leads for layer in bundle):
            found.update(bundle)
    return found


def leading_to_norms(network: Network) -> set[Layer]:
    """The layers that a norm or a position reads, or reads what they lead to along a stream."""
    leads: set[Layer] = set()
    for layer in reversed(network.layers):
        readers = network.users(layer)
        if any(isinstance(x, (Norm, Position)) or x in leads and _passes(x, layer) for x in readers):
            leads.add(layer)
    return leads


def _passes(reader: Layer, source: Layer) -> bool:
    return reader.same_grid or isinstance(reader, Add) or isinstance(reader, Weighted) and source in reader.inputs[1:]


def _may_write(layer: Layer) -> bool:
    return layer.op in OPS and "s16" in OPS[layer.op].writes and (layer.same_grid or not layer.clamped)


def _may_read(reader: Layer, source: Layer) -> bool:
    places = [i for i, x in enumerate(reader.inputs) if x is source]
    return reader.op in OPS and all("s16" in OPS[reader.op].may_read(i) for i in places)


def _sources(bundle: list[Layer]) -> list[Layer]:
    """The layers that make the bundle's values; the others only pass them on."""
    return [layer for layer in bundle if not layer.same_grid]


def _adder(layer: Layer, histogram: Histogram) -> Observer:
    def add(values: np.ndarray) -> None:
        check_finite(layer, values)
        histogram.add(values)

    return add


def check_finite(layer: Layer, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        got = "NaN or infinity on calibration data"
        raise ExportError(f"expected finite activations, got {got} - at module `{layer.name}`")


def together(parts: Iterable[Observers]) -> Observers:
    """All that observe a layer, in order, as one."""
    of_layer: dict[Layer, list[Observer]] = {}
    for observers in parts:
        for layer, observer in observers.items():
            of_layer.setdefault(layer, []).append(observer)

    def joint(those: list[Observer]) -> Observer:
        def observe(values: np.ndarray) -> None:
            for observer in those:
                observer(values)

        return observe

    return {layer: joint(those) for layer, those in of_layer.items()}


def _finer_grid(learned: Grid, low: float, high: float) -> Grid | None:
    """A grid over [low, high] for a tensor that some layers read through the learned quantizer and others as it is.

    Its scale is an odd fraction of the learned one. Then every boundary between two learned codes is also a boundary
    between two of its codes, and rounding to it first and to the learned grid afterwards (a table) is rounding once.
    None where the learned grid is finer than 8 bits over [low, high] can be.
    """
    calibrated = grid_of_range(low, high)
    fraction = int(learned.scale / calibrated.scale)
    fraction -= 1 - fraction % 2
    if fraction < 1:
        return None
    if fraction == 1 and (learned.low, learned.high) == (0, 255) and learned.covers(low, high):
        return learned
    return replace(calibrated, scale=float(np.float32(learned.scale / fraction)))


# ---- Calibration data ---------------------------------------------------------------------------------------------


def check_complete(grids: list[Grids]) -> None:
    """Raises InputError unless all grids are known without data."""
    missing = [ends for one in grids for ends in one.missing()]
    if missing:
        names = ", ".join(missing[:3]) + ("..." if len(missing) > 3 else "")
        expected = f"calibration data for {len(missing)} tensors without a quantizer (from {names})"
        raise InputError(f"expected {expected}, got none - at export")


def observe(
    grids: list[Grids],
    calibration: object,
    example: np.ndarray,
    preprocess: Preprocess | None,
    count: int,
    others: Sequence[Observers] = (),
) -> np.ndarray:
    """Shows all calibration data to all networks, once; returns the first `count` images, f32, for the report.

    others: what else observes the layers of each network. Without data the images are of the example, f32 [N, ...].
    Raises InputError for data that do not fit it or are missing.
    """
    if calibration is None:
        check_complete(grids)
        return example[:count]
    kept: list[np.ndarray] = []
    observers = [
        together(parts) for parts in zip((one.observers() for one in grids), others or [{}] * len(grids), strict=True)
    ]
    ends = []  # lowest and highest number of each channel, by batch
    with progress("calibrating", count_batches(calibration)) as advance:
        for batch in batches(calibration, example.shape[1:], preprocess, ids=example.dtype.kind == "i"):
            for one, those in zip(grids, observers, strict=True):
                one.network.run(batch, those)
            kept += [batch] if sum(map(len, kept)) < count else []
            ends.append((batch.min((0, *range(2, batch.ndim))), batch.max((0, *range(2, batch.ndim)))))
            advance()
    if preprocess is not None:
        low, high = np.array(ends).min(0)[0], np.array(ends).max(0)[1]
        _compare_with_pixels(low, high, preprocess)
    return np.concatenate(kept)[:count]


def _compare_with_pixels(low: np.ndarray, high: np.ndarray, preprocess: Preprocess) -> None:
    """Raises InputError where the images, [low, high] by channel, are not what `preprocess` makes of pixels.

    Mean and std of pixels in 0..255 in place of 0..1 would give every raw image one color. Filters that resize go
    beyond black and white, by less than a tenth; images that use less than 2 of 256 levels are not these images.
    """
    mean, std = (np.asarray(preprocess[key], np.float64) for key in ("mean", "std"))
    black, white = -mean / std, (1 - mean) / std
    within = (low >= black - 0.1 / std) & (high <= white + 0.1 / std) & ((high - low).max() * std > 2 / 256)
    if not within.all():
        c = int(np.argmin(within))
        expected = (
            f"calibration images as mean and std make them of pixels, {black[c]:.4g} to {white[c]:.4g} in channel {c}"
        )
        advice = "mean and std are those of images in 0..1: divide those of pixels in 0..255 by 255"
        raise InputError(f"expected {expected}, got {low[c]:.4g} to {high[c]:.4g} ({advice}) - at preprocess")
