"""The page of `qdeploy profile`: where the time of a call goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdeploy.page.charts import Panel, bars, columns
from qdeploy.page.document import Column, chart, charts, large, meter, number, page, paragraph, section, table
from qdeploy.page.layers import layer_names
from qdeploy.page.markup import Markup, tag, together
from qdeploy.terminal import percent

SLOWEST = 8  # operations that have a bar
TIMES: list[Column] = [("of time", ".1%"), ("\u00b5s", ",.2f")]


def of_profile(report: dict[str, Any]) -> str:
    """The page of a report as `qdeploy profile --json` prints it."""
    nodes, call = report["nodes"], report["call_ms"]
    names = layer_names(nodes)
    figures = [(_time(1e3 * call), "one call"), (f"{1e3 * report['batch'] / call:,.0f}", "inputs a second")]
    if report["of_peak"]:
        figures.append((f"{report['of_peak']:.1%}", "of the peak of its int8 instructions"))
    figures.append((large(report["macs"]), "multiply-accumulates a call"))
    threads = f"{report['threads']} thread{'s' if report['threads'] > 1 else ''}"
    figures.append((report["isa"], f"{threads}, batch {report['batch']}"))
    return page(
        "qdeploy profile",
        Path(report["file"]).name,
        figures,
        section("Where the time goes", paragraph(_summary(nodes, names)), _charts(nodes, names)),
        section("By kind of operation", _kinds(nodes)),
        section("Every operation", _operations(nodes, names)),
    )


def _time(microseconds: float) -> str:
    return f"{microseconds / 1e3:,.2f} ms" if microseconds >= 1e3 else f"{microseconds:,.1f} \u00b5s"


def _slowest(nodes: list[dict]) -> list[int]:
    return sorted(range(len(nodes)), key=lambda i: -nodes[i]["microseconds"])


def _summary(nodes: list[dict], names: list[str]) -> str:
    """How few operations take half of the time."""
    order = _slowest(nodes)
    total, count = 0.0, 0
    while total < 0.5 and count < len(order):
        total += nodes[order[count]]["of_time"]
        count += 1
    half = f"Half of the time goes to {count:,} of {len(nodes):,} operations."
    return f"{half} {names[order[0]]} takes most: {percent(nodes[order[0]]['of_time'])}."


def _charts(nodes: list[dict], names: list[str]) -> Markup:
    order = _slowest(nodes)
    rows = [(names[i], nodes[i]["microseconds"], _said(nodes[i : i + 1])) for i in order[:SLOWEST]]
    rest = [nodes[i] for i in order[SLOWEST:]]
    caption = together(
        tag("strong", "The slowest operations"), f"; the other {len(rest):,}: {_said(rest)}." if rest else "."
    )
    slowest = bars("The slowest operations", f"{rows[0][0]} takes most: {rows[0][2]}.", rows)
    panels = [
        Panel("time, \u00b5s", [node["microseconds"] for node in nodes], ",.2f"),
        Panel("work, million multiply-accumulates", [node["macs"] / 1e6 for node in nodes], ",.3f"),
    ]
    if any(node["of_peak"] for node in nodes):
        panels.append(Panel("speed, share of the peak", [node["of_peak"] for node in nodes], ".0%"))
    through = columns("All operations in their order", "A column each: time, work and speed.", names, panels)
    numbers = [(name, *(panel.values[i] for panel in panels)) for i, name in enumerate(names)]
    header: list[Column] = [("operation", ""), *((panel.label, panel.spec) for panel in panels)]
    return charts(
        chart(slowest, caption, [("operation", ""), ("\u00b5s", ",.2f"), ("", "")], rows),
        chart(
            through,
            together(tag("strong", "All operations"), " in the order in which they run."),
            header,
            numbers,
            wide=True,
        ),
    )


def _said(nodes: list[dict]) -> str:
    time, share = (sum(node[key] for node in nodes) for key in ("microseconds", "of_time"))
    return f"{_time(time)}, {percent(share)}"


def _kinds(nodes: list[dict]) -> Markup:
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for node in nodes:
        groups[node["op"], node["kernel"]].append(node)
    rows = []
    for (op, kernel), found in groups.items():
        share, time, macs = (sum(node[key] for node in found) for key in ("of_time", "microseconds", "macs"))
        speed = macs / time / 1e3 if macs and time else None
        rows.append((op, share, time, len(found), macs / 1e6, speed, kernel))
    header = [("op", ""), *TIMES, ("count", ",d"), ("MMAC", ",.3f"), ("GMAC/s", ",.0f"), ("kernel", "")]
    return table("Time by op and kernel", header, _metered(sorted(rows, key=lambda row: -row[2])))


def _operations(nodes: list[dict], names: list[str]) -> Markup:
    header = [("operation", ""), *TIMES, ("op", ""), ("bits", "d"), ("output", ""), ("MMAC", ",.3f")]
    header += [("GMAC/s", ",.0f"), ("of peak", ".0%"), ("kernel", ""), ("tile", ""), ("split", "")]
    notes = any(node["note"] for node in nodes)
    rows: list[tuple] = []
    for name, node in zip(names, nodes, strict=True):
        shape = "x".join(map(str, node["shape"]))
        row: tuple[Any, ...] = (name, node["of_time"], node["microseconds"], node["op"], node["bits"] or None, shape)
        row += (node["macs"] / 1e6, node["gmacs_per_second"], node["of_peak"])
        row += (node["kernel"], node["tile"], node["split"])
        rows.append((*row, node["note"]) if notes else row)
    return table("Every operation in its order", [*header, ("note", "")] if notes else header, _metered(rows))


def _metered(rows: Sequence[tuple]) -> list[tuple]:
    """The share of the time, second in a row, with its bar."""
    most = max(row[1] for row in rows) or 1.0
    return [(row[0], meter(row[1] / most, number(row[1], ".1%")), *row[2:]) for row in rows]
