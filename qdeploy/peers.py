"""Other runtimes beside qdeploy: the same network, the same threads, alternating in one process.

Shared machines drop to two thirds of their speed for seconds at a time, so a ratio of times measured apart means
nothing. `alternate` gives each contestant its turn in every round, and what is reported is the ratio of medians.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qdeploy import _engine
from qdeploy.arguments import integer
from qdeploy.errors import InputError
from qdeploy.graph import Graph
from qdeploy.model import MAX_ROUNDS
from qdeploy.onnx import to_onnx
from qdeploy.terminal import Status, columns, percent
from qdeploy.timing import Timing

if TYPE_CHECKING:
    from qdeploy.model import Model

Run = Callable[[np.ndarray], np.ndarray]
Shape = Sequence[int]
OURS = "qdeploy int8"
PRECISIONS = ("float32", "int8")
CALLS_PER_TURN = 4  # timed; one more before them brings code and weights back into the caches
SLOW = 0.9
GATE_SECONDS = 0.001  # of the peak loop before each turn
PEAK_SECONDS = 0.05
TRIAL_SECONDS = 300


# ---- The runtimes ----------------------------------------------------------------------------------------------------


def onnxruntime(model: bytes | str, shape: Shape, threads: int) -> Run:
    """A session over an ONNX model (its content or its path) for f32 inputs of `shape`, batch included. Its `threads`
    threads do not spin between calls."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_free_dimension_override_by_name("N", shape[0])
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def openvino(model: bytes | str, shape: Shape, threads: int) -> Run:
    """An OpenVINO request likewise: one stream of `threads` threads in the precision of the model (f32 stays f32).

    The batch is fixed as well: with a dynamic one 2026.4 is 21 % slower on DenseNet-121 and 10 % on MobileNetV2.
    """
    import openvino as ov

    core = ov.Core()
    network = core.read_model(model)
    network.reshape({0: list(shape)})
    config = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(network, "CPU", config).create_infer_request()
    return lambda x: request.infer({0: x}, share_inputs=True)[0]


