"""Files of every released format version load for ever and give the bits they gave then.

`python tests/test_golden.py` writes the files of the current version; those of older versions are never written again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builder import batch, every_op
from forms import FORMS, conv_form

import qdeploy
from qdeploy import _engine, format, reference
from qdeploy.graph import Graph

DATA = Path(__file__).parent / "data"


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    graph = Graph([every_op("first", 35), every_op("second", 126)], "logits")  # no node of these saturates everywhere
    x = batch(graph, 4, np.random.default_rng(2))
    format.save(graph, folder / "every_op.safetensors")
    y, _, taps = reference.run_all(graph, x)
    np.savez_compressed(folder / "every_op.npz", x=x, y=y, **taps)


@pytest.mark.parametrize("version", sorted(folder.name for folder in DATA.iterdir()))
def test_bits_of_an_old_file(version):
    path = DATA / version / "every_op.safetensors"
    with np.load(DATA / version / "every_op.npz") as golden:
        taps = dict(golden)  # what each node gave; the file of version 1 has the outputs alone
    x, y = taps.pop("x"), taps.pop("y")
    graph = format.load(path)
    assert same(reference.run(graph, x, list(taps)), y, taps)
    for isa in _engine.isas():
        for form in FORMS:
            with conv_form(form):
                assert same(qdeploy.load_int_model(path, isa=isa)(x, list(taps)), y, taps), (isa, form)


def same(result, y: np.ndarray, taps: dict[str, np.ndarray]) -> bool:
    got, tapped = result if taps else (result, {})
    return got.tobytes() == y.tobytes() and all(tapped[name].tobytes() == tap.tobytes() for name, tap in taps.items())


if __name__ == "__main__":
    write(DATA / f"v{max(format.RELEASES)}")
