"""What the benchmarks share, and the tables at the end of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before torch is imported: its OpenMP threads would spin on the cores of whoever has the next turn.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from float_networks import FloatNetworks
from networks import Networks
from results import Results

from qdeploy import cli

RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, metavar="FILE", help="write all that was measured as JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("results")
    if path is not None and not path.parent.is_dir():  # now, not after ten minutes
        raise pytest.UsageError(f"expected a file in a folder that exists, got {path} - at --results")
    config.stash[RESULTS] = Results()
    # After Ctrl-C pytest-benchmark warns of the test that was cut short, and warnings are errors here.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results, path = config.stash[RESULTS], config.getoption("results")
    if not (results.reports or results.figures):
        return
    for section in [*results.sections(), results.summary()]:
        terminalreporter.write_line("\n" + section)
    if path is not None:
        results.save(path, cli.doctor())
        terminalreporter.write_line(f"\nwritten to {path}")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    return request.config.stash[RESULTS]


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    pytest.importorskip("torch", reason="exporting a network needs PyTorch: pip install 'qdeploy[train]'")
    return Networks(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def float_networks(tmp_path_factory: pytest.TempPathFactory) -> FloatNetworks:
    for package in ("torch", "transformers", "onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} builds them: pip install 'qdeploy[train,models,bench]'")
    return FloatNetworks(tmp_path_factory.mktemp("float_networks"))


@pytest.fixture(scope="session")
def only_avx2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that hides instructions beyond AVX2 from all runtimes of a process."""
    library = tmp_path_factory.mktemp("only_avx2") / "only_avx2.so"
    source = Path(__file__).with_name("only_avx2.c")
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
    except FileNotFoundError:
        pytest.skip("no C compiler here")
    if subprocess.run(["true"], env=os.environ | {"LD_PRELOAD": str(library)}).returncode != 0:
        pytest.skip("this CPU cannot hide its instructions (CPUID does not fault)")
    return library


@pytest.fixture
def rounds(benchmark) -> Callable[[int], int]:
    """As many rounds as asked for; one with --benchmark-disable."""
    return lambda wanted: 1 if benchmark.disabled else wanted


@pytest.fixture
def progress(request: pytest.FixtureRequest, capfd: pytest.CaptureFixture) -> Iterator[Callable[[str], None]]:
    """Shows on a terminal, after what pytest printed, how far this benchmark is."""

    def write(text: str) -> None:
        with capfd.disabled():
            if sys.stderr.isatty():
                print(text, end="", file=sys.stderr, flush=True)

    save, restore = "\x1b7", "\x1b8\x1b[K"  # the cursor
    write(save)
    yield lambda text: write(f"{restore} {request.node.name}: {text}")
    write(restore)
