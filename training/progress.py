"""What people see of a run while it goes on: a bar on a terminal, a few lines where standard error is a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_fabric import Fabric

from qdeploy.terminal import Advance, note, on_terminal, progress
from qdeploy.training.config import Config

EVERY = 30.0  # seconds between the lines of something long


class Seldom:
    """A line of what goes on, every 30 seconds."""

    def __init__(self) -> None:
        self._due = time.perf_counter() + EVERY

    def __call__(self, text: str) -> None:
        if time.perf_counter() >= self._due:
            note(text)
            self._due = time.perf_counter() + EVERY


@contextmanager
def counted(text: str, total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Yields what to call after so many more of `total`, which are images or texts (`what`)."""
    done, say = 0, Seldom()
    with progress(text, total) as advance:

        def seen(images: int) -> None:
            nonlocal done
            done += images
            advance(None, images)
            if not on_terminal():
                say(f"{text}: {done:,} of {total:,} {what}")

        yield seen


@contextmanager
def progress_of_run(config: Config, start: int, fabric: Fabric) -> Iterator[Progress]:
    """A bar on a terminal, else one line for each evaluation and some for a long one; from the first process alone."""
    if not fabric.is_global_zero:
        yield Progress(config, fabric)
    elif not on_terminal():
        yield Progress(config, fabric, say=note, seldom=Seldom())
    else:
        with progress(f"seed {config.seed}", config.updates, start, keep=True) as advance:
            yield Progress(config, fabric, advance)


class Progress:
    """Counts the images of a run and the time it waits for them; says both with what the run tells."""

    def __init__(
        self,
        config: Config,
        fabric: Fabric,
        advance: Advance = lambda text=None, steps=1: None,
        say: Callable[[str], None] = lambda text: None,
        seldom: Callable[[str], None] = lambda text: None,
    ):
        self._config, self._processes = config, fabric.world_size
        self._advance, self._say, self._say_seldom = advance, say, seldom
        self._begin()

    def _begin(self) -> None:
        self._began, self._images, self._evaluated, self._waited = time.perf_counter(), 0, 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the time until images are there."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def updated(self, images: int) -> None:
        """After an update with so many images of this process."""
        self._images += images * self._processes
        self._advance()

    def evaluated(self, images: int, total: int) -> None:
        """After so many images more, of the `total` ones of an evaluation in all processes."""
        self._images += images * self._processes
        self._evaluated = min(self._evaluated + images * self._processes, total)
        config, done = self._config, f"{self._evaluated:,} of {total:,}"
        text = f"seed {config.seed} evaluates: {done} {config.what}, {self.speed()}"
        self._advance(text, 0)
        self._say_seldom(text)

    def recorded(self, record: dict) -> None:
        """After an evaluation."""
        config = self._config
        mode = f"{config.bits} bit" if record["quantized"] and isinstance(config.bits, int) else "float"
        text = f"seed {config.seed} update {record['update']} {mode} loss {record['loss']:.4f}"
        text += f" validation {record['validation']:.4f} {config.test_domain} {record['test']:.4f}"
        self._advance(text, 0)  # no longer, or the bar has no room
        self._say(f"{text}, {self.speed()}")
        self._begin()

    def measured(self) -> dict[str, float]:
        """Training and evaluation since the last record, or since this process began: what of a record depends on the
        machine. `images_per_second` may be texts; `waiting` is the share of the seconds until they were there."""
        seconds = time.perf_counter() - self._began
        rate, waiting = self._images / seconds, self._waited / seconds
        return {"seconds": round(seconds, 3), "images_per_second": round(rate, 3), "waiting": round(waiting, 4)}

    def speed(self) -> str:
        """That in words."""
        measured = self.measured()
        rate, waiting = measured["images_per_second"], measured["waiting"]
        return f"{rate:,.0f} {self._config.what}/s, {waiting:.0%} waiting for data"
