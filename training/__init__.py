"""Quantization-aware training and domain generalization. Needs the `train` extra: torch, lightning-fabric, rich."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attached_quantizers import project_steps_, quantizers, step_group
    from .equalize import equalize_
    from .models import MODELS
    from .quantize import quantize_, summary
    from .quantize_like import quantize_like_

_HOMES = {
    "MODELS": "models",
    "equalize_": "equalize",
    "project_steps_": "attached_quantizers",
    "quantize_": "quantize",
    "quantize_like_": "quantize_like",
    "quantizers": "attached_quantizers",
    "step_group": "attached_quantizers",
    "summary": "quantize",
}
__all__ = [
    "MODELS",
    "equalize_",
    "project_steps_",
    "quantize_",
    "quantize_like_",
    "quantizers",
    "step_group",
    "summary",
]


def __getattr__(name: str) -> Any:
    # On first use, so that the command line can print its help without loading torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
