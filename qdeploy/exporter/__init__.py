"""`qdeploy.export`: a trained PyTorch network becomes an integer model file, exactly or not at all.

The codes in the file are those of training: rint(clamp(w / step)) of the weight that LSQ trained. BatchNorm, biases
and all scales go into one multiplier and one bias per channel, computed once in float64 (docs/format.md section 4 is
the arithmetic). What has no learned quantizer gets its grid from calibration data, in one pass. Needs PyTorch;
nothing else in qdeploy does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy import format, reference
from qdeploy.errors import ExportError, InputError
from qdeploy.exporter.calibrate import OBSERVERS, Grid, Scales, batches
from qdeploy.exporter.fusion import fuse
from qdeploy.exporter.lowering import Layer, LearnedWeight, Network, checked_step, lower
from qdeploy.exporter.report import ExportReport, compare, images_to_compare
from qdeploy.graph import Graph, Member, Node
from qdeploy.graph import Tensor as Activation
from qdeploy.ops import OPS
from qdeploy.terminal import progress

CLASSIFIER_BITS = 8


def export(
    net: nn.Module,
    example: Tensor | np.ndarray,
    path: str | os.PathLike,
    calibration: object = None,
    *,
    fallback_bits: int | Mapping[str, int] | None = None,
    observer: str = "minmax",
    preprocess: Mapping[str, Sequence[float]] | None = None,
    classes: Sequence[str] | None = None,
) -> ExportReport:
    """Writes `net` as an integer model file and returns how close the integers are to the network.

    Args:
        net: traced in eval mode by torch.export and left as it was. Weights carry LSQ quantizers
        (`qdeploy.training.quantize_`).
        example: float32 [N, C, H, W] or [N, F]; only its shape matters.
        path: the file; one that exists is replaced when the new one is complete.
        calibration: float32 inputs, an array [N, ...] or an iterable of batches or of (batch, ...) tuples, read once;
            with `preprocess` also uint8 [N, H, W, C] images. May be None where every tensor between layers has a
            learned quantizer.
        fallback_bits: what weights without a learned quantizer may do. None: only the classifier (the last layer) is
            rounded to 8 bits per channel, any other is an error. A number: all of them are rounded to it. A mapping
            from module names: these are.
        observer: "minmax", "percentile" (99.99) or "mse": how the range of a tensor without learned quantizer follows
        from the data.
        preprocess: {"mean": [C], "std": [C]} of the images in 0..1; the file then also takes raw uint8 [N, H, W, C]
        images.
        classes: names of the classes, one for each logit.

    Raises:
        ExportError: an operator the engine lacks, an unquantized weight, a bad step; names the module.
        InputError: an example, calibration batch or option that does not fit.
        ModelError: the file cannot be written.
    """
    return _export([net], ["net"], None, example, path, calibration, fallback_bits, observer, preprocess, classes)


def export_ensemble(
    nets: Sequence[nn.Module],
    example: Tensor | np.ndarray,
    path: str | os.PathLike,
    calibration: object = None,
    *,
    combine: str = "logits",
    fallback_bits: int | Mapping[str, int] | None = None,
    observer: str = "minmax",
    preprocess: Mapping[str, Sequence[float]] | None = None,
    classes: Sequence[str] | None = None,
) -> ExportReport:
    """Writes two or more networks as one file whose output is the ensemble's probabilities; arguments as for `export`.

    combine: "logits", softmax of the mean logit (QT-DoG equation 6), or "probs", mean of the members' softmax.
    Members are named member0, member1... in order.
    """
    if combine not in ("logits", "probs"):
        raise InputError(f"expected combine logits or probs, got {combine!r} - at export_ensemble")
    if len(nets) < 2:
        raise InputError(f"expected two or more networks, got {len(nets)} - at export_ensemble")
    names = [f"member{i}" for i in range(len(nets))]
    return _export(nets, names, combine, example, path, calibration, fallback_bits, observer, preprocess, classes)


def _export(
    nets, names, combine, example, path, calibration, fallback_bits, observer, preprocess, classes
) -> ExportReport:
    if observer not in OBSERVERS:
        raise InputError(f"expected observer {', '.join(OBSERVERS)}, got {observer!r} - at export")
    example = _checked_example(example)
    preprocess = _checked_preprocess(preprocess, tuple(example.shape[1:]))
    networks = [fuse(lower(net, example)) for net in nets]
    for network in networks:
        _quantize_weights(network, fallback_bits)
    scales = [Scales(network, observer) for network in networks]
    images = _calibrate(scales, calibration, example.numpy(), preprocess, images_to_compare(networks))
    members = []
    for name, network, scale in zip(names, networks, scales, strict=True):
        member = _member(name, network, scale.grids())
        if preprocess is not None:
            member.preprocess_table = reference.preprocess_table(preprocess, member.tensors[0])
        members.append(member)
    graph = Graph(members, combine, preprocess, None if classes is None else [str(c) for c in classes])
    format.save(graph, path)
    return compare(graph, networks, path, images)


def _checked_example(example: Tensor | np.ndarray) -> Tensor:
    example = torch.from_numpy(example) if isinstance(example, np.ndarray) else example
    if not isinstance(example, Tensor):
        raise InputError(f"expected an array or tensor, got {type(example).__name__} - at the example")
    if example.dtype != torch.float32 or example.dim() not in (2, 4) or not example.numel():
        got = f"{str(example.dtype).removeprefix('torch.')} {list(example.shape)}"
        raise InputError(f"expected float32 [N, C, H, W] or [N, F] with N >= 1, got {got} - at the example")
    return example.detach().cpu()


def _checked_preprocess(preprocess: Mapping | None, shape: tuple[int, ...]) -> dict[str, list[float]] | None:
    if preprocess is None:
        return None
    if set(preprocess) != {"mean", "std"} or len(shape) != 3:
        got = f"{sorted(preprocess)} for inputs {list(shape)}"
        raise InputError(f"expected mean and std, for inputs [C, H, W], got {got} - at preprocess")
    values = {}
    for key in ("mean", "std"):
        numbers = np.asarray(preprocess[key], np.float64)
        if numbers.size not in (1, shape[0]) or not np.isfinite(numbers).all():
            raise InputError(f"expected 1 or {shape[0]} finite numbers, got {preprocess[key]} - at preprocess {key}")
        values[key] = np.broadcast_to(numbers.reshape(-1), shape[:1]).tolist()
    if min(values["std"]) <= 0:
        raise InputError(f"expected numbers greater than 0, got {preprocess['std']} - at preprocess std")
    return values


def _pixels_to_float(preprocess: dict[str, list[float]]) -> Callable[[np.ndarray], np.ndarray]:
    mean, std = (np.asarray(preprocess[key], np.float32) for key in ("mean", "std"))
    return lambda images: ((images.astype(np.float32) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)


# --- weights --------------------------------------------------------------------------------------------------------


def _quantize_weights(network: Network, fallback_bits: int | Mapping[str, int] | None) -> None:
    """Sets codes and bits of every layer with a weight and multiplies the step into its scale."""
    fallback = _fallback(network, fallback_bits)
    for layer in network.layers:
        if isinstance(layer.weight, LearnedWeight):
            layer.scale = layer.scale * _learned_codes(layer)
        elif layer in fallback:
            layer.scale = layer.scale * _rounded_codes(layer, fallback[layer])
        elif layer.weight is not None:
            expected = "a learned quantizer (quantize_) or fallback_bits for it"
            raise ExportError(f"expected {expected}, got a float32 weight - at {layer.name}.weight")
        if layer.codes is not None:
            _check_weight(layer)


def _check_weight(layer: Layer) -> None:
    finite = np.isfinite(layer.scale) & np.isfinite(layer.shift)
    if not finite.all():
        got = f"NaN or infinity in channel {int(np.argmin(finite))}"
        raise ExportError(f"expected finite weights, bias and BatchNorm, got {got} - at {layer.name}")
    depth, most = math.prod(layer.codes.shape[1:]), (2**31 - 1) // (255 * 2 ** (layer.bits - 1))
    if depth > most:  # docs/format.md, bounds: accumulators of 32 bits
        expected = f"at most {most} weights of {layer.bits} bits per output channel"
        raise ExportError(f"expected {expected}, got {depth} - at {layer.name}")


def _learned_codes(layer: Layer) -> np.ndarray:
    learned = layer.weight
    step = checked_step(learned.step, f"{layer.name}.weight")
    bits = max((-learned.qmin - 1).bit_length(), learned.qmax.bit_length()) + 1
    if not 2 <= bits <= 8:
        got = f"{learned.qmin}..{learned.qmax}"
        raise ExportError(f"expected signed codes of 2 to 8 bits, got {got} - at {layer.name}.weight")
    value = learned.value.detach().cpu().numpy()
    shape = (-1, *[1] * (value.ndim - 1))
    scaled = value / step.astype(np.float32).reshape(shape)  # one f32 division, as in training
    layer.codes, layer.bits = np.rint(np.clip(scaled, learned.qmin, learned.qmax)).astype(np.int8), bits
    return step


def _rounded_codes(layer: Layer, bits: int) -> np.ndarray:
    """Round to nearest, the largest weight of each channel on the largest code."""
    value = layer.weight.detach().cpu().numpy().astype(np.float64)
    largest = np.abs(value).reshape(len(value), -1).max(1)
    step = np.where(largest > 0, largest, 1) / (2 ** (bits - 1) - 1)
    layer.codes = np.rint(value / step.reshape(-1, *[1] * (value.ndim - 1))).astype(np.int8)
    layer.bits = bits
    return step


def _fallback(network: Network, bits: int | Mapping[str, int] | None) -> dict[Layer, int]:
    """The layers that may do without a learned quantizer, and their bits."""
    plain = [layer for layer in network.layers if isinstance(layer.weight, Tensor)]
    classifier = _classifier(network)
    result = {classifier: CLASSIFIER_BITS} if classifier in plain else {}
    if isinstance(bits, Mapping):
        for name, width in bits.items():
            named = [layer for layer in plain if layer.name.split("#")[0] == name]
            if not named:
                names = ", ".join(layer.name for layer in plain) or "there is none"
                expected = f"the name of a module with a float32 weight ({names})"
                raise ExportError(f"expected {expected}, got {name!r} - at fallback_bits")
            result |= dict.fromkeys(named, width)
    elif bits is not None:
        result = dict.fromkeys(plain, bits)
    for width in result.values() if bits is None or isinstance(bits, Mapping) else [bits]:
        if isinstance(width, bool) or not isinstance(width, int) or not 2 <= width <= 8:
            raise InputError(f"expected 2 to 8 bits, got {width!r} - at fallback_bits")
    return result


def _classifier(network: Network) -> Layer | None:
    """The layer that computes the logits: nothing with weights and nothing with two inputs comes after it."""
    layer = network.output
    while layer.weight is None:
        if len(layer.inputs) != 1:
            return None
        layer = layer.inputs[0]
    return layer


# --- activations ----------------------------------------------------------------------------------------------------


def _calibrate(
    scales: list[Scales], calibration: object, example: np.ndarray, preprocess: dict | None, images: int
) -> np.ndarray:
    """Shows all calibration data to all networks, once; returns the first images for the report."""
    missing = [name for scale in scales for name in scale.missing()]
    if calibration is None:
        if missing:
            names = ", ".join(missing[:3]) + ("..." if len(missing) > 3 else "")
            expected = f"calibration data for {len(missing)} tensors without a learned quantizer ({names})"
            raise InputError(f"expected {expected}, got none - at export")
        return example[:images]
    to_float = _pixels_to_float(preprocess) if preprocess else None
    kept: list[np.ndarray] = []
    total = len(calibration) if hasattr(calibration, "__len__") and not hasattr(calibration, "ndim") else None
    with progress("calibrating", total) as advance:
        for batch in batches(calibration, example.shape[1:], to_float):
            for scale in scales:
                scale.observe(batch)
            kept += [batch] if sum(map(len, kept)) < images else []
            advance()
    return np.concatenate(kept)[:images]


# --- integers -------------------------------------------------------------------------------------------------------


def _member(name: str, network: Network, grids: dict[Layer, Grid]) -> Member:
    """The integer graph of one network."""
    for layer in [layer for layer in network.layers if layer.op == "quantize"]:
        if grids[layer] == grids[layer.inputs[0]] == layer.grid:
            network.replace(layer, layer.inputs[0])
    grids = {**grids, network.output: Grid(1.0, 0)}
    ids = {layer: i for i, layer in enumerate(network.layers)}
    tensors, nodes = [], []
    for layer in network.layers:
        grid, dtype = grids[layer], "f32" if layer is network.output else "u8"
        tensors.append(Activation(layer.name, _engine_shape(layer), dtype, grid.scale, grid.zero_point))
        if layer.op == "input":
            continue
        node = Node(
            "table" if layer.op == "quantize" else layer.op, layer.name, [ids[x] for x in layer.inputs], ids[layer]
        )
        if layer.op in EMIT:
            EMIT[layer.op](node, layer, [grids[x] for x in layer.inputs], grid, dtype == "f32")
        if OPS[node.op].requantized and dtype == "u8":
            node.attributes["clamp"] = [int(code) for code in grid.codes(np.array([layer.low, layer.high]))]
        nodes.append(node)
    return Member(name, tensors, nodes)


def _engine_shape(layer: Layer) -> tuple[int, ...]:
    if len(layer.shape) > 3:
        got = f"[N, {', '.join(map(str, layer.shape))}]"
        raise ExportError(f"expected tensors [N, C, H, W] or [N, F] between operators, got {got} - at {layer.name}")
    return (*layer.shape, 1) if len(layer.shape) == 2 else layer.shape


def _f32(value: np.ndarray | float) -> np.ndarray:
    """Rounds to f32; subnormal numbers, which some processors take for 0, become 0."""
    value = np.asarray(value, np.float64)
    with np.errstate(over="ignore"):  # infinity is refused by _check_bound
        return np.where(np.abs(value) < 2.0**-126, 0.0, value).astype(np.float32)


def _emit_weighted(node: Node, layer: Layer, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    """r = fma(acc, m, b), with a residual fma(q_res, m_res, r), in steps of the output grid; its zero point is in b."""
    multiplier = _f32(layer.scale * inputs[0].scale / out.scale)
    bias = layer.shift / out.scale + out.zero_point
    residual = 0.0
    if len(inputs) == 2:
        residual = float(_f32(layer.residual * inputs[1].scale / out.scale))
        bias = bias - residual * inputs[1].zero_point
        node.attributes["residual_multiplier"] = residual
    if layer.op == "conv2d":
        node.attributes |= layer.window
    magnitude = np.abs(layer.codes.reshape(len(layer.codes), -1).astype(np.int64)).sum(1)
    reach = 255 * magnitude * np.abs(multiplier, dtype=np.float64) + 255 * abs(residual)
    if not is_float:  # what is dead or saturated whatever the input stays so with a bias within the format's bounds
        bias = np.clip(bias, -1.01 * reach - 256, 1.01 * reach + 256)
    node.bits = layer.bits
    node.constants = {"weight": layer.codes, "multiplier": multiplier, "bias": _f32(bias)}
    _check_bound(layer, reach + np.abs(bias), is_float)


def _check_bound(layer: Layer, largest: np.ndarray, is_float: bool) -> None:
    """docs/format.md, bounds that a reader checks; told here with the module's name."""
    limit = 100 if is_float else 30
    worst = int(np.argmax(largest))
    if not largest[worst] < 2.0**limit:
        raise ExportError(
            f"expected results below 2^{limit} output steps, got up to {largest[worst]:.3g} in channel {worst} "
            f"(a scale or BatchNorm far from its data) - at {layer.name}"
        )


