"""INT8 here against INT8 and FP32 elsewhere, alternating in one process: the tables at the end of the run.

pytest-benchmark's own columns are our latency alone; the ratios are those of the tables, whose times were taken in
turns. No ratio fails a run; a peer that computes another network does.
"""

from __future__ import annotations

import os
from collections import defaultdict

import numpy as np
import pytest
from measure import AGREES, measure, measure_restricted, run_alone
from networks import float_net
from results import geometric_mean
from targets import BITS, CODES, LAYERS, ZOO

import qdeploy
from qdeploy import _engine, format
from qdeploy.timing import spread

pytestmark = pytest.mark.filterwarnings("default")  # the peers' own warnings are theirs
THREADS = pytest.mark.parametrize("threads", [1, 2])
INT8 = ("int8",)
RUNTIMES = ("onnxruntime int8", "openvino int8")


@pytest.fixture(autouse=True)
def enough_cpus(request) -> None:
    threads = request.node.callspec.params.get("threads", 1) if "callspec" in vars(request.node) else 1
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip(f"{threads} threads on fewer CPUs")


@THREADS
def test_resnet50(benchmark, results, networks, rounds, progress, threads):
    progress("exporting")
    path = networks.exported("resnet50")
    report = measure(path, threads, rounds(20), torch_net=float_net("resnet50"), progress=progress)
    key = f"resnet50/{threads}"
    results.report(f"ResNet-50, {threads} thread(s)", report, {name: f"{key}/{name}" for name in RUNTIMES})
    results.best_float32(report, times_faster=f"{key}/float32")
    ours = report["results"][0]
    if ours["of_limit"]:
        results.figure(f"{key}/peak", ours["of_limit"], ours["of_limit"] * ours["spread_ms"] / ours["median_ms"])
    run_alone(benchmark, path, threads)


@THREADS
def test_ensemble_of_five_against_one_float32(benchmark, results, networks, rounds, progress, threads):
    """EoQ: five 7-bit networks in one file, one call."""
    path, single = networks.ensemble_of("resnet50", 5), networks.exported("resnet50")
    options = {"precisions": ("float32",), "torch_net": float_net("resnet50"), "peers_run": single}
    report = measure(path, threads, rounds(15), progress=progress, **options)
    names = {name: f"eoq/{threads}/{name}" for name in ("onnxruntime float32", "torch eager float32")}
    results.report(f"An ensemble of 5 ResNet-50 against one in FP32, {threads} thread(s)", report, names)
    results.best_float32(report, ratio=f"eoq/{threads}/best")
    run_alone(benchmark, path, threads)


@THREADS
@pytest.mark.parametrize("name", ZOO)
def test_zoo(benchmark, results, networks, rounds, progress, name, threads):
    progress("exporting")
    path = networks.exported(name)
    report = measure(path, threads, rounds(15), precisions=INT8, progress=progress)
    names = {runtime: f"{name}/{threads}/{runtime}" for runtime in RUNTIMES}
    results.report(f"{ZOO[name]}, {threads} thread(s)", report, names)
    ratios = [results.figures.get(f"{net}/{threads}/openvino int8") for net in ZOO]
    if any(ratios):
        results.figure(f"zoo/{threads}", geometric_mean([ratio for ratio, _ in filter(None, ratios)]))
    run_alone(benchmark, path, threads)


@pytest.mark.parametrize("threads", [2])
@pytest.mark.parametrize("batch", [8, 32])
def test_batch(benchmark, results, networks, rounds, progress, batch, threads):
    path = networks.exported("resnet50")
    options = {"batch": batch, "calls": 2, "precisions": INT8, "runtimes": ("openvino",)}
    report = measure(path, threads, rounds(8), progress=progress, **options)
    results.report(f"ResNet-50, batch {batch}, {threads} threads", report, {"openvino int8": f"batch/{batch}"})
    run_alone(benchmark, path, threads, batch=batch)


@pytest.mark.parametrize("bits", BITS)
def test_avx2_only(benchmark, results, networks, rounds, progress, bits):
    """What a CPU without AVX-512 would see."""
    progress("exporting")
    report = restricted(benchmark, networks.exported("resnet50", bits), rounds, progress, "avx2", bits == 7)
    results.report(f"ResNet-50, AVX2 only, {bits} bits", report, {"openvino int8": f"avx2/{bits}"})
    if bits == 7:  # the width that the paper's ratio is for
        results.best_float32(report, times_faster="avx2/float32")


