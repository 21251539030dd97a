"""What a run takes where a setting was not given: it depends on the data. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from qdeploy.training.text_files import holds_texts

DOMAIN_NET = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


class Preset(NamedTuple):
    """A name to print, and the settings."""

    name: str
    settings: dict[str, Any]


def _schedule(updates: int, quantize_at: int, eval_every: int) -> dict[str, int]:
    return {"updates": updates, "quantize_at": quantize_at, "eval_every": eval_every}


_SMALL: dict[str, Any] = {"model": "nin", "lr": 1e-3}  # from scratch
_FINE_TUNING: dict[str, Any] = {"model": "resnet50", "lr": 5e-5, "batch_size": 32}  # as DomainBed and SWAD do it
_DIGITS = Preset("Digits-DG", {**_SMALL, "batch_size": 32, **_schedule(2001, 800, 100)})
_SMALL_IMAGES = Preset("small images", {**_SMALL, "batch_size": 64, **_schedule(5001, 2000, 300)})
_FOLDER = Preset("a folder of images", {**_FINE_TUNING, **_schedule(5001, 2000, 300)})
# DistilBERT as WILDS trains it on Amazon's reviews, but for the number of updates.
_DISTIL_BERT: dict[str, Any] = {"model": "transformers:DistilBertForSequenceClassification", "lr": 1e-5}
_TEXTS = Preset(
    "texts",
    {**_DISTIL_BERT, "optimizer": "adamw", "weight_decay": 0.01, "batch_size": 8, **_schedule(5001, 2000, 300)},
)
_DOMAIN_NET = Preset("DomainNet", {**_FINE_TUNING, **_schedule(15001, 8000, 1000)})

# Data that is no folder.
NAMED = {
    "digits-dg": _DIGITS,
    "rotated-mnist": _SMALL_IMAGES,
    "colored-mnist": _SMALL_IMAGES,
    "fashion-mnist": _SMALL_IMAGES,
    "cifar10": _SMALL_IMAGES,
    "debug": _DIGITS,
}


def preset_of(data: str) -> Preset:
    """A folder is DomainNet when it has its six domains."""
    if data in NAMED:
        return NAMED[data]
    if holds_texts(Path(data)):
        return _TEXTS
    is_domain_net = all(Path(data, domain).is_dir() for domain in DOMAIN_NET)
    return _DOMAIN_NET if is_domain_net else _FOLDER
