"""The `qdeploy` command. Each subcommand is one function that returns a report; it is printed as text, or as JSON.

Exit codes: 0 fine, 1 a verification or a run of a sweep failed or an image cannot be read, 2 bad input or usage (one
line on stderr), 70 a bug of qdeploy (with its traceback), 130 Ctrl-C, 143 a training that SIGTERM stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

import qdeploy
from qdeploy import export_command
from qdeploy.errors import InputError, QdeployError
from qdeploy.graph import Activation, Graph, Member, Node
from qdeploy.memory import check_memory
from qdeploy.model import MAX_ROUNDS
from qdeploy.ops.op import rows_of
from qdeploy.subcommands import (
    TRAIN,
    Report,
    at_most_a_batch,
    between,
    check_output,
    integer_of,
    require,
    write_page,
)
from qdeploy.terminal import columns, note, percent, printable, status, write

if TYPE_CHECKING:
    from qdeploy.model import Model

PARAMETERS = ("weight", "bias", "rows")  # of nodes with weights: what float32 networks hold as well
EXTRAS = ("train", "models", "onnx", "plots", "tensorboard", "ray", "bench")  # "test" is for those who change qdeploy
CPU_FLAGS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "amx_int8"),
    *("asimd", "asimddp", "i8mm"),  # aarch64
)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code. Raises SystemExit as argparse does, and for a training that a signal
    stopped."""
    try:
        _check_streams()
        parser = _parser()
        args, unknown = parser.parse_known_args(argv)
        if args.run.__name__ == "train":
            args.unknown = unknown  # --axis.option
        elif unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        report = args.run(args)
        with _output():
            if args.json:
                print(json.dumps(report))
            else:
                args.show(report)
        return 1 if report.get("equal") is False or report.get("unreadable") or report.get("failed") else 0
    except QdeployError as error:
        return _fail(str(error))
    except OSError as error:
        at = "" if error.filename is None else f" - at {os.fsdecode(error.filename)}"
        return _fail(f"expected to read or write a file, got: {error.strerror or error}{at}")
    except KeyboardInterrupt:
        status()
        note("qdeploy: stopped by Ctrl-C")
        return 130
    except Exception as error:
        if _is_out_of_memory(error):
            return _fail(f"expected memory for this, got: {str(error) or 'none'}")
        with suppress(OSError):
            traceback.print_exc()
        return 70  # EX_SOFTWARE of sysexits.h
    finally:
        _flush()


def _check_streams() -> None:
    """Raise InputError without a standard output; without a standard error what is said there is lost."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # a closed one, which the next file would become
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None or sys.stdout.closed:
        raise InputError("expected a place for the report, got a closed one - at standard output")


@contextmanager
def _output() -> Iterator[None]:
    """What is written to standard output in here arrives; OSError otherwise, unless its reader has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def _flush() -> None:
    """Empty standard output, or else make Python forget it: it would complain at its exit, with an exit code of its
    own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):  # ValueError: it is closed
            with suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), stream.fileno())


def _is_out_of_memory(error: Exception) -> bool:
    """Whether numpy, the engine or torch (which is not imported for that) had none left."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and of_torch


def _fail(message: str) -> int:
    status()
    note("qdeploy: error: " + " ".join(message.split()))
    return 2


# ---- The commands -------------------------------------------------------------------------------------------------


def info(args: argparse.Namespace) -> Report:
    """What a file holds: members, bits, sizes, operations, share of the MACs."""
    from qdeploy import format

    content = format.read(args.file)
    graph = format.parse(content, args.file)
    members = [_describe(member) for member in graph.members]
    return {
        "file": str(args.file),
        "bytes": len(content),
        "float32_bytes": sum(member["float32_bytes"] for member in members),
        "input": list(graph.input_shape),
        "vocabulary": graph.vocabulary,
        "variable": graph.variable,
        "preprocess": graph.preprocess,
        "classes": graph.classes,
        "combine": graph.combine,
        "members": members,
    }


