"""An image file as 8-bit RGB, or why there is none. Needs no torch, so that a process that only decodes starts fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdeploy.errors import InputError, one_line

if TYPE_CHECKING:
    from PIL import Image


class UnreadableImage(InputError):
    """An image that is damaged, gone or forbidden; `file` is its path below the root of the data, `reason` what is
    wrong and what to do."""

    file = reason = ""


def decoded(root: Path, file: str) -> Image.Image:
    """The image root/file, converted as `convert("RGB")` does. Raises UnreadableImage."""
    from PIL import Image

    try:
        with Image.open(root / file) as image:
            image.load()
            return _rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # the decoders of Pillow have many
        reason = _trouble(error)
        refusal = UnreadableImage(f"expected an image that can be read, got {reason} - at {root / file}")
        refusal.file, refusal.reason = file, reason
        raise refusal from error


def _trouble(error: Exception) -> str:
    """What is wrong with a file, and what to do."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, OSError) and error.strerror:  # of the file, not of what is in it
        return error.strerror
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"{one_line(error).rstrip('.')}: scale it down"
    unknown = isinstance(error, UnidentifiedImageError)  # Pillow's words repeat the path
    return f"{'a file that Pillow does not know' if unknown else one_line(error)}: put a good copy in its place"


def _rgb(image: Image.Image) -> Image.Image:
    """8 bits a channel, alpha dropped.

    Pillow clips gray of 16 bits to 255, so that all but the darkest becomes white; of 16-bit RGB it takes the upper
    byte, as is done here. Mode I is gray of 16 bits too, as a PGM file has it.
    """
    from PIL import Image

    if image.mode == "F":
        raise ValueError("samples that are floats")
    if image.mode.startswith("I"):
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 0xFFFF:
            raise ValueError("samples beyond 16 bits")
        image = Image.fromarray((samples >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # of a palette, convert would drop it with a warning
    return image.convert("RGB")
