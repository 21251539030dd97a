"""The 15 common corruptions of images at 5 severities: Hendrycks and Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", ICLR 2019. Strengths are those of CIFAR-10-C and ImageNet-C.

A corrupted image is a function of (kind, severity, image number): the same in any batch, order and process. The draws
are not those of the published files, and levels are rounded, where the published ones are cut off: half a level darker
on average. What else differs, the docstring of the kind says. x is f64 [H, W, 1 or 3] in [0, 1].
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qdeploy.arguments import integer
from qdeploy.checks import shape_text
from qdeploy.errors import InputError
from qdeploy.files import atomic_file
from qdeploy.terminal import progress
from qdeploy.training.filters import convolve, disk, enlarge, plasma, sample, smooth, streaks
from qdeploy.training.parallel import cpus, parallel_map

SEVERITIES = 5
LEAST_SIDE = 8  # pixels; below, the strengths of 32 px are fractions of a pixel
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, the gray of JPEG
PHOTOGRAPHS = (".jpg", ".jpeg", ".png")
CHUNK = 100  # images that a worker takes at once: 0.1 s of work at 32 px

Random = np.random.Generator


def available(frost: Path | None = None) -> tuple[str, ...]:
    """The kinds that can be made, in the published order: all 15 with a folder of frost photographs, else 14."""
    return tuple(kind for kind in KINDS if kind != "frost" or frost is not None)


def corrupt(image: np.ndarray, kind: str, severity: int, number: int, *, frost: Path | None = None) -> np.ndarray:
    """The image u8 [H, W], [H, W, 1] or [H, W, 3], corrupted: a new array of the same shape.

    Strengths are those of CIFAR-10-C up to a shorter side of 84 pixels, and of ImageNet-C above: the nearer by ratio of
    32 and 224. Those that are lengths in pixels are scaled from there to the shorter side.

    Args:
        kind: one of KINDS.
        severity: 1 to 5.
        number: which image it is, 0 or more; with kind and severity it seeds the draws.
        frost: the folder of photographs that the kind `frost` needs.

    Raises InputError for another image, an unknown kind, a number out of range, or photographs that are not there.
    """
    _check_pixels(image, "image", first=0)
    if kind not in KINDS:
        raise InputError(f"expected one of {', '.join(KINDS)}, got {kind!r} - at kind")
    severity, number = integer(severity, 1, SEVERITIES, "severity"), integer(number, 0, 2**63 - 1, "number")
    strength = _KINDS[kind].strength(severity, min(image.shape[:2]))
    if kind == "frost":
        strength = (*strength, _photographs(frost))
    rng = Random(np.random.PCG64([KINDS.index(kind), severity, number]))
    x = image.reshape(*image.shape[:2], -1) / 255
    return _levels(_KINDS[kind].apply(x, rng, *strength)).reshape(image.shape)


def write_cifar_c(
    images: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    folder: Path,
    *,
    kinds: Sequence[str] | None = None,
    frost: Path | None = None,
    workers: int | None = None,
) -> None:
    """Writes `folder` as CIFAR-10-C is. KIND.npy, u8 [5 N, ...], holds all images at severity 1, then at 2, up to 5;
    labels.npy, u8 [5 N], comes last. Each file is there as a whole or not at all. Image i of `images` has number i.

    Args:
        images: u8 [N, H, W], [N, H, W, 1] or [N, H, W, 3]; may be a memory map.
        labels: N classes of 0 to 255.
        kinds: the default is what is `available`.
        workers: processes, one for each CPU by default. The bits do not depend on it.

    Raises InputError as `corrupt` does, and OSError for what cannot be written.
    """
    _check_pixels(images, "images", first=1)
    classes = _classes(labels, len(images))
    kinds = available(frost) if kinds is None else kinds
    for kind in kinds:
        corrupt(images[0], kind, 1, 0, frost=frost)  # so that errors come before the first file
    processes = cpus() if workers is None else integer(workers, 1, 1024, "workers")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    starts = [(severity, start) for severity in range(1, SEVERITIES + 1) for start in range(0, len(images), CHUNK)]
    shape = (SEVERITIES * len(images), *images.shape[1:])
    with progress("corrupting", len(kinds) * len(starts)) as advance, parallel_map(processes) as run:
        for kind in kinds:
            jobs = [(images[start : start + CHUNK], kind, severity, start, frost) for severity, start in starts]
            with atomic_file(folder / f"{kind}.npy") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for corrupted in run(_corrupt_chunk, jobs):
                    file.write(corrupted)
                    advance(kind)
    with atomic_file(folder / "labels.npy") as file:
        np.save(file, np.tile(classes, SEVERITIES))


def _corrupt_chunk(job: tuple[np.ndarray, str, int, int, Path | None]) -> bytes:
    images, kind, severity, start, frost = job
    return b"".join(corrupt(x, kind, severity, start + i, frost=frost).tobytes() for i, x in enumerate(images))


def _check_pixels(array: object, at: str, first: int) -> None:
    """Raise InputError unless the array is u8 and its sizes from the `first` on are those of an image."""
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        raise InputError(f"expected uint8 pixels, got {getattr(array, 'dtype', type(array).__name__)} - at {at}")
    shape = array.shape[first:]
    if len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,)) or min(shape[:2]) < LEAST_SIDE:
        sizes = ", ".join(["N"] * first + [f"{LEAST_SIDE} or more"] * 2)
        raise InputError(f"expected [{sizes}], then no, 1 or 3 channels, got {shape_text(array.shape)} - at {at}")


def _classes(labels: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """Labels as u8 [count]; raises InputError for others."""
    classes = np.asarray(labels)
    if classes.shape != (count,) or count == 0:
        expected = f"a label for each of {count} images" if count else "one image or more"
        raise InputError(f"expected {expected}, got {shape_text(classes.shape)} - at labels")
    if classes.dtype.kind not in "iu" or classes.min() < 0 or classes.max() > 255:
        found = f"{classes.min()} to {classes.max()}" if classes.dtype.kind in "iu" else classes.dtype
        raise InputError(f"expected classes of 0 to 255, got {found} - at labels")
    return classes.astype(np.uint8)


# ---- The kinds, in the published order ------------------------------------------------------------------------------


def _gaussian_noise(x: np.ndarray, rng: Random, std: float) -> np.ndarray:
    """A sensor in low light: normal noise by channel."""
    return x + std * rng.standard_normal(x.shape)


def _shot_noise(x: np.ndarray, rng: Random, photons: float) -> np.ndarray:
    """Light comes in quanta: a Poisson number of them, `photons` on average where x is 1."""
    return rng.poisson(photons * x) / photons


def _impulse_noise(x: np.ndarray, rng: Random, share: float) -> np.ndarray:
    """Salt and pepper by channel: this share of the values, on average, is 0 or 1 with equal chances."""
    draw = rng.random(x.shape)
    return np.where(draw < share / 2, 0, np.where(draw < share, 1, x))


def _defocus_blur(x: np.ndarray, rng: Random, radius: float, alias: float) -> np.ndarray:
    """A lens out of focus: every point becomes a disk. Outside x goes on mirrored, with border pixels once."""
    return convolve(x, disk(radius, alias), "reflect")


def _glass_blur(x: np.ndarray, rng: Random, sigma: float, delta: float, rounds: int) -> np.ndarray:
    """Frosted glass: a blur, each inner pixel swapped with one near it, a blur. Borders repeat.

    The published program means to swap, too, but overwrites the one pixel with the other.
    """
    blurred = _levels(smooth(x, sigma, 4, "edge")) / 255
    height, width, channels = x.shape
    order = _shuffled(height, width, max(1, round(delta)), rounds, rng)
    return smooth(blurred.reshape(-1, channels)[order].reshape(x.shape), sigma, 4, "edge")


def _shuffled(height: int, width: int, delta: int, rounds: int, rng: Random) -> list[int]:
    """The numbers of the pixels after `rounds` passes over the inner ones, rows and columns from size - delta down to
    delta, each swapped with that at an offset of [-delta, delta) in both. A swap needs those before it: a loop."""
    order = list(range(height * width))
    rows, columns = np.arange(height - delta, delta - 1, -1), np.arange(width - delta, delta - 1, -1)
    inner = rows[:, None] * width + columns
    for _ in range(rounds):
        down, right = rng.integers(-delta, delta, (2, *inner.shape))
        for a, b in zip(inner.ravel().tolist(), (inner + down * width + right).ravel().tolist(), strict=True):
            order[a], order[b] = order[b], order[a]
    return order


def _motion_blur(x: np.ndarray, rng: Random, radius: float, sigma: float) -> np.ndarray:
    """A camera that moves, within 45 degrees of the horizontal."""
    return streaks(x, radius, sigma, rng.uniform(-45, 45))


def _zoom_blur(x: np.ndarray, rng: Random, end: float, step: float) -> np.ndarray:
    """A camera that moves forward: the mean of the image and of its enlargements by 1, 1 + step, ... below `end`."""
    count = math.ceil((end - 1) / step - 1e-9)
    return sum((enlarge(x, 1 + step * i) for i in range(count)), x) / (count + 1)


def _snow(
    x: np.ndarray,
    rng: Random,
    mean: float,
    std: float,
    zoom: float,
    threshold: float,
    radius: float,
    sigma: float,
    mix: float,
) -> np.ndarray:
    """Enlarged noise above `threshold` falls in streaks, once as it is and once turned by 180 degrees; the scene is
    whitened to 1.5 gray + 0.5, by a share of 1 - `mix`."""
    noise = enlarge(rng.normal(mean, std, (*x.shape[:2], 1)), max(zoom, 1))
    flakes = streaks(np.where(noise < threshold, 0, np.minimum(noise, 1)), radius, sigma, rng.uniform(-135, -45))
    white = np.maximum(x, 1.5 * _gray(x) + 0.5)
    return mix * x + (1 - mix) * white + flakes + np.rot90(flakes, 2)


def _frost(x: np.ndarray, rng: Random, keep: float, add: float, scale: float, photographs: list[Path]) -> np.ndarray:
    """Ice on the lens: keep * x + add * a random crop of one of the photographs, which are reduced by `scale`."""
    height, width, channels = x.shape
    ice = _photograph(photographs[rng.integers(len(photographs))], scale, height, width)
    top, left = rng.integers(ice.shape[0] - height + 1), rng.integers(ice.shape[1] - width + 1)
    crop = ice[top : top + height, left : left + width] / 255
    return keep * x + add * (crop if channels == 3 else _gray(crop))


def _fog(x: np.ndarray, rng: Random, strength: float, decay: float) -> np.ndarray:
    """A random landscape is added, and the sum scaled so that no pixel can be brighter than the brightest was."""
    height, width, _ = x.shape
    haze = plasma(1 << (max(height, width) - 1).bit_length(), decay, rng)[:height, :width, None]
    top = x.max()
    return (x + strength * haze) * top / (top + strength)


def _brightness(x: np.ndarray, rng: Random, lift: float) -> np.ndarray:
    """The value of HSV, the largest channel, grows by `lift` up to 1; hue and saturation stay, black turns gray."""
    value = x.max(axis=2, keepdims=True)
    lifted = np.minimum(value + lift, 1)
    return np.where(value > 0, x * (lifted / np.where(value > 0, value, 1)), lifted)


def _contrast(x: np.ndarray, rng: Random, factor: float) -> np.ndarray:
    """Differences from the mean of each channel shrink by `factor`."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return mean + factor * (x - mean)


