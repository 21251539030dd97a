"""Calibration data as people hold them: one rule for `export` and `quantize_`.

    array or tensor [N, ...]        cut into batches of 32
    dataset                         an indexable of single images that is no list: stacked by 32
    any other iterable              its batches: a list, a loader, a generator, with or without a length

A batch is an array or a tensor, on any device; a tuple or list that begins with one, as (images, labels); or a dict
that has one under a name of NAMES, or one float array of two or more dimensions. Floats of any width become float32,
integers are refused: whether 255 means 1.0 only their owner knows. Of networks that read texts batches are token ids
[N, T], integers, in a dict under `input_ids`. Needs numpy alone; tensors are known by `detach`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qdeploy.errors import InputError

NAMES = ("pixel_values", "image", "images", "input", "x", "input_ids")  # in a dict, the first that is there
BATCH_SIZE = 32  # where single images or an array are put into batches here
MOST_BATCHES = 512  # of data that do not say how many they are: they may be endless

Shape = tuple[int, ...]
Preprocess = Mapping[str, Sequence[float]]


def batches(
    calibration: object,
    shape: Shape | None = None,
    preprocess: Preprocess | None = None,
    most: int | None = None,
    ids: bool | None = False,
) -> Iterator[np.ndarray]:
    """Checked f32 batches [N, ...] of `calibration`, which is read once and no further than needed; with `ids` int64;
    where that is None, integers [N, T] are ids.

    shape: of one image, without the batch; None where any will do. preprocess: the mean and std with which uint8
    [N, H, W, C] become f32 [N, C, H, W]. most: how many batches are wanted; None for all of them. Of data without a
    length 512 are read, and a warning says so.

    Raises InputError naming the batch: no images in it, integers, a wrong shape, NaN or infinity; or no data at all.
    """
    items, length, indexed = _items(calibration, shape)
    limit = max(length or 0, MOST_BATCHES)
    read = given = 0
    singles: list[np.ndarray] = []  # [1, ...], images that wait for a batch of their own
    for index, item in enumerate(items):
        if read == limit:
            got = f"more (the first {limit} were used)"
            warnings.warn(f"expected at most {limit} batches of calibration data, got {got}", stacklevel=3)
            break
        where = f"{'item' if indexed else 'batch'} {index} of the calibration data"
        values = _images_of(item, shape, where)
        read_ids = ids or ids is None and values.dtype.kind in "iu" and values.ndim == 2
        images = _ids(values, where) if read_ids else _float32(values, shape, preprocess, where)
        single = images.shape == shape if shape is not None else indexed and images.ndim < 4
        images = images[None] if single else images
        _check(images, shape, where)
        if single:
            if singles and images.shape != singles[0].shape:
                expected = f"images of one size, {list(singles[0].shape[1:])} as before"
                raise InputError(f"expected {expected}, got {list(images.shape[1:])} - at {where}")
            singles.append(images)
            if len(singles) < BATCH_SIZE:
                continue
            images, singles = np.concatenate(singles), []
        read += 1
        if len(images):
            given += 1
            yield images
        if given == most:
            return
    if singles:
        yield np.concatenate(singles)
    elif not given:
        raise InputError("expected at least one image, got none - at the calibration data")


def doubt(images: np.ndarray) -> str | None:
    """Why ranges that follow from f32 `images` [N, ...] fit no others, if that is so."""
    if np.ptp(images) == 0:
        what = f"hold nothing but the number {images.flat[0] + 0:g}"
    elif len(images) > 1 and (images == images[:1]).all():
        what = "are all the same"
    else:
        return None
    return f"the {len(images)} images {what}: ranges and figures that follow from them fit no others"


def count_batches(calibration: object) -> int | None:
    """How many batches there are, for those who wait; None where the data do not say."""
    return _items(calibration, None)[1]


# ---- What holds the batches ---------------------------------------------------------------------------------------


def _items(calibration: Any, shape: Shape | None) -> tuple[Iterable[Any], int | None, bool]:
    """What comes one by one, how many batches that makes (None: unknown), and whether it comes from a dataset."""
    if isinstance(calibration, Mapping) or _is_labelled(calibration):  # one batch, as next(iter(loader)) gives it
        calibration = _images_of(calibration, None, "the calibration data")
    if hasattr(calibration, "ndim") and hasattr(calibration, "shape"):
        if calibration.shape == shape:
            return [calibration], 1, False
        count = calibration.shape[0] if calibration.ndim else 0
        starts = range(0, count, BATCH_SIZE)
        return (calibration[i : i + BATCH_SIZE] for i in starts), len(starts), False
    indexed = hasattr(calibration, "__getitem__") and not isinstance(calibration, Sequence)
    length = _length(calibration)
    if isinstance(calibration, Iterable) and not isinstance(calibration, (str, bytes)):
        items: Iterable[Any] = calibration
    elif indexed and length is not None:  # not by `iter`, which ends at an IndexError that many datasets never raise
        items = (calibration[i] for i in range(length))
    else:
        expected = "an array [N, ...] or an iterable of batches"
        raise InputError(f"expected {expected}, got {type(calibration).__name__} - at calibration")
    return items, math.ceil(length / BATCH_SIZE) if indexed and length is not None else length, indexed


def _length(calibration: Any) -> int | None:
    try:
        return len(calibration)
    except Exception:  # loaders without a length have `__len__`, which raises what its author thought fit
        return None


def _is_labelled(calibration: Any) -> bool:
    """Whether these are the images and labels of one batch, not batches: labels have at most one dimension."""
    if not isinstance(calibration, (tuple, list)) or len(calibration) < 2:
        return False
    images, *others = (getattr(part, "ndim", -1) for part in calibration)
    return images > 1 and all(0 <= rank <= 1 for rank in others)


# ---- What holds the images ----------------------------------------------------------------------------------------


def _images_of(batch: Any, shape: Shape | None, where: str) -> np.ndarray:
    """The images in a batch, or the one image of a dataset's item; of any dtype yet."""
    if isinstance(batch, Mapping):
        return _images_of(_entry(batch, where), shape, where)
    if isinstance(batch, (tuple, list)) and batch:
        if isinstance(batch, list) and len(batch) > 1 and all(_shape(part) == shape for part in batch):
            raise InputError(f"expected images in one array, got a list of {len(batch)} (stack them) - at {where}")
        return _images_of(batch[0], shape, where)
    try:
        if hasattr(batch, "detach"):  # a tensor of torch; numpy has no bfloat16
            batch = batch.detach()
            return (batch.float() if batch.is_floating_point() else batch).cpu().numpy()
        if isinstance(batch, np.ma.MaskedArray) and np.ma.is_masked(batch):
            raise TypeError("masked elements")
        if hasattr(batch, "__array__"):
            return np.asarray(batch)
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        got = f"{type(batch).__name__} without them ({reason})"
        raise InputError(f"expected arrays or tensors with dense values, got {got} - at {where}") from error
    expected = "arrays or tensors, or tuples that begin with one"
    raise InputError(f"expected {expected}, got {type(batch).__name__} - at {where}")


