"""Poisson subsampling, by exact oracles and by statistical tests that other samplers must fail.

Each test statistic has a known law under Poisson subsampling; a test rejects when its p-value is
below FALSE_ALARM. The seeds are fixed, so a correct sampler does not fail at random; with fresh
seeds, one of the five statistics would be rejected in at most 5 of 10**7 runs.
"""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from tests.oracles.random_words import counted_words

from dptorch.errors import ConfigurationError
from dptorch.randomness import RootKey
from dptorch.sampling import PoissonSampler, Sampler
from dptorch.sampling.poisson import poisson_indices

FALSE_ALARM = 1e-7
N, RATE, STEPS = 60, 0.2, 12_000

Draw = Callable[[int], np.ndarray]  # step -> indices


def dptorch_draw(step: int) -> np.ndarray:
    return PoissonSampler(N, RATE, RootKey.from_seed(7)).draw(step)


def p_values(draw: Draw) -> dict[str, float]:
    """The p-value of each property that makes a sampler Poisson, over STEPS draws."""
    member = np.zeros((STEPS, N), np.float64)
    for step in range(STEPS):
        # add.at, so that an index drawn twice in a batch counts twice.
        np.add.at(member[step], draw(step), 1.0)
    centred = (member - RATE) / math.sqrt(RATE * (1.0 - RATE))
    together = centred.T @ centred / math.sqrt(STEPS)
    pairs = together[np.triu_indices(N, 1)]
    following = (centred[:-1] * centred[1:]).sum() / math.sqrt((STEPS - 1) * N)
    inclusions = (centred.sum(axis=0) ** 2).sum() / STEPS
    return {
        "inclusion": _two_sided_chi2(inclusions, N),
        "pairwise independence": _two_sided_chi2((pairs**2).sum(), len(pairs)),
        "every pair": min(1.0, 2 * len(pairs) * float(stats.norm.sf(np.abs(pairs).max()))),
        "independence of steps": 2 * float(stats.norm.sf(abs(following))),
        "batch size": _binomial_fit(member.sum(axis=1).astype(np.int64)),
    }


def _two_sided_chi2(statistic: float, freedom: int) -> float:
    """Two-sided, because frequencies that are too even are as wrong as too uneven ones."""
    law = stats.chi2(freedom)
    return float(min(1.0, 2.0 * min(law.cdf(statistic), law.sf(statistic))))


