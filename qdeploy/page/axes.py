"""The frame of a chart: from values to places, ticks at round numbers, and what is written beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qdeploy.page.markup import Markup, tag

# A chart is drawn for a column of a page and keeps its shape, so that letters are legible on a telephone as well.
WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 38  # the margins: numbers, half a tick label, legend, ticks and label


@dataclass(frozen=True)
class Axis:
    """From `low` at 0 to `high` at 1. `spec` formats the ticks."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    spec: str = ",g"
    log: bool = False

    def share(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * self.share(value)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * self.share(value)

    def text(self, value: float) -> str:
        return format(value, self.spec)


def linear(label: str, values: Iterable[float], spec: str = ",g", from_zero: bool = False) -> Axis:
    """Around the finite ones of `values`, ending at ticks."""
    found = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(found), max(found)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = (low, low + 1) if from_zero else (low - abs(low) / 10 - 0.01, high + abs(high) / 10 + 0.01)
    step = _round_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [float(f"{i * step:.12g}") for i in range(first, last + 1)]
    return Axis(label, ticks[0], ticks[-1], ticks, spec)


def logarithmic(label: str, values: Iterable[float], spec: str = ",g") -> Axis:
    """Around the positive ones of `values`: a tick at every 1, 2 and 5, at powers of ten where these are many, and at
    equal distances where they are fewer than three."""
    found = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    low, high = min(found) / 1.15, max(found) * 1.15
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) <= 6:
            break
    if len(ticks) < 3:
        ticks = _between(low, high)
    every = max(1, math.ceil(len(ticks) / 6))
    return Axis(label, low, high, ticks[::every], spec, True)


def _between(low: float, high: float) -> list[float]:
    """Three to six round numbers."""
    step = _round_step((high - low) / 6)
    return [float(f"{i * step:.12g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= least * 0.999)


def frame(x: Axis, y: Axis) -> list[Markup]:
    """Both axes with their labels; a faint line at each tick of y."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    found = [tag("path", class_="grid", d=f"M{LEFT} {y.y(tick):.1f}H{right}") for tick in y.ticks]
    found += [_text(LEFT - 6, y.y(tick) + 4, y.text(tick), "end") for tick in y.ticks]
    found += [_text(x.x(tick), bottom + 15, x.text(tick), "middle") for tick in x.ticks]
    found += [tag("path", class_="axis", d=f"M{x.x(tick):.1f} {bottom}v4") for tick in x.ticks]
    found.append(tag("path", class_="axis", d=f"M{LEFT} {bottom}H{right}"))
    found.append(_text(right, HEIGHT - 5, x.label, "end"))
    found.append(_text(0, 11, y.label))
    return found


def _text(x: float, y: float, content: object, class_: str | None = None) -> Markup:
    return tag("text", content, x=float(x), y=float(y), class_=class_)
