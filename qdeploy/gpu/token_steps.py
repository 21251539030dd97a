"""Steps of the ops on the rows of a sequence: see steps.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qdeploy.gpu.steps import Step, chw
from qdeploy.kernels import triton_int8_attention, triton_int8_tokens


class Gather(Step):
    kernel = "gather"

    def __init__(self, *place: Any):
        super().__init__(*place)
        self._index = self.constant("index")

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        channels, zero_point = chw(self.output)[0], self.inputs[0].zero_point
        by_rows = self.node.attributes["axis"] == "rows"
        triton_int8_tokens.gather(values[0], self._index, out, channels, zero_point, by_rows)


class Position(Step):
    kernel = "position"

    def __init__(self, *place: Any):
        super().__init__(*place)
        self._rows = self.constant("rows")

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        prefix, multiplier = self.node.attributes["prefix"], self.number("multiplier")
        triton_int8_tokens.position(values[0], self._rows, out, prefix, multiplier, self.clamp)


class Embedding(Step):
    kernel = "embedding"

    def __init__(self, *place: Any):
        super().__init__(*place)
        self._weight, self._multiplier = self.constant("weight"), self.constant("multiplier")
        self._rows = self.constant("rows")

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        triton_int8_tokens.embedding(values[0], self._weight, self._multiplier, self._rows, out, self.clamp)


class Norm(Step):
    kernel = "norm"

    def __init__(self, *place: Any):
        super().__init__(*place)
        self._factors = self.constant("multiplier"), self.constant("bias")

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        groups, epsilon = self.node.attributes["groups"], self.number("epsilon")
        triton_int8_tokens.norm(values[0], *self._factors, out, groups, epsilon, self.clamp)


class OverRows(Step):
    """An op that sums over the rows of its last input, as many of them as the text has."""

    @property
    def reads_lengths(self) -> bool:
        return self.rows[-2] is not None

    def lengths(self, values: Sequence[Tensor]) -> tuple[Tensor | None, int]:
        """The token ids, and how many more rows than tokens there are; None and 0 where the rows are always all."""
        return (values[-1] if self.reads_lengths else None), self.rows[-2] or 0


class Mean(OverRows):
    kernel = "mean"

    def __init__(self, *place: Any):
        super().__init__(*place)
        self._multiplier = self.constant("multiplier")

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        options = chw(self.output)[0], self.inputs[0].zero_point, self.number("bias"), self.clamp
        triton_int8_tokens.mean(values[0], self._multiplier, out, *options, *self.lengths(values))


class Attention(OverRows):
    kernel = "int8 tensor cores"

    def __init__(self, *place: Any):
        super().__init__(*place)
        keys = ("logit_bias", "regions")
        self._logit_bias, self._regions = (self.constant(key) if key in self.node.constants else None for key in keys)

    def launch(self, values: Sequence[Tensor], out: Tensor) -> None:
        q, k, v = self.inputs
        ids, more = self.lengths(values)
        triton_int8_attention.attention(
            values[0],
            values[1],
            values[2],
            out,
            heads=self.node.attributes["heads"],
            channels=(q.shape[1], v.shape[1]),
            block=self.node.attributes["block"],
            zero_points=(q.zero_point, k.zero_point, v.zero_point),
            logit_multiplier=self.number("logit_multiplier"),
            peak=self.node.attributes["peak"],
            multiplier=self.number("multiplier"),
            bias=self.number("bias"),
            clamp=self.clamp,
            logit_bias=self._logit_bias,
            regions=self._regions,
            ids=ids,
            more=more,
        )

    @property
    def macs(self) -> int:
        q, k, v = (tensor.shape for tensor in self.inputs)
        return q[0] * (self.node.attributes["block"] or k[0]) * (q[1] + v[1])
