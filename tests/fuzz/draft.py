"""A model file taken apart, so that every level of it can be changed and put together again.

A `Draft` is the header, the graph and the data. Objects are lists of pairs, which hold keys in any order and twice.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Slot = tuple[list, int]  # where a value stands: slot[0][slot[1]]


class Object(list):
    """An object of JSON: a list of [key, value]."""

    def __contains__(self, key: object) -> bool:
        return any(pair[0] == key for pair in self)

    def get(self, key: str) -> Any:
        return next(pair[1] for pair in self if pair[0] == key)

    def set(self, key: str, value: object) -> None:
        for pair in self:
            if pair[0] == key:
                pair[1] = value
                return
        self.append([key, value])

    def keys(self) -> list[str]:
        return [pair[0] for pair in self]

    def values(self) -> list[Any]:
        return [pair[1] for pair in self]


class Raw(str):
    """Text that stands in the JSON as it is."""


class GraphText:
    """Stands in the header for the text of the graph."""


@dataclass
class Spelling:
    """How JSON is written, its meaning the same: the share of tokens with white space before them, of characters that
    are escaped, of floats in unusual digits."""

    spaces: float = 0.0
    escapes: float = 0.0
    digits: float = 0.0
    rng: random.Random = field(default_factory=random.Random)


@dataclass
class Draft:
    header: Object
    graph: Object
    data: bytearray
    spelling: Spelling = field(default_factory=Spelling)
    around_graph: tuple[str, str] = ("", "")  # text before and behind the JSON of the graph

    def to_bytes(self) -> bytes:
        before, behind = self.around_graph
        graph = before + write(self.graph, self.spelling) + behind
        text = encoded(write(self.header, self.spelling, graph))
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + bytes(self.data)


def read(content: bytes) -> Draft:
    """The draft of a valid file."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = parse(content[8:end].decode())
    graph = parse(header.get("__metadata__").get("graph"))
    header.get("__metadata__").set("graph", GraphText())
    return Draft(header, graph, bytearray(content[end:]))


def parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=lambda pairs: Object([key, value] for key, value in pairs))


def copied(tree: Any) -> Any:
    if isinstance(tree, Object):
        return Object([key, copied(value)] for key, value in tree)
    return [copied(value) for value in tree] if isinstance(tree, list) else tree


def slots(tree: object) -> Iterator[Slot]:
    """Where every value in the tree stands."""
    if isinstance(tree, list):
        for i, entry in enumerate(tree):
            slot = (entry, 1) if isinstance(tree, Object) else (tree, i)
            yield slot
            yield from slots(slot[0][slot[1]])


def containers(tree: object) -> Iterator[list]:
    """Every object and array of the tree, itself first."""
    if isinstance(tree, list):
        yield tree
        for value in tree.values() if isinstance(tree, Object) else tree:
            yield from containers(value)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def write(tree: object, spelling: Spelling, graph_text: str = "") -> str:
    """The tree as JSON; `graph_text` stands where the header holds GraphText."""
    parts: list[str] = []
    _write(tree, spelling, graph_text, parts.append)
    return "".join(parts)


def _write(tree: object, spelling: Spelling, graph_text: str, add: Any) -> None:
    if isinstance(tree, Object):
        _write_all("{", "}", [(key, value) for key, value in tree], spelling, graph_text, add)
    elif isinstance(tree, list):
        _write_all("[", "]", [(None, value) for value in tree], spelling, graph_text, add)
    elif isinstance(tree, Raw):
        add(tree)
    elif isinstance(tree, GraphText):
        add(_string(graph_text, spelling))
    elif isinstance(tree, str):
        add(_string(tree, spelling))
    elif isinstance(tree, float):
        add(_float(tree, spelling))
    else:
        add(json.dumps(tree))


def _write_all(opening: str, closing: str, pairs: list, spelling: Spelling, graph_text: str, add: Any) -> None:
    add(opening)
    for i, (key, value) in enumerate(pairs):
        add("," if i else "")
        add(_space(spelling))
        if key is not None:
            _write(key, spelling, graph_text, add)
            add(_space(spelling) + ":" + _space(spelling))
        _write(value, spelling, graph_text, add)
        add(_space(spelling))
    add(closing)


def _space(spelling: Spelling) -> str:
    if spelling.spaces and spelling.rng.random() < spelling.spaces:
        return spelling.rng.choice([" ", "\t", "\n", "\r", "  \r\n"])
    return ""


def _string(text: str, spelling: Spelling) -> str:
    if not spelling.escapes:
        return json.dumps(text, ensure_ascii=False)
    escaped = [
        _escaped(c) if spelling.rng.random() < spelling.escapes else json.dumps(c, ensure_ascii=False)[1:-1]
        for c in text
    ]
    return f'"{"".join(escaped)}"'


def _escaped(character: str) -> str:
    if character == "/":
        return "\\/"
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def _float(value: float, spelling: Spelling) -> str:
    text = json.dumps(value)
    if not spelling.digits or spelling.rng.random() >= spelling.digits:
        return text
    spellings = [f"{value:.17e}", f"{value:.30E}", f"{value:.40f}" if abs(value) > 1e-6 else text]
    spellings += [text + "e0", text + "E-00", text + "000"] if "." in text and "e" not in text else []
    spellings += [text.removesuffix(".0"), text.removesuffix(".0") + "e+0"] if "e" not in text else []
    return spelling.rng.choice(spellings)
