"""What all tests share."""

from __future__ import annotations

import pytest

from qdeploy import _engine


@pytest.fixture(autouse=True, scope="session")
def threads_for_small_networks():
    """Small networks run on as many threads as a test asks for, so that it sees how work is split."""
    default = _engine.Session.macs_per_thread
    _engine.Session.macs_per_thread = 1
    yield
    _engine.Session.macs_per_thread = default
