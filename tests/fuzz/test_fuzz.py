"""A few hundred inputs of the fuzzer, and that it would see a fault."""

from __future__ import annotations

import sys

import pytest
from builder import small_network
from fuzz import Failure, child, watch
from oracle import Disagreement, check

from qdeploy import _engine, reference, validate
from qdeploy.format import save

COUNT = 500


def test_both_readers_agree_on_changed_files(tmp_path):
    lines: list[str] = []
    watch(child(1, 0, COUNT, tmp_path), tmp_path, lambda line: not lines.append(line))
    accepted = sum(line.split()[1] == "accepted" for line in lines)
    assert len(lines) == COUNT
    assert 0.2 < accepted / COUNT < 0.5  # acceptance is tested as well as refusal


@pytest.mark.parametrize(
    ("code", "said"),
    [("import os; os.abort()", "exit code -6"), ("raise AssertionError('they differ')", "they differ")],
)
def test_a_child_that_dies_is_reported_with_its_input(tmp_path, code, said):
    (tmp_path / "input.txt").write_text("4711: truncate")
    with pytest.raises(Failure, match=f"(?s)input 4711: truncate.*{said}"):
        watch([sys.executable, "-c", code], tmp_path, lambda line: True)


def test_another_rule_in_one_reader_is_seen(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    graph = small_network()
    graph.members[0].tensors[1].scale = 2.0**127
    monkeypatch.setattr(validate, "MAX_SCALE", 2.0**127)
    save(graph, path)
    with pytest.raises(Disagreement, match=r"qdeploy.format says 'a model', the engine 'expected a scale in"):
        check(path, _engine.isas()[0], 1)


def test_another_bit_is_seen(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save(small_network(), path)
    check(path, _engine.isas()[0], 1)
    monkeypatch.setitem(reference.OPS, "max_pool2d", lambda *args: reference.max_pool2d(*args) ^ 1)
    with pytest.raises(Disagreement, match=r"other results than the reference at \['max_pool2d.6'"):
        check(path, _engine.isas()[0], 1)
