"""The benchmarks and checks on a GPU as one program, for a machine with this repository, PyTorch and Triton:

    python bench/gpu.py --out gpu.json                            # all of it
    python bench/gpu.py --out gpu.json --only check lsq/4096x4096 # the cases whose names begin so

qdeploy need not be installed and no network is needed. The file is written after every case, so that a time limit loses
one case at most; a case that fails leaves its error there. The exit code is 1 where a case failed or a check found a
difference.
"""

from __future__ import annotations

import argparse
import gc
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

from checkout import ROOT  # first: all others import qdeploy

# isort: split
import gpu_cases
import gpu_checks
import token_nets
import torch
import triton
from gpu_cases import Report
from gpu_timer import Timer, one_line
from networks import Networks, float_net
from results import Results
from targets import ENSEMBLE, EOQ_MEMBERS, INT8_BATCHES, LSQ

from qdeploy import format
from qdeploy.demo import MODEL
from qdeploy.graph import Graph
from qdeploy.training import MODELS

Case = Callable[[Timer], Report]


def cases(networks: Networks) -> dict[str, Case]:
    """Every case by name: the checks, then what is quick, then what torch.compile or tuning makes slow."""

    def int8(timer: Timer, batch: int, tune: bool) -> Report:
        files = networks.exported("resnet50"), networks.ensemble_of("resnet50", EOQ_MEMBERS)
        return gpu_cases.int8(timer, float_net("resnet50"), *files, batch, tune)

    make = partial(MODELS["resnet50"], 1000)
    with torch.device("meta"):
        weights = [module.weight.shape for module in make().modules() if isinstance(module, torch.nn.Conv2d)]
    files = {path.name: format.load(path) for path in (MODEL, *sorted(ROOT.glob("tests/data/v*/*.safetensors")))}
    averages = [(5, 1000, 345), (3, 7, 7), (1, 33, 1000), (5, 3, 100_000)]
    found: dict[str, Case] = {
        "check/lsq": lambda t: gpu_checks.check_lsq(t, gpu_checks.RAGGED, runs=200, large=2**31 + 4096),
        "check/weights": lambda t: gpu_checks.check_weights(t, weights, runs=200),
        "check/ensemble": lambda t: gpu_checks.check_ensemble(t, averages),
        "check/int8": lambda t: gpu_checks.check_int8(t, files, batches=(1, 64, 3, 1)),
        "check/tokens": lambda t: gpu_checks.check_int8(t, blocks(), batches=(1, 9, 2)),
        "copy": lambda t: gpu_cases.copies(t, [2**i for i in range(22, 32)]),
        "peak": lambda t: gpu_cases.matrix_peak(t, 8192),
        "weights": lambda t: gpu_cases.all_weights(t, weights),
    }
    found |= {f"lsq/{case.name}": partial(gpu_cases.lsq_speed, case=case) for case in LSQ}
    for images, classes in ENSEMBLE:
        sizes = {"members": EOQ_MEMBERS, "images": images, "classes": classes}
        found[f"ensemble/{images}x{classes}"] = partial(gpu_cases.average, **sizes)
    found["qat"] = lambda t: gpu_cases.qat_update(t, make, batch=96, size=224)
    for kind, tune in (("int8", False), ("tuned", True)):
        found |= {f"{kind}/{batch}": partial(int8, batch=batch, tune=tune) for batch in INT8_BATCHES}
    return found


def blocks() -> dict[str, Graph]:
    """Those of a DeiT-S and of a DistilBERT."""
    return {"vision": token_nets.vision(224, 384, 6, 1000), "text": token_nets.text(128, 768, 12, 30_522)}


def machine() -> dict:
    """The GPU and the versions that figures depend on."""
    gpu = torch.cuda.get_device_properties(0)
    query = [which("nvidia-smi") or "true", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "l2_bytes": gpu.L2_cache_size,
        "driver": subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0],
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def run(timer: Timer, chosen: dict[str, Case], out: Path, about: dict) -> bool:
    """Runs the cases, prints their tables and keeps `out` up to date; whether nothing failed and nothing was wrong."""
    results, good = Results(), True
    for number, (name, case) in enumerate(chosen.items(), 1):
        print(f"[{number}/{len(chosen)}] {name}", flush=True)
        start = time.perf_counter()
        try:
            report = case(timer)
        except Exception as error:
            traceback.print_exc()
            report = Report(name, wrong=[one_line(error)])
        seconds = time.perf_counter() - start
        print(report, *(f"WRONG {what}" for what in report.wrong), f"{seconds:.1f} s\n", sep="\n", flush=True)
        good = good and not report.wrong
        results.gpu_report(report)
        results.reports[report.title] |= {"case": name, "seconds": seconds, "wrong": report.wrong}
        results.save(out, about, "gpu/")
        free_memory()
    print(results.summary("gpu/"))
    return good


def free_memory() -> None:
    """Between cases."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="cases whose names begin so")
    parser.add_argument("--models", type=Path, help="a folder that keeps the exported networks for the next run")
    args = parser.parse_args(arguments)
    with TemporaryDirectory() as temporary:
        folder = args.models or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        networks = Networks(folder)
        every = cases(networks)
        chosen = {name: case for name, case in every.items() if name.startswith(tuple(args.only))}
        if not chosen:
            parser.error(f"expected the beginning of {', '.join(every)}, got {' '.join(args.only)} - at --only")
        if not torch.cuda.is_available():
            parser.error("expected a CUDA GPU that PyTorch can use, got none")
        return 0 if run(Timer("cuda"), chosen, args.out, machine()) else 1


if __name__ == "__main__":
    sys.exit(main())
