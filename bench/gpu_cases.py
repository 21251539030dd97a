"""What is timed on a GPU. Each case is a function of a Timer and of sizes, and returns a Report; gpu.py has the sizes
that the targets are for. On a CPU with small sizes it is a dry run.

LSQ peers: eager PyTorch as people write it, torch.compile of that, and ATen's learnable fake quantization. Those that
can be captured are timed as launches and as a CUDA graph; ratios are of graphs, where launches cost no time, but for
ATen, which reads its scale on the host and cannot be captured: there they are of launches on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from gpu_timer import GRAPH, Comparison, Run, Timer
from targets import LsqCase
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from qdeploy import format, reference
from qdeploy.graph import COMBINE, Graph
from qdeploy.kernels.ensemble import combine
from qdeploy.kernels.lsq import fake_quantize, lsq_backward, lsq_many
from qdeploy.terminal import columns, percent
from qdeploy.training import project_steps_, quantize_, quantizers

QMIN, QMAX = -64, 63
OURS, EAGER, COMPILED, ATEN, COPY = "qdeploy", "eager", "torch.compile", "ATen", "copy"
AGREES = 0.95  # least correlation with the float network, whose weights were not rounded to 7 bits
GRAPHS = (OURS, EAGER, COMPILED, COPY)
compiled = partial(torch.compile, dynamic=False)


@dataclass
class Report:
    """`rows` of the table, `figures` (value, spread) by key of TARGETS, `absent` why others are missing, and what went
    `wrong`."""

    title: str
    rows: list[dict] = field(default_factory=list)
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, part: str, found: Comparison, moved: int = 0, operations: int = 0) -> None:
        """A row for each contestant. `moved`: bytes that must move; `operations`: additions and multiplications."""
        copy = found.timings.get(COPY + GRAPH)
        for name, timing in found.timings.items():
            row = {"part": part, "contestant": name, "median us": timing.median * 1e3, "min us": timing.minimum * 1e3}
            row |= {"spread us": timing.spread * 1e3, "calls": timing.calls}
            row["GB/s"] = moved / timing.median / 1e6 if moved else None
            row["of copy"] = percent(copy.median / timing.median) if copy else None
            row["TOP/s"] = operations / timing.median / 1e9 if operations else None
            self.rows.append(row)
        for name, error in found.failed.items():
            self.rows.append({"part": part, "contestant": name, "error": error})

    def faster(self, key: str, found: Comparison, peer: str, ours: str) -> None:
        """The figure `key`: how many times faster `ours` is than `peer`; of several under one key, the worst."""
        ratio = found.ratio(peer, ours)
        if ratio is None:
            self.absent[key] = "; ".join(found.failed.values())
        elif key not in self.figures or ratio < self.figures[key]:
            self.figures[key] = ratio

    def check(self, what: str, **differences: int) -> None:
        """A row with how many elements are not as they must be, by what they are of."""
        self.rows.append({"differences in": what, **differences})
        self.wrong += [f"{what}: {count} differences in {name}" for name, count in differences.items() if count]

    def __str__(self) -> str:
        keys = dict.fromkeys(key for row in self.rows for key in row)
        shown = [key for key in keys if any(row.get(key) is not None for row in self.rows)]
        table = columns([{key: row.get(key) for key in shown} for row in self.rows]) if self.rows else ""
        return f"{self.title}\n{table}"


def differing(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> int:
    """Elements whose bits are not the same, any NaN being like any other."""
    a, b = (torch.as_tensor(x).detach() for x in (a, b))
    assert (a.shape, a.dtype) == (b.shape, b.dtype), f"expected {b.dtype} {b.shape}, got {a.dtype} {a.shape}"
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    b = b.to(a.device)
    differ = a.contiguous().view(bits) != b.contiguous().view(bits)
    return int((differ & ~(a.isnan() & b.isnan())).sum())


# ---- The ceilings ----------------------------------------------------------------------------------------------------


def copies(timer: Timer, sizes: Sequence[int]) -> Report:
    """The rate of a copy from device to device, read and written bytes together, of `sizes` bytes each way."""
    report = Report("Copy rate, L2 cold")
    for size in sizes:
        found = timer.compare({COPY: copy_of(timer, 2 * size)}, (COPY,), cold=True)
        report.add(f"{size / 2**20:,.0f} MiB", found, 2 * size)
    return report


def copy_of(timer: Timer, moved: int) -> Run:
    """A copy that reads and writes `moved` bytes in all."""
    source = timer.randn(max(moved // 8, 1))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def matrix_peak(timer: Timer, side: int) -> Report:
    """Products of two matrices of random numbers; int8 takes the second one column by column."""
    numbers = timer.randn(2, side, side)
    a, b = (numbers * 40).clamp(-127, 127).to(torch.int8)
    x, y = numbers.bfloat16()
    found = timer.compare({"int8": lambda: torch._int_mm(a, b.t()), "bf16": lambda: x @ y}, ())
    report = Report(f"Matrix products, {side} x {side} x {side}")
    report.add("product", found, operations=2 * side**3)
    return report


# ---- LSQ -------------------------------------------------------------------------------------------------------------


def eager_lsq(value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float) -> Tensor:
    """LSQ as people write it: gradients by detach, everything else left to autograd. Arguments as of `lsq`."""
    step = (step - step * grad_scale).detach() + step * grad_scale
    if axis >= 0:
        step = step.reshape([-1 if i == axis else 1 for i in range(value.dim())])
    x = (value / step).clamp(qmin, qmax)
    return ((x.round() - x).detach() + x) * step


def aten_lsq(zero: Tensor, value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float) -> Tensor:
    """`zero`: the zero points, which ATen's quantizer has besides the steps."""
    ops, step = torch.ops.aten, step.reshape(-1)
    if axis == -1:
        return ops._fake_quantize_learnable_per_tensor_affine(value, step, zero, qmin, qmax, grad_scale)
    return ops._fake_quantize_learnable_per_channel_affine(value, step, zero, axis, qmin, qmax, grad_scale)


