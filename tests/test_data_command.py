"""`qdeploy data` on trees of images, and training without those that cannot be read."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from qdeploy.cli import main
from qdeploy.errors import InputError
from qdeploy.training import cifar, corruptions, image_sets
from qdeploy.training.domains import load_benchmark

UNKNOWN = "a file that Pillow does not know: put a good copy in its place"


@pytest.fixture
def tree(tmp_path):
    """Two domains of two classes, 12 images each."""
    rng = np.random.default_rng(0)
    for domain in ("art", "photo"):
        for label in ("cat", "dog"):
            (tmp_path / "tree" / domain / label).mkdir(parents=True)
            for i in range(12):
                image = Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8))
                image.save(tmp_path / "tree" / domain / label / f"{i:02}.png")
    return tmp_path / "tree"


def damage(tree, *paths):
    for path in paths:
        (tree / path).write_bytes(b"x")


def report(capsys, *args):
    code = main(["data", *map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_sound_tree_is_counted(tree, capsys):
    code, found = report(capsys, tree)
    counts = {"cat": 12, "dog": 12}
    assert code == 0
    assert found == {"images": 48, "domains": {"art": counts, "photo": counts}, "left_out": [], "unreadable": []}


def test_odd_and_unreadable_files_follow_the_table(tree, capsys):
    damage(tree, "photo/dog/07.png", "art/cat/03.png")
    (tree / "art/cat/notes.txt").write_text("no image")
    for i in range(12):
        (tree / f"photo/cat/{i:02}.png").unlink()
    assert main(["data", str(tree)]) == 1
    suffixes = ".jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp"
    assert (
        capsys.readouterr().out
        == f"""\
     art  photo
cat   12      -
dog   12     12
all   24     12

left out: 2
  art/cat/notes.txt: not one of {suffixes}
  photo/cat: a class without images

unreadable: 2
  art/cat/03.png: {UNKNOWN}
  photo/dog/07.png: {UNKNOWN}