def _emit_add(node: Node, layer: Layer, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    multipliers = [float(_f32(f * grid.scale / out.scale)) for f, grid in zip(layer.factors, inputs, strict=True)]
    bias = layer.shift[0] / out.scale + out.zero_point
    bias -= sum(m * grid.zero_point for m, grid in zip(multipliers, inputs, strict=True))
    node.attributes |= {"multipliers": multipliers, "bias": float(_f32(bias))}
    _check_bound(layer, np.array([255 * sum(map(abs, multipliers)) + abs(bias)]), is_float)


def _emit_avg_pool2d(node: Node, layer: Layer, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    bias = layer.shift[0] / out.scale + out.zero_point
    multiplier = _f32(layer.scale[0] * inputs[0].scale / (layer.divisors * out.scale))
    node.attributes |= layer.window | {"bias": float(_f32(bias))}
    node.constants = {"multiplier": multiplier}
    elements = math.prod(layer.window["kernel"])
    counts = elements if multiplier.size == 1 else np.arange(1, elements + 1)
    _check_bound(layer, 255 * counts * np.abs(multiplier, dtype=np.float64) + abs(bias), is_float)


def _emit_max_pool2d(node: Node, layer: Layer, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    node.attributes |= layer.window


def _emit_table(node: Node, layer: Layer, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    real = torch.from_numpy(inputs[0].real(np.arange(256)))
    values = layer.function(real).double().broadcast_to(256).numpy()
    used = values[inputs[0].low : inputs[0].high + 1]
    if np.isnan(used).any() or is_float and np.isinf(used).any():
        wrong = float(real[inputs[0].low :][~np.isfinite(used)][0])
        expected = "a function that is finite on the range of its input"
        raise ExportError(f"expected {expected}, got none at {wrong:.4g} - at {layer.name}")
    values = np.nan_to_num(values) if is_float else np.where(np.isnan(values), 0, values)
    node.constants = {"table": _f32(values) if is_float else out.codes(values).astype(np.uint8)}


def _emit_quantize(node: Node, layer: Layer, inputs: list[Grid], out: Grid, is_float: bool) -> None:
    learned = layer.grid
    rounded = learned.real(learned.codes(inputs[0].real(np.arange(256))))
    node.constants = {"table": out.codes(rounded).astype(np.uint8)}


EMIT = {
    "conv2d": _emit_weighted,
    "linear": _emit_weighted,
    "add": _emit_add,
    "avg_pool2d": _emit_avg_pool2d,
    "max_pool2d": _emit_max_pool2d,
    "table": _emit_table,
    "quantize": _emit_quantize,
}
