"""Finished runs: which folders are meant, which runs go together, and what is made of their networks. Needs no torch
until a network is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.errors import InputError
from qdeploy.terminal import note
from qdeploy.training import fingerprint
from qdeploy.training.config import MACHINE, Config, differences
from qdeploy.training.run_files import DONE, SETTINGS, Done, read_done, sound

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qdeploy.exporter import ExportReport
    from qdeploy.training.domains import Benchmark

Runs = Mapping[Path, Done]  # by their folders

# What members of one ensemble, or one average, have to share beside the images. Dropout changes no tensor.
_SHARED = frozenset({"test_domain", "split_seed", "image_size", "tokens", "model", "selection"})
_MAY_DIFFER = frozenset({"model.dropout"})


def all_seeds(folders: Sequence[Path]) -> list[Path]:
    """The folders of runs, with those of all seeds, in order, in place of the folder OUT of `qdeploy train`."""
    found: list[Path] = []
    for folder in folders:
        seeds = [] if (folder / DONE).exists() else [path for path in folder.glob("seed*") if path.name[4:].isdecimal()]
        found += sorted(seeds, key=lambda path: int(path.name[4:])) or [folder]
    return found


def in_number_order(path: Path) -> list[str | int]:
    """A key to sort folders by: seed10 comes after seed2."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def runs_in(folders: Sequence[Path]) -> list[Path]:
    """The finished runs in each folder and in all folders in it, itself included, in order, once each. Raises
    InputError for a folder without any."""
    found: dict[Path, Path] = {}
    for folder in folders:
        runs = sorted((path.parent for path in folder.rglob(DONE)), key=in_number_order)
        if not runs:
            raise _none_at(folder)
        for run in runs:
            found.setdefault(run.resolve(), run)
        if left := sum(not (path.parent / DONE).exists() for path in folder.rglob(SETTINGS)):
            note(f"{left} runs are not finished, and left out - in {folder}")
    return [*found.values()]


def _none_at(folder: Path) -> InputError:
    expected = f"the folder of a finished run (OUT/seed0 of `qdeploy train`), got no {DONE}"
    return InputError(f"expected {expected} - at {folder}")


def read_runs(folders: Sequence[Path]) -> dict[Path, Done]:
    """What the runs in `folders` say of themselves.

    Raises InputError where a run is not finished, stands there twice, or does not go with the first: other images or
    classes, another network, held-out domain, split or selection.
    """
    runs: dict[Path, Done] = {}
    for folder in folders:
        done = read_done(folder)
        if done is None:
            raise _none_at(folder)
        if any(folder.samefile(other) for other in runs):
            raise InputError(f"expected every run once, got one twice - at {folder}")
        runs[folder] = done
    for folder in runs:
        _check_goes_with(runs, folder)
    return runs


def _check_goes_with(runs: Runs, folder: Path) -> None:
    first = next(iter(runs))
    with sound(folder / DONE):
        found = fingerprint.difference(runs[first].images, runs[folder].images)
    if found is not None:
        raise InputError(f"expected the images of {first}, got {found} - at {folder}")
    for key, (was, now) in differences(runs[first].config, runs[folder].config).items():
        if key.partition(".")[0] in _SHARED and key not in _MAY_DIFFER:
            expected = "runs of one network, split, held-out domain and selection"
            raise InputError(f"expected {expected}, {key}={was!r}, got {key}={now!r} - at {folder}")


def varied(configs: Collection[Config]) -> dict[str, list[Any]]:
    """The settings in which runs differ, but for those of their machines: {setting: [its value in each]}."""
    first, *others = configs
    found: dict[str, list[Any]] = {}
    for place, config in enumerate(others, 1):
        for key, (was, now) in differences(first, config).items():
            if key not in MACHINE:
                found.setdefault(key, [was] * len(configs))[place] = now
    return found


def export_runs(
    runs: Runs,
    path: Path,
    combine: str,
    images: int,
    fallback_bits: int | None = None,
    observer: str = "minmax",
    rounding: str = "nearest",
    correct_bias: bool = True,
) -> ExportReport:
    """Writes the networks of finished runs as one model file; two or more are an ensemble.

    images: of each source domain, for calibration. The others are as for `qdeploy.export_ensemble`.
    """
    from qdeploy.exporter import check_observer
    from qdeploy.exporter.rounding import check_rounding
    from qdeploy.training.domains import benchmark_of
    from qdeploy.training.selected_network import load_trained

    check_observer(observer)  # before minutes of loading
    check_rounding(rounding, has_data=True)
    config = next(iter(runs.values())).config
    benchmark = benchmark_of(config)
    nets = [load_trained(run, benchmark) for run in runs]
    options = {"observer": observer, "rounding": rounding, "correct_bias": correct_bias}
    return export_networks(nets, config, benchmark, path, combine, images, fallback_bits, **options)