def _entry(batch: Mapping, where: str) -> Any:
    """The images of a dict."""
    named = [batch[name] for name in NAMES if name in batch]
    floats = [value for value in batch.values() if _is_floating(value) and value.ndim > 1]
    if not named and len(floats) != 1:
        expected = f"one of the keys {', '.join(NAMES)}, or one float array of two or more dimensions"
        got = f"{len(floats)} of them among {', '.join(map(str, batch)) or 'no keys'}"
        raise InputError(f"expected {expected}, got {got} - at {where}")
    return (named or floats)[0]


def _shape(value: Any) -> Shape | None:
    return tuple(value.shape) if hasattr(value, "shape") else ()


def _is_floating(value: Any) -> bool:
    if hasattr(value, "is_floating_point"):
        return bool(value.is_floating_point())
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


# ---- Their numbers ------------------------------------------------------------------------------------------------


def _float32(images: np.ndarray, shape: Shape | None, preprocess: Preprocess | None, where: str) -> np.ndarray:
    if preprocess is not None and shape is not None and images.dtype == np.uint8:
        return _from_pixels(images, shape, preprocess, where)
    if images.dtype.kind != "f":
        wanted = "float32 images" if preprocess is None else "float32 images [N, C, H, W] or uint8 images [N, H, W, C]"
        raise InputError(
            f"expected {wanted}, got {images.dtype} (convert and scale them as the network takes them) - at {where}"
        )
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinity, which is refused
        return np.ascontiguousarray(images, np.float32)


def _ids(values: np.ndarray, where: str) -> np.ndarray:
    if values.dtype.kind not in "iu":
        raise InputError(f"expected token ids, integers [N, T], got {values.dtype} - at {where}")
    return np.ascontiguousarray(values, np.int64)


def _from_pixels(images: np.ndarray, shape: Shape, preprocess: Preprocess, where: str) -> np.ndarray:
    channels, height, width = shape
    if images.shape[-3:] != (height, width, channels):
        expected = f"uint8 images [N, {height}, {width}, {channels}] for an example {list(shape)}"
        raise InputError(f"expected {expected}, got {list(images.shape)} - at {where}")
    mean, std = (np.asarray(preprocess[key], np.float32) for key in ("mean", "std"))
    real = (images.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(np.moveaxis(real, -1, -3))


def _check(images: np.ndarray, shape: Shape | None, where: str) -> None:
    if shape is not None and images.shape[1:] != shape:
        expected = f"shape [N, {', '.join(map(str, shape))}] as the example has"
        raise InputError(f"expected {expected}, got {list(images.shape)} - at {where}")
    if images.ndim < 2:
        raise InputError(f"expected batches [N, ...], got shape {list(images.shape)} - at {where}")
    if not np.isfinite(images).all():
        raise InputError(f"expected finite numbers, got NaN or infinity - at {where}")
