"""An image file as the network sees it: decoding, and the augmentation against torchvision's formulas in numpy."""

import math
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from qdeploy.training import decoding, images
from qdeploy.training.decoding import UnreadableImage
from qdeploy.training.images import Draw, load_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (11, 14, 3), dtype=np.uint8)


def decoded(path):
    """u8 [H, W, 3]."""
    return np.asarray(decoding.decoded(path.parent, path.name))


# ---- Augmentation ----------------------------------------------------------------------------------------------------


class Scripted:
    """A generator whose draws are written down, in the order in which they are asked for."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def uniform(self, low, high):
        share = self.draws.pop(0)
        return low + share * (high - low)

    def random(self):
        return self.draws.pop(0)

    def integers(self, high, endpoint):
        assert endpoint
        return math.floor(self.draws.pop(0) * (high + 1))

    def permutation(self, count):
        return np.array(self.draws.pop(0))


def bilinear(pixels, size, axis):
    """Pillow's resampling along one axis: triangles as wide as a pixel of the result, weights of 22 bits."""
    count = pixels.shape[axis]
    scale = count / size
    support = max(scale, 1.0)
    out = []
    for i in range(size):
        centre = (i + 0.5) * scale
        first, end = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), count)
        weights = np.array([max(0.0, 1 - abs((j - centre + 0.5) / support)) for j in range(first, end)])
        fixed = np.floor(weights / weights.sum() * (1 << 22) + 0.5).astype(np.int64)
        taken = np.moveaxis(pixels.astype(np.int64), axis, -1)[..., first:end]
        out.append(np.clip(((taken * fixed).sum(-1) + (1 << 21)) >> 22, 0, 255))
    return np.moveaxis(np.stack(out, -1), -1, axis)


def resized(pixels, size):
    return bilinear(bilinear(pixels, size, 1), size, 0).astype(np.uint8)


def gray(pixels):
    """L of ITU-R 601-2 in 16 bits, [H, W, 1]."""
    return (pixels.astype(np.int64) @ [19595, 38470, 7471] + 0x8000)[..., None] >> 16


def blended(first, second, share):
    mixed = np.float32(first) + np.float32(share) * (np.float32(second) - np.float32(first))
    return np.clip(mixed, 0, 255).astype(np.uint8)


def turned(pixels, hue):
    """Hue is turned in Pillow's own HSV, by a byte that wraps."""
    planes = [*Image.fromarray(pixels).convert("HSV").split()]
    planes[0] = Image.fromarray(np.asarray(planes[0]) + np.array(int(hue * 255)).astype(np.uint8))
    return np.asarray(Image.merge("HSV", planes).convert("RGB"))


def jittered(pixels, order, brightness, contrast, saturation, hue):
    for change in order:
        if change == 0:
            pixels = blended(np.zeros_like(pixels), pixels, brightness)
        elif change == 1:
            mean = int(gray(pixels).mean() + 0.5)
            pixels = blended(np.full_like(pixels, mean), pixels, contrast)
        elif change == 2:
            pixels = blended(np.broadcast_to(gray(pixels), pixels.shape), pixels, saturation)
        else:
            pixels = turned(pixels, hue)
    return pixels


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
@pytest.mark.parametrize("flip", [0.4, 0.6])
@pytest.mark.parametrize("to_gray", [0.05, 0.5])
def test_augmentation_is_that_of_torchvision_for_the_same_draws(order, flip, to_gray):
    shares = [0.1, 0.9, 0.3, 0.8]  # of brightness, contrast, saturation and hue
    area, aspect, left, top = 0.4, 0.8, 0.7, 0.6
    draws = [area, aspect, left, top, flip, order, *(shares[change] for change in order), to_gray]
    found = np.asarray(images._augment(Image.fromarray(PIXELS), 5, Scripted(*draws)))

    target = 11 * 14 * (0.7 + 0.3 * area)
    ratio = math.exp(math.log(3 / 4) + aspect * (math.log(4 / 3) - math.log(3 / 4)))
    width, height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
    x, y = math.floor(left * (14 - width + 1)), math.floor(top * (11 - height + 1))
    assert 0 < width < 14 and 0 < height < 11
    expected = resized(PIXELS[y : y + height, x : x + width], 5)
    if flip < 0.5:
        expected = expected[:, ::-1]
    factors = [0.7 + 0.6 * share for share in shares[:3]] + [-0.3 + 0.6 * shares[3]]
    expected = jittered(expected, order, *factors)
    if to_gray < 0.1:
        expected = np.broadcast_to(gray(expected), expected.shape)
    assert np.array_equal(found, expected)


