"""Quantization-aware training and domain generalization. Needs the `train` extra: torch, lightning-fabric, rich."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models import MODELS
    from .quantize import project_steps_, quantize_, quantize_like_, quantizers, step_group, summary

__all__ = ["MODELS", "project_steps_", "quantize_", "quantize_like_", "quantizers", "step_group", "summary"]


def __getattr__(name: str) -> Any:
    # On first use, so that the command line can print its help without loading torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "models" if name == "MODELS" else "quantize"
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
