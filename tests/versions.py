"""The engine, ONNX and GPU programs read less than the newest format version: what tests know of that.

Where the two are the same again this file, and what uses it, is not needed any more.
"""

from __future__ import annotations

import re

from qdeploy import format

NEWEST = max(format.RELEASES)
ENGINE = 2
NEW_OP = re.compile(rf"expected format version {NEWEST} for the op (`\w+`), got [1-{ENGINE}] -")


def as_the_engine(said: str) -> str:
    """What qdeploy.format says, in the engine's words."""
    said = NEW_OP.sub(r"expected an op that this engine has, got \1 -", said)
    return said.replace(f"expected format_version 1 to {NEWEST}, got ", f"expected format_version 1 to {ENGINE}, got ")


def too_new(engine_said: str) -> bool:
    """Whether the engine refuses a file for a version that qdeploy.format reads."""
    return any(
        engine_said.startswith(f"expected format_version 1 to {ENGINE}, got {version}, which needs ")
        for version in range(ENGINE + 1, NEWEST + 1)
    )
