"""The operators that quantize: LSQ, the fake quantization of torch.ao, and the pairs that PT2E writes.

LSQ and fake quantization give real numbers; PT2E has `quantize`, which gives codes, and `dequantize` behind it. They
are known by name: the module of torch that defines those of PT2E takes a third of a second to import.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import qdeploy.kernels.lsq  # noqa: F401  (registers the operator qdeploy::lsq)

LSQ = torch.ops.qdeploy.lsq.default
QUANTIZE = ("quantized_decomposed::quantize_per_tensor", "quantized_decomposed::quantize_per_channel")
DEQUANTIZE = ("quantized_decomposed::dequantize_per_tensor", "quantized_decomposed::dequantize_per_channel")
FAKE = (
    "aten::fake_quantize_per_tensor_affine",
    "aten::fake_quantize_per_tensor_affine_cachemask",
    "aten::_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "aten::_fake_quantize_learnable_per_tensor_affine",
    "aten::fake_quantize_per_channel_affine",
    "aten::fake_quantize_per_channel_affine_cachemask",
    "aten::_fake_quantize_learnable_per_channel_affine",
    "quantized_decomposed::fake_quant_per_channel",
)
SAME_ARGUMENT = {"input": "self", "value": "self", "scales": "scale", "step": "scale", "zero_points": "zero_point"}
SAME_ARGUMENT |= {"qmin": "quant_min", "qmax": "quant_max"}


def name_of(target: Any) -> str:
    """As in its schema, without the overload; "" of what is no operator of torch."""
    schema = getattr(target, "_schema", None)
    return schema.name if schema is not None else ""


def is_inserted(node: fx.Node) -> bool:
    """Whether PT2E put it there, in no module."""
    return name_of(node.target).startswith("quantized_decomposed::")


def gives_real_numbers(node: fx.Node) -> bool:
    """Whether it is a quantizer, and its result stands for codes."""
    return node.target is LSQ or name_of(node.target) in FAKE + DEQUANTIZE


def arguments(target: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """By name."""
    schema = target._schema.arguments
    values = {a.name: a.default_value for a in schema} | dict(kwargs)
    return values | {a.name: value for a, value in zip(schema, args, strict=False)}


def quantizer_arguments(target: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Those of a quantizer: self, scale, zero_point, quant_min, quant_max, axis..., however the operator calls them."""
    return {SAME_ARGUMENT.get(name, name): value for name, value in arguments(target, args, kwargs).items()}
