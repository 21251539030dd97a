"""Files of every released format version load for ever and give the bits they gave then.

`python tests/test_golden.py` writes the files of the current version; those of older versions are never written again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builder import batch, every_op

import qdeploy
from qdeploy import _engine, format, reference
from qdeploy.graph import Graph

DATA = Path(__file__).parent / "data"


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    graph = Graph([every_op("first", 0), every_op("second", 1)], "logits")
    x = batch(graph, 4, np.random.default_rng(2))
    format.save(graph, folder / "every_op.safetensors")
    np.savez_compressed(folder / "every_op.npz", x=x, y=reference.run(graph, x))


@pytest.mark.parametrize("version", sorted(folder.name for folder in DATA.iterdir()))
def test_bits_of_an_old_file(version):
    path = DATA / version / "every_op.safetensors"
    with np.load(DATA / version / "every_op.npz") as golden:
        x, y = golden["x"], golden["y"]
    assert reference.run(format.load(path), x).tobytes() == y.tobytes()
    for isa in _engine.isas():
        assert qdeploy.load_int_model(path, isa=isa)(x).tobytes() == y.tobytes(), isa


if __name__ == "__main__":
    write(DATA / f"v{max(format.RELEASES)}")
