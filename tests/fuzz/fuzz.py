"""Changed model files by the thousand: `python tests/fuzz/fuzz.py --seed 7 --count 100000`, see README.md.

The inputs of a seed are numbered; each is the same whatever was run before it. They run in a child process, so that a
crash, a hang and a lack of memory are failures that name their input.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]

import draft
import seeds
from forms import FORMS, conv_form
from keys import KEYS
from mutations import BYTES, MODEL, TREE
from oracle import check

from qdeploy import _engine, terminal

ROUND = 500  # inputs that share their seeds: a few draws of hypothesis for all of them
RANDOM_GRAPHS = 24  # of a round
HANG_SECONDS = 120  # the slowest input takes one or two
FAILURES = seeds.ROOT / "build" / "failures"


# ---- An input --------------------------------------------------------------------------------------------------------


def changed(content: bytes, rng: random.Random) -> tuple[bytes, list[str]]:
    """The content of a file after 1 to 4 mutations, those of the model first, and their names."""
    count = rng.choice([1, 1, 1, 2, 2, 3, 4])
    of_model = rng.random() < 0.5  # all of them: half of these files are models
    levels = [0 if of_model else rng.choice([0, 1, 1, 2]) for _ in range(count)]
    file = draft.read(content)
    names = [mutated(file, [MODEL + KEYS, TREE][level], rng) for level in sorted(levels) if level < 2]
    content = file.to_bytes()
    for _ in range(levels.count(2)):
        mutation = rng.choice(BYTES)
        content = mutation(content, rng)
        names.append(mutation.__name__)
    return content, names


def mutated(file: draft.Draft, mutations: list, rng: random.Random) -> str:
    """Applies one of them that finds something to change; returns its name."""
    while True:
        mutation = rng.choice(mutations)
        if mutation(file, rng):
            return mutation.__name__


def inputs(seed: int, begin: int, end: int) -> Iterator[tuple[int, bytes, list[str], random.Random]]:
    """Number, content, names of the mutations, and the generator for what else is chosen."""
    contents: list[bytes] = []
    for i in range(begin, end):
        if i % ROUND == 0 or not contents:
            contents = seeds.contents(seed * 1_000_003 + i // ROUND, RANDOM_GRAPHS)
        rng = random.Random(f"{seed} {i}")
        yield i, *changed(rng.choice(contents), rng), rng


# ---- The child -------------------------------------------------------------------------------------------------------


def run_inputs(seed: int, begin: int, end: int, folder: Path) -> None:
    """Prints a line for each: its number, "accepted" or "refused", its mutations. The one of the moment is on disk."""
    warnings.simplefilter("error")
    faulthandler.enable()
    isas = [os.environ["QDEPLOY_ISA"]] if os.environ.get("QDEPLOY_ISA") else _engine.isas()
    path = folder / "input.safetensors"
    for i, content, names, rng in inputs(seed, begin, end):
        path.unlink(missing_ok=True)  # as a new file: ext4 writes out to the disk what was truncated, 3 ms a time
        path.write_bytes(content)
        (folder / "input.txt").write_text(f"{i}: {', '.join(names)}")
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        isa, threads = rng.choice(isas), rng.choice([1, 1, 3])
        with conv_form(rng.choice(["", *FORMS])):  # the scalar Winograd kernels run only where they are asked for
            said = check(path, isa, threads)
        faulthandler.cancel_dump_traceback_later()
        print(i, "refused" if said else "accepted", ", ".join(names), flush=True)


# ---- The parent ------------------------------------------------------------------------------------------------------


class Failure(AssertionError):
    """An input failed; the text holds its number, its mutations and what the child said."""


def child(seed: int, begin: int, end: int, folder: Path) -> list[str]:
    """The command that runs these inputs."""
    return [sys.executable, "-u", __file__, "--seed", str(seed), "--child", str(begin), str(end), str(folder)]


def watch(command: list[str], folder: Path, advance: Callable[[str], bool]) -> None:
    """Runs a child and calls `advance` with each of its lines, until that returns False. Raises Failure."""
    with (folder / "errors.txt").open("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout
            for line in process.stdout:
                if not advance(line):
                    process.kill()
                    return
        if process.returncode:
            errors.seek(0)
            name = (folder / "input.txt").read_text()
            raise Failure(f"input {name}\nexit code {process.returncode}\n{errors.read()[-5000:]}")


def kept(folder: Path, failures: Path, seed: int) -> tuple[int, Path]:
    """The number of the input that failed, and where it stays."""
    failures.mkdir(parents=True, exist_ok=True)
    number = int((folder / "input.txt").read_text().partition(":")[0])
    return number, shutil.copy(folder / "input.safetensors", failures / f"{seed}_{number}.safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begin", type=int, default=0, help="number of the first input")
    parser.add_argument("--count", type=int, default=10_000, help="of inputs (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="instead of a count")
    parser.add_argument("--keep-going", action="store_true", help="after a failure, with the next input")
    parser.add_argument("--failures", type=Path, default=FAILURES, help="folder for the inputs that fail")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_inputs(options.seed, int(options.child[0]), int(options.child[1]), Path(options.child[2]))
        return 0
    began, done, accepted, failed = time.monotonic(), 0, 0, 0
    begin, end = options.begin, options.begin + (10**9 if options.minutes else options.count)

    def advance(line: str) -> bool:
        nonlocal done, accepted
        done, accepted = done + 1, accepted + (line.split()[1] == "accepted")
        seconds = time.monotonic() - began
        terminal.status(f"{done} inputs, {accepted / done:.1%} accepted, {failed} failed, {done / seconds:.0f}/s")
        return not options.minutes or seconds < 60 * options.minutes

    with tempfile.TemporaryDirectory() as name:
        while begin < end:
            try:
                watch(child(options.seed, begin, end, Path(name)), Path(name), advance)
                break
            except Failure as failure:
                failed += 1
                number, path = kept(Path(name), options.failures, options.seed)
                begin = number + 1 if options.keep_going else end
                terminal.status()
                print(f"seed {options.seed}, {failure}\nleft at {path}\n", flush=True)
    terminal.status()
    seconds = time.monotonic() - began
    print(f"{done + failed} inputs in {seconds:.0f} s, {accepted / max(1, done):.1%} accepted, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