def mnn(model: bytes | str, shape: Shape, threads: int) -> Run:
    """An MNN session likewise, in float32. InputError where MNN cannot convert the model.

    With MNN 3.6.1 the logits of ResNet-50 and ResNet-18 are within 1.1e-4 of their range of those of onnxruntime, at a
    correlation of 1 - 2e-8: f32 in which 3x3 convolutions take a Winograd form. Without that form it is 1e-6.
    """
    with tempfile.TemporaryDirectory() as folder, _silence():
        import MNN
        from _tools import mnnconvert  # not MNN.tools.mnnconvert: its import installs a package and calls a server

        source, converted = Path(folder, "onnx"), Path(folder, "mnn")
        if isinstance(model, bytes):
            source.write_bytes(model)
        else:
            source = Path(model)
        mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(converted)])
        if not converted.exists():  # it returns True all the same
            raise InputError("expected an ONNX model that MNN converts, got another")
        network = MNN.Interpreter(str(converted))
        session = network.createSession({"backend": "CPU", "numThread": threads, "precision": "high"})
        entry = network.getSessionInput(session)
        network.resizeTensor(entry, tuple(shape))
        network.resizeSession(session)
        result = network.getSessionOutput(session)

    def tensor(x: np.ndarray) -> MNN.Tensor:  # a copy; of memory as it lies there, whatever the strides
        return MNN.Tensor(x.shape, MNN.Halide_Type_Float, np.ascontiguousarray(x), MNN.Tensor_DimensionType_Caffe)

    def run(x: np.ndarray) -> np.ndarray:
        entry.copyFrom(tensor(x))
        code = network.runSession(session)
        if code:
            raise RuntimeError(f"MNN stopped with error {code}")
        y = tensor(np.empty(result.getShape(), np.float32))
        result.copyToHostTensor(y)
        return y.getNumpyData().copy()  # it is a view that does not keep `y`

    return run


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard output, not even from C, where MNN prints as it is imported, converts and loads."""
    flush = ctypes.CDLL(None).fflush
    flush(None)
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


class Runtime(NamedTuple):
    build: Callable[[bytes | str, Shape, int], Run]
    precisions: Sequence[str] = PRECISIONS


# By the name of the package that is imported.
RUNTIMES = {"onnxruntime": Runtime(onnxruntime), "openvino": Runtime(openvino), "MNN": Runtime(mnn, ("float32",))}


def contestants(
    graph: Graph,
    shape: Shape,
    threads: int,
    precisions: Sequence[str] = PRECISIONS,
    runtimes: Sequence[str] = tuple(RUNTIMES),
) -> tuple[dict[str, Run], dict[str, str]]:
    """The runtimes over `graph` by name ("openvino int8"), for f32 inputs of `shape`; and of each that cannot take part
    the reason. Each runs a first time in a child process, so that one that crashes does not take this process along."""
    content = cache(lambda precision: to_onnx(graph, quantized=precision == "int8").SerializeToString())
    models, absent = {}, {}
    for precision, runtime in product(precisions, runtimes):
        if precision not in RUNTIMES[runtime].precisions:
            continue
        name = f"{runtime} {precision}"
        missing = [package for package in ("onnx", runtime) if find_spec(package) is None]
        try:
            if graph.vocabulary is not None:
                raise InputError("expected images for a peer, got texts")
            if missing:
                raise InputError(f"no {missing[0]} here: pip install 'qdeploy[bench]'")
            models[name] = content(precision)
        except InputError as error:
            absent[name] = str(error)
    absent |= faults(models, shape, threads)
    runs = {name: build(name, model, shape, threads) for name, model in models.items() if name not in absent}
    return runs, absent


def build(name: str, model: bytes | str, shape: Shape, threads: int) -> Run:
    """The runtime "openvino int8" over a model (its content or its path) for inputs of `shape`."""
    return RUNTIMES[name.split()[0]].build(model, shape, threads)


# ---- The trial in a child process ------------------------------------------------------------------------------------


def faults(models: dict[str, bytes], shape: Shape, threads: int) -> dict[str, str]:
    """What goes wrong with each ONNX model in its runtime ("openvino int8": content): crashes, errors, no answer."""
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            (Path(folder) / name).write_bytes(model)
        if not models or _fault(folder, list(models), shape, threads) is None:
            return {}
        return {name: fault for name in models if (fault := _fault(folder, [name], shape, threads)) is not None}


def _fault(folder: str, names: list[str], shape: Shape, threads: int) -> str | None:
    arguments = (folder, names, tuple(shape), threads)
    program = f"import sys; sys.path[:] = {sys.path!r}\nfrom qdeploy import peers; peers.trial(*{arguments!r})"
    try:
        child = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer in {TRIAL_SECONDS} s"
    if child.returncode < 0:
        return f"crashed ({signal.Signals(-child.returncode).name})"
    said = child.stderr.decode(errors="backslashreplace").strip().splitlines() or ["failed"]
    return said[-1] if child.returncode else None


def trial(folder: str, names: list[str], shape: Shape, threads: int) -> None:
    """What the child process does: two calls of each."""
    for name in names:
        run = build(name, str(Path(folder) / name), shape, threads)
        for _ in range(2):
            run(np.zeros(shape, np.float32))


# ---- Times -----------------------------------------------------------------------------------------------------------


def alternate(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    progress: Status = lambda text: None,
    speed: Callable[[], float] = lambda: 1.0,
    calls: int = CALLS_PER_TURN,
) -> dict[str, Timing]:
    """Call every contestant in turn, `rounds` times over, and time `calls` calls of each turn.

    `speed` measures the machine before each turn, in any unit; turns where it is below SLOW of its best do not count.
    """
    turns: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in runs}
    for turn in range(integer(rounds, 1, MAX_ROUNDS, "rounds")):
        progress(f"round {turn + 1} of {rounds}")
        for name, run in runs.items():
            run()
            turns[name].append((speed(), [_milliseconds(run) for _ in range(calls)]))
    best = max(measured for of_one in turns.values() for measured, _ in of_one)
    return {name: _timing(of_one, SLOW * best) for name, of_one in turns.items()}


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _timing(turns: list[tuple[float, list[float]]], least: float) -> Timing:
    fast = [times for speed, times in turns if speed >= least]
    ms = np.concatenate(fast or [times for _, times in turns])
    return Timing.of(ms, ms.size)


# ---- The report ------------------------------------------------------------------------------------------------------


def measure(
    model: Model,
    x: np.ndarray,
    others: dict[str, Run],
    rounds: int,
    *,
    peer_macs: int | None = None,
    calls: int = CALLS_PER_TURN,
    progress: Status = lambda text: None,
) -> dict:
    """Times of `model` and `others` ("openvino int8": run) on the images `x`, in turns.

    One row of `results` for each, ours first: milliseconds, `ratio` = ours / theirs of the medians with its spread, and
    the share of the hardware limit, that is of what the multiply-accumulates take at the peak of the instructions.
    `peer_macs`: of the peers, where they run another network than `model`. None stands for what is not known.
    """
    ours = sum(step["macs"] for step in model.plan(len(x)))
    theirs = ours if peer_macs is None else peer_macs
    runs: dict[str, Callable[[], object]] = {OURS: lambda: model(x)}
    runs |= {name: partial(run, x) for name, run in others.items()}
    before = peaks(model.isa)

    def gate() -> float:
        return _engine.peak_gmacs(model.isa, "int8", GATE_SECONDS) or 1.0

    timings = alternate(runs, rounds, progress, gate, calls)
    best = {key: peak and max(peak, before[key] or 0.0) for key, peak in peaks(model.isa).items()}
    rows = []
    for name, timing in timings.items():
        peak = best[name.rsplit(" ", 1)[1]]
        limit = peak and (ours if name == OURS else theirs) / (peak * model.num_threads) / 1e6
        ratio, spread = (None, None) if name == OURS else timings[OURS].over(timing)
        rows.append(
            {
                "runtime": name,
                "median_ms": timing.median,
                "min_ms": timing.minimum,
                "spread_ms": timing.spread,
                "calls": timing.calls,
                "ratio": ratio,
                "ratio_spread": spread,
                "of_limit": limit and limit / timing.median,
            }
        )
    about = {"isa": model.isa, "threads": model.num_threads, "batch": len(x), "macs": ours, "peak_gmacs": best}
    return {**about, "results": rows}


def text(report: dict) -> str:
    """A report of `measure` as a table and the limits; `report` may have `absent`, the reasons of peers that are not in
    it, and the `correlation` of each row's output with ours."""
    rows = []
    for row in report["results"]:
        shown = {"runtime": row["runtime"], "median ms": row["median_ms"], "min ms": row["min_ms"]}
        shown |= {"spread": row["spread_ms"], "qdeploy/it": row["ratio"], "+-": row["ratio_spread"]}
        rows.append(shown | {"of limit": percent(row["of_limit"]), "agrees": row.get("correlation"), "note": ""})
    rows += [{"runtime": name, "note": reason} for name, reason in report.get("absent", {}).items()]
    lines = [columns(rows), ""]
    for precision in PRECISIONS:
        best = best_peer(report, precision)
        if best:
            lines.append(f"{1 / best['ratio']:.2f}x the speed of the best {precision} peer ({best['runtime']})")
    for precision, peak in report["peak_gmacs"].items():
        if peak:
            lines.append(f"peak of {precision}: {peak:.0f} GMAC/s a thread")
    return "\n".join(lines)


def best_peer(report: dict, precision: str) -> dict | None:
    """The row of the fastest peer of "int8" or "float32"."""
    rows = [row for row in report["results"][1:] if row["runtime"].endswith(precision)]
    return min(rows, key=lambda row: row["median_ms"], default=None)


def peaks(isa: str) -> dict[str, float | None]:
    """1e9 multiply-accumulates a second of one core, by precision."""
    return {precision: _engine.peak_gmacs(isa, precision, PEAK_SECONDS) for precision in PRECISIONS}


def correlation(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """How far two outputs agree, 1 at best; None where one of them is constant."""
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return None
    return float(np.corrcoef(ours.ravel(), theirs.ravel())[0, 1])
