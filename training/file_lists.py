"""Lists of images that are left out of a tree: one path below its root a line, as `qdeploy data` writes them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from qdeploy.errors import InputError
from qdeploy.files import atomic_file
from qdeploy.training.image_tree import Tree, read_tree

DUPLICATES = "domain_net_duplicates.txt"


def read_list(path: Path) -> list[str]:
    """The paths in a list, in their order; empty lines are passed over. Raises OSError for one that cannot be read."""
    return [os.fsdecode(line) for line in path.read_bytes().splitlines() if line.strip()]


def write_list(path: Path, files: Iterable[str]) -> None:
    """Raises InputError for a path that `read_list` would not give back, and OSError as `atomic_file` does."""
    with atomic_file(path) as file:
        for name in files:
            line = os.fsencode(name)
            if line.splitlines() != [line] or not line.strip():
                raise InputError(f"expected names of files without line breaks, got {name!r} - at {path}")
            file.write(line + b"\n")


def leave_out(tree: Tree, listed: Collection[str], reason: str) -> list[str]:
    """Takes the listed images out of a tree and says why in its `left_out`; returns the paths that are none of them.

    Raises InputError where a domain has no image left.
    """
    missing = {*listed}
    for domain, classes in tree.domains.items():
        for name, images in [*classes.items()]:
            kept = [image for image in images if image.path not in missing]
            gone = [image.path for image in images if image.path in missing]
            missing.difference_update(gone)
            tree.left_out += [(path, reason) for path in gone]
            classes[name] = kept
            if not kept:
                del classes[name]
                tree.left_out.append((f"{domain}/{name}", "a class without images"))
        if not classes:
            raise InputError(f"expected images in every domain, got none but listed ones - at `{domain}`")
    return [path for path in dict.fromkeys(listed) if path in missing]


def tree_without(root: Path, skip: str | None) -> Tree:
    """The images of a tree but for DomainNet's published duplicates, where their list lies in its root, and those in
    the file `skip`. Raises InputError and OSError as `read_tree` and `leave_out` do, and for a listed path that is no
    image of the tree."""
    tree = read_tree(root)
    if (duplicates := root / DUPLICATES).is_file():
        leave_out(tree, read_list(duplicates), f"in {DUPLICATES}")  # some may have been deleted, as DomainBed does
    if skip is not None and (unknown := leave_out(tree, read_list(Path(skip)), f"in {Path(skip).name}")):
        raise InputError(f"expected paths of images of {root}, got {unknown[0][:80]!r} - at {skip}")
    return tree
