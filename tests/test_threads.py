"""Threads: as many as the machine and its containers grant, no more of them when many callers meet, none that spin."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builder import Builder, batch

from qdeploy import _engine, reference
from qdeploy.format import save
from qdeploy.graph import Graph

# Files under a root of their own, and the CPUs they grant.
TREES = {
    "no cgroups": ({}, math.inf),
    "v2 without a quota": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, math.inf),
    "v2 in a container": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
    "v2, the smallest of the parents": (
        {
            "proc/self/cgroup": "0::/a/b:1/c",
            "sys/fs/cgroup/cpu.max": "max 100000",
            "sys/fs/cgroup/a/cpu.max": "700000 100000",
            "sys/fs/cgroup/a/b:1/cpu.max": "100000 50000",
            "sys/fs/cgroup/a/b:1/c/cpu.max": "max 100000",
            "sys/fs/cgroup/other/cpu.max": "1000 100000",
        },
        2,
    ),
    "v1 without a quota": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        math.inf,
    ),
    "v1 in a container that sees the path of the host": (
        {
            "proc/self/cgroup": "5:memory:/m\n4:cpuacct,cpu:/docker/0123\n0::/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu/m/cpu.cfs_quota_us": "1000",
            "sys/fs/cgroup/cpu/m/cpu.cfs_period_us": "100000",
        },
        2.5,
    ),
    "v1 on the host": (
        {
            "proc/self/cgroup": "3:cpuset:/\n2:cpu:/user/one",
            "sys/fs/cgroup/cpu/user/cpu.cfs_quota_us": "300000",
            "sys/fs/cgroup/cpu/user/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu/user/one/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/user/one/cpu.cfs_period_us": "100000",
        },
        0.5,
    ),
    "unreadable": ({"proc/self/cgroup": "\n:\n0::\nx", "sys/fs/cgroup/cpu.max": "lots of it"}, math.inf),
}


@pytest.mark.parametrize("tree", TREES)
def test_quota_of_cgroups(tmp_path, tree):
    files, cpus = TREES[tree]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert _engine.cpu_quota(str(tmp_path)) == cpus


def run_python(code: str, folder: Path) -> dict:
    """What `code` prints as JSON, in a process whose threads are its own: numpy's BLAS would start one for each core,
    which spin for 70 ms after the import."""
    command = [sys.executable, "-c", "import json, os, time\nimport numpy as np\nimport qdeploy\n" + code]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=environment)
    return json.loads(result.stdout)


# Small networks run on as many threads as they are asked for, as in conftest.py.
MANY_THREADS = """
import functools
qdeploy.model._engine.Session = functools.partial(qdeploy.model._engine.Session, macs_per_thread=1)
"""


def test_affinity_limits_the_threads(tmp_path):
    write_network(tmp_path / "m.safetensors", 0)
    code = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(json.dumps(qdeploy.load_int_model("m.safetensors").num_threads))
"""
    assert run_python(code, tmp_path) == 1


def write_network(path: Path, seed: int, channels: int = 24) -> tuple[Graph, np.ndarray]:
    builder = Builder(np.random.default_rng(seed), (3, 12, 11), (0.02, 110))
    x = builder.conv2d(0, channels, (3, 3), padding=(1, 1, 1, 1), bits=7)
    x = builder.conv2d(x, channels, (3, 3), padding=(1, 1, 1, 1), bits=4)
    builder.conv2d(x, 5, (12, 11), dtype="f32", flat=True)
    graph = Graph([builder.member()])
    save(graph, path)
    return graph, batch(graph, 2, builder.rng)


def test_four_models_and_eight_callers(tmp_path):
    """They share as many workers as there are cores besides one, and every answer is exact."""
    expected = []
    for i in range(4):
        graph, x = write_network(tmp_path / f"{i}.safetensors", i)
        np.save(tmp_path / f"{i}.npy", x)
        expected.append(reference.run(graph, x).tobytes().hex())
    code = """
from concurrent.futures import ThreadPoolExecutor
models = [qdeploy.load_int_model(f"{i}.safetensors", 2) for i in range(4)]
inputs = [np.load(f"{i}.npy") for i in range(4)]
tasks = lambda: len(os.listdir("/proc/self/task"))
before = tasks()
def work(i):
    answers = {models[i % 4](inputs[i % 4]).tobytes().hex() for _ in range(50)}
    return i % 4, list(answers), tasks()
with ThreadPoolExecutor(8) as pool:
    results = list(pool.map(work, range(64)))
print(json.dumps({"before": before, "results": results}))
"""
    found = run_python(MANY_THREADS + code, tmp_path)
    for i, answers, _ in found["results"]:
        assert answers == [expected[i]]
    most = max(tasks for *_, tasks in found["results"])
    assert most <= found["before"] + 8 + max(2, _engine.default_threads()) - 1


def test_small_calls_start_no_threads(tmp_path):
    """Below 4 million MACs a thread; a larger batch of the same network has enough for two."""
    write_network(tmp_path / "m.safetensors", 0)
    code = """
model = qdeploy.load_int_model("m.safetensors", 3)
tasks = lambda: len(os.listdir("/proc/self/task"))
macs = sum(step["macs"] for step in model.plan(1))
batch = 8_000_000 // macs + 1
x = np.zeros((batch, 3, 12, 11), np.float32)
counts = [tasks()]
for n in (1, batch):
    model(x[:n])
    counts.append(tasks())
print(json.dumps([count - counts[0] for count in counts]))
"""
    assert run_python(code, tmp_path) == [0, 0, 1]


def test_no_thread_spins_between_calls(tmp_path):
    write_network(tmp_path / "m.safetensors", 0)
    code = """
model = qdeploy.load_int_model("m.safetensors", 4)
x = np.zeros((1, 3, 12, 11), np.float32)
for _ in range(20):
    model(x)
threads = len(os.listdir("/proc/self/task"))
start = time.process_time()
time.sleep(0.3)
print(json.dumps([threads, time.process_time() - start]))
"""
    threads, seconds = run_python(MANY_THREADS + code, tmp_path)
    assert threads >= 4
    assert seconds < 0.1  # three spinning threads would take 0.3 on one core, 0.9 on three
