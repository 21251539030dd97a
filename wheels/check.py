"""Runs the demo from each wheel in dist/ where nothing but numpy is installed: `python wheels/check.py python3.11 ...`.

The wheels for this machine run on the interpreter of their version. One of those for aarch64 runs in qemu-user, on the
Python of the Debian release that this machine has: its packages are unpacked below build/wheels, not installed.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEBIAN = ROOT / "build/wheels/debian-arm64"
APT = ROOT / "build/wheels/apt"  # its packages as downloaded
INSTRUCTION_SETS = {  # by CPU flag
    **{"avx2": "avx2", "avx512_vnni": "avx512vnni", "amx_int8": "amx"},
    **{"asimd": "neon", "asimddp": "neondot"},
}
DEMO = """
import json, sys
from qdeploy import _engine, cli
print(json.dumps(_engine.isas()), flush=True)
sys.exit(cli.main(["demo", "--json"]))
"""


def main(pythons: list[str]) -> None:
    for python in pythons:
        check_here(python)
    if platform.machine() != "aarch64":
        check_in_qemu()


def wheel_for(tag: str, machine: str) -> Path:
    found = list((ROOT / "dist").glob(f"*-cp{tag}-*_{machine}.whl"))
    if len(found) != 1:
        sys.exit(f"expected one wheel for cp{tag} on {machine}, got {len(found)} - at {ROOT / 'dist'}")
    return found[0]


def check_here(python: str) -> None:
    code = "import sys; print(*sys.version_info[:2], sep='')"
    tag = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    wheel = wheel_for(tag, platform.machine())
    with tempfile.TemporaryDirectory() as folder:
        inside = f"{folder}/bin/python"
        subprocess.run([python, "-m", "venv", folder], check=True)
        subprocess.run([inside, "-m", "pip", "install", "-q", "numpy"], check=True)
        begin = time.monotonic()
        subprocess.run([inside, "-m", "pip", "install", "-q", wheel], check=True)
        seconds = time.monotonic() - begin
        demo = subprocess.run([inside, "-c", DEMO], cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
    isas = check_demo(demo, wheel)
    flags = Path("/proc/cpuinfo").read_text().split()
    missing = [isa for flag, isa in INSTRUCTION_SETS.items() if flag in flags and isa not in isas]
    if missing:
        sys.exit(f"expected {', '.join(missing)} on this CPU, got {', '.join(isas)} - at {wheel}")
    print(f"{wheel.name}: installed in {seconds:.1f} s, demo equal, {', '.join(isas)}")


def check_demo(output: str, wheel: Path) -> list[str]:
    isas, _, report = output.partition("\n")
    if not json.loads(report)["equal"]:
        sys.exit(f"expected the demo's bits, got others - at {wheel}")
    return json.loads(isas)


def check_in_qemu() -> None:
    qemu = shutil.which("qemu-aarch64")
    if not qemu:
        sys.exit("expected qemu-aarch64, got none - at PATH (apt-get install qemu-user)")
    python = unpacked_python()
    tag = python.name.removeprefix("python").replace(".", "")
    wheel = wheel_for(tag, "aarch64")
    with tempfile.TemporaryDirectory() as site:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--target", site, "--only-binary", ":all:"]
        pip += ["--python-version", tag, "--platform", "manylinux_2_28_aarch64", "--platform", "manylinux_2_17_aarch64"]
        subprocess.run([*pip, wheel], check=True)
        command = [qemu, "-cpu", "max", "-L", DEBIAN, python, "-c", DEMO]
        env = {"PYTHONPATH": site, "PYTHONHOME": f"{DEBIAN}/usr"}
        demo = subprocess.run(command, cwd=site, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    isas = check_demo(demo, wheel)
    if isas != ["scalar", "neon", "neondot"]:
        sys.exit(f"expected scalar, neon, neondot, got {', '.join(isas)} - at {wheel}")
    print(f"{wheel.name}: demo equal in qemu, {', '.join(isas)}")


def unpacked_python() -> Path:
    """The interpreter of Debian's python3 for arm64 with all that it needs, below DEBIAN."""
    if not DEBIAN.exists():
        apt_get = ["apt-get", "-qq", *apt_settings()]
        subprocess.run([*apt_get, "update"], check=True)
        install = ["install", "-y", "--download-only", "--no-install-recommends"]
        subprocess.run([*apt_get, *install, "python3", "libstdc++6"], check=True)  # numpy has no C++ library inside
        for package in (APT / "archives").glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, DEBIAN], check=True)
    return (DEBIAN / "usr/bin/python3").resolve()


def apt_settings() -> list[str]:
    """For a machine of its own below APT, arm64 alone and without any package, with the sources of this one."""
    for folder in ("lists/partial", "archives/partial"):
        (APT / folder).mkdir(parents=True, exist_ok=True)
    (APT / "status").touch()
    settings = {"APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::Cache": APT}
    settings |= {"Dir::State::lists": APT / "lists", "Dir::State::status": APT / "status"}
    return [f"-o{name}={value}" for name, value in settings.items()]


if __name__ == "__main__":
    main(sys.argv[1:])
