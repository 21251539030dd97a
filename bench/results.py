"""What a run measured: the tables, the figures beside their targets, and the file of both."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from targets import TARGETS

from qdeploy import peers
from qdeploy.terminal import columns

if TYPE_CHECKING:
    import gpu_cases


@dataclass
class Results:
    """Figures by key of TARGETS, as (value, spread), and the reports that they come from."""

    figures: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # key to the reason
    reports: dict[str, dict] = field(default_factory=dict)  # by title
    tables: dict[str, str] = field(default_factory=dict)  # of the reports, for people

    def figure(self, key: str, value: float, spread: float | None = None) -> None:
        assert key in TARGETS, key
        self.figures[key] = (value, spread)

    def report(self, title: str, report: dict, ratios: dict[str, str]) -> None:
        """Keep a report of `peers.measure`; `ratios`: runtime to the key under which our ratio to it is a figure."""
        self.reports[title], self.tables[title] = report, peers.text(report)
        rows = {row["runtime"]: row for row in report["results"]}
        for runtime, key in ratios.items():
            if runtime in rows:
                self.figure(key, rows[runtime]["ratio"], rows[runtime]["ratio_spread"])
            else:
                self.absent[key] = report["absent"][runtime]

    def best_float32(self, report: dict, *, ratio: str | None = None, times_faster: str | None = None) -> None:
        """The fastest FP32 peer of a report gives the figure `ratio` (ours / its) or `times_faster` (its / ours)."""
        best = peers.best_peer(report, "float32")
        if best and ratio:
            self.figure(ratio, best["ratio"], best["ratio_spread"])
        if best and times_faster:
            self.figure(times_faster, 1 / best["ratio"], best["ratio_spread"] / best["ratio"] ** 2)

    def gpu_report(self, report: gpu_cases.Report) -> None:
        """Keep what a case of gpu_cases.py found."""
        for key, (value, spread) in report.figures.items():
            self.figure(key, value, spread)
        self.absent |= report.absent
        self.reports[report.title], self.tables[report.title] = {"results": report.rows}, str(report)

    def sections(self) -> list[str]:
        """The tables, in the order of the run."""
        return [f"{title}\n{table}" for title, table in self.tables.items()]

    def summary(self, prefix: str = "") -> str:
        """The targets whose keys begin with `prefix`, and what was measured."""
        rows = []
        for key, target in TARGETS.items():
            if not key.startswith(prefix):
                continue
            value, spread = self.figures.get(key, (None, None))
            if value is None:
                note = self.absent.get(key, "not measured")
            else:
                note = {True: "met", False: "MISSED", None: ""}[target.met(value)]
            sign = ">=" if target.at_least else "<="
            bound = "" if target.bound is None else f"{sign} {_in_unit(target.bound, target.unit)}"
            row = {"what": target.what, "target": bound, "measured": _in_unit(value, target.unit)}
            rows.append(row | {"+-": _in_unit(spread, target.unit), "": note})
        return columns(rows)

    def save(self, path: Path, machine: dict, prefix: str = "") -> None:
        """JSON of everything, with the date, the machine and the targets whose keys begin with `prefix`."""
        figures = []
        for key, (value, spread) in self.figures.items():
            target = TARGETS[key]
            about = {"key": key, "what": target.what, "target": target.bound, "at_least": target.at_least}
            figures.append(about | {"unit": target.unit, "value": value, "spread": spread, "met": target.met(value)})
        missing = [key for key in TARGETS if key.startswith(prefix) and key not in self.figures]
        document = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine,
            "figures": figures,
            "not_measured": {key: self.absent.get(key) for key in missing},
            "reports": self.reports,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def _in_unit(value: float | None, unit: str) -> str | None:
    if value is None:
        return None
    return {
        "x": f"{value:.3f}x",
        "%": f"{value:.1%}",
        "ms": f"{value:.1f} ms",
        "ns": f"{value:.3f} ns",
        "MiB": f"{value:.1f} MiB",
        "GMAC/s": f"{value:.0f} GMAC/s",
    }[unit]