def aten_lsq_backward(
    zero: Tensor, grad: Tensor, value: Tensor, step: Tensor, qmin: int, qmax: int, axis: int, grad_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    ops, step, rest = torch.ops.aten, step.reshape(-1), (qmin, qmax, grad_scale)
    if axis == -1:
        return ops._fake_quantize_learnable_per_tensor_affine_backward(grad, value, step, zero, *rest)
    return ops._fake_quantize_learnable_per_channel_affine_backward(grad, value, step, zero, axis, *rest)


def quantized_normal(timer: Timer, shape: Sequence[int], axis: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple]:
    """Values, their steps, and the other arguments of `lsq`."""
    value = timer.randn(*shape, dtype=dtype)
    step = torch.full([] if axis == -1 else [shape[axis]], 2 * 0.8 / math.sqrt(QMAX), device=timer.device)
    return value, step, (QMIN, QMAX, axis, 1 / math.sqrt(max(value.numel(), 1) * QMAX))


def lsq_speed(timer: Timer, case: LsqCase) -> Report:
    """Forward, backward, and both by autograd, of one tensor. What must move: the value and the result; backward the
    value, the gradient and the gradient of the value."""
    dtype = getattr(torch, case.dtype)
    value, step, rest = quantized_normal(timer, case.shape, case.axis, dtype)
    grad = timer.randn(*case.shape, dtype=dtype)
    report = Report(f"LSQ {case}")
    zero = torch.zeros(step.numel(), device=timer.device)
    kinds = {OURS: fake_quantize, EAGER: eager_lsq, COMPILED: compiled(eager_lsq), ATEN: partial(aten_lsq, zero)}

    moved = 2 * value.nbytes
    runs: dict[str, Run] = {COPY: copy_of(timer, moved)} | {k: partial(f, value, step, *rest) for k, f in kinds.items()}
    found = timer.compare(runs, GRAPHS, cold=True)
    report.add("forward", found, moved)
    if case.bandwidth_bound:
        report.faster(f"{case.key}/forward", found, COPY + GRAPH, OURS + GRAPH)
    _against_peers(report, case, found)

    moved = 3 * value.nbytes
    runs = {COPY: copy_of(timer, moved), OURS: partial(lsq_backward, grad, value, step, *rest)}
    runs[ATEN] = partial(aten_lsq_backward, zero, grad, value, step, *rest)
    found = timer.compare(runs, GRAPHS, cold=True)
    report.add("backward", found, moved)
    if case.bandwidth_bound:
        report.faster(f"{case.key}/backward", found, COPY + GRAPH, OURS + GRAPH)

    value.requires_grad_()
    step.requires_grad_()

    def train(function: Callable) -> object:
        return torch.autograd.grad(function(value, step, *rest), (value, step), grad)

    moved = 5 * value.nbytes
    runs = {COPY: copy_of(timer, moved)} | {name: partial(train, function) for name, function in kinds.items()}
    found = timer.compare(runs, GRAPHS, cold=True)
    report.add("both by autograd", found, moved)
    _against_peers(report, case, found)
    return report


def _against_peers(report: Report, case: LsqCase, found: Comparison) -> None:
    if case.axis != -1:
        report.faster(f"{case.key}/{ATEN}", found, ATEN, OURS)
        report.faster(f"{case.key}/{EAGER}", found, EAGER + GRAPH, OURS + GRAPH)
        report.faster(f"{case.key}/{COMPILED}", found, COMPILED + GRAPH, OURS + GRAPH)


class Upstream(torch.autograd.Function):
    """Hands `grads` to its inputs as the backward pass of a network does, from one node: torch.autograd.grad of many
    outputs spends half a millisecond on checks of its own."""

    @staticmethod
    def forward(ctx, grads: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.grads = grads
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.grads


def all_weights(timer: Timer, shapes: Sequence[Sequence[int]]) -> Report:
    """Every weight of a network, forward and backward, each slice of axis 0 with its own step. In a row and not cold:
    what bounds the peers is their launches."""
    made = [quantized_normal(timer, shape, 0, torch.float32) for shape in shapes]
    values = [value.requires_grad_() for value, _, _ in made]
    steps = [step.requires_grad_() for _, step, _ in made]
    ranges, scales = [(QMIN, QMAX)] * len(made), [rest[-1] for _, _, rest in made]
    grads = [timer.randn(*shape) for shape in shapes]

    def one_by_one(function: Callable, values: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
        return [function(v, s, QMIN, QMAX, 0, g) for v, s, g in zip(values, steps, scales, strict=True)]

    def train(function: Callable) -> object:
        return torch.autograd.grad(Upstream.apply(grads, *function(values, steps)), values + steps)

    kinds: dict[str, Callable] = {
        OURS: lambda values, steps: lsq_many(values, steps, ranges, scales),
        f"{OURS}, one by one": partial(one_by_one, fake_quantize),
        EAGER: partial(one_by_one, eager_lsq),
        COMPILED: compiled(partial(one_by_one, eager_lsq)),
    }
    runs: dict[str, Run] = {name: partial(train, function) for name, function in kinds.items()}
    moved = 5 * sum(value.nbytes for value in values)
    found = timer.compare(runs | {COPY: copy_of(timer, moved)}, (*runs, COPY))
    report = Report(f"LSQ of {len(shapes)} weights, {sum(v.numel() for v in values):,} elements, forward and backward")
    report.add("both by autograd", found, moved)
    for peer in (EAGER, COMPILED):
        report.faster(f"gpu/weights/{peer}", found, peer, OURS)
        report.faster(f"gpu/weights/{peer}/graph", found, peer + GRAPH, OURS + GRAPH)
    return report


# ---- The ensemble average --------------------------------------------------------------------------------------------


def eager_average(logits: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    mean = logits.mean(0) if rule == "logits" else logits.softmax(-1).mean(0)
    return mean.softmax(-1) if rule == "logits" else mean, mean.argmax(-1)


def average(timer: Timer, members: int, images: int, classes: int) -> Report:
    """[E, N, K] logits to probabilities and classes. What must move: the logits once and the results."""
    logits = timer.randn(members, images, classes) * 3
    moved = logits.nbytes + 4 * images * classes + 8 * images
    report = Report(f"Ensemble average [{members}, {images}, {classes}]")
    for rule in COMBINE:
        kinds = {OURS: combine, EAGER: eager_average, COMPILED: compiled(eager_average)}
        runs: dict[str, Run] = {name: partial(function, logits, rule) for name, function in kinds.items()}
        found = timer.compare({COPY: copy_of(timer, moved)} | runs, GRAPHS, cold=True)
        report.add(rule, found, moved)
        key = f"gpu/ensemble/{images}x{classes}/{rule}"
        report.faster(key, found, COPY + GRAPH, OURS + GRAPH)
        report.faster(f"{key}/{COMPILED}", found, COMPILED + GRAPH, OURS + GRAPH)
    return report


# ---- An update in training -------------------------------------------------------------------------------------------


class EagerLsq(nn.Module):
    """`eager_lsq` as a parametrization with the step of one of our quantizers."""

    def __init__(self, step: Tensor, grad_scale: float):
        super().__init__()
        self.step, self.grad_scale = nn.Parameter(step.detach().clone()), grad_scale

    def forward(self, value: Tensor) -> Tensor:
        return eager_lsq(value, self.step, QMIN, QMAX, 0, self.grad_scale)


def quantize_eagerly_(net: nn.Module, like: nn.Module) -> None:
    """Puts an EagerLsq where `like`, a copy of `net` that `quantize_` treated, has a quantizer of a weight."""
    for name, quantizer in quantizers(like).items():
        layer = net.get_submodule(name.removesuffix(".weight"))
        parametrize.register_parametrization(layer, "weight", EagerLsq(quantizer.step, quantizer.grad_scale))


def training_update(timer: Timer, net: nn.Module, images: Tensor, labels: Tensor, compile_net: bool) -> Run:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    forward = compiled(net) if compile_net else net

    def update() -> None:
        with torch.autocast(timer.device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        project_steps_(net)  # as qdeploy's own trainer does

    return update


def qat_update(timer: Timer, make: Callable[[], nn.Module], batch: int, size: int) -> Report:
    """One update of SGD with momentum on random images, bf16 autocast, channels last."""
    torch.backends.cudnn.benchmark = True
    plain = make().to(timer.device, memory_format=torch.channels_last).train()
    images = timer.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=timer.device) % 10
    nets = {name: deepcopy(plain) for name in ("ours", "with inputs", "eager")}
    quantize_(nets["ours"], 7)
    quantize_eagerly_(nets["eager"], nets["ours"])
    quantize_(nets["with inputs"], 7, 8, calibration=[images[:4]])
    update = partial(training_update, timer, images=images, labels=labels)
    runs = {
        "no quantization": update(plain, compile_net=False),
        OURS: update(nets["ours"], compile_net=False),
        f"{OURS}, inputs too": update(nets["with inputs"], compile_net=False),
        EAGER: update(nets["eager"], compile_net=False),
        f"no quantization, {COMPILED}": update(deepcopy(plain), compile_net=True),
        f"{OURS}, {COMPILED}": update(deepcopy(nets["ours"]), compile_net=True),
    }
    found = timer.compare(runs, ())
    report = Report(f"An update in training, batch {batch}, bf16 autocast, channels last")
    report.add("update", found)
    for name in (OURS, f"{OURS}, inputs too", EAGER, f"{OURS}, {COMPILED}"):
        peer = f"no quantization, {COMPILED}" if COMPILED in name else "no quantization"
        report.faster(f"gpu/qat/{name}", found, name, peer)
    return report


# ---- INT8 inference --------------------------------------------------------------------------------------------------


FLOAT32, TF32, FLOAT16, FOLDED = "FP32", "TF32", "FP16", "FP16, BatchNorm folded"


def float_run(timer: Timer, net: nn.Module, images: Tensor, precision: str, compile_net: bool = False) -> Run:
    """The network in `precision`, channels last but for FP32, on images of its own type and layout."""
    net = deepcopy(net).to(timer.device).eval()
    if precision == FOLDED:
        fold_(net)
    if precision != FLOAT32:
        net, images = (x.to(memory_format=torch.channels_last) for x in (net, images))
    if precision.startswith(FLOAT16):
        net, images = net.half(), images.half()
    forward = compiled(net) if compile_net else net

    def run() -> Tensor:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != FLOAT32
        with torch.inference_mode():
            return forward(images)

    return run


def fold_(net: nn.Module) -> None:
    """Multiplies each BatchNorm into the convolution that is registered before it."""
    name, before = "", None
    for following, module in list(net.named_children()):
        if isinstance(before, nn.Conv2d) and isinstance(module, nn.BatchNorm2d):
            setattr(net, name, fuse_conv_bn_eval(before, module))
            setattr(net, following, nn.Identity())
        fold_(module)
        name, before = following, module


def int8(timer: Timer, net: nn.Module, path: Path, ensemble: Path, batch: int, tune: bool) -> Report:
    """Our INT8, of one network and of an `ensemble` of its copies in one file, against the float network; calls in a
    row. With `tune` after choosing tiles by time, and without the peers that torch.compile takes long to build.

    The float networks get images of their own type and layout, and the input of their CUDA graphs is not copied.
    """
    from qdeploy import gpu

    torch.backends.cudnn.benchmark = True
    graph, members = format.load(path), len(format.load(ensemble).members)
    images = timer.randn(batch, *graph.input_shape)
    image, logits = expected(path)
    images[-1] = torch.from_numpy(image)
    pixels = (images.permute(0, 2, 3, 1) * 40 + 128).clamp(0, 255).to(torch.uint8).contiguous()
    if tune:
        gpu.load(path, timer.device).tune(images)  # the models below find the tiles on the disk
    model, of_pixels, several = (gpu.load(file, timer.device) for file in (path, with_preprocess(path), ensemble))
    runs: dict[str, Run] = {
        OURS: partial(model, images),
        f"{OURS}, u8 images": partial(of_pixels, pixels),
        f"{members} x {OURS}": partial(several, images),
    }
    peers = {name: float_run(timer, net, images, name) for name in (FLOAT32, TF32, FLOAT16, FOLDED)}
    halves = [float_run(timer, net, images, FLOAT16) for _ in range(members)]
    peers[f"{members} x {FLOAT16}"] = lambda: torch.stack([run() for run in halves]).float().mean(0).softmax(-1)
    if not tune:
        for name in (FLOAT32, TF32, FLOAT16):
            peers[f"{name}, {COMPILED}"] = float_run(timer, net, images, name, compile_net=True)
    found = timer.compare(runs | peers, tuple(peers))
    report = Report(f"Inference, batch {batch}{', tiles tuned' if tune else ''}")
    operations, ensembles = 2 * batch * macs(graph), f"{members} x "
    report.add("network", found.only(lambda name: not name.startswith(ensembles)), operations=operations)
    report.add("ensemble", found.only(lambda name: name.startswith(ensembles)), operations=members * operations)
    half = {name: timing.median for name, timing in found.timings.items() if name.startswith(FLOAT16)}
    key = f"gpu/int8/{batch}"
    report.faster(f"{key}/fp16 graph", found, FLOAT16 + GRAPH, OURS)
    report.faster(f"{key}/fp32", found, FLOAT32, OURS)
    report.faster(f"{key}/best fp16", found, min(half, key=half.get, default=FLOAT16), OURS)
    report.faster(f"{key}/ensemble", found, ensembles + FLOAT16 + GRAPH, ensembles + OURS)
    report.faster(f"{key}/ensemble fp32", found, FLOAT32, ensembles + OURS)
    ours, probabilities = model(images), reference.combine([logits] * members, "logits")[0]
    report.check(
        "the last image",
        logits=differing(ours[-1:], logits),
        probabilities=differing(several(images)[-1:], probabilities),
    )
    agreement = float(torch.stack([ours.flatten(), peers[FLOAT32]().flatten()]).corrcoef()[0, 1])
    if not agreement > AGREES:
        report.wrong.append(f"the peers compute another network: correlation {agreement:.3f} of the logits")
    return report


@cache
def expected(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """An image, and the output for it by the reference, which takes seconds."""
    graph = format.load(path)
    image = np.random.default_rng(0).standard_normal((1, *graph.input_shape), np.float32)
    return image[0], reference.run(graph, image)


def with_preprocess(path: Path) -> Path:
    """The model with raw images as a second kind of input; a file beside it."""
    graph, made = format.load(path), path.with_stem(path.stem + "_u8")
    graph.preprocess = {"mean": [0.5] * graph.input_shape[0], "std": [0.25] * graph.input_shape[0]}
    for member in graph.members:
        member.preprocess_table = reference.preprocess_table(graph.preprocess, member.tensors[0])
    format.save(graph, made)
    return made


def macs(graph: Graph) -> int:
    """Multiply-accumulates for one image."""
    total = 0
    for member in graph.members:
        for node in member.nodes:
            if node.op in ("conv2d", "linear"):
                output, weight = member.tensors[node.output].shape, node.constants["weight"].shape
                total += math.prod(output) * math.prod(weight[1:])
    return total
