"""The errors that qdeploy raises on purpose. The command line prints any of them as one line and exits with 2.

The text always says what was expected, what was found and where: "expected X, got Y - at Z".
"""

from __future__ import annotations


class QdeployError(ValueError):
    """Base of the errors below; catch this one to catch them all."""


class ModelError(QdeployError):
    """A model file that is missing, damaged, hostile, of a newer version, or beyond what the engine can run."""


class InputError(QdeployError):
    """Images, calibration data or an option that do not fit the model or the machine."""


class ExportError(QdeployError):
    """A network that cannot be exported as exact int8; names the module."""


def one_line(error: Exception) -> str:
    """The first line of what an error says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
