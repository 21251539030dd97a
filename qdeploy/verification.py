"""A model file on the engine against qdeploy/reference.py, bit for bit: output and every activation."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

import qdeploy
from qdeploy import _engine, format, reference
from qdeploy.terminal import Status

if TYPE_CHECKING:
    from qdeploy.gpu import GpuModel


def verify(
    path: str | os.PathLike[str], inputs: dict[str, tuple[np.ndarray, ...]], device: str, progress: Status
) -> list[dict]:
    """One row for each of `inputs` and each instruction set and thread count, or the one GPU, `device`.

    `inputs`, by kind, are what a model is called with: images, or token ids with or without their mask.
    A row counts what was compared and what was different, and names the first node that was.
    """
    content = format.read(path) if format.is_onnx(path) else None  # converted once
    graph = format.load(path) if content is None else format.parse(content, path)
    nodes = [(f"{m.name}/" if graph.combine else "") + node.name for m in graph.members for node in m.nodes]
    runs, rows = _runs(path if content is None else content, device), []
    for kind, x in inputs.items():
        progress(f"numpy reference, {kind} input")
        output, taps = reference.run(graph, x[0], nodes, *x[1:])
        for isa, threads, run in runs:
            progress(f"{isa}, {kind} input" if threads is None else f"{isa}, {threads} thread(s), {kind} input")
            got = {"output": run(*x), **run(*x, taps=nodes)[1]}
            wrong = [name for name, want in {"output": output, **taps}.items() if want.tobytes() != got[name].tobytes()]
            row = {"input": kind, "isa": isa, "threads": threads, "compared": len(got), "different": len(wrong)}
            rows.append(row | {"first": next((name for name in nodes if name in wrong), *wrong[:1] or [None])})
    return rows


def _runs(path: str | os.PathLike[str] | bytes, device: str) -> list[tuple[str, int | None, Callable]]:
    """Instruction set (or GPU), threads, and what takes and returns arrays."""
    if device != "cpu":
        return [(device, None, _with_arrays(qdeploy.load_int_model(path, device=device)))]
    return [
        (isa, threads, qdeploy.load_int_model(path, num_threads=threads, isa=isa))
        for isa in _engine.isas()
        for threads in (1, 2)
    ]


def _with_arrays(model: GpuModel) -> Callable:
    import torch

    call: Callable = model  # with images, or with ids and maybe a mask

    def run(*inputs: np.ndarray, taps: list[str] | tuple = ()) -> np.ndarray | tuple[np.ndarray, dict[str, np.ndarray]]:
        tensors = [torch.from_numpy(x).to(model.device) for x in inputs]
        if not taps:
            return call(*tensors).cpu().numpy()
        output, tapped = call(*tensors, taps=taps)
        return output.cpu().numpy(), {name: value.cpu().numpy() for name, value in tapped.items()}

    return run
