"""`UniformWithReplacementSampler` of Opacus 0.x: draws for a DataLoader that the user made.

In 0.x a loop adds up n batches of rate q (``virtual_step``) and the engine accounts one batch of rate
n q. But n independent draws are not one: an example may be in two of them, and then counts twice.
Here they are: the engine tells the sampler its own rate, the sampler draws one batch of that rate and
deals it out, each example to one of n parts at random. Every part by itself is still a draw of rate q.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch.utils.data.dataloader import _BaseDataLoaderIter

from dptorch.compat.arguments import known_arguments
from dptorch.errors import PrivacyError
from dptorch.randomness import RootKey
from dptorch.sampling import PhysicalBatch, PoissonSampler
from dptorch.sampling.sampler import stream

__all__ = ["UniformWithReplacementSampler"]


class UniformWithReplacementSampler:
    """Index lists of batches in which every example is with probability `sample_rate`.

    Args:
        num_samples: number of examples.
        sample_rate: probability of drawing an example.
        generator: its seed makes the draws those of that seed: for tests, not private.
    """

    _made: ClassVar[list[weakref.ref[UniformWithReplacementSampler]]] = []

    @known_arguments
    def __init__(
        self, num_samples: int, sample_rate: float, generator: torch.Generator | None = None
    ) -> None:
        self.num_samples = num_samples
        self.sample_rate = sample_rate
        seed = None if generator is None else generator.initial_seed()
        self._key = RootKey.from_os() if seed is None else RootKey.from_seed(seed)
        self._draws = 0
        self._parts = 1
        self._poisson = PoissonSampler(num_samples, sample_rate, self._key)
        self._first_step: Callable[[], int] | None = None
        self._iteration: _Iteration | None = None
        self._made.append(weakref.ref(self))

    @classmethod
    def for_rate(
        cls, sample_rate: float, sample_size: int | None = None
    ) -> UniformWithReplacementSampler | None:
        """The last one made of which a whole number of draws together have `sample_rate`; over
        `sample_size` examples, if that is said."""
        cls._made[:] = [made for made in cls._made if made() is not None]
        for made in reversed(cls._made):
            sampler = made()
            if sampler is not None and sample_size in (None, sampler.num_samples):
                parts = sample_rate / sampler.sample_rate
                if round(parts) >= 1 and abs(parts - round(parts)) < 1e-6 * parts:
                    return sampler
        return None

    def serve(self, sample_rate: float, first_step: Callable[[], int]) -> None:
        """From the next iteration on, deal out batches of `sample_rate`.

        Args:
            sample_rate: a multiple of the sampler's own, at most 1.
            first_step: called at the start of each iteration for the step that its first batch is of;
                whatever was left of a batch before is to be dropped then.
        """
        self._parts = self.parts_of(sample_rate)
        self._poisson = PoissonSampler(self.num_samples, sample_rate, self._key)
        self._first_step = first_step

    def parts_of(self, sample_rate: float) -> int:
        """How many draws together have `sample_rate`."""
        return round(sample_rate / self.sample_rate)

    @property
    def current(self) -> PhysicalBatch | None:
        """Where the batch that the loop has now belongs; None if that is not known."""
        return None if self._iteration is None else self._iteration.current

    def __len__(self) -> int:
        """Draws of an iteration."""
        return max(1, round(1 / self.sample_rate))

    def __iter__(self) -> Iterator[list[int]]:
        # DataLoader asks ahead of the loop, as many batches as its workers like. Only its iterator,
        # which is what calls this method, knows how many it has handed out.
        caller = sys._getframe(1).f_locals.get("self")
        source = caller if isinstance(caller, _BaseDataLoaderIter) else None
        if self._iteration is not None:
            self._iteration.overtaken = True
        step = 0 if self._first_step is None else self._first_step()
        self._iteration = _Iteration(self, source, step)
        return self._iteration

    def deal(self, parts: int) -> list[list[int]]:
        """The next draw, in `parts` of its parts."""
        draw, self._draws = self._draws, self._draws + 1
        indices = self._poisson.draw(draw)
        owner = stream(self._key, draw, 1).integers(0, self._parts, len(indices))
        return [indices[owner == part].tolist() for part in range(parts)]


class _Iteration:
    """One pass of a DataLoader; `places` says of each list what it is."""

    def __init__(
        self, sampler: UniformWithReplacementSampler, source: object | None, step: int
    ) -> None:
        self.overtaken = False
        self._places: list[PhysicalBatch] = []
        self._source = None if source is None else weakref.ref(source)
        self._lists = self._deal(sampler, step)

    @property
    def current(self) -> PhysicalBatch | None:
        source = None if self._source is None else self._source()
        if not isinstance(source, _BaseDataLoaderIter) or not source._num_yielded > 0:
            return None
        return self._places[source._num_yielded - 1]

    def _deal(self, sampler: UniformWithReplacementSampler, step: int) -> Iterator[list[int]]:
        left, whole = len(sampler), sampler._parts
        while left:
            # The last batch of an epoch may come in fewer parts: a draw of a smaller rate.
            count = min(whole, left)
            for index, indices in enumerate(sampler.deal(count)):
                # No list may be empty: the first example then stands in, with weight zero.
                padding = 0 if indices else 1
                self._places.append(PhysicalBatch(step, index, count, len(indices), padding))
                yield indices or [0]
            left, step = left - count, step + 1

    def __iter__(self) -> _Iteration:
        return self

    def __next__(self) -> list[int]:
        if self.overtaken:
            raise PrivacyError(
                "this loop over the DataLoader was ended by a newer one over the same sampler. "
                "Finish or leave the first before starting another. To look at the training data "
                "meanwhile, make a second DataLoader without the sampler."
            )
        return next(self._lists)
