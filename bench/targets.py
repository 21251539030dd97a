"""What the engine is to reach, as data: one row for each figure that a run prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """`bound` on what is measured: the largest value that is met, or the smallest where `at_least`. None: no target,
    the figure is only shown. `unit`: "x" of a ratio of times, "%", "ms", "MiB"."""

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
        TARGETS[f"{net}/{threads}/openvino int8"] = Target(f"{name} b1 {threads}T / OpenVINO int8", 0.95)
        bound = 0.7 if net == "densenet121" else None  # it stands in for OpenVINO, which crashes there on some CPUs
        TARGETS[f"{net}/{threads}/onnxruntime int8"] = Target(f"{name} b1 {threads}T / onnxruntime int8", bound)
    TARGETS[f"zoo/{threads}"] = Target(f"geometric mean of these {threads}T / OpenVINO int8", 0.85)
for batch in (8, 32):
    TARGETS[f"batch/{batch}"] = Target(f"ResNet-50 b{batch} 2T / OpenVINO int8", 0.85)
for bits in BITS:
    bound = {7: 0.95, 4: 0.75}.get(bits)
    TARGETS[f"avx2/{bits}"] = Target(f"ResNet-50 b1 1T AVX2 only, {bits} bits / OpenVINO int8", bound)
TARGETS["avx2/full"] = Target("the same, 7 bits, codes that fill them / OpenVINO int8", 0.95)
TARGETS["avx2/float32"] = Target("the same, 7 bits, times faster than the best FP32 (paper: 1.63)", 1.63, "x", True)
TARGETS["avx512"] = Target("ResNet-50 b1 1T AVX-512 without VNNI, 7 bits / OpenVINO int8", 0.90)
TARGETS["avx512/full"] = Target("the same, codes that fill the 7 bits / OpenVINO int8", 0.90)
TARGETS |= {
    "start/onnxruntime": Target("cold start of ResNet-50 / onnxruntime", 0.6),
    "start/openvino": Target("cold start of ResNet-50 / OpenVINO", 0.2),
    "start/numpy": Target("cold start on top of `import numpy`", 60, "ms"),
    "memory": Target("peak memory of that process", 65, "MiB"),
    "overhead": Target("a call of a tiny net / onnxruntime", 0.3),
}
