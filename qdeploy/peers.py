"""Other runtimes beside qdeploy: the same network, the same threads, alternating in one process.

Shared machines drop to two thirds of their speed for seconds at a time, so a ratio of times measured apart means
nothing. `alternate` gives each contestant its turn in every round, and what is reported is the ratio of medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from qdeploy.graph import Graph
from qdeploy.onnx import to_onnx

Run = Callable[[np.ndarray], np.ndarray]
CALLS_PER_TURN = 4  # timed; one more before them brings code and weights back into the caches
SLOW = 0.9


def onnxruntime(model: bytes, threads: int) -> Run:
    """A session over a serialized ONNX model with `threads` threads that do not spin between calls."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def openvino(model: bytes, threads: int) -> Run:
    """An OpenVINO request for one stream of `threads` threads, in the precision of the model (f32 stays f32)."""
    import openvino as ov

    core = ov.Core()
    config = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(model), "CPU", config)
    request = compiled.create_infer_request()
    return lambda x: request.infer({0: x}, share_inputs=True)[0]


def contestants(graph: Graph, threads: int) -> dict[str, Run]:
    """The runtimes installed here over `graph`, by name: float32 first, then int8. Empty without `onnx`."""
    found: dict[str, Run] = {}
    if find_spec("onnx") is None:
        return found
    for precision in ("float32", "int8"):
        model = to_onnx(graph, quantized=precision == "int8").SerializeToString()
        for runtime in (onnxruntime, openvino):
            if find_spec(runtime.__name__) is not None:
                found[f"{runtime.__name__} {precision}"] = runtime(model, threads)
    return found


@dataclass
class Timing:
    """Milliseconds per call: `spread` is half the distance between the quartiles. `calls` were counted."""

    median: float
    minimum: float
    spread: float
    calls: int


def alternate(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    progress: Callable[[str], None] = lambda text: None,
    speed: Callable[[], float] = lambda: 1.0,
) -> dict[str, Timing]:
    """Call every contestant in turn, `rounds` times over, and time the calls.

    `speed` measures the machine before each turn, in any unit; turns where it is below SLOW of its best do not count.
    """
    turns: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in runs}
    for turn in range(rounds):
        progress(f"round {turn + 1} of {rounds}")
        for name, run in runs.items():
            run()
            turns[name].append((speed(), [_milliseconds(run) for _ in range(CALLS_PER_TURN)]))
    best = max(measured for of_one in turns.values() for measured, _ in of_one)
    return {name: _timing(of_one, SLOW * best) for name, of_one in turns.items()}


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _timing(turns: list[tuple[float, list[float]]], least: float) -> Timing:
    fast = [times for speed, times in turns if speed >= least]
    ms = np.concatenate(fast or [times for _, times in turns])
    low, median, high = np.percentile(ms, (25, 50, 75))
    return Timing(float(median), float(ms.min()), float(high - low) / 2, ms.size)
