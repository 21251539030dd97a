"""The tables of the papers in tables.yaml: their columns, their published figures, and which run belongs in which row.
Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qdeploy.errors import InputError
from qdeploy.training.choices import Choice
from qdeploy.training.config import AXES_OF_CONFIG, IN_DOMAIN, Config
from qdeploy.training.methods import AXES, METHODS
from qdeploy.training.settings_files import over

PATH = Path(__file__).with_name("tables.yaml")
RANKING = "ranking"  # beside the tables of papers: of all runs, how measures rank them
SHARES = ("test", "validation")  # values of a column that are accuracies of a run; others are of its measures


@dataclass(frozen=True)
class Column:
    """What stands in a column: of a data set the mean over what is held out, or of the domain `target` alone.

    data: None for that of the row. value: one of SHARES, or MEASURE.VALUE, `where` its table is so. mean_of: labels of
    the columns whose mean it is instead. percent: the value is a share.
    """

    label: str
    data: str | None = None
    target: str | None = None
    value: str = "test"
    where: Mapping[str, Any] | None = None
    mean_of: Sequence[str] = ()
    percent: bool = True
    decimals: int = 1


@dataclass(frozen=True)
class Row:
    """`published`: (mean, error) by column, in the unit of the paper; None where it has none. `settings`: those of its
    runs, by name, and of axes (name, options)."""

    label: str
    published: Sequence[tuple[float | None, float | None]]
    settings: Mapping[str, Any]
    combine: str | None = None  # the kind of ensemble or average; None: single runs
    switch: Sequence[float] | None = None  # the share of the updates before it is one of these
    data: str | None = None


@dataclass(frozen=True)
class Table:
    """`selection`: the rule of the published figures. `varies`: in what the runs of one cell may differ."""

    name: str
    title: str
    source: str
    selection: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    varies: Sequence[str] = ()


def table(name: str) -> Table:
    """The table `name`, such as qt-dog/1. Raises InputError for an unknown one."""
    known = _content()["tables"]
    if name not in known:
        raise InputError(f"expected one of {', '.join(names())} or {RANKING}, got {name!r} - at --table")
    content = known[name]
    rows = [_row(one, content.get("settings", {})) for one in content["rows"]]
    labels = [*content["columns"]]
    columns = [
        _column(label, content["columns"][label], labels[:place], _decimals(content["rows"], place))
        for place, label in enumerate(labels)
    ]
    words = {key: content[key] for key in ("title", "source", "selection")}
    lists = {key: content.get(key, ()) for key in ("notes", "varies")}
    return Table(name, **words, columns=columns, rows=rows, **lists)


def names() -> list[str]:
    """Of all tables."""
    return [*_content()["tables"]]


def data_set(config: Config, domains: Sequence[str]) -> str:
    """What the tables call the data of a run with these domains, or else the name that they have there."""
    folder = Path(config.data).name
    for name, known in _content()["datasets"].items():
        if known == folder if isinstance(known, str) else {*map(_letters, known)} == {*map(_letters, domains)}:
            return name
    return folder


def domains_of(name: str) -> Sequence[str] | None:
    """The domains of a data set of the tables, all of which are held out in turn; None where that is not known."""
    found = _content()["datasets"].get(name)
    return None if isinstance(found, str) else found


def same_domain(one: str, other: str) -> bool:
    """Whether two names are of one domain: archives differ in case and in `_`."""
    return _letters(one) == _letters(other)


def matches(row: Row, config: Config, data: str, combine: str | None) -> bool:
    """Whether a run with these settings, or what `combine` says was made of such runs, belongs in `row`."""
    if combine != row.combine or row.data not in (None, data):
        return False
    if config.test_domain == IN_DOMAIN and row.settings.get("test_domain") != IN_DOMAIN and row.data is None:
        return False
    if row.switch is not None and not _switches(config, row.switch):
        return False
    return all(_has(getattr(config, name), expected) for name, expected in row.settings.items())


def _has(value: Any, expected: Any) -> bool:
    if not isinstance(value, Choice):
        return bool(value == expected)
    options = {key: option for key, option in expected.items() if key != "name"}
    return value.name == expected["name"] and options.items() <= value.options.items()


def _switches(config: Config, shares: Sequence[float]) -> bool:
    """In whole percent, so that 2000 of 5001 updates are as many as 400 of 1001."""
    if config.quantize_at is None:
        return False
    return any(round(100 * config.quantize_at / max(1, config.updates - 1)) == round(100 * share) for share in shares)


@cache
def _content() -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load(PATH.read_text(encoding="utf-8"))
    return found


def _column(label: str, what: Any, before: Sequence[str], decimals: int) -> Column:
    """`what` as the file has it: a data set, or options."""
    if isinstance(what, str):
        return Column(label, what, decimals=decimals)
    options = {**what}
    if options.pop("mean", False):
        options["mean_of"] = before
    options.setdefault("percent", options.get("value", "test") in SHARES)
    return Column(label, **options, decimals=decimals)


def _row(content: Mapping[str, Any], shared: Mapping[str, Any]) -> Row:
    found = {**shared, **content}
    label, published = found.pop("label"), _figures(found.pop("published"))
    beside = {key: found.pop(key, None) for key in ("combine", "switch", "data")}
    return Row(label, [*map(_figure, published)], _settings(found), **beside)


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """With all that the method puts on its axes and into settings, under what is given beside it."""
    method = METHODS[given.pop("method")]
    found = {**method.settings, **{axis: getattr(method, axis) for axis in AXES if hasattr(method, axis)}}
    for name, value in given.items():
        found[name] = over(value, found.get(name)) if name in AXES_OF_CONFIG else value
    return {name: over(value, None) if name in AXES_OF_CONFIG else value for name, value in found.items()}


def _figures(text: object) -> list[str]:
    return re.split(r"[\s/]+", str(text))


def _figure(text: str) -> tuple[float | None, float | None]:
    """(mean, error) of `84.7±0.5`, of `84.7` or of `-`."""
    mean, _, error = text.partition("±")
    return (None if mean == "-" else float(mean)), (float(error) if error else None)


def _decimals(rows: Sequence[Mapping[str, Any]], place: int) -> int:
    """As many as the paper prints in the column."""
    texts = [_figures(row["published"])[place].partition("±")[0] for row in rows]
    return max(len(text.partition(".")[2]) for text in texts)


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
