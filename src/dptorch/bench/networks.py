"""The networks of workloads that no library has, of torch's own layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FunctionalTie", "Recurrent", "Reused", "resnet", "resnet50", "vgg"]


class Reused(nn.Module):
    """One layer used twice."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(d, d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class FunctionalTie(nn.Module):
    """``F.linear(h, embedding.weight)`` for a head."""

    def __init__(self, vocabulary: int, d: int) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(vocabulary, d), nn.Linear(d, d)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(self.table(ids))), self.table.weight)


class Recurrent(nn.Module):
    """Two recurrent layers, and a head on what the last step gives."""

    def __init__(self, layers: nn.RNNBase) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(layers.hidden_size, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and in-place ReLU, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(8, outputs),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x), inplace=True)


def resnet(d: int, stages: int, *, small: bool = True) -> nn.Module:
    """`stages` stages of two blocks, of width d, 2d, 4d..., after a 3x3 convolution for small images,
    and a 7x7 one and pooling for others."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, d, *((3, 1, 1) if small else (7, 2, 3)), bias=False),
        nn.GroupNorm(8, d),
        nn.ReLU(inplace=True),
    ]
    if not small:
        layers.append(nn.MaxPool2d(3, 2, 1))
    width = d
    for stage in range(stages):
        layers.append(ResidualBlock(width, d * 2**stage, 1 if stage == 0 else 2))
        width = d * 2**stage
        layers.append(ResidualBlock(width, width, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with GroupNorm, and a shortcut; the last is four times as wide."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, width, 1),
            *_convolution(width, width, 3, stride),
            *_convolution(width, 4 * width, 1)[:-1],
        )
        same = inputs == 4 * width and stride == 1
        skip = nn.Sequential(*_convolution(inputs, 4 * width, 1, stride)[:-1])
        self.skip = nn.Identity() if same else skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x), inplace=True)


def _convolution(inputs: int, outputs: int, side: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False),
        nn.GroupNorm(min(32, outputs // 2), outputs),
        nn.ReLU(inplace=True),
    ]


def resnet50(d: int, blocks: Sequence[int]) -> nn.Module:
    """Four stages of so many bottlenecks, of width d to 8d, after a 7x7 convolution and pooling."""
    layers = [*_convolution(3, d, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = d
    for stage, count in enumerate(blocks):
        for block in range(count):
            width = d * 2**stage
            layers.append(Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


#: Convolutions in each of the five stages, by the number of layers.
_VGG = {11: (1, 1, 2, 2, 2), 19: (2, 2, 4, 4, 4)}


def vgg(depth: int, d: int, side: int) -> nn.Module:
    """VGG-11 or VGG-19 of width d to 8d for images of so many pixels a side, at least 32; one linear
    layer as head."""
    layers, width = list[nn.Module](), 3
    for count, factor in zip(_VGG[depth], (1, 2, 4, 8, 8), strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(width, d * factor, 3, 1, 1), nn.ReLU(inplace=True)]
            width = d * factor
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (side // 32) ** 2, 10))
