"""Builds the source distribution and, out of it, the wheels: `python wheels/build.py python3.10 python3.11`.

One wheel for each of these interpreters on each of MACHINES; they lie in dist/. zig compiles all of them here, against
glibc 2.17 and with a C++ library of its own inside, so that they run on every Linux since 2014. Its code for the
kernels is as fast as GCC 12's (docs/kernels.md). The interpreters give their headers; none runs what was built.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/wheels"
TOOLS = BUILD / "tools"  # the same for all interpreters: none of it is compiled for one
MACHINES = ("x86_64", "aarch64")
GLIBC = "2.17"
MAX_BYTES = 1_500_000


def main(pythons: list[str]) -> None:
    if not pythons:
        sys.exit("expected the interpreters to build for, got none - at the arguments of wheels/build.py")
    install_tools()
    for folder in ("egg-info", *MACHINES):  # or files that are gone since the last time would be packed
        shutil.rmtree(BUILD / folder, ignore_errors=True)
    sdist = build_sdist()
    for machine in MACHINES:
        source = unpacked(sdist, BUILD / machine)
        for python in pythons:
            tag = cache_tag(python)
            keep_objects(source, tag)
            build_wheel(python, source, machine, tag)
    for wheel in sorted((ROOT / "dist").glob("*.whl")):
        check(wheel)


def install_tools() -> None:
    if TOOLS.exists():
        return
    tools = ("setuptools", "pybind11", "cmake", "ninja", "nlohmann-json", "ziglang", "auditwheel")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", TOOLS, "-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, *tools], check=True)


def build_sdist() -> Path:
    egg_info = BUILD / "egg-info"  # not the tree's own, which lists files of long ago as well
    egg_info.mkdir()
    setup = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", egg_info, "sdist", "--dist-dir", "dist"]
    subprocess.run(setup, cwd=ROOT, env=environment(), check=True)
    return max((ROOT / "dist").glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)


def environment(**variables: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(TOOLS), **variables}


def unpacked(sdist: Path, folder: Path) -> Path:
    source = folder / sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return source


def cache_tag(python: str) -> str:
    """ "cpython-311": which headers, which name of the extension and which folder of setup.py."""
    code = "import sys; print(sys.implementation.cache_tag)"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def keep_objects(source: Path, tag: str) -> None:
    """Hand the build folder of the interpreter before on: all objects but two are the same. Only the cache of CMake
    knows the folder's name and the interpreter."""
    for folder in (source / "build").glob("cpython-*"):
        folder.rename(source / "build" / tag)
        (source / "build" / tag / "CMakeCache.txt").unlink()


def build_wheel(python: str, source: Path, machine: str, tag: str) -> None:
    suffix = f".{tag}-{machine}-linux-gnu.so"
    zig = {"ZIG": TOOLS / "ziglang/zig", "ZIG_TARGET": f"{machine}-linux-gnu.{GLIBC}"}
    options = ["--toolchain", ROOT / "wheels/zig.cmake", *(f"-D{name}={value}" for name, value in zig.items())]
    options.append(f"-DPYTHON_MODULE_EXTENSION={suffix}")
    env = environment(CMAKE_ARGS=shlex.join(map(str, options)), SETUPTOOLS_EXT_SUFFIX=suffix)
    platform = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
    bdist = ["bdist_wheel", "--plat-name", platform, "--dist-dir", ROOT / "dist"]
    subprocess.run([python, "setup.py", "-q", *bdist], cwd=source, env=env, check=True)


def check(wheel: Path) -> None:
    """The tag in the name is what auditwheel finds, and the wheel is small."""
    show = [sys.executable, "-m", "auditwheel", "show", wheel]
    found = subprocess.run(show, env=environment(), capture_output=True, text=True, check=True).stdout
    platform = wheel.stem.rpartition("-")[2]
    if f'"{platform}"' not in found:
        sys.exit(f"expected {platform}, got {' '.join(found.split())} - at {wheel}")
    if wheel.stat().st_size > MAX_BYTES:
        sys.exit(f"expected at most {MAX_BYTES} bytes, got {wheel.stat().st_size} - at {wheel}")
    print(f"{wheel.stat().st_size:9,} bytes  {wheel.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