# (width, height) and the crop after ten draws that did not fit: 3/4 or 4/3 in the centre, the whole in between
@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((300, 200), (16, 0, 283, 200)),
        ((500, 333), (28, 0, 472, 333)),
        ((200, 100), (33, 0, 166, 100)),
        ((100, 200), (0, 33, 100, 166)),
        ((1000, 1), (499, 0, 500, 1)),
        ((1, 7), (0, 3, 1, 4)),
        ((120, 100), (0, 0, 120, 100)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_crops_that_do_not_fit_become_the_centre_of_the_nearest_aspect(size, box):
    class Largest:
        def uniform(self, low, high):
            return high * 3  # an area or aspect that never fits

    assert images._crop_box(*size, Largest()) == box


@pytest.mark.parametrize("size", [(50, 31), (300, 200), (640, 320), (90, 100), (77, 300)])
def test_every_crop_lies_inside_and_keeps_its_aspect(size):
    width, height = size
    for seed in range(300):
        left, top, right, bottom = images._crop_box(width, height, np.random.default_rng(seed))
        w, h = right - left, bottom - top
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert 3 / 4 * (h - 1) <= w <= 4 / 3 * (h + 1)


def test_an_augmented_image_has_these_pixels(tmp_path):
    """Of an image of 2:1, whose ten crops never fit; made once by the formulas above from the draws of this place."""
    expected = [
        [[89, 115, 106], [120, 127, 129], [117, 146, 112]],
        [[123, 100, 130], [102, 99, 133], [133, 91, 107]],
        [[107, 113, 130], [126, 124, 116], [100, 109, 62]],
    ]
    Image.fromarray(PIXELS[:7]).save(tmp_path / "x.png")
    found = load_image(tmp_path, "x.png", 3, Draw(seed=0, update=5, environment=1, place=1)).permute(1, 2, 0)
    assert torch.equal(found, torch.tensor(expected, dtype=torch.uint8))


# ---- Decoding --------------------------------------------------------------------------------------------------------


GRAY = np.arange(0, 256, 5, dtype=np.uint8)[None].repeat(2, 0)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "i4"])  # modes I;16, I;16B and I
@pytest.mark.parametrize("suffix", ["png", "tif", "ppm"])
def test_gray_of_16_bits_keeps_its_upper_byte(tmp_path, dtype, suffix):
    if (dtype, suffix) in {("i4", "png"), (">u2", "ppm")}:  # Pillow writes none
        dtype = "<u2"
    image = Image.fromarray((GRAY.astype(np.int64) * 257).astype(dtype))
    image.save(tmp_path / f"x.{suffix}")
    assert np.array_equal(decoded(tmp_path / f"x.{suffix}"), GRAY[..., None].repeat(3, 2))


def png(samples, color):
    """A PNG file of 16-bit samples [H, W, channels], which Pillow reads but does not write."""
    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    parts = [struct.pack(">I", len(data)) + kind + data for kind, data in [*chunks, (b"IEND", b"")]]
    return b"\x89PNG\r\n\x1a\n" + b"".join(part + struct.pack(">I", zlib.crc32(part[4:])) for part in parts)


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_png_of_16_bits_has_the_same_pixels_with_and_without_colors_and_alpha(tmp_path, color, channels):
    samples = GRAY[..., None].astype(np.int64).repeat(channels, 2) * 256 + 77
    (tmp_path / "x.png").write_bytes(png(samples, color))
    assert np.array_equal(decoded(tmp_path / "x.png"), GRAY[..., None].repeat(3, 2))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_converted_as_pillow_does(tmp_path, mode):
    image = Image.fromarray(PIXELS).convert(mode)
    name = "x.tif" if mode in ("CMYK", "YCbCr") else "x.png"
    image.save(tmp_path / name)
    with Image.open(tmp_path / name) as file:
        assert file.mode == mode
        assert np.array_equal(decoded(tmp_path / name), np.asarray(file.convert("RGB")))


def test_a_palette_with_transparency_gives_its_colors_and_no_warning(tmp_path):
    image = Image.fromarray(PIXELS).quantize(8)
    image.save(tmp_path / "x.png", transparency=bytes([0, 100, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decoded(tmp_path / "x.png"), np.asarray(image.convert("RGB")))


def test_the_orientation_of_exif_is_not_looked_at(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(PIXELS).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(decoded(tmp_path / "x.png"), PIXELS)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_images_of_a_pixel_or_a_line_are_images(tmp_path, size):
    Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "x.png")
    for place in range(5):
        augmented = load_image(tmp_path, "x.png", 8, Draw(0, 0, 0, place))
        assert torch.equal(augmented, augmented[:, :1, :1].expand(3, 8, 8))
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    assert torch.equal(load_image(tmp_path, "x.png", 8, None), red)


def refusal(path):
    with pytest.raises(UnreadableImage) as refused:
        load_image(path.parent, path.name, 8, None)
    assert refused.value.file == path.name
    text = str(refused.value)
    assert text.startswith("expected an image that can be read, got ") and text.endswith(f" - at {path}")
    assert "\n" not in text
    return text.removeprefix("expected an image that can be read, got ").removesuffix(f" - at {path}")


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp", "ppm"])
def test_truncated_images_are_named(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    for length in (3, 40, len(content) // 2, len(content) - 100):
        path.write_bytes(content[:length])
        assert refusal(path).endswith(": put a good copy in its place")


def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "x.tif"
    assert refusal(path) == "No such file or directory"
    path.write_text("<html>")
    assert refusal(path) == "a file that Pillow does not know: put a good copy in its place"
    Image.fromarray(np.float32(GRAY)).save(path)
    assert refusal(path) == "samples that are floats: put a good copy in its place"
    Image.fromarray(np.int32(GRAY) * 70000).save(path)
    assert refusal(path) == "samples beyond 16 bits: put a good copy in its place"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    text = "Image size (104 pixels) exceeds limit of 20 pixels, could be decompression bomb DOS attack"
    assert refusal(path) == f"{text}: scale it down"
    path.unlink()
    path.mkdir()
    assert refusal(path) == "Is a directory"


def test_running_out_of_memory_is_not_the_fault_of_the_image(tmp_path, monkeypatch):
    def exhausted(image):
        raise MemoryError

    monkeypatch.setattr(decoding, "_rgb", exhausted)
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    with pytest.raises(MemoryError):
        load_image(tmp_path, "x.png", 8, None)
