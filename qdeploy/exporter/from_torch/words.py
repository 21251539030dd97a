"""Words for what the engine lacks."""

from __future__ import annotations

from qdeploy.exporter.from_torch.site import Site

PATTERNS = {
    "linalg_vector_norm": "a norm of activations (GRN and the like)",
    "rms_norm": "RMSNorm",
    "conv3d": "Conv3d",
    "conv_transpose3d": "ConvTranspose3d",
    "choose_qparams": "dynamic quantization",
    "choose_qparams_symmetric": "dynamic quantization",
    "gather": "a selection by index",
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "einsum"), "a matrix product outside a Linear"),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), "a recurrent layer"),
    "log_softmax": "log_softmax",
}
ADVICE = {
    **dict.fromkeys(("choose_qparams", "choose_qparams_symmetric"), "quantize statically, with is_dynamic=False"),
    "log_softmax": "export the network that ends in logits; predict and ensembles apply softmax themselves",
    **dict.fromkeys(("rms_norm", "linalg_vector_norm"), "LayerNorm, GroupNorm and BatchNorm are there"),
}


def described(site: Site) -> str:
    """The operator in the words of the field, where its own name is none of them."""
    words = PATTERNS.get(site.operator, f"aten.{site.operator}")
    return words + (f" ({ADVICE[site.operator]})" if site.operator in ADVICE else "")