def _elastic_transform(x: np.ndarray, rng: Random, alpha: float, sigma: float, affine: float) -> np.ndarray:
    """An affine map that moves each of three points by up to `affine` pixels in x and in y; then every pixel moves by
    a random field, `alpha` times uniform noise of [-1, 1] under a Gaussian of std `sigma`."""
    height, width, _ = x.shape
    row, column = np.mgrid[:height, :width].astype(float)
    arm = 2 * (min(height, width) // 3)
    corner = np.array([width + arm, height - arm]) // 2  # x, y of one; the others lie `arm` below and left of it
    points = corner + arm * np.array([[0, 0], [0, 1], [-1, 0]])
    moved, below, left = points + rng.uniform(-affine, affine, points.shape)
    (a, b), (c, d) = np.column_stack([moved - left, below - moved]) / arm  # what it does to x and y from there
    right, down, area = column - moved[0], row - moved[1], a * d - b * c
    warped = sample(x, corner[1] + (a * down - c * right) / area, corner[0] + (d * right - b * down) / area)
    dy, dx = (alpha * smooth(rng.uniform(-1, 1, (height, width, 1)), sigma, 3, "symmetric")[..., 0] for _ in range(2))
    return sample(warped, row + dy, column + dx)


def _pixelate(x: np.ndarray, rng: Random, scale: float) -> np.ndarray:
    """Made smaller by `scale` and large again, both by Pillow's box filter."""
    picture = _picture(x)
    small = picture.resize((int(picture.width * scale), int(picture.height * scale)), Image.Resampling.BOX)
    return np.asarray(small.resize(picture.size, Image.Resampling.BOX)).reshape(x.shape) / 255


def _jpeg_compression(x: np.ndarray, rng: Random, quality: int) -> np.ndarray:
    """Through a JPEG of this quality. Other versions of Pillow's codec may give other levels."""
    file = io.BytesIO()
    _picture(x).save(file, "JPEG", quality=quality)
    with Image.open(file) as picture:
        return np.asarray(picture).reshape(x.shape) / 255


def _levels(x: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def _picture(x: np.ndarray) -> Image.Image:
    return Image.fromarray(_levels(x if x.shape[2] == 3 else x[..., 0]))


def _gray(x: np.ndarray) -> np.ndarray:
    return x if x.shape[2] == 1 else (x * LUMA).sum(axis=2, keepdims=True)


def _photographs(folder: Path | None) -> list[Path]:
    """The images of the folder, by name; raises InputError where there are none."""
    if folder is None:
        raise InputError("expected a folder of frost photographs, got none - at frost")
    found = sorted(p for p in Path(folder).glob("[!.]*") if p.suffix.lower() in PHOTOGRAPHS)
    if not found:
        raise InputError(f"expected photographs of frost ({', '.join(PHOTOGRAPHS)}), got none - at {folder}")
    return found


@lru_cache(maxsize=16)
def _photograph(path: Path, scale: float, height: int, width: int) -> np.ndarray:
    """The photograph u8 [h, w, 3], reduced by `scale`, but not below this height and width. It takes one pixel of each
    1 / scale, which is what the published program's linear filter comes to."""
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except Exception as error:  # the decoders of Pillow have many
        raise InputError(f"expected a JPEG or PNG image, got {error} - at {path}") from error
    scale = max(scale, height / picture.height, width / picture.width)
    size = round(picture.width * scale), round(picture.height * scale)
    return np.asarray(picture.resize(size, Image.Resampling.NEAREST))


@dataclass(frozen=True)
class _Kind:
    apply: Callable[..., np.ndarray]
    small: list[tuple[Any, ...]]  # the strengths of severity 1 to 5 at 32 px, CIFAR-10-C
    large: list[tuple[Any, ...]]  # at 224 px, ImageNet-C
    lengths: tuple[int, ...] = ()  # which numbers of a strength are pixels

    def strength(self, severity: int, side: int) -> tuple[Any, ...]:
        column, native = (self.small, 32) if side**2 < 32 * 224 else (self.large, 224)
        return tuple(v * (side / native) if i in self.lengths else v for i, v in enumerate(column[severity - 1]))


def _each(*numbers: float) -> list[tuple[float, ...]]:
    return [(number,) for number in numbers]


def _times(factor: int, *strengths: tuple[float, ...]) -> list[tuple[float, ...]]:
    return [tuple(factor * v for v in strength) for strength in strengths]


# fmt: off
_KINDS = {
    "gaussian_noise": _Kind(_gaussian_noise, _each(.04, .06, .08, .09, .10), _each(.08, .12, .18, .26, .38)),
    "shot_noise": _Kind(_shot_noise, _each(500, 250, 100, 75, 50), _each(60, 25, 12, 5, 3)),
    "impulse_noise": _Kind(_impulse_noise, _each(.01, .02, .03, .05, .07), _each(.03, .06, .09, .17, .27)),
    "defocus_blur": _Kind(
        _defocus_blur, [(.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)],
        [(3, .1), (4, .5), (6, .5), (8, .5), (10, .5)], lengths=(0, 1)),
    "glass_blur": _Kind(
        _glass_blur, [(.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2)],
        [(.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)], lengths=(0, 1)),
    "motion_blur": _Kind(
        _motion_blur, [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
        [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)], lengths=(0, 1)),
    "zoom_blur": _Kind(
        _zoom_blur, [(1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01)],
        [(1.11, .01), (1.16, .01), (1.21, .02), (1.26, .02), (1.31, .03)]),
    "snow": _Kind(
        _snow, [(.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
                (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8)],
        [(.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
         (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55)], lengths=(2, 4, 5)),
    "frost": _Kind(
        _frost, [(1, .2, .2), (1, .3, .2), (.9, .4, .2), (.85, .4, .2), (.75, .45, .2)],
        [(1, .4, 1), (.8, .6, 1), (.7, .7, 1), (.65, .7, 1), (.6, .75, 1)], lengths=(2,)),
    "fog": _Kind(
        _fog, [(.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)],
        [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)]),
    "brightness": _Kind(_brightness, _each(.05, .1, .15, .2, .3), _each(.1, .2, .3, .4, .5)),
    "contrast": _Kind(_contrast, _each(.75, .5, .4, .3, .15), _each(.4, .3, .2, .1, .05)),
    "elastic_transform": _Kind(
        _elastic_transform, _times(32, (0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05), (.1, .03, .03)),
        _times(244, (2, .7, .1), (2, .08, .2), (.05, .01, .02), (.07, .01, .02), (.12, .01, .02)),  # 244, not 224
        lengths=(0, 1, 2)),
    "pixelate": _Kind(_pixelate, _each(.95, .9, .85, .75, .65), _each(.6, .5, .4, .3, .25)),
    "jpeg_compression": _Kind(_jpeg_compression, _each(80, 65, 58, 50, 40), _each(25, 18, 15, 10, 7)),
}
# fmt: on
KINDS = tuple(_KINDS)
