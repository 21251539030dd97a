"""The pictures in docs/ are those of the committed results."""

import importlib.util
import re
from pathlib import Path

import pytest

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib draws them: pip install 'qdeploy[bench]'")

ROOT = Path(__file__).resolve().parent.parent


def load_plot():
    spec = importlib.util.spec_from_file_location("plot", ROOT / "bench/plot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plot = load_plot()


def pinned(package: str) -> str:
    return re.search(rf"^{package}==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize("name", plot.PICTURES)
def test_pictures_are_those_of_the_results(tmp_path, name):
    if matplotlib.__version__ != pinned("matplotlib"):
        pytest.skip(f"drawn with matplotlib {pinned('matplotlib')}, other versions place letters elsewhere")
    path = tmp_path / "picture.svg"
    plot.draw(name, path)
    assert path.read_bytes() == (ROOT / name).read_bytes(), f"python bench/plot.py draws another {name}"


@pytest.mark.parametrize("name", plot.PICTURES)
def test_pictures_show_on_light_and_dark_pages(name):
    text = (ROOT / name).read_text()
    assert re.search(r'<g id="patch_1">\s*<path [^>]*style="fill: none"', text)  # the background
    colors = set(re.findall(r"(?:fill|stroke): (#\w+)", text))
    assert colors <= {plot.INK, *(color for color, _ in plot.BARS.values())}  # all of middle brightness
