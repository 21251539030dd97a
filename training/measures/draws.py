"""The draws of a measure, each of which is made once: what is finished outlives the process that made it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

# Takes the name of a draw, which is shown meanwhile, and the function that makes it; returns what that returns, which
# can be written as JSON, or what an earlier process kept of it.
Draws = Callable[[str, Callable[[], Any]], Any]


def anew(name: str, make: Callable[[], Any]) -> Any:
    """Keeps nothing."""
    return make()


def all_of(draws: Draws, name: str, count: int, make: Callable[[int], Any]) -> list[Any]:
    """Draws 0 to `count` - 1, as `make` makes them."""
    return [draws(f"{name} {number + 1} of {count}", partial(make, number)) for number in range(count)]
