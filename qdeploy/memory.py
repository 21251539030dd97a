"""What does not fit the memory of this machine is refused before it is asked for."""

from __future__ import annotations

import os

from qdeploy.errors import InputError


def check_memory(needed: int, what: str, at: str) -> None:
    """Raise InputError where `what` needs more bytes than this machine has."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise InputError(f"expected what fits {memory:,} bytes of memory, got {what}: {needed:,} bytes - at {at}")
