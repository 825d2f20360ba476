"""The law of the noise, by statistical tests that broken mechanisms must fail.

Each test statistic has a known law under the stated N(0, stddev**2); a test rejects when its
p-value is below FALSE_ALARM. The seeds are fixed, so a correct mechanism does not fail at random;
with fresh seeds, one of the eight statistics would be rejected in at most 8 of 10**7 runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from dptorch.clipping.sums import ClippedSum
from dptorch.noise import GaussianNoise
from dptorch.randomness import RootKey
from tests.noise.repeated_blocks import repeated_blocks, step_key

FALSE_ALARM = 1e-7
STEPS, SIZE = 4, 300_000
MULTIPLIER, MAX_NORM = 1.25, 0.8
STDDEV = MULTIPLIER * MAX_NORM

# (step, size) -> noise added to each of two parameters of that many coordinates
Mechanism = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


def dptorch_noise(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    values = {"a": torch.zeros(size), "b": torch.zeros(size)}
    clipped = ClippedSum(values, MAX_NORM)
    noisy = GaussianNoise(MULTIPLIER).privatize(clipped, RootKey.from_seed(2024), step).values
    return noisy["a"].numpy(), noisy["b"].numpy()


def p_values(mechanism: Mechanism) -> dict[str, float]:
    """The p-value of each property, from STEPS steps of two parameters."""
    drawn = [mechanism(step, SIZE) for step in range(STEPS)]
    noise = np.stack([np.stack(pair) for pair in drawn]).astype(np.float64) / STDDEV
    flat = noise.reshape(-1)
    n = flat.size
    found = {
        "mean": _two_sided(flat.mean() * math.sqrt(n)),
        "variance": _two_sided(((flat**2).mean() - 1.0) * math.sqrt(n / 2.0)),
        "distribution": float(stats.kstest(flat, "norm").pvalue),
        "tail": min(1.0, 3 * min(_tail(flat, limit) for limit in (3.0, 4.0, 4.75))),
        "across parameters": _uncorrelated(noise[:, 0], noise[:, 1]),
        "across steps": _uncorrelated(noise[:-1], noise[1:]),
        "across neighbours": _uncorrelated(flat[:-1], flat[1:]),
    }
    # The two normals of a Box-Muller pair lie half a block apart.
    half = 2**15
    pairs = noise[:, 0, : (SIZE // (2 * half)) * 2 * half].reshape(STEPS, -1, 2, half)
    found["within pairs"] = _uncorrelated(pairs[:, :, 0], pairs[:, :, 1])
    return found


def _two_sided(z: float) -> float:
    return float(2.0 * stats.norm.sf(abs(z)))


def _tail(flat: np.ndarray, limit: float) -> float:
    beyond = int((np.abs(flat) > limit).sum())
    return float(stats.binomtest(beyond, flat.size, 2.0 * stats.norm.sf(limit)).pvalue)


def _uncorrelated(a: np.ndarray, b: np.ndarray) -> float:
    """Of values and of squares: products of independent standard normals have variance 1."""
    a, b = a.reshape(-1), b.reshape(-1)
    values = _two_sided((a * b).sum() / math.sqrt(a.size))
    squares = _two_sided(((a**2 - 1.0) * (b**2 - 1.0)).sum() / math.sqrt(4.0 * a.size))
    return min(1.0, 2.0 * min(values, squares))


def rejected(mechanism: Mechanism) -> set[str]:
    return {name for name, p in p_values(mechanism).items() if p < FALSE_ALARM}


def test_noise_has_the_stated_law() -> None:
    assert rejected(dptorch_noise) == set()


# Broken twins: each is a mistake that has been made somewhere, with the properties it must fail.


def reused_step(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    return dptorch_noise(0, size)


def key_reused_for_each_parameter(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    first, _ = dptorch_noise(step, size)
    return first, first


def divided_by_the_batch(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = dptorch_noise(step, size)
    return a / 64, b / 64


def scale_without_the_clipping_norm(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = dptorch_noise(step, size)
    return a / np.float32(MAX_NORM), b / np.float32(MAX_NORM)


def one_percent_too_little(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = dptorch_noise(step, size)
    return a * np.float32(0.99), b * np.float32(0.99)


def nothing(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(size, np.float32), np.zeros(size, np.float32)


def uniform(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The right mean and variance, the wrong law."""
    generator = np.random.default_rng(step)
    limit = STDDEV * math.sqrt(3.0)
    return generator.uniform(-limit, limit, size), generator.uniform(-limit, limit, size)


