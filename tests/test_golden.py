"""Files of every released format version load for ever and give the bits they gave then.

`python tests/test_golden.py` writes the files of the current version; those of older versions are never written again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builder import arrays, batch, detector, sums, text_batch
from forms import FORMS, conv_form

import qdeploy
from qdeploy import _engine, format, reference

DATA = Path(__file__).parent / "data"
FILES = sorted(DATA.glob("v*/*.safetensors"))
NETWORKS = {  # of the current version; in no node of these more than 59 % of the codes saturate
    "detector": lambda: detector(34),
    "sums": lambda: sums(51),
}


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in NETWORKS.items():
        graph, rng = network(), np.random.default_rng(2)
        format.save(graph, folder / f"{name}.safetensors")
        x, mask = (batch(graph, 2, rng), None) if graph.vocabulary is None else text_batch(graph, 4, rng)
        y, _, taps = reference.run_all(graph, x, mask)
        inputs = {"x": x} if mask is None else {"x": x, "mask": mask}
        outputs = {f"y{i}": array for i, array in enumerate(y)} if isinstance(y, list) else {"y": y}
        np.savez_compressed(folder / f"{name}.npz", **outputs, **inputs, **taps)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_bits_of_an_old_file(path):
    with np.load(path.with_suffix(".npz")) as golden:
        taps = dict(golden)  # what each node gave; the file of version 1 has the outputs alone
    x, mask = taps.pop("x"), taps.pop("mask", None)
    y = [taps.pop(name) for name in ("y", "y0", "y1", "y2", "y3", "y4") if name in taps]
    inputs = (x,) if mask is None else (x, mask)
    graph = format.load(path)
    assert same(reference.run(graph, x, list(taps), mask), y, taps)
    for isa in _engine.isas():
        for form in FORMS:
            with conv_form(form):
                assert same(qdeploy.load_int_model(path, isa=isa)(*inputs, taps=list(taps)), y, taps), (isa, form)


def same(result, y: list[np.ndarray], taps: dict[str, np.ndarray]) -> bool:
    got, tapped = result if taps else (result, {})
    equal = [array.tobytes() for array in arrays(got)] == [array.tobytes() for array in y]
    return equal and all(tapped[name].tobytes() == tap.tobytes() for name, tap in taps.items())


if __name__ == "__main__":
    write(DATA / f"v{max(format.RELEASES)}")
