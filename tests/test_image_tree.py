"""Which files of a tree are its images, and in which order: as torchvision's ImageFolder has them."""

import os
import socket

import pytest

from qdeploy.errors import InputError
from qdeploy.training.domains import load_benchmark
from qdeploy.training.image_tree import SUFFIXES, read_tree


@pytest.fixture
def make(tmp_path):
    """Writes files of one byte below the root, which it returns."""

    def write(*paths):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(b"x")
        return tmp_path

    return write


def listed(root):
    """{domain: paths}."""
    return {
        domain: [file.path for files in classes.values() for file in files]
        for domain, classes in read_tree(root).domains.items()
    }


def image_folder(domain):
    """The list of ImageFolder, written from its documentation: a class's folders and their files are sorted as text."""
    found = []
    for name in sorted(entry.name for entry in os.scandir(domain) if entry.is_dir()):
        for folder, _, files in sorted(os.walk(domain / name, followlinks=True)):
            found += [os.path.join(folder, file) for file in sorted(files) if file.lower().endswith(SUFFIXES)]
    return [os.path.relpath(path, domain.parent) for path in found]


def test_files_are_listed_as_image_folder_lists_them(make, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "9.jpg").write_bytes(b"x")
    names = [f"{stem}{suffix}" for stem in ("10", "9", "a", "B") for suffix in SUFFIXES]
    root = make(
        *(f"photo/dog/{name}" for name in names),
        *(
            "photo/dog/a/z.JPG",
            "photo/dog/a-b/c.Tiff",
            "photo/dog/a/b/1.png",
            "photo/dog/b.jpg/2.png",
            "photo/cat/.jpg",
        ),
        *("photo/Zebra/1.gif", "photo/Zebra/1.webp", "art/dog/Thumbs.db", "art/dog/1.ppm"),
    )
    (root / "photo/cat/link").symlink_to(elsewhere)
    (root / "photo/ant").symlink_to(elsewhere)
    (root / "photo/dog/link.bmp").symlink_to(elsewhere / "9.jpg")
    assert listed(root) == {domain: image_folder(root / domain) for domain in ("art", "photo")}
    assert "photo/cat/link/9.jpg" in listed(root)["photo"]


def test_what_is_no_image_is_left_out_with_its_reason(make):
    root = make(
        *("photo/dog/1.jpg", "photo/dog/._1.jpg", "photo/dog/Thumbs.db", "photo/dog/2.gif", "photo/2.jpg", "3.jpg"),
        *("art/dog/1.jpg", "__MACOSX/photo/dog/._1.jpg", "photo/README"),
    )
    for folder in ("photo/dog/folder.png", "photo/cat", "downloads"):
        (root / folder).mkdir()
    (root / "photo/dog/empty.jpg").touch()
    (root / "photo/dog/gone.jpg").symlink_to(root / "nothing")
    (root / "photo/dog/itself.jpg").symlink_to(root / "photo/dog/itself.jpg")
    (root / "photo/dog/loop").symlink_to(root / "photo")
    (root / "around").symlink_to(root)
    os.mkfifo(root / "photo/dog/pipe.jpg")  # opening it would wait for ever
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "photo/dog/socket.jpg"))
    assert listed(root) == {"art": ["art/dog/1.jpg"], "photo": ["photo/dog/1.jpg"]}
    names = "not one of .jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp"
    assert sorted(read_tree(root).left_out) == [
        ("3.jpg", "in no domain's folder"),
        ("__MACOSX", "a folder without root/domain/class/image"),
        ("__MACOSX/photo/dog/._1.jpg", "what macOS keeps beside a file"),
        ("around", "a link to a folder around it"),
        ("downloads", "a folder without root/domain/class/image"),
        ("photo/2.jpg", "in no class's folder"),
        ("photo/cat", "a class without images"),
        ("photo/dog/._1.jpg", "what macOS keeps beside a file"),
        ("photo/dog/2.gif", names),
        ("photo/dog/Thumbs.db", names),
        ("photo/dog/empty.jpg", "an empty file"),
        ("photo/dog/folder.png", "a folder, no image"),
        ("photo/dog/gone.jpg", "a link to nowhere"),
        ("photo/dog/itself.jpg", "a link to nowhere"),
        ("photo/dog/loop", "a link to a folder around it"),
        ("photo/dog/pipe.jpg", "neither a file nor a folder"),
        ("photo/dog/socket.jpg", "neither a file nor a folder"),
    ]
    assert load_benchmark(str(root)).left_out == read_tree(root).left_out


def test_a_class_that_one_domain_alone_has_is_a_class(make):
    benchmark = load_benchmark(str(make("photo/dog/1.jpg", "art/cat/1.jpg", "art/dog/1.jpg")))
    assert benchmark.classes == ["cat", "dog"]
    assert [domain.labels.tolist() for domain in benchmark.domains] == [[0, 1], [1]]


def test_a_domain_without_images_is_an_error(make):
    root = make("photo/dog/1.jpg", "art/dog/1.jpg", "sketch/dog/._1.jpg")
    with pytest.raises(InputError, match=f"^expected images in every domain, got none - at {root}/sketch$"):
        read_tree(root)


def test_a_folder_that_cannot_be_read_is_an_error(make, monkeypatch):
    root, scandir = make("photo/dog/1.jpg", "art/dog/1.jpg"), os.scandir

    def forbidden(path):  # chmod does not stop root, who may run the tests
        if os.fspath(path).endswith("photo/dog"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(
        InputError, match=f"^expected a folder that can be read, got Permission denied - at {root}/photo/dog$"
    ):
        read_tree(root)
