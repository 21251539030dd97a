"""A whole page, and what stands on it: key figures, sections, tables, charts with the table behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources

import qdeploy
from qdeploy.page.markup import Markup, tag, together

# Nothing is loaded and nothing runs, whatever the texts are.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
Column = tuple[str, str]  # its header, and the format of its numbers, which stand to the right; "": texts
Row = Sequence[object]


def page(kind: str, title: str, figures: Sequence[tuple[str, str]], *content: Markup | None) -> str:
    """A file of its own: `figures` are (value, what it is), the first thing that is read."""
    style = resources.files(__package__).joinpath("style.css").read_text()
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} - {kind}"),
        tag("style", Markup(style)),
    )
    top = tag("header", tag("p", kind, class_="kind"), tag("h1", title), _figures(figures))
    foot = tag("footer", f"Written by qdeploy {qdeploy.__version__}. Nothing on this page is loaded from elsewhere.")
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", top, tag("main", *content), foot), lang="en") + "\n"


def _figures(figures: Sequence[tuple[str, str]]) -> Markup | None:
    """The values, each above what it is; read aloud the other way round."""
    entries = [tag("div", tag("dt", name), tag("dd", value)) for value, name in figures]
    return tag("dl", *entries, class_="figures") if entries else None


def section(title: str, *content: object, anchor: str | None = None) -> Markup:
    return tag("section", tag("h2", title), *content, id=anchor)


def paragraph(*content: object) -> Markup:
    return tag("p", *content)


def warnings(texts: Sequence[str]) -> Markup | None:
    """Why the figures may say little."""
    return tag("ul", *(tag("li", text) for text in texts), class_="warnings") if texts else None


def charts(*figures: Markup | None) -> Markup:
    """Side by side where there is room."""
    return tag("div", *figures, class_="charts")


def chart(
    drawing: Markup, caption: object, columns: Sequence[Column], rows: Sequence[Row], wide: bool = False
) -> Markup:
    """A drawing, what it shows, and its numbers for those who cannot see it or want them. wide: as two others."""
    numbers = tag("details", tag("summary", "Numbers"), table("Numbers of the chart", columns, rows))
    return tag("figure", drawing, tag("figcaption", caption), numbers, class_="wide" if wide else None)


def table(name: str, columns: Sequence[Column], rows: Sequence[Row]) -> Markup:
    """Scrolls inside itself where it is wider than the page. The first cell of a row names it; `name` is read aloud."""
    head = tag("tr", *(tag("th", title, scope="col", class_=_side(spec)) for title, spec in columns))
    body = [
        tag("tr", *(_cell(value, spec, i == 0) for i, (value, (_, spec)) in enumerate(zip(row, columns, strict=True))))
        for row in rows
    ]
    inside = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", inside, class_="scroll", tabindex=0, role="region", aria_label=name)


def _cell(value: object, spec: str, names_row: bool) -> Markup:
    content = value if isinstance(value, Markup) else _shown(number(value, spec))
    return tag("th", content, scope="row", class_=_side(spec)) if names_row else tag("td", content, class_=_side(spec))


def _shown(text: str) -> object:
    return tag("span", text, class_="muted") if text == "-" else text


def _side(spec: str) -> str | None:
    return "number" if spec else None


def number(value: object, spec: str) -> str:
    """Of None and of what is no finite number a dash; texts stay."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "-"
    return format(value, spec) if isinstance(value, (int, float)) else str(value)


def large(value: float) -> str:
    """A count in three digits: 3.98 M."""
    for power, unit in ((9, " G"), (6, " M"), (3, " k")):
        if value >= 0.9995 * 10**power:
            return f"{value / 10**power:#.3g}".rstrip(".") + unit
    return f"{value:g}"


def meter(share: float, text: str) -> Markup:
    """A number of a table with a bar that shows how much it is of the largest."""
    width = tag("span", class_="bar", style=f"width:{4 * share:.2f}em")
    return together(tag("span", width, class_="meter", aria_hidden="true"), text)
