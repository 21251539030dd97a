"""Data of several domains: sets of small images in memory, any folder root/domain/class/image, and texts."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qdeploy.checks import check_name
from qdeploy.errors import InputError, ModelError
from qdeploy.training import wilds
from qdeploy.training.file_lists import read_list, tree_without
from qdeploy.training.fingerprint import fingerprint
from qdeploy.training.image_sets import SETS
from qdeploy.training.image_tree import ImageFile
from qdeploy.training.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Draw, load_image
from qdeploy.training.inputs import Images, Inputs, Texts
from qdeploy.training.presets import NAMED
from qdeploy.training.text_domains import TextDomain, encoded, load_tokenizer
from qdeploy.training.text_files import holds_texts, read_texts

if TYPE_CHECKING:
    from qdeploy.training.config import Config


@dataclass(frozen=True)
class ArrayDomain:
    """One domain in memory: u8 images [N, C, H, W] and their classes [N]."""

    name: str
    environment: int  # as of `FolderDomain`
    images: np.ndarray
    labels: np.ndarray
    published: None = None  # as of `FolderDomain`
    users: None = None  # as of `TextDomain`

    @property
    def files(self) -> Sequence[tuple[str, int]]:
        """What stands for them in a fingerprint."""
        return [("images", self.images.nbytes)]

    def batch(
        self, positions: np.ndarray, augment: tuple[int, int, int] | None = None, places: Iterable[int] | None = None
    ) -> Tensor:
        """The images at `positions`, u8 [n, C, H, W]; small images are not augmented."""
        return torch.from_numpy(self.images[positions])


@dataclass(frozen=True)
class FolderDomain:
    """One domain as image files; `size` is the height and width that the network sees.

    `environment` is the domain's number among all of the data, whether they are used or not: it seeds the split.
    `published`: the positions that train and those that validate, where the data come with a split of their own.
    """

    name: str
    environment: int
    root: Path
    files: Sequence[ImageFile]
    labels: np.ndarray
    size: int
    published: tuple[np.ndarray, np.ndarray] | None = None
    users: None = None  # as of `TextDomain`

    def batch(
        self, positions: np.ndarray, augment: tuple[int, int, int] | None = None, places: Iterable[int] | None = None
    ) -> Tensor:
        """Decoded images, u8 [n, 3, size, size].

        With `augment` = (seed, update, environment) each is cropped, flipped and recolored at random, as a pure
        function of these three numbers and its place in the whole minibatch, of which this may be the share of one
        device: `places`, 0 to n - 1 when None. Raises UnreadableImage.
        """
        places = range(len(positions)) if places is None else places
        draws = [None if augment is None else Draw(*augment, int(place)) for place in places]
        files = [self.files[position].path for position in positions]
        images = [load_image(self.root, file, self.size, draw) for file, draw in zip(files, draws, strict=True)]
        return torch.stack(images)


Domain = ArrayDomain | FolderDomain | TextDomain


@dataclass(frozen=True)
class Benchmark:
    """Domains with the same classes, sorted by name."""

    name: str
    classes: list[str]
    domains: Sequence[Domain]
    inputs: Inputs
    left_out: Sequence[tuple[str, str]] = ()  # files and folders that are no images of it: (path, reason)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What a run that goes on has to find again."""
        return fingerprint(self.classes, {domain.name: domain.files for domain in self.domains})

    def index(self, name: str) -> int:
        """The place of a domain in `domains`; raises InputError for an unknown name."""
        return _index(name, [domain.name for domain in self.domains], self.name)

    def sources(self, held_out: Sequence[str]) -> list[Domain]:
        """The domains but those held out; raises InputError for an unknown name."""
        targets = {self.index(name) for name in held_out}
        return [domain for i, domain in enumerate(self.domains) if i not in targets]


@dataclass(frozen=True)
class Outline:
    """What is known of a benchmark before its images are there."""

    name: str
    classes: list[str]
    domains: Sequence[str]
    inputs: Inputs

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
    skip: str | None = None,
    tokenizer: str | None = None,
    tokens: int = 128,
) -> Benchmark:
    """Loads one of SETS, "debug" (random images, for tests), or the folder `data` of the form root/domain/class/image,
    or of texts.

    Args:
        domains: the names of the domains to use; all when None.
        image_size: height and width to which the images of a folder are resized.
        check: called before anything is downloaded; raises where that is not worth while.
        skip: a file with the paths of images of the folder that are left out.
        tokenizer, tokens: of texts, the folder or name of a tokenizer of transformers, and the longest text.

    Raises:
        InputError: unknown data or domain, a folder of another form, or a failed download.
    """
    if domains is not None and len(set(domains)) < len(domains):
        raise InputError(f"expected every domain once, got {', '.join(domains)} - at --domains")
    if skip is not None and data in NAMED:
        raise InputError(f"expected a folder of images for such a list, got {data} - at --skip-unreadable")
    if data and data not in NAMED and holds_texts(Path(data)):
        return _load_texts(Path(data), domains, check, tokenizer, tokens)
    if tokenizer is not None:
        expected = "texts: a folder of csv files, one a domain, or WILDS's amazon_v2.1"
        raise InputError(f"expected {expected}, got {data} - at --tokenizer")
    if data in SETS:
        return _load_set(data, domains, check)
    found = _debug_benchmark() if data == "debug" else _load_folder(data, image_size, skip)
    chosen = found.domains if domains is None else [found.domains[found.index(name)] for name in sorted(domains)]
    check(Outline(found.name, found.classes, [domain.name for domain in chosen], found.inputs))
    return replace(found, domains=chosen)


