"""What a process pays before the first logits, and what a call costs where the network is next to nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from measure import measure, run_alone

from qdeploy import format
from qdeploy.onnx import to_onnx
from qdeploy.terminal import columns
from qdeploy.timing import spread

pytestmark = pytest.mark.filterwarnings("default")  # the peers' own warnings are theirs

BEGIN = "import sys, time, numpy; path = sys.argv[1]; x = numpy.zeros((1, 3, 224, 224), numpy.float32)\n"
# Not ru_maxrss: it begins with the memory of the process that forked, which is pytest with torch.
END = "\nprint(time.monotonic(), *(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
PROGRAMS = {
    "numpy": "",
    "qdeploy": "import qdeploy; y = qdeploy.load_int_model(path)(x)",
    "onnxruntime": "import onnxruntime; y = onnxruntime.InferenceSession(path).run(None, {'x': x})[0]",
    "openvino": "import openvino; y = openvino.compile_model(path, 'CPU')({0: x})[0]",
}


def test_cold_start(benchmark, results, networks, rounds, progress):
    """A new process: import, load, first logits of ResNet-50. Alternating, each with its default threads."""
    for module in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(module)
    ours = networks.exported("resnet50")
    theirs = ours.with_suffix(".onnx")
    theirs.write_bytes(to_onnx(format.load(ours), quantized=True).SerializeToString())
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for turn in range(1 + rounds(15)):  # the first brings the files into memory
        progress(f"round {turn}")
        for name, program in PROGRAMS.items():
            found[name].append(run_process(program, ours if name == "qdeploy" else theirs))
    ms = {name: np.array([start for start, _ in runs[1:]]) for name, runs in found.items()}
    mib = {name: max(memory for _, memory in runs) for name, runs in found.items()}
    for peer in ("onnxruntime", "openvino"):
        ratio = np.median(ms["qdeploy"]) / np.median(ms[peer])
        results.figure(f"start/{peer}", float(ratio), spread(ms["qdeploy"] / ms[peer]))
    above = ms["qdeploy"] - ms["numpy"]
    results.figure("start/numpy", float(np.median(above)), spread(above))
    results.figure("memory", mib["qdeploy"])
    rows = []
    for name in PROGRAMS:
        times = {
            "median_ms": float(np.median(ms[name])),
            "min_ms": float(ms[name].min()),
            "spread_ms": spread(ms[name]),
        }
        rows.append({"process": name, **times, "peak_mib": mib[name]})
    title = "Cold start of ResNet-50: new process, import, load, first logits"
    results.reports[title], results.tables[title] = {"results": rows}, columns(rows)
    benchmark.pedantic(run_process, args=(PROGRAMS["qdeploy"], ours), rounds=3)


def run_process(program: str, path: Path) -> tuple[float, float]:
    """Milliseconds from the start to the end of `program`, and the most memory that was resident, in MiB."""
    start = time.monotonic()
    command = [sys.executable, "-c", BEGIN + program + END, path]
    # A user's process finds compiled modules; the first round writes them where they are missing.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    end, kib = done.stdout.split()
    return (float(end) - start) * 1e3, int(kib) / 1024


def test_overhead_of_a_call(benchmark, results, networks, rounds, progress):
    path = networks.tiny()
    options = {"calls": 200, "precisions": ("int8",), "runtimes": ("onnxruntime",)}
    report = measure(path, 1, rounds(20), progress=progress, **options)
    results.report("One member of the packaged demo", report, {"onnxruntime int8": "overhead"})
    run_alone(benchmark, path, 1)
