"""One row for an op: the tables of both languages are equal, and every phase knows exactly their ops.

Who adds an op sees here, by name, each place that still lacks it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import builder
import pytest
import random_graphs

from qdeploy import _engine, format, reference
from qdeploy.graph import Graph
from qdeploy.ops import OPS

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"\| `(\w+)` \| (\d+) \| [^|]+ \| ([a-z ]+) \|")


def exporter_emit() -> Iterable[str]:
    from qdeploy.exporter.emit import EMIT

    return set(EMIT) - {"quantize"}  # a learned quantizer becomes a table


def exporter_fusion() -> Iterable[str]:
    from qdeploy.exporter.fusion import EXPRESSED, REWRITES

    return set(REWRITES) - set(EXPRESSED)  # what EXPRESSED names is no op of the engine


def onnx_out() -> Iterable[str]:
    from qdeploy.onnx_nodes import OPS as writers

    return writers


def gpu_program() -> Iterable[str]:
    from qdeploy.gpu.program import STEPS

    return STEPS


def format_page() -> Iterable[str]:
    return [name for name, _, _ in ROW.findall((ROOT / "docs/format.md").read_text())]


def ops_of(graph: Graph) -> Iterable[str]:
    return {node.op for member in graph.members for node in member.nodes}


def golden_files() -> Iterable[str]:
    """What check_model and the tests of old files run: those of the newest version hold every op."""
    newest = max((ROOT / "tests/data").glob("v*"), key=lambda folder: int(folder.name[1:]))
    return {op for path in newest.glob("*.safetensors") for op in ops_of(format.load(path))}


PHASES: dict[str, Callable[[], Iterable[str]]] = {
    "the engine, csrc/ops": lambda: [op["name"] for op in _engine.ops()],
    "the reference, qdeploy/reference.py OPS": lambda: reference.OPS,
    "export, qdeploy/exporter/fusion.py REWRITES": exporter_fusion,
    "export, qdeploy/exporter/emit.py EMIT": exporter_emit,
    "ONNX, qdeploy/onnx_nodes OPS": onnx_out,
    "GPU, qdeploy/gpu/program.py STEPS": gpu_program,
    "tests/builder.py, a method of Builder": lambda: [op for op in OPS if hasattr(builder.Builder, op)],
    "tests/random_graphs.py DRAW": lambda: {*random_graphs.DRAW, *random_graphs.ONLY_TEXTS},
    "tests/builder.py, small_network, small_vision and small_text": lambda: {
        *ops_of(builder.small_network()),
        *ops_of(builder.small_vision()),
        *ops_of(builder.small_text()),
    },
    "tests/data, written by tests/test_golden.py": golden_files,
    "docs/format.md, section 3": format_page,
}


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_knows_exactly_these_ops(phase):
    known, ops = set(PHASES[phase]()), set(OPS)
    assert known == ops, f"{phase}: lacks {sorted(ops - known)}, has too many {sorted(known - ops)}"


def test_both_tables_say_the_same():
    engine = {op.pop("name"): op for op in _engine.ops()}
    assert engine == {
        name: {
            "version": op.version,
            "inputs": op.inputs,
            "output": op.output,
            "residual": op.residual,
            "reads": list(op.reads),
            "writes": list(op.writes),
            "keys": sorted((*op.attributes, *op.constants)),
            "token_keys": sorted(op.token_attributes),
        }
        for name, op in OPS.items()
    }


def test_the_format_page_says_the_same():
    rows = {
        name: (int(version), output.replace(" ", "_"))
        for name, version, output in ROW.findall((ROOT / "docs/format.md").read_text())
    }
    assert rows == {name: (op.version, op.output) for name, op in OPS.items()}
