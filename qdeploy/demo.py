"""`qdeploy demo`: a packaged ensemble classifies packaged images that it never saw. Needs numpy only."""

from __future__ import annotations

import hashlib
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import qdeploy
from qdeploy import _engine, format, reference
from qdeploy.graph import Graph, Node
from qdeploy.terminal import write

DATA = Path(__file__).parent / "demo_data"
MODEL = DATA / "digits_eoq.safetensors"
SHOWN = 5  # images drawn on the terminal
LATENCY_RUNS = 200
SHADES = " .:-=+*#%@"


def run(threads: int | None) -> dict:
    """Classify, time and compare; the report of the command line. Raises InputError for a bad number of threads."""
    with np.load(DATA / "digits.npz") as archive:
        images, labels, about = archive["images"], archive["labels"], str(archive["about"])
    graph = format.load(MODEL)
    model = qdeploy.load_int_model(MODEL, num_threads=threads)
    probabilities = model(images)
    members = [_accuracy(_logits_of_member(graph, i, images, threads), labels) for i in range(len(graph.members))]
    runs = {"numpy reference": reference.run_all(graph, images)[0]}
    for isa in _engine.isas():
        runs[isa] = qdeploy.load_int_model(MODEL, num_threads=threads, isa=isa)(images)
    float32 = sum(4 * array.size for node in graph.members[0].nodes for array in _parameters(node))
    return {
        "about": about,
        "images": len(images),
        "examples": [_example(images[i], labels[i], probabilities[i]) for i in range(SHOWN)],
        "accuracy": {"members": members, "ensemble": _accuracy(probabilities, labels)},
        "bytes": {"ensemble": MODEL.stat().st_size, "float32_member": float32},
        "isa": model.isa,
        "threads": model.num_threads,
        "latency_us": {batch: _latency_us(model, images[:batch]) for batch in (1, len(images))},
        "sha256_of_probabilities": {name: hashlib.sha256(p.tobytes()).hexdigest() for name, p in runs.items()},
        "equal": all(p.tobytes() == probabilities.tobytes() for p in runs.values()),
    }


def show(report: dict) -> None:
    """Print the report of `run`."""
    write(textwrap.fill(report["about"], 100) + "\n")
    for lines in zip(*(example["drawing"] for example in report["examples"]), strict=True):
        write("  " + "  ".join(lines))
    verdicts = [f"{e['class']} ({e['probability']:.0%}), is {e['label']}" for e in report["examples"]]
    write("  " + "  ".join(v.ljust(len(report["examples"][0]["drawing"][0])) for v in verdicts) + "\n")

    accuracy, size = report["accuracy"], report["bytes"]
    members = accuracy["members"]
    write(f"accuracy   {', '.join(f'{a:.1%}' for a in members)} by each member alone, on {report['images']} images")
    write(f"           {accuracy['ensemble']:.1%} by the ensemble of {len(members)}")
    one, all_float32 = size["float32_member"], size["float32_member"] * len(members)
    write(f"size       {size['ensemble']:,} bytes for all {len(members)} members in one file:")
    ratios = f"{size['ensemble'] / all_float32:.2f}x of them in float32, {size['ensemble'] / one:.2f}x of one alone"
    write("           " + ratios)
    for batch, microseconds in report["latency_us"].items():
        images = "one image" if batch == 1 else f"{batch} images"
        write(f"latency    {microseconds:,.0f} us for {images}, {report['isa']}, {report['threads']} thread(s)")
    write("bits       sha256 of all probabilities:")
    for name, digest in report["sha256_of_probabilities"].items():
        write(f"           {name:<16} {digest[:16]}")
    write(f"           {'the same bits everywhere' if report['equal'] else 'THEY DIFFER'}")


def _logits_of_member(graph: Graph, index: int, images: np.ndarray, threads: int | None) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "member.safetensors"
        format.save(replace(graph, members=[graph.members[index]], combine=None), path)
        return qdeploy.load_int_model(path, num_threads=threads)(images)


def _accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(1) == labels).mean())


def _parameters(node: Node) -> list[np.ndarray]:
    return [node.constants[key] for key in ("weight", "bias")] if "weight" in node.constants else []


def _latency_us(model: qdeploy.Model, images: np.ndarray) -> float:
    """Median over LATENCY_RUNS calls, or as many as fit in half a second."""
    times: list[float] = []
    end = time.perf_counter() + 0.5
    while len(times) < LATENCY_RUNS and (len(times) < 5 or time.perf_counter() < end):
        start = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e6


def _example(image: np.ndarray, label: int, probabilities: np.ndarray) -> dict:
    """One image as lines of characters (two rows of pixels a line), its label and the verdict."""
    pixels = image.mean(2)
    shades = pixels[: len(pixels) // 2 * 2].reshape(-1, 2, pixels.shape[1]).mean(1) / 256 * len(SHADES)
    drawing = ["".join(SHADES[int(shade)] for shade in row) for row in shades]
    verdict = int(probabilities.argmax())
    return {"drawing": drawing, "label": int(label), "class": verdict, "probability": float(probabilities[verdict])}
