"""The valid files that the fuzzer starts from: old files, the demo's, networks of every op and random ones."""

from __future__ import annotations

import tempfile
from pathlib import Path

from builder import small_detector, small_ensemble, small_network, small_text, small_vision, sums
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from random_graphs import ensembles, graphs, texts
from versions import NEWEST

from qdeploy.format import save
from qdeploy.graph import Graph

ROOT = Path(__file__).resolve().parents[2]
FILES = [*sorted(ROOT.glob("tests/data/v*/*.safetensors")), *sorted(ROOT.glob("qdeploy/demo_data/*.safetensors"))]
SMALL = 8  # how often each small network stands among the seeds: most changes say most in a small file


def random_graphs(number: int, count: int) -> list[Graph]:
    """About `count` graphs, the same ones for the same number."""
    drawn: list[Graph] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(graphs(), graphs(version=NEWEST), texts(), ensembles()))
    def draw(graph: Graph) -> None:
        drawn.append(graph)

    draw()
    return drawn


def contents(number: int, count: int) -> list[bytes]:
    """The contents of the files, `count` of them of random graphs."""
    built = [small_network(), small_ensemble(), small_vision(), small_text(), small_detector(), sums(0)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed.safetensors"

        def content(graph: Graph) -> bytes:
            save(graph, path)
            return path.read_bytes()

        files = [file.read_bytes() for file in FILES]
        return files + SMALL * [content(graph) for graph in built] + [content(g) for g in random_graphs(number, count)]
