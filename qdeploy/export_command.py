"""`qdeploy export`: a model file of finished training runs or of an ONNX file, and an ONNX file of a model file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy.errors import InputError
from qdeploy.files import atomic_file
from qdeploy.graph import COMBINE
from qdeploy.subcommands import (
    TRAIN,
    Report,
    at_most_a_batch,
    between,
    check_output,
    integer_of,
    list_of,
    require,
    write_page,
)
from qdeploy.terminal import printable, write

if TYPE_CHECKING:
    from qdeploy.exporter import ExportReport
    from qdeploy.pictures import Pictures

RUNS, FROM_ONNX, TO_ONNX = "runs of qdeploy train", "an ONNX file as the source", "an ONNX file as --out"
IMAGES = 128  # of each source domain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Each option but --out with the kinds of exports that have it; one that was not given is None or False."""

    def option(kinds: Iterable[str], *names: str, **how: Any) -> None:
        action = parser.add_argument(*names, **how)
        where[action.dest] = (names[-1], tuple(kinds))

    where: dict[str, tuple[str, tuple[str, ...]]] = {}
    parser.set_defaults(where=where)
    text = "folders of finished runs: OUT/seed0 of `qdeploy train`; or X.onnx; or a model file, with --out X.onnx"
    parser.add_argument("sources", nargs="+", metavar="source", help=text)
    parser.add_argument("--out", type=Path, required=True, help="the model file, or X.onnx")
    any_source = (RUNS, FROM_ONNX)
    text = "how the ranges of activations follow from calibration images: minmax (default), percentile or mse"
    option(any_source, "--observer", help=text)
    text = "bits of all weights that are in float, 2 to 8 (default: of a classifier 8; others are refused)"
    option(any_source, "--fallback-bits", "--bits", dest="bits", type=between(2, 8), help=text)
    text = "how these weights are rounded: nearest (default), or obc (Optimal Brain Compression), for few bits"
    option(any_source, "--rounding", help=text)
    text = "do not add to each bias what rounding changes in the mean of a channel"
    option(any_source, "--no-correct-bias", action="store_true", help=text)
    option([RUNS], "--combine", choices=COMBINE, help="runs: rule of an ensemble (default: logits)")
    text = f"runs: calibration images of each source domain (default: {IMAGES})"
    option([RUNS], "--images", type=at_most_a_batch, help=text)
    text = "X.onnx: pictures, or an array .npy, from which tensors without a grid get theirs"
    option([FROM_ONNX], "--calibration", type=Path, metavar="FOLDER|X.npy", help=text)
    text = "X.onnx: its input without the batch, where sizes are free: 3,224,224"
    option([FROM_ONNX], "--shape", type=list_of(integer_of), help=text)
    text = "X.onnx: of pictures in 0..1, one number or 0.485,0.456,0.406; goes into the model file"
    option([FROM_ONNX], "--mean", type=list_of(float), help=text)
    option([FROM_ONNX], "--std", type=list_of(float), help="as --mean")
    text = "pictures: their shorter side (default: the input's)"
    option([FROM_ONNX], "--resize", type=at_most_a_batch, help=text)
    option([FROM_ONNX], "--crop", type=at_most_a_batch, help="pictures: the side of their middle (default: the input)")
    option([FROM_ONNX], "--classes", type=Path, metavar="FILE", help="X.onnx: names of the classes, one a line")
    option([TO_ONNX], "--float", action="store_true", help="to X.onnx: the float32 network that the integers stand for")
    text = "to X.onnx: raw images [N, H, W, C] as the input, with the preprocessing of the file in the graph"
    option([TO_ONNX], "--u8", action="store_true", help=text)
    text = "to X.onnx: weights of at most 4 bits as INT4 (onnxruntime runs those layers in float32)"
    option([TO_ONNX], "--int4", action="store_true", help=text)