def export_networks(
    nets: Sequence[nn.Module],
    config: Config,
    benchmark: Benchmark,
    path: Path,
    combine: str = "logits",
    images: int = 128,
    fallback_bits: int | None = None,
    **options: Any,
) -> ExportReport:
    """Writes `nets`, of runs that share what `config` says of the data, as one model file; as for `export_runs`."""
    import qdeploy
    from qdeploy.training.selected_network import calibration_images

    shown = calibration_images(config, benchmark, images)
    options |= {"calibration": shown.split(64), **file_options(benchmark)}
    options["fallback_bits"] = fallback_bits if fallback_bits is not None else fallback_for(nets[0], config)
    if len(nets) == 1:
        return qdeploy.export(nets[0], shown[:2], path, **options)
    return qdeploy.export_ensemble(nets, shown[:2], path, combine=combine, **options)


def fallback_for(net: nn.Module, config: Config) -> dict[str, int] | None:
    """8 bits for the layers of a quantized network that `bits` leaves float by name, which is said; an engine of
    integers has no float. None where the export's own rule does (the classifier alone may lack a quantizer)."""
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

    from qdeploy.networks.quantizable import classifier, quantizable_layers
    from qdeploy.training.attached_quantizers import quantizers, weight_quantizer

    layers = {name: layer for name, layer in quantizable_layers(net).items() if weight_quantizer(layer) is None}
    # nn.MultiheadAttention multiplies by its `out_proj` itself: an export knows that under the name of the attention.
    of_attention = {name for name, layer in layers.items() if isinstance(layer, NonDynamicallyQuantizableLinear)}
    left = [*dict.fromkeys(name.removesuffix(".out_proj") if name in of_attention else name for name in layers)]
    head = classifier(net)
    others = [name for name in left if name != head]
    if not others or not quantizers(net) or not isinstance(config.bits, Mapping):
        return None
    note(f"weights that trained in float have 8 bits in the file: {', '.join(others)}")
    return dict.fromkeys(left, 8)


def file_options(benchmark: Benchmark) -> dict[str, Any]:
    """What the data say to an export."""
    return {**benchmark.inputs.file_options(), "classes": benchmark.classes}


def layers_of(report: ExportReport) -> list[dict[str, Any]]:
    """What an export says of each layer of the file, for a summary."""
    keys = ("member", "name", "op", "bits", "macs", "sqnr_db")
    return [{key: getattr(layer, key) for key in keys} for layer in report.layers]


def finish(
    nets: Sequence[nn.Module],
    config: Config,
    benchmark: Benchmark,
    device: torch.device,
    path: Path | None = None,
    combine: str = "logits",
    fallback_bits: int | None = None,
) -> dict[str, Any]:
    """What there is to say of trained networks together, and of the model file that is written where there is a `path`.

    Of quantized ones {"layers": [[...], ...]}; of several, which are an ensemble, {"ensemble": {rule: accuracy},
    "ensemble_tests": {rule: {domain: accuracy}}}; of the file {"file": ...} as `judge` returns it, with "layers" as of
    `layers_of`. The networks are moved to the device.
    """
    from qdeploy.training.attached_quantizers import quantizers
    from qdeploy.training.judging import judge
    from qdeploy.training.quantize import summary

    found: dict[str, Any] = {}
    if any(quantizers(net) for net in nets):
        found["layers"] = [[asdict(layer) for layer in summary(net)] for net in nets]
    exported = None
    if path is not None:
        exported = export_networks(nets, config, benchmark, path, combine=combine, fallback_bits=fallback_bits)
    judged = judge(nets, config, benchmark, device, path, combine)
    if exported is not None:
        judged["file"]["layers"] = layers_of(exported)
    rules = judged.pop("rules")
    if len(nets) > 1:
        found["ensemble"] = {rule: result["test"] for rule, result in rules.items()}
        found["ensemble_tests"] = {rule: result["tests"] for rule, result in rules.items()}
    return found | judged
