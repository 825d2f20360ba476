"""Small models and data of the documents' formats, in place of what would have to be downloaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["images", "small_network"]


def images(n: int, classes: int = 10, side: int = 16) -> tuple[Tensor, Tensor]:
    """`n` images of three channels, and their labels."""
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(n, 3, side, side, generator=draw),
        torch.randint(0, classes, (n,), generator=draw),
    )


def small_network(classes: int = 10) -> nn.Module:
    """A convolution and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )
