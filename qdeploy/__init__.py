"""Exact int8 inference for networks trained with learned step sizes: the same bits on every machine. Needs numpy only."""

from .errors import ExportError, InputError, ModelError, QdeployError
from .model import Model, load_int_model

__version__ = "0.1.0"
__all__ = [
    "ExportError",
    "InputError",
    "Model",
    "ModelError",
    "QdeployError",
    "export",
    "export_ensemble",
    "load_int_model",
]


def __getattr__(name: str):
    if name in ("export", "export_ensemble"):  # these need torch, which `import qdeploy` must not
        from . import export as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
