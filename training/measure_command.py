"""`qdeploy measure`: what papers measure of a finished network, in files beside it."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.arguments import integer
from qdeploy.errors import InputError
from qdeploy.terminal import columns, write
from qdeploy.training.figures import check_matplotlib
from qdeploy.training.measures import MEASURES
from qdeploy.training.sweep_command import MAX_JOBS

if TYPE_CHECKING:
    import torch

SHOWN = 30  # rows of a table

Options = dict[str, dict[str, Any]]  # by measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "the folder of a finished run, OUT/seed0 of `qdeploy train`, or one with such in it, as of a sweep; several"
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help=text)
    names = "; ".join(f"{name}: {measure.text}" for name, measure in MEASURES.items())
    text = f"what to measure, with commas; {names}"
    parser.add_argument("--what", required=True, metavar="NAME,...", help=text)
    text = "at most so many images of each part, training, validation or target (default: 2000)"
    parser.add_argument("--subset", type=int, default=2000, metavar="N", help=text)
    parser.add_argument("--device", default="cpu", help="cpu (default), or cuda or cuda:N for a GPU")
    text = "an option of a measure, such as flatness.directions=20; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="NAME.OPTION=VALUE", help=text)
    text = "of several runs, so many at once, among which the cores are divided (default: 1)"
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=text)
    text = "also draw the figure of a paper that shows a measure: RUN/figures/FIGURE.png and .svg (needs matplotlib)"
    parser.add_argument("--figures", action="store_true", help=text)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Writes RUN/measures/NAME.json and NAME.csv of each measure, but of those that are there with the same settings;
    the same command goes on after Ctrl-C, from the last finished draw, to the same bits.

    Returns what `measure_run` does, or of several runs what `measure_runs` does. Raises InputError for an unknown
    measure or option, for a run that is not finished, and for files of a newer version, before anything is measured.
    """
    from qdeploy.training.finished_runs import runs_in
    from qdeploy.training.measure_run import Asked, measure_run
    from qdeploy.training.measure_runs import measure_runs

    names = _names(args.what)
    if args.figures:
        check_matplotlib("--figures")
    subset = integer(args.subset, 1, 2**31 - 1, "--subset")
    jobs = integer(args.jobs, 1, MAX_JOBS, "--jobs")
    given = _given(args.set, names)
    options = {name: _options(name, given.get(name, {})) for name in names}
    asked = Asked(options, subset, _device(args.device), args.figures)
    runs = runs_in(args.folders)
    return measure_run(runs[0], asked) if runs == args.folders[:1] else measure_runs(runs, asked, jobs)


def _names(what: str) -> list[str]:
    names = what.split(",")
    for name in names:
        if name not in MEASURES:
            raise InputError(f"expected one of {', '.join(MEASURES)}, got {name!r} - at --what")
    return [*dict.fromkeys(names)]


def _given(words: Sequence[str], names: Sequence[str]) -> Options:
    """{measure: {option: text}} of --set."""
    found: Options = {}
    for word in words:
        key, _, value = word.partition("=")
        name, _, option = key.partition(".")
        if name not in names or not option or "=" not in word:
            raise InputError(f"expected NAME.OPTION=VALUE with a NAME of --what, got {word!r} - at --set")
        found.setdefault(name, {})[option.replace("-", "_")] = value
    return found


def _options(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """All options of a measure, with their defaults where none is given."""
    from qdeploy.training.choices import converted

    parameters = inspect.signature(MEASURES[name].of_run, eval_str=True).parameters
    known = {key: one for key, one in parameters.items() if one.kind is inspect.Parameter.KEYWORD_ONLY}
    for key in given:
        if key not in known:
            raise InputError(f"expected an option of {name}: {', '.join(known) or 'none'}, got {key!r} - at --set")
    return {
        key: converted(given[key], one.annotation, f"--set {name}.{key}") if key in given else one.default
        for key, one in known.items()
    }


def _device(text: str) -> torch.device:
    import torch

    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        got = str(error).splitlines()[0]
        raise InputError(f"expected a device of this machine, got {got} - at --device") from error
    return device


def show(report: dict[str, Any]) -> None:
    """Prints the tables of the report of `main`; of several runs what failed."""
    for name, content in report.get("measures", {}).items():
        write(f"{name}: {report['run']}/measures/{name}.json")
        table = [{key: _shown(value) for key, value in row.items()} for row in content["table"]]
        write(columns(table[:SHOWN]))
        if len(table) > SHOWN:
            write(f"... and {len(table) - SHOWN:,} more in {name}.csv")
    for path in report.get("figures", []):
        write(f"wrote {path}")
    if "runs" in report:
        write(f"{len(report['runs'])} runs measured")
    for entry in report.get("failed", []):
        write(f"{entry['name']} failed: {entry['error']}")


def _shown(value: Any) -> Any:
    return ("no", "yes")[value] if isinstance(value, bool) else value
