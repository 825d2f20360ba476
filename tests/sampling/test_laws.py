"""Every scheme's batches have exactly the law that its accounting event assumes.

Small cases by brute force: the probability of every outcome is worked out and compared with how often
it was drawn. Larger ones by properties. A test rejects when its p-value is below FALSE_ALARM. Keys are
fixed, so a correct sampler does not fail at random; with fresh keys, one of the 30 p-values here would
be below it in at most 30 of 10**7 runs. Poisson sampling itself: test_poisson.py.
"""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tests.oracles.random_words import counted_words

from dptorch.errors import ConfigurationError
from dptorch.randomness import RootKey
from dptorch.sampling import (
    SCHEMES,
    CyclicPoissonSampler,
    FixedSizeSampler,
    PoissonSampler,
    RandomAllocationSampler,
    Sampler,
    SequentialSampler,
    ShuffledSampler,
    Terms,
    TruncatedPoissonSampler,
)

FALSE_ALARM = 1e-7
KEY = RootKey.from_seed(11)
# A keyed permutation of 10**8 takes 32 words a row and column of a square of them.
EPOCH_WORDS = 32 * 10**4

Draw = Callable[[int], np.ndarray]  # step -> indices


def p_value(outcomes: Mapping[Hashable, float], drawn: list[Any]) -> float:
    """Chi-square of outcomes against their probabilities; 0 if something impossible was drawn."""
    counts = Counter(drawn)
    if set(counts) - set(outcomes):
        return 0.0
    assert math.isclose(sum(outcomes.values()), 1.0)
    expected = np.array(list(outcomes.values())) * len(drawn)
    assert expected.min() >= 5, "too few draws for the chi-square law"
    return float(stats.chisquare([counts[o] for o in outcomes], expected).pvalue)


def subsets(n: int, size: int | None = None) -> list[tuple[int, ...]]:
    sizes = range(n + 1) if size is None else [size]
    return [s for k in sizes for s in itertools.combinations(range(n), k)]


def batches(draw: Draw, steps: int) -> list[tuple[int, ...]]:
    return [tuple(draw(step).tolist()) for step in range(steps)]


def epochs(draw: Draw, steps_per_epoch: int, count: int) -> list[tuple[tuple[int, ...], ...]]:
    drawn = batches(draw, steps_per_epoch * count)
    starts = range(0, len(drawn), steps_per_epoch)
    return [tuple(drawn[at : at + steps_per_epoch]) for at in starts]


# -- brute force -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_fixed_size_draws_every_subset_alike(size: int) -> None:
    sampler = FixedSizeSampler(5, size, KEY)
    law = {s: 1 / math.comb(5, size) for s in subsets(5, size)}
    assert p_value(law, batches(sampler.draw, 4000)) > FALSE_ALARM


def test_replacement_draws_every_word_alike() -> None:
    words = Counter(tuple(sorted(w)) for w in itertools.product(range(3), repeat=3))
    law = {word: n / 27 for word, n in words.items()}
    drawn = batches(FixedSizeSampler(3, 3, KEY, replacement=True).draw, 6000)
    assert p_value(law, drawn) > FALSE_ALARM


@pytest.mark.slow
def test_truncation_keeps_a_uniform_subset() -> None:
    rate, capacity = 0.4, 2
    law = dict.fromkeys([s for s in subsets(5) if len(s) <= capacity], 0.0)
    for drawn in subsets(5):
        probability = rate ** len(drawn) * (1 - rate) ** (5 - len(drawn))
        kept = list(itertools.combinations(drawn, min(capacity, len(drawn))))
        for s in kept:
            law[s] += probability / len(kept)
    found = batches(TruncatedPoissonSampler(5, rate, KEY, capacity).draw, 8000)
    assert p_value(law, found) > FALSE_ALARM


def allocation_law(n: int, steps: int) -> dict[Hashable, float]:
    return {
        tuple(tuple(i for i in range(n) if a[i] == s) for s in range(steps)): steps**-n
        for a in itertools.product(range(steps), repeat=n)
    }


@pytest.mark.slow
def test_random_allocation_is_independent_and_uniform() -> None:
    for n, steps in ((3, 3), (4, 2)):
        sampler = RandomAllocationSampler(n, steps, KEY)
        drawn = epochs(sampler.draw, steps, 4000)
        assert p_value(allocation_law(n, steps), drawn) > FALSE_ALARM


