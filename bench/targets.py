"""What the engine is to reach, as data: one row for each figure that a run prints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qdeploy.graph import COMBINE


@dataclass(frozen=True)
class Target:
    """`bound` on what is measured: the largest value that is met, or the smallest where `at_least`. None: no target,
    the figure is only shown. `unit`: "x" of a ratio of times, "%", "ms", "ns", "MiB", "GMAC/s"."""

    what: str
    bound: float | None
    unit: str = "x"
    at_least: bool = False

    def met(self, value: float) -> bool | None:
        if self.bound is None:
            return None
        return value >= self.bound if self.at_least else value <= self.bound


# Networks beside ResNet-50, by name in qdeploy.training.models.
ZOO = {
    "resnet18": "ResNet-18",
    "resnext50_32x4d": "ResNeXt-50 32x4d",
    "mobilenet_v2": "MobileNetV2",
    "vgg16_bn": "VGG-16-bn",
    "nin": "NiN 4x10",
    "densenet121": "DenseNet-121",
}
BITS = (8, 7, 6, 5, 4)
# 3x3 convolutions of stride 1 in ResNet-18, by the shape of their output, and the codes that they are timed with.
LAYERS = {(56, 56, 64): 190, (28, 28, 128): 190, (14, 14, 256): 150, (7, 7, 512): None}
CODES = ("7 bits", "codes that fill 7 bits", "codes that fill 8 bits")

# Ratios are qdeploy / peer, so less is better, but for "faster than" rows. b1: one image a call; 1T: one thread.
TARGETS: dict[str, Target] = {}
for threads, bound in ((1, 0.80), (2, 0.77)):
    name = f"ResNet-50 b1 {threads}T"
    TARGETS |= {
        f"resnet50/{threads}/openvino int8": Target(f"{name} / OpenVINO int8", bound),
        f"resnet50/{threads}/onnxruntime int8": Target(f"{name} / onnxruntime int8", None),
        f"resnet50/{threads}/peak": Target(
            f"{name}, share of the int8 peak", 0.86 if threads == 1 else None, "%", True
        ),
        f"resnet50/{threads}/float32": Target(
            f"{name}, times faster than the best FP32", 4.0 if threads == 1 else None, "x", True
        ),
    }
for threads in (1, 2):
    name = f"EoQ of 5 ResNet-50 {threads}T / one FP32 ResNet-50"
    TARGETS |= {
        f"eoq/{threads}/best": Target(f"{name}, the best", 1.2),
        f"eoq/{threads}/onnxruntime float32": Target(f"{name}, onnxruntime", 1.1),
        f"eoq/{threads}/torch eager float32": Target(f"{name}, torch eager", 0.75),
    }
for threads in (1, 2):
    for net, name in ZOO.items():
        bound = 0.75 if net in ("resnet18", "vgg16_bn") else 0.95  # Winograd
        TARGETS[f"{net}/{threads}/openvino int8"] = Target(f"{name} b1 {threads}T / OpenVINO int8", bound)
        bound = 0.7 if net == "densenet121" else None  # it stands in for OpenVINO, which crashes there on some CPUs
        TARGETS[f"{net}/{threads}/onnxruntime int8"] = Target(f"{name} b1 {threads}T / onnxruntime int8", bound)
    TARGETS[f"zoo/{threads}"] = Target(f"geometric mean of these {threads}T / OpenVINO int8", 0.85)
for batch in (8, 32):
    TARGETS[f"batch/{batch}"] = Target(f"ResNet-50 b{batch} 2T / OpenVINO int8", 0.85)
for bits in BITS:
    bound = {7: 0.62, 4: 0.75}.get(bits)
    TARGETS[f"avx2/{bits}"] = Target(f"ResNet-50 b1 1T AVX2 only, {bits} bits / OpenVINO int8", bound)
TARGETS["avx2/full"] = Target("the same, 7 bits, codes that fill them / OpenVINO int8", 0.80)
TARGETS["avx2/float32"] = Target("the same, 7 bits, times faster than the best FP32 (paper: 1.63)", 1.63, "x", True)
for net, bound in (("resnet18", 0.56), ("vgg16_bn", 0.48)):
    TARGETS[f"avx2/{net}"] = Target(f"{ZOO[net]} b1 1T AVX2 only, 7 bits / OpenVINO int8", bound)
for peer in ("OpenVINO", "onnxruntime"):
    name = f"ResNet-18 b1 1T AVX2 only, codes that fill 8 bits / {peer} int8"
    TARGETS[f"avx2/resnet18/full/{peer.lower()} int8"] = Target(name, 0.80)
for shape, bound in LAYERS.items():
    for codes in CODES:
        name = f"3x3 layers of {'x'.join(map(str, shape))}, AVX2 only, {codes}"
        TARGETS[f"avx2/layers/{shape}/{codes}"] = Target(name, bound, "GMAC/s", True)
TARGETS["avx512"] = Target("ResNet-50 b1 1T AVX-512 without VNNI, 7 bits / OpenVINO int8", 0.90)
TARGETS["avx512/full"] = Target("the same, codes that fill the 7 bits / OpenVINO int8", 0.90)
# Transformers, whose peers quantize them themselves (float_networks.py), on one thread.
TRANSFORMERS = {"deit_s": "DeiT-S", "vit_b16": "ViT-B/16", "swin_t": "Swin-T", "distilbert": "DistilBERT, 128 tokens"}
PEERS_OF_FLOAT = ("onnxruntime float32", "openvino float32", "onnxruntime int8", "openvino int8")
_AVX2 = {7: (1 / 1.8, 1 / 1.8, 1.0, 1 / 1.8), 6: (1 / 2.1, 1 / 2.1, 1 / 1.25, 1 / 1.8)}
for net, name in TRANSFORMERS.items():
    for bits, bounds in _AVX2.items():
        for peer, bound in zip(PEERS_OF_FLOAT, bounds, strict=True):
            TARGETS[f"{net}/avx2/{bits}/{peer}"] = Target(f"{name} AVX2 only, {bits} bits / {peer}", bound)
    for peer, bound in zip(PEERS_OF_FLOAT, (1 / 3, 1 / 3, 1 / 1.2, 1 / 1.2), strict=True):
        TARGETS[f"{net}/{peer}"] = Target(f"{name}, 7 bits / {peer}", bound)
for isa, bound in (("avx2", 50), ("avx512vnni", None)):
    TARGETS |= {
        f"ops/{isa}/attention": Target(f"attention of DeiT-S, {isa}", bound, "GMAC/s", True),
        f"ops/{isa}/norm": Target(f"norms of DeiT-S, {isa}, an element", 0.4, "ns"),
        f"ops/{isa}/table": Target(f"tables of DeiT-S, {isa}, an element", 0.1, "ns"),
    }
TARGETS |= {
    "texts/padded": Target("64 texts of mixed length through DistilBERT, one call / padded to 128", 1 / 1.8),
    "texts/onnxruntime int8": Target("the same / onnxruntime int8, padded", 1 / 2.5),
}
# Convnets with gates, norms and shuffles, which OpenVINO quantizes itself.
GATED_ZOO = {
    "efficientnet_b0": "EfficientNet-B0",
    "mobilenet_v3_large": "MobileNetV3-L",
    "regnet_y_400mf": "RegNetY-400MF",
    "convnext_t": "ConvNeXt-T",
    "shufflenet_v2": "ShuffleNetV2 x1.0",
}
for isa in ("", "avx2"):
    only = ", AVX2 only" if isa else ""
    for net, name in GATED_ZOO.items():
        TARGETS[f"{net}/{isa}/openvino int8"] = Target(f"{name} b1 1T{only} / OpenVINO int8", 0.95)
    TARGETS[f"gated zoo/{isa}"] = Target(f"geometric mean of these{only}", 0.85)
TARGETS |= {
    "start/onnxruntime": Target("cold start of ResNet-50 / onnxruntime", 0.6),
    "start/openvino": Target("cold start of ResNet-50 / OpenVINO", 0.2),
    "start/numpy": Target("cold start on top of `import numpy`", 60, "ms"),
    "memory": Target("peak memory of that process", 100, "MiB"),
    "overhead": Target("a call of a tiny net / onnxruntime", 0.3),
}
TARGETS |= {
    "training/loader/1": Target("training images/s, one worker / decoded in the process", 1.0, "x", True),
    "training/loader/2": Target("training images/s, two workers / one", 1.8, "x", True),
    "training/image": Target("CPU time of a training image, a JPEG of 500 x 375", 8.0, "ms"),
}
# Weights that LSQ quantizes on a CPU, forward and backward, and how many times as fast as autograd on plain tensors.
LSQ_ON_CPU = {(10, 10, 5, 5): 1.0, (64, 64, 3, 3): 1.0, (256, 256, 3, 3): 1.0, (512, 512, 3, 3): 6.0}
for shape, bound in LSQ_ON_CPU.items():
    weights = f"LSQ of {'x'.join(map(str, shape))} weights per channel on one thread, times faster than autograd"
    TARGETS[f"training/lsq/{shape}"] = Target(weights, bound, "x", True)

# What an update costs beside the plain one of the same network: how its gradients are made, and its average.
UPDATES = {"sam": 2.1, "sagm": 2.1, "gaqat": 2.1, "sma": 1.03}
UPDATED = {"nin": "NiN 2x2, 4 x 32 digits of 16 x 16", "resnet50": "ResNet-50, 16 images of 64 x 64"}
for net, name in UPDATED.items():
    for way, bound in UPDATES.items():
        same = "LSQ's" if way == "gaqat" else "the plain one"
        TARGETS[f"training/update/{net}/{way}"] = Target(f"an update with {way.upper()} / {same}, {name}", bound)


# ---- On a GPU: the cases of gpu_cases.py -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LsqCase:
    """A tensor, the axis along which slices have steps of their own (-1: one step), and its type."""

    shape: tuple[int, ...]
    axis: int = -1
    dtype: str = "float32"

    def __str__(self) -> str:
        steps = "one step" if self.axis == -1 else f"steps along axis {self.axis}"
        return f"{list(self.shape)} {self.dtype} {steps}"

    @property
    def name(self) -> str:
        axis = "" if self.axis == -1 else f"/axis{self.axis}"
        return f"{'x'.join(map(str, self.shape))}{axis}/{self.dtype}"

    @property
    def key(self) -> str:
        return f"gpu/lsq/{self.name}"

    @property
    def bandwidth_bound(self) -> bool:
        """Larger than any L2: what is left of the time is moving bytes."""
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 2) >= 64e6


# Activations of ResNet-50, weights of BERT and ViT and their vocabularies, and the shapes of published measurements
# (FlagGems pull requests 5540 to 5544: a Triton kernel against ATen on an H20).
LSQ = (
    LsqCase((32, 256, 56, 56)),
    LsqCase((32, 256, 56, 56), dtype="bfloat16"),
    LsqCase((50_000, 768)),
    LsqCase((50_000, 768), dtype="bfloat16"),
    LsqCase((4096, 4096)),
    LsqCase((4096, 1024)),
    LsqCase((3072, 768)),
    LsqCase((4096, 4096), 0),
    LsqCase((512, 512, 3, 3), 0),
    LsqCase((2048, 1024, 1, 1), 0),
    LsqCase((16, 128, 64, 60), 1),
    LsqCase((16, 128, 64, 60), 1, "bfloat16"),
    LsqCase((256, 512, 32), 1),
)
ENSEMBLE = ((65536, 345), (1024, 1000), (512, 100_000))  # images, classes
INT8_BATCHES = (1, 32, 256)
EOQ_MEMBERS = 5

for case in LSQ:
    if case.bandwidth_bound:
        for phase in ("forward", "backward"):
            TARGETS[f"{case.key}/{phase}"] = Target(f"LSQ {phase} {case}, share of the copy rate", 0.92, "%", True)
    if case.axis != -1:
        for peer, bound in (("ATen", 1.5), ("eager", 3.0), ("torch.compile", 1.0)):
            TARGETS[f"{case.key}/{peer}"] = Target(f"LSQ {case}, times faster than {peer}", bound, "x", True)
for peer, bound in (("eager", 10.0), ("torch.compile", 4.0)):
    name = f"LSQ of ResNet-50's 53 weights, times faster than {peer}"
    TARGETS[f"gpu/weights/{peer}"] = Target(name, bound, "x", True)
    TARGETS[f"gpu/weights/{peer}/graph"] = Target(f"the same, both as a CUDA graph ({peer})", None, "x", True)
for images, classes in ENSEMBLE:
    for rule in COMBINE:
        key, name = f"gpu/ensemble/{images}x{classes}/{rule}", f"ensemble average [5, {images}, {classes}] {rule}"
        bound = 0.90 if classes == 345 else None
        TARGETS[key] = Target(f"{name}, share of the copy rate", bound, "%", True)
        TARGETS[f"{key}/torch.compile"] = Target(f"{name}, times faster than torch.compile", None, "x", True)
for name in ("qdeploy", "qdeploy, inputs too", "eager", "qdeploy, torch.compile"):
    bound = 1.03 if name == "qdeploy" else None
    TARGETS[f"gpu/qat/{name}"] = Target(f"update of ResNet-50 with LSQ ({name}) / without", bound)
for batch in INT8_BATCHES:
    name, bound = f"GPU: INT8 ResNet-50 b{batch}, times faster than", {1: 1.3, 256: 1.5}.get(batch)
    TARGETS[f"gpu/int8/{batch}/fp16 graph"] = Target(f"{name} FP16 channels last, CUDA graph", bound, "x", True)
    TARGETS[f"gpu/int8/{batch}/best fp16"] = Target(f"{name} the best FP16", None, "x", True)
    TARGETS[f"gpu/int8/{batch}/fp32"] = Target(f"{name} FP32 eager", 8.0 if batch == 1 else None, "x", True)
    name = f"GPU: EoQ of 5 ResNet-50 b{batch}, times faster than"
    TARGETS[f"gpu/int8/{batch}/ensemble"] = Target(f"{name} 5 in FP16, CUDA graph", None, "x", True)
    TARGETS[f"gpu/int8/{batch}/ensemble fp32"] = Target(f"{name} one in FP32 eager", None, "x", True)
