"""Quantization-aware training and domain generalization. Needs the `train` extra: torch, lightning-fabric, rich."""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "quantize_": "quantize",
    "quantizers": "quantize",
    "step_group": "quantize",
    "project_steps_": "quantize",
    "summary": "quantize",
    "MODELS": "models",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    # On first use, so that the command line can print its help without loading torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
