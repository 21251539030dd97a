"""Calibration data in every form in which people hold them: the same images come out, or one line says why not."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import UserDict, deque

import numpy as np
import pytest

from qdeploy import calibration
from qdeploy.calibration import batches, count_batches
from qdeploy.errors import InputError

torch = pytest.importorskip("torch", reason="the exporter needs it: pip install 'qdeploy[train]'")
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset  # noqa: E402

SHAPE = (3, 4, 5)
X = np.random.default_rng(0).standard_normal((70, *SHAPE)).astype(np.float32)
Y = np.arange(70) % 7
T, L = torch.from_numpy(X), torch.from_numpy(Y)


class Images(Dataset):
    """As torchvision's: an index beyond the end is not an IndexError, so that `iter` would find no end."""

    def __len__(self):
        return 70

    def __getitem__(self, index):
        return X[index % 70], int(Y[index % 70])


class Rows(Images):
    def __getitem__(self, index):
        return {"label": 1, "image": T[index % 70]}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(T)


class WithoutLength:
    """A loader as some are."""

    def __len__(self):
        raise ValueError("endless")

    def __iter__(self):
        return iter(T.split(16))


class Lazy:
    """An array on disk."""

    shape, ndim = X.shape, X.ndim

    def __getitem__(self, part):
        return X[part]


HELD = {
    "array": X,
    "tensor": T,
    "float64": X.astype(np.float64),
    "big-endian": X.astype(">f4"),
    "not contiguous": np.asfortranarray(X),
    "with gradient": T.clone().requires_grad_(),
    "lazy array": Lazy(),
    "list of arrays": [X[:30], X[30:]],
    "batches of all sizes, one empty": (X[:1], X[1:1], X[1:69], T[69:]),
    "deque": deque(T.split(9)),
    "generator": (batch for batch in T.split(9)),
    "tuples": [(X[:40], Y[:40]), (X[40:], Y[40:])],
    "lists": [[T[:40], L[:40]], [T[40:], L[40:]]],
    "images and targets": [(T[:40], T[:40]), (T[40:], T[40:])],
    "nested": [((T[:40], None), Y), [[T[40:]], Y]],
    "a batch with labels": [T, L],
    "a batch with labels and weights": (X, Y, Y / 7),
    "dicts": [{"label": Y[:40], "image": X[:40]}, {"pixel_values": T[40:], "image": None}],
    "a dict": {"x": T, "y": L},
    "a dict of another name": UserDict(photo=T, mask=T > 0, label=L),
    "dict with labels": [({"images": X}, Y)],
    "loader": DataLoader(TensorDataset(T, L), batch_size=16),
    "loader of dicts": DataLoader(Rows(), batch_size=16),
    "loader without batches": DataLoader(Images(), batch_size=None),
    "loader of a stream": DataLoader(Stream(), batch_size=16),
    "loader without length": WithoutLength(),
    "dataset": Images(),
    "dataset of tensors": TensorDataset(T, L),
    "dataset of dicts": Rows(),
    "stream of images": Stream(),
    "list of images": list(X),
    "generator of labelled images": zip(T, Y, strict=True),
}


@pytest.mark.parametrize("form", HELD)
def test_all_forms_hold_the_same_images(form):
    found = list(batches(HELD[form], SHAPE))
    assert all(batch.dtype == np.float32 and batch.flags.c_contiguous and len(batch) for batch in found)
    assert np.array_equal(np.concatenate(found), X)


@pytest.mark.parametrize("form", sorted(set(HELD) - {"list of images", "generator of labelled images"} -
                                        {"generator", "loader without batches"}))  # fmt: skip
def test_datasets_are_stacked_without_an_example(form):
    assert np.array_equal(np.concatenate(list(batches(HELD[form]))), X)


def test_arrays_and_datasets_become_batches_of_32():
    for data in (X, T, Lazy(), Images(), Stream(), {"image": X}, [T, L]):
        assert [len(batch) for batch in batches(data, SHAPE)] == [32, 32, 6]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_width(dtype):
    (found,) = batches([T.to(dtype)], SHAPE)
    assert np.array_equal(found, T.to(dtype).float().numpy())


def test_batches_are_counted_where_the_data_say():
    counts = {"array": 3, "lazy array": 3, "dataset": 3, "tuples": 2, "loader": 5, "a batch with labels": 3}
    assert {form: count_batches(HELD[form]) for form in counts} == counts
    for data in (WithoutLength(), Stream(), DataLoader(Stream()), iter([X])):
        assert count_batches(data) is None


