"""The rows of a report over all runs: which runs are of one row, and what it is called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from qdeploy.training.config import Config, differences, plain, resolve
from qdeploy.training.report_cells import OF_PLACE
from qdeploy.training.report_runs import Result

# Settings that make no row of their own. Runs of another split or selection in one row are refused where it is filled.
_NO_ROW = OF_PLACE | {"seed", "test_domain", "split_seed", "selection"}


def labelled(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results by row: its name in a sweep, or the method, and the settings in which those of one method differ."""
    groups: dict[str, list[Result]] = {}
    for one in results:
        groups.setdefault(_key(one), []).append(one)
    firsts = [group[0] for group in groups.values() if group[0].row is None]
    found: dict[str, list[Result]] = {}
    for group in groups.values():
        label = _of_sweep(group[0]) or _words(group[0], firsts)
        while label in found:  # in another sweep
            label += "'"
        found[label] = group
    return found


def _of_sweep(one: Result) -> str | None:
    return f"{one.row}: {one.kind} of {one.members}" if one.row is not None and one.of_seeds else one.row


def _key(one: Result) -> str:
    if one.row is not None:
        return json.dumps([one.row, one.kind])
    settings = {name: value for name, value in plain(one.config).items() if name not in _NO_ROW}
    return json.dumps([one.kind, one.members, settings], sort_keys=True, default=str)


def _words(one: Result, others: Sequence[Result]) -> str:
    """The method, and where rows of it differ the settings of this one, but for those that most of them have."""
    alike = [other for other in others if (other.config.method, other.kind) == (one.config.method, one.kind)]
    differing = {key for other in alike for key in differences(one.config, other.config)} - _NO_ROW
    words = [one.config.method if one.kind is None else f"{one.kind} of {one.members}: {one.config.method}"]
    for key in sorted(differing):
        value = _word(one, key)
        if 2 * sum(_word(other, key) == value for other in alike) <= len(alike):
            words.append(f"{key.rpartition('.')[2]} {value}")
    return ", ".join(words)


def _word(one: Result, key: str) -> str:
    """The value of a setting, or of an option of an axis, or what stands on an axis."""
    name, _, option = key.partition(".")
    value = plain(one.config)[name]
    if isinstance(value, Mapping) and "name" in value:
        value = value.get(option or "name")
    return str(value)


def plainest(results: Sequence[Result]) -> list[Result]:
    """Of several rows of a sweep those with the fewest settings beside what their methods have: a row of a paper means
    them, and not, say, the members of an average that vary the learning rate. Of other runs all."""
    distances = {one.row: _distance(one.config) for one in results if one.row is not None}
    return [one for one in results if one.row is None or distances[one.row] == min(distances.values())]


def _distance(config: Config) -> int:
    usual = resolve(Config(data=config.data, test_domain=config.test_domain, method=config.method))
    return len(differences(usual, config).keys() - _NO_ROW)
