"""Where an operator stands in the source of a network, and what is said where it cannot be lowered."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np

from qdeploy.errors import ExportError
from qdeploy.exporter.elements import Value, value_of
from qdeploy.exporter.layers import Layer
from qdeploy.graph import Shape

L = TypeVar("L", bound=Layer)


class Obstacle(ExportError):
    """What stands in the way of one operator."""

    def __init__(self, expected: str, got: str, site: Site):
        super().__init__(f"expected {expected}, got {got} - at {site.noun} `{site.name}`{site.detail}")
        self.expected, self.got, self.noun, self.name = expected, got, site.noun, site.name


class Missing(Layer):
    """In place of a layer that the engine lacks, so that what follows is looked at as well."""

    op = "missing"


class Unknown:
    """In place of a value that is no layer's: what it goes into is missing too, for no reason of its own."""


class Site:
    """What a rule needs of an operator besides its arguments. A front end derives from it."""

    noun: ClassVar[str]  # what has the name: a module, a node
    layers: list[Layer]  # of the network, so far

    @property
    def name(self) -> str:
        """Of the layers that the operator becomes."""
        raise NotImplementedError

    @property
    def tensor(self) -> Hashable:
        """The operator's result, as the source calls it."""
        raise NotImplementedError

    @property
    def detail(self) -> str:
        """Behind the name in an error: the operator."""
        raise NotImplementedError

    def fail(self, expected: str, got: str) -> NoReturn:
        raise Obstacle(expected, got, self)

    def layer(
        self,
        kind: type[L],
        inputs: list[Layer],
        shape: Shape,
        places: np.ndarray | None = None,
        **fields: Any,
    ) -> L:
        """A layer whose output is the result of the operator; `places` says which element is where in it."""
        value = Value(self.tensor) if places is None else value_of(self.tensor, places, shape)
        if value is None:
            self.fail("an operator that keeps the batch apart", "one that mixes it with other dimensions")
        layer = kind(self.name, inputs, shape, value, **fields)
        self.layers.append(layer)
        return layer


def all_of(obstacles: list[Obstacle], operator: str) -> ExportError:
    """One error, one line, for all of them: each kind once, with its places. `operator`: what is expected of one."""
    kinds: dict[tuple[str, str], list[Obstacle]] = {}
    for obstacle in obstacles:
        kinds.setdefault((obstacle.expected, obstacle.got), []).append(obstacle)
    (expected, got), alike = next(iter(kinds.items()))
    if len(obstacles) == 1:
        return ExportError(str(obstacles[0]))
    if len(kinds) == 1:
        return ExportError(f"expected {expected}, got {got} - at {_places(alike)}")
    lines = [
        f"({i}) {got} at {_places(alike)}" + ("" if expected == operator else f" instead of {expected}")
        for i, ((expected, got), alike) in enumerate(kinds.items(), 1)
    ]
    return ExportError(f"expected {operator}, got {len(kinds)} things that it lacks: {'; '.join(lines)}")


def _places(obstacles: list[Obstacle]) -> str:
    noun, names = obstacles[0].noun, [f"`{name}`" for name in dict.fromkeys(x.name for x in obstacles)]
    if len(names) == 1:
        return f"{noun} {names[0]}" + (f" ({len(obstacles)} times)" if len(obstacles) > 1 else "")
    rest = len(obstacles) - len(names[:3])
    return f"{noun}s {', '.join(names[:3])}" + (f" and {rest} more" if rest else "")
