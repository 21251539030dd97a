"""What must hold of any file: both readers say the same, and a model gives the bits of the reference."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
from builder import text_batch

import qdeploy
from qdeploy import _engine, reference
from qdeploy.errors import ModelError
from qdeploy.format import load, save
from qdeploy.graph import Graph, Node
from qdeploy.model import Model, TextModel

RUNNABLE = 3_000_000  # multiply-accumulates and elements of an image; larger models are loaded but not run
MESSAGE = re.compile(r"expected [^\n]+, got [^\n]+ - at [^\n]+")
# What the engine alone may refuse, for what it would take to run the model: the end of docs/format.md section 3.
NEEDS = re.compile(r"expected (a padded image below|(a header|weights|activations) that fits? |weights of at most )")

# Of several faults both name the first in the order of reading, but not within one text of JSON: Python's parser tells
# of a key that stands twice at the end of its object, and of depth at the end of all.
JSON_FAULT = re.compile(
    "expected (JSON in UTF-8 with finite numbers, got something else|JSON nested at most 16 deep, got deeper"
    "|unique keys, got the key `.*` twice) - at the (header|graph) in .*"
)


class Disagreement(AssertionError):
    """The readers, or an engine and the reference, do not agree."""


def check(path: Path, isa: str, threads: int) -> str:
    """Returns what both readers say of the file, "" where it is a model. Raises Disagreement."""
    graph, said = verdict(load, path)
    model, engine_said = verdict(lambda path: qdeploy.load_int_model(path, threads, isa), path)
    other, bytes_said = verdict(lambda path: split_model(path, isa, threads), path)
    if bytes_said != engine_said:
        raise Disagreement(f"of the path the engine says {engine_said!r}, of the bytes {bytes_said!r}")
    if NEEDS.match(engine_said):
        return engine_said
    faults = [JSON_FAULT.fullmatch(text) for text in (said, engine_said)]
    if said != engine_said and not (faults[0] and faults[1] and faults[0][2] == faults[1][2]):
        raise Disagreement(f"qdeploy.format says {said or 'a model'!r}, the engine {engine_said or 'a model'!r}")
    if graph and model and other:
        check_model(graph, path, [model, other])
    return said


def verdict(read, path: Path) -> tuple:
    """What `read` makes of the file, and the text of its ModelError."""
    try:
        return read(path), ""
    except ModelError as error:
        text = str(error)
    if not MESSAGE.fullmatch(text) or not text.endswith(f" in {path}") or not text.isprintable():
        raise Disagreement(f"expected one line 'expected X, got Y - at Z in {path}', got {text!r}")
    return None, text


def split_model(path: Path, isa: str, threads: int) -> Model:
    """From the content, and with the work of small networks split over the threads."""
    session = _engine.Session(str(path), path.read_bytes(), threads, isa, macs_per_thread=1)
    return (TextModel if session.vocabulary else Model)(session, path, threads, isa)


def check_model(graph: Graph, path: Path, models: list[Model]) -> None:
    """The models describe themselves as the graph does, give the reference's bits, and the graph survives a save."""
    copy = path.with_name("copy.safetensors")
    save(graph, copy)
    if not same(load(copy), graph):
        raise Disagreement("saved and loaded again it is another graph")
    members = [member.name for member in graph.members]
    nodes = [node.name for member in graph.members for node in member.nodes]
    for model in models:
        described = (model.members, model.classes, model.inputs[0]["shape"], [step["name"] for step in model.plan()])
        expected = (members, graph.classes or [], graph.input_shape, nodes)
        if described != expected:
            raise Disagreement(f"the engine reads {described}, qdeploy.format {expected}")
    if work(graph) > RUNNABLE:
        return
    pairs = [(member.name, node.name) for member in graph.members for node in member.nodes]
    taps = nodes if len(members) == 1 else [f"{member}/{node}" for member, node in pairs]
    for x, mask in inputs(graph):
        output, values = reference.run(graph, x, taps, mask)
        batch = (x,) if mask is None else (x, mask)
        for model in models:
            got, tapped = model(*batch, taps=taps)
            wrong = [name for name in taps if not same(tapped[name], values[name])]
            if wrong or not same(got, output):
                raise Disagreement(f"other results than the reference at {wrong or 'the output'} of {model!r}")
            if (
                isinstance(output, np.ndarray)
                and output.ndim == 2
                and output.shape[1] > 1
                and not same(model.predict(*batch), reference.predict(graph, x, mask))
            ):
                raise Disagreement("other classes than the reference")


def inputs(graph: Graph) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Codes around and beyond the range of the input, extremes, and bytes where the model takes them; or texts with
    their mask."""
    rng = np.random.default_rng(0)
    if graph.vocabulary is not None:
        return [text_batch(graph, 3, rng)]
    shape, tensor = graph.input_shape, graph.members[0].tensors[0]
    codes = rng.integers(-40, 600, (2, *shape)) / 2
    scaled = np.clip((codes - tensor.zero_point) * float(tensor.scale), -3e38, 3e38)
    numbers = np.where(rng.random(scaled.shape) < 0.05, rng.choice([3e38, -3e38, 1e-45, 0.0, -0.0]), scaled)
    batches: list[tuple[np.ndarray, np.ndarray | None]] = [(numbers.astype(np.float32), None)]
    if graph.preprocess:
        batches.append((rng.integers(0, 256, (2, *shape[1:], shape[0])).astype(np.uint8), None))
    return batches


def work(graph: Graph) -> int:
    """Elements that the reference touches for an image."""

    def of(member, node: Node) -> int:
        output, x = member.tensors[node.output], member.tensors[node.inputs[0]]
        weight = node.constants.get("weight")
        taps = weight[0].size if weight is not None else math.prod(node.attributes.get("kernel", (1, 1)))
        top, left, bottom, right = node.attributes.get("padding", (0, 0, 0, 0))
        if node.op == "attention":  # of every pair of rows
            taps = member.tensors[node.inputs[1]].shape[0] * 2
        if node.op == "resize":
            taps = node.constants["row_weight"].shape[1] * node.constants["column_weight"].shape[1]
        size = x.shape if len(x.shape) == 3 else (x.shape[0], 1, 1)
        padded = size[0] * (size[1] + top + bottom) * (size[2] + left + right)
        return math.prod(output.shape) * taps + padded

    return sum(of(member, node) for member in graph.members for node in member.nodes)


def same(a: object, b: object) -> bool:
    """Deep equality of graphs and arrays; numbers are equal as f32, lists and tuples the same."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return np.float32(a).tobytes() == np.float32(b).tobytes()
    return a == b
