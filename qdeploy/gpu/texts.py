"""A model file on an NVIDIA GPU whose network reads token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from qdeploy.errors import InputError
from qdeploy.gpu.model import GpuModel
from qdeploy.graph import Output

TOKENS_STEP = 64


class GpuTextModel(GpuModel):
    """As `qdeploy.TextModel`, with tensors on a GPU. Every text of a batch takes the time of T tokens.

    There is a CUDA graph for each number of texts and each T, which is rounded up to a multiple of TOKENS_STEP.
    """

    @property
    def inputs(self) -> list[dict]:
        """One entry: `shape` of the longest text, `dtype`, `layouts` accepted, `vocabulary` (ids are below it), and
        `variable`: whether texts may be shorter."""
        text = {"vocabulary": self._graph.vocabulary, "variable": self._graph.variable}
        return [super().inputs[0] | text | {"layouts": ["i32 [N, T]", "i64 [N, T]"]}]

    @overload  # type: ignore[override]  # a mask goes with ids
    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Output: ...
    @overload
    def __call__(
        self, ids: Tensor, mask: Tensor | None = None, *, taps: Sequence[str]
    ) -> tuple[Output, dict[str, Tensor]]: ...
    def __call__(
        self, ids: Tensor, mask: Tensor | None = None, taps: Sequence[str] = ()
    ) -> Output | tuple[Output, dict[str, Tensor]]:
        """Run a batch of any size; the check of the ids waits for the GPU.

        ids: on this device, int32 or int64 [N, T]; of a network of texts of any length T is at most that of the file,
            else exactly.
        mask: where texts have any length: [N, T], in each row ones, at least one, and then zeros; None: all have T.
        taps: as of `GpuModel`.
        Returns what `GpuModel` does. Rows of a text at and beyond its length are 0. What stands in `ids` there, T and
        the other texts of a batch never change a bit.
        Raises InputError for any other dtype, shape or device, an id that the vocabulary does not have, a mask with
        holes, or an unknown tap.
        """
        texts = self._packed(ids, mask)
        if not len(taps):
            return self._first_rows(super().__call__(texts), ids.shape[1])
        (output, tapped), steps = super().__call__(texts, taps), self._steps()
        cut = {name: steps[name].first_rows(value, ids.shape[1]) for name, value in tapped.items()}
        return self._first_rows(output, ids.shape[1]), cut

    def _first_rows(self, output: Output, tokens: int) -> Output:
        ends = self._programs[0].ends
        if isinstance(output, list):
            return [step.first_rows(y, tokens) for step, y in zip(ends, output, strict=True)]
        return ends[0].first_rows(output, tokens)

    def predict(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The class of each text, int64 [N]. Arguments as of a call."""
        return super().predict(self._packed(ids, mask))

    def profile(self, ids: Tensor, mask: Tensor | None = None) -> list[dict]:
        """As of `GpuModel`."""
        return super().profile(self._packed(ids, mask))

    def tune(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """As of `GpuModel`."""
        super().tune(self._packed(ids, mask))

    def _check(self, images: Tensor) -> None:
        """Packed texts have been checked."""

    def _packed(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """The ids of each text, zeros behind them, and its length, i32 [N, tokens + 1]."""
        self._check_ids(ids)
        lengths = torch.full((len(ids),), ids.shape[1], device=self.device)
        if mask is not None:
            lengths = self._lengths(mask, ids.shape)
        exists = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        vocabulary = self._graph.vocabulary or 0
        wrong = ids[exists & ((ids < 0) | (ids >= vocabulary))]
        if len(wrong):
            raise InputError(f"expected token ids from 0 to {vocabulary - 1}, got {int(wrong[0])} - at the input")
        tokens = min(self._graph.input_shape[0], -(-ids.shape[1] // TOKENS_STEP) * TOKENS_STEP)
        packed = torch.zeros((len(ids), tokens + 1), dtype=torch.int32, device=self.device)
        packed[:, : ids.shape[1]] = torch.where(exists, ids, 0)
        packed[:, -1] = lengths
        return packed

    def _check_ids(self, ids: Tensor) -> None:
        longest, variable = self._graph.input_shape[0], self._graph.variable
        sizes = f"[N, T] with T from 1 to {longest}" if variable else f"[N, {longest}]"
        expected, fewest = f"int32 or int64 {sizes}", 1 if variable else longest
        self._check_device(ids)
        fits = ids.dim() == 2 and fewest <= ids.shape[1] <= longest
        if not fits or ids.dtype not in (torch.int32, torch.int64):
            got = f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
            raise InputError(f"expected {expected}, got {got} - at the input")

    def _lengths(self, mask: Tensor, shape: torch.Size) -> Tensor:
        if not self._graph.variable:
            raise InputError("expected no mask for texts of one length, got one - at the mask")
        self._check_device(mask, "mask")
        if mask.shape != shape:
            raise InputError(f"expected a mask of shape {list(shape)}, got {list(mask.shape)} - at the mask")
        lengths = (mask == 1).sum(1)
        fits = (mask == (torch.arange(shape[1], device=self.device) < lengths[:, None])).all(1) & (lengths > 0)
        if not fits.all():
            text = int((~fits).int().argmax())
            raise InputError(f"expected ones, at least one, and then zeros, got others - at text {text} of the mask")
        return lengths
