"""Charts as inline SVG. Lines differ in dashes and points in shape, not in colour alone; a pointer that rests on a mark
shows its numbers. `title` and `text` are what a reader who cannot see it hears."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from qdeploy.page.axes import BOTTOM, HEIGHT, RIGHT, TOP, WIDTH, Axis, frame
from qdeploy.page.markup import Markup, tag

SHAPES = (  # around 0, 0
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "M-2.6-2.6h5.2v5.2h-5.2z",
    "M0-3.4L3.2 2.6H-3.2z",
    "M0-3.7L3.7 0L0 3.7L-3.7 0z",
    "M0 3.4L3.2-2.6H-3.2z",
    "M-2.8-2.8L2.8 2.8M-2.8 2.8L2.8-2.8",
)
STYLES = len(SHAPES)  # of lines in one chart
LONGEST = 44  # letters of a label
LETTER = 6.6  # the width of one, about
MAP = 260  # a side of a heat map
BANDS = 10  # shades of a heat map: each edge between two of them is a contour line


@dataclass(frozen=True)
class Line:
    """One of a chart; lines with one `style` look alike, and the first of them stands in the legend. `faint`: there are
    others of its kind. Where y is None or no finite number there is a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: int = 0
    points: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """Of `columns`: None is a place without a column. `spec` formats the values."""

    label: str
    values: Sequence[float | None]
    spec: str