def test_endless_data_end(monkeypatch):
    monkeypatch.setattr(calibration, "MOST_BATCHES", 4)
    text = r"expected at most 4 batches of calibration data, got more \(the first 4 were used\)"
    for data in (itertools.repeat(T[:2]), (T[: 2 - i % 2] for i in itertools.count()), itertools.cycle(X[:2])):
        with pytest.warns(UserWarning, match=text):
            assert len(list(batches(data, SHAPE))) == 4
    with pytest.warns(UserWarning, match=text), pytest.raises(InputError, match="at least one image, got none"):
        list(batches(itertools.repeat(X[:0]), SHAPE))
    assert len(list(batches(iter([X] * 4), SHAPE))) == 4  # as many as may be: no warning
    assert len(list(batches([X] * 9, SHAPE))) == 9  # a list ends


def test_no_more_is_read_than_wanted():
    source = iter([(X[:3], Y[:3])] * 10)
    assert len(list(batches(source, most=4))) == 4
    assert len(list(source)) == 6


def test_pixels_become_what_the_model_makes_of_them():
    pixels = np.random.default_rng(1).integers(0, 256, (40, 4, 5, 3), np.uint8)
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    real = (pixels.astype(np.float32) / np.float32(255) - np.float32([0.5, 0.4, 0.3])) / np.float32([0.2, 0.3, 0.4])
    for data in (pixels, torch.from_numpy(pixels), list(pixels), [{"image": pixels}]):
        assert np.array_equal(np.concatenate(list(batches(data, SHAPE, preprocess))), real.transpose(0, 3, 1, 2))
    for data, got in ((pixels.transpose(0, 3, 1, 2), r"\[32, 3, 4, 5\]"), ([pixels[0, 0]], r"\[5, 3\]")):
        with pytest.raises(InputError, match=rf"uint8 images \[N, 4, 5, 3\] for an example .*, got {got} - at batch 0"):
            list(batches(data, SHAPE, preprocess))


NAN = X.copy()
NAN[50, 1, 2, 3] = np.nan
BAD = {
    "an array .* or an iterable of batches, got str - at calibration": "images/",
    "an array .* or an iterable of batches, got NoneType": None,
    "an array .* or an iterable of batches, got function": lambda: X,
    "arrays or tensors, or tuples that begin with one, got str - at batch 0 of the calibration data": ["image.png"],
    "arrays or tensors, or tuples that begin with one, got float - at batch 1": [X, [0.5, 1.0]],
    r"expected float32 images, got uint8 \(convert and scale": (X * 9).astype(np.uint8),
    r"expected float32 images, got bool \(.*\) - at batch 0": [T > 0],
    r"expected float32 images, got complex64 \(": [T + 1j],
    r"shape \[N, 3, 4, 5\] as the example has, got \[7, 3, 5, 4\] - at batch 1": [X, X[:7].swapaxes(2, 3)],
    r"shape \[N, 3, 4, 5\] as the example has, got \[4, 5\]": X[0, 0],
    "finite numbers, got NaN or infinity - at batch 1 of": NAN,
    "finite numbers, got NaN or infinity - at batch 0 of": X.astype(np.float64) * 1e300,
    "finite numbers, got NaN or infinity - at item 50 of": TensorDataset(torch.from_numpy(NAN)),
    "got a list of 70 \\(stack them\\) - at batch 0": [list(X)],
    "dense values, got Tensor without them .* - at batch 0": [T.to("meta")],
    r"dense values, got MaskedArray without them \(masked elements\)": [np.ma.masked_greater(X, 0)],
    "at least one image, got none - at the calibration data": [X[:0], {"x": T[:0]}],
    "one of the keys pixel_values, image, .*, got 2 of them among a, b, y - at batch 0": [{"a": X, "b": X, "y": 0}],
    "float array of two or more dimensions, got 0 of them among no keys - at the calibration data": {},
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_calibration_data(text):
    with pytest.raises(InputError, match=text) as error:
        list(batches(BAD[text], SHAPE))
    assert "\n" not in str(error.value)


def test_one_image_is_a_batch_where_its_shape_is_known():
    vectors = X.reshape(70, -1)
    for image, shape in ((X[0], SHAPE), (T[0], SHAPE), (vectors[0], (60,))):
        for data in (image, [image], {"image": image}):
            (found,) = batches(data, shape)
            assert np.array_equal(found, np.asarray(image)[None])


def test_without_an_example_images_have_one_size():
    sizes = [np.zeros((3, 4, 4), np.float32), np.zeros((3, 4, 5), np.float32)]

    class Mixed(Images):
        def __getitem__(self, index):
            return sizes[index % 2]

    with pytest.raises(InputError, match=r"images of one size, \[3, 4, 4\] as before, got \[3, 4, 5\] - at item 1"):
        list(batches(Mixed()))
    with pytest.raises(InputError, match=r"expected batches \[N, ...\], got shape \[70\] - at batch 0"):
        list(batches([X[:, 0, 0, 0]]))
    assert [batch.shape for batch in batches([image[None] for image in sizes])] == [(1, 3, 4, 4), (1, 3, 4, 5)]


def test_needs_numpy_alone():
    code = "import sys, qdeploy.calibration; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
