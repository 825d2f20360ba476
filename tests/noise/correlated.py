"""The noise of the steps of a run, whole and in shards after a restart."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch

from dptorch.clipping.sums import ClippedSum
from dptorch.randomness import RootKey

__all__ = ["KEY", "in_shards_after_a_restart", "taken"]

KEY = RootKey.from_seed(3)


def taken(
    noise: Any,
    steps: int,
    *,
    size: int = 46,
    first: int = 0,
    norm: float = 1.0,
    skip: Collection[int] = (),
    **more: Any,
) -> np.ndarray:
    """The noise of steps, [steps, coordinates]."""
    found = []
    for t in range(first, steps):
        if t not in skip:
            sums = ClippedSum({"weight": torch.zeros(size)}, norm)
            released = noise.privatize(sums, KEY, t, context=100 + t, **more)
            found.append(released.values["weight"].double().numpy())
    return np.stack(found)


def in_shards_after_a_restart(
    make: Callable[[], Any], steps: int, *, size: int, restart: int
) -> np.ndarray:
    """The noise of the steps from `restart` on, of two shards of `size` coordinates, side by side."""

    def part(first: int, size: int) -> np.ndarray:
        before = make()
        taken(before, restart, size=size, offsets={"weight": first})
        after = make()
        after.restore(before.state(restart), restart)
        return taken(after, steps, size=size, first=restart, offsets={"weight": first})

    return np.concatenate([part(0, 4_001), part(4_001, size - 4_001)], axis=1)
