"""Rows of values as aligned columns of text."""

from __future__ import annotations

import re


def columns(rows: list[dict]) -> str:
    """Dictionaries as a table; the keys of the first are the header. Numbers to the right, texts to the left; None and
    what a row has not are dashes."""
    padded = []
    for header in rows[0]:
        cells = [_cell(row.get(header)) for row in rows]
        width = max(map(len, [header, *cells]))
        numbers = all(re.fullmatch(r"-|-?[\d,.]+(%|x| ms| MiB)?", cell) for cell in cells)
        padded.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in [header, *cells]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


def percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)):
        return "x".join(str(v) for v in value)
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)
