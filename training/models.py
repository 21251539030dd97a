"""Convolutional networks with the state-dict names of torchvision, so that its published weights load, and small ones.

Every constructor takes (classes, in_channels), and by keyword `dropout`, the share of features that is dropped in front
of the classifier (0: there is no such module; DomainBed's ResNet has one). Sources: ResNet arXiv 1512.03385, ResNeXt
1611.05431, MobileNetV2 1801.04381, VGG 1409.1556, DenseNet 1608.06993. Small ones: NiN as in the study of
generalization measures 2010.11924, VGG-19 and MobileNetV1 (1704.04861) as they are usually shortened for 32 px.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from qdeploy.errors import InputError


def _share(dropout: float) -> float:
    if not 0 <= dropout < 1:
        raise InputError(f"expected a share to drop from 0 to below 1, got {dropout} - at dropout")
    return dropout


def _dropout(share: float) -> nn.Module | None:
    return nn.Dropout(share) if _share(share) else None


def _conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, c_in: int, planes: int, stride: int, groups: int, group_width: int):
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(c_in, planes, 3, stride)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = _conv_bn(planes, planes, 3)
        self.downsample = nn.Sequential(*_conv_bn(c_in, planes, 1, stride)) if stride > 1 or c_in != planes else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride, as torchvision's v1.5) and 1x1 convolutions around a shortcut."""

    expansion = 4

    def __init__(self, c_in: int, planes: int, stride: int, groups: int, group_width: int):
        super().__init__()
        width, c_out = planes * group_width // 64 * groups, planes * self.expansion
        self.conv1, self.bn1 = _conv_bn(c_in, width, 1)
        self.conv2, self.bn2 = _conv_bn(width, width, 3, stride, groups)
        self.conv3, self.bn3 = _conv_bn(width, c_out, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(*_conv_bn(c_in, c_out, 1, stride)) if stride > 1 or c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet and, with groups, ResNeXt: `layers` blocks in each of four stages."""

    stages = ("layer1", "layer2", "layer3", "layer4")
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        groups: int,
        group_width: int,
        classes: int,
        in_channels: int = 3,
        *,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        c_in = 64
        for stage, count in enumerate(layers):
            planes, blocks = 64 * 2**stage, []
            for i in range(count):
                blocks.append(block(c_in, planes, 2 if stage and not i else 1, groups, group_width))
                c_in = planes * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = _dropout(dropout)
        self.fc = nn.Linear(c_in, classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x if self.dropout is None else self.dropout(x))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection; a shortcut where the shapes allow."""

    def __init__(self, c_in: int, c_out: int, stride: int, expand: int):
        super().__init__()
        hidden = c_in * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers.append(nn.Sequential(*_conv_bn(c_in, hidden, 1), nn.ReLU6(inplace=True)))
        layers.append(nn.Sequential(*_conv_bn(hidden, hidden, 3, stride, hidden), nn.ReLU6(inplace=True)))
        self.conv = nn.Sequential(*layers, *_conv_bn(hidden, c_out, 1))
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """Width 1.0; 224 x 224 inputs."""

    # expansion, channels, blocks, stride of the first (Table 2 of the paper)
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int, in_channels: int = 3, *, dropout: float = 0.2):
        super().__init__()
        features: list[nn.Module] = [nn.Sequential(*_conv_bn(in_channels, 32, 3, 2), nn.ReLU6(inplace=True))]
        c_in = 32
        for expand, c_out, count, stride in self.STAGES:
            for i in range(count):
                features.append(InvertedResidual(c_in, c_out, stride if i == 0 else 1, expand))
                c_in = c_out
        features.append(nn.Sequential(*_conv_bn(c_in, 1280, 1), nn.ReLU6(inplace=True)))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(_share(dropout)), nn.Linear(1280, classes))
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(torch.flatten(x, 1))


