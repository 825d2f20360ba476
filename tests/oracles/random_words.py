"""How much randomness samplers take, counted: a measure of work that no busy machine changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dptorch.randomness import RootKey
from dptorch.sampling import epochs, fixed_size, permutation, poisson, truncated
from dptorch.sampling.sampler import stream

DRAWING = (epochs, fixed_size, poisson, truncated)


class Words:
    """64-bit words taken so far from sampling streams and by keyed permutations."""

    def __init__(self) -> None:
        self.streams: list[np.random.Generator] = []
        self.permuted = 0

    @property
    def taken(self) -> int:
        """Philox makes four words at a time, and its state counts the fours."""
        states: list[Any] = [generator.bit_generator.state for generator in self.streams]
        return 4 * sum(int(s["state"]["counter"][0]) for s in states) + self.permuted


@contextmanager
def counted_words() -> Iterator[Words]:
    """Count what is drawn inside the block."""
    words, plain = Words(), permutation._words

    def counted_stream(key: RootKey, *counters: int) -> np.random.Generator:
        words.streams.append(stream(key, *counters))
        return words.streams[-1]

    def counted_permutation(key: bytes, count: int) -> Any:
        words.permuted += count
        return plain(key, count)

    for module in DRAWING:
        setattr(module, "stream", counted_stream)  # noqa: B010
    permutation._words = counted_permutation
    try:
        yield words
    finally:
        for module in DRAWING:
            setattr(module, "stream", stream)  # noqa: B010
        permutation._words = plain
