"""The keyed permutation: a bijection that is uniform over keys, where that can be counted.

A chi-square test rejects below FALSE_ALARM. Keys are fixed, so a correct permutation does not fail at
random; with fresh keys, one of the tests here would fail in at most 8 of 10**7 runs.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from dptorch.sampling import permutation
from dptorch.sampling.permutation import KeyedPermutation

FALSE_ALARM = 1e-7
NETWORK = 0  # exact_up_to: the Feistel network at any size


def key(number: int) -> bytes:
    return b"key" + number.to_bytes(8, "big")


def orders(size: int, keys: int, exact_up_to: int) -> Counter[tuple[int, ...]]:
    everywhere = np.arange(size)
    return Counter(
        tuple(KeyedPermutation(size, key(k), exact_up_to=exact_up_to)(everywhere).tolist())
        for k in range(keys)
    )


@pytest.mark.parametrize("exact_up_to", [NETWORK, 1 << 16])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 1000, 9973])
def test_it_is_a_bijection(size: int, exact_up_to: int) -> None:
    order = KeyedPermutation(size, key(1), exact_up_to=exact_up_to)
    values = order(np.arange(size))
    assert sorted(values.tolist()) == list(range(size))
    some = np.array([size - 1, 0, size // 2])
    assert order(some).tolist() == values[some].tolist(), "positions can be asked for in any order"


@pytest.mark.slow
@pytest.mark.parametrize("exact_up_to", [NETWORK, 1 << 16])
@pytest.mark.parametrize(("size", "keys"), [(4, 4800), (5, 7200)])
def test_every_order_is_equally_likely(size: int, keys: int, exact_up_to: int) -> None:
    """Brute force over all 24 or 120 orders; 5 does not fill its network's domain of 6."""
    counts = orders(size, keys, exact_up_to)
    observed = [counts[order] for order in itertools.permutations(range(size))]
    assert stats.chisquare(observed).pvalue > FALSE_ALARM


@pytest.mark.slow
def test_pairs_of_a_larger_network_are_uniform() -> None:
    """Where two given elements of 30 go: 870 ordered pairs of places."""
    counts = Counter(
        tuple(KeyedPermutation(30, key(k), exact_up_to=NETWORK)(np.array([3, 4])).tolist())
        for k in range(9000)
    )
    observed = [counts[pair] for pair in itertools.permutations(range(30), 2)]
    assert stats.chisquare(observed).pvalue > FALSE_ALARM


def test_few_rounds_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a network of two rounds is a bijection, but far from uniform."""
    monkeypatch.setattr(permutation, "_ROUNDS", 2)
    counts = orders(5, 2000, NETWORK)
    observed = [counts[order] for order in itertools.permutations(range(5))]
    assert stats.chisquare(observed).pvalue < FALSE_ALARM


def test_a_large_network_spreads_a_stretch_evenly() -> None:
    order = KeyedPermutation(10**9, key(0))
    values = order(np.arange(500_000, 520_000))
    assert len(set(values.tolist())) == 20_000
    assert values.min() >= 0
    assert values.max() < 10**9
    assert stats.kstest(values / 10**9, "uniform").pvalue > FALSE_ALARM
    steps = np.diff(values) % 10**9
    assert stats.kstest(steps / 10**9, "uniform").pvalue > FALSE_ALARM


def test_other_keys_give_other_orders() -> None:
    for size in (1000, 10**6):
        a, b = (KeyedPermutation(size, key(k))(np.arange(1000)) for k in (1, 2))
        assert (a == b).mean() < 0.02
        assert (a == KeyedPermutation(size, key(1))(np.arange(1000))).all()


@pytest.mark.parametrize("size", [0, -1, 2**41])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="size"):
        KeyedPermutation(size, b"k")
