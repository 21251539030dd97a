"""`qdeploy combine`: what is made of finished runs, their ensemble or their average, and its model file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.errors import InputError
from qdeploy.format import check_path
from qdeploy.graph import COMBINE, MAX_MEMBERS
from qdeploy.terminal import status, write
from qdeploy.training.config import Config, plain, resolve
from qdeploy.training.finished_runs import Runs, all_seeds, export_networks, finish, layers_of, read_runs, varied

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qdeploy.training.domains import Benchmark

# Which ensemble the runs have to be; any of them for "ensemble".
ENSEMBLES = {"ensemble": None, "eoq": "EoQ", "eoa": "EoA", "erm-ensemble": "ERM ensemble"}
AVERAGES = {"diwa-uniform": "DiWA, uniform", "diwa-restricted": "DiWA, restricted"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "folders of finished runs: OUT/seed0 of `qdeploy train`, or OUT for all of its seeds"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=text)
    text = "what is made of them: an ensemble (eoq, eoa and erm-ensemble ask for networks of their kind), or an average"
    parser.add_argument("--rule", choices=(*ENSEMBLES, *AVERAGES), default="ensemble", help=f"{text} (default: any)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the model file")
    text = "rule of an ensemble in the file (default: logits); the table has all of them"
    parser.add_argument("--combine", choices=COMBINE, help=text)
    text = "the file of networks in float: bits to which the export rounds their weights"
    parser.add_argument("--fallback-bits", type=int, choices=range(2, 9), metavar="BITS", help=text)
    text = "write the state dict of an average, in float, as `qdeploy train --weights` reads it"
    parser.add_argument("--state", type=Path, metavar="FILE", help=text)
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, mps or auto (default)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Judges what is made of the runs on the images that they held out, and writes its file.

    Returns {"kind", "runs": [folder], "differ": {setting: [value by run]}} and what a summary of `qdeploy train` holds;
    of an average {"average": {"validation", "test", "tests", "kept": [folder]}} in place of the ensemble. Raises
    InputError for runs that do not go together, before any network is loaded.
    """
    runs = read_runs(all_seeds(args.runs))
    _check(args, runs)
    from qdeploy.training.command import fabric_of
    from qdeploy.training.domains import benchmark_of

    first = next(iter(runs.values())).config
    machine: dict[str, Any] = {"accelerator": args.accelerator, "devices": 1, "workers": None}
    config = resolve(replace(first, **machine))
    device = fabric_of(config).device
    benchmark = benchmark_of(config)
    reduce = _average if args.rule in AVERAGES else _ensemble
    found = reduce(args, runs, config, benchmark, device)
    members = [
        {"seed": done.config.seed, **{key: done.selected[key] for key in ("update", "validation", "test", "tests")}}
        for done in runs.values()
    ]
    differ = varied([done.config for done in runs.values()])
    of_all = {"runs": [*map(str, runs)], "differ": differ, "config": plain(first), "members": members}
    return {**of_all, "fallback_bits": args.fallback_bits, **found}


def _check(args: argparse.Namespace, runs: Runs) -> None:
    """Raise what can be known before anything is loaded."""
    if len(runs) < 2:
        raise InputError(f"expected two or more runs, got {len(runs)} - at {next(iter(runs))}")
    if args.rule in AVERAGES:
        first = next(iter(runs))
        for folder, done in runs.items():
            if done.initial != runs[first].initial:
                expected = f"a run that began with the network of {first}, classifier included"
                raise InputError(f"expected {expected}, got another - at {folder}")
        if args.combine is not None:
            raise InputError(f"expected an ensemble, got {args.rule} - at --combine")
        if args.out is not None and args.fallback_bits is None:
            raise _needs_bits(args.rule)
    else:
        if len(runs) > MAX_MEMBERS:
            raise InputError(f"expected at most {MAX_MEMBERS} runs, got {len(runs)} - at {args.rule}")
        if args.state is not None:
            raise InputError(f"expected {' or '.join(AVERAGES)}, got {args.rule} - at --state")
    for path in (args.out, args.state):
        if path is not None:
            check_path(path)
    if args.fallback_bits is not None and args.out is None:
        raise InputError(f"expected the file to write, got none - at --fallback-bits {args.fallback_bits}")


def _needs_bits(what: str) -> InputError:
    return InputError(f"expected --fallback-bits for a file of networks in float ({what}), got none - at --out")


def _ensemble(
    args: argparse.Namespace, runs: Runs, config: Config, benchmark: Benchmark, device: torch.device
) -> dict[str, Any]:
    from qdeploy.training.reducers import are_quantized, ensemble_of

    named = [*_networks([*runs], benchmark)]
    quantized = are_quantized(named)
    kind = ensemble_of([done.config for done in runs.values()], quantized)
    if ENSEMBLES[args.rule] not in (None, kind):
        raise InputError(f"expected runs for an {ENSEMBLES[args.rule]}, got those of an {kind} - at --rule")
    if args.out is not None and not quantized and args.fallback_bits is None:
        raise _needs_bits(kind)
    nets, combine = [net for _, net in named], args.combine or "logits"
    return {"kind": kind, **finish(nets, config, benchmark, device, args.out, combine, args.fallback_bits)}


def _average(
    args: argparse.Namespace, runs: Runs, config: Config, benchmark: Benchmark, device: torch.device
) -> dict[str, Any]:
    from qdeploy.training.judging import judge, validation
    from qdeploy.training.reducers import diwa_restricted, diwa_uniform
    from qdeploy.training.run_files import save_tensors

    def accuracy(net: nn.Module) -> float:
        found = validation(net, config, benchmark, device)
        net.cpu()  # where the next one is added to it
        return found

    if args.rule == "diwa-uniform":
        net, kept = diwa_uniform(_networks([*runs], benchmark)), [*map(str, runs)]
    else:
        order = sorted(runs, key=lambda folder: runs[folder].selected["validation"], reverse=True)
        net, kept = diwa_restricted(_networks(order, benchmark), accuracy)
    if args.state is not None:
        save_tensors(args.state, net.state_dict())
    exported = None
    if args.out is not None:
        exported = export_networks([net], config, benchmark, args.out, fallback_bits=args.fallback_bits)
    validated = accuracy(net)
    judged = judge([net], config, benchmark, device, args.out)
    if exported is not None:
        judged["file"]["layers"] = layers_of(exported)
    average = {"validation": validated, **judged.pop("rules")["logits"], "kept": kept}
    return {"kind": AVERAGES[args.rule], "average": average, **judged}


def _networks(folders: list[Path], benchmark: Benchmark) -> Iterator[tuple[str, nn.Module]]:
    """The networks of finished runs, one after the other, by their folders."""
    from qdeploy.training.selected_network import load_trained

    for folder in folders:
        status(f"reading {folder}")
        net = load_trained(folder, benchmark)
        status()
        yield str(folder), net


def show(report: dict[str, Any]) -> None:
    """Prints the report of `main`: what it is, and the table of `qdeploy train`."""
    from qdeploy.training.results_table import show_results

    differ = [f"{key} ({', '.join(dict.fromkeys(map(str, of)))})" for key, of in report["differ"].items()]
    write(f"{report['kind']}: {len(report['runs'])} runs that differ in {', '.join(differ) or 'no setting'}")
    kept = report["average"]["kept"] if "average" in report else report["runs"]
    if len(kept) < len(report["runs"]):
        write(f"the average is that of {len(kept)}: {', '.join(kept)}")
    show_results(report)
    if "file" in report and report["fallback_bits"] is not None:
        write(f"weights that were in float are rounded to {report['fallback_bits']} bits in the file")
