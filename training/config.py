"""The settings of a training run: plain ones, and a choice on each axis. Imports nothing heavy, so that the command
line can show them at once; `resolve` does, where it looks up the classes of the choices.
"""

from __future__ import annotations

import inspect
import math
import os
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from qdeploy import _engine
from qdeploy.errors import InputError
from qdeploy.training.choices import SHARED, Choice, converted, filled, make, parameters_of
from qdeploy.training.methods import AXES, METHODS
from qdeploy.training.presets import NAMED, preset_of


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None, *, least: int = 0, most: int = 0) -> Any:
    """`least` and `most`: of a number; `most` 0: no bound but what is finite."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most})


def _axis(help: str) -> Any:
    return field(default=None, metadata={"help": help, "choices": None, "axis": True})


VERSION = 1  # of the files of a run; it grows when an older qdeploy would misread what a newer one writes

_MANY = 2**31 - 1

IN_DOMAIN = "in-domain"  # in place of a domain to hold out: all train, and a share of each is held out
SELECTIONS = ("validation", "oracle", "last", "lowest-train-loss")
BATCH_NORMS = ("frozen", "trained", "re-estimated", "synchronized")


@dataclass(frozen=True)
class Config:
    """Everything that determines a run, and with `MAY_CHANGE` how it is made.

    A None whose type does not say so stands there only until `resolve` has put in what the method, the preset of the
    data or the class of a choice says. An axis may be given as a name or as {"name": ..., option: value}.
    """

    data: str = _option(
        "digits-dg", f"{', '.join(NAMED)} (random images), or a folder root/domain/class/image, or of texts"
    )
    test_domain: str = _option(
        None, f"the domain held out of training, or several with commas, or {IN_DOMAIN}: a fifth of each (required)"
    )
    domains: str | None = _option(None, "use only these domains, separated by commas")
    skip_unreadable: str | None = _option(None, "train without the images in this list: --write-list of `qdeploy data`")
    image_size: int = _option(224, "height and width for images of a folder", least=1, most=16_384)
    tokenizer: str | None = _option(None, "of texts: the tokenizer of the network in transformers, a folder or a name")
    tokens: int = _option(128, "of texts: the most tokens, at which longer ones are cut", least=3, most=16_384)

    normalization: str = _option(None, "of the images: as usual for the data, or as CLIP has it", ("data", "clip"))

    method: str = _option("qt-dog", "a row of `qdeploy train --methods`: what stands on the axes below")
    objective: Choice = _axis("the loss of an update")
    step: Choice = _axis("how its gradients are made")
    quantization: Choice = _axis("how the weights come onto a grid of integers")
    average: Choice = _axis("which networks of the run are averaged")
    bits: int | dict[str, int | None] | None = _option(None, "bits of the weights, 2 to 8; {pattern: bits} by layer")
    activation_bits: int | dict[str, int | None] | None = _option(
        None, "bits of the layers' inputs in training, 2 to 8; {pattern: bits} by layer"
    )
    quantize_at: int | None = _option(None, "the update at whose start the network is quantized")
    float_runs: str | None = _option(None, "for what quantizes finished networks: the folder --out of float runs")

    model: Choice = _axis("network: one of qdeploy.training.MODELS, timm:NAME, transformers:CLASS or module:FUNCTION")
    weights: str | None = _option(None, "pretrained weights to start from: a state dict, .pth or .safetensors")
    train_only: str | None = _option(None, "train only the parameters whose names match, e.g. 'fc.*', a linear probe")
    text_features: str | None = _option(
        None, "CLIP: a file of the classes' text features, the classifier of --model, which is the image tower"
    )
    from_scratch: bool = _option(False, "images of a folder: begin with random weights instead of --weights")
    batch_norm: str = _option(
        None, "its statistics; frozen is the default with --weights, trained without", choices=BATCH_NORMS
    )

    optimizer: Choice = _axis("the optimizer (default: adam)")
    lr: float = _option(None, "learning rate")
    lr_step_size: float = _option(None, "learning rate of the step sizes")
    weight_decay: float = _option(None, "weight decay; none of step sizes")
    schedule: Choice = _axis("how the learning rates change (default: constant)")
    updates: int = _option(None, "changes of all weights in training", least=1, most=_MANY)
    epochs: int | None = _option(None, "in place of --updates: as many as show all training images so often", least=1)
    eval_every: int = _option(None, "updates between evaluations", least=1, most=_MANY)
    batch_size: int = _option(None, "images from each source domain in an update", least=1, most=1_000_000)
    selection: str = _option("validation", "which evaluation's network is kept", SELECTIONS)
    seed: int = _option(0, "seed of the weights, the minibatches and the augmentation", most=_MANY)
    split_seed: int = _option(0, "seed of the split of each domain into training and validation images", most=_MANY)

    accelerator: str = _option("auto", "cpu, cuda, mps or auto")
    devices: int = _option(1, "number of devices; more than one trains data-parallel", least=1, most=1024)
    precision: str = _option("32-true", "arithmetic of the network", ("32-true", "bf16-mixed"))
    workers: int = _option(
        None, "processes of each device that decode images; 0: the training does (default: by the cores)", most=1024
    )
    logger: str = _option("none", "what logs the evaluations beside log.jsonl", ("none", "csv", "tensorboard"))
    checkpoint_minutes: float = _option(10.0, "most minutes of updates that a kill can cost")

    @property
    def targets(self) -> list[str]:
        """The domains that are held out of training; none where a share of each is."""
        return [] if self.test_domain == IN_DOMAIN else self.test_domain.split(",")

    @property
    def what(self) -> str:
        """What the data are, in words."""
        return "images" if self.tokenizer is None else "texts"


OF_IMAGES = ("image_size", "normalization", "skip_unreadable", "text_features")
AXES_OF_CONFIG = (*AXES, "model")
MACHINE = frozenset({"accelerator", "devices", "precision", "workers", "logger", "checkpoint_minutes"})
# What a run may go on with: other machines, more updates, data that lie elsewhere (of the same fingerprint).
# `from_scratch` only consents, `method` only names what stands on the axes.
MAY_CHANGE = MACHINE | {"updates", "epochs", "data", "tokenizer", "skip_unreadable", "from_scratch", "method"}
_DEFAULTS = {"optimizer": "adam", "schedule": "constant", "weight_decay": 0.0, "normalization": "data"}


def resolve(config: Config) -> Config:
    """Puts in what the method, the preset of the data and the classes on the axes say where nothing is given, and
    checks all; raises InputError. With `epochs` and without data at hand the updates stay None: see `with_updates`.
    """
    config = _typed(config)
    if config.test_domain is None:
        raise InputError("expected the domain to hold out, got none - at --test-domain")
    if len({*config.targets}) < len(config.targets):
        raise InputError(f"expected every domain once, got {config.test_domain} - at --test-domain")
    config = _with_choices(_layered(config), config)
    for setting in fields(Config):
        choices, value = setting.metadata["choices"], getattr(config, setting.name)
        if choices and value not in choices:
            raise InputError(f"expected one of {', '.join(choices)}, got {value!r} - at {flag(setting.name)}")
        _check_number(value, flag(setting.name), setting.metadata)
    _check_bits(config)
    _check_texts(config)
    if config.batch_size % config.devices:  # the mean over devices would weigh the images of a smaller share more
        expected = f"a multiple of {config.devices} {config.what}, as many for each device"
        raise InputError(f"expected {expected}, got {config.batch_size} - at --batch-size")
    if config.epochs is None:
        _check_switch(config)
    if config.selection == "oracle" and not config.targets:
        raise InputError(f"expected a domain held out, got {IN_DOMAIN} - at --selection oracle")
    return config if config.workers is not None else replace(config, workers=_workers(config))


def _typed(config: Config) -> Config:
    """With every value of the type of its setting."""
    hints = typing.get_type_hints(Config)
    found: dict[str, Any] = {}
    for setting in fields(Config):
        value = getattr(config, setting.name)
        if value is None:
            continue
        is_axis = setting.name in AXES_OF_CONFIG
        at = flag(setting.name)
        found[setting.name] = Choice.of(value, at) if is_axis else converted(value, hints[setting.name], at)
    if "model" in found:  # whose constructors say less of their types than the classes on the axes
        model = found["model"]
        options = {key: converted(value, Any, "--model") for key, value in model.options.items()}
        found["model"] = Choice(model.name, options)
    return replace(config, **found)


def _layered(config: Config) -> Config:
    """Over the row of the method, over the preset of the data, over the defaults of all."""
    if config.method not in METHODS:
        raise InputError(f"expected one of {', '.join(METHODS)}, got {config.method!r} - at --method")
    row, preset = METHODS[config.method], preset_of(config.data).settings
    layers: dict[str, Any] = {**_DEFAULTS, "batch_norm": "frozen" if config.weights else "trained", **preset}
    if config.epochs is not None:  # they wait for `with_updates`
        layers = {key: value for key, value in layers.items() if key not in ("updates", "quantize_at", "eval_every")}
    layers |= {**row.settings, **{axis: getattr(row, axis) for axis in AXES if hasattr(row, axis)}}
    found: dict[str, Any] = {}
    for key, lower in layers.items():
        given = getattr(config, key)
        if key in AXES_OF_CONFIG:
            lower = Choice.of(lower, flag(key))
            found[key] = lower if given is None else given.over(lower)
        elif given is None:
            found[key] = lower
    return replace(config, **found)


def _with_choices(config: Config, given: Config) -> Config:
    """With all options of the classes on the axes, and of the settings that they share those that they take, with their
    defaults. Raises InputError where another one was given."""
    found: dict[str, Any] = {axis: filled(getattr(config, axis), axis) for axis in AXES}
    taken: dict[str, inspect.Parameter] = {}
    for axis in AXES:
        taken |= {name: one for name, one in parameters_of(found[axis], axis).items() if name in SHARED}
    for name in SHARED:
        if getattr(config, name) is None or name not in taken:
            found[name] = taken[name].default if name in taken else None
        _check_taken(name, name in taken, given, found)
    if "start" not in parameters_of(found["quantization"], "quantization"):
        found["quantize_at"] = None
        _check_taken("quantize_at", False, given, found)
    return replace(config, **found)


def _check_taken(name: str, is_taken: bool, given: Config, found: Mapping[str, Any]) -> None:
    if not is_taken and getattr(given, name) is not None:
        on = ", ".join(f"{axis} {found[axis].name}" for axis in AXES)
        got = f"{getattr(given, name)!r}, which nothing takes ({on})"
        raise InputError(f"expected a setting of the method, got {got} - at {flag(name)}")


def taken(config: Config) -> set[str]:
    """Of the settings that a method may not have a use for those that this one has."""
    layered = _layered(_typed(config))
    found = {name for axis in AXES for name in parameters_of(getattr(layered, axis), axis) if name in SHARED}
    return found | {"quantize_at"} if "start" in parameters_of(layered.quantization, "quantization") else found


def made(config: Config, axis: str, **more: Any) -> Any:
    """What stands on an axis of a run as an object; `more` is what the run gives besides its settings."""
    of_run = {"start": config.quantize_at or 0, "updates": config.updates, "every": config.eval_every}
    shared = {name: getattr(config, name) for name in SHARED}
    return make(getattr(config, axis), axis, {**of_run, "seed": config.seed, **shared, **more})


def with_updates(config: Config, training_images: int, sources: int) -> Config:
    """With the updates of `epochs`, after which `training_images` have been drawn so often; an evaluation after each
    epoch, and the switch after 40 % of them, unless given."""
    if config.epochs is None:
        return config
    epoch = max(1, training_images // (config.batch_size * sources))
    updates = config.epochs * epoch + 1  # the last evaluation comes after the last epoch
    found = replace(config, updates=updates, eval_every=config.eval_every or epoch)
    if found.quantize_at is None and "start" in parameters_of(config.quantization, "quantization"):
        found = replace(found, quantize_at=updates * 2 // 5)
    _check_switch(found)
    return found


def _check_switch(config: Config) -> None:
    """The record that is selected comes from an evaluation at or after the switch."""
    if config.quantize_at is not None and config.updates is not None:
        last = (config.updates - 1) // config.eval_every * config.eval_every
        if not 0 <= config.quantize_at <= last:
            expected = f"a switch in 0 .. {last} (the last evaluation)"
            raise InputError(f"expected {expected}, got {config.quantize_at} - at --quantize-at")


def _check_texts(config: Config) -> None:
    for name in OF_IMAGES if config.tokenizer is not None else ():
        if getattr(config, name) not in (None, _DEFAULTS.get(name, getattr(Config, name))):
            raise InputError(f"expected data of images, got texts (--tokenizer {config.tokenizer}) - at {flag(name)}")


def may_change(config: Config) -> frozenset[str]:
    """The settings with which another part of a run may go on: the number of updates too, unless what stands on an axis
    goes by it."""
    parameters = {name for axis in AXES for name in parameters_of(getattr(config, axis), axis)}
    return MAY_CHANGE - {"updates", "epochs"} if parameters & {"updates", "progress"} else MAY_CHANGE


def _workers(config: Config) -> int:
    """As many as the cores suffice for, of which the training takes one for each device; 16 decode 2,000 images/s."""
    cores = int(min(len(os.sched_getaffinity(0)), _engine.cpu_quota()))
    return 0 if config.data in NAMED or config.tokenizer is not None else max(0, min(16, cores // config.devices - 1))


def flag(setting: str) -> str:
    """The option of the command line."""
    return f"--{setting.replace('_', '-')}"


def _check_number(value: Any, at: str, bounds: Mapping[str, Any]) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    least, most = bounds["least"], bounds["most"]
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"expected a finite number, got {value} - at {at}")
    if value < least:
        raise InputError(f"expected {f'at least {least}' if least else '0 or more'}, got {value} - at {at}")
    if most and value > most:
        raise InputError(f"expected at most {most}, got {value} - at {at}")


def _check_bits(config: Config) -> None:
    for key in ("bits", "activation_bits"):
        given = getattr(config, key)
        for bits in given.values() if isinstance(given, Mapping) else [given]:
            if bits is not None and not 2 <= bits <= 8:
                raise InputError(f"expected 2 to 8 bits, got {bits} - at {flag(key)}")


def plain(config: Config) -> dict[str, Any]:
    """The settings as files of settings have them."""
    values = {setting.name: getattr(config, setting.name) for setting in fields(Config)}
    return {key: value.plain() if isinstance(value, Choice) else value for key, value in values.items()}


def settings_of(config: Config) -> dict[str, Any]:
    """What the files of a run say of its settings: their values, the values without any option, and the version of all
    that such a file holds."""
    preset = resolve(Config(data=config.data, test_domain=config.test_domain))
    return {"version": VERSION, "config": plain(config), "defaults": plain(preset)}


def stored(content: Any, path: object) -> Config:
    """The settings in the file `path` of a run, whose `content` holds `settings_of` it, maybe of another version.

    What the file does not know has its default. Raises InputError for a file of a newer version and for a setting that
    is gone and was used, and AttributeError, KeyError, TypeError or ValueError for what are no settings.
    """
    if (version := content.get("version", VERSION)) > VERSION:
        got = f"version {version}: update qdeploy, or train anew with another --out"
        raise InputError(f"expected a run of version {VERSION} or older, got {got} - at {path}")
    known, defaults = {setting.name for setting in fields(Config)}, content.get("defaults", {})
    kept: dict[str, Any] = {}
    for key, value in content["config"].items():
        if key in known:
            kept[key] = value
        elif key not in defaults or defaults[key] != value:
            got = f"{key}={value!r}, which this one has not: train anew with another --out"
            raise InputError(f"expected the settings of this version, got {got} - at {path}")
    try:
        return resolve(Config(**kept))
    except InputError as error:
        raise ValueError(str(error)) from error  # it names an option, not the file


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which a stored run differs from `new`: the value of either; of an axis with the same class on it
    the options, as `axis.option`."""
    found: dict[str, tuple[Any, Any]] = {}
    for setting in fields(Config):
        was, now = getattr(old, setting.name), getattr(new, setting.name)
        if was == now:
            continue
        if isinstance(was, Choice) and isinstance(now, Choice):
            if was.name != now.name:
                found[setting.name] = was.name, now.name
                continue
            for option in {**was.options, **now.options}:
                pair = was.options.get(option), now.options.get(option)
                if pair[0] != pair[1]:
                    found[f"{setting.name}.{option}"] = pair
        else:
            found[setting.name] = was, now
    return found


def first_difference(old: Config, new: Config, allowed: Collection[str]) -> str | None:
    """The first setting beyond the `allowed` ones in which a stored run differs from `new`, in words, or None."""
    for key, (was, now) in differences(old, new).items():
        other_kind = key == "data" and {was, now} & {*NAMED}  # not the same folder elsewhere
        if key not in allowed or other_kind:
            return f"{key}={was!r}, got {key}={now!r}"
    return None
