"""What people see of a run: values in aligned columns, a line or a bar that shows progress."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

Status = Callable[[str], None]  # takes what goes on now, as `status` does


class Advance(Protocol):
    """Call it after `steps` more; `text` replaces the one before."""

    def __call__(self, text: str | None = None, steps: int = 1, /) -> None: ...


def printable(text: str) -> str:
    """`visible` with escapes for what the encoding of standard output does not have, too."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return visible(text).encode(encoding, "backslashreplace").decode(encoding)


def visible(text: str) -> str:
    """`text` as one line that is safe to show: escapes (\\x9b, \\u202e) stand for what is no visible character, such as
    those with which commands to a terminal begin."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def write(text: str = "") -> None:
    """Print on standard output, each line as a `printable` one."""
    print("\n".join(map(printable, text.split("\n"))))


def note(text: str) -> None:
    """One line on standard error. It stops nothing: one that cannot be written is lost."""
    with suppress(OSError, ValueError):  # ValueError: it is closed
        if sys.stderr is not None:  # else `print` would take standard output
            print(printable(text), file=sys.stderr, flush=True)


def columns(rows: Sequence[Mapping[str, Any]]) -> str:
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
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else printable(str(value))


def status(text: str = "") -> None:
    """One line on the terminal that the next one overwrites; nothing where stderr is a file. "" clears the line."""
    with suppress(OSError):
        if on_terminal():
            print(f"\r\x1b[K{printable(text)}", end="", file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether there is somebody to see standard error now."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


@contextmanager
def progress(text: str, total: int | None, done: int = 0, keep: bool = False) -> Iterator[Advance]:
    """Yields what to call after each step of `total` (None: not known), after the first `done`.

    On a terminal it draws a bar where there is rich, else a counter; nothing where stderr is a file. `keep`: the bar
    stays when all is done.
    """
    if not on_terminal():
        yield lambda text=None, steps=1: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        with _counter(text, total, done) as advance:
            yield advance
        return
    description, rate = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rate]}")
    shown = (description, BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    # With rich's own standard output nobody would know the encoding any more.
    with Progress(*shown, console=Console(stderr=True), transient=not keep, redirect_stdout=False) as bar:
        task = bar.add_task(printable(text), total=total, completed=done, rate="")
        began, made = time.perf_counter(), 0

        def advance_bar(text: str | None = None, steps: int = 1, /) -> None:
            nonlocal made
            made += steps
            new_text = None if text is None else printable(text)
            bar.update(task, advance=steps, description=new_text, rate=f"{made / (time.perf_counter() - began):.1f}/s")

        yield advance_bar


@contextmanager
def _counter(text: str, total: int | None, done: int) -> Iterator[Advance]:
    def advance(new_text: str | None = None, steps: int = 1, /) -> None:
        nonlocal text, done
        text, done = new_text or text, done + steps
        status(f"{text}: batch {done}{f' of {total}' if total else ''}")

    yield advance
    status()
