"""Lines: accuracies while runs train, and how the loss rises at a distance from their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from qdeploy.page.axes import Axis, linear
from qdeploy.page.charts import STYLES, Line, lines
from qdeploy.page.document import Column, chart, charts
from qdeploy.page.markup import Markup, tag, together
from qdeploy.page.runs import Run, of_one_cell

ACCURACIES = (("test", "held out"), ("validation", "validation"))


def training(runs: Sequence[Run]) -> Markup | None:
    """A chart for each row and held-out domain, all with one axis of accuracies."""
    groups = {
        key: logged for key, found in of_one_cell(runs).items() if (logged := [run for run in found if run["records"]])
    }
    if not groups:
        return None
    values = [100 * record[key] for run in runs for record in run["records"] for key, _ in ACCURACIES]
    y = linear("accuracy, %", values)
    return charts(*(_training(row, target, found, y) for (row, target), found in groups.items()))


def _training(row: str, target: str, runs: Sequence[Run], y: Axis) -> Markup:
    found: list[Line] = []
    for style, (key, label) in enumerate(ACCURACIES):
        seeds = [_curve(run, key) for run in runs]
        found += [Line(label, *curve, style, faint=len(seeds) > 1) for curve in seeds]
        if len(seeds) > 1 and all(updates == seeds[0][0] for updates, _ in seeds):
            mean = [fmean(values) for values in zip(*(values for _, values in seeds), strict=True)]
            found.append(Line(f"{label}, mean", seeds[0][0], mean, style))
    x = linear("update", [update for line in found for update in line.x], from_zero=True)
    switch = _switch(runs[0])
    last = f"After the last update {100 * fmean(run['records'][-1]['test'] for run in runs):.1f} % held out."
    count = "one seed" if len(runs) == 1 else f"{len(runs)} seeds and their mean"
    drawing = lines(f"{row}, {target} held out", last, found, x, y, None if switch is None else (switch, "quantized"))
    columns: list[Column] = [("update", ",d"), ("seed", "d"), *((f"{label}, %", ".2f") for _, label in ACCURACIES)]
    numbers = [
        (record["update"], run["seed"], *(100 * record[key] for key, _ in ACCURACIES))
        for run in runs
        for record in run["records"]
    ]
    return chart(drawing, together(tag("strong", f"{row}, {target}"), f": {count}."), columns, numbers)


def _curve(run: Run, key: str) -> tuple[list[int], list[float]]:
    return [record["update"] for record in run["records"]], [100 * record[key] for record in run["records"]]


def _switch(run: Run) -> int | None:
    """The update at whose start a float network was quantized; None where it never was, or from the start on."""
    quantized = [record["quantized"] for record in run["records"]]
    if not any(quantized) or quantized[0]:
        return None
    first: int = run["records"][quantized.index(True)]["update"]
    at = run["config"].get("quantize_at")
    return first if at is None else at


# ---- Flatness ------------------------------------------------------------------------------------------------------

KINDS = (("gamma_relative", "relative", "distance / norm of the weights"), ("gamma", "absolute", "distance"))
Rises = Mapping[str, Mapping[float, float]]  # by row: from distances to F_gamma


def flatness(runs: Sequence[Run]) -> Markup | None:
    """F_gamma by part and kind of distance, a line a row: the mean over its runs. A chart has up to STYLES lines."""
    rows = [(run["row"], entry) for run in runs for entry in run["measures"].get("flatness", {}).get("table", [])]
    drawings = []
    for part in dict.fromkeys(entry["part"] for _, entry in rows):
        for key, kind, label in KINDS:
            rises = _means([one for one in rows if (one[1]["part"], one[1]["kind"]) == (part, kind)], key)
            x = linear(label, [distance for of_row in rises.values() for distance in of_row], from_zero=True)
            values = [value for of_row in rises.values() for value in of_row.values()]
            y = linear("rise of the loss", values, from_zero=True)
            drawings += [_rise({row: rises[row] for row in some}, x, y, part) for some in _even([*rises])]
    return charts(*drawings) if drawings else None


def _means(rows: Sequence[tuple[str, Mapping[str, Any]]], key: str) -> Rises:
    found: dict[str, dict[float, list[float]]] = {}
    for row, entry in rows:
        if entry["mean"] is not None:
            found.setdefault(row, {}).setdefault(round(entry[key], 9), []).append(entry["mean"])
    return {row: {x: fmean(values) for x, values in sorted(of_row.items())} for row, of_row in found.items()}


def _even(names: Sequence[str]) -> list[Sequence[str]]:
    """Parts of nearly one size, none above STYLES."""
    count = -(-len(names) // STYLES)
    return [names[i * len(names) // count : (i + 1) * len(names) // count] for i in range(count)]


def _rise(rises: Rises, x: Axis, y: Axis, part: str) -> Markup:
    found = [Line(row, [*at], [*at.values()], style, points=True) for style, (row, at) in enumerate(rises.items())]
    flattest = min(found, key=lambda line: line.y[-1] or 0.0)
    text = f"{flattest.label} rises least at the largest distance."
    columns: list[Column] = [("", ""), (x.label, ".4g"), (y.label, ".4g")]
    numbers = [(line.label, at, value) for line in found for at, value in zip(line.x, line.y, strict=True)]
    caption = together(tag("strong", part), f", mean over runs. Of these {text}")
    return chart(lines(f"Rise of the loss, {part}", text, found, x, y, None), caption, columns, numbers)
