"""The image files of a tree root/domain/class/..., listed as torchvision's ImageFolder lists each domain.

The same files in the same order, because a file's number decides whether it trains or validates: classes sorted by
name, then the folders in them as text, then names; links are followed. What cannot hold an image is left out and kept
in a list with its reason.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from qdeploy.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # ImageFolder's


class ImageFile(NamedTuple):
    """One image: its path below the root of the tree, with slashes, and its bytes."""

    path: str
    size: int


@dataclass
class Tree:
    """{domain: {class: images}} in sorted order without empty ones, and what was left out: (path, reason)."""

    domains: dict[str, dict[str, list[ImageFile]]] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)


class _Folder(NamedTuple):
    path: str  # below the root
    around: tuple[tuple[int, int], ...]  # device and inode of the folders that lead here, and of this one


def read_tree(root: Path) -> Tree:
    """Lists a tree of images. Raises InputError for a folder that cannot be read and a domain without any image."""
    tree = Tree()
    hollow = {}
    info = root.stat()
    domains, files = _read(root, _Folder("", ((info.st_dev, info.st_ino),)), tree.left_out)
    _leave_out_images(files, "in no domain's folder", tree.left_out)
    for domain in domains:
        folders, files = _read(root, domain, tree.left_out)
        _leave_out_images(files, "in no class's folder", tree.left_out)
        classes = {folder.path.rpartition("/")[2]: _images(root, folder, tree.left_out) for folder in folders}
        if any(classes.values()):
            tree.domains[domain.path] = {name: images for name, images in classes.items() if images}
            empty = (folder.path for folder, images in zip(folders, classes.values(), strict=True) if not images)
            tree.left_out += [(path, "a class without images") for path in empty]
        else:
            hollow[domain.path] = {*classes}
            tree.left_out.append((domain.path, "a folder without root/domain/class/image"))
    known = {name for classes in tree.domains.values() for name in classes}
    for path, names in hollow.items():
        if names & known:  # it is a domain, and no folder that happens to lie there
            raise InputError(f"expected images in every domain, got none - at {root / path}")
    return tree


def _images(root: Path, folder: _Folder, left_out: list[tuple[str, str]]) -> list[ImageFile]:
    """The images in a folder and in those below it."""
    found, pending = {}, [folder]
    while pending:
        current = pending.pop()
        folders, found[current.path] = _read(root, current, left_out)
        pending += folders
        left_out += [(below.path, "a folder, no image") for below in folders if _named_as_image(below.path)]
    images = []
    for path in sorted(found):
        for file, info in found[path]:
            if (reason := _no_image(file, info)) is None:
                images.append(ImageFile(file, info.st_size))
            else:
                left_out.append((file, reason))
    return images


def _read(
    root: Path, folder: _Folder, left_out: list[tuple[str, str]]
) -> tuple[list[_Folder], list[tuple[str, os.stat_result]]]:
    """The folders in a folder and the other things in it, sorted by name, links followed."""
    folders: list[_Folder] = []
    files: list[tuple[str, os.stat_result]] = []
    try:
        with os.scandir(root / folder.path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = f"{folder.path}/{entry.name}" if folder.path else entry.name
                if (info := _leads_to(entry)) is None:
                    left_out.append((path, "a link to nowhere"))
                elif not stat.S_ISDIR(info.st_mode):
                    files.append((path, info))
                elif (identity := (info.st_dev, info.st_ino)) in folder.around:
                    left_out.append((path, "a link to a folder around it"))
                else:
                    folders.append(_Folder(path, (*folder.around, identity)))
    except OSError as error:
        at = root / folder.path
        raise InputError(f"expected a folder that can be read, got {error.strerror} - at {at}") from error
    return folders, files


def _leads_to(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError as error:
        if entry.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def _named_as_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _no_image(path: str, info: os.stat_result) -> str | None:
    """Why a file cannot hold an image, or None."""
    if not _named_as_image(path):
        return f"not one of {' '.join(SUFFIXES)}"
    if path.rpartition("/")[2].startswith("._"):
        return "what macOS keeps beside a file"
    if not stat.S_ISREG(info.st_mode):
        return "neither a file nor a folder"
    return None if info.st_size else "an empty file"


def _leave_out_images(files: list[tuple[str, os.stat_result]], reason: str, left_out: list[tuple[str, str]]) -> None:
    left_out += [(path, reason) for path, info in files if _no_image(path, info) is None]
