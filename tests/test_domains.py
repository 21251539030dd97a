"""Data of several domains: folders of images, what they are fingerprinted by, and random images."""

import os
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from qdeploy.errors import InputError
from qdeploy.training.domains import load_benchmark
from qdeploy.training.fingerprint import difference, fingerprint, with_any_size
from qdeploy.training.images import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture
def tree(tmp_path):
    """Two domains, of which the second lacks class `bear`; random images of several sizes and kinds."""
    rng = np.random.default_rng(0)
    for place, size in [
        ("photo/cat/1.jpg", (20, 30)),
        ("photo/bear/2.png", (40, 25)),
        ("photo/bear/1.JPG", (16, 16)),
        ("art/cat/1.jpeg", (64, 33)),
        ("art/dog/1.png", (33, 64)),
    ]:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    (tmp_path / "photo/cat/notes.txt").write_text("not an image")
    (tmp_path / "downloads").mkdir()
    return tmp_path


def test_folders_are_sorted_domains_with_common_classes(tree):
    benchmark = load_benchmark(str(tree), image_size=24)
    assert [d.name for d in benchmark.domains] == ["art", "photo"]
    assert benchmark.classes == ["bear", "cat", "dog"]
    art, photo = benchmark.domains
    assert art.labels.tolist() == [1, 2]  # numbered in the common list, though art has no bear
    assert photo.labels.tolist() == [0, 0, 1]
    assert [file.path for file in photo.files] == ["photo/bear/1.JPG", "photo/bear/2.png", "photo/cat/1.jpg"]
    batch = photo.batch(np.array([2, 0, 0]))
    assert batch.shape == (3, 3, 24, 24) and batch.dtype == torch.uint8 and batch.is_contiguous()
    assert torch.equal(batch[1], batch[2])
    assert benchmark.inputs.shape == (3, 24, 24)


