"""`qdeploy train`: the runs of several seeds, their table, and the model file of the ensemble;
`qdeploy export`: such a file of finished runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.arguments import integer
from qdeploy.errors import InputError
from qdeploy.files import atomic_file, check_regular
from qdeploy.graph import MAX_MEMBERS
from qdeploy.terminal import note, write
from qdeploy.training.config import IN_DOMAIN, Config, difference, flag, resolve
from qdeploy.training.presets import preset_of
from qdeploy.training.run_files import CHECKPOINT, DONE, LOG, MODEL, check_same_run, read_done, read_state

if TYPE_CHECKING:
    import numpy as np
    from lightning_fabric import Fabric
    from torch import Tensor, nn

    from qdeploy.exporter import ExportReport
    from qdeploy.training.domains import Benchmark, Outline

SUMMARY, FILES = "summary.json", ("model.safetensors", "eoq.safetensors")  # FILES: of one network, of an ensemble


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each setting of `Config`, and --seeds and --out."""
    types = typing.get_type_hints(Config)
    for setting in fields(Config):
        option, text = flag(setting.name), setting.metadata["help"]
        if types[setting.name] is bool:
            parser.add_argument(option, action="store_true", help=text)
            continue
        kind = next(t for t in (typing.get_args(types[setting.name]) or (types[setting.name],)) if t is not type(None))
        default = "" if setting.default is None else f" (default: {setting.default})"
        choices = setting.metadata["choices"]
        parser.add_argument(option, type=kind, default=setting.default, choices=choices, help=text + default)
    seeds = "train so many networks, from --seed on; 2 or more make an ensemble (default: 1)"
    parser.add_argument("--seeds", type=int, default=1, help=seeds)
    parser.add_argument("--out", type=_folder, required=True, help="folder of the run; the same command continues it")


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got ''")
    return Path(text)


def main(args: argparse.Namespace) -> dict:
    """Trains the seeds one after another, or continues them; writes OUT/summary.json and, for QT-DoG, the model file.

    Returns the summary. Raises InputError for settings that do not fit the data; after SIGINT or SIGTERM it exits with
    128 + the signal's number, and the same command continues the run.
    """
    seeds = range(args.seed, args.seed + integer(args.seeds, 1, MAX_MEMBERS, "--seeds"))
    config = resolve(Config(**{setting.name: getattr(args, setting.name) for setting in fields(Config)}))
    _check_folders(config, args.out, [args.out / f"seed{seed}" for seed in seeds])
    from qdeploy.training.trainer import Interrupted, check_setting, evaluation_sets, run

    fabric = _fabric(config)
    benchmark = _benchmark(config, check=lambda outline: check_setting(config, outline))
    evaluation_sets(config, benchmark)  # raises where something is missing, before anything is trained
    if not all((args.out / f"seed{seed}" / DONE).exists() for seed in seeds):
        note(f"preset: {preset_of(config.data).name}")
    fabric.launch()
    members = []
    try:
        for seed in seeds:
            directory = args.out / f"seed{seed}"
            record = run(replace(config, seed=seed), benchmark, directory, fabric)
            members.append({"seed": seed, **{key: record[key] for key in ("update", "validation", "test", "tests")}})
    except Interrupted as stop:
        note(str(stop))
        raise SystemExit(128 + stop.signum) from None
    if not fabric.is_global_zero:
        raise SystemExit(0)  # of several processes one goes on
    summary = {"config": asdict(config), "members": members} | _finish(config, benchmark, args.out, len(members))
    with atomic_file(args.out / SUMMARY) as file:
        file.write(json.dumps(summary, indent=1).encode())
    return summary


def _check_folders(config: Config, out: Path, runs: Sequence[Path]) -> None:
    """Raise InputError unless the files of these runs are ours or can be written."""
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InputError(f"expected a folder to write in, got something else - at {there}")
    for name in (SUMMARY, *FILES):
        check_regular(out / name)
    for seed, run in enumerate(runs, config.seed):
        for name in (CHECKPOINT, LOG, MODEL, DONE):
            check_regular(run / name)
        if (done := read_done(run)) is not None:
            check_same_run(done[0], replace(config, seed=seed), run / DONE)
        elif (run / CHECKPOINT).exists():
            check_same_run(read_state(run / CHECKPOINT)[0], replace(config, seed=seed), run / CHECKPOINT)


def _fabric(config: Config) -> Fabric:
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
    test, members = summary["config"]["test_domain"], summary["members"]
    if test == IN_DOMAIN:
        measured = "20% of each domain"
    else:
        measured = f"80% of the held-out domain{'s' if len(members[0]['tests']) > 1 else ''} {test}"
    write(f"Accuracy on {measured}, at the evaluation chosen by training-domain validation")
    rows = [_columns(member["tests"], member["test"]) for member in members]
    write(f"{'seed':>8} {'update':>6} {'validation':>11}" + "".join(f" {name:>11}" for name in rows[0]))
    for member, row in zip(members, rows, strict=True):
        write(f"{member['seed']:>8} {member['update']:>6} {member['validation']:>11.2%}" + _cells(row))
    if len(members) > 1:
        means = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
        error = statistics.stdev(member["test"] for member in members) / len(members) ** 0.5
        write(f"{'mean':>8} {'':>6} {'':>11}{_cells(means)} +- {error:.2%} (standard error)")
        for rule, accuracy in summary["ensemble"].items():
            write(f"ensemble, {rule:<17}" + _cells(_columns(summary["ensemble_tests"][rule], accuracy)))
    if "file" in summary:
        file = summary["file"]
        write(f"{file['path']}: {file['bytes']:,} bytes")
        write(f"int8 engine {file['test']:.2%}, the same class as the trained network in {file['agreement']:.2%}")