def tail_cut_at_four(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = dptorch_noise(step, size)
    return np.clip(a, -4 * STDDEV, 4 * STDDEV), np.clip(b, -4 * STDDEV, 4 * STDDEV)


def one_radius_for_both(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Uncorrelated values with the same size: the squares tell."""
    first, second = dptorch_noise(step, size)
    return first, first * np.sign(second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("twin", "caught_by"),
    [
        (reused_step, "across steps"),
        (key_reused_for_each_parameter, "across parameters"),
        (divided_by_the_batch, "variance"),
        (scale_without_the_clipping_norm, "variance"),
        (one_percent_too_little, "variance"),
        (nothing, "distribution"),
        (uniform, "distribution"),
        (tail_cut_at_four, "tail"),
        (one_radius_for_both, "across parameters"),
    ],
)
def test_broken_noise_is_rejected(twin: Mechanism, caught_by: str) -> None:
    assert caught_by in rejected(twin)


def repeated_windows(mechanism: Mechanism, steps: int = 3, size: int = 500_000) -> int:
    """Windows of four float32 numbers at multiples of four that occur more than once."""
    flat = np.concatenate([np.concatenate(mechanism(step, size)) for step in range(steps)])
    windows = np.ascontiguousarray(flat.astype(np.float32)).view(np.uint64).reshape(-1, 2)
    mixed = windows[:, 0] * np.uint64(0x9E3779B97F4A7C15) + windows[:, 1]
    # 64-bit hashes of 7.5 * 10**5 windows: one accidental pair in 6 * 10**7 runs.
    return len(mixed) - len(np.unique(mixed))


@pytest.mark.slow
def test_no_block_of_the_keystream_occurs_twice() -> None:
    """The fast version of ``python -m tests.noise.repeated_blocks 1e9``. False alarm: one in 3 * 10**6
    runs, by accidental agreement of 8 bytes."""
    assert repeated_blocks(30_000_000) == 0


def test_a_counter_that_wraps_or_a_key_used_twice_is_found() -> None:
    """Negative controls: two steps under one key; a context that is not part of the key."""
    assert repeated_blocks(1_000_000, lambda step: step_key(step // 2)) > 150_000
    assert repeated_blocks(1_000_000, lambda step: step_key(0)) > 300_000


def test_noise_of_ranks_is_independent() -> None:
    """Shards of one gradient, as ranks hold them. False alarm: 3 * 10**-7."""
    size, found = 400_000, []
    for rank in range(3):
        shard = ClippedSum({"w": torch.zeros(size)}, 1.0)
        offsets = {"w": rank * size}
        noisy = GaussianNoise(1.0).privatize(shard, RootKey.from_seed(2024), 0, offsets=offsets)
        found.append(noisy.values["w"].numpy().astype(np.float64))
    for a, b in itertools.combinations(found, 2):
        assert _uncorrelated(a, b) > FALSE_ALARM
    assert _uncorrelated(found[0], found[0]) < FALSE_ALARM, "ranks with one offset must be caught"


@pytest.mark.slow
def test_no_noise_is_used_twice() -> None:
    assert repeated_windows(dptorch_noise) == 0


@pytest.mark.slow
@pytest.mark.parametrize("twin", [reused_step, key_reused_for_each_parameter])
def test_noise_used_twice_is_found(twin: Mechanism) -> None:
    assert repeated_windows(twin) > 100_000
