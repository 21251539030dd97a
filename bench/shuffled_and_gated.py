"""Two networks that are timed and that the package has not: ShuffleNetV2 (Ma et al., ECCV 2018, table 5, 1x) and
MobileNetV3-Large (Howard et al., ICCV 2019, table 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _conv(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out)]


class _ShuffleUnit(nn.Module):
    """Half of the channels pass by; at a change of resolution all of them go through both branches."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        half = c_out // 2
        into = c_in if stride > 1 else half
        self.passes = stride == 1
        self.left = nn.Sequential(*_conv(c_in, c_in, 3, 2, c_in), *_conv(c_in, half), nn.ReLU())
        self.right = nn.Sequential(
            *_conv(into, half), nn.ReLU(), *_conv(half, half, 3, stride, half), *_conv(half, half), nn.ReLU()
        )
        if self.passes:
            self.left = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.passes else (x, x)
        y = torch.cat([self.left(left), self.right(right)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleNetV2(nn.Sequential):
    def __init__(self, classes: int = 1000) -> None:
        layers = [*_conv(3, 24, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        c_in = 24
        for c_out, units in ((116, 4), (232, 8), (464, 4)):
            for unit in range(units):
                layers.append(_ShuffleUnit(c_in, c_out, stride=1 if unit else 2))
                c_in = c_out
        layers += [*_conv(c_in, 1024), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, classes)]
        super().__init__(*layers)


class _Gate(nn.Module):
    """Squeeze and excitation with a hard sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = (channels // 4 + 4) // 8 * 8
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class _Bottleneck(nn.Module):
    def __init__(self, c_in: int, kernel: int, width: int, c_out: int, gated: bool, swish: bool, stride: int) -> None:
        super().__init__()
        act = nn.Hardswish if swish else nn.ReLU
        layers = [*_conv(c_in, width), act()] if width != c_in else []
        layers += [*_conv(width, width, kernel, stride, width), act()]
        layers += [_Gate(width)] if gated else []
        self.body = nn.Sequential(*layers, *_conv(width, c_out))
        self.adds = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


class MobileNetV3(nn.Sequential):
    # kernel, width, channels out, gate, hard swish, stride
    TABLE = (
        (3, 16, 16, False, False, 1),
        (3, 64, 24, False, False, 2),
        (3, 72, 24, False, False, 1),
        (5, 72, 40, True, False, 2),
        (5, 120, 40, True, False, 1),
        (5, 120, 40, True, False, 1),
        (3, 240, 80, False, True, 2),
        (3, 200, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 480, 112, True, True, 1),
        (3, 672, 112, True, True, 1),
        (5, 672, 160, True, True, 2),
        (5, 960, 160, True, True, 1),
        (5, 960, 160, True, True, 1),
    )

    def __init__(self, classes: int = 1000) -> None:
        layers: list[nn.Module] = [*_conv(3, 16, 3, 2), nn.Hardswish()]
        c_in = 16
        for kernel, width, c_out, gated, swish, stride in self.TABLE:
            layers.append(_Bottleneck(c_in, kernel, width, c_out, gated, swish, stride))
            c_in = c_out
        layers += [*_conv(c_in, 960), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, classes))