def main(args: argparse.Namespace) -> Report:
    """Writes the file; returns what the report of the export says, or of an ONNX file its size.

    Raises InputError for an option that this kind of export has not, before anything is read.
    """
    from qdeploy import format

    kind = TO_ONNX if args.out.suffix == ".onnx" else FROM_ONNX if format.is_onnx(args.sources[0]) else RUNS
    _check_options(args, kind)
    if kind != RUNS and len(args.sources) > 1:
        raise InputError(f"expected one source with {kind}, got {len(args.sources)} - at the command line")
    check_output(args.out)
    check_output(args.html)
    if kind == TO_ONNX:
        return _to_onnx(args)
    report = _of_onnx(args) if kind == FROM_ONNX else _of_runs(args)
    write_page(args.html, report.to_html)
    return {**json.loads(report.to_json()), "table": str(report).splitlines()}


def show(report: Report) -> None:
    if "table" in report:
        write("\n".join(report["table"]))
    else:
        size = f"{report['bytes']:,} bytes, {report['nodes']:,} nodes, opset {report['opset']}"
        write(f"{printable(report['file'])}: {size}")


def _check_options(args: argparse.Namespace, kind: str) -> None:
    for name, (option, kinds) in args.where.items():
        if getattr(args, name) not in (None, False) and kind not in kinds:
            raise InputError(f"expected {' or '.join(kinds)} with {option}, got {kind} - at {option}")
    if kind == TO_ONNX and args.html is not None:
        raise InputError(f"expected a model file as --out with --html, got {kind} - at --html")


def _of_runs(args: argparse.Namespace) -> ExportReport:
    require(*TRAIN)
    from qdeploy.training import finished_runs

    runs = finished_runs.read_runs([Path(run) for run in args.sources])
    options = _rounding(args)
    return finished_runs.export_runs(runs, args.out, args.combine or COMBINE[0], args.images or IMAGES, **options)


def _of_onnx(args: argparse.Namespace) -> ExportReport:
    from qdeploy import exporter

    preprocess = None
    if args.mean is not None or args.std is not None:
        preprocess = {"mean": args.mean or [0.0], "std": args.std or [1.0]}
    data = _calibration(args, preprocess is not None)
    classes = None if args.classes is None else _lines(args.classes)
    options = {**_rounding(args), "shape": args.shape, "preprocess": preprocess, "classes": classes}
    return exporter.export(args.sources[0], None, args.out, data, **options)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"expected names of classes in UTF-8, one a line, got other bytes - at {path}") from None


def _rounding(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "fallback_bits": args.bits,
        "observer": args.observer or "minmax",
        "rounding": args.rounding or "nearest",
        "correct_bias": not args.no_correct_bias,
    }


def _calibration(args: argparse.Namespace, has_preprocess: bool) -> np.ndarray | Pictures | None:
    from qdeploy import exporter, pictures

    if args.calibration is None or args.calibration.suffix == ".npy":
        return None if args.calibration is None else pictures.array(args.calibration)
    if not has_preprocess:
        raise InputError("expected the mean and std of the pictures, got neither - at --mean")
    require("train", "PIL")
    shape = exporter.input_shape(args.sources[0], args.shape)
    if len(shape) != 3 or shape[0] not in pictures.MODES:
        raise InputError(f"expected a network of pictures [3, H, W] or [1, H, W], got {list(shape)} - at --calibration")
    height, width = (args.crop, args.crop) if args.crop else shape[1:]
    return pictures.Pictures(args.calibration, shape[0], args.resize, (height, width))


def _to_onnx(args: argparse.Namespace) -> Report:
    from qdeploy.onnx import to_onnx

    model = to_onnx(args.sources[0], not args.float, args.u8, args.int4)
    content = model.SerializeToString()
    with atomic_file(args.out) as file:
        file.write(content)
    opset, nodes = model.opset_import[0].version, len(model.graph.node)
    return {"file": str(args.out), "bytes": len(content), "opset": opset, "nodes": nodes}
