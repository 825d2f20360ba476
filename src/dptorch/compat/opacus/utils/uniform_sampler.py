"""`UniformWithReplacementSampler`: Poisson draws as a batch sampler."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from dptorch.compat.arguments import known_arguments
from dptorch.compat.stand_ins import ONE_PROCESS, stand_in
from dptorch.randomness import RootKey
from dptorch.sampling import PoissonSampler

__all__ = [
    "DistributedUniformWithReplacementSampler",
    "UniformWithReplacementSampler",
    "draw_seed",
]

DistributedUniformWithReplacementSampler = stand_in(
    "DistributedUniformWithReplacementSampler", ONE_PROCESS
)


def draw_seed(generator: torch.Generator) -> int:
    """Return a number drawn from `generator`, which moves on: its next user gets another."""
    drawn = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return int(drawn)


class UniformWithReplacementSampler:
    """Index lists of batches in which every example is with probability `sample_rate`.

    Args:
        num_samples: number of examples.
        sample_rate: probability of drawing an example.
        generator: gives the seed of the draws, at the first of them: for tests, not private.
        steps: batches of an iteration; by default ``1 / sample_rate``, rounded.

    Example:
        >>> sampler = UniformWithReplacementSampler(num_samples=93, sample_rate=1 / 93)
        >>> len(sampler), len(list(sampler))
        (93, 93)
    """

    @known_arguments
    def __init__(
        self,
        *,
        num_samples: int,
        sample_rate: float,
        generator: torch.Generator | None = None,
        steps: int | None = None,
    ) -> None:
        self.num_samples = num_samples
        self.sample_rate = sample_rate
        self.generator = generator
        self.steps = max(1, round(1 / sample_rate)) if steps is None else steps
        self.drawn = 0

    @functools.cached_property
    def poisson(self) -> PoissonSampler:
        """What draws."""
        generator = self.generator
        key = RootKey.from_os() if generator is None else RootKey.from_seed(draw_seed(generator))
        return PoissonSampler(self.num_samples, self.sample_rate, key)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            self.drawn += 1
            yield self.poisson.draw(self.drawn - 1).tolist()
