"""Which models are trained privately in this process."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Attached", "attach", "is_training", "protected"]


class Attached(Protocol):
    """What is on a model that is trained privately."""

    parameters: dict[str, Tensor]

    @property
    def is_attached(self) -> bool:
        """Whether it still is."""


_attached: weakref.WeakSet[Attached] = weakref.WeakSet()


def attach(hooks: Attached) -> None:
    """Note that `hooks` are on a model."""
    _attached.add(hooks)


def is_training() -> bool:
    """Whether a model is trained privately, and gradients are enabled."""
    return torch.is_grad_enabled() and any(hooks.is_attached for hooks in _attached)


def protected() -> Mapping[int, Tensor]:
    """The parameters that are trained privately, by ``id``."""
    attached = [hooks for hooks in _attached if hooks.is_attached]
    return {id(p): p for hooks in attached for p in hooks.parameters.values()}