def benchmark_of(config: Config, check: Callable[[Outline], None] = lambda outline: None) -> Benchmark:
    """The data of a run; arguments and errors as for `load_benchmark`."""
    names = config.domains.split(",") if config.domains is not None else None
    text = config.tokenizer, config.tokens
    found = load_benchmark(config.data, names, config.image_size, check, config.skip_unreadable, *text)
    if config.normalization == "data" or isinstance(found.inputs, Texts):
        return found
    if found.inputs.channels != 3:
        got = f"images of {found.inputs.channels} channel(s)"
        raise InputError(f"expected images in color, got {got} - at --normalization {config.normalization}")
    return replace(found, inputs=replace(found.inputs, mean=CLIP_MEAN, std=CLIP_STD))


def _load_set(data: str, domains: Sequence[str] | None, check: Callable[[Outline], None]) -> Benchmark:
    packed = SETS[data]
    names = [*packed.domains] if domains is None else sorted(domains)
    if unknown := set(names) - set(packed.domains):
        got = ", ".join(sorted(unknown)) or "an empty name"
        raise InputError(f"expected domains of {', '.join(packed.domains)}, got {got} - at {data}")
    none, one = (0.0,) * packed.shape[0], (1.0,) * packed.shape[0]
    outline = Outline(data, [*packed.classes], names, Images(packed.shape, none, one))
    check(outline)
    arrays = packed.load(names)
    loaded = [ArrayDomain(name, packed.domains.index(name), *arrays[name]) for name in names]
    return Benchmark(data, outline.classes, loaded, outline.inputs)


def _debug_benchmark() -> Benchmark:
    rng = np.random.default_rng(0)
    prototypes = rng.uniform(0, 160, (4, 1, 16, 16))
    domains = []
    for i in range(3):
        labels = np.arange(60) % 4
        noisy = prototypes[labels] + 20 * i + rng.normal(0, 40, (60, 1, 16, 16))
        domains.append(ArrayDomain(f"debug{i}", i, noisy.clip(0, 255).astype(np.uint8), labels))
    return Benchmark("debug", list("abcd"), domains, Images((1, 16, 16), (0.0,), (1.0,)))


# ---- Texts --------------------------------------------------------------------------------------------------------


def _load_texts(
    root: Path, names: Sequence[str] | None, check: Callable[[Outline], None], tokenizer: str | None, tokens: int
) -> Benchmark:
    if tokenizer is None:
        expected = "the tokenizer of the network, a folder or a name, for a folder of texts"
        raise InputError(f"expected {expected}, got none - at --tokenizer")
    loaded = load_tokenizer(tokenizer)
    classes, files = read_texts(root)
    _check_classes(classes, root)
    known = [*files]
    chosen = known if names is None else [known[_index(name, known, root.name)] for name in sorted(names)]
    outline = Outline(root.name, classes, chosen, Texts(tokens, len(loaded)))
    check(outline)
    domains = [encoded(name, known.index(name), files[name], loaded, tokens) for name in chosen]
    return Benchmark(root.name, classes, domains, outline.inputs)


# ---- Folders ------------------------------------------------------------------------------------------------------


def _load_folder(data: str, size: int, skip: str | None) -> Benchmark:
    root = Path(data)
    if not data or not root.is_dir():
        raise InputError(
            f"expected {', '.join(SETS)}, debug or a folder root/domain/class/image, got {data!r} - at --data"
        )
    if wilds.is_camelyon17(root):
        return _load_camelyon17(root, size, skip)
    tree = tree_without(root, skip)
    if not tree.domains:
        raise InputError(f"expected images as root/domain/class/image, got none - at {root}")
    # One list of classes for all domains: numbering each domain's own folders would mislabel a domain that lacks one.
    classes = sorted({name for found in tree.domains.values() for name in found})
    _check_classes(classes, root)
    domains = []
    for environment, (name, found) in enumerate(tree.domains.items()):
        labels = np.repeat([classes.index(label) for label in found], [len(files) for files in found.values()])
        files = [file for listed in found.values() for file in listed]
        domains.append(FolderDomain(name, environment, root, files, labels, size))
    return Benchmark(root.name, classes, domains, _as_imagenet(size), tree.left_out)


def _as_imagenet(size: int) -> Images:
    return Images((3, size, size), IMAGENET_MEAN, IMAGENET_STD)


def _load_camelyon17(root: Path, size: int, skip: str | None) -> Benchmark:
    listed = [] if skip is None else read_list(Path(skip))
    domains = [
        FolderDomain(
            wilds.name_of(number), number, root, found.files, found.labels, size, (found.training, found.validation)
        )
        for number, found in wilds.camelyon17(root, listed).items()
    ]
    left_out = [(path, f"in {Path(skip).name}") for path in listed] if skip is not None else []
    return Benchmark(root.name, wilds.CLASSES, domains, _as_imagenet(size), left_out)


def _check_classes(classes: Sequence[str], root: Path) -> None:
    """Raise InputError for names that the model file cannot hold, and for two that a person would take for one."""
    seen: dict[str, str] = {}
    try:
        for name in classes:
            check_name(name, f"the classes of {root}")
            same = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
            if same != name:
                expected = "classes whose names differ in more than case or encoding"
                raise InputError(f"expected {expected}, got {same!a} and {name!a} - at {root}")
    except ModelError as error:
        raise InputError(str(error)) from None
