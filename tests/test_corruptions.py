"""Corruptions against plain definitions of them, and what a user may give wrong."""

import colorsys
import hashlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qdeploy.errors import InputError
from qdeploy.training import corruptions, filters
from qdeploy.training.corruptions import KINDS, available, corrupt, write_cifar_c
from qdeploy.training.parallel import parallel_map

COLUMNS = {32: "small", 224: "large"}  # the side of an image and its strengths
RANDOM_FREE = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")


def scene(height, width=None, channels=3):
    """Slopes, edges and a little noise, u8 [H, W, C]; made of integers, so that it is the same everywhere."""
    row, column = np.mgrid[:height, : width or height]
    size = max(height, width or height)
    levels = 40 + 120 * row // size + 50 * (5 * column // size % 2) + 30 * (row + column > size)
    noise = np.random.Generator(np.random.PCG64(5)).integers(0, 10, (*levels.shape, channels))
    return (levels[..., None] * np.array([10, 8, 6])[:channels] // 10 + noise).astype(np.uint8)


def strengths(kind, side):
    return getattr(corruptions._KINDS[kind], COLUMNS[side])


def draws(kind, severity, number):
    """The random numbers of one image."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([KINDS.index(kind), severity, number])))


def assert_rounded(levels, expected):
    """Levels are the nearest to the exact values, f64 in [0, 1]."""
    error = np.abs(levels - 255 * np.clip(expected, 0, 1))
    assert levels.shape == expected.shape and error.max() <= 0.5 + 1e-9


@pytest.fixture
def frost(tmp_path):
    """A folder of three photographs, and files that are none."""
    folder = tmp_path / "frost"
    folder.mkdir()
    for i, (name, size) in enumerate([("a.png", (300, 260)), ("b.JPG", (240, 500)), ("c.jpeg", (60, 90))]):
        Image.fromarray(scene(*size)[:, :, ::-1] // (i + 1)).save(folder / name)
    (folder / "readme.txt").write_text("ice")
    (folder / "._a.png").write_text("what a file system leaves behind")
    return folder


# ---- All kinds ------------------------------------------------------------------------------------------------------


def test_the_kinds_are_the_15_in_the_published_order(tmp_path):
    assert KINDS[:6] == ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur")
    assert KINDS[6:12] == ("zoom_blur", "snow", "frost", "fog", "brightness", "contrast")
    assert KINDS[12:] == ("elastic_transform", "pixelate", "jpeg_compression")
    assert available(tmp_path) == KINDS
    assert available() == tuple(kind for kind in KINDS if kind != "frost") and len(available()) == 14


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_has_the_shape_of_the_image_and_the_image_stays(kind, frost):
    for shape in [(32, 32), (32, 32, 1), (32, 32, 3), (8, 8, 3), (17, 40, 3), (28, 28), (100, 90, 3), (224, 224)]:
        image = scene(shape[0], shape[1], (*shape, 1)[2]).reshape(shape)
        image.flags.writeable = False
        before = image.copy()
        for severity in (1, 5):
            result = corrupt(image, kind, severity, 3, frost=frost)
            assert result.shape == shape and result.dtype == np.uint8 and result.flags.writeable
            assert np.array_equal(image, before)
        assert min(shape[:2]) < 32 or not np.array_equal(result, image)  # of severity 5


@pytest.mark.parametrize("kind", KINDS)
def test_gray_is_one_channel_of_what_color_gives(kind, frost):
    gray = scene(32, channels=1)
    assert np.array_equal(
        corrupt(gray, kind, 3, 1, frost=frost)[..., 0], corrupt(gray[..., 0], kind, 3, 1, frost=frost)
    )
    same = corrupt(gray.repeat(3, axis=2), kind, 3, 1, frost=frost)
    by_channel = kind.endswith("noise") or kind in ("jpeg_compression", "frost")
    assert by_channel or np.array_equal(same[..., 1:2], corrupt(gray, kind, 3, 1, frost=frost))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_depends_on_kind_severity_and_number_alone(kind, frost):
    image = scene(32)
    keys = [(severity, number) for severity in (1, 5) for number in (0, 7, 2**40)]
    first = [corrupt(image, kind, *key, frost=frost) for key in keys]
    np.random.default_rng(0).normal()
    for key, expected in reversed(list(zip(keys, first, strict=True))):
        assert np.array_equal(corrupt(image, kind, *key, frost=frost), expected)
    assert len({image.tobytes() for image in first[3:]}) == (1 if kind in RANDOM_FREE else 3)  # of severity 5


# Severities after which the published strengths come nearer to the clean image: glass has more blur, which undoes
# swaps, or fewer rounds, snow a higher threshold, elastic a smaller affine map; streaks of radius 6 and 8 are the
# same, fog is rougher and all of it scaled down more, and to pixelate by 0.4 cuts these edges where 0.5 does not.
NEARER = {
    ("glass_blur", 32): {2, 4},
    ("motion_blur", 32): {3},
    ("elastic_transform", 32): {1, 2, 3, 4},
    ("snow", 224): {2},
    ("fog", 224): {4},
    ("elastic_transform", 224): {2, 4},
    ("pixelate", 224): {2},
}


@pytest.mark.parametrize("side", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_distance_from_the_clean_image_grows_with_severity(kind, side, tmp_path):
    Image.fromarray(scene(600, 700)[:, :, ::-1]).save(tmp_path / "ice.png")

    def distance(number, severity):
        image = np.roll(scene(side), (5 * number, 3 * number), (0, 1))
        corrupted = corrupt(image, kind, severity, number, frost=tmp_path)
        if kind == "frost":  # it dims the image as well, which is no distance here
            return 1 - np.corrcoef(image.ravel(), corrupted.ravel())[0, 1]
        return np.abs(corrupted - image.astype(float)).mean()

    mean = [np.mean([distance(n, s) for n in range(24 if side == 32 else 4)]) for s in range(1, 6)]
    assert mean[0] > 0
    assert {s for s in range(1, 5) if mean[s - 1] >= mean[s]} == NEARER.get((kind, side), set())
    assert kind == "elastic_transform" or mean[4] > mean[0]


# sha256 of severity 3 of image 1, at 32 and 224 px. JPEG is left out: its codec is Pillow's. None of numpy's versions
# may change these; a change of ours would make old results no longer comparable.
STORED = {
    "gaussian_noise": ("569a2d3400ccce15", "41aa2c8b38cfd3b7"),
    "shot_noise": ("54379c1d2f691158", "3c7647dd1b7ca441"),
    "impulse_noise": ("2c310a18dba2d225", "b0db088c0b9a5d5b"),
    "defocus_blur": ("6b89124224be08e2", "04048b1fab42c008"),
    "glass_blur": ("deff619689eed367", "c6d6e97a85440682"),
    "motion_blur": ("dede92dfd8c4530b", "cac6019779a8bdc3"),
    "zoom_blur": ("d5bba0074e066eec", "14ab480aec98bc06"),
    "snow": ("bfb7e91a2e3439fc", "a2b005b1eb771976"),
    "fog": ("0786308b7ac21ab5", "e2eebe229e666ea9"),
    "brightness": ("f7041484f0f9679f", "75dc70964f3123e7"),
    "contrast": ("4d25590a3152e0e6", "eeb8162144595758"),
    "elastic_transform": ("25604ca7c6c5c499", "debcfa5514d6cd1e"),
    "pixelate": ("b3d30d6580f9b7d1", "43778481ac553a06"),
}


@pytest.mark.parametrize("kind", STORED)
def test_images_are_those_that_they_always_were(kind):
    found = [hashlib.sha256(corrupt(scene(side), kind, 3, 1)).hexdigest()[:16] for side in COLUMNS]
    assert found == list(STORED[kind])


def test_another_process_makes_the_same_image():
    """Whatever its hash seed is."""
    program = (
        "import hashlib, numpy as np; from qdeploy.training.corruptions import corrupt;"
        "image = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3);"
        "print(hashlib.sha256(corrupt(image, 'snow', 2, 9)).hexdigest())"
    )
    image = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == hashlib.sha256(corrupt(image, "snow", 2, 9)).hexdigest()


def test_lengths_in_pixels_are_scaled_from_the_nearer_column():
    strength = corruptions._KINDS["glass_blur"].strength  # sigma, max delta, rounds
    assert strength(5, 32) == (0.4, 1, 2) and strength(5, 224) == (1.5, 4, 2)
    assert strength(5, 64) == (0.8, 2, 2) and strength(5, 84) == pytest.approx((1.05, 2.625, 2))
    assert strength(5, 85) == pytest.approx((1.5 * 85 / 224, 4 * 85 / 224, 2)) and strength(5, 448) == (3, 8, 2)
    assert corruptions._KINDS["elastic_transform"].strength(5, 224) == pytest.approx((29.28, 2.44, 4.88))
    assert corruptions._KINDS["frost"].strength(5, 16) == (0.75, 0.45, 0.1)
    assert corruptions._KINDS["zoom_blur"].strength(5, 64) == (1.26, 0.01)
    assert all(len(k.small) == len(k.large) == 5 for k in corruptions._KINDS.values())


# ---- Each kind ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", COLUMNS)
@pytest.mark.parametrize("severity", [1, 5])
def test_gaussian_noise_has_its_std(side, severity):
    (std,) = strengths("gaussian_noise", side)[severity - 1]
    gray = np.full((side, side, 3), 128, np.uint8)
    noise = np.stack([corrupt(gray, "gaussian_noise", severity, n) for n in range(8)]) / 255 - 128 / 255
    if std < 0.3:  # beyond, 0 and 1 cut it
        assert abs(noise.mean()) < 4 * std / noise.size**0.5
        assert noise.std() == pytest.approx(std, rel=0.02)
    assert_rounded(
        corrupt(gray, "gaussian_noise", severity, 4),
        128 / 255 + draws("gaussian_noise", severity, 4).normal(0, std, gray.shape),
    )


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_shot_noise_counts_photons(severity):
    (photons,) = strengths("shot_noise", 32)[severity - 1]
    gray = np.full((32, 32, 3), 128, np.uint8)
    levels = np.stack([corrupt(gray, "shot_noise", severity, n) for n in range(16)])
    assert levels.mean() == pytest.approx(128, abs=4 * 255 * (0.5 / photons / levels.size) ** 0.5 + 0.05)
    assert (levels / 255).var() == pytest.approx(128 / 255 / photons, rel=0.05)
    counts = levels / 255 * photons
    assert np.abs(counts - np.rint(counts)).max() <= photons / 510 + 1e-9  # as far as rounding to levels takes them
    assert not corrupt(np.zeros_like(gray), "shot_noise", severity, 0).any()  # no light, no noise


@pytest.mark.parametrize("side", COLUMNS)
@pytest.mark.parametrize("severity", [1, 5])
def test_impulse_noise_is_salt_and_pepper(side, severity):
    (share,) = strengths("impulse_noise", side)[severity - 1]
    gray = np.full((side, side, 3), 100, np.uint8)
    levels = np.stack([corrupt(gray, "impulse_noise", severity, n) for n in range(12)])
    assert set(np.unique(levels)) == {0, 100, 255}
    deviation = 4 * (share / 2 / levels.size) ** 0.5
    assert np.mean(levels == 0) == pytest.approx(share / 2, abs=deviation)
    assert np.mean(levels == 255) == pytest.approx(share / 2, abs=deviation)
    changed = levels != 100
    both = np.mean(changed[..., 0] & changed[..., 1])
    assert both == pytest.approx(share**2, abs=4 * share / (levels.size / 3) ** 0.5)  # channels are independent


@pytest.mark.parametrize("radius, alias", [s for side in COLUMNS for s in strengths("defocus_blur", side)])
def test_disks_have_a_sum_of_1_and_all_their_symmetries(radius, alias):
    kernel = filters.disk(radius, alias)
    assert kernel.sum() == pytest.approx(1, abs=1e-12) and kernel.min() > -1e-15
    np.testing.assert_allclose(kernel, kernel.T, atol=1e-15)
    np.testing.assert_allclose(kernel, kernel[::-1], atol=1e-15)
    middle = len(kernel) // 2
    assert kernel[middle, middle] == pytest.approx(
        1 / sum(x * x + y * y <= radius**2 for x in range(-10, 11) for y in range(-10, 11)),
        rel=1e-2 if radius >= 3 else 1,
    )


@pytest.mark.parametrize("severity", range(1, 6))
def test_defocus_blur_is_a_convolution_with_the_disk(severity):
    radius, alias = strengths("defocus_blur", 32)[severity - 1]
    bell = np.exp(-np.array([1, 0, 1]) / (2 * alias**2))
    bell /= bell.sum()
    disk = np.zeros((7, 7))
    for y, x in np.ndindex(7, 7):
        disk[y, x] = (y - 3) ** 2 + (x - 3) ** 2 <= radius**2
    kernel = np.zeros((7, 7))
    for y, x in np.ndindex(5, 5):
        kernel[y + 1, x + 1] = (disk[y : y + 3, x : x + 3] * np.outer(bell, bell)).sum() / disk.sum()
    image = scene(32, 33)
    padded = np.pad(image / 255, [(3, 3), (3, 3), (0, 0)], mode="reflect")
    expected = np.zeros(image.shape)
    for y, x in np.ndindex(32, 33):
        expected[y, x] = np.einsum("yx,yxc->c", kernel, padded[y : y + 7, x : x + 7])
    assert_rounded(corrupt(image, "defocus_blur", severity, 0), expected)


@pytest.mark.parametrize("borders", ["edge", "symmetric"])
@pytest.mark.parametrize("sigma, truncate", [(0, 3), (0.05, 4), (0.4, 4), (1.5, 4), (9, 3)])
def test_smoothing_is_a_gaussian_along_both_axes(sigma, truncate, borders):
    x = scene(11, 14) / 255
    reach = int(truncate * sigma + 0.5)
    weights = [1.0] if reach == 0 else np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weights = np.array(weights) / np.sum(weights)
    expected = x
    for axis in (0, 1):
        width = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(expected, width, mode=borders)
        expected = np.apply_along_axis(lambda line: np.convolve(line, weights, "valid"), axis, padded)
    np.testing.assert_allclose(filters.smooth(x, sigma, truncate, borders), expected, atol=1e-13)


def test_glass_blur_without_blur_swaps_pixels():
    """A sigma of 0.05 pixels blurs nothing, so that severity 1 is the swaps alone."""
    image = np.arange(20 * 30, dtype=np.uint16).view(np.uint8).reshape(20, 30, 2)
    image = np.concatenate([image, image[..., :1]], axis=2)  # each pixel is another one
    expected, rng = image.copy(), draws("glass_blur", 1, 6)
    down, right = rng.integers(-1, 1, (2, 19, 29))
    for i, row in enumerate(range(19, 0, -1)):
        for j, column in enumerate(range(29, 0, -1)):
            other = row + down[i, j], column + right[i, j]
            kept = expected[row, column].copy()
            expected[row, column] = expected[other]
            expected[other] = kept
    result = corrupt(image, "glass_blur", 1, 6)
    assert np.array_equal(result, expected)
    assert sorted(map(bytes, result.reshape(-1, 3))) == sorted(map(bytes, image.reshape(-1, 3)))


@pytest.mark.parametrize("height, width, delta, rounds", [(8, 8, 1, 1), (9, 13, 2, 3), (40, 33, 4, 2)])
def test_glass_shuffles_all_pixels_and_loses_none(height, width, delta, rounds):
    order = corruptions._shuffled(height, width, delta, rounds, np.random.default_rng(1))
    assert sorted(order) == list(range(height * width))
    assert np.mean(np.array(order) == np.arange(height * width)) < 0.3


@pytest.mark.parametrize("degrees", [-45, -90, 0, 33.3])
def test_streaks_are_half_a_gaussian_along_an_angle(degrees):
    x = scene(9, 12) / 255
    weights = [np.exp(-(i**2) / (2 * 1.5**2)) for i in range(7)]
    expected = np.zeros_like(x)
    for row, column in np.ndindex(9, 12):
        for i, weight in enumerate(weights):
            down = row + round(i * np.sin(np.radians(degrees)))
            right = column + round(i * np.cos(np.radians(degrees)))
            expected[row, column] += weight / sum(weights) * x[min(max(down, 0), 8), min(max(right, 0), 11)]
    np.testing.assert_allclose(filters.streaks(x, 3, 1.5, degrees), expected, atol=1e-14)


def test_motion_blur_is_nearer_to_horizontal_than_to_vertical():
    line = np.zeros((33, 33), np.uint8)
    line[16] = 255
    for number in range(20):
        blurred = corrupt(line, "motion_blur", 5, number) / 255
        assert blurred[:, 16].sum() == pytest.approx(1, abs=0.03)  # of a line across, all light stays in its column
        assert blurred[16, 16] > 0.1
    assert len({corrupt(line, "motion_blur", 5, n).tobytes() for n in range(20)}) > 10


@pytest.mark.parametrize("side", [16, 100])
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_zoom_blur_is_the_mean_of_enlargements(side, severity):
    factors = {
        (16, 1): [1, 1.01, 1.02, 1.03, 1.04, 1.05],
        (16, 3): [1 + i / 100 for i in range(16)],
        (16, 5): [1 + i / 100 for i in range(26)],
        (100, 1): [1 + i / 100 for i in range(11)],
        (100, 3): [1 + i / 50 for i in range(11)],
        (100, 5): [1, 1.03, 1.06, 1.09, 1.12, 1.15, 1.18, 1.21, 1.24, 1.27, 1.3],
    }[side, severity]
    image = scene(side)[:, : side - 1]
    x = image / 255
    expected = x.copy()
    for factor in factors:
        layer = x
        for axis in (0, 1):
            line = np.moveaxis(layer, axis, 0)
            crop = int(np.ceil(len(line) / factor))
            first = (len(line) - crop) // 2
            large = round(crop * factor)
            places = np.linspace(first, first + crop - 1, large)[(large - len(line)) // 2 :][: len(line)]
            flat = line.reshape(len(line), -1)
            columns = [np.interp(places, np.arange(len(line)), flat[:, i]) for i in range(flat.shape[1])]
            layer = np.moveaxis(np.stack(columns, axis=1).reshape(line.shape), 0, axis)
        expected = expected + layer
    assert_rounded(corrupt(image, "zoom_blur", severity, 0), expected / (len(factors) + 1))


def test_snow_whitens_and_falls_twice():
    x = scene(32) / 255
    rng = np.random.default_rng(3)
    none = corruptions._snow(x, rng, 0, 0, 1, 0.5, 4, 1, 0.8)
    gray = 0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2]
    np.testing.assert_allclose(none, 0.8 * x + 0.2 * np.maximum(x, 1.5 * gray[..., None] + 0.5), atol=1e-15)
    flakes = corruptions._snow(x, rng, 0.1, 0.3, 2, 0.5, 4, 1, 0.8) - none
    np.testing.assert_allclose(flakes, np.rot90(flakes, 2), atol=1e-15)
    np.testing.assert_allclose(flakes, flakes[..., :1].repeat(3, axis=2), atol=1e-15)
    assert flakes.min() > -1e-15 and 0.02 < flakes.mean() < 0.2


def test_frost_adds_a_crop_of_a_photograph(tmp_path):
    ice = scene(400, 500)
    Image.fromarray(ice).save(tmp_path / "ice.png")
    image = scene(40, 32) // 2  # so that no sum is beyond 255
    places = []
    for number in range(5):
        added = (corrupt(image, "frost", 2, number, frost=tmp_path) - image.astype(float)) / 0.3
        grid = ice[2::5, 2::5] / 1.0  # every fifth pixel: at 32 px photographs are reduced by 0.2
        fits = [
            (top, left)
            for top in range(80 - 40 + 1)
            for left in range(100 - 32 + 1)
            if np.abs(grid[top : top + 40, left : left + 32] - added).max() <= 0.5 / 0.3 + 1e-9
        ]
        assert len(fits) == 1
        places += fits
    assert len(set(places)) == 5


def test_frost_of_one_gray_is_exact_and_small_photographs_are_enlarged(tmp_path):
    Image.fromarray(np.full((10, 12, 3), 90, np.uint8)).save(tmp_path / "ice.png")
    for side, severity, keep, add in [(32, 5, 0.75, 0.45), (224, 1, 1, 0.4), (224, 5, 0.6, 0.75)]:
        image = scene(side, side + 7)
        assert_rounded(corrupt(image, "frost", severity, 0, frost=tmp_path), (keep * image + add * 90.0) / 255)


def test_frost_uses_every_photograph(tmp_path):
    for level in (100, 160, 200):
        Image.fromarray(np.full((20, 20), level, np.uint8)).save(tmp_path / f"{level}.png")
    black = np.zeros((16, 16), np.uint8)
    assert {corrupt(black, "frost", 5, n, frost=tmp_path).max() for n in range(20)} == {45, 72, 90}


@pytest.mark.parametrize("side, decay", [(2, 3), (8, 1.75), (32, 2.5)])
def test_plasma_is_diamond_square_on_a_torus(side, decay):
    rng = np.random.default_rng(7)
    heights = np.zeros((side, side))
    step, amplitude = side, 1.0
    while step > 1:
        half = step // 2
        for offsets, sides in [  # of the points to fill, and of their four neighbors
            ((half, half), [(-half, -half), (-half, half), (half, -half), (half, half)]),
            ((0, half), [(0, -half), (0, half), (-half, 0), (half, 0)]),
            ((half, 0), [(0, -half), (0, half), (-half, 0), (half, 0)]),
        ]:
            for y in range(offsets[0], side, step):
                for x in range(offsets[1], side, step):
                    around = [heights[(y + dy) % side, (x + dx) % side] for dy, dx in sides]
                    heights[y, x] = sum(around) / 4 + rng.uniform(-amplitude, amplitude)
        step, amplitude = half, amplitude / decay**2
    expected = (heights - heights.min()) / (heights.max() - heights.min())
    result = filters.plasma(side, decay, np.random.default_rng(7))
    np.testing.assert_allclose(result, expected, atol=1e-13)
    assert result.min() == 0 and result.max() == 1


@pytest.mark.parametrize("side, power", [(32, 32), (28, 32), (33, 64), (224, 256)])
def test_fog_covers_without_brightening_the_brightest(side, power):
    strength, decay = strengths("fog", 32 if side < 85 else 224)[4]
    image = scene(side, side - 1)
    top = image.max() / 255
    haze = filters.plasma(power, decay, draws("fog", 5, 2))[:side, : side - 1, None]
    result = corrupt(image, "fog", 5, 2)
    assert_rounded(result, (image / 255 + strength * haze) * top / (top + strength))
    assert result.max() <= image.max()
    assert not corrupt(np.zeros((side, side), np.uint8), "fog", 5, 2).any()


@pytest.mark.parametrize("side", COLUMNS)
@pytest.mark.parametrize("severity", [1, 5])
def test_brightness_raises_the_value_of_hsv(side, severity):
    (lift,) = strengths("brightness", side)[severity - 1]
    image = np.random.default_rng(2).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image[0, 0], image[0, 1], image[0, 2] = 0, 255, (0, 0, 9)
    expected = image / 255
    for place in np.ndindex(*((side, side) if side == 32 else (9, 9))):
        hue, saturation, value = colorsys.rgb_to_hsv(*expected[place])
        expected[place] = colorsys.hsv_to_rgb(hue, saturation, min(value + lift, 1))
    result = corrupt(image, "brightness", severity, 0)
    part = np.s_[:32, :32] if side == 32 else np.s_[:9, :9]
    assert_rounded(result[part], expected[part])


@pytest.mark.parametrize("side", COLUMNS)
def test_contrast_shrinks_differences_from_the_mean(side):
    image = scene(side)
    for severity, (factor,) in enumerate(strengths("contrast", side), 1):
        mean = [image[..., c].astype(int).sum() / side**2 / 255 for c in range(3)]
        assert_rounded(corrupt(image, "contrast", severity, 0), image / 255 * factor + np.array(mean) * (1 - factor))


def test_elastic_transform_moves_three_points():
    """Severity 1 at 32 px is the affine map alone. Of a slope the result says where each pixel came from."""
    height, width = 36, 33
    row, column = np.mgrid[:height, :width]
    image = np.stack([7 * row, 7 * column, np.zeros_like(row)], axis=2).astype(np.uint8)
    points = np.array([[16 + 11, 18 - 11], [16 + 11, 18 + 11], [16 - 11, 18 - 11]])  # x, y around the center 16, 18
    for number in range(4):
        reach = 2.56 * 33 / 32
        moved = points + draws("elastic_transform", 1, number).uniform(-reach, reach, (3, 2))
        back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)  # [x, y, 1] @ back is the source
        source = np.stack([column, row, np.ones_like(row)], axis=2) @ back
        inside = (source >= 0).all(axis=2) & (source[..., 0] <= width - 1) & (source[..., 1] <= height - 1)
        assert inside.mean() > 0.7
        result = corrupt(image, "elastic_transform", 1, number)
        assert_rounded(result[inside][:, :2], 7 * source[inside][:, ::-1] / 255)


@pytest.mark.parametrize("severity", [2, 5])
def test_elastic_transform_then_moves_every_pixel(severity):
    alpha, sigma, affine = strengths("elastic_transform", 32)[severity - 1]
    image = scene(32)
    rng = draws("elastic_transform", severity, 3)
    points = np.array([[26, 6], [26, 26], [6, 6]])
    back = np.linalg.solve(np.column_stack([points + rng.uniform(-affine, affine, (3, 2)), np.ones(3)]), points)
    row, column = np.mgrid[:32, :32]
    x, y = np.moveaxis(np.stack([column, row, np.ones_like(row)], axis=2) @ back, 2, 0)
    warped = bilinear(image / 255, y, x)
    reach = int(3 * sigma + 0.5)
    bell = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    fields = []
    for _ in range(2):
        field = np.pad(rng.uniform(-1, 1, (32, 32)), reach, mode="symmetric")
        for axis in (0, 1):
            field = np.apply_along_axis(lambda line: np.convolve(line, bell / bell.sum(), "valid"), axis, field)
        fields.append(alpha * field)
    assert_rounded(
        corrupt(image, "elastic_transform", severity, 3), bilinear(warped, row + fields[0], column + fields[1])
    )


def bilinear(x, row, column):
    """Pixel by pixel, on an image that is mirrored far beyond its borders."""
    far = np.pad(x, [(64, 64), (64, 64), (0, 0)], mode="symmetric")
    result = np.zeros((*row.shape, x.shape[2]))
    for i, j in np.ndindex(*row.shape):
        y, x = row[i, j] + 64, column[i, j] + 64
        top, left = int(y), int(x)
        for a in (0, 1):
            for b in (0, 1):
                result[i, j] += abs(1 - a - y + top) * abs(1 - b - x + left) * far[top + a, left + b]
    return result


def test_pixelate_of_a_half_is_the_mean_of_four():
    image = scene(96, 100).astype(int)
    pairs = (image[:, ::2] + image[:, 1::2] + 1) // 2  # Pillow rounds after the columns and after the rows
    blocks = (pairs[::2] + pairs[1::2] + 1) // 2
    expected = blocks.repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(corrupt(image.astype(np.uint8), "pixelate", 2, 0), expected)


def test_pixelate_and_jpeg_are_those_of_pillow():
    for side in COLUMNS:
        image = scene(side, side + 4)
        for severity in range(1, 6):
            (scale,), (quality,) = (strengths(kind, side)[severity - 1] for kind in KINDS[-2:])
            picture = Image.fromarray(image)
            small = picture.resize((int((side + 4) * scale), int(side * scale)), Image.Resampling.BOX)
            expected = np.asarray(small.resize(picture.size, Image.Resampling.BOX))
            assert np.array_equal(corrupt(image, "pixelate", severity, 0), expected)
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=quality)
            with Image.open(file) as decoded:
                assert np.array_equal(corrupt(image, "jpeg_compression", severity, 0), np.asarray(decoded))


# ---- The files of CIFAR-10-C ----------------------------------------------------------------------------------------


@pytest.fixture
def images():
    return np.stack([np.roll(scene(16), n, 0) for n in range(7)])


def test_files_are_as_those_of_cifar_10_c(images, tmp_path, monkeypatch):
    monkeypatch.setattr(corruptions, "CHUNK", 3)
    labels = [3, 1, 4, 1, 5, 9, 255]
    write_cifar_c(images, labels, tmp_path / "new" / "c", workers=1)
    assert sorted(os.listdir(tmp_path / "new" / "c")) == sorted(f"{name}.npy" for name in [*available(), "labels"])
    read = np.load(tmp_path / "new" / "c" / "labels.npy")
    assert read.dtype == np.uint8 and read.tolist() == labels * 5
    for kind in available():
        array = np.load(tmp_path / "new" / "c" / f"{kind}.npy", mmap_mode="r")
        assert array.shape == (35, 16, 16, 3) and array.dtype == np.uint8
        for severity in range(1, 6):
            for number, image in enumerate(images):
                expected = corrupt(image, kind, severity, number)
                assert np.array_equal(array[(severity - 1) * 7 + number], expected)


def test_the_number_of_processes_changes_no_bit(images, tmp_path, frost, monkeypatch):
    monkeypatch.setattr(corruptions, "CHUNK", 2)
    kinds = ("frost", "snow")
    for workers in (1, 2):
        write_cifar_c(images[..., 0], np.arange(7), tmp_path / str(workers), kinds=kinds, frost=frost, workers=workers)
    assert len(os.listdir(tmp_path / "1")) == 3
    for name in os.listdir(tmp_path / "1"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_file_is_there_as_a_whole_or_not_at_all(images, tmp_path, monkeypatch):
    write_cifar_c(images, np.zeros(7, int), tmp_path, kinds=["fog", "snow"], workers=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(image, kind, severity, number, *, frost=None):
        if (kind, severity) == ("snow", 4):
            raise KeyboardInterrupt
        return corrupt(image[::-1], kind, severity, number)

    monkeypatch.setattr(corruptions, "corrupt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_cifar_c(images, np.ones(7, int), tmp_path, kinds=["fog", "snow"], workers=1)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"fog.npy"}


def test_the_lines_of_the_docs_run(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    lines = page.partition("## Corruptions\n")[2].partition("\n## ")[0].splitlines()
    known = {"images": np.concatenate([images, images]), "labels": np.arange(14)}
    exec(
        "\n".join(x.strip() for x in lines if x.startswith("    ") and not x.startswith(("    pip", "    python"))),
        known,
    )
    assert np.array_equal(np.load("cifar-c/fog.npy")[2 * 14 + 7], known["worse"])
    assert len(os.listdir("cifar-c")) == 15


def test_a_process_that_dies_is_one_line():
    expected = re.escape("expected 2 processes that finish, got one that died (no memory, or a script that does not")
    with pytest.raises(InputError, match=expected), parallel_map(2) as run:
        list(run(os._exit, [3]))


# ---- Bad input ------------------------------------------------------------------------------------------------------

SHAPES = "expected [8 or more, 8 or more], then no, 1 or 3 channels, got"


@pytest.mark.parametrize(
    "change, text",
    [
        ({"severity": 0}, "expected at least 1, got 0 - at severity"),
        ({"severity": 6}, "expected at most 5, got 6 - at severity"),
        ({"severity": 2.0}, "expected an integer, got 2.0 - at severity"),
        ({"severity": True}, "expected an integer, got True - at severity"),
        ({"number": -1}, "expected at least 0, got -1 - at number"),
        ({"number": None}, "expected an integer, got None - at number"),
        ({"kind": "gauss"}, f"expected one of {', '.join(KINDS)}, got 'gauss' - at kind"),
        ({"kind": None}, f"expected one of {', '.join(KINDS)}, got None - at kind"),
        ({"kind": "frost"}, "expected a folder of frost photographs, got none - at frost"),
        ({"image": np.zeros((32, 32, 3))}, "expected uint8 pixels, got float64 - at image"),
        ({"image": np.full((32, 32), np.nan, np.float32)}, "expected uint8 pixels, got float32 - at image"),
        ({"image": [[1, 2], [3, 4]]}, "expected uint8 pixels, got list - at image"),
        ({"image": np.zeros((1, 1, 3), np.uint8)}, f"{SHAPES} [1, 1, 3] - at image"),
        ({"image": np.zeros((32, 7), np.uint8)}, f"{SHAPES} [32, 7] - at image"),
        ({"image": np.zeros((0, 0, 3), np.uint8)}, f"{SHAPES} [0, 0, 3] - at image"),
        ({"image": np.zeros((32, 32, 4), np.uint8)}, f"{SHAPES} [32, 32, 4] - at image"),
        ({"image": np.zeros((3, 32, 32), np.uint8)}, f"{SHAPES} [3, 32, 32] - at image"),
        ({"image": np.zeros((2, 32, 32, 3), np.uint8)}, f"{SHAPES} [2, 32, 32, 3] - at image"),
        ({"image": np.zeros(32, np.uint8)}, f"{SHAPES} [32] - at image"),
    ],
)
def test_what_does_not_fit_is_one_line(change, text):
    with pytest.raises(InputError) as error:
        corrupt(**{"image": scene(32), "kind": "fog", "severity": 1, "number": 0, **change})
    assert str(error.value) == text


def test_photographs_that_are_none_are_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError) as error:
            corrupt(scene(32), "frost", 1, 0, frost=folder)
        assert str(error.value) == f"expected photographs of frost (.jpg, .jpeg, .png), got none - at {folder}"
    (tmp_path / "ice.png").write_bytes(b"ice")
    with pytest.raises(InputError, match=r"^expected a JPEG or PNG image, got .* - at .*ice.png$"):
        corrupt(scene(32), "frost", 1, 0, frost=tmp_path)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"images": np.zeros((2, 16, 16), np.float32)}, "expected uint8 pixels, got float32 - at images"),
        (
            {"images": np.zeros((2, 3), np.uint8)},
            "expected [N, 8 or more, 8 or more], then no, 1 or 3 channels, got [2, 3]",
        ),
        ({"images": np.zeros((0, 16, 16), np.uint8)}, "expected one image or more, got [2] - at labels"),
        ({"labels": [1]}, "expected a label for each of 2 images, got [1] - at labels"),
        ({"labels": [0, 256]}, "expected classes of 0 to 255, got 0 to 256 - at labels"),
        ({"labels": [-1, 0]}, "expected classes of 0 to 255, got -1 to 0 - at labels"),
        ({"labels": [0.5, np.nan]}, "expected classes of 0 to 255, got float64 - at labels"),
        ({"labels": ["cat", "dog"]}, "expected classes of 0 to 255, got <U3 - at labels"),
        ({"kinds": ["fog", "smog"]}, f"expected one of {', '.join(KINDS)}, got 'smog' - at kind"),
        ({"kinds": ["frost"]}, "expected a folder of frost photographs, got none - at frost"),
        ({"workers": 0}, "expected at least 1, got 0 - at workers"),
    ],
)
def test_files_of_what_does_not_fit_are_not_begun(change, text, tmp_path):
    folder = tmp_path / "c"
    with pytest.raises(InputError) as error:
        write_cifar_c(**{"images": np.zeros((2, 16, 16), np.uint8), "labels": [0, 1], "folder": folder, **change})
    assert str(error.value).startswith(text) and not folder.exists()
