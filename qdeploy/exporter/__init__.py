"""`qdeploy.export`: a trained network becomes an integer model file, exactly or not at all.

The codes in the file are those of training: rint(clamp(w / step size)) of the weight that LSQ trained. BatchNorm,
biases and all scales go into one multiplier and one bias per channel, computed once in float64 (docs/format.md section
4 is the arithmetic). What has no learned quantizer gets its grid from calibration data, in one pass.

    sources              which front end reads a network
    from_onnx            ONNX files: one layer for each node
    from_torch           PyTorch: torch.export, then one layer for each ATen operator (layers.py), in real numbers
    lowering             what the two share
    fusion               few layers of the many, each an operation of the file
    weights, calibrate   codes of the weights, grids (grid.py) of the activations
    rounding             weights that came in float32, by what calibration data show of their inputs (layer_inputs.py)
    emit                 the integer graph
    report               its engine beside the network

A front end is one function, `lower`, that makes a layers.Network; PyTorch is imported where it is called. All the rest
needs numpy only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy import format, reference
from qdeploy.checks import check_name
from qdeploy.errors import ExportError, InputError, ModelError
from qdeploy.exporter.calibrate import OBSERVERS, Grids, check_complete, observe
from qdeploy.exporter.dry_run import check_graph
from qdeploy.exporter.emit import check_shapes, emit
from qdeploy.exporter.fusion import fuse
from qdeploy.exporter.layers import Network, Norm
from qdeploy.exporter.report import ExportReport, compare, images_to_compare
from qdeploy.exporter.rounding import Rounding, check_rounding
from qdeploy.exporter.sources import is_one, lowered, random_inputs
from qdeploy.exporter.weights import quantize_weights
from qdeploy.files import AnyPath
from qdeploy.graph import COMBINE, Graph, Member
from qdeploy.validate import validate

if TYPE_CHECKING:
    from torch import Tensor

    from qdeploy.exporter.from_torch.exported import Source

__all__ = ["ExportReport", "check", "converted", "export", "export_ensemble", "input_shape", "rehearse"]


def export(
    source: Source | AnyPath | Any,
    example: Tensor | np.ndarray | None,
    path: AnyPath,
    calibration: object = None,
    *,
    shape: Sequence[int] | None = None,
    fallback_bits: int | Mapping[str, int] | None = None,
    observer: str = "minmax",
    rounding: str = "nearest",
    correct_bias: bool = True,
    preprocess: Mapping[str, float | Sequence[float]] | None = None,
    classes: Sequence[str] | Mapping[Any, Any] | None = None,
) -> ExportReport:
    """Writes a network as an integer model file and returns how close the integers are to the network.

    Args:
        source: an nn.Module, traced in eval mode by torch.export and left as it was. It may be wrapped (torch.compile,
            DataParallel, AveragedModel, Fabric), and return its logits in a tuple, dict or dataclass. Its weights carry
            LSQ quantizers (`qdeploy.training.quantize_`) or fake quantization of torch.ao, whose scales are taken as
            they are. Or a torch.export.ExportedProgram, or the module that `convert_pt2e` returns: with the codes and
            ranges that they hold. Or an ONNX file: its path, bytes or ModelProto.
        example: float32 [N, C, H, W], [N, T, D] or [N, F]; or token ids, int64 [N, T], of the longest text: only its
            shape and type matter. May be None where the source says its shape (a program, a converted module, ONNX)
            or `shape` does.
        path: the file; one that exists is replaced when the new one is complete and compared.
        calibration: inputs, read once: an array or tensor [N, ...], a dataset of single images, or an iterable of
            batches, which may be tuples that begin with the images or dicts that hold them. Floats of any width, no
            integers; with `preprocess` also uint8 [N, H, W, C] images. Of data without a length at most 512 batches
            are read. May be None where every tensor between layers has a learned quantizer.
        shape: of one input, without the batch, as (3, 224, 224), in place of an example: fills the sizes that the
            source leaves open.
        fallback_bits: what weights without a learned quantizer may do. None: only the classifier (the convolution or
            linear layer registered last, which `quantize_` leaves alone) is rounded to 8 bits per channel, any other
            is an error. A number: all of them are rounded to it. A mapping from module names: these are.
        observer: "minmax", "percentile" (99.99) or "mse": how the range of a tensor without learned quantizer follows
            from the data.
        rounding: how weights without a learned quantizer are rounded: "nearest", or with calibration data "obc"
            (Optimal Brain Compression; seconds to minutes), which is for 6 bits and fewer.
        correct_bias: with calibration data, whether what rounding these weights changes in the mean of each channel
            goes into its bias.
        preprocess: {"mean": [C], "std": [C]} of the images in 0..1; the file then also takes raw uint8 [N, H, W, C]
            images.
        classes: names of the classes, one for each logit: a list, {0: name, ...} or {name: 0, ...}.

    Raises:
        ExportError: operators the engine lacks, randomness or state in eval mode, an unquantized weight, something
            between a quantizer and its layer, a bad step size or zero point, dynamic quantization, a module that is
            prepared but not converted; names the modules, in one line.
        InputError: an example, shape, calibration batch or option that does not fit.
        ModelError: the file cannot be written.
    """
    options = _Options(fallback_bits, observer, rounding, correct_bias, preprocess, classes)
    return _export({"net": source}, None, example, shape, path, calibration, options)


def export_ensemble(
    sources: Iterable[Source | AnyPath | Any],
    example: Tensor | np.ndarray | None,
    path: AnyPath,
    calibration: object = None,
    *,
    shape: Sequence[int] | None = None,
    combine: str = "logits",
    fallback_bits: int | Mapping[str, int] | None = None,
    observer: str = "minmax",
    rounding: str = "nearest",
    correct_bias: bool = True,
    preprocess: Mapping[str, float | Sequence[float]] | None = None,
    classes: Sequence[str] | Mapping[Any, Any] | None = None,
) -> ExportReport:
    """Writes two or more networks as one file whose output is the ensemble's probabilities; arguments as for `export`.

    combine: "logits", softmax of the mean logit (QT-DoG equation 6), or "probs", mean of the members' softmax.
    Members are named member0, member1... in order.
    """
    if combine not in COMBINE:
        raise InputError(f"expected combine {' or '.join(COMBINE)}, got {combine!r} - at export_ensemble")
    if is_one(sources):
        raise InputError(f"expected two or more networks, got one {type(sources).__name__} - at export_ensemble")
    members = {f"member{i}": source for i, source in enumerate(sources)}
    if len(members) < 2:
        raise InputError(f"expected two or more networks, got {len(members)} - at export_ensemble")
    options = _Options(fallback_bits, observer, rounding, correct_bias, preprocess, classes)
    return _export(members, combine, example, shape, path, calibration, options)


@dataclass(frozen=True)
class _Options:
    """As for `export`."""

    fallback_bits: int | Mapping[str, int] | None = None
    observer: str = "minmax"
    rounding: str = "nearest"
    correct_bias: bool = True
    preprocess: Mapping[str, float | Sequence[float]] | None = None
    classes: Sequence[str] | Mapping[Any, Any] | None = None


def _export(
    sources: Mapping[str, Any],
    combine: str | None,
    example: Tensor | np.ndarray | None,
    shape: Sequence[int] | None,
    path: AnyPath,
    calibration: object,
    options: _Options,
) -> ExportReport:
    """`sources` by the name of the member that each becomes."""
    format.check_path(path)
    content, report = _exported(sources, combine, example, shape, path, calibration, options)
    format.write(content, path)
    return report


def _exported(
    sources: Mapping[str, Any],
    combine: str | None,
    example: Tensor | np.ndarray | None,
    shape: Sequence[int] | None,
    path: AnyPath,
    calibration: object,
    options: _Options,
) -> tuple[bytes, ExportReport]:
    """What the file `path` will hold, and how close that is: no failure may follow a file that looks finished."""
    check_observer(options.observer)
    check_rounding(options.rounding, calibration is not None)
    found = None if example is None else _checked_example(example)
    networks, roundings = [], []
    for name, source in sources.items():
        with _named(name, combine is not None):
            networks.append(_fused(source, found, shape))
            rounded = quantize_weights(networks[-1], options.fallback_bits)
            roundings.append(Rounding(rounded, options.rounding, options.correct_bias))
    count = images_to_compare(networks)
    inputs = random_inputs(networks[0], count) if found is None else found
    preprocess = _checked_preprocess(options.preprocess, tuple(inputs.shape[1:]))
    classes = _checked_classes(options.classes, networks)
    _doubt_observer(options.observer, networks)
    grids = [Grids(network, options.observer) for network in networks]
    others = [rounding.observers() for rounding in roundings]
    images = observe(grids, calibration, inputs, preprocess, count, others)
    if calibration is not None:
        for rounding in roundings:
            rounding.apply()
    members = []
    for name, network, chosen in zip(sources, networks, grids, strict=True):
        with _named(name, combine is not None):
            members.append(emit(name, network, chosen.chosen()))
    if preprocess is not None:
        for member in members:
            member.preprocess_table = reference.preprocess_table(preprocess, member.tensors[0])
    graph = _graph(members, combine, preprocess, classes)
    content = format.dump(graph)
    report = compare(graph, networks, grids, content, path, images)
    if found is None and calibration is None:
        doubt = f"compared on {len(images)} inputs of random numbers: give calibration data for figures of its own"
        report = replace(report, warnings=[doubt, *report.warnings])
    return content, report


def converted(source: AnyPath | Any) -> bytes:
    """The content of the model file of a network that is quantized throughout: without data, and with no report.

    Raises as `export`; InputError where a tensor has no grid.
    """
    network = _fused(source, None, None)
    quantize_weights(network, None)
    grids = Grids(network, "minmax")
    check_complete([grids])
    return format.dump(_graph([emit("net", network, grids.chosen())], None, None, None))


def input_shape(source: AnyPath | Any, shape: Sequence[int] | None) -> tuple[int, ...]:
    """Of what `export` would read, without the batch."""
    return lowered(source, None, shape).layers[0].shape


def _graph(
    members: list[Member],
    combine: str | None,
    preprocess: dict[str, list[float]] | None,
    classes: list[str] | None,
) -> Graph:
    """Of texts, for those of any length where every op can have them."""
    vocabulary = next((n.constants["weight"].shape[0] for m in members for n in m.nodes if n.op == "embedding"), None)
    graph = Graph(members, combine, preprocess, classes, vocabulary, variable=vocabulary is not None)
    try:
        validate(graph)
    except ModelError:
        graph.variable = False
    return graph


def check(
    source: Source | AnyPath | Any, example: Tensor | np.ndarray | None = None, *, shape: Sequence[int] | None = None
) -> None:
    """Says before any training whether `export` can write a network: raises ExportError for all that it would stop at.

    One line names every operator that the engine lacks, with its modules and what could be done, not the first one
    alone. What depends on trained weights and on calibration data is not looked at. Takes about as long as a few
    forward passes, and leaves the network as it was.

    Args:
        source, example, shape: as for `export`; only the example's shape and type matter.
    """
    check_graph(_fused(source, None if example is None else _checked_example(example), shape))


def rehearse(
    source: Source | AnyPath | Any,
    example: Tensor | np.ndarray | None,
    calibration: object,
    *,
    shape: Sequence[int] | None = None,
    **options: Any,
) -> None:
    """Raises what `export` with these arguments would, and writes nothing."""
    _exported({"net": source}, None, example, shape, "", calibration, _Options(**options))


def _fused(source: Any, example: np.ndarray | None, shape: Sequence[int] | None) -> Network:
    network = fuse(lowered(source, example, shape))
    check_shapes(network)
    return network


@contextmanager
def _named(member: str, several: bool) -> Iterator[None]:
    """An error in here names the member, where there are several."""
    try:
        yield
    except ExportError as error:
        if not several:
            raise
        raise ExportError(f"{error} of {member}") from error


def _checked_classes(classes: Sequence[str] | Mapping[Any, Any] | None, networks: list[Network]) -> list[str] | None:
    """Names by logit: from a sequence, {0: name, ...} or {name: 0, ...}."""
    shapes = [network.output.shape for network in networks]
    if len(set(shapes)) > 1:
        got = ", ".join(f"{list(shape)} of member{i}" for i, shape in enumerate(shapes))
        raise InputError(f"expected members with outputs of one shape, got {got} - at export_ensemble")
    count = math.prod(shapes[0])
    if len(networks) > 1 and count == 1:
        expected = "members with two or more logits, of which softmax makes probabilities"
        raise InputError(f"expected {expected}, got one logit - at export_ensemble")
    if classes is None:
        return None
    if isinstance(classes, Mapping):
        numbered = not any(isinstance(key, str) for key in classes)
        by_index = classes if numbered else {index: name for name, index in classes.items()}
        if set(by_index) != set(range(len(by_index))):
            raise InputError(f"expected names of the classes 0 to {count - 1}, got {list(by_index)} - at classes")
        classes = [by_index[i] for i in range(len(by_index))]
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise InputError(f"expected a list of names, got {classes!r} - at classes")
    names = [str(name) for name in classes]
    if len(names) != count:
        raise InputError(f"expected {count} class names, got {len(names)} - at classes")
    for name in names:
        check_name(name, "classes")
    return names


def check_observer(observer: str) -> None:
    """Raise InputError unless `export` knows it."""
    if observer not in OBSERVERS:
        raise InputError(f"expected observer {', '.join(OBSERVERS)}, got {observer!r} - at export")


def _doubt_observer(observer: str, networks: list[Network]) -> None:
    if observer != "minmax" and any(isinstance(layer, Norm) for network in networks for layer in network.layers):
        expected = "observer minmax for a network with norms (few tokens far from all others carry it, 15 dB)"
        warnings.warn(f"expected {expected}, got {observer} - at export", stacklevel=4)


def _checked_example(example: Tensor | np.ndarray) -> np.ndarray:
    if not isinstance(example, np.ndarray) and not hasattr(example, "detach"):  # as a tensor has it
        raise InputError(f"expected an array or tensor, got {type(example).__name__} - at the example")
    dtype, shape = str(example.dtype).removeprefix("torch."), list(example.shape)
    ids = dtype in ("int32", "int64") and len(shape) == 2
    if not (ids or dtype == "float32" and len(shape) in (2, 3, 4)) or 0 in shape:
        expected = "float32 [N, C, H, W], [N, T, D] or [N, F], or token ids [N, T], with N >= 1"
        raise InputError(f"expected {expected}, got {dtype} {shape} - at the example")
    return np.ascontiguousarray(example) if isinstance(example, np.ndarray) else example.detach().cpu().numpy()


def _checked_preprocess(
    preprocess: Mapping[str, float | Sequence[float]] | None, shape: tuple[int, ...]
) -> dict[str, list[float]] | None:
    if preprocess is None:
        return None
    if not isinstance(preprocess, Mapping) or set(preprocess) != {"mean", "std"} or len(shape) != 3:
        keys = sorted(map(str, preprocess)) if isinstance(preprocess, Mapping) else type(preprocess).__name__
        got = f"{keys} for inputs {list(shape)}"
        raise InputError(f"expected mean and std, for inputs [C, H, W], got {got} - at preprocess")
    values = {}
    for key in ("mean", "std"):
        numbers = np.asarray(preprocess[key], np.float64)
        if numbers.size not in (1, shape[0]) or not np.isfinite(numbers).all():
            raise InputError(f"expected 1 or {shape[0]} finite numbers, got {preprocess[key]} - at preprocess {key}")
        values[key] = np.broadcast_to(numbers.reshape(-1), shape[:1]).tolist()
    if min(values["std"]) <= 0:
        raise InputError(f"expected numbers greater than 0, got {preprocess['std']} - at preprocess std")
    if max(map(abs, values["mean"])) > 1:
        expected = "the mean of images in 0..1 (divide mean and std of pixels in 0..255 by 255)"
        raise InputError(f"expected {expected}, got {preprocess['mean']} - at preprocess mean")
    return values
