"""`qdeploy report`: tables of finished runs, as Markdown, CSV and a picture."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qdeploy.files import atomic_file, check_regular
from qdeploy.terminal import note, write

FILES = ("report.md", "report.csv", "report.png", "report.svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "folders with finished runs in them: those of `qdeploy train --out`, of sweeps, or folders of these"
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help=text)
    text = "tables of the papers, such as qt-dog/1, with their figures beside; ranking: how measures rank the runs by"
    text += " their generalization gap (default: one of all runs)"
    parser.add_argument("--table", nargs="+", default=[], metavar="NAME", help=text)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"for {', '.join(FILES)} (default: DIR)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the report of `report_data`, which it returns with {"written": [path]}."""
    from qdeploy.training.report import report_data

    out = args.folders[0] if args.out is None else args.out
    for name in FILES:
        check_regular(out / name)
    data = report_data(args.folders, args.table)
    files = _made(data)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with atomic_file(out / name) as file:
            file.write(content)
    return {**data, "written": [str(out / name) for name in files]}


def _made(data: dict[str, Any]) -> dict[str, bytes]:
    """The files by name: all of them are made before one is written."""
    from qdeploy.training.report_text import csv_text, markdown

    files = {"report.md": markdown(data).encode(), "report.csv": csv_text(data).encode()}
    if find_spec("matplotlib") is None:
        note("no picture without matplotlib: pip install 'qdeploy[plots]'")
        return files
    from qdeploy.training.report_picture import draw

    return files | {f"report.{kind}": draw(data, kind) for kind in ("png", "svg")}


def show(data: dict[str, Any]) -> None:
    """Prints the Markdown of the report, and where it is."""
    from qdeploy.training.report_text import markdown

    write(markdown(data).rstrip())
    write(f"\nwritten: {', '.join(data['written'])}")
