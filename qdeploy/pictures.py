"""Calibration data from the disk: an array, or a folder of pictures. Needs Pillow for pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qdeploy.errors import InputError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
AT_ONCE = 16  # pictures
MODES = {1: "L", 3: "RGB"}  # of Pillow, by channels


def array(path: Path) -> np.ndarray:
    """Of a file .npy. Raises InputError for anything else."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"expected an array in .npy format, got {error} - at {path}") from None
    if not isinstance(found, np.ndarray):
        raise InputError(f"expected one array in .npy format, got several - at {path}")
    return found


class Pictures:
    """The pictures of a folder as batches u8 [n, height, width, channels], as classifiers are evaluated: the shorter
    side becomes `resize`, and of the middle `crop` (height, width) is taken. One channel is grey, three are RGB.

    Raises InputError for a folder without pictures, and where it is read for a picture that is broken.
    """

    def __init__(self, folder: Path, channels: int, resize: int | None, crop: tuple[int, int]):
        if not folder.is_dir():
            raise InputError(f"expected a folder of pictures or an array .npy, got neither - at {folder}")
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not self.files:
            raise InputError(f"expected pictures ({', '.join(SUFFIXES)}), got none - at {folder}")
        self.channels, self.resize, self.crop = channels, resize or min(crop), crop
        if self.resize < min(crop):
            raise InputError(f"expected at least {min(crop)}, as the network reads, got {self.resize} - at --resize")

    def __len__(self) -> int:
        return -(-len(self.files) // AT_ONCE)

    def __iter__(self) -> Iterator[np.ndarray]:
        for i in range(0, len(self.files), AT_ONCE):
            yield np.stack([self._picture(file) for file in self.files[i : i + AT_ONCE]])

    def _picture(self, file: Path) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(file) as opened:
                image = opened.convert(MODES[self.channels])
        except Exception as error:  # Pillow's are of many types
            raise InputError(f"expected a picture, got {type(error).__name__} - at {file}") from None
        height, width = self.crop
        shrink = max(self.resize / min(image.size), height / image.height, width / image.width)
        size = (max(width, round(image.width * shrink)), max(height, round(image.height * shrink)))
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        return np.asarray(image.crop((left, top, left + width, top + height))).reshape(height, width, self.channels)
