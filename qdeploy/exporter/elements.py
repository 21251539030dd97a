"""Where the elements of an activation are: in memory, and in the tensors of the float network that hold them.

Element number row*channels + channel is the one of docs/format.md; that of image b has b times the elements of an image
more. What moves elements is run on these numbers, of a batch of BATCH images, and says where everything went.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from qdeploy.errors import ExportError
from qdeploy.graph import Shape

BATCH = 2  # with one image it would not show where the batch is
MOST_NUMBERED = 2**26  # elements, 512 MB of numbers


def numbered(shape: Shape) -> np.ndarray:
    """The element numbers of BATCH images of an activation of this shape, int64 [BATCH, *shape]."""
    count = BATCH * math.prod(shape)
    if count > MOST_NUMBERED:
        raise ExportError(
            f"expected at most {MOST_NUMBERED // BATCH} elements to move, got {list(shape)} - at the network"
        )
    numbers = np.arange(count)
    if len(shape) != 3:
        return numbers.reshape(BATCH, *shape)
    return numbers.reshape(BATCH, *shape[1:], shape[0]).transpose(0, 3, 1, 2)


def in_order_of_torch(rows: np.ndarray, shape: Shape) -> np.ndarray:
    """[rows, channels] as an array of this shape: [C, H, W], [T, D] or [F]."""
    if len(shape) != 3:
        return rows.reshape(shape)
    return rows.reshape(*shape[1:], shape[0]).transpose(2, 0, 1)


def channel_axis(shape: Sequence[int]) -> int:
    return 0 if len(shape) == 3 else len(shape) - 1


def with_channels(shape: Shape, channels: int) -> Shape:
    axis = channel_axis(shape)
    return (*shape[:axis], channels, *shape[axis + 1 :])


@dataclass(frozen=True)
class Value:
    """The tensor of the float network that holds a layer's output.

    tensor: as the network's source calls it, a node of the trace for example.
    source: by element number where it is among the `places` that the tensor has for one image; None: [N, *shape].
    outer: the product of the sizes before the batch: 1, or T of a tensor [T, N, D].
    """

    tensor: Hashable
    source: np.ndarray | None = None
    places: int = 0
    outer: int = 1

    def read(self, values: np.ndarray, shape: Shape) -> np.ndarray:
        """The layer's output, of this shape, from the values of the tensor: [N, *shape]."""
        if self.source is None:
            return values.reshape(-1, *shape)
        count = values.size // self.places
        flat = np.moveaxis(values.reshape(self.outer, count, -1), 1, 0).reshape(count, -1)[:, self.source]
        if len(shape) != 3:
            return flat.reshape(count, *shape)
        return flat.reshape(count, *shape[1:], shape[0]).transpose(0, 3, 1, 2)

    def of(self, elements: np.ndarray, shape: Shape) -> Value:
        """That of a layer which has these `elements` of one whose output has this shape and value."""
        source, places = self.source, self.places
        if source is None:
            source, places = places_of(numbered(shape)[0], math.prod(shape)), math.prod(shape)
        return Value(self.tensor, source[elements.reshape(-1)], places, self.outer)


def places_of(index: np.ndarray, count: int) -> np.ndarray:
    """By element number the last place of `index` that holds it."""
    places = np.zeros(count, np.int64)
    places[index.reshape(-1)] = np.arange(index.size)
    return places


def value_of(tensor: Hashable, index: np.ndarray, shape: Shape) -> Value | None:
    """That of a layer of this shape whose elements are in the tensor as `index`, of a whole batch, says; None where the
    batch is no dimension of the tensor."""
    count = math.prod(shape)
    sizes = around_batch(index.reshape(-1) // count)
    if sizes is None:
        return None
    outer, inner = sizes
    first = index.reshape(outer, BATCH, inner)[:, 0]
    return Value(tensor, places_of(first, count), outer * inner, outer)


def around_batch(images: np.ndarray) -> tuple[int, int] | None:
    """The sizes before and behind the batch where these are the images, in order of memory; None where the batch is no
    dimension or not in order."""
    inner = int(np.argmax(images != images[0]))
    if inner == 0 or images.size % (BATCH * inner):
        return None
    in_order = (images.reshape(-1, BATCH, inner) == np.arange(BATCH)[:, None]).all()
    return (images.size // (BATCH * inner), inner) if in_order else None
