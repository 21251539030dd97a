"""The page of `qdeploy report`: what a sweep came to. A section appears where there is something to show."""

from __future__ import annotations

from typing import Any

from qdeploy.page import curves, maps, measures, tables
from qdeploy.page.document import charts, page, section
from qdeploy.page.layers import layer_chart
from qdeploy.page.markup import Markup, tag


def of_report(data: dict[str, Any]) -> str:
    """The page of a report as `qdeploy report --json` prints it.

    data: {"title", "tables", "runs"} and "files" where they were profiled. A table has "name", "title", "columns",
    "decimals", "notes" and "rows" of "label", "cells" (one a column, None or {"mean", "error", "n", "published",
    "published_error"}) and what is known of "seeds", "networks", "bits", "size" (bytes), "milliseconds" (of an input),
    "int8" (a cell) and "agreement" (percent). A run has "row", "target", "seed", "records" (its log), "config" and
    "measures", what its measures/*.json hold, by name. A file has "label" and "layers" of "name", "member", "bits",
    "sqnr_db", "microseconds" and "macs", as far as they are known.
    """
    runs = data["runs"]
    sections: list[tuple[str, Markup | None]] = [(_title(one), tables.section_of(one)) for one in data["tables"]]
    sections += [
        ("Training", curves.training(runs)),
        ("Layers of the files", _layers(data.get("files", []))),
        ("Flatness", curves.flatness(runs)),
        ("Loss surfaces", maps.surfaces(runs)),
        ("Where the networks look", maps.gradcam(runs)),
        ("Measures", measures.tables_of(runs)),
    ]
    found = [(f"section{i}", title, content) for i, (title, content) in enumerate(sections) if content is not None]
    links = [tag("a", title, href=f"#{anchor}") for anchor, title, _ in found]
    return page(
        "qdeploy report",
        data["title"],
        _figures(data),
        tag("nav", *links, aria_label="Sections") if len(links) > 2 else None,
        *(section(title, content, anchor=anchor) for anchor, title, content in found),
    )


def _title(table: dict[str, Any]) -> str:
    return table["title"] if table["name"] == "all" else f"{table['name']}: {table['title']}"


def _figures(data: dict[str, Any]) -> list[tuple[str, str]]:
    counts = {
        name: {run[key] for run in data["runs"]} for name, key in (("held-out domains", "target"), ("seeds", "seed"))
    }
    rows = sum(len(one["rows"]) for one in data["tables"])
    figures = [(f"{len(data['runs']):,}", "finished runs"), (f"{rows:,}", "rows")]
    return figures + [(f"{len(found):,}", name) for name, found in counts.items() if found]


def _layers(files: list[dict[str, Any]]) -> Markup | None:
    return charts(*(layer_chart(file["layers"], file["label"]) for file in files)) if files else None
