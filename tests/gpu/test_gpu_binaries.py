"""What the compiled GPU kernels must have: found in their binaries, on a machine without a GPU."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import gpu_binaries
import pytest

import qdeploy.kernels

# Only looked for: Triton imported before its interpreter is on would break the tests that use it.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the kernels for GPUs need Triton")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return gpu_binaries.measure()


def violations(rows: list[dict], wrong) -> list[str]:
    return [f"{row['kernel']} of {row['variant']} on sm_{row['target']}: {wrong(row)}" for row in rows if wrong(row)]


def test_nothing_spills(rows):
    """Values that do not fit in registers go to the stack."""
    assert violations(rows, lambda row: row["stack"] and f"{row['stack']} bytes of stack") == []


def test_arithmetic_is_ieee(rows):
    """No approximate division or function, no subnormal number taken for 0, no contraction of * and + to fma."""
    assert violations(rows, lambda row: row["inexact"]) == []


def test_instructions_are_the_wide_ones(rows):
    """Loads, copies and stores of 16 bytes where the shape allows them, and tensor cores for products of bytes."""
    assert violations(rows, lambda row: [name for name in row["required"] if row[name] == 0]) == []
    assert {name for row in rows for name in row["required"]} == {"loads16", "stores16", "copies16", "tensor_cores"}


def test_every_kernel_has_a_variant(rows):
    sources = [path.read_text() for path in Path(qdeploy.kernels.__file__).parent.glob("triton_*.py")]
    launched = {name for source in sources for name in re.findall(r"^ +(\w+)\[.+\]\(", source, re.MULTILINE)}
    assert launched and launched == {row["kernel"] for row in rows}


def test_counting_is_ordered(rows):
    """A program that counts itself has a barrier before and after: kernels/triton_lsq_many.py says what for."""
    assert violations(rows, lambda row: row["unordered"]) == []
