"""An image file as the network sees it.

For the same draws every step gives the very bytes of torchvision's transforms on Pillow images, which DomainBed uses:
convert("RGB"), RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale. Exif's orientation is not looked
at, as there. ToTensor and Normalize are done for a batch, on the device (`Benchmark.normalized`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qdeploy.training.decoding import decoded

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # arXiv 2103.00020
AREA, ASPECT = (0.7, 1.0), (3 / 4, 4 / 3)  # of a random crop


class Draw(NamedTuple):
    """What the random augmentation of an image is a function of; `place` counts in the whole minibatch of a domain."""

    seed: int
    update: int
    environment: int
    place: int


def load_image(root: Path, file: str, size: int, augment: Draw | None) -> Tensor:
    """The image root/file: u8 [3, size, size]. Raises UnreadableImage."""
    from PIL import Image

    image = decoded(root, file)
    if augment is None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    else:
        # Word 1 of the counter is 0 for the sampler of the trainer, so the streams never meet.
        counter = [0, 1 + augment.place, 0, augment.update]
        stream = np.random.Philox(key=[augment.seed, augment.environment], counter=counter)
        image = _augment(image, size, np.random.Generator(stream))
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def _augment(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Random crop of 70 to 100% of the area, flip, color jitter of 0.3 and, in one of ten, gray (DomainBed)."""
    from PIL import Image, ImageEnhance, ImageOps

    # Cropped first: `resize(box=...)` would look beyond the edges of the crop, up to 3 of 255 away.
    image = image.crop(_crop_box(image.width, image.height, rng)).resize((size, size), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for change in rng.permutation(4):
        if change == 3:
            hue, saturation, value = image.convert("HSV").split()
            turned = np.asarray(hue).astype(np.int32) + int(rng.uniform(-0.3, 0.3) * 255)
            hue = Image.fromarray((turned % 256).astype(np.uint8))
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[change]
            image = enhance(image).enhance(rng.uniform(0.7, 1.3))
    return image.convert("L").convert("RGB") if rng.random() < 0.1 else image


def _crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """left, top, right, bottom: RandomResizedCrop's, with its centre crop where ten draws do not fit (28% of 3:2)."""
    for _ in range(10):
        area = width * height * rng.uniform(*AREA)
        ratio = np.exp(rng.uniform(*np.log(ASPECT)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w, endpoint=True), rng.integers(height - h, endpoint=True)
            return int(left), int(top), int(left) + w, int(top) + h
    narrowest, widest = ASPECT
    w, h = min(width, round(height * widest)), min(height, round(width / narrowest))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
