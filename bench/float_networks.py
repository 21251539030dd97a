"""Networks that the peers quantize themselves: transformers, and convnets with gates, norms and shuffles.

Random weights: normal ones, as fresh uniform ones run our kernel of 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from static_quantization import quantized_statically
from targets import TRANSFORMERS

import qdeploy

if TYPE_CHECKING:
    from torch import Tensor, nn

IMAGES = 4  # or texts, that calibrate a network
TOKENS, VOCABULARY = 128, 30522


def _of_transformers(name: str, **options: object) -> Callable[[], nn.Module]:
    """`name` as in ViTConfig and ViTForImageClassification."""

    def build() -> nn.Module:
        import transformers

        task = "SequenceClassification" if name == "DistilBert" else "ImageClassification"
        options.setdefault("num_labels", 2 if name == "DistilBert" else 1000)
        config = getattr(transformers, f"{name}Config")(**options, attn_implementation="eager")
        return getattr(transformers, f"{name}For{task}")(config)

    return build


def _efficientnet_b0() -> nn.Module:
    from torch import nn

    options = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}
    net = _of_transformers("EfficientNet", **options)()
    # Theirs, a pool of 1280 x 1280 that is cut at the borders, is one that OpenVINO refuses to read.
    net.efficientnet.pooler = nn.AdaptiveAvgPool2d(1)
    return net


def _shufflenet_v2() -> nn.Module:
    from shuffled_and_gated import ShuffleNetV2

    return ShuffleNetV2()


def _mobilenet_v3() -> nn.Module:
    from shuffled_and_gated import MobileNetV3

    return MobileNetV3()


_DEIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
_REGNET = {
    "layer_type": "y",
    "hidden_sizes": [48, 104, 208, 440],
    "depths": [1, 3, 6, 6],
    "groups_width": 8,
    "embedding_size": 32,
}

BUILD: dict[str, Callable[[], nn.Module]] = {
    "deit_s": _of_transformers("DeiT", **_DEIT_S),
    "vit_b16": _of_transformers("ViT"),
    "swin_t": _of_transformers("Swin"),
    "distilbert": _of_transformers("DistilBert"),
    "efficientnet_b0": _efficientnet_b0,
    "mobilenet_v3_large": _mobilenet_v3,
    "regnet_y_400mf": _of_transformers("RegNet", **_REGNET),
    "convnext_t": _of_transformers("ConvNext"),
    "shufflenet_v2": _shufflenet_v2,
}
TEXTS = {"distilbert"}


def samples(name: str, count: int = IMAGES, seed: int = 1) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(seed)
    if name in TEXTS:
        return torch.randint(0, VOCABULARY, (count, TOKENS), generator=generator)
    return torch.randn((count, 3, 224, 224), generator=generator)


@cache
def float_network(name: str) -> nn.Module:
    """Normal weights, and BatchNorm with the statistics of the samples; transformers begins with gains near 0."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = BUILD[name]()
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.data = (
                torch.randn(module.weight.shape, generator=generator) * module.weight[0].numel() ** -0.5
            )
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(samples(name))
    return net.eval()


class FloatNetworks:
    """Model files in a folder, written when they are first asked for: ours, and those that the peers run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def exported(self, name: str, bits: int = 7) -> Path:
        from qdeploy.training import quantize_

        path = self.folder / f"{name}_{bits}.safetensors"
        if not path.exists():
            net, inputs = deepcopy(float_network(name)), samples(name)
            quantize_(net, weight_bits=bits, init="mse")
            qdeploy.export(net, inputs[:1], path, calibration=inputs.numpy())
        return path

    def of_peers(self, name: str) -> tuple[dict[str, Path], dict[str, str]]:
        """Files by runtime and precision ("openvino int8"), and of each that there is not the reason."""
        models, absent = {}, {}
        writers = {
            "onnxruntime float32": self._float32,
            "openvino float32": self._float32,
            "onnxruntime int8": self._onnxruntime_int8,
            "openvino int8": self._openvino_int8,
        }
        for runtime, write in writers.items():
            try:
                models[runtime] = write(name)
            except ImportError as error:
                absent[runtime] = f"no {error.name} here"
        return models, absent

    def _float32(self, name: str) -> Path:
        import torch

        path = self.folder / f"{name}.onnx"
        if not path.exists():
            axes = {"x": {0: "N"}} if name in TEXTS else None
            options = {"input_names": ["x"], "output_names": ["y"], "opset_version": 17, "dynamic_axes": axes}
            net = deepcopy(float_network(name))  # Swin does not run any more after this
            torch.onnx.export(_logits(net), (samples(name, 1),), path, dynamo=False, **options)
        return path

    def _onnxruntime_int8(self, name: str) -> Path:
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.shape_inference import quant_pre_process

        path, prepared = self.folder / f"{name}_int8.onnx", self.folder / f"{name}_prepared.onnx"
        if not path.exists() and name in TRANSFORMERS:
            quant_pre_process(self._float32(name), prepared, skip_symbolic_shape=True)
            # What it is for; it saturates, and its results depend on the batch.
            quantize_dynamic(prepared, path, weight_type=QuantType.QInt8, per_channel=True)
        elif not path.exists():
            quantized_statically(self._float32(name), path, (x[None] for x in samples(name).numpy()))
        return path

    def _openvino_int8(self, name: str) -> Path:
        import nncf
        import openvino as ov

        path = self.folder / f"{name}.xml"
        if not path.exists():
            network = ov.Core().read_model(self._float32(name))
            model_type = nncf.ModelType.TRANSFORMER if name in TRANSFORMERS else None
            inputs = nncf.Dataset([x[None] for x in samples(name).numpy()])
            quantized = nncf.quantize(network, inputs, model_type=model_type, subset_size=IMAGES)
            ov.save_model(quantized, path, compress_to_fp16=False)
        return path


def _logits(net: nn.Module) -> nn.Module:
    """A network whose output is the tensor of logits, where it is a dataclass that holds them."""
    from torch import nn

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return getattr(y, "logits", y)

    return Logits().eval()


def texts_of_mixed_length(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and a mask with lengths as real sentences have them: 59 of 128 tokens on average."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(59, 28, count), 4, TOKENS).astype(np.int64)
    return rng.integers(0, VOCABULARY, (count, TOKENS)), (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)