def cyclic_law(n: int, bands: int, steps: int, rate: float) -> dict[Hashable, float]:
    """Of the batches of `steps` steps: a fair group for each example, and coins in its turns."""
    one: Counter[tuple[int, ...]] = Counter()
    for group in range(bands):
        turns = range(group, steps, bands)
        for coins in itertools.product((0, 1), repeat=len(turns)):
            drawn = tuple(t for t, coin in zip(turns, coins, strict=True) if coin)
            one[drawn] += math.prod(rate if c else 1 - rate for c in coins) / bands  # type: ignore
    law: Counter[Hashable] = Counter()
    for each in itertools.product(one, repeat=n):
        batch = tuple(tuple(i for i in range(n) if t in each[i]) for t in range(steps))
        law[batch] += math.prod(one[drawn] for drawn in each)  # type: ignore[assignment]
    return dict(law)


def drawn_with_many_keys(sampler: Callable[[RootKey], Sampler], steps: int) -> list[Any]:
    keys = (RootKey.from_seed(seed) for seed in range(4000))
    return [tuple(batches(sampler(key).draw, steps)) for key in keys]


@pytest.mark.slow
def test_cyclic_sampling_has_the_law_of_its_event() -> None:
    """Over keys, as groups are dealt once for each; and a twin that forgets its groups."""
    law = cyclic_law(2, 2, 4, 0.6)
    found = drawn_with_many_keys(lambda key: CyclicPoissonSampler(2, 0.3, 2, key), 4)
    assert p_value(law, found) > FALSE_ALARM
    assert p_value(law, drawn_with_many_keys(lambda key: PoissonSampler(2, 0.3, key), 4)) == 0.0


def too_soon(draw: Draw, bands: int, steps: int) -> int:
    """How often an example is drawn again within `bands` steps."""
    drawn = [set(draw(step).tolist()) for step in range(steps)]
    return sum(
        len(batch & later) for t, batch in enumerate(drawn) for later in drawn[t + 1 : t + bands]
    )


@pytest.mark.parametrize("bands", [2, 8])
def test_cyclic_sampling_keeps_participations_apart(bands: int) -> None:
    rate = 1 / (2 * bands)
    sampler = CyclicPoissonSampler(300, rate, bands, KEY)
    assert too_soon(sampler.draw, bands, 5 * bands) == 0
    assert too_soon(PoissonSampler(300, rate, KEY).draw, bands, 5 * bands) > 0, (
        "a twin without groups"
    )


def test_one_group_is_poisson_sampling_draw_by_draw() -> None:
    one, poisson = CyclicPoissonSampler(300, 0.1, 1, KEY), PoissonSampler(300, 0.1, KEY)
    assert batches(one.draw, 20) == batches(poisson.draw, 20)


def shuffle_law(n: int, sizes: list[int]) -> dict[Hashable, float]:
    arrangements = {
        tuple(tuple(sorted(p[a:b])) for a, b in itertools.pairwise(np.cumsum([0, *sizes])))
        for p in itertools.permutations(range(n))
    }
    return dict.fromkeys(arrangements, 1 / len(arrangements))


def test_shuffling_is_uniform() -> None:
    for n, sizes in ((4, [2, 2]), (5, [1, 2, 2])):
        drawn = epochs(ShuffledSampler(n, len(sizes), KEY).draw, len(sizes), 4000)
        assert p_value(shuffle_law(n, sizes), drawn) > FALSE_ALARM


