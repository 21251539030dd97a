"""What a network takes that reads text: token ids, and a mask that says where each text ends."""

from __future__ import annotations

from typing import Any

import numpy as np

from qdeploy.errors import InputError


class TextInput:
    """The input of a network of texts of at most `longest` tokens; `variable`: of fewer as well."""

    def __init__(self, longest: int, vocabulary: int, variable: bool) -> None:
        self.longest = longest
        self.vocabulary = vocabulary
        self.variable = variable

    def checked(self, ids: Any, mask: Any = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Token ids, dense int32 [N, T], and the length of each text, int64 [N]; None where all are the longest.

        ids: int32 or int64 [N, T]. mask: [N, T], ones, at least one, and then zeros; None: no text ends before T.
        Ids where the mask is 0 are never read. Raises InputError for any others.
        """
        self._check_ids(ids)
        lengths = np.full(len(ids), ids.shape[1])
        if mask is not None:
            lengths = self._lengths(mask, ids.shape)
        exists = np.arange(ids.shape[1]) < lengths[:, None]
        wrong = ids[exists & ((ids < 0) | (ids >= self.vocabulary))]
        if wrong.size:
            raise InputError(f"expected token ids from 0 to {self.vocabulary - 1}, got {wrong[0]} - at the input")
        return np.ascontiguousarray(ids, np.int32), lengths if self.variable else None

    def _check_ids(self, ids: Any) -> None:
        sizes = f"[N, T] with T from 1 to {self.longest}" if self.variable else f"[N, {self.longest}]"
        expected = f"int32 or int64 {sizes}"
        if not isinstance(ids, np.ndarray):
            raise InputError(f"expected {expected}, got {type(ids).__name__} - at the input")
        fewest = 1 if self.variable else self.longest
        fits = ids.ndim == 2 and fewest <= ids.shape[1] <= self.longest
        if not fits or ids.dtype not in (np.int32, np.int64):
            raise InputError(f"expected {expected}, got {ids.dtype} {list(ids.shape)} - at the input")
        if np.ma.is_masked(ids):
            raise InputError("expected token ids without masked elements, got some - at the input")

    def _lengths(self, mask: Any, shape: tuple[int, ...]) -> np.ndarray:
        if not self.variable:
            raise InputError("expected no mask for texts of one length, got one - at the mask")
        if not isinstance(mask, np.ndarray) or mask.shape != shape:
            got = list(mask.shape) if isinstance(mask, np.ndarray) else type(mask).__name__
            raise InputError(f"expected a mask of shape {list(shape)}, got {got} - at the mask")
        lengths = (mask == 1).sum(axis=1)
        fits = (mask == (np.arange(shape[1]) < lengths[:, None])).all(axis=1) & (lengths > 0)
        if not fits.all():
            raise InputError(
                f"expected ones, at least one, and then zeros, got others - at text {fits.argmin()} of the mask"
            )
        return lengths
