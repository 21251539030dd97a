"""What all pictures share: matplotlib's settings and formats, by which the same figure has the same bytes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "qdeploy",  # else ids are random
    "svg.fonttype": "path",  # the same letters whatever fonts a reader has
    "font.family": "DejaVu Sans",  # matplotlib brings it along
    "axes.spines.top": False,
    "axes.spines.right": False,
}
FORMATS: dict[str, dict[str, Any]] = {  # nothing that changes from one process to the next
    "png": {"dpi": 150, "metadata": {"Software": None}},
    "svg": {"metadata": {"Date": None, "Creator": None}},
}


def encoded(figure: Figure, kind: str) -> bytes:
    """The figure on white, as one of FORMATS."""
    whole = io.BytesIO()
    figure.savefig(whole, format=kind, facecolor="white", **FORMATS[kind])
    return whole.getvalue()
