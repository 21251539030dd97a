"""`qdeploy data`: what data holds, which of its files cannot be read, and its test images corrupted."""

from __future__ import annotations

import argparse
import warnings
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.errors import InputError
from qdeploy.format import check_path
from qdeploy.terminal import columns, progress, write
from qdeploy.training.presets import NAMED

CHUNK = 32  # files that a process takes at once: 0.1 to 0.5 s of work


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="a folder root/domain/class/image, or the name of a set as for `qdeploy train`")
    text = "write the paths of unreadable images, for `qdeploy train --skip-unreadable`"
    parser.add_argument("--write-list", type=Path, metavar="FILE", help=text)
    text = "write the test images of a set, corrupted, as CIFAR-10-C's files"
    parser.add_argument("--corrupt", type=Path, metavar="FOLDER", help=text)
    text = "the photographs that the kind frost of --corrupt needs"
    parser.add_argument("--frost", type=Path, metavar="FOLDER", help=text)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Decodes every image of a tree with all CPUs, or makes a set of small images.

    Returns {"images", "domains": {domain: {class: images}}, "left_out", "unreadable": [[path, reason]]}, with
    --corrupt also {"corrupted": {"folder", "kinds"}}. Raises InputError for what is no such data.
    """
    if not args.data:
        raise InputError("expected a folder or the name of a set, got '' - at data")
    if args.data in NAMED:
        return _set(args)
    for option in ("corrupt", "frost"):
        if getattr(args, option) is not None:
            raise InputError(f"expected a set of small images, got {args.data!r} - at --{option}")
    return _tree(Path(args.data), args.write_list)


def _set(args: argparse.Namespace) -> dict[str, Any]:
    from qdeploy.training.domains import ArrayDomain, Outline, load_benchmark

    if args.write_list is not None:
        raise InputError(f"expected a folder of images for such a list, got {args.data} - at --write-list")
    if args.corrupt is None and args.frost is not None:
        raise InputError("expected --corrupt, which uses them, got none - at --frost")

    def check(outline: Outline) -> None:  # before anything is downloaded
        if args.corrupt is not None and "test" not in outline.domains:
            raise InputError(f"expected data with a domain `test`, got {', '.join(outline.domains)} - at --corrupt")
        if args.corrupt is not None and args.corrupt.exists() and not args.corrupt.is_dir():
            raise InputError(f"expected a folder to write in, got something else - at {args.corrupt}")

    benchmark = load_benchmark(args.data, check=check)
    domains = {domain.name: domain for domain in benchmark.domains if isinstance(domain, ArrayDomain)}
    counts = {}
    for name, domain in domains.items():
        counted = np.bincount(domain.labels, minlength=len(benchmark.classes)).tolist()
        counts[name] = {label: count for label, count in zip(benchmark.classes, counted, strict=True) if count}
    images = sum(len(domain.labels) for domain in domains.values())
    report: dict[str, Any] = {"images": images, "domains": counts, "left_out": [], "unreadable": []}
    if args.corrupt is not None:
        from qdeploy.training.corruptions import available, write_cifar_c

        test = domains["test"]
        write_cifar_c(test.images.transpose(0, 2, 3, 1), test.labels, args.corrupt, frost=args.frost)
        report["corrupted"] = {"folder": str(args.corrupt), "kinds": available(args.frost)}
    return report


def _tree(root: Path, write_to: Path | None) -> dict[str, Any]:
    from qdeploy.training.file_lists import tree_without, write_list
    from qdeploy.training.wilds import camelyon17_tree, is_camelyon17

    if not root.is_dir():
        raise InputError(
            f"expected {', '.join(NAMED)} or a folder root/domain/class/image, got {str(root)!r} - at data"
        )
    if write_to is not None:
        check_path(write_to)
    tree = camelyon17_tree(root) if is_camelyon17(root) else tree_without(root, skip=None)
    if not tree.domains:
        raise InputError(f"expected images as root/domain/class/image, got none - at {root}")
    listed = [image.path for classes in tree.domains.values() for images in classes.values() for image in images]
    unreadable = _unreadable(root, listed)
    if write_to is not None:
        write_list(write_to, [path for path, _ in unreadable])
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
    if "corrupted" in report:
        kinds = report["corrupted"]["kinds"]
        write(f"{report['corrupted']['folder']}: {len(kinds)} corruptions of `test`: {', '.join(kinds)}")
