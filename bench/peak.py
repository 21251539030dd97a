"""The hardware limit: multiply-accumulates a second of the instructions themselves, measured by peak.cc on one core."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

FLOAT32_LOOP = {
    "avx2": "float32_avx2",
    "avxvnni": "float32_avx2",
    "avx512": "float32_avx512",
    "avx512vnni": "float32_avx512",
}


@cache
def _library() -> ctypes.CDLL | None:
    """peak.cc compiled; None on another architecture or without a compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peak.so"
        source = Path(__file__).with_name("peak.cc")
        subprocess.run([compiler, "-O2", "-std=c++17", "-shared", "-fPIC", source, "-o", target], check=True)
        return ctypes.CDLL(str(target))


def peak_gmacs(isa: str, precision: str, seconds: float = 0.05) -> float | None:
    """1e9 multiply-accumulates a second of one core in "int8" (7-bit weights) or "float32"; None where unknown."""
    library = _library()
    name = FLOAT32_LOOP.get(isa) if precision == "float32" else f"int8_{isa}"
    if library is None or isa == "scalar" or name is None:
        return None
    function = getattr(library, name)
    function.argtypes, function.restype = [ctypes.c_double], ctypes.c_double
    return function(seconds)
