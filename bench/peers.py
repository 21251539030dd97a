"""A model file on all runtimes of this machine, alternating, in this process. As a program it prints JSON,

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 QDEPLOY_ISA=avx2 python bench/peers.py FILE --threads 1 --rounds 10

so that the environment which restricts the peers is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from peak import peak_gmacs

import qdeploy
from qdeploy import format, peers
from qdeploy.graph import Graph

GATE_SECONDS = 0.001  # of the peak loop before each turn


def measure(path: Path, threads: int, rounds: int, torch_net: Callable | None = None) -> dict:
    """Times of every runtime at batch 1, with the hardware limit of its precision beside it.

    `torch_net` adds torch eager on the float network. AssertionError where a runtime computes another network than
    ours: the logits of a random image must have a correlation above 0.99.
    """
    graph = format.load(path)
    model = qdeploy.load_int_model(path, num_threads=threads)
    x = np.random.default_rng(0).standard_normal((1, *graph.input_shape)).astype(np.float32)
    others = peers.contestants(graph, threads)
    _check_answers(model(x), {name: run(x) for name, run in others.items()})
    runs: dict[str, Callable[[], object]] = {"qdeploy int8": lambda: model(x)}
    runs |= {name: lambda run=run: run(x) for name, run in others.items()}
    if torch_net is not None:
        runs["torch eager float32"] = torch_eager(torch_net, x, threads)
    macs = sum(step["macs"] for step in model.plan(1))
    before = _limits_ms(macs, model.isa, threads)
    timings = peers.alternate(runs, rounds, speed=lambda: peak_gmacs(model.isa, "int8", GATE_SECONDS) or 1.0)
    limits = {key: limit and min(limit, before[key]) for key, limit in _limits_ms(macs, model.isa, threads).items()}
    rows = []
    for name, timing in sorted(timings.items(), key=lambda item: item[1].median):
        limit = limits[name.rsplit(" ", 1)[1]]
        rows.append({"runtime": name, **asdict(timing), "share_of_limit": limit and limit / timing.median})
    return {"isa": model.isa, "threads": threads, "macs": macs, "limit_ms": limits, "results": rows}


def torch_eager(net: Callable, x: np.ndarray, threads: int) -> Callable[[], object]:
    """torch in channels-last layout, which is its fastest on CPUs."""
    import torch

    torch.set_num_threads(threads)
    images = torch.from_numpy(x).to(memory_format=torch.channels_last)

    def run() -> object:
        with torch.inference_mode():
            return net(images)

    return run


def one_float32_against(ensemble: Path, single: Graph, threads: int, rounds: int) -> dict:
    """An int8 ensemble beside one float32 network of the best installed runtime."""
    model = qdeploy.load_int_model(ensemble, num_threads=threads)
    x = np.random.default_rng(0).standard_normal((1, *single.input_shape)).astype(np.float32)
    runs: dict[str, Callable[[], object]] = {f"qdeploy int8, ensemble of {len(model.members)}": lambda: model(x)}
    for name, run in peers.contestants(single, threads).items():
        if name.endswith("float32"):
            runs[f"{name}, one network"] = lambda run=run: run(x)
    timings = peers.alternate(runs, rounds, speed=lambda: peak_gmacs(model.isa, "int8", GATE_SECONDS) or 1.0)
    rows = [{"runtime": name, **asdict(timing)} for name, timing in timings.items()]
    return {"isa": model.isa, "threads": threads, "results": rows}


def _limits_ms(macs: int, isa: str, threads: int) -> dict[str, float | None]:
    peaks = {precision: peak_gmacs(isa, precision) for precision in ("int8", "float32")}
    return {precision: peak and macs / (peak * threads) / 1e6 for precision, peak in peaks.items()}


def _check_answers(ours: np.ndarray, theirs: dict[str, np.ndarray]) -> None:
    for name, answer in theirs.items():
        correlation = np.corrcoef(ours.ravel(), answer.ravel())[0, 1]
        assert correlation > 0.99, f"{name} computes another network: correlation {correlation:.3f} with qdeploy"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.file, arguments.threads, arguments.rounds)))
