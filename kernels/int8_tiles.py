"""Tile shapes of the int8 matrix products, and a file that remembers which one was fastest for a shape on a GPU.

No tile changes a bit of a result, so choosing by time is safe.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from qdeploy.errors import InputError
from qdeploy.files import atomic_file, cache_folder

CTAS_TO_FILL = 96  # of an H100 with 132 multiprocessors: fewer, larger tiles pay until then


class Tile(NamedTuple):
    """BLOCK_M * BLOCK_N / (32 * num_warps) <= 64: more accumulators a thread spill with a residual."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# As `default` tries them: on an H100 the convolutions of ResNet-50 take 1.02 to 1.05 times as long with its choice as
# with the best of 32 tiles for each of them, in batches of 256, 32 and 1 (docs/notebook.md).
TILES = (
    Tile(64, 128, 128, 4, 3),
    Tile(128, 128, 128, 8, 3),  # only by tuning: better for long products of many pixels
    Tile(128, 64, 128, 4, 3),
    Tile(128, 64, 64, 4, 4),
    Tile(128, 128, 64, 8, 3),  # only by tuning
    Tile(128, 64, 32, 4, 4),
    Tile(64, 64, 128, 4, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 64, 32, 4, 4),
    Tile(32, 64, 128, 4, 4),
    Tile(32, 64, 64, 4, 4),
    Tile(128, 32, 32, 4, 4),  # of 32 outputs, as of depthwise layers
    Tile(64, 32, 32, 4, 4),
    Tile(32, 32, 128, 4, 4),
    Tile(32, 32, 64, 4, 4),
    Tile(16, 64, 128, 4, 4),
    Tile(16, 32, 128, 4, 4),
    Tile(32, 32, 32, 4, 4),
    Tile(16, 32, 32, 4, 4),
)


def fitting(rows: int, k_unit: int) -> list[Tile]:
    """The tiles that divide `rows` (of weights, in a superblock) and `k_unit` (PackedConv), in their order above."""
    return [tile for tile in TILES if rows % tile.block_n == 0 and k_unit % tile.block_k == 0]


def default(pixels: int, rows: int, superblocks: int, k_unit: int) -> Tile:
    """The first tile that still gives the multiprocessors work, or else the one that gives most of them some."""

    def ctas(tile: Tile) -> int:
        return -(-pixels // tile.block_m) * superblocks * rows // tile.block_n

    candidates = fitting(rows, k_unit)
    most = max(candidates, key=lambda tile: (ctas(tile), -tile.block_m, tile.block_k))
    return next((tile for tile in candidates if ctas(tile) >= CTAS_TO_FILL), most)


class TunedTiles:
    """The fastest tiles by key, kept in int8_tiles.json of the cache folder.

    The file is a cache: one that is missing, damaged or of other tiles counts as empty.
    """

    def __init__(self, device: str) -> None:
        self._path = cache_folder() / "int8_tiles.json"
        self._device = device

    def get(self, key: str) -> Tile | None:
        """The tile that was fastest for `key` on this device, or None."""
        value = self._read().get(self._device, {}).get(key)
        return next((tile for tile in TILES if list(tile) == value), None)

    def tune(self, key: str, candidates: list[Tile], milliseconds: Callable[[Tile], float]) -> None:
        """Times the candidates and keeps the fastest for `key`. Raises InputError where the file cannot be written."""
        best = min(candidates, key=milliseconds)
        document = self._read()
        document.setdefault(self._device, {})[key] = list(best)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._path) as file:
                file.write(json.dumps(document, indent=1, sort_keys=True).encode())
        except OSError as error:
            reason = f"got: {error.strerror or error} (XDG_CACHE_HOME moves it)"
            raise InputError(f"expected to write {self._path}, {reason} - at the tuned tiles") from None

    def _read(self) -> dict:
        with suppress(OSError, ValueError):
            document = json.loads(self._path.read_text())
            if isinstance(document, dict) and all(isinstance(tiles, dict) for tiles in document.values()):
                return document
        return {}