def _vgg_features(in_channels: int, stages: tuple[tuple[int, int], ...]) -> nn.Sequential:
    """`stages`: channels, and convolutions before each pooling."""
    features: list[nn.Module] = []
    for c_out, count in stages:
        for _ in range(count):
            features += [nn.Conv2d(in_channels, c_out, 3, 1, 1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
            in_channels = c_out
        features.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*features)


class VGG16BN(nn.Module):
    """Configuration D with BatchNorm; 224 x 224 inputs."""

    def __init__(self, classes: int, in_channels: int = 3, *, dropout: float = 0.5):
        super().__init__()
        self.features = _vgg_features(in_channels, ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)))
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        hidden = [nn.Linear(512 * 7 * 7, 4096), nn.ReLU(True), nn.Dropout(_share(dropout))]
        hidden += [nn.Linear(4096, 4096), nn.ReLU(True), nn.Dropout(dropout)]
        self.classifier = nn.Sequential(*hidden, nn.Linear(4096, classes))
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class SmallVGG19BN(nn.Module):
    """Configuration E with BatchNorm; five poolings leave one position of 32 x 32, and one linear layer classifies."""

    def __init__(self, classes: int, in_channels: int = 3, *, dropout: float = 0.0):
        super().__init__()
        self.features = _vgg_features(in_channels, ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)))
        self.dropout = _dropout(dropout)
        self.classifier = nn.Linear(512, classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean((2, 3))
        return self.classifier(x if self.dropout is None else self.dropout(x))


class SmallMobileNetV1(nn.Module):
    """Width 1.0, Table 1 of the paper; the first convolution has no stride, so that 32 x 32 ends as 2 x 2."""

    # channels of a block and its stride
    BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

    def __init__(self, classes: int, in_channels: int = 3, *, dropout: float = 0.0):
        super().__init__()
        features, c_in = [*_conv_bn(in_channels, 32, 3), nn.ReLU(inplace=True)], 32
        for c_out, stride in self.BLOCKS:
            features += [*_conv_bn(c_in, c_in, 3, stride, c_in), nn.ReLU(inplace=True)]
            features += [*_conv_bn(c_in, c_out, 1), nn.ReLU(inplace=True)]
            c_in = c_out
        self.features = nn.Sequential(*features)
        self.dropout = _dropout(dropout)
        self.classifier = nn.Linear(c_in, classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean((2, 3))
        return self.classifier(x if self.dropout is None else self.dropout(x))


class DenseLayer(nn.Module):
    """BN-ReLU-conv1x1-BN-ReLU-conv3x3 over everything before it in the block; returns the 32 new channels."""

    def __init__(self, c_in: int, growth: int):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(c_in), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(c_in, 4 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(x)))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.Module):
    """Layers that each append their output to their input."""

    def __init__(self, count: int, c_in: int, growth: int):
        super().__init__()
        for i in range(count):
            self.add_module(f"denselayer{i + 1}", DenseLayer(c_in + i * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.cat([x, layer(x)], 1)
        return x


class DenseNet121(nn.Module):
    """Growth 32, blocks of 6, 12, 24 and 16 layers."""

    def __init__(self, classes: int, in_channels: int = 3, *, dropout: float = 0.0):
        super().__init__()
        features: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False),
            norm0=nn.BatchNorm2d(64),
            relu0=nn.ReLU(inplace=True),
            pool0=nn.MaxPool2d(3, 2, 1),
        )
        channels = 64
        for i, count in enumerate((6, 12, 24, 16), 1):
            features[f"denseblock{i}"] = DenseBlock(count, channels, 32)
            channels += 32 * count
            if i < 4:
                transition = OrderedDict(norm=nn.BatchNorm2d(channels), relu=nn.ReLU(inplace=True))
                transition["conv"] = nn.Conv2d(channels, channels // 2, 1, bias=False)
                transition["pool"] = nn.AvgPool2d(2, 2)
                features[f"transition{i}"] = nn.Sequential(transition)
                channels //= 2
        features["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(features)
        self.dropout = _dropout(dropout)
        self.classifier = nn.Linear(channels, classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.features(x), inplace=True)
        x = torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
        return self.classifier(x if self.dropout is None else self.dropout(x))


class NiN(nn.Module):
    """Network in network: `depth` blocks of a strided 3x3 and two 1x1 convolutions, 25*width channels, then a 1x1
    convolution to the classes and global average pooling. Every block halves the image. There is no linear layer."""

    def __init__(self, classes: int, in_channels: int = 3, *, depth: int = 2, width: int = 2, dropout: float = 0.0):
        if depth < 1 or width < 1:
            raise InputError(f"expected depth and width of 1 or more, got {depth} and {width} - at NiN")
        super().__init__()
        self.stages = tuple(f"features.{3 * i + 2}" for i in range(depth))
        channels, layers = 25 * width, []
        for _ in range(depth):
            for kernel, stride in ((3, 2), (1, 1), (1, 1)):
                layers.append(self._unit(in_channels, channels, kernel, stride))
                in_channels = channels
        self.features = nn.Sequential(*layers)
        self.dropout = _dropout(dropout)
        self.classifier = self._unit(channels, classes, 1, 1)
        _initialize(self)

    @staticmethod
    def _unit(c_in: int, c_out: int, kernel: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2)
        return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(c_out), relu=nn.ReLU(inplace=True)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x if self.dropout is None else self.dropout(x)).mean((2, 3))


def _initialize(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2), 1, 64),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3), 1, 64),
    "resnext50_32x4d": partial(ResNet, Bottleneck, (3, 4, 6, 3), 32, 4),
    "mobilenet_v2": MobileNetV2,
    "vgg16_bn": VGG16BN,
    "densenet121": DenseNet121,
    "nin": NiN,
    "vgg19_bn_32px": SmallVGG19BN,
    "mobilenet_v1_32px": SmallMobileNetV1,
}
