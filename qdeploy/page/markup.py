"""HTML in which every text is escaped: what a model file or a run calls its layers and classes is a stranger's text."""

from __future__ import annotations

from html import escape

from qdeploy.terminal import visible

VOID = ("img", "meta")  # elements without an end


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Children that are no Markup are escaped, None is left out, as are attributes that are None.

    `_` in the name of an attribute stands for `-`, one at its end for nothing (`class_`).
    """
    start = name + "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{start}>" if name in VOID else f"<{start}>{together(*children)}</{name}>")


def together(*children: object) -> Markup:
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(_text(child), quote=False)
            for child in children
            if child is not None
        )
    )


def _text(value: object) -> str:
    if isinstance(value, float):  # of a coordinate: a hundredth is less than a pixel
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return visible(str(value))