def _binomial_fit(sizes: np.ndarray) -> float:
    """Chi-square of the batch sizes, with the ends pooled into cells of at least 10 expected."""
    law = stats.binom(N, RATE)
    low, high = int(law.ppf(10.0 / STEPS)) + 1, int(law.isf(10.0 / STEPS))
    edges = [-1, *range(low, high), N]
    expected = np.diff(law.cdf(edges)) * STEPS
    observed = np.histogram(sizes, np.array(edges) + 0.5)[0]
    return float(stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


def rejected(draw: Draw) -> set[str]:
    return {name for name, p in p_values(draw).items() if p < FALSE_ALARM}


@pytest.mark.slow
def test_draws_have_the_poisson_law() -> None:
    assert rejected(dptorch_draw) == set()


# Broken twins: samplers that are run where Poisson is claimed, with the properties they must fail.


def fixed_size(step: int) -> np.ndarray:
    return np.random.default_rng(step).choice(N, int(N * RATE), replace=False)


def shuffled_epochs(step: int) -> np.ndarray:
    size = int(N * RATE)
    epoch, at = divmod(step, N // size)
    return np.random.default_rng(epoch).permutation(N)[at * size : (at + 1) * size]


def with_replacement(step: int) -> np.ndarray:
    generator = np.random.default_rng(step)
    return generator.integers(0, N, generator.binomial(N, RATE))


def reused_step(step: int) -> np.ndarray:
    return dptorch_draw(step // 2)


def first_never(step: int) -> np.ndarray:
    drawn = dptorch_draw(step)
    return drawn[drawn > 0]


def empty_redrawn(step: int) -> np.ndarray:
    """Skips batches below a size, as loaders that drop empty batches do."""
    drawn = dptorch_draw(step)
    return drawn if len(drawn) > 6 else dptorch_draw(step + STEPS)


def in_blocks(step: int) -> np.ndarray:
    """Right rate for each example, but neighbours enter together."""
    blocks = np.flatnonzero(np.random.default_rng(step).random(N // 2) < RATE)
    return np.concatenate([2 * blocks, 2 * blocks + 1])


def ten_percent_more(step: int) -> np.ndarray:
    return PoissonSampler(N, RATE * 1.1, RootKey.from_seed(7)).draw(step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("twin", "caught_by"),
    [
        (fixed_size, "batch size"),
        (shuffled_epochs, "inclusion"),
        (shuffled_epochs, "independence of steps"),
        (shuffled_epochs, "batch size"),
        (with_replacement, "pairwise independence"),
        (reused_step, "independence of steps"),
        (first_never, "inclusion"),
        (empty_redrawn, "batch size"),
        (in_blocks, "every pair"),
        (in_blocks, "pairwise independence"),
        (ten_percent_more, "inclusion"),
    ],
)
def test_other_samplers_are_rejected(twin: Draw, caught_by: str) -> None:
    assert caught_by in rejected(twin)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_every_subset_has_its_probability(rate: float) -> None:
    """Brute force: all 16 subsets of 4 examples, against q**k (1 - q)**(4 - k)."""
    sampler = PoissonSampler(4, rate, RootKey.from_seed(3))
    steps = 20_000
    subsets = list(itertools.product([0, 1], repeat=4))
    counts = dict.fromkeys(subsets, 0)
    for step in range(steps):
        drawn = set(sampler.draw(step).tolist())
        counts[tuple(int(i in drawn) for i in range(4))] += 1
    expected = np.array([rate ** sum(s) * (1 - rate) ** (4 - sum(s)) * steps for s in subsets])
    observed = np.array([counts[s] for s in subsets])
    rare = expected < 5
    if rare.any():  # pooled, so that the chi-square law holds
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(observed, expected).pvalue > FALSE_ALARM


def test_large_populations_are_drawn_evenly() -> None:
    """Positions within the population, at a rate where almost nothing is drawn."""
    population = 10**12
    sampler = PoissonSampler(population, 1e-9, RootKey.from_seed(0))
    drawn = [sampler.draw(step) for step in range(200)]
    sizes = np.array([len(d) for d in drawn])
    assert abs(sizes.sum() - 200_000) < 6 * math.sqrt(200_000)
    places = np.concatenate(drawn) / population
    assert stats.kstest(places, "uniform").pvalue > FALSE_ALARM


def test_draws_are_functions_of_key_and_step() -> None:
    a, b = (PoissonSampler(5000, 0.01, RootKey.from_seed(1)) for _ in range(2))
    forward = [a.draw(step) for step in range(20)]
    for step in reversed(range(20)):
        assert np.array_equal(b.draw(step), forward[step])
    other = PoissonSampler(5000, 0.01, RootKey.from_seed(2))
    assert not np.array_equal(other.draw(0), forward[0])


def test_indices_are_distinct_sorted_and_in_range() -> None:
    for size, rate in [(1, 0.5), (10, 0.99), (4000, 0.25), (10**8, 1e-5)]:
        sampler = PoissonSampler(size, rate, RootKey.from_seed(0))
        for step in range(50):
            drawn = sampler.draw(step)
            assert drawn.dtype == np.int64
            assert (np.diff(drawn) > 0).all()
            assert drawn.size == 0 or (drawn[0] >= 0 and drawn[-1] < size)


def test_empty_batches_occur_at_their_rate() -> None:
    sampler = PoissonSampler(100, 0.01, RootKey.from_seed(0))
    empty = sum(len(sampler.draw(step)) == 0 for step in range(5000))
    assert stats.binomtest(empty, 5000, 0.99**100).pvalue > FALSE_ALARM


def test_rate_one_takes_everything() -> None:
    drawn = PoissonSampler(17, 1.0, RootKey.from_seed(0)).draw(3)
    assert drawn.tolist() == list(range(17))


class Gaps(np.random.Generator):
    """A generator whose gaps are all one given number."""

    def __init__(self, gap: int) -> None:
        super().__init__(np.random.PCG64(0))
        self.gap = gap

    def geometric(self, p: float, size: int) -> np.ndarray:  # type: ignore[override]
        return np.full(size, self.gap, np.int64)


def test_a_gap_of_zero_draws_nothing_twice() -> None:
    """numpy's inversion returns 0 once in 2**53 gaps."""
    drawn = poisson_indices(Gaps(0), 1000, 0.1)
    assert drawn.tolist() == list(range(1000))


def test_more_gaps_are_drawn_until_the_end_is_passed() -> None:
    assert poisson_indices(Gaps(1), 100_000, 0.001).tolist() == list(range(100_000))


def test_huge_gaps_do_not_overflow() -> None:
    assert poisson_indices(Gaps(2**63 - 1), 2**55, 1e-15).tolist() == []


def test_work_is_of_the_order_of_the_batch() -> None:
    """10**8 examples: an index vector would take 800 MB, a mask 100 MB."""
    sampler = PoissonSampler(10**8, 4096 / 10**8, RootKey.from_seed(0))
    sampler.draw(0)
    tracemalloc.start()
    batches = 50
    with counted_words() as words:
        sizes = [len(sampler.draw(step)) for step in range(batches)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert abs(sum(sizes) / batches - 4096) < 6 * 64 / math.sqrt(batches)
    assert peak < 2**20
    assert words.taken <= 1.25 * 4096 * batches


def test_fits_the_protocol() -> None:
    sampler = PoissonSampler(100, 0.25, RootKey.from_seed(0))
    assert isinstance(sampler, Sampler)
    assert (sampler.scheme, sampler.sample_size, sampler.sample_rate) == ("poisson", 100, 0.25)
    assert sampler.expected_batch_size == 25.0
    assert "secret" not in repr(sampler)


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, math.nan, math.inf, "half", None, True])
def test_impossible_rates_are_refused(rate: object) -> None:
    with pytest.raises(ConfigurationError, match="sample_rate"):
        PoissonSampler(10, rate, RootKey.from_seed(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -1, 2.0, None, True, 2**60])
def test_impossible_sizes_are_refused(size: object) -> None:
    with pytest.raises(ConfigurationError, match="sample_size"):
        PoissonSampler(size, 0.1, RootKey.from_seed(0))  # type: ignore[arg-type]


def test_a_seed_is_no_key() -> None:
    with pytest.raises(ConfigurationError, match="RootKey"):
        PoissonSampler(10, 0.1, 0)  # type: ignore[arg-type]
