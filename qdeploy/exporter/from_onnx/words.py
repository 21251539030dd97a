"""Words for what the engine lacks."""

from __future__ import annotations

ADVICE = {
    "DynamicQuantizeLinear": "ranges at run time; quantize with static ranges, as quantize_static does",
    "ConvInteger": "ranges at run time; quantize with static ranges, as quantize_static does",
    "MatMulInteger": "ranges at run time; quantize with static ranges, as quantize_static does",
    "If": "control flow",
    "Loop": "control flow",
    "Scan": "control flow",
    "Softmax": "at the end alone, where it is dropped",
    "LogSoftmax": "at the end alone, where it is dropped",
    "LSTM": "a recurrent layer",
    "GRU": "a recurrent layer",
    "RNN": "a recurrent layer",
    "LRN": "BatchNormalization, LayerNormalization and GroupNormalization are there",
}


def described(op: str) -> str:
    """The operator, and what could be done."""
    return op + (f" ({ADVICE[op]})" if op in ADVICE else "")
