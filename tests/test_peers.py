"""Times taken in turns, and turns on a slow machine left out; peers that fail before they are timed."""

import time
from importlib.util import find_spec

import numpy as np
import pytest

import qdeploy
from qdeploy import format
from qdeploy.demo import MODEL
from qdeploy.errors import InputError
from qdeploy.onnx import to_onnx
from qdeploy.peers import CALLS_PER_TURN, OURS, alternate, contestants, correlation, faults, measure, mnn, onnxruntime
from qdeploy.timing import Timing


def test_contestants_take_turns():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = alternate(runs, rounds=3)
    turn = CALLS_PER_TURN + 1
    assert order == (["a"] * turn + ["b"] * turn) * 3
    assert all(timing.calls == 3 * CALLS_PER_TURN for timing in timings.values())


def test_slow_turns_do_not_count():
    speeds = iter([1.0, 0.5, 0.95, 0.89])  # a, b, a, b
    timings = alternate({"a": lambda: None, "b": lambda: time.sleep(0.001)}, rounds=2, speed=lambda: next(speeds))
    assert timings["a"].calls == 2 * CALLS_PER_TURN
    assert timings["b"].calls == 2 * CALLS_PER_TURN  # none was fast enough: then all count
    assert timings["b"].minimum >= 1.0 > timings["a"].median
    speeds = iter([1.0, 0.5, 0.6, 0.95])
    timings = alternate({"a": lambda: None, "b": lambda: None}, rounds=2, speed=lambda: next(speeds))
    assert (timings["a"].calls, timings["b"].calls) == (CALLS_PER_TURN, CALLS_PER_TURN)


def test_timing_of_calls():
    one = Timing.of([5.0, 1.0, 4.0, 2.0, 3.0], 10)
    assert one == Timing(median=3.0, minimum=1.0, spread=1.0, calls=10)
    assert one.over(Timing(1.5, 1.0, 0.5, 4)) == (2.0, pytest.approx(2 * 2**0.5 / 3))


def test_report_of_ours_beside_another():
    model = qdeploy.load_int_model(MODEL, num_threads=1)
    x = np.zeros((3, *model.inputs[0]["shape"]), np.float32)
    seen = []
    report = measure(model, x, {"snail float32": lambda x: seen.append(x.shape) or time.sleep(0.01)}, rounds=2, calls=3)
    assert report["macs"] == 3 * sum(step["macs"] for step in model.plan(1))
    assert seen == [x.shape] * 2 * 4
    ours, snail = report["results"]
    assert (ours["runtime"], ours["ratio"]) == (OURS, None)
    assert snail["ratio"] == ours["median_ms"] / snail["median_ms"] < 1
    assert snail["min_ms"] >= 10
    peak = report["peak_gmacs"]["float32"]
    assert snail["of_limit"] == (peak and pytest.approx(report["macs"] / peak / 1e6 / snail["median_ms"]))


def test_peers_that_fail_are_named_with_the_reason():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
    graph = format.load(MODEL)
    good = to_onnx(graph, quantized=True).SerializeToString()
    found = faults({"onnxruntime int8": good, "onnxruntime float32": good[:100]}, (2, *graph.input_shape), 1)
    assert list(found) == ["onnxruntime float32"]
    assert "onnxruntime" in found["onnxruntime float32"]
    runs, absent = contestants(graph, (2, *graph.input_shape), 1, runtimes=("onnxruntime",))
    assert (list(runs), absent) == (["onnxruntime float32", "onnxruntime int8"], {})
    x = np.random.default_rng(0).normal(0.5, 0.1, (2, *graph.input_shape)).astype(np.float32)
    ours = qdeploy.load_int_model(MODEL)(x)
    assert all(correlation(ours, run(x)) > 0.99 for run in runs.values())


HAS_MNN = pytest.mark.skipif(find_spec("MNN") is None, reason="MNN is not installed")  # its import prints


@HAS_MNN
def test_mnn_in_float32(capfd):
    """It says nothing, of what it has to say at import, conversion and loading, and takes any strides."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
    graph = format.load(MODEL)
    model, shape = to_onnx(graph, quantized=False).SerializeToString(), (3, *graph.input_shape)
    x = np.random.default_rng(0).normal(0.5, 0.1, shape).astype(np.float32)
    run = mnn(model, shape, 2)
    y = run(x)
    assert capfd.readouterr() == ("", "")
    assert (y.shape, y.dtype) == ((3, 10), np.float32)
    assert np.abs(y - onnxruntime(model, shape, 1)(x)).max() <= 1e-5
    assert np.array_equal(run(np.asfortranarray(x)), y)
    assert list(contestants(graph, shape, 1, runtimes=("MNN",))[0]) == ["MNN float32"]


@HAS_MNN
def test_mnn_that_fails():
    with pytest.raises(InputError) as error:
        mnn(b"no model", (1, 1, 16, 16), 1)
    assert str(error.value) == "expected an ONNX model that MNN converts, got another"
    pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
    model = to_onnx(format.load(MODEL), quantized=False).SerializeToString()
    run = mnn(model, (1, 3, 16, 16), 1)
    with pytest.raises(RuntimeError) as error:
        run(np.zeros((1, 3, 16, 16), np.float32))
    assert str(error.value) == "MNN stopped with error 3"


def test_runtime_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("qdeploy.peers.find_spec", lambda name: None)
    runs, absent = contestants(format.load(MODEL), (1, 1, 16, 16), 1)
    assert runs == {}
    float32 = ["onnxruntime float32", "openvino float32", "MNN float32"]
    names = [*float32, "onnxruntime int8", "openvino int8"]
    assert absent == dict.fromkeys(names, "no onnx here: pip install 'qdeploy[bench]'")


def test_absent_names_the_package(monkeypatch):
    monkeypatch.setattr("qdeploy.peers.find_spec", lambda name: None if name == "MNN" else name)
    runs, absent = contestants(format.load(MODEL), (1, 1, 16, 16), 1, runtimes=("MNN",))
    assert (runs, absent) == ({}, {"MNN float32": "no MNN here: pip install 'qdeploy[bench]'"})


def test_correlation():
    a = np.array([1.0, 2.0, 3.0])
    assert correlation(a, 2 * a + 1) == pytest.approx(1)
    assert correlation(a, -a) == pytest.approx(-1)
    assert correlation(a, np.ones(3)) is None
