"""Filters of one image x f64 [H, W, C], of which corruptions are made.

Nothing here calls BLAS: its sums may depend on the number of threads, and an image must not.
"""

from __future__ import annotations

import math

import numpy as np


def bell(offsets: np.ndarray, sigma: float) -> np.ndarray:
    """Weights of a Gaussian at these offsets; the sum is 1. A sigma of 0 goes with the offset 0 alone."""
    weights = np.exp(-0.5 * (offsets / max(sigma, 1e-9)) ** 2)
    return weights / weights.sum()


def smooth(x: np.ndarray, sigma: float, truncate: float, borders: str) -> np.ndarray:
    """A Gaussian blur, cut at `truncate` sigma; `borders` as in `convolve`."""
    reach = int(truncate * sigma + 0.5)
    weights = bell(np.arange(-reach, reach + 1), sigma)
    return convolve(convolve(x, weights[:, None], borders), weights[None], borders)


def convolve(x: np.ndarray, kernel: np.ndarray, borders: str) -> np.ndarray:
    """x * kernel [odd, odd], with borders as np.pad names them. By FFT: the disk of ImageNet-C's defocus has 317
    pixels, the Gaussian of its elastic transform 1,025 to a side."""
    reach = [side // 2 for side in kernel.shape]
    axes = [axis for axis in (0, 1) if reach[axis]]
    if not axes:
        return x * kernel[0, 0]
    padded = np.pad(x, [*((r, r) for r in reach), (0, 0)], mode=borders)  # type: ignore[call-overload]
    sizes = [padded.shape[axis] for axis in axes]
    spectrum = np.fft.rfftn(padded, axes=axes) * np.fft.rfftn(kernel[..., None], sizes, axes)
    return np.fft.irfftn(spectrum, sizes, axes)[2 * reach[0] :, 2 * reach[1] :]


def disk(radius: float, alias: float) -> np.ndarray:
    """A kernel: the pixels within `radius`, smoothed by a Gaussian of std `alias`; the sum is 1.

    The Gaussian reaches 1 pixel, 2 for radii above 8. The published disks of radius 8 and 10 fill their grid, which
    mirrors what the Gaussian puts outside it, so that they brighten images; this grid has room for it.
    """
    reach = 1 if radius <= 8 else 2
    offsets = np.arange(-int(radius) - reach, int(radius) + reach + 1)
    inside = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(float)
    weights = bell(np.arange(-reach, reach + 1), alias)
    return convolve(inside[..., None] / inside.sum(), np.outer(weights, weights), "constant")[..., 0]


def streaks(x: np.ndarray, radius: float, sigma: float, degrees: float) -> np.ndarray:
    """Every point draws a tail of 2 radius + 1 pixels at this angle, whose weights are half a Gaussian; borders repeat.

    ImageMagick, which blurred the published images, counts `radius` and `sigma` like this; a Gaussian to both sides
    would blur 1.7 times as far. Its rounding to whole pixels is here, too; the bits are others.
    """
    steps = np.arange(2 * max(1, round(radius)) + 1)
    angle, reach = math.radians(degrees), len(steps)
    tops, lefts = (np.rint(steps * part).astype(int) + reach for part in (math.sin(angle), math.cos(angle)))
    padded = np.pad(x, [(reach, reach), (reach, reach), (0, 0)], mode="edge")
    height, width, _ = x.shape
    blurred = np.zeros_like(x)
    for weight, top, left in zip(bell(steps, sigma), tops, lefts, strict=True):
        blurred += weight * padded[top : top + height, left : left + width]
    return blurred


def enlarge(x: np.ndarray, factor: float) -> np.ndarray:
    """The center of x, enlarged to the size of x: linear, corner pixels of the crop onto those of its enlargement."""
    for axis in (0, 1):
        side = x.shape[axis]
        crop = math.ceil(side / factor)
        large = round(crop * factor)  # side or a few pixels more, which are cut off
        place = (side - crop) // 2 + ((large - side) // 2 + np.arange(side)) * ((crop - 1) / (large - 1))
        low = np.minimum(place.astype(int), side - 2)
        part = (place - low).reshape((-1, 1, 1) if axis == 0 else (-1, 1))
        x = x.take(low, axis) * (1 - part) + x.take(low + 1, axis) * part
    return x


def sample(x: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """x at these places f64 [h, w], bilinear; outside, x goes on mirrored, with border pixels twice."""
    height, width, channels = x.shape
    top, left = np.floor(row).astype(int), np.floor(column).astype(int)
    down, right = (row - top)[..., None], (column - left)[..., None]
    pixels = x.reshape(-1, channels)

    def at(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return pixels.take(_mirrored(i, height) * width + _mirrored(j, width), axis=0)

    upper = at(top, left) * (1 - right) + at(top, left + 1) * right
    lower = at(top + 1, left) * (1 - right) + at(top + 1, left + 1) * right
    return upper * (1 - down) + lower * down


def _mirrored(index: np.ndarray, side: int) -> np.ndarray:
    index = index % (2 * side)
    return np.minimum(index, 2 * side - 1 - index)


def plasma(side: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """A random landscape in [0, 1] on a torus [side, side], a power of two: diamond-square.

    Amplitudes fall by decay^2 at each halving of the step: the published program divides a number by `decay` and
    multiplies two of it.
    """
    heights = np.zeros((side, side))
    step, amplitude = side, 1.0
    while step >= 2:
        half = step // 2
        corners, centers = heights[::step, ::step], heights[half::step, half::step]  # views
        across, along = (corners + np.roll(corners, -1, axis) for axis in (1, 0))
        centers[:] = _rough(across + np.roll(across, -1, 0), amplitude, rng)
        heights[::step, half::step] = _rough(across + centers + np.roll(centers, 1, 0), amplitude, rng)
        heights[half::step, ::step] = _rough(along + centers + np.roll(centers, 1, 1), amplitude, rng)
        step, amplitude = half, amplitude / decay**2
    heights -= heights.min()
    return heights / heights.max()


def _rough(sum_of_four: np.ndarray, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    return sum_of_four / 4 + rng.uniform(-amplitude, amplitude, sum_of_four.shape)