def _columns(tests: dict[str, float], mean: float) -> dict[str, float]:
    """The accuracy of each domain, and their mean where there are several."""
    return tests if len(tests) == 1 else {**tests, "mean": mean}


def _cells(row: dict[str, float]) -> str:
    return "".join(f" {accuracy:>{max(11, len(name))}.2%}" for name, accuracy in row.items())


def _finish(config: Config, benchmark: Benchmark, out: Path, count: int) -> dict:
    """Accuracy of the ensemble on what is held out, and, for QT-DoG, the model file."""
    import torch

    from qdeploy.kernels.ensemble import RULES, combine
    from qdeploy.training import trainer
    from qdeploy.training.quantize import summary

    nets = [trainer.load_trained(out / f"seed{config.seed + i}", benchmark) for i in range(count)]
    sets = trainer.evaluation_sets(config, benchmark)
    held_out = {name: sets[part] for name, part in trainer.reported(config, benchmark).items()}
    labels = {
        name: torch.from_numpy(benchmark.domains[i].labels[positions]) for name, (i, positions) in held_out.items()
    }
    with torch.no_grad():
        logits = {
            name: torch.stack([trainer.apply(net, benchmark, *part) for net in nets]) for name, part in held_out.items()
        }

    def decided(rule: str) -> dict[str, Tensor]:
        return {name: combine(scores, rule)[1] for name, scores in logits.items()}

    found: dict = {}
    if count > 1:
        by_rule = {rule: _accuracy(decided(rule), labels) for rule in RULES}
        found["ensemble"] = {rule: result["test"] for rule, result in by_rule.items()}
        found["ensemble_tests"] = {rule: result["tests"] for rule, result in by_rule.items()}
    if config.algorithm != "qt-dog":
        return found
    found["layers"] = [[asdict(layer) for layer in summary(net)] for net in nets]
    path = out / FILES[count > 1]
    _export(nets, config, benchmark, path)
    classes = {name: _int8_classes(path, benchmark, *part) for name, part in held_out.items()}
    fake_quant = decided("logits")
    same = torch.cat([classes[name] == fake_quant[name] for name in held_out])
    size = {"path": str(path), "bytes": path.stat().st_size}
    found["file"] = {**size, **_accuracy(classes, labels), "agreement": same.float().mean().item()}
    return found


def _accuracy(classes: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Any]:
    """{"test": the mean over domains, "tests": {domain: accuracy}}."""
    tests = {name: (classes[name] == labels[name]).float().mean().item() for name in labels}
    return {"test": statistics.fmean(tests.values()), "tests": tests}


def common_config(runs: Sequence[Path]) -> Config:
    """The settings of finished runs, with the seed of the first. Raises InputError where they differ in more than the
    seed, or a folder holds no finished run."""
    configs = [_config_of_run(run) for run in runs]
    for run, config in zip(runs[1:], configs[1:], strict=True):
        found = difference(replace(config, seed=configs[0].seed), configs[0])
        if found is not None:
            raise InputError(f"expected runs that differ in their seed alone, {found} - at {run}")
    return configs[0]


def _config_of_run(run: Path) -> Config:
    done = read_done(run)
    if done is None:
        raise InputError(
            f"expected the folder of a finished run (OUT/seed0 of `qdeploy train`), got no done.json - at {run}"
        )
    return done[0]


def export_runs(
    runs: Sequence[Path], config: Config, path: Path, combine: str, observer: str, images: int
) -> ExportReport:
    """Writes the networks of finished runs with the settings `config` as one model file; two or more are an ensemble.

    combine, observer: as for `qdeploy.export_ensemble`. images: of each source domain, for calibration.
    """
    from qdeploy.exporter import check_observer
    from qdeploy.training.trainer import load_trained

    check_observer(observer)  # before minutes of loading
    benchmark = _benchmark(config)
    nets = [load_trained(run, benchmark) for run in runs]
    return _export(nets, config, benchmark, path, combine, observer, images)


def _export(
    nets: Sequence[nn.Module],
    config: Config,
    benchmark: Benchmark,
    path: Path,
    combine: str = "logits",
    observer: str = "minmax",
    images: int = 128,
) -> ExportReport:
    import qdeploy
    from qdeploy.training.trainer import calibration_images

    shown = calibration_images(config, benchmark, images)
    options: dict[str, Any] = {
        "calibration": shown.split(64),
        "observer": observer,
        "preprocess": {"mean": benchmark.mean, "std": benchmark.std},
        "classes": benchmark.classes,
    }
    if len(nets) == 1:
        return qdeploy.export(nets[0], shown[:2], path, **options)
    return qdeploy.export_ensemble(nets, shown[:2], path, combine=combine, **options)


def _benchmark(config: Config, check: Callable[[Outline], None] = lambda outline: None) -> Benchmark:
    from qdeploy.training.domains import load_benchmark

    names = config.domains.split(",") if config.domains is not None else None
    return load_benchmark(config.data, names, config.image_size, check, config.skip_unreadable)


def _int8_classes(path: Path, benchmark: Benchmark, domain: int, positions: np.ndarray) -> Tensor:
    import torch

    import qdeploy
    from qdeploy.training.trainer import apply

    model = qdeploy.load_int_model(path)
    return apply(lambda images: torch.from_numpy(model.predict(images.numpy())), benchmark, domain, positions)
