"""What a case of the zoo is, and how one is entered."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tests.oracles.loop import Loss
from torch import Tensor, nn

B = 4


@dataclass(frozen=True)
class Case:
    """A model, a batch, and a loss with one value for each example."""

    model: nn.Module
    batch: tuple[Tensor, ...]
    loss: Loss


def squares(model: nn.Module, *batch: Tensor) -> Tensor:
    return model(*batch).square().flatten(1).sum(1)


def classes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


ZOO: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    ZOO[build.__name__] = build
    return build


def labels(n: int = 3) -> Tensor:
    return torch.randint(0, n, (B,))


class Lambda(nn.Module):
    """A module from parameters and a function of (module, inputs)."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                setattr(self, name, part)
            else:
                setattr(self, name, nn.Parameter(part))
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)
