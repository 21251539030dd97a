"""`qdeploy sweep`: the runs of a file, several at once, and what is made of them."""

from __future__ import annotations

import argparse
import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy import _engine
from qdeploy.arguments import integer
from qdeploy.errors import InputError
from qdeploy.terminal import note, write

if TYPE_CHECKING:
    from qdeploy.training.sweep_ray import RayTasks
    from qdeploy.training.sweep_workers import Workers

ENGINES = ("local", "ray")
MAX_JOBS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the sweep, in YAML")
    text = "folder of the sweep (default: runs/ and the name of FILE); the same command continues it"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    text = "runs at once, among which the cores are divided (default: 1, with ray one for each CPU)"
    parser.add_argument("--jobs", type=int, metavar="N", help=text)
    parser.add_argument("--engine", choices=ENGINES, default="local", help="who runs them (default: local)")
    parser.add_argument("--address", metavar="HOST:PORT", help="of the head of Ray, with --engine ray")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Makes what is left of the sweep, and says how each job ended.

    Returns {"out", "done": so many, "failed": [{"name", "error"}], "left_out": [{"name", "error"}]}. Raises InputError
    before anything starts for a file or settings that are wrong, and for a full disk; after SIGINT or SIGTERM it exits
    with 128 + the signal's number, and the same command continues the sweep.
    """
    from qdeploy.training.run_files import alone
    from qdeploy.training.sweep_board import board_of
    from qdeploy.training.sweep_file import read_sweep
    from qdeploy.training.sweep_plan import plan
    from qdeploy.training.sweep_ray import RayTasks
    from qdeploy.training.sweep_schedule import SweepSchedule

    out = Path(os.path.abspath(args.out or Path("runs", args.file.stem)))  # the same for every process
    sweep = read_sweep(args.file)
    with closing(_engine_of(args)) as engine:
        jobs = plan(sweep, out, engine.threads)
        with alone(out):
            if isinstance(engine, RayTasks):
                engine.check(out, jobs)
            schedule = SweepSchedule(out, [row.name for row in sweep.rows], jobs)
            done, at_once = len(schedule.of("done")), f"{engine.slots} at once with {engine.threads} thread(s) each"
            note(f"{len(jobs)} jobs, {done} of them done; {at_once} - in {out}")
            with board_of(schedule, engine.slots) as board:
                schedule.run(engine, board.changed, board.tick)
    return {
        "out": str(out),
        "done": len(schedule.of("done")),
        "failed": [{"name": entry.job.name, "error": entry.error} for entry in schedule.of("failed")],
        "left_out": [{"name": entry.job.name, "error": entry.error} for entry in schedule.of("left out")],
    }


def _engine_of(args: argparse.Namespace) -> Workers | RayTasks:
    from qdeploy.training import sweep_workers
    from qdeploy.training.sweep_ray import RayTasks

    slots = None if args.jobs is None else integer(args.jobs, 1, MAX_JOBS, "--jobs")
    if args.engine == "ray":
        return RayTasks(args.address, slots)
    if args.address is not None:
        raise InputError(f"expected --engine ray, got {args.engine} - at --address {args.address}")
    return sweep_workers.Workers(slots or 1, max(1, cores() // (slots or 1)))


def cores() -> int:
    return max(1, int(min(len(os.sched_getaffinity(0)), _engine.cpu_quota())))


def show(report: dict[str, Any]) -> None:
    """Prints the report of `main`; what failed comes last."""
    write(f"{report['out']}: {report['done']} jobs done")
    for entry in report["left_out"]:
        write(f"{entry['name']}: {entry['error']}")
    for entry in report["failed"]:
        write(f"{entry['name']} failed: {entry['error']}")
