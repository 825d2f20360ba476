"""Shadow models: the audited training, repeated on random halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from dptorch.audit.evidence import Array
from dptorch.audit.scores.signals import with_progress
from dptorch.errors import ConfigurationError

__all__ = ["shadow_signals"]

Model = TypeVar("Model")


def shadow_signals(
    train: Callable[[Array], Model],
    signal: Callable[[Model], Array],
    *,
    examples: int,
    models: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Array, Array]:
    """Train shadow models on random halves and take a signal of every example from each.

    Halves come in complementary pairs, so that each example is in exactly half of the models.

    Args:
        train: trains a model on the examples at the given indices, int64 [n].
        signal: a number for each example from a model, [N].
        examples: how many there are, N.
        models: how many to train; even.

    Returns:
        signals, float64 [S, N], and memberships, bool [S, N].

    Raises:
        ConfigurationError: an odd number of models, or fewer than two.

    Example:
        >>> signals, member = shadow_signals(
        ...     lambda chosen: set(chosen.tolist()),
        ...     lambda model: np.array([float(i in model) for i in range(10)]),
        ...     examples=10, models=4)
        >>> bool((signals == member).all()), member.sum(0).tolist()
        (True, [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    if models < 2 or models % 2:
        raise ConfigurationError(f"models={models}: expected an even number, at least 2.")
    rng = np.random.default_rng(seed)
    member = np.zeros((models, examples), dtype=bool)
    for i in range(0, models, 2):
        member[i, rng.permutation(examples)[: examples // 2]] = True
        member[i + 1] = ~member[i]
    found = [
        np.asarray(signal(train(np.flatnonzero(member[i]))), float)
        for i in with_progress(range(models), progress, "Shadow models")
    ]
    return np.stack(found), member
