"""Cut logical batches into physical ones: which examples are in which part, padding between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from dptorch.errors import PrivacyError
from dptorch.sampling.padding import zeros_like_batch
from dptorch.sampling.sampler import Sampler

__all__ = ["PaddedDataset", "PhysicalBatch", "PhysicalPlan"]

_PADDING: Final = -1  # the index of an example of zeros


@dataclass(frozen=True)
class PhysicalBatch:
    """Position of a physical batch in its logical batch. The numbers of examples are NOT PRIVATE.

    Attributes:
        logical_step: step whose logical batch this is a part of.
        index: position among the parts of that logical batch, from 0.
        count: number of those parts, >= 1.
        examples: real examples in it; 0 for an empty logical batch.
        padding: examples of zeros in it, to be given weight zero.
    """

    logical_step: int
    index: int
    count: int
    examples: int
    padding: int = 0

    @property
    def is_last(self) -> bool:
        """Whether the logical batch is complete once this part is."""
        return self.index == self.count - 1


class PhysicalPlan:
    """Index lists of the parts to load, as a batch sampler of DataLoader.

    DataLoader reads ahead of the loop, so what each list is goes into `parts`, in the same order;
    an empty logical batch is an entry of `parts` without a list.
    """

    def __init__(
        self,
        sampler: Sampler,
        max_size: int | None,
        capacity: int | None,
        rank: int,
        world_size: int,
        even: bool,
    ) -> None:
        self._sampler = sampler
        self._max_size = max_size
        self._capacity = capacity
        self._even = even
        self._rank = rank
        self._world_size = world_size
        self._next: tuple[range, deque[PhysicalBatch]] = (range(0), deque())

    @property
    def pads(self) -> bool:
        """Whether examples of zeros are among those to load."""
        return self._even or self._capacity is not None

    def begin(self, steps: range) -> deque[PhysicalBatch]:
        """Set what the next `iter` covers; the returned queue fills as DataLoader reads ahead."""
        parts: deque[PhysicalBatch] = deque()
        self._next = (steps, parts)
        return parts

    def split(self, step: int) -> tuple[NDArray[np.int64], int, int]:
        """(examples of a logical batch, rows that go through the model, number of parts)."""
        drawn = self._sampler.draw(step)
        if self._capacity is not None and len(drawn) > self._capacity:
            raise PrivacyError(
                f"a batch has more examples than capacity={self._capacity}. Its sampler should have "
                "kept to it. Make both from one plan."
            )
        # The rows of the rank with the most, so that all go through the model equally often.
        rows = -(-(self._capacity or len(drawn)) // self._world_size)
        return drawn, rows, max(1, -(-rows // (self._max_size or max(1, rows))))

    def __iter__(self) -> Iterator[list[int]]:
        return self._lists(*self._next)

    def _lists(self, steps: range, parts: deque[PhysicalBatch]) -> Iterator[list[int]]:
        for step in steps:
            drawn, rows, count = self.split(step)
            size = self._max_size or max(1, rows)
            # Every world_size-th: no rank has more than one
            # example more than another, whatever was drawn.
            share: list[int] = drawn[self._rank :: self._world_size].tolist()
            for index in range(count):
                indices = share[index * size : (index + 1) * size]
                # With a capacity every part is as large as every
                # other, whatever was drawn: sizes would tell.
                if self._capacity is not None:
                    full = min(size, rows)
                else:
                    full = max(1, min(size, rows - index * size) if self._even else len(indices))
                padding = full - len(indices)
                # Before the list, and without one for an empty batch:
                # its step is counted and gets noise all the same.
                parts.append(PhysicalBatch(step, index, count, len(indices), padding))
                if indices or self.pads:
                    yield indices + [_PADDING] * padding


class PaddedDataset(Dataset[Any]):
    """A data set with an example of zeros at the index `_PADDING`."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._zeros: Any = None

    def __getitem__(self, index: int) -> Any:
        if index != _PADDING:
            return self._dataset[index]
        if self._zeros is None:
            self._zeros = zeros_like_batch(self._dataset[0])
        return self._zeros

    def __getitems__(self, indices: list[int]) -> list[Any]:
        fetch = getattr(self._dataset, "__getitems__", None)
        real = [index for index in indices if index != _PADDING]
        found = (fetch(real) if fetch else [self._dataset[i] for i in real]) if real else []
        # In the order of `indices`, in which padding comes last.
        return [*found, *(self[_PADDING] for _ in range(len(indices) - len(real)))]

    def __len__(self) -> int:
        return len(self._dataset)
