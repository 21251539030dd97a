"""The settings of a training run. Imports nothing heavy, so that the command line can show them at once."""

from __future__ import annotations

import math
import os
import typing
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from qdeploy import _engine
from qdeploy.errors import InputError
from qdeploy.training.presets import NAMED, preset_of


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None, *, least: int = 0, most: int = 0) -> Any:
    """`least` and `most`: of a number; `most` 0: no bound but what is finite."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most})


_MANY = 2**31 - 1

IN_DOMAIN = "in-domain"  # in place of a domain to hold out: all train, and a share of each is held out
_SCOPES = ("all", "no_s", "bn_head")


@dataclass(frozen=True)
class Config:
    """Everything that determines a run, and with `MAY_CHANGE` how it is made.

    A None whose type does not say so stands there only until `resolve` has put in the preset of the data.
    """

    data: str = _option("digits-dg", f"{', '.join(NAMED)} (random images), or a folder root/domain/class/image")
    test_domain: str = _option(
        None, f"the domain held out of training, or several with commas, or {IN_DOMAIN}: a fifth of each (required)"
    )
    domains: str | None = _option(None, "use only these domains, separated by commas")
    skip_unreadable: str | None = _option(None, "train without the images in this list: --write-list of `qdeploy data`")
    algorithm: str = _option("qt-dog", "training algorithm", ("erm", "qt-dog"))
    model: str = _option(None, "network: a name in qdeploy.training.MODELS")
    weights: str | None = _option(None, "pretrained weights to start from: a state dict, .pth or .safetensors")
    from_scratch: bool = _option(False, "images of a folder: begin with random weights instead of --weights")
    image_size: int = _option(224, "height and width for images of a folder", least=1, most=16_384)
    bits: int = _option(7, "bits of the weights, 2 to 8")
    activation_bits: int | None = _option(None, "bits of the layers' inputs during training, 2 to 8")
    per_tensor: bool = _option(False, "one step size for a weight instead of one for each output channel")
    init: str = _option("lsq", "the first step sizes", ("lsq", "mse", "minmax"))
    grad_scale: str = _option("tensor", "the elements counted in the gradient scale", ("tensor", "channel", "none"))
    qat_scope: str = _option(
        "all", "trains after the switch: all, no step sizes, or BatchNorm and classifier alone", _SCOPES
    )
    reset_optimizer: bool = _option(False, "forget the optimizer's moments at the switch")
    updates: int = _option(None, "changes of all weights in training", least=1, most=_MANY)
    quantize_at: int = _option(None, "the update at whose start the network is quantized")
    eval_every: int = _option(None, "updates between evaluations", least=1, most=_MANY)
    batch_size: int = _option(None, "images from each source domain in an update", least=1, most=1_000_000)
    lr: float = _option(None, "Adam's learning rate")
    lr_step_size: float = _option(1e-5, "Adam's learning rate of the step sizes")
    seed: int = _option(0, "seed of the weights, the minibatches and the augmentation", most=_MANY)
    split_seed: int = _option(0, "seed of the split of each domain into training and validation images", most=_MANY)
    accelerator: str = _option("auto", "cpu, cuda, mps or auto")
    devices: int = _option(1, "number of devices; more than one trains data-parallel", least=1, most=1024)
    precision: str = _option("32-true", "arithmetic of the network", ("32-true", "bf16-mixed"))
    workers: int = _option(
        None, "processes of each device that decode images; 0: the training does (default: by the cores)", most=1024
    )

    @property
    def targets(self) -> list[str]:
        """The domains that are held out of training; none where a share of each is."""
        return [] if self.test_domain == IN_DOMAIN else self.test_domain.split(",")


MACHINE = frozenset({"accelerator", "devices", "precision", "workers"})
# What a run may go on with: other machines, more updates, images that lie elsewhere (of the same fingerprint).
# `from_scratch` only consents.
MAY_CHANGE = MACHINE | {"updates", "data", "skip_unreadable", "from_scratch"}


def resolve(config: Config) -> Config:
    """Fills in the preset of the data and checks the settings; raises InputError."""
    preset = preset_of(config.data).settings
    config = replace(config, **{key: value for key, value in preset.items() if getattr(config, key) is None})
    if config.test_domain is None:
        raise InputError("expected the domain to hold out, got none - at --test-domain")
    if len({*config.targets}) < len(config.targets):
        raise InputError(f"expected every domain once, got {config.test_domain} - at --test-domain")
    for key in ("bits", "activation_bits"):
        bits = getattr(config, key)
        if bits is not None and not 2 <= bits <= 8:
            raise InputError(f"expected 2 to 8 bits, got {bits} - at {flag(key)}")
    for setting in fields(Config):
        choices, value = setting.metadata["choices"], getattr(config, setting.name)
        if choices and value not in choices:
            raise InputError(f"expected one of {', '.join(choices)}, got {value!r} - at {flag(setting.name)}")
        _check_number(value, flag(setting.name), setting.metadata)
    if config.algorithm == "qt-dog":
        # The record that is selected comes from an evaluation at or after that update.
        last = (config.updates - 1) // config.eval_every * config.eval_every
        if not 0 <= config.quantize_at <= last:
            expected = f"a switch in 0 .. {last} (the last evaluation)"
            raise InputError(f"expected {expected}, got {config.quantize_at} - at --quantize-at")
    if config.batch_size % config.devices:  # the mean over devices would weigh the images of a smaller share more
        expected = f"a multiple of {config.devices} images, as many for each device"
        raise InputError(f"expected {expected}, got {config.batch_size} - at --batch-size")
    return config if config.workers is not None else replace(config, workers=_workers(config))


def _workers(config: Config) -> int:
    """As many as the cores suffice for, of which the training takes one for each device; 16 decode 2,000 images/s."""
    cores = int(min(len(os.sched_getaffinity(0)), _engine.cpu_quota()))
    return 0 if config.data in NAMED else max(0, min(16, cores // config.devices - 1))


def flag(setting: str) -> str:
    """The option of the command line."""
    return f"--{setting.replace('_', '-')}"


def _check_number(value: Any, at: str, bounds: Mapping[str, Any]) -> None:
    if isinstance(value, (bool, str)) or value is None:
        return
    least, most = bounds["least"], bounds["most"]
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"expected a finite number, got {value} - at {at}")
    if value < least:
        raise InputError(f"expected {f'at least {least}' if least else '0 or more'}, got {value} - at {at}")
    if most and value > most:
        raise InputError(f"expected at most {most}, got {value} - at {at}")


def settings_of(config: Config) -> dict[str, Any]:
    """What the files of a run say of its settings: their values, and the values without any option."""
    preset = resolve(Config(data=config.data, test_domain=config.test_domain))
    return {"config": asdict(config), "defaults": asdict(preset)}


def stored(content: Any, path: object) -> Config:
    """The settings in the file `path` of a run, whose `content` holds `settings_of` it, maybe of another version.

    What the file does not know has its default. Raises InputError for a setting that is gone and was used, and
    AttributeError, KeyError, TypeError or ValueError for what are no settings.
    """
    types, defaults = typing.get_type_hints(Config), content.get("defaults", {})
    kept: dict[str, Any] = {}
    for key, value in content["config"].items():
        if key in types:
            if not isinstance(value, (int, float) if types[key] is float else types[key]):
                raise TypeError(key)
            kept[key] = value
        elif key not in defaults or defaults[key] != value:
            got = f"{key}={value!r}, which this one has not: train anew with another --out"
            raise InputError(f"expected the settings of this version, got {got} - at {path}")
    try:
        return resolve(Config(**kept))
    except InputError as error:
        raise ValueError(str(error)) from error  # it names an option, not the file


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which a stored run differs from `new`: the value of either."""
    pairs = {setting.name: (getattr(old, setting.name), getattr(new, setting.name)) for setting in fields(Config)}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def first_difference(old: Config, new: Config, allowed: Collection[str]) -> str | None:
    """The first setting beyond the `allowed` ones in which a stored run differs from `new`, in words, or None."""
    for key, (was, now) in differences(old, new).items():
        other_kind = key == "data" and {was, now} & {*NAMED}  # not the same folder elsewhere
        if key not in allowed or other_kind:
            return f"{key}={was!r}, got {key}={now!r}"
    return None
