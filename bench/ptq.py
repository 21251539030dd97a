"""Networks that were trained in float32, quantized after training: by qdeploy, onnxruntime and NNCF on the same images.

    qdeploy train --data digits-dg --test-domain usps --method erm --no-export --out runs/nin
    python bench/ptq.py runs/nin/seed0 [--bits 8 7 4] [--methods nearest obc]

Prints the rows of one network for docs/ptq.md. Calibrated on validation images of the source domains, judged on all
images of the held-out domain. onnxruntime runs its own file and NNCF's twice: in exact mode and in its default.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from static_quantization import quantized_statically

import qdeploy
from qdeploy.terminal import columns, note
from qdeploy.training.domains import benchmark_of
from qdeploy.training.finished_runs import read_runs
from qdeploy.training.selected_network import calibration_images, load_trained

IMAGES = 128  # of each source domain, to calibrate
BATCH = 100  # images that are judged at a time
Run = Callable[[np.ndarray], np.ndarray]


class Trained:
    """A finished run: its network, and images with their labels."""

    def __init__(self, folder: Path) -> None:
        [(run, done)] = read_runs([folder]).items()
        benchmark = benchmark_of(done.config)
        self.net = load_trained(run, benchmark)
        self.calibration = calibration_images(done.config, benchmark, IMAGES).numpy()
        domain = benchmark.domains[benchmark.index(done.config.targets[0])]
        self.labels = np.asarray(domain.labels)
        self.images = benchmark.inputs.for_network(domain.batch(np.arange(len(self.labels)))).numpy()
        self.logits = self.of(self._float)

    def _float(self, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.net(torch.from_numpy(images)).numpy()

    def of(self, run: Run) -> np.ndarray:
        parts = [run(self.images[i : i + BATCH]) for i in range(0, len(self.images), BATCH)]
        return np.concatenate(parts)

    def judged(self, name: str, bits: int | None, run: Run, seconds: float | None = None) -> dict[str, Any]:
        logits = self.of(run)
        classes, noise = logits.argmax(1), np.square(logits - self.logits, dtype=np.float64).sum()
        signal = np.square(self.logits, dtype=np.float64).sum()
        return {
            "method": name,
            "bits": bits,
            "accuracy": f"{100 * (classes == self.labels).mean():.2f}",
            "agreement": f"{100 * (classes == self.logits.argmax(1)).mean():.2f}",
            "SQNR dB": f"{10 * np.log10(signal / noise):.1f}" if noise else None,
            "s": None if seconds is None else f"{seconds:.0f}",
        }


def ours(trained: Trained, folder: Path, bits: list[int], methods: list[str]) -> Iterator[dict[str, Any]]:
    for b in bits:
        for rounding in methods:
            for correct_bias in (False, True):
                path, began = folder / "net.safetensors", time.process_time()
                options = {"fallback_bits": b, "rounding": rounding, "correct_bias": correct_bias}
                qdeploy.export(trained.net, trained.images[:1], path, trained.calibration, **options)
                seconds = time.process_time() - began
                name = f"qdeploy, {rounding}" + (", bias corrected" if correct_bias else "")
                yield trained.judged(name, b, qdeploy.load_int_model(path), seconds)


def theirs(trained: Trained, folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / "net.onnx"
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "N"}}}
    torch.onnx.export(
        trained.net, (torch.from_numpy(trained.images[:1]),), path, opset_version=17, dynamo=False, **names
    )
    for name, bits, quantized in (
        ("onnxruntime", 8, lambda: _by_onnxruntime(trained, path, False)),
        ("onnxruntime, reduce_range", 7, lambda: _by_onnxruntime(trained, path, True)),
        ("NNCF", 8, lambda: _by_nncf(trained, path)),
    ):
        try:
            file = quantized()
        except ImportError as error:
            print(f"left out: {name} (no {error.name} here)")
            continue
        for mode, exact in (("exact mode", "1"), ("default", "0")):
            yield trained.judged(f"{name}, {mode}", bits, _session(file, exact))


def _by_onnxruntime(trained: Trained, path: Path, reduce_range: bool) -> Path:
    out = path.with_name(f"onnxruntime{reduce_range}.onnx")
    quantized_statically(path, out, np.array_split(trained.calibration, 8), reduce_range)
    return out


def _by_nncf(trained: Trained, path: Path) -> Path:
    import nncf
    import onnx

    data = nncf.Dataset([{"x": image[None]} for image in trained.calibration])
    quantized = nncf.quantize(onnx.load(path), data, subset_size=len(trained.calibration))
    out = path.with_name("nncf.onnx")
    onnx.save(quantized, out)
    return out


def _session(path: Path, exact: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", exact)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"x": images})[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run in float32")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 7, 4], help="of the weights here (default: 8 7 4)")
    parser.add_argument("--methods", nargs="+", default=["nearest", "obc"], help="rounding (default: nearest obc)")
    parser.add_argument("--no-peers", action="store_true", help="qdeploy alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trained = Trained(args.run)
    rows = [trained.judged("float32", None, trained._float)]
    with tempfile.TemporaryDirectory() as folder:
        peers = [] if args.no_peers else theirs(trained, Path(folder))
        for row in itertools.chain(peers, ours(trained, Path(folder), args.bits, args.methods)):
            note("  ".join(map(str, row.values())))  # minutes, of large networks
            rows.append(row)
    print(columns(rows))


if __name__ == "__main__":
    main()
