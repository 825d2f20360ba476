"""Canaries: made-up examples in a run's training data, by which it can be audited later.

Each is in by a fair coin of its own. Whoever audits the run guesses which were, and how often the
guesses are right bounds the run's ε from below: `dptorch.audit`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from dptorch.atomic_files import replacing
from dptorch.errors import ConfigurationError, DataError
from dptorch.randomness import RootKey
from dptorch.training.data import Examples, TrainTest

__all__ = ["CANARY_FILE", "FEWEST", "Canaries", "make_canaries", "plant"]

CANARY_FILE: Final = "canaries.npz"
FEWEST: Final = 20
PURPOSE: Final = "canaries"
# Test examples that canaries take their values from; more add nothing.
_PATTERNS = 2000


@dataclass(frozen=True, eq=False)
class Canaries:
    """The canaries of a run.

    Attributes:
        inputs: float32 [M, *shape].
        labels: int64 [M].
        member: bool [M]: whether each is in the training data.
    """

    inputs: Tensor
    labels: Tensor
    member: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def save(self, path: Path) -> None:
        """Write an `.npz` file; whole or not at all."""
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file,
                inputs=self.inputs.numpy(),
                labels=self.labels.numpy(),
                member=self.member.numpy(),
            )

    @classmethod
    def read(cls, path: Path) -> Canaries:
        """The canaries in a file that `save` wrote.

        Raises:
            DataError: it cannot be read or holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                found = cls(*(torch.from_numpy(file[n]) for n in ("inputs", "labels", "member")))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(f"{path}: not a readable file of canaries ({error}).") from error
        if not len(found.inputs) == len(found.labels) == len(found.member):
            raise DataError(f"{path}: inputs, labels and memberships differ in number.")
        return found


def make_canaries(data: TrainTest, count: int, key: RootKey) -> Canaries:
    """Make up `count` examples and toss a coin for each.

    Every coordinate of an input is one of a randomly chosen *test* example, each coordinate's chosen
    anew, so that values are of the usual size and everything else is noise; the label is random. What
    is learned about such an example is learned by heart. Nothing comes from a training example: one
    that canaries were made from would be in the data twice, and ε would not cover it.

    Raises:
        ConfigurationError: fewer than 20.

    Example:
        >>> test = Examples(torch.randn(50, 3), torch.arange(50) % 2)
        >>> data = TrainTest(test, test, ("a", "b"), (3,), "numbers")
        >>> canaries = make_canaries(data, 100, RootKey.from_seed(0))
        >>> canaries.inputs.shape, 30 < int(canaries.member.sum()) < 70
        (torch.Size([100, 3]), True)
    """
    if count < FEWEST:
        raise ConfigurationError(
            f"canaries={count}: with so few, an audit means nothing. Plant at least {FEWEST}. 1000 is "
            "usual."
        )
    seed = int.from_bytes(key.derive(PURPOSE, 0)[:16], "little")
    rng = np.random.Generator(np.random.Philox(key=seed))
    available = data.sizes[1]
    chosen = rng.choice(available, size=min(available, _PATTERNS), replace=False)
    patterns = torch.stack([data.test[int(i)][0] for i in chosen]).flatten(1).numpy()
    rows = rng.integers(0, len(patterns), size=(count, patterns.shape[1]))
    inputs = np.take_along_axis(patterns, rows, axis=0)
    return Canaries(
        inputs=torch.from_numpy(inputs).reshape(count, *data.input_shape),
        labels=torch.from_numpy(rng.integers(0, len(data.classes), size=count)),
        member=torch.from_numpy(rng.random(count) < 0.5),
    )


def plant(data: TrainTest, canaries: Canaries) -> TrainTest:
    """The data with those canaries added that are in.

    Raises:
        DataError: the canaries are of another shape than the data.

    Example:
        >>> test = Examples(torch.randn(50, 3), torch.arange(50) % 2)
        >>> data = TrainTest(test, test, ("a", "b"), (3,), "numbers")
        >>> planted = plant(data, make_canaries(data, 100, RootKey.from_seed(0)))
        >>> 80 < planted.sizes[0] < 120
        True
    """
    if tuple(canaries.inputs.shape[1:]) != data.input_shape:
        raise DataError(
            f"the canaries have shape {tuple(canaries.inputs.shape[1:])}, the data "
            f"{data.input_shape}: they belong to another run."
        )
    inside = Examples(canaries.inputs[canaries.member], canaries.labels[canaries.member])
    if not len(inside):
        return data
    return replace(
        data,
        train=ConcatDataset([data.train, inside]),
        source=f"{data.source}, and canaries",
    )
