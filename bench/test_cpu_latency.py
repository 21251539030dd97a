"""ResNet-50, one image at a time: INT8 here against FP32 and INT8 elsewhere, alternating in one process.

`pytest bench/ --benchmark-only` ends in the tables. pytest-benchmark's own columns are our latency alone; the ratios
are those of the tables, whose times were taken in turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from peers import measure, one_float32_against

import qdeploy
from qdeploy import _engine, format
from qdeploy.graph import Graph

# The paper's own figures for ResNet-50 (QT-DoG, 7-bit weights; AMD EPYC 7302).
PAPER = "paper, EPYC 7302: FP32 34.28 ms, INT8 21.02 ms, 1.63x"
ROUNDS = 12

pytestmark = pytest.mark.filterwarnings("default")  # the peers' own warnings are theirs


@pytest.fixture
def rounds(benchmark) -> int:
    return 1 if benchmark.disabled else ROUNDS


def run_alone(benchmark, path: Path, threads: int, isa: str | None = None) -> None:
    model = qdeploy.load_int_model(path, num_threads=threads, isa=isa)
    x = np.random.default_rng(0).standard_normal((1, *model.inputs[0]["shape"]), np.float32)
    benchmark.pedantic(model, args=(x,), rounds=30, warmup_rounds=3)


@pytest.mark.parametrize("threads", [1, 2])
def test_resnet50(benchmark, report, rounds, resnet50, threads):
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip(f"{threads} threads on fewer CPUs")
    found = measure(resnet50.path, threads, rounds, resnet50.net)
    benchmark.extra_info.update(found)
    report(table(found, "ResNet-50, batch 1"))
    run_alone(benchmark, resnet50.path, threads)


def test_resnet50_with_avx2_only(benchmark, report, rounds, resnet50):
    """What a CPU without AVX-512 would see; onnxruntime cannot be restricted, so it is left out."""
    if "avx2" not in _engine.isas():
        pytest.skip("this CPU has no AVX2")
    restricted = {"QDEPLOY_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    program = Path(__file__).with_name("peers.py")
    command = [sys.executable, str(program), str(resnet50.path), f"--rounds={rounds}"]
    child = subprocess.run(command, env=os.environ | restricted, capture_output=True, text=True, check=True)
    found = json.loads(child.stdout)
    found["results"] = [row for row in found["results"] if not row["runtime"].startswith("onnxruntime")]
    benchmark.extra_info.update(found)
    report(table(found, "ResNet-50, batch 1, AVX2 only"))
    run_alone(benchmark, resnet50.path, 1, "avx2")


def test_ensemble_of_five_against_one_float32(benchmark, report, rounds, resnet50, tmp_path):
    """EoQ: five 7-bit networks in one file; each packs its weights, so copies cost as much as five networks."""
    if find_spec("onnx") is None:
        pytest.skip("the float32 peer needs onnx: pip install 'qdeploy[bench]'")
    single = format.load(resnet50.path)
    members = [replace(single.members[0], name=f"member{i}") for i in range(5)]
    path = tmp_path / "eoq.safetensors"
    format.save(Graph(members, "logits"), path)
    threads = min(2, len(os.sched_getaffinity(0)))
    found = one_float32_against(path, single, threads, rounds)
    benchmark.extra_info.update(found)
    report(table(found, "An ensemble of five ResNet-50 in int8 against one in float32, batch 1"))
    run_alone(benchmark, path, threads)


def table(found: dict, title: str) -> str:
    """Fastest first; the ratios are of medians, to our median."""
    ours = next(row for row in found["results"] if row["runtime"].startswith("qdeploy"))
    lines = [f"{title}, {found['threads']} thread(s), {found['isa']}"]
    lines += [f"{'':<36}{'median':>9}{'min':>9}{'spread':>9}  {'/ qdeploy':>9}  {'of the limit':>12}"]
    for row in sorted(found["results"], key=lambda row: row["median"]):
        share = f"{row['share_of_limit']:.0%}" if row.get("share_of_limit") else ""
        times = f"{row['median']:>9.2f}{row['minimum']:>9.2f}{row['spread']:>9.2f}"
        lines.append(f"{row['runtime']:<36}{times}  {row['median'] / ours['median']:>8.2f}x  {share:>12}")
    for precision, limit in found.get("limit_ms", {}).items():
        if limit:
            lines.append(
                f"limit of {precision}: {limit:.2f} ms = {found['macs'] / 1e9:.2f} GMAC over the measured peak"
            )
    floats = [row for row in found["results"] if row["runtime"].endswith("float32")]
    if floats and "limit_ms" in found:
        best = min(floats, key=lambda row: row["median"])
        pair = f"FP32 {best['median']:.2f} ms ({best['runtime']}), INT8 {ours['median']:.2f} ms"
        lines.append(f"here: {pair}, {best['median'] / ours['median']:.2f}x")
        lines.append(PAPER)
    return "\n".join(lines)
