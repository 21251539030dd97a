"""Files of every released format version load for ever and give the bits they gave then.

`python tests/test_golden.py` writes the files of the current version; those of older versions are never written again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builder import Builder, batch

import qdeploy
from qdeploy import _engine, format, reference
from qdeploy.graph import Graph, Member

DATA = Path(__file__).parent / "data"


def every_op(name: str, seed: int) -> Member:
    """A small network with every op and every number of bits; groups, depthwise, dilation, residual, both pools."""
    net = Builder(np.random.default_rng(seed), (3, 13, 11), (0.02, 100 + seed))
    x = net.conv2d(0, 24, (3, 3), (2, 2), (1, 1, 1, 1), bits=8, exact=True)
    y = net.conv2d(x, 24, (3, 3), (1, 1), (1, 1, 1, 1), groups=24, bits=7)
    y = net.conv2d(y, 24, (1, 1), bits=6, residual=x)
    z = net.conv2d(y, 12, (3, 2), (1, 1), (2, 0, 2, 2), dilation=(2, 2), groups=4, bits=5, quantization=(0.03, 9))
    w = net.max_pool2d(y, (3, 3), (1, 1), (1, 1, 1, 1))
    w = net.conv2d(w, 12, (1, 1), bits=4, clamp=(9, 200), quantization=(0.03, 9))
    x = net.concat([z, net.table(w, quantization=(0.03, 9))])
    x = net.add(x, y, exact=True)
    x = net.avg_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1))
    x = net.reshape(x, (24 * 4 * 3,))
    x = net.linear(x, 33, bits=3)
    net.linear(x, 10, bits=2, dtype="f32", size=0.05)
    return net.member(name)


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