def test_images_are_resized_and_normalized(tree):
    benchmark = load_benchmark(str(tree), image_size=24)
    image = benchmark.domains[0].batch(np.array([0]))
    with Image.open(tree / "art/cat/1.jpeg") as file:
        pixels = np.asarray(file.convert("RGB").resize((24, 24), Image.Resampling.BILINEAR))
    assert np.array_equal(image[0].permute(1, 2, 0).numpy(), pixels)
    expected = (pixels.astype(np.float32) / np.float32(255) - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    found = benchmark.inputs.for_network(image)
    assert found.dtype == torch.float32 and np.array_equal(found[0].permute(1, 2, 0).numpy(), expected)
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    found = load_benchmark("debug").inputs.for_network(every)
    assert np.array_equal(found.numpy(), every.numpy().astype(np.float32) / np.float32(255))


def test_augmentation_is_a_function_of_seed_step_domain_and_place(tree):
    domain = load_benchmark(str(tree), image_size=24).domains[1]
    positions = np.array([0, 0, 1, 2])
    first = domain.batch(positions, augment=(7, 100, 1))
    assert torch.equal(first, domain.batch(positions, augment=(7, 100, 1)))
    assert not torch.equal(first[0], first[1])
    for other in [(8, 100, 1), (7, 101, 1), (7, 100, 0)]:
        assert not torch.equal(first, domain.batch(positions, augment=other))


def test_a_share_of_a_minibatch_is_augmented_by_its_places_in_the_whole(tree):
    domain = load_benchmark(str(tree), image_size=24).domains[1]
    positions = np.array([0, 0, 1, 2, 0, 1])
    whole = domain.batch(positions, (7, 100, 1))
    for devices in (2, 3):
        for rank in range(devices):
            places = np.arange(6)[rank::devices]
            assert torch.equal(domain.batch(positions[places], (7, 100, 1), places), whole[places])


def test_a_damaged_image_is_named(tree):
    (tree / "art/cat/1.jpeg").write_bytes(b"not a jpeg")
    benchmark = load_benchmark(str(tree))
    got = "a file that Pillow does not know: put a good copy in its place"
    with pytest.raises(InputError, match=rf"^expected an image that can be read, got {got} - at .*art/cat/1\.jpeg$"):
        benchmark.domains[0].batch(np.array([0]))


def test_a_domain_that_is_left_out_does_not_renumber_the_others(tree):
    assert [(d.name, d.environment) for d in load_benchmark(str(tree)).domains] == [("art", 0), ("photo", 1)]
    assert [(d.name, d.environment) for d in load_benchmark(str(tree), ["photo"]).domains] == [("photo", 1)]


@pytest.mark.parametrize("other", ["Cat", unicodedata.normalize("NFD", "c\u00e4t")])
def test_classes_that_a_person_would_take_for_one_are_refused(tree, other):
    if other != "Cat":
        (tree / "photo/cat").rename(tree / "photo/c\u00e4t")
    (tree / "art/cat").rename(tree / "art" / other)
    expected = "expected classes whose names differ in more than case or encoding"
    with pytest.raises(InputError, match=f"^{expected}, got '.*' and '.*' - at {tree}$"):
        load_benchmark(str(tree))


def test_classes_are_names_that_a_model_file_can_hold(tree):
    (tree / "art" / "cat").rename(tree / "art" / os.fsdecode(b"caf\xe9"))
    with pytest.raises(InputError, match="^expected a name of 1 to 512 bytes without control characters, got .* - at "):
        load_benchmark(str(tree))


def test_chosen_domains_and_unknown_names(tree):
    assert [d.name for d in load_benchmark(str(tree), ["photo"]).domains] == ["photo"]
    with pytest.raises(InputError, match="expected one of art, photo, got 'sketch' - at the domains of"):
        load_benchmark(str(tree), ["sketch"])
    with pytest.raises(InputError, match="expected digits-dg, .*, debug or a folder .* got '/nonexistent' - at --data"):
        load_benchmark("/nonexistent")
    with pytest.raises(InputError, match="expected images as root/domain/class/image, got none - at"):
        load_benchmark(str(tree / "downloads"))
    with pytest.raises(InputError, match="expected domains of mfeat, mnist, .* got svhn - at digits-dg"):
        load_benchmark("digits-dg", ["svhn"])


# ---- Fingerprints ----------------------------------------------------------------------------------------------------


def test_the_same_files_elsewhere_are_the_same_data(tree, tmp_path_factory):
    before = load_benchmark(str(tree)).fingerprint
    moved = tree.rename(tmp_path_factory.mktemp("elsewhere") / "data")
    assert load_benchmark(str(moved)).fingerprint == before
    (moved / "photo/cat/notes.txt").write_text("still not an image")
    assert difference(before, load_benchmark(str(moved)).fingerprint) is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda root: (root / "photo/cat/1.jpg").rename(root / "photo/cat/2.jpg"), "no photo/cat/1.jpg"),
        (lambda root: (root / "photo/bear/2.png").rename(root / "photo/bear/0.png"), "photo/bear/0.png, {new}"),
        (lambda root: (root / "art/dog/1.png").rename(root / "art/cat/2.png"), "no class `dog`"),
        (lambda root: (root / "photo/bear").rename(root / "photo/ant"), "class `ant`, {new}"),
        (lambda root: (root / "photo/bear/2.png").unlink(), "no photo/bear/2.png"),
        (lambda root: (root / "art").rename(root / "art2"), "no domain `art`"),
        (lambda root: (root / "art/cat/1.jpeg").write_bytes(b"x"), "art/cat/1.jpeg of 1 bytes, which had {size}"),
    ],
)
def test_the_first_difference_of_other_data_is_named(tree, change, text):
    before = load_benchmark(str(tree)).fingerprint
    expected = text.format(new="which was not there", size=(tree / "art/cat/1.jpeg").stat().st_size)
    change(tree)
    assert difference(before, load_benchmark(str(tree)).fingerprint) == expected


def test_a_file_that_could_not_be_read_may_have_any_size():
    before = fingerprint(["a"], {"x": [("x/a/1.jpg", 3), ("x/a/2.jpg", 4)]})
    after = fingerprint(["a"], {"x": [("x/a/1.jpg", 5), ("x/a/2.jpg", 4)]})
    assert difference(before, after) == "x/a/1.jpg of 5 bytes, which had 3"
    assert difference(with_any_size(before, "x/a/1.jpg"), after) is None
    assert difference(with_any_size(before, "x/a/2.jpg"), after) == "x/a/1.jpg of 5 bytes, which had 3"


def test_names_with_any_bytes_are_kept():
    names = [os.fsdecode(b"x/a/\xff\n 7 y.jpg"), "x/a/ .jpg"]
    before = fingerprint(["a"], {"x": [(name, 3) for name in names]})
    assert difference(before, fingerprint(["a"], {"x": [(names[0], 3)]})) == f"no {names[1]}"


# ---- Random images ---------------------------------------------------------------------------------------------------


def test_debug_images_are_fixed():
    first, second = load_benchmark("debug"), load_benchmark("debug")
    assert [d.name for d in first.domains] == ["debug0", "debug1", "debug2"]
    for a, b in zip(first.domains, second.domains, strict=True):
        assert np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels)
    assert first.inputs.shape == (1, 16, 16)
