"""What libraries do around forward passes to have parameters in place, kept out of recordings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["hidden"]


def hidden(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does the same and is seen by no recording: it moves parameters, and never
    looks at an example."""

    @functools.wraps(function)
    def moves(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return moves
