"""Exact int8 inference of networks trained with learned step sizes: the same bits everywhere. Needs numpy only."""

from typing import TYPE_CHECKING, Any

from .errors import ExportError, InputError, ModelError, QdeployError
from .model import Model, load_int_model

if TYPE_CHECKING:
    from .exporter import check, export, export_ensemble
    from .onnx import to_onnx

__version__ = "0.1.0"
__all__ = [
    "ExportError",
    "InputError",
    "Model",
    "ModelError",
    "QdeployError",
    "check",
    "export",
    "export_ensemble",
    "load_int_model",
    "to_onnx",
]


def __getattr__(name: str) -> Any:
    if name in ("check", "export", "export_ensemble"):  # of no use to a model that runs
        from . import exporter  # not named export.py: importing a submodule would put the module where the function is

        return getattr(exporter, name)
    if name == "to_onnx":
        from .onnx import to_onnx

        return to_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
