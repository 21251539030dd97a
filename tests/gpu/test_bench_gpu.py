"""The benchmarks of a GPU, dry: every case on the CPU with small sizes, the kernels in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton_on_cpu", reason="the kernels of the GPU need Triton", exc_type=ImportError)
import gpu
import gpu_cases
import gpu_checks
import gpu_timer
import torch
from checkout import ROOT
from gpu_timer import GRAPH, Timer
from networks import Networks
from results import Results
from targets import TARGETS, LsqCase
from token_nets import text, vision
from torch import nn

import qdeploy.gpu.model
from qdeploy import format, reference
from qdeploy.training import quantize_


@pytest.fixture(autouse=True)
def one_thread_and_no_inductor(monkeypatch):
    """Functions are traced, but not compiled, which takes seconds for each; networks stay as they are."""
    torch.set_num_threads(1)
    trace = partial(torch.compile, backend="eager")
    monkeypatch.setattr(gpu_cases, "compiled", lambda f: f if isinstance(f, nn.Module) else trace(f))


@pytest.fixture
def timer(monkeypatch):
    monkeypatch.setattr(gpu_timer, "WARM_UP", 1)
    return Timer("cpu", rounds=1, turn_ms=0)


class Small(nn.Module):
    """Residual, with BatchNorm to fold."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.fc = nn.ReLU(), nn.Linear(8, 10)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.relu(self.bn2(self.conv2(x)) + x).mean((2, 3)))


@pytest.fixture
def small(tmp_path):
    """The network and its file, where Networks looks for it."""
    torch.manual_seed(0)
    net, images, path = Small(), torch.randn(4, 3, 8, 8), tmp_path / "small_7.safetensors"
    quantized = deepcopy(net).eval()
    quantize_(quantized)
    qdeploy.export(quantized, images[:1], path, images.numpy())
    return net, path


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """Models for a GPU run in the interpreter; every tile takes the same time."""
    monkeypatch.setattr(qdeploy.gpu.loading, "checked_device", torch.device)
    monkeypatch.setattr(qdeploy.gpu.model, "_milliseconds", lambda launch: launch() or 1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def checked(report: gpu_cases.Report, *keys: str) -> gpu_cases.Report:
    """Nothing failed, the table can be printed, and `keys` are figures."""
    assert not report.wrong and not [row for row in report.rows if "error" in row], str(report)
    assert set(report.figures) == set(keys), report.absent
    assert report.title in str(report)
    json.dumps(vars(report))
    return report


@pytest.mark.parametrize("case", [LsqCase((3, 5)), LsqCase((2, 3, 4), 1), LsqCase((2, 3), 0, "bfloat16")], ids=str)
def test_lsq_of_one_tensor(timer, monkeypatch, case):
    monkeypatch.setattr(LsqCase, "bandwidth_bound", True)
    phases = [f"{case.key}/{phase}" for phase in ("forward", "backward")]
    peers = [f"{case.key}/{peer}" for peer in ("ATen", "eager", "torch.compile")] if case.axis != -1 else []
    report = checked(gpu_cases.lsq_speed(timer, case), *phases, *peers)
    names = {(row["part"], row["contestant"]) for row in report.rows}
    assert {("forward", "ATen"), ("backward", "copy" + GRAPH), ("both by autograd", "torch.compile" + GRAPH)} <= names


def test_lsq_of_all_weights(timer):
    report = gpu_cases.all_weights(timer, [(4, 3, 3, 3), (5, 4, 1, 1)])
    checked(report, *(key for key in TARGETS if key.startswith("gpu/weights/")))


def test_ensemble_average(timer):
    keys = [f"gpu/ensemble/6x7/{rule}" for rule in ("logits", "probs")]
    checked(gpu_cases.average(timer, 3, 6, 7), *keys, *(f"{key}/torch.compile" for key in keys))


def test_ceilings(timer):
    rows = checked(gpu_cases.copies(timer, [4096, 64])).rows + checked(gpu_cases.matrix_peak(timer, 32)).rows
    assert all(row["GB/s"] or row["TOP/s"] for row in rows)


def test_step_of_training(timer):
    checked(gpu_cases.qat_update(timer, Small, 4, 8), *(key for key in TARGETS if key.startswith("gpu/qat/")))


def test_int8_with_tuned_tiles(timer, small, on_cpu, tmp_path):
    net, path = small
    report = gpu_cases.int8(timer, net, path, Networks(tmp_path).ensemble_of("small", 2), 1, tune=True)
    checked(report, *(key for key in TARGETS if key.startswith("gpu/int8/1/")))
    assert (tmp_path / "qdeploy/int8_tiles.json").exists()


def test_int8_beside_other_peers(timer, small, monkeypatch, tmp_path):
    """Here the models run by the reference, which takes less time than the interpreter."""

    def load(path, device):
        graph = format.load(path)
        return lambda images: torch.from_numpy(reference.run(graph, images.numpy()))

    monkeypatch.setattr(qdeploy.gpu, "load", load)
    net, path = small
    ensemble = Networks(tmp_path).ensemble_of("small", 2)
    report = gpu_cases.int8(timer, net, path, ensemble, 1, tune=False)
    checked(report, *(key for key in TARGETS if key.startswith("gpu/int8/1/")))
    assert {"FP32, torch.compile" + GRAPH, "FP16, BatchNorm folded"} <= {row.get("contestant") for row in report.rows}
    wrong = gpu_cases.int8(timer, Small(), path, ensemble, 1, tune=False).wrong
    assert len(wrong) == 1 and wrong[0].startswith("the peers compute another network: correlation ")


def test_checks(timer, small, on_cpu):
    tensors = [case for case in gpu_checks.RAGGED if np.prod(case.shape) < 10_000]
    checked(gpu_checks.check_lsq(timer, tensors, runs=2, large=10_000))
    checked(gpu_checks.check_weights(timer, [(4, 3, 3, 3), (5, 4, 1, 1)], runs=2))
    checked(gpu_checks.check_ensemble(timer, [(3, 2, 7)]))
    graphs = {"small": format.load(small[1]), "vision": vision(64, 8, 2, 3), "text": text(9, 8, 2, 11)}
    graphs["two outputs"] = format.load(ROOT / "tests/data/v4/detector.safetensors")
    checked(gpu_checks.check_int8(timer, graphs, (1, 2)))


def test_a_check_sees_what_is_wrong(timer, monkeypatch):
    """One gradient of a value, those of the steps, and that they change from run to run."""
    right = gpu_checks.lsq_backward
    calls = iter(range(1000))

    def wrong(grad, value, step, *rest):
        of_value, of_step = right(grad, value, step, *rest)
        return of_value.flatten().index_fill(0, torch.tensor([0]), next(calls)).view_as(of_value), of_step + next(calls)

    monkeypatch.setattr(gpu_checks, "lsq_backward", wrong)
    report = gpu_checks.check_lsq(timer, [LsqCase((7, 3), 0)], runs=3, large=5000)
    assert any("1 differences in gradients" in what for what in report.wrong)
    assert any("7 differences in gradients_of_steps" in what for what in report.wrong)
    assert any("3 differences in repeated_runs" in what for what in report.wrong)


def test_a_contestant_that_fails_is_a_row_with_its_error(timer):
    def fails():
        try:
            raise RuntimeError("no such kernel")
        except RuntimeError as error:
            raise ValueError("the capture failed") from error

    found = timer.compare({"good": lambda: None, "bad": fails}, ("good", "bad"))
    report = gpu_cases.Report("title")
    report.add("part", found)
    report.faster("key", found, "bad", "good")
    assert set(found.timings) == {"good", "good" + GRAPH}
    assert "RuntimeError: no such kernel (test_bench_gpu.py:" in str(report)
    assert "no such kernel" in report.absent["key"]


def test_the_program_goes_on_after_a_case_that_fails(timer, tmp_path, capsys):
    def fails(timer):
        raise RuntimeError("out of memory")

    def measures(timer):
        return gpu_cases.Report("good case", [{"part": "a"}], {"gpu/weights/eager": (11.0, 0.5)})

    out = tmp_path / "gpu.json"
    assert not gpu.run(timer, {"bad": fails, "good": measures}, out, {"gpu": "none"})
    document = json.loads(out.read_text())
    assert "out of memory" in document["reports"]["bad"]["wrong"][0]
    (figure,) = document["figures"]
    assert (figure["key"], figure["value"], figure["met"]) == ("gpu/weights/eager", 11.0, True)
    assert set(document["not_measured"]) == {key for key in TARGETS if key.startswith("gpu/")} - {"gpu/weights/eager"}
    printed = capsys.readouterr().out
    assert "WRONG RuntimeError: out of memory" in printed and "11.000x" in printed and "OpenVINO" not in printed
    assert gpu.run(timer, {"good": measures}, out, {})


@pytest.mark.parametrize(("only", "error"), [("nothing", "expected the beginning of check"), ("copy", "a CUDA GPU")])
def test_what_the_program_cannot_do_is_said_at_once(tmp_path, monkeypatch, capsys, only, error):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "gpu.json"), "--models", str(tmp_path / "models"), "--only", only])
    assert error in capsys.readouterr().err


