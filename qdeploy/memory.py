"""What does not fit the memory that this process may use is refused before it is asked for."""

from __future__ import annotations

from qdeploy import _engine
from qdeploy.errors import InputError


def check_memory(needed: int, what: str, at: str) -> None:
    """Raise InputError where `what` needs more bytes than this process may use."""
    memory = _engine.memory_limit()
    if needed > memory:
        raise InputError(f"expected what fits {memory:,} bytes of memory, got {what}: {needed:,} bytes - at {at}")
