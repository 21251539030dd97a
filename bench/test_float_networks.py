"""Networks that the peers quantize themselves: transformers, and convnets with gates, norms and shuffles.

The peers saturate in 16 bits without VNNI, and random networks make little of their inputs: how far the outputs agree
is shown, not asked for. What the peers take part in has a process of its own.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from float_networks import TOKENS, VOCABULARY, texts_of_mixed_length
from measure import input_for, measure_files_apart, run_alone
from results import geometric_mean
from targets import GATED_ZOO, PEERS_OF_FLOAT, TRANSFORMERS

import qdeploy
from qdeploy import _engine, peers

pytestmark = pytest.mark.filterwarnings("default")  # the peers' own warnings are theirs
ISA = pytest.mark.parametrize("isa", ["", "avx2"])
ANY = -1.0  # agreement


def report_of(title, networks, results, progress, name, bits, rounds, preload, keys) -> None:
    progress("exporting")
    path = networks.exported(name, bits)
    progress("the peers quantize")
    models, absent = networks.of_peers(name)
    progress("in a process of its own")
    report = measure_files_apart(path, models, 1, rounds, preload, ANY)
    results.report(title, report | {"absent": absent}, keys)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer(benchmark, results, float_networks, rounds, progress, name):
    keys = {peer: f"{name}/{peer}" for peer in PEERS_OF_FLOAT}
    title = f"{TRANSFORMERS[name]}, 7 bits"
    report_of(title, float_networks, results, progress, name, 7, rounds(10), None, keys)
    run_alone(benchmark, float_networks.exported(name), 1)


@pytest.mark.parametrize("bits", [7, 6])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_avx2_only(benchmark, results, float_networks, only_avx2, rounds, progress, name, bits):
    keys = {peer: f"{name}/avx2/{bits}/{peer}" for peer in PEERS_OF_FLOAT}
    title = f"{TRANSFORMERS[name]}, AVX2 only, {bits} bits"
    report_of(title, float_networks, results, progress, name, bits, rounds(8), only_avx2, keys)
    run_alone(benchmark, float_networks.exported(name, bits), 1, "avx2")


@ISA
@pytest.mark.parametrize("name", GATED_ZOO)
def test_gated_zoo(benchmark, results, float_networks, request, rounds, progress, name, isa):
    preload = request.getfixturevalue("only_avx2") if isa else None
    key = f"{name}/{isa}/openvino int8"
    title = f"{GATED_ZOO[name]}{', AVX2 only' if isa else ''}"
    report_of(title, float_networks, results, progress, name, 7, rounds(15), preload, {"openvino int8": key})
    ratios = [results.figures.get(f"{net}/{isa}/openvino int8") for net in GATED_ZOO]
    if all(ratios):
        results.figure(f"gated zoo/{isa}", geometric_mean([ratio for ratio, _ in ratios]))
    run_alone(benchmark, float_networks.exported(name), 1, isa or None)


@pytest.mark.parametrize("isa", ["avx2", "avx512vnni"])
def test_ops_of_deit(benchmark, results, float_networks, rounds, isa):
    """Attention, norms and tables as they run in DeiT-S."""
    if isa not in _engine.isas():
        pytest.skip(f"this CPU has no {isa}")
    path = float_networks.exported("deit_s")
    model = qdeploy.load_int_model(path, num_threads=1, isa=isa)
    microseconds, work = defaultdict(float), {"attention": 0, "norm": 25 * 197 * 384, "table": 12 * 197 * 1536}
    for step in model.profile(input_for(model), rounds(50)):
        microseconds[step["op"]] += step["microseconds"]
        work["attention"] += step["macs"] if step["op"] == "attention" else 0
    results.figure(f"ops/{isa}/attention", work["attention"] / microseconds["attention"] / 1e3)
    for op in ("norm", "table"):
        results.figure(f"ops/{isa}/{op}", microseconds[op] / work[op] * 1e3)
    run_alone(benchmark, path, 1, isa)


def test_texts_of_mixed_length(benchmark, results, float_networks, rounds):
    """One call with 64 texts: rows of padding do not exist here."""
    path = float_networks.exported("distilbert")
    model = qdeploy.load_int_model(path, num_threads=1)
    ids, mask = texts_of_mixed_length(64)
    padded = np.ones_like(mask)
    models, _ = float_networks.of_peers("distilbert")
    other = peers.build("onnxruntime int8", str(models["onnxruntime int8"]), ids.shape, 1)
    runs = {"ours": lambda: model(ids, mask), "padded": lambda: model(ids, padded), "peer": lambda: other(ids)}
    times = peers.alternate(runs, rounds(5), calls=1)
    for name, key in (("padded", "texts/padded"), ("peer", "texts/onnxruntime int8")):
        results.figure(key, *times["ours"].over(times[name]))
    assert model.inputs[0]["vocabulary"] == VOCABULARY and ids.shape[1] == TOKENS
    benchmark.pedantic(model, args=(ids, mask), rounds=1)
