"""Repeated steps of a run whose noise is correlated, against the joint law of all that was released."""

import itertools

import numpy as np
import pytest

from dptorch import accounting
from dptorch.accounting import BufferedGaussian, CyclicGaussian, SeparatedGaussian
from dptorch.accounting.toeplitz import square_root
from dptorch.ledger.counting import Attempts

STEPS, BANDS, RATE, NOISE = 6, 2, 0.5, 1.0
ONE = CyclicGaussian(NOISE, RATE, BANDS, 1)
BACK_TO, LEFT_AT = (
    3,
    5,
)  # steps 0..4 were released, then 3..5 again from the checkpoint after step 2


def attempts() -> Attempts:
    found = Attempts()
    found.add(ONE, first=0, steps=LEFT_AT)
    found.add(ONE, first=BACK_TO, steps=STEPS - BACK_TO)
    return found


def test_a_turn_counts_as_often_as_its_rows_were_released() -> None:
    """Of turns {0, 1}, ..., {8, 9} the fourth is repeated: a record of step 5 is in row 6 too."""
    found = Attempts()
    found.add(ONE, first=0, steps=10)
    found.add(ONE, first=6, steps=2)
    assert found.events() == [
        CyclicGaussian(NOISE, RATE, BANDS, 6),
        CyclicGaussian(NOISE / 2**0.5, RATE, BANDS, 4),
    ]


def test_a_run_without_sampling_counts_its_last_step_and_the_most_repeated() -> None:
    one = SeparatedGaussian(NOISE, (1.0, -0.5), 4, 1)
    found = Attempts()
    found.add(one, first=0, steps=7)
    assert found.events() == [SeparatedGaussian(NOISE, (1.0, -0.5), 4, 7)]
    found.add(one, first=5, steps=4)
    assert found.events() == [SeparatedGaussian(NOISE / 2**0.5, (1.0, -0.5), 4, 9)]
    found.take_back(one, first=0, steps=0)
    assert Attempts().events() == []
    buffered = BufferedGaussian(NOISE, (0.5, 0.9), 4, 1)
    found = Attempts()
    found.add(buffered, first=0, steps=7)
    found.add(buffered, first=5, steps=4)
    assert found.events() == [BufferedGaussian(NOISE / 2**0.5, (0.5, 0.9), 4, 9)]


@pytest.mark.slow
@pytest.mark.parametrize("group", range(BANDS))
def test_the_joint_law_of_both_branches_costs_no_more(group: int) -> None:
    rng = np.random.default_rng(7)
    c = sum(value * np.eye(STEPS, k=-i) for i, value in enumerate(square_root(BANDS)))
    c = c / np.linalg.norm(c, axis=0)
    # Rows of Cx + z: both branches have noise of their own and share the batches.
    rows = np.concatenate([c[:LEFT_AT], c[BACK_TO:]])
    turns = range(group, STEPS, BANDS)
    patterns, weights = [], []
    for coins in itertools.product((0, 1), repeat=len(turns)):
        x = np.zeros(STEPS)
        x[list(turns)] = coins
        patterns.append(rows @ x)
        weights.append(np.prod(np.where(coins, RATE, 1 - RATE)))
    means = np.array(patterns)
    count = 200_000
    noise = NOISE * rng.standard_normal((count, len(rows)))
    member = means[rng.choice(len(weights), count, p=weights)] + noise
    exact = accounting.get_accountant("exact")
    once = [CyclicGaussian(NOISE, RATE, BANDS, STEPS)]
    epsilon = 1.0
    worst, ignored = 0.0, exact.delta(once, epsilon, adjacency="zero-out")
    for y, sign in ((member, 1), (noise, -1)):
        exponents = (y @ means.T - (means**2).sum(axis=1) / 2) / NOISE**2
        loss = sign * np.log(np.exp(exponents) @ weights)
        gain = np.maximum(0.0, -np.expm1(epsilon - loss))
        error = 5 * gain.std() / count**0.5
        assert gain.mean() < exact.delta(attempts().events(), epsilon, adjacency="zero-out") + error
        worst = max(worst, gain.mean() - error)
    assert worst > ignored, "negative control: as if nothing had been repeated"
