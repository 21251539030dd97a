"""What a GPU computes against what a CPU computes. Each check is a function of a Timer, for its device and its random
numbers, and of sizes, and returns a Report whose `wrong` is to be empty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import starmap

import numpy as np
import torch
from gpu_cases import QMAX, QMIN, Report, differing, quantized_normal
from gpu_timer import Timer
from targets import LsqCase
from torch import Tensor

from qdeploy import format, reference
from qdeploy.graph import COMBINE, Graph
from qdeploy.kernels.ensemble import combine
from qdeploy.kernels.lsq import lsq, lsq_backward, lsq_many

RAGGED = [
    LsqCase(shape, axis, dtype)
    for shape, axis in (
        ((1,), -1),
        ((1_000_003,), -1),
        ((64, 3, 7, 7), 0),
        ((512, 512, 3, 3), 0),
        ((16, 128, 64, 60), 1),
        ((256, 512, 32), 1),
        ((7, 33, 5), 2),
        ((2048, 1000), 1),
        ((5, 17, 1, 1), 0),
        ((0, 3), 1),
    )
    for dtype in ("float32", "bfloat16", "float16")
]


def check_lsq(timer: Timer, cases: Sequence[LsqCase], runs: int, large: int) -> Report:
    """The kernels against the definition in PyTorch: the same bits, but for the gradients of the steps, which differ by
    2e-6 of the sum of their terms' magnitudes at most and are the same in `runs` runs. `large`: elements of a tensor
    whose offsets need 64 bits."""
    report = Report("LSQ against its definition")
    for case in cases:
        for layout in (torch.contiguous_format, torch.channels_last)[: 2 if len(case.shape) == 4 else 1]:
            what = f"{case} {str(layout).removeprefix('torch.')}"
            report.check(what, **_differences_of_lsq(timer, case, layout, runs))
    value, step, rest = quantized_normal(timer, [large], -1, torch.bfloat16)
    quantized, gradient = lsq(value, step, *rest), lsq_backward(value, value, step, *rest)[0]
    for first in (0, large - 4096):
        few, step = value[first : first + 4096].cpu(), step.cpu()
        report.check(
            f"{large} elements, from {first}",
            values=differing(quantized[first : first + 4096], lsq(few, step, *rest)),
            gradients=differing(gradient[first : first + 4096], lsq_backward(few, few, step, *rest)[0]),
        )
    return report


def _differences_of_lsq(timer: Timer, case: LsqCase, layout: torch.memory_format, runs: int) -> dict[str, int]:
    value, step, rest = quantized_normal(timer, case.shape, case.axis, getattr(torch, case.dtype))
    value, grad = value.contiguous(memory_format=layout), timer.randn(*case.shape, dtype=value.dtype)
    exact, special = torch.full_like(step, 0.125), with_special_values(value)
    on_cpu = [x.cpu() for x in (grad, value, step)]
    gradient, of_steps = lsq_backward(grad, value, step, *rest)
    expected, of_steps_expected = lsq_backward(*on_cpu, *rest)
    error = (of_steps.cpu() - of_steps_expected).abs()
    again = (lsq_backward(grad, value, step, *rest)[1] for _ in range(runs))
    return {
        "values": differing(lsq(special, exact, *rest), lsq(special.cpu(), exact.cpu(), *rest)),
        "gradients": differing(gradient, expected),
        "gradients_of_steps": int((error > 2e-6 * rest[-1] * term_magnitudes(*on_cpu, case.axis)).sum()),
        "repeated_runs": sum(differing(of_steps, other) > 0 for other in again),
    }


def with_special_values(value: Tensor) -> Tensor:
    """Like `value`, but multiples of 1/16, which a step of 1/8 makes ties and bounds, and some that are not finite."""
    special = (value * 96).round() / 16
    last = (0,) * (value.dim() - 1)
    for i, number in enumerate((math.nan, math.inf, -math.inf, -0.0)[: len(value)]):
        special[(i, *last)] = number
    return special


def term_magnitudes(grad: Tensor, value: Tensor, step: Tensor, axis: int) -> Tensor:
    """The sum of the magnitudes of the terms of the gradient of each step."""
    x = value.double() / step.double().reshape([-1 if i == axis else 1 for i in range(value.dim())])
    codes = x.clamp(QMIN, QMAX).round()
    terms = grad.double().abs() * torch.where((x >= QMIN) & (x <= QMAX), codes - x, codes).abs()
    return terms.sum([i for i in range(value.dim()) if i != axis])


def check_weights(timer: Timer, shapes: Sequence[Sequence[int]], runs: int) -> Report:
    """All weights in one launch against one by one, then others without the gradient of the first; and the same bits in
    `runs` runs."""
    report = Report("LSQ of all weights in one launch against one by one")
    for first in (0, 1):
        made = [quantized_normal(timer, shape, axis, torch.float32) for shape in shapes for axis in (0, -1)]
        what = f"{len(made)} weights, gradients from {first}"
        report.check(what, **_differences_of_weights(timer, made, slice(first, None), runs))
    return report


def _differences_of_weights(timer: Timer, made: list[tuple[Tensor, Tensor, tuple]], used: slice, runs: int) -> dict:
    """`used`: the weights whose gradients reach the quantizers."""
    inputs = [x.requires_grad_() for value, step, _ in made for x in (value, step)]
    grads = [timer.randn(*value.shape) for value, _, _ in made][used]
    values, steps, rest = zip(*made, strict=True)
    ranges, scales = [(qmin, qmax) for qmin, qmax, _, _ in rest], [scale for _, _, _, scale in rest]

    def gradients(out: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Of all values and of all steps."""
        found = torch.autograd.grad(out[used], inputs, grads, materialize_grads=True)
        return tuple(torch.cat([gradient.reshape(-1) for gradient in found[i::2]]) for i in (0, 1))

    got, expected = lsq_many(values, steps, ranges, scales), [lsq(v, s, *others) for v, s, others in made]
    (first, first_of_steps), (others, others_of_steps) = gradients(got), gradients(expected)
    again = (gradients(lsq_many(values, steps, ranges, scales)) for _ in range(runs))
    # float64 sums in another order: the same float32 but for the last bit where they lie close to a tie
    far = (first_of_steps - others_of_steps).abs() > 1.2e-7 * others_of_steps.abs()
    return {
        "values": sum(map(differing, got, expected)),
        "gradients": differing(first, others),
        "gradients_of_steps": int(far.sum()),
        "repeated_runs": sum(differing(a, first) + differing(b, first_of_steps) > 0 for a, b in again),
    }


