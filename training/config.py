"""The settings of a training run. Imports nothing heavy, so that the command line can show them at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from qdeploy.errors import InputError


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


_SCOPES = ("all", "no_s", "bn_head")


@dataclass(frozen=True)
class Config:
    """Everything that determines a run.

    A None whose type does not say so stands there only until `resolve` has put in the preset of the data.
    """

    data: str = _option("digits-dg", "digits-dg, debug (random images), or a folder root/domain/class/image")
    test_domain: str = _option(None, "the domain held out of training (required)")
    domains: str | None = _option(None, "use only these domains, separated by commas")
    algorithm: str = _option("qt-dog", "training algorithm", ("erm", "qt-dog"))
    model: str = _option(None, "network: a name in qdeploy.training.MODELS")
    weights: str | None = _option(None, "pretrained weights to start from: a state dict, .pth or .safetensors")
    image_size: int = _option(224, "height and width for images of a folder")
    bits: int = _option(7, "bits of the weights, 2 to 8")
    activation_bits: int | None = _option(None, "bits of the layers' inputs during training, 2 to 8")
    per_tensor: bool = _option(False, "one step size for a weight instead of one for each output channel")
    init: str = _option("lsq", "the first step sizes", ("lsq", "mse", "minmax"))
    grad_scale: str = _option("tensor", "the elements counted in the gradient scale", ("tensor", "channel", "none"))
    qat_scope: str = _option(
        "all", "trains after the switch: all, no step sizes, or BatchNorm and classifier alone", _SCOPES
    )
    reset_optimizer: bool = _option(False, "forget the optimizer's moments at the switch")
    updates: int = _option(None, "changes of all weights in training")
    quantize_at: int = _option(None, "the update at whose start the network is quantized")
    eval_every: int = _option(None, "updates between evaluations")
    batch_size: int = _option(32, "images from each source domain in an update")
    lr: float = _option(None, "Adam's learning rate")
    lr_step_size: float = _option(1e-5, "Adam's learning rate of the step sizes")
    seed: int = _option(0, "seed of the weights, the minibatches and the augmentation")
    split_seed: int = _option(0, "seed of the split of each domain into training and validation images")
    accelerator: str = _option("auto", "cpu, cuda, mps or auto")
    devices: int = _option(1, "number of devices; more than one trains data-parallel")
    precision: str = _option("32-true", "arithmetic of the network", ("32-true", "bf16-mixed"))


# Small networks from scratch (Digits-DG), and fine-tuning as DomainBed and SWAD do it.
_FROM_SCRATCH: dict[str, Any] = dict(model="nin", lr=1e-3, updates=2001, quantize_at=800, eval_every=100)
_FINE_TUNING: dict[str, Any] = dict(model="resnet50", lr=5e-5, updates=5001, quantize_at=2000, eval_every=300)


def resolve(config: Config) -> Config:
    """Fills in the preset of the data and checks the settings; raises InputError."""
    preset = _FROM_SCRATCH if config.data in ("digits-dg", "debug") else _FINE_TUNING
    config = replace(config, **{key: value for key, value in preset.items() if getattr(config, key) is None})
    if config.test_domain is None:
        raise InputError("expected the domain to hold out, got none - at --test-domain")
    for key in ("updates", "eval_every", "batch_size", "image_size", "devices"):
        if getattr(config, key) < 1:
            raise InputError(f"expected at least 1, got {getattr(config, key)} - at --{key.replace('_', '-')}")
    for key in ("bits", "activation_bits"):
        bits = getattr(config, key)
        if bits is not None and not 2 <= bits <= 8:
            raise InputError(f"expected 2 to 8 bits, got {bits} - at --{key.replace('_', '-')}")
    if config.algorithm == "qt-dog":
        # The record that is selected comes from an evaluation at or after that update.
        last = (config.updates - 1) // config.eval_every * config.eval_every
        if not 0 <= config.quantize_at <= last:
            expected = f"a switch in 0 .. {last} (the last evaluation)"
            raise InputError(f"expected {expected}, got {config.quantize_at} - at --quantize-at")
    for key in ("seed", "split_seed"):
        if getattr(config, key) < 0:
            raise InputError(f"expected 0 or more, got {getattr(config, key)} - at --{key.replace('_', '-')}")
    return config


def difference(old: dict, new: Config) -> str | None:
    """The first setting in which a stored run differs from `new`, in words, or None."""
    for key, value in asdict(new).items():
        if old.get(key) != value:
            return f"{key}={old.get(key)!r}, got {key}={value!r}"
    return None