def test_every_target_has_a_case(tmp_path):
    """Figures of the cases by their real names and sizes, without running them."""
    names = gpu.cases(Networks(tmp_path))
    assert {name.split("/")[0] for name in names} == {
        "check", "copy", "peak", "weights", "lsq", "ensemble", "qat", "int8", "tuned"
    }  # fmt: skip
    for key in TARGETS:
        if key.startswith("gpu/"):
            assert any(key.removeprefix("gpu/").startswith(name) for name in names), key


def test_results_keep_a_report():
    results = Results()
    figures, absent = {"gpu/weights/eager": (9.0, 0.5)}, {"gpu/qat/eager": "out of memory"}
    results.gpu_report(gpu_cases.Report("title", [{"part": "a"}], figures, absent))
    summary = results.summary("gpu/")
    assert "MISSED" in summary and "out of memory" in summary and "title\npart" in results.sections()[0]


BARE = """
import sys
sys.path[:] = [path for path in sys.path if path] + [{packages!r}, {bench!r}]

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning", "lightning_fabric", "rich", "PIL") or name == "qdeploy._engine":
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
import gpu, torch, qdeploy
from qdeploy import exporter
from qdeploy.kernels import lsq
from qdeploy.training import MODELS, quantize_
print(qdeploy.__file__, lsq.__file__, sys.modules[quantize_.__module__].__file__)
net = MODELS["nin"](10).eval()
quantize_(net)
images = torch.randn(2, 3, 32, 32)
print(exporter.export(net, images[:1], {out!r}, images.numpy()).top1_agreement)
"""


def test_a_bare_machine(tmp_path):
    """No qdeploy installed, so no C++ engine; none of the packages that only training or charts need."""
    packages = Path(np.__file__).parents[1]
    code = BARE.format(packages=str(packages), bench=str(ROOT / "bench"), out=str(tmp_path / "net"))
    command = [sys.executable, "-S", "-c", code]  # -S: no .pth file, no editable install
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    paths, agreement = done.stdout.strip().splitlines()[-2:]
    assert paths.split() == [f"{ROOT}/{name}.py" for name in ("qdeploy/__init__", "kernels/lsq", "training/quantize")]
    assert float(agreement) >= 0.5
    assert (tmp_path / "net").stat().st_size > 1000
