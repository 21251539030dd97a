"""The sets of small images that are made of packages when they are first used: {name: set} in SETS."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qdeploy.training import digits_dg
from qdeploy.training.cifar import CIFAR10, CLASSES, read_cifar10
from qdeploy.training.mnist import (
    ANGLES,
    CLOTHES,
    FASHION_MNIST,
    MNIST,
    NOISE,
    make_colored_mnist,
    make_rotated_mnist,
    read_fashion_mnist,
)
from qdeploy.training.packages import Arrays, Package, cached_file, fetch, load_arrays, save_arrays

DIGITS = tuple("0123456789")
MNIST_TERMS = "MNIST of LeCun, Cortes and Burges"


@dataclass(frozen=True)
class ImageSet:
    """Domains in the order of their numbers, classes in that of theirs; `shape` is [C, H, W]."""

    domains: tuple[str, ...]
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    load: Callable[[Sequence[str]], dict[str, Arrays]]  # of the named domains


def _of_one_package(
    name: str,
    package: Package,
    terms: str,
    make: Callable[[Path], dict[str, Arrays]],
    domains: tuple[str, ...],
    classes: tuple[str, ...],
    shape: tuple[int, int, int],
) -> ImageSet:
    """`make`: archive -> all domains."""

    def load(names: Sequence[str]) -> dict[str, Arrays]:
        files = {domain: cached_file(name, 1, domain) for domain in domains}
        if not all(files[domain].exists() for domain in names):
            package.announce(name, terms)
            with tempfile.TemporaryDirectory() as downloads:
                made = make(fetch(package, Path(downloads), name))
            for domain, arrays in made.items():
                save_arrays(files[domain], arrays)
        return {domain: load_arrays(files[domain], shape, len(classes)) for domain in names}

    return ImageSet(domains, classes, shape, load)


_ROTATIONS, _COLORS = tuple(map(str, ANGLES)), tuple(map(str, NOISE))
_PUBLISHED = ("test", "train")
SETS: dict[str, ImageSet] = {
    "digits-dg": ImageSet(
        tuple(sorted(digits_dg.SOURCES)), DIGITS, digits_dg.SHAPE, lambda names: digits_dg.load_digits(names)
    ),
    "rotated-mnist": _of_one_package(
        "rotated-mnist", MNIST, MNIST_TERMS, make_rotated_mnist, _ROTATIONS, DIGITS, (1, 28, 28)
    ),
    "colored-mnist": _of_one_package(
        "colored-mnist", MNIST, MNIST_TERMS, make_colored_mnist, _COLORS, ("5-9", "0-4"), (2, 28, 28)
    ),
    "fashion-mnist": _of_one_package(
        *("fashion-mnist", FASHION_MNIST, "Fashion-MNIST of Zalando SE, MIT", read_fashion_mnist),
        *(_PUBLISHED, CLOTHES, (1, 28, 28)),
    ),
    "cifar10": _of_one_package(
        *("cifar10", CIFAR10, "CIFAR-10 of Krizhevsky, Nair and Hinton; no formal license", read_cifar10),
        *(_PUBLISHED, CLASSES, (3, 32, 32)),
    ),
}
