"""What is known of each layer of a file: its bits, how close its integers are to the network, its work, its time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qdeploy.page.charts import Panel, columns
from qdeploy.page.document import Column, chart, number
from qdeploy.page.markup import Markup, tag, together

PANELS = (  # key of a layer, what it is, factor and format
    ("bits", "bits of the weights", 1, ".0f"),
    ("sqnr_db", "signal over error, SQNR in dB", 1, ".1f"),
    ("microseconds", "time, \u00b5s", 1, ",.2f"),
    ("macs", "work, million multiply-accumulates", 1e-6, ",.3f"),
)


def layer_names(layers: Sequence[dict[str, Any]]) -> list[str]:
    several = len({layer.get("member") for layer in layers}) > 1
    return [f"{layer['member']}/{layer['name']}" if several else layer["name"] for layer in layers]


def layer_chart(layers: Sequence[dict[str, Any]], title: str) -> Markup:
    """Panels of what the layers have: {"name", "member"?, "bits"?, "sqnr_db"?, "microseconds"?, "macs"?} each."""
    names, panels = layer_names(layers), []
    for key, label, factor, spec in PANELS:
        values = [layer.get(key) for layer in layers]
        if any(values):
            panels.append(Panel(label, [None if value is None else factor * value for value in values], spec))
    header: list[Column] = [("layer", ""), *((panel.label, panel.spec) for panel in panels)]
    rows = [(name, *(panel.values[i] for panel in panels)) for i, name in enumerate(names)]
    text = f"{len(layers):,} layers in the order in which they run. {_lowest_sqnr(layers)}"
    caption = together(tag("strong", title), ": ", text)
    return chart(columns(title, text, names, panels), caption, header, rows, wide=True)


def _lowest_sqnr(layers: Sequence[dict[str, Any]]) -> str:
    """A sentence on the layer that is furthest off."""
    found = [(layer["sqnr_db"], i) for i, layer in enumerate(layers) if layer.get("sqnr_db") is not None]
    if not found:
        return ""
    sqnr, i = min(found)
    return f"The layer furthest off is {layer_names(layers)[i]}: SQNR {number(sqnr, '.1f')} dB."