def short(text: str, longest: int = LONGEST) -> str:
    """A name with its middle left out: layers differ at both ends."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}\u2026{text[-half:]}"


def drawing(title: str, text: str, *content: Markup, **size: object) -> Markup:
    head = tag("title", title), tag("desc", text)
    return tag("svg", *head, *content, role="img", aria_label=f"{title}. {text}", **size)


def fixed(title: str, text: str, height: float, *content: Markup) -> Markup:
    """Is drawn for WIDTH and scaled as a whole."""
    return drawing(title, text, *content, viewBox=f"0 0 {WIDTH} {height:g}")


def fluid(title: str, text: str, height: float, *content: Markup) -> Markup:
    """As wide as there is room: across, its places are percentages; letters keep their size."""
    return drawing(title, text, *content, width="100%", height=height)


def _percent(share: float) -> str:
    return f"{100 * share:.3f}".rstrip("0").rstrip(".") + "%"


def lines(title: str, text: str, found: Sequence[Line], x: Axis, y: Axis, mark: tuple[float, str] | None) -> Markup:
    """mark: a place on x where something changed, and what."""
    content = frame(x, y)
    if mark is not None:
        at = x.x(mark[0])
        content.append(tag("path", class_="mark", d=f"M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"))
        side = ("end", -4.0) if x.share(mark[0]) > 0.5 else (None, 4.0)
        place = {"x": at + side[1], "y": float(HEIGHT - BOTTOM - 6)}
        content.append(tag("text", mark[1], **place, class_=" ".join(filter(None, ("strong halo", side[0])))))
    for line in found:
        content += _line(line, x, y)
    legend, high = _legend(found)
    below = f"translate(0 {high})"
    return fixed(title, text, HEIGHT + high, *legend, tag("g", *content, transform=below if high else None))


def _line(line: Line, x: Axis, y: Axis) -> list[Markup]:
    path, shapes, pen = [], [], "M"
    for value, result in zip(line.x, line.y, strict=True):
        if result is None or not math.isfinite(result):
            pen = "M"
            continue
        path.append(f"{pen}{x.x(value):.1f} {y.y(result):.1f}")
        pen = "L"
        if line.points:
            said = tag("title", f"{line.label}: {y.text(result)} at {x.text(value)}")
            shapes.append(_point(x.x(value), y.y(result), line.style, said))
    faint = " faint" if line.faint else ""
    return [tag("path", tag("title", line.label), class_=f"line s{line.style}{faint}", d="".join(path)), *shapes]


def _point(x: float, y: float, style: int, *inside: Markup) -> Markup:
    return tag("path", *inside, class_=f"point s{style}", d=SHAPES[style], transform=f"translate({x:.1f} {y:.1f})")


def _legend(found: Sequence[Line]) -> tuple[list[Markup], int]:
    """And the height that it takes. One line needs none, as the caption names it; two stand on the line of the label of
    y, more in two columns above it."""
    styles: dict[int, Line] = {}
    for line in found:
        styles.setdefault(line.style, line)
    shown = [*styles.values()] if len(styles) > 1 else []
    if len(shown) > 2:
        places = [(WIDTH / 2 * (i % 2), 16.0 * (i // 2)) for i in range(len(shown))]
        high = 16 * -(-len(shown) // 2) + 8
    else:
        widths = [34 + LETTER * len(short(line.label, 22)) for line in shown]
        places = [(WIDTH - RIGHT - sum(widths[i:]), 0.0) for i in range(len(shown))]
        high = 0
    content: list[Markup] = []
    for line, (x, y) in zip(shown, places, strict=True):
        content.append(tag("path", class_=f"line s{line.style}", d=f"M{x:.1f} {y + 7:g}h20"))
        if line.points:
            content.append(_point(x + 10, y + 7, line.style))
        content.append(tag("text", short(line.label, 22), x=x + 25, y=y + 11, class_="strong"))
    return content, high


def bars(title: str, text: str, rows: Sequence[tuple[str, float, str]]) -> Markup:
    """One row each: its name and its number as text, a bar below them."""
    most = max((value for _, value, _ in rows), default=0.0) or 1.0
    content = []
    for i, (label, value, said) in enumerate(rows):
        y, share = 30.0 * i, _percent(max(value, 0.0) / most)
        content.append(tag("text", tag("title", label), short(label), x=0, y=y + 12, class_="strong"))
        content.append(tag("text", said, x="100%", y=y + 12, class_="end"))
        content.append(tag("rect", x=0, y=y + 17, width="100%", height=5, class_="track"))
        content.append(tag("rect", x=0, y=y + 17, width=share, height=5, class_="fill"))
    return fluid(title, text, 30 * len(rows), *content)


def columns(title: str, text: str, names: Sequence[str], panels: Sequence[Panel]) -> Markup:
    """Panels above each other, in each a column for every one of `names`, in their order. Panels begin at 0 and end at
    their largest value, which is written down."""
    top, high, gap = 16, 64, 22
    content = []
    wide = 1 / max(len(names), 1)
    for i, panel in enumerate(panels):
        base = float(top + high + i * (top + high + gap))
        most = max((value for value in panel.values if value is not None), default=0.0)
        content.append(tag("text", panel.label, x=0, y=base - high - 5, class_="strong"))
        content.append(tag("text", f"largest {most:{panel.spec}}", x="100%", y=base - high - 5, class_="end"))
        for j, (name, value) in enumerate(zip(names, panel.values, strict=True)):
            if value is not None and value > 0:
                tall = high * value / most
                place = {"x": _percent(j * wide), "width": _percent(wide * 0.8), "y": base - tall, "height": tall}
                content.append(tag("rect", tag("title", f"{name}: {value:{panel.spec}}"), class_="fill", **place))
        content.append(tag("line", class_="axis", x1=0, x2="100%", y1=base, y2=base))
    height = len(panels) * (top + high + gap)
    content.append(tag("text", "first", x=0, y=height - 7.0))
    content.append(tag("text", "last", x="100%", y=height - 7.0, class_="end"))
    return fluid(title, text, height, *content)


@dataclass(frozen=True)
class Point:
    label: str
    x: float
    y: float
    error: float | None = None
    named: bool = True  # its label stands beside it


def scatter(title: str, text: str, points: Sequence[Point], x: Axis, y: Axis) -> Markup:
    """Named points are filled; a label that would lie on another goes above or below its point."""
    content = frame(x, y)
    taken: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda point: point.named):  # the named ones on top
        at = x.x(point.x), y.y(point.y)
        said = f"{point.label}: {y.text(point.y)} at {x.text(point.x)}"
        content += _error(at[0], y, point.y, point.error)
        look = {"class_": "fill" if point.named else "other", "cx": at[0], "cy": at[1]}
        content.append(tag("circle", tag("title", said), r=4.5 if point.named else 3.5, **look))
    for point in sorted((point for point in points if point.named), key=lambda point: -point.y):
        content.append(_label(short(point.label, 26), x.x(point.x), y.y(point.y), taken))
    return fixed(title, text, HEIGHT, *content)


def _error(x: float, y: Axis, value: float, error: float | None) -> list[Markup]:
    if not error:
        return []
    low, high = (y.y(min(max(end, y.low), y.high)) for end in (value - error, value + error))
    return [tag("path", class_="error", d=f"M{x:.1f} {low:.1f}V{high:.1f}")]


def _label(text: str, x: float, y: float, taken: list[tuple[float, float, float]]) -> Markup:
    """Beside x, y at the first place that is free; `taken` has left, right and base line of those before."""
    width = LETTER * len(text)
    right = x + 8 + width <= WIDTH
    left = x + 8 if right else x - 8 - width
    for dy in (4, -8, 16, -20, 28, -32):
        if all(left > end or left + width < start or abs(y + dy - base) > 11 for start, end, base in taken):
            break
    taken.append((left, left + width, y + dy))
    place = {"x": left if right else left + width, "y": y + dy}
    return tag("text", text, class_="strong halo" if right else "strong halo end", **place)


@dataclass(frozen=True)
class Compared:
    """A row of `dots`: ours, filled, and what was published, hollow; None where there is none."""

    label: str
    value: float | None
    error: float | None = None
    other: float | None = None
    other_error: float | None = None


def dots(title: str, text: str, rows: Sequence[Compared], x: Axis) -> Markup:
    """A row each: its name on the left, both values on one axis on the right."""
    base = 20 * len(rows) + 4

    def at(value: float) -> str:
        return _percent(0.45 + 0.53 * min(max(x.share(value), 0.0), 1.0))

    content = [tag("line", class_="grid", x1=at(tick), x2=at(tick), y1=0, y2=base) for tick in x.ticks]
    for i, row in enumerate(rows):
        y = 20.0 * i + 12
        content.append(tag("text", tag("title", row.label), short(row.label, 24), x=0, y=y + 4, class_="strong"))
        for value, error, ours in ((row.other, row.other_error, False), (row.value, row.error, True)):
            if value is None:
                continue
            if error:
                ends = {"x1": at(value - error), "x2": at(value + error)}
                content.append(tag("line", class_="error" if ours else "axis", y1=y, y2=y, **ends))
            said = tag("title", f"{row.label}, {'here' if ours else 'published'}: {x.text(value)}")
            content.append(tag("circle", said, class_="fill" if ours else "other", cx=at(value), cy=y, r=4.0))
    content += [tag("text", x.text(tick), x=at(tick), y=base + 14.0, class_="middle") for tick in x.ticks]
    return fluid(title, text, base + 20, *content)


def heat(title: str, text: str, values: Sequence[Sequence[float | None]], edges: Sequence[float], key: str) -> Markup:
    """A map of shades, the first row at the bottom: stronger is more, a cross marks the middle. `edges`, BANDS + 1
    rising values, are the same for maps that are compared; all beyond is strongest, as is what is not finite."""
    rows, across = len(values), len(values[0])
    paths: dict[int, list[str]] = {}
    for i, row in enumerate(values):
        start = 0
        for band, equal in groupby(_band(value, edges) for value in row):
            wide = len([*equal])
            paths.setdefault(band, []).append(f"M{start} {rows - 1 - i}h{wide}v1h-{wide}z")
            start += wide
    scale = f"scale({MAP / across:.6g} {MAP / rows:.6g})"  # whole numbers in the paths: no seam between two shades
    content = [
        tag("path", class_="band", fill_opacity=_shade(band), d="".join(path), transform=scale)
        for band, path in sorted(paths.items())
    ]
    content.append(tag("path", class_="axis", d=f"M{MAP / 2 - 5} {MAP / 2}h10M{MAP / 2} {MAP / 2 - 5}v10"))
    return fixed(title, text, MAP + 4, *content, *_scale(edges, MAP + 16.0, key))


def _band(value: float | None, edges: Sequence[float]) -> int:
    if value is None or not math.isfinite(value):
        return BANDS - 1
    return min(max(sum(value >= edge for edge in edges) - 1, 0), BANDS - 1)


def _shade(band: int) -> float:
    return 0.05 + 0.95 * band / (BANDS - 1)


def _scale(edges: Sequence[float], x: float, key: str) -> list[Markup]:
    """What the shades mean, beside a map."""
    top, high = 18.0, (MAP - 18.0) / BANDS
    content = [tag("text", key, x=x, y=10.0)]
    for band in range(BANDS):
        place = {"x": x, "y": top + (BANDS - 1 - band) * high, "width": 12, "height": high}
        content.append(tag("rect", class_="band", fill_opacity=_shade(band), **place))
    content += [
        tag("text", f"{edge:.3g}", x=x + 18, y=min(max(top + (BANDS - i) * high + 4, top + 8), float(MAP)))
        for i, edge in enumerate(edges)
        if i % 2 == 0
    ]
    return content
