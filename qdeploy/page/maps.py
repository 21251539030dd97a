"""Maps: the loss on a plane around the weights, and where in an image a network looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qdeploy.page.charts import BANDS, heat
from qdeploy.page.document import Column, chart, charts, number, paragraph
from qdeploy.page.images import image
from qdeploy.page.markup import Markup, tag, together
from qdeploy.page.runs import Run, first_seeds, title_of

TOP = (
    0.9  # of the losses, in order: what is higher is strongest, so that one steep network does not make the others pale
)
LARGEST = 112  # pixels of a side: larger images are made smaller


def surfaces(runs: Sequence[Run]) -> Markup | None:
    """One map for each row and held-out domain, all in the same shades."""
    found = first_seeds(runs, "surface")
    if not found:
        return None
    grids = {title: _grid(measure) for title, (_, measure) in found.items()}
    edges = _edges(np.concatenate([grid.ravel() for grid in grids.values()]))
    return charts(*(_surface(title, found[title][1], grid, edges) for title, grid in grids.items()))


def _grid(measure: Mapping[str, Any]) -> np.ndarray:
    """[b, a]; what is not known is nan."""
    losses = [np.nan if row["loss"] is None else row["loss"] for row in measure["table"]]
    return np.reshape(np.asarray(losses, np.float64), (measure["points"], measure["points"])).T


def _edges(losses: np.ndarray) -> list[float]:
    """Between the shades; each is the same factor above the one before."""
    known = losses[np.isfinite(losses) & (losses > 0)]
    low, high = (float(known.min()), float(np.quantile(known, TOP))) if known.size else (1.0, 1.0)
    return np.geomspace(low, max(high, 1.001 * low), BANDS + 1).tolist()


def _surface(title: str, measure: Mapping[str, Any], grid: np.ndarray, edges: Sequence[float]) -> Markup:
    known = grid[np.isfinite(grid)]
    low, high = (known.min(), known.max()) if known.size else (None, None)
    said = (number(value, ".3g") for value in (measure["loss"], low, high))
    text = "loss {} at the weights, {} to {} on the map".format(*said)
    places = sorted({row["a"] for row in measure["table"]})
    columns: list[Column] = [("b \\ a", ".2f"), *((f"{a:.2f}", ".3g") for a in places)]
    numbers = [(b, *line) for b, line in zip(reversed(places), reversed(grid.tolist()), strict=True)]
    caption = together(tag("strong", title), f": {text}.")
    return chart(heat(f"Loss around {title}", f"{text}.", grid.tolist(), edges, "loss"), caption, columns, numbers)


def gradcam(runs: Sequence[Run]) -> Markup | None:
    """Images of the held-out domain, each beside itself as the network sees it: bright where it looks."""
    groups = [_group(run, measure) for run, measure in first_seeds(runs, "gradcam").values()]
    text = "GradCAM: the right one of a pair is bright where the network looks for the class that it says."
    return together(paragraph(text), *groups) if groups else None


def _group(run: Run, measure: Mapping[str, Any]) -> Markup:
    rows = measure["table"]
    pairs = [_pair(content, row) for content, row in zip(measure["images"], rows, strict=True)]
    right = sum(row["label"] == row["predicted"] for row in rows)
    about = tag("span", f": {right} of {len(rows)} right, stage {measure['stage']}", class_="muted")
    return tag("div", tag("h3", title_of(run), about), tag("div", *pairs, class_="images"))


def _pair(content: Mapping[str, Any], row: Mapping[str, Any]) -> Markup:
    pixels = _smaller(np.asarray(content["pixels"], np.float64).transpose(1, 2, 0))
    where = _smaller(np.asarray(content["map"], np.float64)[:, :, None])
    said = f"{row['domain']}: class {row['label']}"
    verdict = "right" if row["label"] == row["predicted"] else f"taken for {row['predicted']}"
    shown = (
        image(_levels(pixels), f"An image of {said}."),
        image(_levels(_dimmed(pixels, where)), f"Where it looks: {verdict}."),
    )
    return tag("figure", tag("div", *shown, class_="pair"), tag("figcaption", f"{said}, {verdict}"))


def _dimmed(pixels: np.ndarray, where: np.ndarray) -> np.ndarray:
    return pixels * (0.2 + 0.8 * where)


def _levels(pixels: np.ndarray) -> np.ndarray:
    grey = pixels if pixels.shape[2] == 3 else pixels[:, :, :1].repeat(3, axis=2)
    return np.rint(np.clip(grey, 0, 255)).astype(np.uint8)


def _smaller(pixels: np.ndarray) -> np.ndarray:
    """Means of blocks, so that no side is longer than LARGEST; a rest at the edges is cut off."""
    block = -(-max(pixels.shape[:2]) // LARGEST)
    height, width = (size // block for size in pixels.shape[:2])
    blocks = pixels[: height * block, : width * block].reshape(height, block, width, block, pixels.shape[2])
    return blocks.mean((1, 3))
