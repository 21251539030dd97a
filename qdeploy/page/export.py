"""The page of an export: how small the file is, and how close its integers are to the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdeploy.page.charts import bars
from qdeploy.page.document import Column, chart, charts, large, page, section, table, warnings
from qdeploy.page.layers import layer_chart, layer_names
from qdeploy.page.markup import Markup, tag, together
from qdeploy.terminal import percent


def of_export(report: dict[str, Any]) -> str:
    """The page of the fields of `ExportReport.to_json`."""
    layers = [layer for layer in report["layers"] if layer["bits"] is not None or layer["sqnr_db"] is not None]
    figures = [(f"{report['file_ratio']:.3f}x", "the size in float32"), (f"{report['file_bytes']:,}", "bytes")]
    if report["top1_agreement"] is not None:
        figures.append((f"{report['top1_agreement']:.2%}", f"the same class, of {report['images']:,} images"))
    if report["output_sqnr_db"] is not None:
        figures.append((f"{report['output_sqnr_db']:.1f} dB", "SQNR of the output"))
    figures.append((large(sum(layer["macs"] for layer in layers)), "multiply-accumulates an image"))
    return page(
        "qdeploy export",
        Path(report["path"]).name,
        figures,
        warnings([*report["warnings"], *report["notes"]]),
        section("Size and layers", _charts(report, layers)),
        section("Every layer", _table(layers)),
    )


def _charts(report: dict[str, Any], layers: list[dict]) -> Markup:
    sizes = [
        ("float32", "fp32_bytes"),
        ("packed: learned weights at their width", "packed_bytes"),
        ("file", "file_bytes"),
    ]
    rows = [(label, report[key], f"{report[key]:,} B") for label, key in sizes]
    drawing = bars("Size", f"The file has {report['file_ratio']:.3f} times the bytes of the network in float32.", rows)
    shares = ", ".join(f"{percent(share)} at {bits} bits" for bits, share in report["mac_share"].items())
    header: list[Column] = [("size", ""), ("bytes", ",d"), ("", "")]
    size = chart(
        drawing,
        together(tag("strong", "Bytes"), f" of the network and of the file. Multiply-accumulates: {shares}."),
        header,
        rows,
    )
    return charts(size, layer_chart(layers, "Layers"))


def _table(layers: list[dict]) -> Markup:
    header: list[Column] = [("layer", ""), ("SQNR dB", ".1f"), ("bits", "d"), ("weights", ",d"), ("MMAC", ",.3f")]
    rows = [
        (name, layer["sqnr_db"], layer["bits"], layer["weights"] or None, layer["macs"] / 1e6 or None)
        + (layer["op"], layer["quantizer"], layer["grid"])
        for name, layer in zip(layer_names(layers), layers, strict=True)
    ]
    return table("Every layer in its order", [*header, ("op", ""), ("quantizer", ""), ("grid", "")], rows)
