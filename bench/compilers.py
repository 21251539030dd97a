"""What another compiler makes of the kernels: the engine of one Python environment beside that of another.

    python bench/compilers.py PYTHON PYTHON [--isa avx2 avx512vnni] [--networks resnet50 mobilenet_v2] [--rounds 100]

Both interpreters have qdeploy and numpy, this one what `bench/` needs. Each engine has a process of its own; they take
turns on one core, one image a turn, and the other waits. Prints the median time of the second over that of the first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from networks import Networks

from qdeploy.terminal import columns, progress

WORKER = """
import sys, time
import numpy as np
import qdeploy
model = qdeploy.load_int_model(sys.argv[1], num_threads=1, isa=sys.argv[2])
x = np.random.default_rng(0).standard_normal((1, *model.inputs[0]["shape"]), dtype=np.float32)
model(x)
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter_ns()
    model(x)
    print(time.perf_counter_ns() - start, flush=True)
"""


class Engine:
    """One that waits for its turn."""

    def __init__(self, python: str, path: Path, isa: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # Not from this folder: it would find the checkout before what is installed.
        try:
            self._process = subprocess.Popen([python, "-c", WORKER, path, isa], cwd=path.parent, text=True, **pipes)
        except OSError as error:
            sys.exit(f"expected a Python with qdeploy, got: {error.strerror} - at {python}")
        self._line()

    def nanoseconds(self) -> int:
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return int(self._line())

    def close(self) -> None:
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            sys.exit(f"expected a time, got exit code {self._process.wait()} - at {self._process.args[0]}")
        return line


def ratio(pythons: list[str], path: Path, isa: str, rounds: int) -> str:
    engines = [Engine(python, path, isa) for python in pythons]
    times = [[engine.nanoseconds() for engine in engines] for _ in range(rounds)]
    for engine in engines:
        engine.close()
    first, second = (median(column) for column in zip(*times, strict=True))
    return f"{second / first:.3f} ({first / 1e6:.2f} ms)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs=2, metavar="PYTHON")
    parser.add_argument("--isa", nargs="+", default=["avx2", "avxvnni", "avx512", "avx512vnni"])
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50", "mobilenet_v2", "nin"])
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, progress("timing", len(args.networks) * len(args.isa)) as advance:
        networks = Networks(Path(folder))
        for name in args.networks:
            row = {"network": name}
            for isa in args.isa:
                row[isa] = ratio(args.pythons, networks.exported(name), isa, args.rounds)
                advance()
            rows.append(row)
    print(columns(rows))


if __name__ == "__main__":
    main()
