"""How long the model files of a report take, on this machine: what a page shows beside their accuracy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import qdeploy
from qdeploy.terminal import status

CALLS = 20  # the time of a file is their median, that of a layer the median of as many more

Layers = Sequence[Mapping[str, Any]]


def file_of(file: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """Where the file is of which a summary in `folder` or above it says {"path", "bytes", "layers"?}, which may have
    been moved with its run: {"path", "layers"}; None where there is none of so many bytes."""
    said = Path(file["path"])
    for path in (folder / said.name, folder.parent / said.name, said):
        if path.is_file() and path.stat().st_size == file["bytes"]:
            return {"path": str(path), "layers": file.get("layers", [])}
    return None


def timed(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` of `report_data` with what the files of its rows took here: "milliseconds" in a row, of a call with one
    input on the threads that there are, and "files" of {"label", "layers"}, layers with "microseconds" and what the
    export said of them. Raises InputError for a damaged file."""
    found: dict[str, dict[str, Any]] = {}

    def with_time(row: Mapping[str, Any]) -> dict[str, Any]:
        if row["file"] is None:
            return {**row}
        path = row["file"]["path"]
        if path not in found:
            status(f"{row['label']}: {path}")
            found[path] = {"label": row["label"], **_measured(path, row["file"]["layers"])}
        return {**row, "milliseconds": found[path]["milliseconds"]}

    tables = [{**table, "rows": [with_time(row) for row in table["rows"]]} for table in data["tables"]]
    status()
    return {**data, "tables": tables, "files": [*found.values()]}


def _measured(path: str, exported: Layers) -> dict[str, Any]:
    model = qdeploy.load_int_model(path)
    entry = model.inputs[0]
    x = np.zeros((1, *entry["shape"]), np.int64 if "vocabulary" in entry else np.float32)
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        model(x)
        seconds.append(time.perf_counter() - start)
    known = {(layer["member"], layer["name"]): layer for layer in exported}
    layers = [{**node, **known.get((node["member"], node["name"]), {})} for node in model.profile(x, CALLS)]
    return {"milliseconds": 1e3 * float(np.median(seconds)), "layers": layers}
