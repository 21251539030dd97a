"""The forms that convolutions can be asked to take: an option of the engine that only tests use."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qdeploy import _engine

WINOGRAD = ("winograd_4x4", "winograd_2x2")
FORMS = ("direct", *WINOGRAD)


@contextmanager
def conv_form(form: str) -> Iterator[None]:
    """Models that are loaded inside have this form wherever they can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "Session", functools.partial(_engine.Session, conv_form=form))
        yield
