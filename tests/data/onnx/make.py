"""Writes the ONNX files beside it: small networks as the tools of others quantize them.

    python tests/data/onnx/make.py onnxruntime | nncf | brevitas | pt2e | torch_ao | modelopt

Each tool needs packages that clash with those of the others; the files are in the repository, so that no test needs
one. Made with onnx 1.23.2, onnxruntime 1.31.1, torch 2.13.0, NNCF 3.4.0, brevitas 0.13.4, torchao 0.18.0, ModelOpt
0.47.0, onnxscript 0.7.2. Weights and images are random with the seed 0.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
SHAPE = (3, 12, 12)
OPSET = 17


class Convnet(nn.Module):
    """Conv, BatchNorm and ReLU, a residual, a depthwise convolution, a concatenation, average pools, Hardswish."""

    def __init__(self, act: type[nn.Module] = nn.Hardswish):
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.conv_bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.side = nn.Conv2d(8, 8, 1)
        self.pool, self.last = nn.AvgPool2d(2), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.act, self.whole, self.fc = act(), nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_bn(self.stem(x)))
        x = torch.relu(self.conv_bn(self.conv(x)) + x)
        x = torch.cat([torch.relu(self.depthwise(x)), self.side(x)], 1)
        x = self.act(self.last(self.pool(x)))
        return self.fc(torch.flatten(self.whole(x), 1))


class Resnet(nn.Module):
    """Ten layers: a stem, four blocks of two convolutions, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = self._layer(3, 8), nn.MaxPool2d(3, 2, 1)
        widths = [(8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1)]
        self.first = nn.ModuleList(self._layer(a, b, stride) for a, b, stride in widths)
        self.second = nn.ModuleList(self._layer(b, b) for _, b, _ in widths)
        self.short = self._layer(8, 16, 2, 1)
        self.fc = nn.Linear(16, 10)

    @staticmethod
    def _layer(a: int, b: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(b))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.stem(x)))
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            y = second(functional.relu(first(x)))
            x = functional.relu(y + (self.short(x) if i == 2 else x))
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    """Blocks of 1x1 and depthwise convolutions with ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6()),
            *(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU6(), nn.Conv2d(8, 16, 1)),
            *(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU(), nn.Conv2d(16, 8, 1)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, *SHAPE)).astype(np.float32)


def network(kind: Callable[[], nn.Module]) -> nn.Module:
    """With statistics as after training."""
    torch.manual_seed(0)
    net = kind()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    net.train()
    with torch.no_grad():
        for _ in range(20):
            net(torch.from_numpy(images(64)))
    return net.eval()


def write(net: nn.Module, path: Path, *, fold: bool = True, dynamo: bool = False) -> None:
    x = torch.from_numpy(images(2))
    axes = {"x": {0: "N"}, "y": {0: "N"}}
    options = {"input_names": ["x"], "output_names": ["y"], "opset_version": OPSET, "do_constant_folding": fold}
    if dynamo:
        options = {"input_names": ["x"], "output_names": ["y"], "dynamo": True, "external_data": False}
        options["dynamic_shapes"] = ({0: torch.export.Dim("N")},)
        torch.onnx.export(net, (x,), str(path), **options)
        return
    torch.onnx.export(net, (x,), str(path), dynamic_axes=axes, dynamo=False, **options)


NETWORKS = {"convnet": Convnet, "resnet": Resnet, "depthwise": Depthwise}


def floats(folder: Path) -> Iterator[tuple[str, Path]]:
    for name, kind in NETWORKS.items():
        path = folder / f"{name}.onnx"
        write(network(kind), path)
        yield name, path


def onnxruntime() -> None:
    """quantize_static twelve ways."""
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    u8, s8, u4, s4, u16 = (ort.QuantType[name] for name in ("QUInt8", "QInt8", "QUInt4", "QInt4", "QUInt16"))
    ways = {
        "defaults": {},
        "u8s8_per_channel": {"activation_type": u8, "weight_type": s8, "per_channel": True},
        "u8u8": {"activation_type": u8, "weight_type": u8},
        "s8s8_per_channel": {"activation_type": s8, "weight_type": s8, "per_channel": True},
        "reduce_range": {"activation_type": u8, "weight_type": s8, "per_channel": True, "reduce_range": True},
        "u8s4": {"activation_type": u8, "weight_type": s4},
        "u8u4": {"activation_type": u8, "weight_type": u4},
        "u16s8": {"activation_type": u16, "weight_type": s8},
        "qoperator": {"activation_type": u8, "weight_type": s8, "quant_format": ort.QuantFormat.QOperator},
        "qoperator_u8u8": {"activation_type": u8, "weight_type": u8, "quant_format": ort.QuantFormat.QOperator},
        "symmetric": {"extra_options": {"ActivationSymmetric": True, "WeightSymmetric": True}},
        "qdq_nodes_apart": {"activation_type": u8, "weight_type": s8, "extra_options": {"DedicatedQDQPair": True}},
    }

    class Reader(ort.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(np.split(images(32), 4))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {"x": batch}

    with tempfile.TemporaryDirectory() as folder:
        for name, path in floats(Path(folder)):
            ready = Path(folder) / "ready.onnx"
            quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
            for way, options in ways.items():
                if name == "convnet" or way in ("u8s8_per_channel", "qoperator", "reduce_range", "u8u8"):
                    kept = {"quant_format": ort.QuantFormat.QDQ} | options
                    ort.quantize_static(str(ready), str(HERE / f"{name}_ort_{way}.onnx"), Reader(), **kept)
        dynamic = HERE / "convnet_ort_dynamic.onnx"
        ort.quantize_dynamic(str(Path(folder) / "convnet.onnx"), str(dynamic))


def nncf() -> None:
    """Post-training quantization of ONNX models."""
    import nncf
    import onnx

    data = nncf.Dataset([{"x": batch} for batch in np.split(images(32), 32)])
    ways = {"default": {}, "mixed": {"preset": nncf.QuantizationPreset.MIXED}}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in floats(Path(folder)):
            for way, options in ways.items():
                if way == "default" or name == "convnet":
                    quantized = nncf.quantize(onnx.load(str(path)), data, subset_size=32, **options)
                    onnx.save(quantized, str(HERE / f"{name}_nncf_{way}.onnx"))


def brevitas() -> None:
    """QCDQ of 8, 4 and 3 bits."""
    from brevitas import nn as qnn
    from brevitas.export import export_onnx_qcdq
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Int32Bias, Uint8ActPerTensorFloat

    for bits in (8, 4, 3):
        weights = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": bits, "bias_quant": Int32Bias}
        weights |= {"return_quant_tensor": True}
        relu = {"act_quant": Uint8ActPerTensorFloat, "bit_width": bits, "return_quant_tensor": True}
        torch.manual_seed(0)
        net = nn.Sequential(
            qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat, return_quant_tensor=True),
            *(qnn.QuantConv2d(3, 8, 3, padding=1, **weights), qnn.QuantReLU(**relu)),
            *(qnn.QuantConv2d(8, 16, 3, stride=2, padding=1, **weights), qnn.QuantReLU(**relu)),
            *(qnn.QuantConv2d(16, 16, 3, padding=1, groups=16, **weights), qnn.QuantReLU(**relu)),
            nn.Flatten(),
            qnn.QuantLinear(16 * 6 * 6, 10, bias=True, **{**weights, "return_quant_tensor": False}),
        )
        for _ in range(40):
            net(torch.from_numpy(images(64)))
        net.eval()
        path = HERE / f"plain_brevitas_{bits}.onnx"
        export_onnx_qcdq(net, torch.from_numpy(images(1)), str(path), opset_version=13, dynamo=False)


def pt2e() -> None:
    """torchao's PT2E for x86, converted, through the exporter of torch.export programs."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    for name in ("convnet", "resnet"):
        x = torch.from_numpy(images(2))
        program = torch.export.export(network(NETWORKS[name]), (x,), dynamic_shapes=({0: torch.export.Dim("N")},))
        prepared = prepare_pt2e(program.module(), quantizer)
        prepared(torch.from_numpy(images(32)))
        write(convert_pt2e(prepared), HERE / f"{name}_pt2e.onnx", dynamo=True)


def torch_ao() -> None:
    """FX QAT, converted, and with its fake quantizers kept."""
    from torch.ao.quantization import QConfigMapping, get_default_qat_qconfig
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    net = network(Convnet).train()
    config = QConfigMapping().set_global(get_default_qat_qconfig("x86", version=0))
    prepared = prepare_qat_fx(net, config, (torch.from_numpy(images(2)),))
    with torch.no_grad():
        prepared(torch.from_numpy(images(32)))
    prepared.eval().apply(torch.ao.quantization.disable_observer)
    write(prepared, HERE / "convnet_torch_ao_fake.onnx", fold=False)
    write(convert_fx(prepared), HERE / "convnet_torch_ao.onnx", fold=False)


def modelopt() -> None:
    """int8 in the style of TensorRT."""
    import modelopt.torch.quantization as mtq

    def calibrate(net: nn.Module) -> None:
        net(torch.from_numpy(images(32)))

    net = mtq.quantize(network(Convnet), mtq.INT8_DEFAULT_CFG, calibrate)
    write(net, HERE / "convnet_modelopt.onnx", fold=False)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for tool in sys.argv[1:]:
        globals()[tool]()
