"""Pictures of pixels inside a page: PNG files as data: addresses."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode

import numpy as np

from qdeploy.page.markup import Markup, tag


def image(pixels: np.ndarray, text: str) -> Markup:
    """u8 [H, W, 3]. `text` is read aloud in its place."""
    height, width, _ = pixels.shape
    address = "data:image/png;base64," + b64encode(png(pixels)).decode()
    return tag("img", src=address, alt=text, width=width, height=height)


def png(pixels: np.ndarray) -> bytes:
    """u8 [H, W, 3] as a file: 8 bits a channel, RGB, rows without a filter."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, 3 * width)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
