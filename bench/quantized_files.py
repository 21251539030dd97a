"""Files that onnxruntime's `quantize_static` wrote, imported: how near our logits are to onnxruntime's, and our times
beside those of onnxruntime and OpenVINO on the same file.

    python bench/quantized_files.py [resnet18 resnet50 runs/mobilenet_v2/seed0] [--reduce-range] [--images 256]

A name of `qdeploy train` has random weights, and BatchNorm the statistics of its data; the folder of a finished run in
float32 has its own weights and images of its held-out domain. QDQ, u8 activations, s8 weights per channel.
onnxruntime is judged and timed in exact mode; its default and OpenVINO saturate without VNNI. `error` is the largest
difference of a logit; `margin` that of onnxruntime's two largest logits where our class is another: up to twice `error`
it says nothing. A margin of 0 are two classes with one code.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from networks import float_net, images_for
from ptq import Trained
from static_quantization import quantized_statically
from torch import nn

import qdeploy
from qdeploy import peers
from qdeploy.terminal import columns

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
BATCH = 8  # images that are judged at a time
EXACT, DEFAULT, OPENVINO = "onnxruntime exact int8", "onnxruntime int8", "openvino int8"
Run = Callable[[np.ndarray], np.ndarray]


class Network(NamedTuple):
    """In float32, with what calibrates it and what it is judged on, f32 [N, C, H, W]."""

    net: nn.Module
    calibration: np.ndarray
    images: np.ndarray


def network(name: str, count: int) -> Network:
    if Path(name).is_dir():
        trained = Trained(Path(name))
        chosen = np.linspace(0, len(trained.images) - 1, count, dtype=np.int64)  # of all classes
        return Network(trained.net, trained.calibration, trained.images[chosen])
    seen_by_batch_norm = images_for(name).numpy()
    images = np.random.default_rng(2).standard_normal((count, *seen_by_batch_norm.shape[1:])).astype(np.float32)
    return Network(float_net(name), seen_by_batch_norm, images)


def quantized(one: Network, folder: Path, reduce_range: bool) -> Path:
    """The network as ONNX of opset 17."""
    source, path = folder / "float.onnx", folder / "net.onnx"
    options: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "N"}}}
    example = torch.from_numpy(one.images[:1])
    torch.onnx.export(one.net, (example,), source, opset_version=17, dynamo=False, **options)
    quantized_statically(source, path, (image[None] for image in one.calibration), reduce_range)
    return path


def exact(path: Path, threads: int) -> Run:
    """onnxruntime without the saturation of its AVX2 kernels."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"x": images})[0]


def agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, str]:
    second, first = np.sort(theirs, 1)[:, -2:].T
    other = ours.argmax(1) != theirs.argmax(1)
    return {
        "correlation": f"{np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]:.6f}",
        "same class": f"{(~other).sum()}/{len(ours)}",
        "error": f"{np.abs(ours - theirs).max():.3g}",
        "margin": f"{(first - second)[other].max(initial=0):.3g}",
    }


def row(name: str, folder: Path, args: argparse.Namespace) -> dict[str, str]:
    source = network(name, args.images)
    path, written, images = quantized(source, folder, args.reduce_range), folder / "net.safetensors", source.images
    qdeploy.export(path, None, written)
    model, of_onnxruntime = qdeploy.load_int_model(written, num_threads=args.threads), exact(path, args.threads)
    parts = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    ours, theirs = (np.concatenate([run(part) for part in parts]) for run in (model, of_onnxruntime))
    found = {"network": name} | agreement(ours, theirs)
    one = images[:1]
    others = {kind: peers.build(kind, str(path), one.shape, args.threads) for kind in (DEFAULT, OPENVINO)}
    report = peers.measure(model, one, {EXACT: of_onnxruntime, **others}, args.rounds)
    for timed in report["results"]:
        ratio = "" if timed["ratio"] is None else f" ({timed['ratio']:.2f})"
        found[f"{timed['runtime'].removesuffix(' int8')} ms"] = f"{timed['median_ms']:.2f}{ratio}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, help=f"or runs (default: {' '.join(NETWORKS)})")
    parser.add_argument("--reduce-range", action="store_true", help="weights of 7 bits")
    parser.add_argument("--images", type=int, default=256, help="that are judged (default: 256)")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing of one image (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    args = parser.parse_args()
    for name in args.networks:
        if name not in NETWORKS and not Path(name).is_dir():
            parser.error(f"expected {', '.join(NETWORKS)} or the folder of a finished run, got {name}")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            print(columns([row(name, Path(folder), args)]), flush=True)


if __name__ == "__main__":
    main()
