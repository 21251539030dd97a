"""`qdeploy train --methods`: the methods with what stands on their axes, and the options of everything that can."""

from __future__ import annotations

import inspect
from typing import Any

from qdeploy.terminal import columns, write
from qdeploy.training.choices import INNER, Choice, options_of
from qdeploy.training.methods import AXES, METHODS

_SHOWN = ("objective", "step", "quantization", "average")


def methods_report() -> dict[str, Any]:
    """{"methods": [row, ...], "choices": {axis: {name: {option: default}}}}."""
    rows = []
    for name, method in METHODS.items():
        row: dict[str, Any] = {"method": name}
        row |= {axis: Choice.of(getattr(method, axis), axis).plain() for axis in _SHOWN}
        rows.append(row | {"settings": dict(method.settings), "source": method.source, "note": method.note})
    choices = {axis: {name: _defaults(name, axis) for name in names} for axis, names in AXES.items()}
    return {"methods": rows, "choices": choices}


def _defaults(name: str, axis: str) -> dict[str, Any]:
    found = options_of(Choice(name), axis)
    defaults = {key: one.default for key, one in found.items() if key != INNER}
    defaults |= {INNER: "erm"} if INNER in found else {}
    return {key: None if value is inspect.Parameter.empty else value for key, value in defaults.items()}


def show_methods(report: dict[str, Any]) -> None:
    """Prints the report of `methods_report`."""
    rows = []
    for method in report["methods"]:
        row = {"method": method["method"]} | {axis: _words(method[axis], axis) for axis in _SHOWN}
        row["settings"] = " ".join(f"{key}={value}" for key, value in method["settings"].items())
        rows.append(row | {"source": method["source"] + (f"; {method['note']}" if method["note"] else "")})
    write(columns(rows))
    for axis, choices in report["choices"].items():
        write(f"\n--{axis} NAME, or package.module:Class; options --{axis}.OPTION")
        for name, options in choices.items():
            text = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
            write(f"  {name:<18}{text}")


def _words(choice: dict[str, Any], axis: str) -> str:
    options = [f"{key}={value}" for key, value in choice.items() if key != "name"]
    return " ".join([choice["name"], *options])
