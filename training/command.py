"""`qdeploy train`: the runs of several seeds, their table, and the model file of the ensemble."""

from __future__ import annotations

import argparse
import json
import os
import typing
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.arguments import integer
from qdeploy.errors import InputError
from qdeploy.files import atomic_file, check_regular
from qdeploy.graph import MAX_MEMBERS
from qdeploy.terminal import note, write
from qdeploy.training.config import AXES_OF_CONFIG, Config, flag, made, plain, resolve, with_updates
from qdeploy.training.methods import AXES
from qdeploy.training.run_files import CHECKPOINT, DONE, LOG, MODEL, SETTINGS, check_same_run, read_done, read_state
from qdeploy.training.settings_files import dotted, over, read_settings, written

if TYPE_CHECKING:
    import torch
    from lightning_fabric import Fabric

    from qdeploy.training.domains import Benchmark

Runs = dict[Path, Config]  # by folder

SUMMARY, FILES = "summary.json", ("model.safetensors", "eoq.safetensors")  # FILES: of one network, of an ensemble


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each setting of `Config`, and those of the command. Values stay text: `resolve` reads them."""
    hints = typing.get_type_hints(Config)
    for setting in fields(Config):
        text, default = setting.metadata["help"], setting.default
        if hints[setting.name] is bool:
            parser.add_argument(flag(setting.name), action="store_true", default=None, help=text)
            continue
        names = setting.metadata["choices"] or AXES.get(setting.name) or ()
        shown = "{" + ",".join(names) + "}" if names else None
        text += "" if default is None else f" (default: {default})"
        parser.add_argument(flag(setting.name), metavar=shown, help=text)
    text = "a file of settings, as --print-config writes it; options come before it"
    parser.add_argument("--config", type=Path, help=text)
    seeds = "train so many networks, from --seed on; 2 or more make an ensemble (default: 1)"
    parser.add_argument("--seeds", type=int, default=1, help=seeds)
    parser.add_argument("--out", type=_folder, help="folder of the run (required); the same command continues it")
    text = "write no model file: for networks that none can hold"
    parser.add_argument("--no-export", dest="export", action="store_false", help=text)
    parser.add_argument("--print-config", action="store_true", help="print all settings as they would be, and end")
    text = "print the methods and what can stand on each axis, and end"
    parser.add_argument("--methods", action="store_true", help=text)
    axes = ", ".join(f"--{axis}.OPTION" for axis in AXES_OF_CONFIG)
    parser.epilog = f"What stands on an axis has options of its own: {axes}; `qdeploy train --methods` names them."


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got ''")
    return Path(text)


def settings(args: argparse.Namespace) -> Config:
    """The settings of a command: its options, over those of the file --config. Not resolved yet."""
    given = read_settings(args.config) if args.config else {}
    for setting in fields(Config):
        if (value := getattr(args, setting.name)) is not None:
            given[setting.name] = over(value, given.get(setting.name)) if setting.name in AXES_OF_CONFIG else value
    for name, value in dotted(args.unknown).items():
        given[name] = over(value, given.get(name))
    if given.get("epochs") is not None and given.get("updates") is not None:
        raise InputError(f"expected --updates or --epochs, got both - at --epochs {given['epochs']}")
    return Config(**given)


def main(args: argparse.Namespace) -> dict:
    """Trains the seeds one after another, or continues them; writes OUT/summary.json and, where the networks are
    quantized, the model file.

    Returns the summary; with --methods and --print-config what these ask for. Raises InputError for settings that do
    not fit the data; after SIGINT or SIGTERM it exits with 128 + the signal's number, and the same command continues
    the run.
    """
    if args.methods:
        from qdeploy.training.methods_table import methods_report

        return methods_report()
    config = resolve(settings(args))
    if args.print_config:
        return {"settings": written(config)}
    if args.out is None:
        raise InputError("expected a folder for the run, got none - at --out")
    count = integer(args.seeds, 1, MAX_MEMBERS, "--seeds")
    configs = [replace(config, seed=seed) for seed in range(config.seed, config.seed + count)]
    runs = {args.out / f"seed{one.seed}": one for one in configs}
    check_folders(args.out, [*runs])
    runs, benchmark, fabric = _prepared(runs)
    fabric.launch()
    members = trained(runs, benchmark, fabric, args.export)
    if not fabric.is_global_zero:
        raise SystemExit(0)  # of several processes one goes on
    return summarize(runs, members, benchmark, fabric, args.export)


def summarize(
    runs: Runs, members: list[dict[str, Any]], benchmark: Benchmark, fabric: Fabric, exports: bool
) -> dict[str, Any]:
    """Writes what finished runs of several seeds are together, beside their folders: the summary, which is returned,
    and the model file. `members` as `trained` returns them."""
    config, out = next(iter(runs.values())), next(iter(runs)).parent
    made_of_them = _finish(config, benchmark, out, [*runs], fabric.device, exports)
    summary = {"config": plain(config), "members": members} | made_of_them
    with atomic_file(out / SUMMARY) as file:
        file.write(json.dumps(summary, indent=1).encode())
    return summary


def _prepared(runs: Runs) -> tuple[Runs, Benchmark, Fabric]:
    """The settings of the runs, complete, their images, and the devices. What can be known before anything is trained
    is checked here."""
    from qdeploy.training.domains import benchmark_of
    from qdeploy.training.minibatches import training_images
    from qdeploy.training.quantize_finished import float_run
    from qdeploy.training.run_log import check_logger
    from qdeploy.training.start import check_selectable, check_setting

    config = next(iter(runs.values()))
    check_logger(config.logger)
    if config.epochs is None:
        check_begun(runs)
    if config.float_runs is not None or made(config, "quantization").of_finished_runs:
        for one in runs.values():
            float_run(one)
    fabric = fabric_of(config)
    benchmark = benchmark_of(config, check=lambda outline: check_setting(config, outline))
    if config.epochs is not None:
        shown = training_images(config, benchmark)
        runs = {run: with_updates(one, *shown) for run, one in runs.items()}
        check_selectable(next(iter(runs.values())))
        check_begun(runs)
    return runs, benchmark, fabric


def trained(runs: Runs, benchmark: Benchmark, fabric: Fabric, exports: bool) -> list[dict[str, Any]]:
    """Makes or continues the runs; what their selected networks got right."""
    from qdeploy.training.evaluation import evaluation_sets
    from qdeploy.training.processes import Interrupted
    from qdeploy.training.rehearsal import rehearse_export
    from qdeploy.training.start import describe
    from qdeploy.training.trainer import run

    first = next(iter(runs.values()))
    sets = evaluation_sets(first, benchmark)  # raises where something is missing
    said: list[str] = []

    def before_updates(begun: bool) -> None:
        if said:  # for an earlier seed
            return
        said.extend(describe(first, benchmark, sets))
        for line in said:
            note(line)
        if exports and not begun:
            rehearse_export(first, benchmark)

    members = []
    try:
        for directory, config in runs.items():
            record = run(config, benchmark, directory, fabric, before_updates)
            kept = {key: record[key] for key in ("update", "validation", "test", "tests")}
            members.append({"seed": config.seed, **kept})
    except Interrupted as stop:
        note(str(stop))
        raise SystemExit(128 + stop.signum) from None
    return members


def check_folders(out: Path, runs: Sequence[Path]) -> None:
    """Raise InputError unless the files of these runs can be written."""
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InputError(f"expected a folder to write in, got something else - at {there}")
    for path in [out / name for name in (SUMMARY, *FILES)] + [
        run / name for run in runs for name in (SETTINGS, CHECKPOINT, LOG, MODEL, DONE)
    ]:
        check_regular(path)


def check_begun(runs: Runs) -> None:
    """Raise InputError unless what was begun in these folders are these runs."""
    for run, config in runs.items():
        if (done := read_done(run)) is not None:
            check_same_run(done[0], config, run / DONE)
        elif (run / CHECKPOINT).exists():
            check_same_run(read_state(run / CHECKPOINT)[0], config, run / CHECKPOINT)


def fabric_of(config: Config) -> Fabric:
    from lightning_fabric import Fabric
    from lightning_fabric.accelerators.cpu import CPUAccelerator
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    try:
        precision: Any = config.precision  # one of the choices of Config
        fabric = Fabric(accelerator=config.accelerator, devices=config.devices, precision=precision)
    except (RuntimeError, ValueError, ImportError, MisconfigurationException) as error:
        said = str(error).splitlines()[0]
        raise InputError(f"expected a device of this machine, got {said} - at --accelerator") from error
    if isinstance(fabric.accelerator, CPUAccelerator):
        integer(config.devices, 1, os.cpu_count() or 1, "--devices")
    return fabric


def show(summary: dict) -> None:
    """Prints the summary of `main` as a table; accuracies in percent."""
    from qdeploy.training.methods_table import show_methods
    from qdeploy.training.results_table import show_results

    if "methods" in summary:
        return show_methods(summary)
    if "settings" in summary:
        return write(summary["settings"].rstrip())
    return show_results(summary)


def _finish(
    config: Config, benchmark: Benchmark, out: Path, runs: Sequence[Path], device: torch.device, exports: bool
) -> dict:
    """Accuracy of the ensemble on what is held out, and, where the networks are quantized, the model file."""
    from qdeploy.training.attached_quantizers import quantizers
    from qdeploy.training.finished_runs import finish
    from qdeploy.training.selected_network import load_trained

    nets = [load_trained(run, benchmark) for run in runs]
    quantized = any(quantizers(net) for net in nets)
    if len(nets) == 1 and not quantized:
        return {}
    path = out / FILES[len(nets) > 1] if quantized and exports else None
    return finish(nets, config, benchmark, device, path)