36 images, 2 of them unreadable
"""
    )


def test_training_goes_on_without_the_listed_images_alone(tree, capsys, tmp_path):
    bad, skip = ["art/cat/03.png", "photo/dog/07.png"], tmp_path / "bad.txt"
    damage(tree, *bad)
    assert report(capsys, tree, "--write-list", skip)[0] == 1
    assert skip.read_text() == "".join(f"{path}\n" for path in bad)
    benchmark = load_benchmark(str(tree), image_size=8, skip=str(skip))
    assert [len(domain.labels) for domain in benchmark.domains] == [23, 23]
    assert benchmark.left_out == [(path, "in bad.txt") for path in bad]
    for domain in benchmark.domains:
        assert domain.batch(np.arange(23)).shape == (23, 3, 8, 8)
        assert not {file.path for file in domain.files} & {*bad}
    for path in bad:
        (tree / path).unlink()
    assert benchmark.fingerprint == load_benchmark(str(tree)).fingerprint  # it sees the rest


@pytest.mark.parametrize("path", ["art/cat/99.png", "art/cat", "../tree/art/cat/03.png", "art/cat/notes.txt"])
def test_a_listed_path_that_is_no_image_of_the_tree_is_an_error(tree, tmp_path, path):
    (tree / "art/cat/notes.txt").write_text("no image")
    (tmp_path / "list").write_text(f"art/cat/03.png\n{path}\n")
    with pytest.raises(
        InputError, match=f"^expected paths of images of {tree}, got '{path}' - at {tmp_path / 'list'}$"
    ):
        load_benchmark(str(tree), skip=str(tmp_path / "list"))


def test_lists_that_leave_nothing(tree, tmp_path):
    (tmp_path / "list").write_text("".join(f"art/{name}/{i:02}.png\n" for name in ("cat", "dog") for i in range(12)))
    with pytest.raises(InputError, match="^expected images in every domain, got none but listed ones - at `art`$"):
        load_benchmark(str(tree), skip=str(tmp_path / "list"))
    with pytest.raises(InputError, match="^expected a folder of images for such a list, got debug - at --skip-unread"):
        load_benchmark("debug", skip=str(tmp_path / "list"))


def test_a_list_holds_any_name_but_one_of_two_lines(tree, capsys, tmp_path):
    odd = os.fsdecode(b"art/cat/\xff .png")
    damage(tree, odd)
    assert report(capsys, tree, "--write-list", tmp_path / "list")[1]["unreadable"] == [[odd, UNKNOWN]]
    assert [domain.labels.size for domain in load_benchmark(str(tree), skip=str(tmp_path / "list")).domains] == [24, 24]
    damage(tree, "art/cat/a\nb.png")
    assert main(["data", str(tree), "--write-list", str(tmp_path / "other")]) == 2
    assert "expected names of files without line breaks, got 'art/cat/a\\nb.png' - at" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_published_duplicates_of_domain_net_are_left_out(tree):
    (tree / "domain_net_duplicates.txt").write_text("art/cat/03.png\nart/cat/of_another_release.png\n")
    benchmark = load_benchmark(str(tree))
    assert [len(domain.labels) for domain in benchmark.domains] == [23, 24]
    assert benchmark.left_out == [("art/cat/03.png", "in domain_net_duplicates.txt")]


@pytest.mark.parametrize("folder", ["nowhere", "tree/art/cat"])
def test_what_is_no_tree_is_one_line(tree, tmp_path, capsys, folder):
    assert main(["data", str(tmp_path / folder)]) == 2
    assert capsys.readouterr().err.startswith("qdeploy: error: expected ")


# ---- Sets of small images --------------------------------------------------------------------------------------------


@pytest.fixture
def small_set(monkeypatch):
    """cifar10 is one training image and three of the test."""
    rng = np.random.default_rng(0)
    counts = {"test": 3, "train": 1}
    arrays = {name: (rng.integers(0, 256, (n, 3, 32, 32), np.uint8), np.arange(n)) for name, n in counts.items()}
    made = image_sets.ImageSet(("test", "train"), cifar.CLASSES, (3, 32, 32), lambda names: arrays)
    monkeypatch.setitem(image_sets.SETS, "cifar10", made)
    return arrays


def test_a_set_is_counted(small_set, capsys):
    counts = {"test": {"airplane": 1, "automobile": 1, "bird": 1}, "train": {"airplane": 1}}
    assert report(capsys, "cifar10") == (0, {"images": 4, "domains": counts, "left_out": [], "unreadable": []})


def test_the_test_images_are_written_corrupted(small_set, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corruptions, "cpus", lambda: 1)
    code, found = report(capsys, "cifar10", "--corrupt", tmp_path / "c")
    assert code == 0 and len(found["corrupted"]["kinds"]) == 14 and "frost" not in found["corrupted"]["kinds"]
    images, labels = cifar.read_cifar_c(tmp_path / "c", "snow", 2)
    assert labels.tolist() == [0, 1, 2]
    clean = small_set["test"][0].transpose(0, 2, 3, 1)
    assert all(np.array_equal(images[i], corruptions.corrupt(clean[i], "snow", 2, i)) for i in range(3))


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("debug", "--corrupt", "c"), "expected data with a domain `test`, got debug0, debug1, debug2 - at --corrupt"),
        (("debug", "--frost", "f"), "expected --corrupt, which uses them, got none - at --frost"),
        (("debug", "--write-list", "l"), "expected a folder of images for such a list, got debug - at --write-list"),
        (("",), "expected a folder or the name of a set, got '' - at data"),
        ((".", "--write-list", "no/l"), "expected a path to write to, got a folder that does not exist - at no/l"),
        (("cifar10", "--corrupt", __file__), f"expected a folder to write in, got something else - at {__file__}"),
        ((".", "--corrupt", "c"), "expected a set of small images, got '.' - at --corrupt"),
    ],
)
def test_options_that_do_not_fit_the_data(args, text, capsys):
    assert main(["data", *args]) == 2
    assert capsys.readouterr().err == f"qdeploy: error: {text}\n"


# ---- Processes -------------------------------------------------------------------------------------------------------

# Prints its worker processes, then has them work for an hour.
CHILD = """
import os
import signal
import time
from qdeploy.training.parallel import parallel_map

def worker(_):
    return os.getpid()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    with parallel_map(2) as run:
        print(*{*run(worker, range(8))}, flush=True)
        list(run(time.sleep, [0.1] * 72000))
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_that_maps(tmp_path, signum):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    child = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout.readline().split()
    child.send_signal(signum)
    child.communicate(timeout=60)  # returns when the last process that holds its standard output has ended