def test_sequential_goes_through_the_data_in_order() -> None:
    sampler = SequentialSampler(10, 4, KEY)
    for _, epoch in itertools.groupby(range(12), key=lambda step: step // 4):
        drawn = [sampler.draw(step) for step in epoch]
        assert np.concatenate(drawn).tolist() == list(range(10))
        assert [len(d) for d in drawn] == [2, 3, 2, 3]


# Broken twins, passed off as what they are not.


def test_shuffled_passed_off_as_random_allocation_is_caught() -> None:
    drawn = epochs(ShuffledSampler(4, 2, KEY).draw, 2, 4000)
    assert p_value(allocation_law(4, 2), drawn) < FALSE_ALARM


@pytest.mark.slow
def test_random_allocation_passed_off_as_poisson_is_caught() -> None:
    law = {s: 0.5 ** len(s) * 0.5 ** (4 - len(s)) for s in subsets(4)}
    pairs = {(a, b): p * q for a, p in law.items() for b, q in law.items()}
    poisson = PoissonSampler(4, 0.5, KEY)
    assert p_value(pairs, epochs(poisson.draw, 2, 4000)) > FALSE_ALARM
    allocated = epochs(RandomAllocationSampler(4, 2, KEY).draw, 2, 4000)
    assert p_value(law, [first for first, _ in allocated]) > FALSE_ALARM, "one step alone is"
    assert p_value(pairs, allocated) < FALSE_ALARM


@pytest.mark.slow
def test_fixed_size_passed_off_as_poisson_is_caught() -> None:
    law = {s: 0.4 ** len(s) * 0.6 ** (5 - len(s)) for s in subsets(5)}
    assert p_value(law, batches(FixedSizeSampler(5, 2, KEY).draw, 4000)) < FALSE_ALARM


def test_truncation_of_the_last_examples_is_caught() -> None:
    """Cutting a sorted batch, instead of dropping at random, favours the first examples."""
    poisson = PoissonSampler(40, 0.25, KEY)
    kept = np.concatenate([poisson.draw(step)[:10] for step in range(2000)])
    counts = np.bincount(kept, minlength=40)
    assert stats.chisquare(counts).pvalue < FALSE_ALARM
    honest = TruncatedPoissonSampler(40, 0.25, KEY, 10)
    kept = np.concatenate([honest.draw(step) for step in range(2000)])
    counts = np.bincount(kept, minlength=40)
    # Indicators of one batch are dependent, but less spread than independent ones: conservative.
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


# -- properties at a larger size -----------------------------------------------------------------------

N, STEPS_PER_EPOCH, EPOCHS = 60, 5, 2500


def allocation_p_values(draw: Draw) -> dict[str, float]:
    """The p-value of each property that makes a sampler random allocation."""
    place = np.full((EPOCHS, N), -1)
    sizes = []
    for step in range(EPOCHS * STEPS_PER_EPOCH):
        drawn = draw(step)
        place[step // STEPS_PER_EPOCH, drawn] = step % STEPS_PER_EPOCH
        if step % STEPS_PER_EPOCH == 0:  # one step an epoch: sizes within an epoch are dependent
            sizes.append(len(drawn))
    if (place < 0).any():
        return {"once an epoch": 0.0}
    s = STEPS_PER_EPOCH
    counts = np.array([np.bincount(column, minlength=s) for column in place.T])
    inclusion = ((counts - EPOCHS / s) ** 2).sum() / (EPOCHS / s)
    # Whether two examples meet: independent from pair to pair, two at a time.
    spread = math.sqrt((1 / s) * (1 - 1 / s) * EPOCHS)
    together = sum((place == t).T.astype(float) @ (place == t) for t in range(s))
    pairs = (together[np.triu_indices(N, 1)] - EPOCHS / s) / spread
    again = ((place[1:] == place[:-1]).sum() - (EPOCHS - 1) * N / s) / (
        spread * math.sqrt(N * (EPOCHS - 1) / EPOCHS)
    )
    law = stats.binom(N, 1 / s)
    cells = [-1, *range(int(law.ppf(0.01)), int(law.ppf(0.99))), N]
    observed = np.histogram(sizes, np.array(cells) + 0.5)[0]
    expected = np.diff(law.cdf(cells)) * EPOCHS
    return {
        "inclusion": two_sided(inclusion, N * (s - 1)),
        "pairwise independence": two_sided((pairs**2).sum(), len(pairs)),
        "every pair": min(1.0, 2 * len(pairs) * float(stats.norm.sf(np.abs(pairs).max()))),
        "independence of epochs": 2 * float(stats.norm.sf(abs(again))),
        "batch size": float(stats.chisquare(observed, expected).pvalue),
    }


def two_sided(statistic: float, freedom: int) -> float:
    law = stats.chi2(freedom)
    return float(min(1.0, 2.0 * min(law.cdf(statistic), law.sf(statistic))))


def rejected(draw: Draw) -> set[str]:
    return {name for name, p in allocation_p_values(draw).items() if p < FALSE_ALARM}


def allocated(step: int) -> np.ndarray:
    return ALLOCATION.draw(step)


ALLOCATION = RandomAllocationSampler(N, STEPS_PER_EPOCH, KEY)
HALVES = RandomAllocationSampler(N // 2, STEPS_PER_EPOCH, KEY)
SHUFFLED = ShuffledSampler(N, STEPS_PER_EPOCH, KEY)
POISSON = PoissonSampler(N, 1 / STEPS_PER_EPOCH, KEY)


def in_pairs(step: int) -> np.ndarray:
    half = HALVES.draw(step)
    return np.concatenate([2 * half, 2 * half + 1])


def same_every_other_epoch(step: int) -> np.ndarray:
    epoch, at = divmod(step, STEPS_PER_EPOCH)
    return ALLOCATION.draw(epoch // 2 * STEPS_PER_EPOCH + at)


@pytest.mark.slow
def test_random_allocation_has_its_law() -> None:
    assert rejected(allocated) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("twin", "caught_by"),
    [
        (SHUFFLED.draw, "batch size"),
        (SHUFFLED.draw, "pairwise independence"),
        (in_pairs, "every pair"),
        (in_pairs, "batch size"),
        (same_every_other_epoch, "independence of epochs"),
        (POISSON.draw, "once an epoch"),
    ],
)
def test_other_samplers_are_rejected(twin: Draw, caught_by: str) -> None:
    assert caught_by in rejected(twin)


# -- all schemes -----------------------------------------------------------------------------------


def settled(name: str, *, size: int, batch: float, capacity: int | None = None) -> Terms:
    terms = Terms(batch / size, batch, size, capacity)
    scheme = SCHEMES[name]
    if scheme.capacity is not None and capacity is None:
        terms = Terms(batch / size, batch, size, scheme.capacity(terms, 1000, 1e-6))
    return scheme.settle(terms)


def make(name: str, *, size: int, batch: float, key: RootKey = KEY) -> Sampler:
    return SCHEMES[name].sampler(settled(name, size=size, batch=batch), size, key)


@pytest.mark.parametrize("name", SCHEMES)
def test_draws_are_functions_of_key_and_step(name: str) -> None:
    least_gap = 0 if name == "fixed-size-with-replacement" else 1
    for size, batch in ((500, 20.0), (200_000, 100.0)):
        a, b = (make(name, size=size, batch=batch) for _ in range(2))
        steps = [0, 1, 2, 30, 31, 60]
        forward = [a.draw(step) for step in steps]
        for step, drawn in reversed(list(zip(steps, forward, strict=True))):
            assert np.array_equal(b.draw(step), drawn), "in any order"
            assert drawn.dtype == np.int64
            assert (np.diff(drawn) >= least_gap).all()
            assert drawn.size == 0 or (drawn[0] >= 0 and drawn[-1] < size)
        other = make(name, size=size, batch=batch, key=RootKey.from_seed(12))
        assert np.array_equal(other.draw(0), forward[0]) == (name == "sequential")
        assert isinstance(a, Sampler)
        assert (a.scheme, a.sample_size) == (name, size)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_mean_batch_is_the_plans(name: str) -> None:
    sampler = make(name, size=1000, batch=40)
    sizes = [len(sampler.draw(step)) for step in range(1000)]
    assert abs(sum(sizes) / 1000 - 40) < 6 * math.sqrt(40 / 1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_work_is_of_the_order_of_the_batch(name: str) -> None:
    """10**8 examples: an index vector would take 800 MB, a mask 100 MB."""
    sampler = make(name, size=10**8, batch=4096)
    sampler.draw(0)
    tracemalloc.start()
    sampler.draw(1)
    sampler.draw(10**6)  # of another epoch
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20
    with counted_words() as words:
        sizes = [len(sampler.draw(10**6 + step)) for step in range(100)]
    assert words.taken <= 1.25 * 100 * 4096 + EPOCH_WORDS
    assert abs(sum(sizes) / 100 - 4096) < 6 * 6.4 + 1


def test_a_sampler_that_asks_every_example_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: one random word for each example of the population."""
    monkeypatch.setattr(
        "dptorch.sampling.poisson.poisson_indices",
        lambda generator, size, rate: np.flatnonzero(generator.random(size) < rate),
    )
    with counted_words() as words:
        make("poisson", size=10**6, batch=4096).draw(0)
    assert words.taken >= 10**6


def test_schemes_and_names_agree() -> None:
    for name, scheme in SCHEMES.items():
        assert scheme.name == name
        terms = settled(name, size=100, batch=10)
        text = scheme.describe(terms, "user")
        assert "user" in text or "batch" in text
        assert "{" not in text
        assert scheme.settle(terms) == terms
        event = scheme.event(terms, 1.0, 7)
        assert event.steps == 7


@pytest.mark.parametrize(
    "broken",
    [
        lambda: CyclicPoissonSampler(10, 0.3, 4, KEY),
        lambda: CyclicPoissonSampler(10, 0.3, 0, KEY),
        lambda: CyclicPoissonSampler(10, 0.3, 2.5, KEY),  # type: ignore[arg-type]
        lambda: FixedSizeSampler(10, 11, KEY),
        lambda: FixedSizeSampler(10, 0, KEY),
        lambda: FixedSizeSampler(10, 2.5, KEY),  # type: ignore[arg-type]
        lambda: FixedSizeSampler(0, 1, KEY),
        lambda: FixedSizeSampler(10, 1, 7),  # type: ignore[arg-type]
        lambda: RandomAllocationSampler(10, 0, KEY),
        lambda: RandomAllocationSampler(2**41, 5, KEY),
        lambda: ShuffledSampler(10, 2.0, KEY),  # type: ignore[arg-type]
        lambda: SequentialSampler(-1, 2, KEY),
        lambda: TruncatedPoissonSampler(100, 0.5, KEY, 49),
        lambda: TruncatedPoissonSampler(100, 0.5, KEY, 60.5),  # type: ignore[arg-type]
        lambda: TruncatedPoissonSampler(100, 1.5, KEY, 200),
        lambda: settled("shuffled", size=10, batch=0.5),
    ],
)
def test_impossible_arguments_are_refused(broken: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError):
        broken()