def _describe(member: Member) -> Report:
    weighted = [node for node in member.nodes if "weight" in node.constants]
    macs = {node.name: _macs(member, node) for node in weighted}
    total = sum(macs.values())
    layers = []
    for bits in sorted({node.bits for node in weighted if node.bits is not None}):
        nodes = [node for node in weighted if node.bits == bits]
        weights = sum(node.constants["weight"].size for node in nodes)
        share = sum(macs[node.name] for node in nodes) / (total or 1)  # an embedding has no MACs
        layers.append({"bits": bits, "layers": len(nodes), "weights": weights, "share_of_macs": share})
    ops = [node.op for node in member.nodes]
    parameters = sum(node.constants[key].size for node in weighted for key in PARAMETERS if key in node.constants)
    return {
        "name": member.name,
        "output": list(member.output.shape),
        "outputs": [_described(member.tensors[i]) for i in member.output_ids],
        "ops": {op: ops.count(op) for op in dict.fromkeys(ops)},
        "weights": layers,
        "macs": total,
        "float32_bytes": 4 * parameters,
    }


def _described(output: Activation) -> Report:
    return {"name": output.name, "shape": list(output.shape)}


def _macs(member: Member, node: Node) -> int:
    """Every weight once for each row of the output; an embedding looks its weights up."""
    return 0 if node.op == "embedding" else node.constants["weight"].size * rows_of(member.tensors[node.output].shape)


def _show_info(report: Report) -> None:
    count = len(report["members"])
    size, float32 = report["bytes"], report["float32_bytes"]
    ratio = f", {size / float32:.3f}x of float32 ({float32:,} bytes)" if float32 else ", no weights"
    write(f"file       {printable(report['file'])}: {size:,} bytes{ratio}")
    if count > 1 and float32:
        write(f"           {size / float32 * count:.3f}x of one float32 member")
    write(f"input      {report['input']}" + _input_text(report))
    if report["classes"]:
        write(f"classes    {', '.join(report['classes'])}")
    write(f"members    {count}" + (f", combined by {report['combine']}" if count > 1 else ""))
    for member in report["members"]:
        ops = ", ".join(f"{count} {op}" for op, count in member["ops"].items())
        output = f"output {member['output']}"
        if len(member["outputs"]) > 1:
            output = "outputs " + ", ".join(f"{printable(o['name'])} {o['shape']}" for o in member["outputs"])
        write(f"\n{member['name']}: {member['macs'] / 1e6:,.2f} MMAC, {output}\n  {ops}")
        for row in member["weights"]:
            share = f"{row['share_of_macs']:.1%} of the MACs"
            write(f"  {row['bits']}-bit weights: {row['layers']} layers, {row['weights']:,} weights, {share}")


def _input_text(report: Report) -> str:
    if report["vocabulary"]:
        return f" token ids below {report['vocabulary']:,}" + (", texts of any length" if report["variable"] else "")
    return ", or raw u8 images" if report["preprocess"] else ""


def plan(args: argparse.Namespace) -> Report:
    """Which kernel runs each node and how."""
    model = qdeploy.load_int_model(args.file, num_threads=args.threads)
    return {"isa": model.isa, "threads": model.num_threads, "batch": args.batch, "nodes": model.plan(args.batch)}


def _show_plan(report: Report) -> None:
    write(_setting(report))
    _print_rows([_planned(report, node) for node in report["nodes"]])


def _setting(report: Report) -> str:
    return f"{report['isa']}, {report['threads']} thread(s), batch {report['batch']}\n"


def _planned(report: Report, node: Report) -> Report:
    several = len({node["member"] for node in report["nodes"]}) > 1
    row = {"member": node["member"]} if several else {}
    row |= {"node": node["name"]} | {key: node[key] for key in ("kernel", "tile", "split")}
    row |= {"bits": node["bits"] or None, "MMAC": node["macs"] / 1e6, "of MACs": percent(node["share_of_macs"])}
    return row | ({"note": node["note"]} if any(node["note"] for node in report["nodes"]) else {})


