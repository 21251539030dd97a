"""`qdeploy data`: what a tree of images holds, and which of its files cannot be read."""

from __future__ import annotations

import argparse
import warnings
from itertools import repeat
from pathlib import Path
from typing import Any

from qdeploy.errors import InputError
from qdeploy.files import check_regular
from qdeploy.terminal import columns, progress, write

CHUNK = 32  # files that a process takes at once: 0.1 to 0.5 s of work


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", type=Path, help="a folder root/domain/class/image")
    text = "write the paths of unreadable images, for `qdeploy train --skip-unreadable`"
    parser.add_argument("--write-list", type=Path, metavar="FILE", help=text)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Decodes every image of a tree with all CPUs.

    Returns {"images", "domains": {domain: {class: images}}, "left_out", "unreadable": [[path, reason]]}. Raises
    InputError for what is no such tree.
    """
    from qdeploy.training.file_lists import tree_without, write_list

    if not args.root.is_dir():
        raise InputError(f"expected a folder root/domain/class/image, got {str(args.root)!r} - at root")
    if args.write_list is not None:
        check_regular(args.write_list)
    tree = tree_without(args.root, skip=None)
    if not tree.domains:
        raise InputError(f"expected images as root/domain/class/image, got none - at {args.root}")
    listed = [image.path for classes in tree.domains.values() for images in classes.values() for image in images]
    unreadable = _unreadable(args.root, listed)
    if args.write_list is not None:
        write_list(args.write_list, [path for path, _ in unreadable])
    counts = {domain: {name: len(files) for name, files in found.items()} for domain, found in tree.domains.items()}
    return {"images": len(listed), "domains": counts, "left_out": tree.left_out, "unreadable": unreadable}


def _unreadable(root: Path, files: list[str]) -> list[tuple[str, str]]:
    """(path, reason) of those that cannot be decoded, in their order."""
    from qdeploy.training.parallel import cpus, parallel_map

    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    found = []
    with progress("decoding", len(files)) as advance, parallel_map(min(cpus(), len(chunks))) as run:
        for chunk, trouble in zip(chunks, run(_trouble, repeat(root), chunks), strict=True):
            found += trouble
            for _ in chunk:
                advance()
    return found


def _trouble(root: Path, files: list[str]) -> list[tuple[str, str]]:
    from qdeploy.training.decoding import UnreadableImage, decoded

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what can be decoded all the same
        for file in files:
            try:
                decoded(root, file)
            except UnreadableImage as error:
                found.append((file, error.reason))
    return found


def show(report: dict[str, Any]) -> None:
    """Prints the report of `main`: classes below each other, domains beside each other."""
    domains = report["domains"]
    names = sorted({name for counts in domains.values() for name in counts})
    rows = [{"": name, **{domain: counts.get(name) for domain, counts in domains.items()}} for name in names]
    write(columns([*rows, {"": "all", **{domain: sum(counts.values()) for domain, counts in domains.items()}}]))
    for title, key in (("left out", "left_out"), ("unreadable", "unreadable")):
        if report[key]:
            write(f"\n{title}: {len(report[key])}")
            for path, reason in report[key]:
                write(f"  {path!r}: {reason}" if "\n" in path else f"  {path}: {reason}")
    write(f"\n{report['images']:,} images, {len(report['unreadable']):,} of them unreadable")
