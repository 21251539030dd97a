"""The numbers of a report: what the runs of a row say of a column, and which runs must not be averaged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qdeploy.errors import InputError
from qdeploy.training import fingerprint
from qdeploy.training.config import MAY_CHANGE, Config, differences
from qdeploy.training.report_files import file_of
from qdeploy.training.report_runs import MEASURES, Result
from qdeploy.training.run_files import sound
from qdeploy.training.tables import Column, domains_of, same_domain

Cell = dict[str, Any]  # {"mean", "error", "n"}
INT8 = "int8"  # in place of a value of a column: the accuracy of the model file

# In what the runs of a row may differ: it does not change what they are runs of.
OF_PLACE = MAY_CHANGE - {"updates", "epochs"} | {"float_runs"}


def check_row(results: Sequence[Result], varies: Collection[str]) -> None:
    """Raises InputError unless these runs of one row and one data set differ in held-out domain and seed alone, beside
    `varies`, no seed comes twice, and ensembles are of as many networks."""
    first = results[0]
    allowed = {*OF_PLACE, *varies, "seed", "test_domain"}
    seen: dict[tuple[object, ...], Result] = {}
    for one in results:
        found = {key: pair for key, pair in differences(first.config, one.config).items() if not _is_in(key, allowed)}
        for key, (was, now) in found.items():
            expected = f"runs of one row that differ in their seeds alone, {key}={was!r} as in {first.folder}"
            raise InputError(f"expected {expected}, got {key}={now!r} - at {one.folder}")
        if one.members != first.members:
            expected = f"ensembles of one row of {first.members} networks as in {first.folder}"
            raise InputError(f"expected {expected}, got {one.members} - at {one.folder}")
        if (other := seen.setdefault((one.config.test_domain, _sample(one, varies)), one)) is not one:
            expected = f"every run of a row once, {one.config.test_domain} with seed {one.config.seed} as in"
            raise InputError(f"expected {expected} {other.folder}, got it twice - at {one.folder}")


def check_table(results: Sequence[Result]) -> None:
    """Raises InputError for runs that do not belong into one table: another split, selection rule or images of one
    name, or a domain that is held out in another way."""
    for place, one in enumerate(results):
        _check_same("split_seed", results[0], one)
        _check_same("selection", results[0], one)
        alike = [other for other in results[:place] if other.data == one.data]
        for other in alike:
            if {*other.tests} & {*one.tests}:
                _check_same("test_domain", other, one)
        for first in alike[:1]:
            if first.images and one.images and (found := fingerprint.difference(first.images, one.images)):
                raise InputError(f"expected the images of {first.folder}, got {found} - at {one.folder}")


def _check_same(key: str, first: Result, one: Result) -> None:
    was, now = getattr(first.config, key), getattr(one.config, key)
    if was != now:
        expected = f"runs of one table, {key}={was!r} as in {first.folder}"
        raise InputError(f"expected {expected}, got {key}={now!r} - at {one.folder}")


def held_out(results: Sequence[Result]) -> dict[str, list[str]]:
    """By data set the domains over which its mean is: those of the paper, or all that some run holds out."""
    found: dict[str, list[str]] = {}
    for one in results:
        known = found.setdefault(one.data, [*(domains_of(one.data) or ())])
        known += [name for name in one.tests if not any(same_domain(name, other) for other in known)]
    return found


def cell(results: Sequence[Result], column: Column, domains: Sequence[str], varies: Collection[str]) -> Cell | None:
    """Mean and standard error over the seeds of the mean over `domains`; None unless each of them has a value.

    Of seeds count those with a value for every domain. In percent where the column is of shares.
    """
    samples = [_samples(results, column, domain, varies) for domain in domains]
    common = [key for key in samples[0] if all(key in other for other in samples)] if samples else []
    values = [statistics.fmean(other[key] for other in samples) * (100 if column.percent else 1) for key in common]
    if not values:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "error": error, "n": len(values)}


def _samples(results: Sequence[Result], column: Column, domain: str, varies: Collection[str]) -> dict[object, float]:
    """The values of the runs that hold out `domain`, by seed."""
    found = {}
    for one in results:
        name = next((name for name in one.tests if same_domain(name, domain)), None)
        value = None if name is None else _value(one, column, name)
        if value is not None:
            found[_sample(one, varies)] = value
    return found


def _sample(one: Result, varies: Collection[str]) -> object:
    """What tells apart the runs of one cell."""
    if one.kind is not None:
        return one.kind
    others = (str(getattr(one.config, key.partition(".")[0])) for key in varies)
    return (one.config.seed, *others)


def _value(one: Result, column: Column, domain: str) -> float | None:
    if column.value == "test":
        return one.tests[domain]
    if column.value == "validation":
        return one.validation
    if column.value == INT8:
        return None if one.file is None else one.file["tests"].get(domain)
    return measured(one, column)


def measured(one: Result, column: Column) -> float | None:
    """The mean over the rows of the measure's table that the column means; None where it has no number, or one of a
    search that was saturated."""
    measure, _, name = column.value.partition(".")
    content = one.measures.get(measure)
    if content is None:
        return None
    with sound(one.folder / MEASURES / f"{measure}.json"):
        rows = [content] if column.where is None else content["table"]
        found = [row for row in rows if (column.where or {}).items() <= row.items() and name in row]
        if not found or any(row.get("saturated") or row[name] is None for row in found):
            return None
        value = statistics.fmean(row[name] for row in found)
        return value if math.isfinite(value) else None


def _is_in(key: str, names: Collection[str]) -> bool:
    """Whether `names` has a setting, or the axis whose option it is."""
    return key in names or key.partition(".")[0] in names


def bits(config: Config) -> str:
    """Of weights, and of inputs where they are quantized: 7, 4/4; 32 of networks in float."""
    if config.bits is None or config.quantization.name in ("none", "uniform-noise"):
        return "32"
    pair = [config.bits] if config.activation_bits is None else [config.bits, config.activation_bits]
    return "/".join("mixed" if isinstance(one, Mapping) else str(one) for one in pair)


def of_files(results: Sequence[Result], domains: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """{"size": bytes of the largest model file, "int8": accuracy of the engine as of `cell`, "agreement": percent of
    images for which engine and network say the same, "file": the largest one as of `file_of`}; None where no run has a
    file."""
    files = [one.file for one in results if one.file is not None]
    if not files:
        return {"size": None, "int8": None, "agreement": None, "file": None}
    data = [*dict.fromkeys(one.data for one in results)]
    int8 = cell(results, Column(INT8, value=INT8), domains[data[0]], ()) if len(data) == 1 else None
    agreement = 100 * statistics.fmean(file["agreement"] for file in files)
    size, largest = max((one.file["bytes"], i) for i, one in enumerate(results) if one.file is not None)
    file = file_of(results[largest].file or {}, results[largest].folder)
    return {"size": size, "int8": int8, "agreement": agreement, "file": file}