def profile(args: argparse.Namespace) -> Report:
    """The plan with the time of each node, and how near it comes to the peak of the CPU's int8 instructions."""
    from qdeploy import page, peers

    check_output(args.html)
    model = qdeploy.load_int_model(args.file, num_threads=args.threads)
    x = _random_input(model, args.batch)
    found = peers.measure(model, x, {}, args.rounds, progress=status)
    nodes = model.profile(x, args.rounds)
    total = sum(node["microseconds"] for node in nodes)
    peak = found["peak_gmacs"]["int8"]
    for node in nodes:
        node["of_time"] = node["microseconds"] / (total or 1.0)
        counted = node["macs"] and node["microseconds"]
        node["gmacs_per_second"] = node["macs"] / node["microseconds"] / 1e3 if counted else None
        node["of_peak"] = peak and counted and node["gmacs_per_second"] / (peak * model.num_threads) or None
    call = found["results"][0]
    keys = ("isa", "threads", "batch", "macs", "peak_gmacs")
    report = {"file": str(args.file)} | {key: found[key] for key in keys}
    report |= {"call_ms": call["median_ms"], "of_peak": call["of_limit"], "nodes": nodes}
    write_page(args.html, lambda: page.of_profile(report))
    return report


def _show_profile(report: Report) -> None:
    write(_setting(report))
    rows = []
    for node in report["nodes"]:
        row = {"us": node["microseconds"], "of time": percent(node["of_time"])}
        row |= {"GMAC/s": node["gmacs_per_second"], "of peak": percent(node["of_peak"])}
        rows.append(_planned(report, node) | row)
    _print_rows(rows)
    nodes = sum(node["microseconds"] for node in report["nodes"]) / 1e3
    write(f"\nnodes {nodes:.3f} ms; a call {report['call_ms']:.3f} ms, input and output included")
    peak = report["peak_gmacs"]["int8"]
    if peak:
        write(f"{report['of_peak']:.1%} of the peak of its int8 instructions, {peak:.0f} GMAC/s a thread")


def bench(args: argparse.Namespace) -> Report:
    """INT8 here beside the runtimes that are installed, over the same network, alternating in one process."""
    from qdeploy import format, peers

    model = qdeploy.load_int_model(args.file, num_threads=args.threads)
    x = _image_like_input(model, args.batch)
    others: dict[str, peers.Run] = {}
    absent: dict[str, str] = {}
    if args.peers:
        status("a first run of each peer, in a child process")
        others, absent = peers.contestants(format.load(args.file), x.shape, model.num_threads)
    report = peers.measure(model, x, others, args.rounds, progress=status)
    for row in report["results"][1:]:
        row["correlation"] = peers.correlation(model(x), others[row["runtime"]](x))
    return report | {"absent": absent}


def _show_bench(report: Report) -> None:
    from qdeploy import peers

    status()
    write(_setting(report))
    write(peers.text(report))


def verify(args: argparse.Namespace) -> Report:
    """The engine against the numpy reference, bit for bit: every instruction set of this CPU, or a GPU."""
    from qdeploy import format, verification

    graph = format.load(args.file)
    x = _random_input(qdeploy.load_int_model(args.file, isa="scalar"), args.batch)
    inputs: dict[str, tuple[np.ndarray, ...]] = {"f32": (x,)}
    if graph.vocabulary is not None:
        inputs = {"ids": _random_texts(graph, x)}
    if graph.preprocess is not None:
        channels, height, width = graph.input_shape
        raw = np.random.default_rng(0).integers(0, 256, (args.batch, height, width, channels), np.uint8)
        inputs["u8"] = (raw,)
    rows = verification.verify(args.file, inputs, args.device, status)
    return {"file": str(args.file), "equal": all(row["different"] == 0 for row in rows), "runs": rows}


def _show_verify(report: Report) -> None:
    _print_rows(report["runs"])
    write("\nequal to the reference, bit for bit" if report["equal"] else "\nNOT equal to the reference")


def doctor(args: argparse.Namespace | None = None) -> Report:
    """What qdeploy sees of this machine and installation."""
    from qdeploy import _engine

    cpu, flags = _cpu()
    packages = dict.fromkeys(name for names in _extras().values() for name in names)
    return {
        "qdeploy": qdeploy.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpu": cpu,
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "isas": _engine.isas(),
        "QDEPLOY_ISA": os.environ.get("QDEPLOY_ISA"),
        "cpus": os.cpu_count(),
        "cpus_by_affinity": len(os.sched_getaffinity(0)),
        "default_threads": _engine.default_threads(),
        "packages": {name: _version(name) for name in packages},
    }


