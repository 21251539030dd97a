"""The file of a sweep, in YAML: shared settings, held-out domains, seeds, and the rows that its grids stand for.

settings: {data: PACS, weights: resnet50.pth}       as in a file of `qdeploy train --config`
targets: [art_painting, cartoon]                    --test-domain
seeds: 3                                            0, 1 and 2; or a list
rows:
  erm: {}                                           what a row gives comes over the settings
  "qt-dog {bits} bits": {method: qt-dog, grid: {bits: [8, 7, 6]}}
  rtn: {method: rtn, float_runs: erm}               of the finished runs of another row
  eoq: {combine: qt-dog 7 bits, rule: eoq}          what is made of the runs of others: `qdeploy combine`
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qdeploy.arguments import integer
from qdeploy.errors import InputError
from qdeploy.training.choices import Choice
from qdeploy.training.combine_command import AVERAGES, ENSEMBLES
from qdeploy.training.config import AXES_OF_CONFIG, Config
from qdeploy.training.settings_files import check_names, over, read_yaml

Settings = dict[str, Any]

MAX_SEEDS = 1000
_OF_THE_SWEEP = ("test_domain", "seed", "devices")  # its targets and seeds; a run of one device
_NAMES = [setting.name for setting in fields(Config) if setting.name not in _OF_THE_SWEEP]
_OF_ROW, _OF_COMBINATION = ("seeds", "grid", "export"), ("seeds", "combine", "rule")


@dataclass(frozen=True)
class Row:
    """Networks with the same settings but for target and seed."""

    name: str
    seeds: list[int]
    settings: Settings  # as given, by name
    exports: bool


@dataclass(frozen=True)
class Combination:
    """For each target what is made of the runs that `members` and `seeds` name together."""

    name: str
    seeds: list[int]
    members: list[Row]
    rule: str


@dataclass(frozen=True)
class SweepFile:
    shared: Settings
    targets: list[str]
    rows: list[Row | Combination]


def read_sweep(path: Path) -> SweepFile:
    """What is in the file. Raises InputError, naming the place, for what is unknown, lacks, or stands there twice."""
    content = read_yaml(path)
    check_names(content, ("settings", "targets", "seeds", "rows"), path)
    shared = _settings(content.get("settings") or {}, f"settings of {path}")
    targets = content.get("targets")
    if not isinstance(targets, list) or not targets:
        raise InputError(f"expected a list of domains to hold out, got {targets!r} - at targets of {path}")
    targets = _once([str(target) for target in targets], f"targets of {path}")
    seeds = _seeds(content.get("seeds", 1), f"seeds of {path}")
    given = content.get("rows")
    if not given:
        raise InputError(f"expected rows by name, got {given!r} - at {path}")
    places = {str(name): f"row {name!r} of {path}" for name in _mapping(given, f"rows of {path}")}
    written = {name: _mapping(row or {}, at) for (name, at), row in zip(places.items(), given.values(), strict=True)}
    trained = {name: _rows(name, row, seeds, places[name]) for name, row in written.items() if "combine" not in row}
    of_all = [row for rows in trained.values() for row in rows]
    rows: list[Row | Combination] = []
    for name, row in written.items():
        rows += trained[name] if name in trained else [_combination(name, row, of_all, seeds, places[name])]
    _once([safe(row.name) for row in rows], f"rows of {path}")
    return SweepFile(shared, targets, rows)


def _rows(name: str, given: Mapping[str, Any], seeds: list[int], at: str) -> list[Row]:
    """The row, or those of its grid, in whose name {setting} stands for the value."""
    settings = {key: value for key, value in given.items() if key not in _OF_ROW}
    seeds = _seeds(given["seeds"], f"seeds of {at}") if "seeds" in given else seeds
    exports, grid = given.get("export", True), given.get("grid", {})
    if not isinstance(exports, bool):
        raise InputError(f"expected true or false, got {exports!r} - at export of {at}")
    if not isinstance(grid, Mapping) or not all(isinstance(values, list) and values for values in grid.values()):
        raise InputError(f"expected {{setting: [value, ...]}}, got {grid!r} - at grid of {at}")
    for key in grid:
        if f"{{{key}}}" not in name:
            raise InputError(f"expected {{{key}}} in the name of a row for each {key}, got none - at {at}")
        if key in settings:
            raise InputError(f"expected {key} once, got it in the grid and beside it - at {at}")
    found = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        label = name
        for key, value in chosen.items():
            label = label.replace(f"{{{key}}}", _text(value))
        found.append(Row(label, seeds, _settings({**settings, **chosen}, at, [*_NAMES, *_OF_ROW]), exports))
    return found


def _combination(name: str, given: Mapping[str, Any], rows: Sequence[Row], seeds: list[int], at: str) -> Combination:
    check_names(given, _OF_COMBINATION, at)
    seeds = _seeds(given["seeds"], f"seeds of {at}") if "seeds" in given else seeds
    rule, rules = given.get("rule", "ensemble"), (*ENSEMBLES, *AVERAGES)
    if rule not in rules:
        raise InputError(f"expected one of {', '.join(rules)}, got {rule!r} - at rule of {at}")
    patterns = given["combine"] if isinstance(given["combine"], list) else [given["combine"]]
    members: dict[str, Row] = {}
    for pattern in map(str, patterns):
        found = {row.name: row for row in rows if fnmatchcase(row.name, pattern)}
        if not found:
            known = ", ".join(row.name for row in rows)
            raise InputError(f"expected one of {known}, or *, got {pattern!r} - at combine of {at}")
        members |= found
    for row in members.values():
        if missing := [seed for seed in seeds if seed not in row.seeds]:
            raise InputError(f"expected seeds of {row.name!r}, {row.seeds}, got {missing[0]} - at {at}")
    return Combination(name, seeds, [*members.values()], rule)


def _settings(given: Any, at: str, known: Sequence[str] = _NAMES) -> Settings:
    """Settings by name; `axis.option` becomes an option of what stands on the axis."""
    found: Settings = {}
    options: Settings = {}
    for key, value in _mapping(given, at).items():
        name, _, option = str(key).replace("-", "_").partition(".")
        if option and name in AXES_OF_CONFIG:
            options[name] = over({option: value}, options.get(name))
        else:
            check_names([str(key).replace("-", "_")], known, at)
            found[name] = value
    for name in AXES_OF_CONFIG:
        if name in found:
            Choice.of(found[name], f"{name} of {at}")
        if name in options:
            found[name] = over(options[name], found.get(name))
    return found


def _mapping(given: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise InputError(f"expected settings by name, got {given!r} - at {at}")
    return given


def merged(upper: Settings, lower: Settings) -> Settings:
    """The settings of a row, over shared ones; of an axis with the same choice on it the options of both."""
    axes = {name: over(value, lower.get(name)) for name, value in upper.items() if name in AXES_OF_CONFIG}
    return {**lower, **upper, **axes}


def _seeds(given: Any, at: str) -> list[int]:
    if isinstance(given, list):
        return _once([integer(seed, 0, 2**31 - 1, at) for seed in given], at) or _seeds(0, at)
    return [*range(integer(given, 1, MAX_SEEDS, at))]


def _once(values: list, at: str) -> list:
    for value in values:
        if values.count(value) > 1:
            raise InputError(f"expected every value once, got {value!r} twice - at {at}")
    return values


def _text(value: Any) -> str:
    """A value of a grid in the name of its row."""
    if isinstance(value, Mapping):
        options = "".join(f" {key}={_text(option)}" for key, option in value.items() if key != "name")
        return f"{value.get('name', '')}{options}".strip()
    return str(value)


def safe(name: str) -> str:
    """The name of a folder for a row or a target."""
    return re.sub(r"^\.|[^\w.+=,-]", "_", name)