def check_ensemble(timer: Timer, shapes: Sequence[tuple[int, int, int]]) -> Report:
    report = Report("Ensemble average against qdeploy/reference.py")
    for shape in shapes:
        for scale in (3.0, 1e4):
            logits = timer.randn(*shape) * scale
            for rule in COMBINE:
                got, classes = combine(logits, rule)
                expected, scores = reference.combine(list(logits.cpu().numpy()), rule)
                report.check(
                    f"{rule} {list(shape)} x {scale:g}",
                    probabilities=differing(got, expected),
                    classes=differing(classes, scores.argmax(1)),
                )
    return report


def check_int8(timer: Timer, graphs: Mapping[str, Graph], batches: Sequence[int]) -> Report:
    """Models, each by its name, against qdeploy/reference.py."""
    from qdeploy import gpu

    report = Report(f"INT8 against qdeploy/reference.py: {', '.join(graphs)}")
    for name, graph in graphs.items():
        model = gpu.load(name, timer.device, format.dump(graph))
        for batch in batches:
            inputs = inputs_of(timer, graph, batch)
            wrong = {kind: differing_outputs(model(*x), reference_of(graph, *x)) for kind, x in inputs.items()}
            report.check(f"{name}, batch {batch}", **wrong)
    return report


def inputs_of(timer: Timer, graph: Graph, batch: int) -> dict[str, tuple[Tensor, ...]]:
    """What a model is called with, by its kind: images or texts, of which the first is the longest there may be."""
    if graph.vocabulary:
        longest = graph.input_shape[0]
        ids = (timer.randn(batch, longest).abs() * 1e6).long() % graph.vocabulary
        lengths = longest - torch.arange(batch, device=ids.device)[:, None] * 7 % longest
        mask = (torch.arange(longest, device=ids.device) < lengths).long()
        return {"ids": (ids, mask) if graph.variable else (ids,)}
    images = timer.randn(batch, *graph.input_shape)
    if not graph.preprocess:
        return {"float32": (images,)}
    raw = (images.permute(0, 2, 3, 1) * 64 + 128).clamp(0, 255).to(torch.uint8).contiguous()
    return {"float32": (images,), "uint8": (raw,)}


def differing_outputs(got: Tensor | list[Tensor], expected: np.ndarray | list[np.ndarray]) -> int:
    """`differing` of the output, or of all where there are several."""
    pairs = zip(got, expected, strict=True) if isinstance(got, list) else [(got, expected)]
    return sum(starmap(differing, pairs))


def reference_of(graph: Graph, x: Tensor, mask: Tensor | None = None) -> np.ndarray | list[np.ndarray]:
    return reference.run(graph, x.cpu().numpy(), mask=None if mask is None else mask.cpu().numpy())
