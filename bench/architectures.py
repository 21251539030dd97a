"""Which of the networks of architectures.txt export: each is built with random weights, quantized and exported.

    python bench/architectures.py [NAME...]

The file is then run by the engine and, of small networks, by the reference, whose bits must be equal. Needs timm,
torchvision and transformers, which qdeploy does not depend on; networks of a missing one are left out. Without NAME all
are tried, and a complete run writes docs/architectures.md.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import nn

HERE = Path(__file__).resolve().parent
LIST, PAGE = HERE / "architectures.txt", HERE.parent / "docs" / "architectures.md"
CLASSES, SAMPLES, BITS = 10, 4, 8
SECONDS, BYTES = 300, 12 * 2**30  # a network may take
QUERIES = ["*latent", "*probe"]  # matrices that are learned queries: they become an activation
MOST_OF_REFERENCE = 0.3e9  # multiply-accumulates, which numpy does in seconds

HEAD = """\
# Architectures that export

Of the {all} networks of `bench/architectures.txt`, {exported} become an integer file as timm, torchvision and
transformers build them. `python bench/architectures.py` wrote this page.

Weights are random, of {bits} bits; inputs are small, and of transformers the first layers. The bits of engine and
reference are equal where the last column says so; larger networks are not run in numpy.

SQNR is that of the engine's output against the fake-quant network in float32. It says that a network was
understood where it is high, and little where it is low: untrained, each layer behind a BatchNorm amplifies the
rounding of those before it, until nothing else is left. The trained networks of the examples have 16 to 24 dB.
"""

Row = dict[str, Any]


def main(names: list[str]) -> None:
    lines = [line.split() for line in LIST.read_text().splitlines() if line and not line.startswith("#")]
    absent = sorted({name.split(":")[0] for name, *_ in lines if find_spec(name.split(":")[0]) is None})
    for package in absent:
        print(f"left out: {package} is not installed")
    rows = []
    for line in lines:
        if line[0].split(":")[0] not in absent and (not names or line[0] in names or line[0].split(":")[1] in names):
            rows.append(row := {"name": line[0]} | in_a_process(line))
            print(f"{row['name']:52} {row['seconds']:4.0f} s  {said(row)}", flush=True)
    print(f"{sum('error' not in row for row in rows)} of {len(rows)} export")
    if not names and not absent:
        PAGE.write_text(page(rows))


def said(row: Row) -> str:
    return row.get("error") or f"{row['nodes']} nodes, version {row['version']}, {sqnr(row)} dB"


def sqnr(row: Row) -> str:
    return "exact" if row["sqnr"] is None else f"{row['sqnr']:.1f}"


def page(rows: list[Row]) -> str:
    exported = [row for row in rows if "error" not in row]
    lines = [
        HEAD.format(all=len(rows), exported=len(exported), bits=BITS),
        "| network | nodes | format version | SQNR, dB | reference |",
        "|---|---|---|---|---|",
        *(
            f"| {row['name']} | {row['nodes']} | {row['version']} | {sqnr(row)} | {'equal' if row['equal'] else '-'} |"
            for row in exported
        ),
    ]
    if len(exported) < len(rows):
        lines += ["", "## The others", "", "| network | the error |", "|---|---|"]
        lines += [f"| {row['name']} | {row['error'].replace('|', '/')} |" for row in rows if "error" in row]
    return "\n".join(lines) + "\n"


def in_a_process(line: list[str]) -> Row:
    """What `tried` of the line says, or why there is no answer."""
    start = time.monotonic()
    command = [sys.executable, __file__, "--try", *line]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": last_line(done.stderr)}
    except subprocess.TimeoutExpired:
        found = {"error": f"no end within {SECONDS} s"}
    return found | {"seconds": time.monotonic() - start}


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["killed without a word"])[-1]


# ---- In the process of one network -----------------------------------------------------------------------------------


def tried(name: str, size: str, *options: str) -> Row:
    """The size of the file and how close it is, or the error."""
    import qdeploy
    from qdeploy import format, reference
    from qdeploy.training import quantize_

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    net, inputs = built(name, dict(option.split("=", 1) for option in options)), drawn(size)
    settle(net, inputs)
    try:
        quantize_(net, BITS, init="minmax", allow_float=QUERIES)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.safetensors"
            report = qdeploy.export(net, inputs[:1], path, inputs)
            graph, got = format.load(path), qdeploy.load_int_model(path)(inputs[:2])
    except qdeploy.QdeployError as error:
        return {"error": str(error)}
    equal = None
    if sum(layer.macs for layer in report.layers) < MOST_OF_REFERENCE:
        equal = bool(np.array_equal(got, reference.run(graph, inputs[:2])))
        assert equal, "the engine's bits differ from the reference's"
    nodes, version = len(graph.members[0].nodes), format.lowest_version(graph)
    return {"nodes": nodes, "version": version, "sqnr": report.output_sqnr_db, "equal": equal}


def built(name: str, options: dict[str, str]) -> nn.Module:
    import torch

    from qdeploy.training.networks_by_name import build

    torch.manual_seed(0)
    torch.set_num_threads(1)
    package, kind = name.split(":")
    values = {key: json.loads(value) for key, value in options.items()}
    if not has_operators():
        declare_operators()
    if package != "torchvision":
        return build(name, CLASSES, 3, **values).eval()
    from torchvision.models import get_model

    more = {"aux_logits": False, "init_weights": True} if kind in ("googlenet", "inception_v3") else {}
    return get_model(kind, weights=None, num_classes=CLASSES, **more, **values).eval()


def has_operators() -> bool:
    """Whether the compiled part of torchvision is of this torch. No classifier needs it, but its import does."""
    import torch

    return hasattr(torch.ops.torchvision, "nms")


def declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    declare_operators.library = library  # as long as the process lives


def drawn(size: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    if size.startswith("ids:"):
        return rng.integers(5, 1000, (SAMPLES, int(size.removeprefix("ids:"))))
    return rng.standard_normal((SAMPLES, 3, int(size), int(size))).astype(np.float32)


def settle(net: nn.Module, inputs: np.ndarray) -> None:
    """Parameters that are all alike get numbers that matter, BatchNorm statistics after which numbers keep their
    size. Were they centered as well, each layer of a random network would amplify the rounding of those before it."""
    import torch
    from torch import nn

    def see(norm: nn.Module, args: tuple) -> None:
        dims = [d for d in range(args[0].dim()) if d != 1]
        norm.running_mean.copy_(args[0].mean(dims) / 10)
        norm.running_var.copy_(args[0].square().mean(dims))

    norms = [module for module in net.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    handles = [norm.register_forward_pre_hook(see) for norm in norms]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for parameter in net.parameters():
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                parameter.add_(torch.rand_like(parameter) * 0.4 - 0.2)
        net(torch.from_numpy(inputs))
    for handle in handles:
        handle.remove()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--try"]:
        print(json.dumps(tried(*sys.argv[2:])))
    else:
        main(sys.argv[1:])
