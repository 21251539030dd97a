"""One model file on the runtimes of this machine. As a program it prints the report as JSON,

    ONEDNN_MAX_CPU_ISA=AVX2 QDEPLOY_ISA=avx2 python bench/measure.py FILE --rounds 10 --precisions int8 float32

so that the environment that restricts the peers is that of a process of its own. With --models the peers run files that
they quantized themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import qdeploy
from qdeploy import _engine, format, peers

if TYPE_CHECKING:
    from torch.nn import Module

ALL = tuple(peers.RUNTIMES)
CALLS_OF_FILES = 2  # a turn
TORCH = "torch eager float32"
AGREES = 0.99  # least correlation of the logits with ours
TORCH_AGREES = 0.95  # it has the weights before they were rounded to 7 bits


def measure(
    path: Path,
    threads: int,
    rounds: int,
    *,
    batch: int = 1,
    calls: int = peers.CALLS_PER_TURN,
    precisions: Sequence[str] = peers.PRECISIONS,
    runtimes: Sequence[str] = ALL,
    torch_net: Module | None = None,
    peers_run: Path | None = None,
    agrees: float = AGREES,
    progress: Callable[[str], None] = lambda text: None,
) -> dict:
    """The report of `qdeploy.peers.measure` on normal noise.

    `torch_net` adds torch eager on the float network. `peers_run`: the file of the network that the peers run, where it
    is another one. AssertionError where a peer computes another network: a correlation of the logits below `agrees`.
    """
    graph = format.load(peers_run or path)
    x = np.random.default_rng(0).standard_normal((batch, *graph.input_shape)).astype(np.float32)
    others, absent = peers.contestants(graph, x.shape, threads, precisions, runtimes)
    if torch_net is not None:
        others[TORCH] = torch_eager(torch_net, threads)
    model = qdeploy.load_int_model(path, num_threads=threads)
    same = qdeploy.load_int_model(peers_run, num_threads=threads) if peers_run else model
    agreement = {name: peers.correlation(same(x), run(x)) for name, run in others.items()}
    for name, correlation in agreement.items():
        assert correlation > (TORCH_AGREES if name == TORCH else agrees), (
            f"{name} computes another network: correlation {correlation:.3f} with qdeploy"
        )
    macs = sum(step["macs"] for step in same.plan(batch))
    report = peers.measure(model, x, others, rounds, peer_macs=macs, calls=calls, progress=progress)
    for row in report["results"][1:]:
        row["correlation"] = agreement[row["runtime"]]
    return report | {"absent": absent}


def torch_eager(net: Module, threads: int) -> peers.Run:
    """torch in channels-last layout, which is its fastest on CPUs."""
    import torch

    torch.set_num_threads(threads)
    net = net.to(memory_format=torch.channels_last)

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return net(torch.from_numpy(x)).numpy()

    return run


def measure_restricted(
    path: Path, isa: str, onednn_isa: str, rounds: int, precisions: Sequence[str], agrees: float = AGREES
) -> dict:
    """`measure` on one thread with OpenVINO restricted as we are, and MNN, which has no instructions beyond AVX2.
    onnxruntime cannot be restricted: it takes part where the CPU has none beyond AVX2 either."""
    environment = os.environ | {"QDEPLOY_ISA": isa, "ONEDNN_MAX_CPU_ISA": onednn_isa}
    options = [f"--rounds={rounds}", f"--agrees={agrees}", "--precisions", *precisions]
    command = [sys.executable, __file__, str(path), *options]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout)


def measure_files(path: Path, models: dict[str, str], threads: int, rounds: int, agrees: float) -> dict:
    """The report of `qdeploy.peers.measure`, one image or text a call; `models`: file by runtime ("openvino int8")."""
    model = qdeploy.load_int_model(path, num_threads=threads)
    x = input_for(model)
    others = {name: peers.build(name, file, x.shape, threads) for name, file in models.items()}
    agreement = {name: peers.correlation(model(x), run(x)) for name, run in others.items()}
    for name, correlation in agreement.items():
        assert correlation > agrees, f"{name} computes another network: correlation {correlation:.3f} with qdeploy"
    report = peers.measure(model, x, others, rounds, calls=CALLS_OF_FILES)
    for row in report["results"][1:]:
        row["correlation"] = agreement[row["runtime"]]
    return report | {"absent": {}}


def measure_files_apart(
    path: Path, models: dict[str, Path], threads: int, rounds: int, preload: Path | None = None, agrees: float = AGREES
) -> dict:
    """`measure_files` in a process of its own, into which the library `preload` is loaded first (only_avx2.c)."""
    files = json.dumps({name: str(file) for name, file in models.items()})
    options = [f"--rounds={rounds}", f"--agrees={agrees}", f"--threads={threads}", f"--models={files}"]
    environment = os.environ | ({"LD_PRELOAD": str(preload)} if preload else {})
    command = [sys.executable, __file__, str(path), *options]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout)


def input_for(model: qdeploy.model.Model) -> np.ndarray:
    """Noise for one image, or the ids of one text of the most tokens."""
    rng, entry = np.random.default_rng(0), model.inputs[0]
    if entry["dtype"] == "i32":
        return rng.integers(0, entry["vocabulary"], (1, *entry["shape"]))
    return rng.standard_normal((1, *entry["shape"]), np.float32)


def run_alone(benchmark, path: Path, threads: int, isa: str | None = None, batch: int = 1) -> None:
    """Our latency for pytest-benchmark's own table."""
    model = qdeploy.load_int_model(path, num_threads=threads, isa=isa)
    benchmark.pedantic(model, args=(np.repeat(input_for(model), batch, 0),), rounds=10, warmup_rounds=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--agrees", type=float, default=AGREES)
    parser.add_argument("--precisions", nargs="+")
    parser.add_argument("--models", type=json.loads)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.models:
        print(json.dumps(measure_files(args.file, args.models, args.threads, args.rounds, args.agrees)))
        sys.exit()
    runtimes = ("openvino", "MNN", *(["onnxruntime"] if _engine.isas()[-1] == "avx2" else []))
    options = {"precisions": args.precisions, "runtimes": runtimes, "agrees": args.agrees}
    print(json.dumps(measure(args.file, 1, args.rounds, **options)))