def test_avx512_without_vnni(benchmark, results, networks, rounds, progress):
    report = restricted(benchmark, networks.exported("resnet50"), rounds, progress, "avx512")
    results.report("ResNet-50, AVX-512 without VNNI, 7 bits", report, {"openvino int8": "avx512"})


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_codes_that_fill_their_bits(benchmark, results, networks, rounds, progress, isa):
    """Without VNNI the speed depends on the sums of the codes (ConvKernel::s16_quads)."""
    report = restricted(benchmark, networks.full_range("resnet50", 7), rounds, progress, isa)
    results.report(f"ResNet-50, {isa}, codes that fill 7 bits", report, {"openvino int8": f"{isa}/full"})


@pytest.mark.parametrize("net", ["resnet18", "vgg16_bn"])
def test_avx2_only_of_3x3_convolutions(benchmark, results, networks, rounds, progress, net):
    report = restricted(benchmark, networks.exported(net), rounds, progress, "avx2")
    results.report(f"{ZOO[net]}, AVX2 only, 7 bits", report, {"openvino int8": f"avx2/{net}"})


def test_avx2_only_of_codes_that_fill_8_bits(benchmark, results, networks, rounds, progress):
    """What other people's models hold. The peers saturate in 16 bits there: the column `agrees` shows their results."""
    report = restricted(benchmark, networks.full_range("resnet18", 8), rounds, progress, "avx2", agrees=-1)
    report["absent"].setdefault("onnxruntime int8", "cannot be restricted to AVX2")
    keys = {name: f"avx2/resnet18/full/{name}" for name in RUNTIMES}
    results.report("ResNet-18, AVX2 only, codes that fill 8 bits", report, keys)


@pytest.mark.parametrize("codes", CODES)
def test_avx2_only_layers(benchmark, results, networks, rounds, progress, codes):
    """3x3 convolutions of stride 1 as they run in ResNet-18: the products of the direct form over their time."""
    skip_without("avx2")
    progress("exporting")
    bits = 8 if codes.endswith("8 bits") else 7
    path = networks.exported("resnet18", bits) if codes == "7 bits" else networks.full_range("resnet18", bits)
    member = format.load(path).members[0]
    image = np.random.default_rng(0).standard_normal((1, *member.tensors[0].shape), np.float32)
    profile = qdeploy.load_int_model(path, num_threads=1, isa="avx2").profile(image, rounds(200))
    rates = defaultdict(list)
    for node, step in zip(member.nodes, profile, strict=True):
        channels, *size = member.tensors[node.output].shape
        if step["macs"] and node.constants["weight"].shape[1:] == (channels, 3, 3):
            rates[(*size, channels)].append(step["macs"] / step["microseconds"] / 1e3)
    for shape in LAYERS:
        results.figure(f"avx2/layers/{shape}/{codes}", float(np.median(rates[shape])), spread(rates[shape]))
    run_alone(benchmark, path, 1, "avx2")


ONEDNN = {"avx2": "AVX2", "avx512": "AVX512_CORE"}  # oneDNN's names


def skip_without(isa: str) -> None:
    if isa not in _engine.isas():
        pytest.skip(f"this CPU has no {isa}")


def restricted(benchmark, path, rounds, progress, isa: str, with_float32: bool = False, agrees: float = AGREES) -> dict:
    """Ours and the peers on one thread with the instructions of `isa` alone; our bits are those of the scalar code."""
    skip_without(isa)
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
    logits = [qdeploy.load_int_model(path, isa=name)(x).tobytes() for name in (isa, "scalar")]
    assert logits[0] == logits[1], f"{isa} and scalar give different bits"
    progress(f"in a process of its own with ONEDNN_MAX_CPU_ISA={ONEDNN[isa]}")
    precisions = ("float32", "int8") if with_float32 else INT8
    report = measure_restricted(path, isa, ONEDNN[isa], rounds(12), precisions, agrees)
    run_alone(benchmark, path, 1, isa)
    return report