def _cpu() -> tuple[str, list[str]]:
    """Model name and feature flags as Linux tells them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    return fields.get("model name", platform.machine()), fields.get("flags", fields.get("Features", "")).split()


def _extras() -> dict[str, list[str]]:
    """The packages that come with each of EXTRAS."""
    packages: dict[str, list[str]] = {extra: [] for extra in EXTRAS}
    requirements: list[str] = []
    with suppress(metadata.PackageNotFoundError):  # run from a checkout
        requirements = metadata.requires("qdeploy") or []
    for requirement in requirements:
        name, extra = re.match(r"[\w-]+", requirement), re.search(r"extra == .(\w+)", requirement)
        if name and extra and extra[1] in packages:
            packages[extra[1]].append(name[0])
    return packages


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _show_doctor(report: Report) -> None:
    write(f"qdeploy {report['qdeploy']}, Python {report['python']}, numpy {report['numpy']}")
    write(f"CPU      {report['cpu']}: {' '.join(report['cpu_flags'])}")
    forced = f" (QDEPLOY_ISA={report['QDEPLOY_ISA']})" if report["QDEPLOY_ISA"] else ""
    write(f"ISAs     {' '.join(report['isas'])}: {report['isas'][-1]} by default{forced}")
    affinity = f"{report['cpus_by_affinity']} of {report['cpus']} CPUs by affinity"
    write(f"threads  {report['default_threads']} by default; {affinity}")
    for extra, names in _extras().items():
        found = [f"{name} {report['packages'][name] or '-'}" for name in names]
        missing = any(report["packages"][name] is None for name in names)
        write(
            f"[{extra}]".ljust(max(map(len, EXTRAS)) + 3)
            + ", ".join(found)
            + (f"   pip install 'qdeploy[{extra}]'" if missing else "")
        )


# Commands that are a module of qdeploy.training with `add_arguments`, `main` and `show`, and what they do.
TRAINING = {
    "data": (
        "data_command",
        "Count the images of training data by domain and class, after every file was decoded; 1 if one cannot be.",
    ),
    "train": (
        "command",
        "Train one network or an ensemble on domains but one, by a method of the papers; write the model file.",
    ),
    "sweep": (
        "sweep_command",
        "Train all that a file lists, rows by held-out domains by seeds, several runs at once; or go on with it.",
    ),
    "combine": (
        "combine_command",
        "Judge the ensemble or the average of finished training runs, and write its model file.",
    ),
    "measure": (
        "measure_command",
        "Measure a finished training run as papers do: flatness, PAC-Bayes and sharpness bounds, loss surface.",
    ),
}


def _of_training(name: str) -> tuple[Callable, Callable]:
    """What runs the command, and what shows its report."""
    module, text = TRAINING[name]

    def run(args: argparse.Namespace) -> Report:
        require(*TRAIN)
        return import_module(f"qdeploy.training.{module}").main(args)

    def show(report: Report) -> None:
        import_module(f"qdeploy.training.{module}").show(report)

    run.__name__, run.__doc__ = name, text
    return run, show


def report(args: argparse.Namespace) -> Report:
    """Write tables of finished training runs, those of the papers with the published figures beside."""
    require(*TRAIN)
    from qdeploy import page
    from qdeploy.training import report_command, report_files

    check_output(args.html)
    report = report_command.main(args)
    write_page(args.html, lambda: page.of_report(report_files.timed(report)))
    return report


def _show_report(report: Report) -> None:
    from qdeploy.training import report_command

    report_command.show(report)


def export(args: argparse.Namespace) -> Report:
    """Write the networks of finished training runs as one model file, two or more as an ensemble; or an ONNX file as a
    model file, or a model file as ONNX, by the names."""
    return export_command.main(args)


def _show_export(report: Report) -> None:
    export_command.show(report)


def demo(args: argparse.Namespace) -> Report:
    """Classify the packaged images with the packaged ensemble."""
    from qdeploy import demo

    return demo.run(args.threads)


def _show_demo(report: Report) -> None:
    from qdeploy import demo

    demo.show(report)


# ---- What they share ----------------------------------------------------------------------------------------------


def _random_input(model: Model, batch: int) -> np.ndarray:
    """f32 inputs that cover the whole range of input codes and a little beyond, so that both ends saturate; or token
    ids of the longest texts."""
    rng, shape = np.random.default_rng(0), _checked_shape(model, batch)
    if "vocabulary" in model.inputs[0]:
        return rng.integers(0, model.inputs[0]["vocabulary"], shape)
    return _input(model, rng.uniform(-20, 275, shape))


def _random_texts(graph: Graph, ids: np.ndarray) -> tuple[np.ndarray, ...]:
    """The ids, and where texts have any length a mask: of the first one token, of the second all."""
    if not graph.variable:
        return (ids,)
    longest = ids.shape[1]
    lengths = np.random.default_rng(0).integers(1, longest + 1, len(ids))
    lengths[:2] = (1, longest)[: len(ids)]
    return ids, (np.arange(longest) < lengths[:, None]).astype(np.int64)


def _image_like_input(model: Model, batch: int) -> np.ndarray:
    """Normal noise with four deviations on either side inside the input's range: float32 peers, which do not saturate,
    then compute the same. Token ids as of `_random_input`."""
    if "vocabulary" in model.inputs[0]:
        return _random_input(model, batch)
    return _input(model, np.random.default_rng(0).normal(127.5, 32, _checked_shape(model, batch)))


def _input(model: Model, codes: np.ndarray) -> np.ndarray:
    entry = model.inputs[0]
    return ((codes - entry["zero_point"]) * entry["scale"]).astype(np.float32)


def _checked_shape(model: Model, batch: int) -> tuple[int, ...]:
    """Of an input whose codes (two arrays of float64 at a time), images and results fit the memory of this machine."""
    shape = (batch, *model.inputs[0]["shape"])
    results = sum(math.prod(output["shape"]) for output in model.outputs)
    check_memory(20 * math.prod(shape) + 4 * batch * results, f"{batch} images", "--batch")
    return shape


def _print_rows(rows: list[dict]) -> None:
    status()
    write(columns(rows))


# ---- Arguments ----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, in the form of all our errors where argparse tells enough."""
        found = re.fullmatch(r"argument (?:\S+/)?([^\s:]+): (expected .*)", message)
        sys.exit(_fail(f"{found[2]} - at {found[1]}" if found else f"{message} - see {self.prog} --help"))

    def _print_message(self, message: str, file: object = None) -> None:
        """Help and version; argparse itself passes over errors."""
        with _output():
            write(message.rstrip("\n"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qdeploy", description="Exact int8 inference: the same bits on every instruction set.")
    parser.add_argument("--version", action="version", version=f"qdeploy {qdeploy.__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def command(
        run: Callable, show: Callable, *, file: bool = False, threads: bool = False, html: bool = False
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
        added.set_defaults(run=run, show=show)
        added.add_argument("--json", action="store_true", help="print the report as one line of JSON")
        if file:
            added.add_argument("file", help="a model file, or a quantized ONNX file (*.onnx)")
        if threads:
            added.add_argument("--threads", type=integer_of, help="default: what affinity and cgroup give")
        if html:
            text = "write the report as a page, too: one HTML file that loads nothing"
            added.add_argument("--html", type=Path, metavar="FILE", help=text)
        return added

    command(demo, _show_demo, threads=True)
    command(info, _show_info, file=True)
    export_command.add_arguments(command(export, _show_export, html=True))
    added = command(plan, _show_plan, file=True, threads=True)
    added.add_argument("--batch", type=at_most_a_batch, default=1)
    added = command(profile, _show_profile, file=True, threads=True, html=True)
    added.add_argument("--batch", type=at_most_a_batch, default=1)
    text = "the times are medians of so many (default: 10)"
    added.add_argument("--rounds", type=between(1, MAX_ROUNDS), default=10, help=text)
    added = command(bench, _show_bench, file=True, threads=True)
    added.add_argument("--batch", type=at_most_a_batch, default=1)
    added.add_argument("--rounds", type=between(1, MAX_ROUNDS), default=10, help="turns of each runtime (default: 10)")
    text = "beside onnxruntime, OpenVINO and MNN, where installed (default)"
    added.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help=text)
    added = command(verify, _show_verify, file=True)
    added.add_argument("--batch", type=at_most_a_batch, default=2)
    added.add_argument("--device", default="cpu", help="cpu (default), or cuda or cuda:N for a GPU")
    for name, (module, _) in TRAINING.items():  # none of these modules imports torch
        import_module(f"qdeploy.training.{module}").add_arguments(command(*_of_training(name)))
    from qdeploy.training import report_command

    report_command.add_arguments(command(report, _show_report, html=True))
    command(doctor, _show_doctor)
    return parser


if __name__ == "__main__":
    sys.exit(main())
