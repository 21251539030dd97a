"""The methods of the papers: one choice on each of four axes, objective, step, quantization and average.

A choice is a short class that knows nothing of the other axes, names its paper and equation, and has `state_dict` and
`load_state_dict`: a run goes on at any update as if it had never stopped. A name stands for the place of its class, and
a place may be given instead of a name: `--objective mypackage.mymodule:MyLoss`. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_HERE = "qdeploy.training.methods"

# What can stand on each axis of a run, by name. The network is an axis of its own, with its names in `models.MODELS`.
AXES: dict[str, dict[str, str]] = {
    "objective": {
        "erm": f"{_HERE}.objectives:ERM",
        "coral": f"{_HERE}.objectives:CORAL",
        "mixstyle": f"{_HERE}.objectives:MixStyle",
        "self-distillation": f"{_HERE}.objectives:SelfDistillation",
        "bins": f"{_HERE}.objectives:Bins",
        "clipood": f"{_HERE}.clipood:CLIPood",
    },
    "step": {
        "plain": f"{_HERE}.steps:Plain",
        "sam": f"{_HERE}.steps:SAM",
        "sagm": f"{_HERE}.steps:SAGM",
        "gaqat": f"{_HERE}.steps:GAQAT",
    },
    "quantization": {
        "none": f"{_HERE}.quantizations:NoQuantization",
        "lsq": f"{_HERE}.quantizations:LSQ",
        "inq": f"{_HERE}.inq:INQ",
        "uniform-noise": f"{_HERE}.quantizations:UniformNoise",
        "rtn": f"{_HERE}.quantizations:RTN",
        "obc": f"{_HERE}.quantizations:OBC",
    },
    "average": {
        "none": f"{_HERE}.averages:NoAverage",
        "sma": f"{_HERE}.averages:SMA",
        "swa": f"{_HERE}.averages:SWA",
        "swad": f"{_HERE}.averages:SWAD",
        "beta": f"{_HERE}.clipood:BetaAverage",
    },
    "optimizer": {
        "adam": "torch.optim:Adam",
        "adamw": "torch.optim:AdamW",
        "sgd": "torch.optim:SGD",
        "rmsprop": "torch.optim:RMSprop",
    },
    "schedule": {
        "constant": f"{_HERE}.schedules:Constant",
        "multi-step": f"{_HERE}.schedules:MultiStep",
        "cosine": f"{_HERE}.schedules:Cosine",
        "linear": f"{_HERE}.schedules:Linear",
    },
}

# What every class on an axis inherits from.
BASES = {
    "objective": f"{_HERE}.objectives:Objective",
    "step": f"{_HERE}.steps:Step",
    "quantization": f"{_HERE}.quantizations:Quantization",
    "average": f"{_HERE}.averages:Average",
    "optimizer": "torch.optim:Optimizer",
    "schedule": f"{_HERE}.schedules:Schedule",
}


@dataclass(frozen=True)
class Method:
    """A row: what stands on the axes, by name or with options {"name": ..., option: value}, and settings beside them.

    `note`: what a run of it needs or leaves out, in a few words.
    """

    source: str
    objective: str | Mapping[str, Any] = "erm"
    step: str | Mapping[str, Any] = "plain"
    quantization: str | Mapping[str, Any] = "none"
    average: str | Mapping[str, Any] = "none"
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


_LSQ_TENSOR = {"name": "lsq", "per_channel": False, "init": "mse"}
_LSQ_LAYER = {"name": "lsq", "per_channel": False}
_QT_DOG, _GAQAT = "QT-DoG (ICML 2025)", "GAQAT (arXiv 2412.05551)"
_OF_FLOAT_RUNS = "of finished float runs: --float-runs OUT of `--method erm`"
_ADAMW = {"optimizer": "adamw"}
_DEIT = {"model": "timm:deit_small_patch16_224", **_ADAMW}
_CLIP: dict[str, Any] = {
    **{"model": "timm:vit_base_patch16_clip_224", "normalization": "clip", "batch_size": 12},
    **{"optimizer": "adamw", "lr": 5e-6, "weight_decay": 0.1, "schedule": "cosine"},
}
_TEXT = "with --text-features"

METHODS: dict[str, Method] = {
    "erm": Method("Gulrajani and Lopez-Paz (ICLR 2021)"),
    "coral": Method("Sun and Saenko (arXiv 1607.01719)", objective="coral"),
    "mixstyle": Method("Zhou et al. (arXiv 2104.02008)", objective="mixstyle"),
    "sam": Method("Foret et al. (arXiv 2010.01412)", step="sam"),
    "sagm": Method("Wang et al. (arXiv 2303.10353)", step="sagm"),
    "sma": Method("Arpit et al. (arXiv 2110.10832)", average="sma", note="members of EoA"),
    "swa": Method("Izmailov et al. (arXiv 1803.05407)", average="swa"),
    "swad": Method("Cha et al. (arXiv 2102.08604)", average="swad"),
    "qt-dog": Method(_QT_DOG, quantization="lsq", note="members of EoQ"),
    "coral+qt-dog": Method(f"{_QT_DOG}, table 2", objective="coral", quantization="lsq"),
    "mixstyle+qt-dog": Method(f"{_QT_DOG}, table 2", objective="mixstyle", quantization="lsq"),
    "swad+qt-dog": Method(f"{_QT_DOG}, figure 3", quantization="lsq", average="swad"),
    "inq": Method(f"{_QT_DOG}, table 4; Zhou et al. (arXiv 1702.03044)", quantization="inq"),
    "inq-pow2": Method(
        "Zhou et al. (arXiv 1702.03044)", quantization={"name": "inq", "powers_of_two": True}, settings={"bits": 4}
    ),
    "uniform-noise": Method(f"{_QT_DOG}, table 15", quantization="uniform-noise", note="stays float"),
    "rtn": Method("round to nearest", quantization="rtn", note=_OF_FLOAT_RUNS),
    "obc": Method(
        f"{_QT_DOG}, table 4; Frantar and Alistarh (arXiv 2208.11580)", quantization="obc", note=_OF_FLOAT_RUNS
    ),
    "sd-vit": Method("Sultana et al. (arXiv 2207.12392)", objective="self-distillation", settings=_DEIT),
    "sd-vit+qt-dog": Method(f"{_QT_DOG}, table 5", objective="self-distillation", quantization="lsq", settings=_DEIT),
    "clip+qt-dog": Method(f"{_QT_DOG}, table 6", quantization="lsq", settings=_CLIP, note=_TEXT),
    "clipood": Method("Shu et al. (arXiv 2302.00864)", objective="clipood", average="beta", settings=_CLIP, note=_TEXT),
    "lsq": Method("QGen (arXiv 2404.11769), one step size a layer", quantization=_LSQ_LAYER),
    "vvtq": Method("QGen; Huang et al. (arXiv 2307.00331)", objective="bins", quantization=_LSQ_LAYER, settings=_ADAMW),
    "lsq-4/4": Method(f"{_GAQAT}, table 2", quantization=_LSQ_TENSOR, settings={"bits": 4, "activation_bits": 4}),
    "sagm-lsq": Method(
        f"{_GAQAT}, table 4", step="sagm", quantization=_LSQ_TENSOR, settings={"bits": 4, "activation_bits": 4}
    ),
    "gaqat": Method(_GAQAT, step="gaqat", quantization=_LSQ_TENSOR, settings={"bits": 4, "activation_bits": 4}),
}
