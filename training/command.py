"""`qdeploy train`: the runs of several seeds, their table, and the model file of the ensemble;
`qdeploy export`: such a file of finished runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import typing
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.errors import InputError
from qdeploy.training.config import Config, difference, resolve

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from qdeploy.exporter import ExportReport
    from qdeploy.training.domains import Benchmark


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each setting of `Config`, and --seeds and --out."""
    types = typing.get_type_hints(Config)
    for setting in fields(Config):
        flag, text = f"--{setting.name.replace('_', '-')}", setting.metadata["help"]
        if types[setting.name] is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        kind = next(t for t in (typing.get_args(types[setting.name]) or (types[setting.name],)) if t is not type(None))
        default = "" if setting.default is None else f" (default: {setting.default})"
        choices = setting.metadata["choices"]
        parser.add_argument(flag, type=kind, default=setting.default, choices=choices, help=text + default)
    seeds = "train so many networks, from --seed on; 2 or more make an ensemble (default: 1)"
    parser.add_argument("--seeds", type=int, default=1, help=seeds)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the same command continues it")


def main(args: argparse.Namespace) -> dict:
    """Trains the seeds one after another, or continues them; writes OUT/summary.json and, for QT-DoG, the model file.

    Returns the summary. Raises InputError for settings that do not fit the data; after SIGINT or SIGTERM it exits with
    128 + the signal's number, and the same command continues the run.
    """
    if args.seeds < 1:
        raise InputError(f"expected at least 1, got {args.seeds} - at --seeds")
    config = resolve(Config(**{setting.name: getattr(args, setting.name) for setting in fields(Config)}))
    from lightning_fabric import Fabric

    from qdeploy.training.trainer import Interrupted, evaluation_sets, run

    benchmark = _benchmark(config)
    if len(benchmark.domains) < 2:
        raise InputError(f"expected two or more domains, got {len(benchmark.domains)} - at --domains")
    evaluation_sets(config, benchmark)  # raises where something is missing, before anything is trained
    try:
        precision: Any = config.precision  # one of the choices of Config
        fabric = Fabric(accelerator=config.accelerator, devices=config.devices, precision=precision)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"expected a device of this machine, got {error} - at --accelerator") from error
    fabric.launch()
    members = []
    try:
        for seed in range(config.seed, config.seed + args.seeds):
            directory = args.out / f"seed{seed}"
            record = run(replace(config, seed=seed), benchmark, directory, fabric)
            members.append({"seed": seed, **{key: record[key] for key in ("update", "validation", "test")}})
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(128 + stop.signum) from None
    if not fabric.is_global_zero:
        raise SystemExit(0)  # of several processes one goes on
    summary = {"config": asdict(config), "members": members} | _finish(config, benchmark, args.out, len(members))
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def show(summary: dict) -> None:
    """Prints the summary of `main` as a table; accuracies in percent."""
    test = summary["config"]["test_domain"]
    print(f"Accuracy on 80% of the held-out domain {test}, at the evaluation chosen by training-domain validation")
    print(f"{'seed':>8} {'update':>6} {'validation':>11} {test:>11}")
    for member in summary["members"]:
        print(f"{member['seed']:>8} {member['update']:>6} {member['validation']:>11.2%} {member['test']:>11.2%}")
    scores = [member["test"] for member in summary["members"]]
    if len(scores) > 1:
        error = statistics.stdev(scores) / len(scores) ** 0.5
        print(f"{'mean':>8} {'':>6} {'':>11} {statistics.mean(scores):>11.2%} +- {error:.2%} (standard error)")
        for rule, accuracy in summary["ensemble"].items():
            print(f"ensemble, {rule:<17} {accuracy:>11.2%}")
    if "file" in summary:
        file = summary["file"]
        print(f"{file['path']}: {file['bytes']:,} bytes")
        print(f"int8 engine {file['test']:.2%}, the same class as the trained network in {file['agreement']:.2%}")


def _finish(config: Config, benchmark: Benchmark, out: Path, count: int) -> dict:
    """Accuracy of the ensemble on the held-out domain, and, for QT-DoG, the model file."""
    import torch

    from qdeploy.kernels.ensemble import RULES, combine
    from qdeploy.training import trainer
    from qdeploy.training.quantize import summary

    nets = [trainer.load_trained(out / f"seed{config.seed + i}", benchmark) for i in range(count)]
    domain, positions = trainer.evaluation_sets(config, benchmark)[f"{config.test_domain}_in"]
    labels = torch.from_numpy(benchmark.domains[domain].labels[positions])
    with torch.no_grad():
        logits = torch.stack([trainer.apply(net, benchmark, domain, positions) for net in nets])
    found: dict = {}
    if count > 1:
        decided = {rule: combine(logits, rule)[1] for rule in RULES}
        found["ensemble"] = {rule: (classes == labels).float().mean().item() for rule, classes in decided.items()}
    if config.algorithm != "qt-dog":
        return found
    found["layers"] = [[asdict(layer) for layer in summary(net)] for net in nets]
    path = out / ("eoq.safetensors" if count > 1 else "model.safetensors")
    _export(nets, config, benchmark, path)
    classes = _int8_classes(path, benchmark, domain, positions)
    fake_quant = combine(logits, "logits")[1]
    found["file"] = {
        "path": str(path),
        "bytes": path.stat().st_size,
        "test": (classes == labels).float().mean().item(),
        "agreement": (classes == fake_quant).float().mean().item(),
    }
    return found


def common_config(runs: Sequence[Path]) -> Config:
    """The settings of finished runs, with the seed of the first. Raises InputError where they differ in more than the
    seed, or a folder holds no finished run."""
    configs = [_config_of_run(run) for run in runs]
    first = Config(**configs[0])
    for run, config in zip(runs[1:], configs[1:], strict=True):
        found = difference(config | {"seed": first.seed}, first)
        if found is not None:
            raise InputError(f"expected runs that differ in their seed alone, {found} - at {run}")
    return first


def _config_of_run(run: Path) -> dict[str, Any]:
    path = run / "done.json"
    if not path.is_file():
        raise InputError(
            f"expected the folder of a finished run (OUT/seed0 of `qdeploy train`), got no done.json - at {run}"
        )
    return json.loads(path.read_text())["config"]


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


def _benchmark(config: Config) -> Benchmark:
    from qdeploy.training.domains import load_benchmark

    return load_benchmark(config.data, config.domains.split(",") if config.domains else None, config.image_size)


def _int8_classes(path: Path, benchmark: Benchmark, domain: int, positions: np.ndarray) -> Tensor:
    import torch

    import qdeploy
    from qdeploy.training.trainer import apply

    model = qdeploy.load_int_model(path)
    return apply(lambda images: torch.from_numpy(model.predict(images.numpy())), benchmark, domain, positions)
