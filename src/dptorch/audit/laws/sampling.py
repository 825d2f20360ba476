"""The law of the sampler, held against whom it drew.

Each test is one that the scheme's own law makes exact. P-values are exact binomial tails times the
number of comparisons (Bonferroni), or Chernoff's bound on the tail of a sum of independent numbers
whose law is known. Both are at least as large as the true probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dptorch.audit.evidence import Array
from dptorch.audit.laws.law_test import LawTest
from dptorch.plan import PrivacyPlan

__all__ = ["SAMPLING_LAWS", "Drawn", "sampling_laws"]

# The most tests that a scheme gets.
SAMPLING_LAWS = 7
_ONCE_AN_EPOCH = ("random-allocation", "shuffled", "sequential")


@dataclass(frozen=True, eq=False)
class Drawn:
    """Whom the sampler drew in the steps that were played.

    Attributes:
        sizes: records of each step, int64 [steps].
        counts: how often each record was drawn, int64 [records].
        gaps: the fewest steps between two draws of each record, int64 [records]; the number of steps
            where there were none.
        most_in_epoch: how often each record was drawn in the epoch in which that was most often; where
            the scheme has no epochs, in the run.
    """

    sizes: Array
    counts: Array
    gaps: Array
    most_in_epoch: Array

    @classmethod
    def of(cls, batches: list[Array], records: int, epoch: int) -> Drawn:
        """From the indices of the records of each step; `epoch`: its length in steps."""
        counts = np.zeros(records, dtype=np.int64)
        gaps = np.full(records, len(batches))
        last = np.full(records, -len(batches))
        here, most = np.zeros_like(counts), np.zeros_like(counts)
        for step, chosen in enumerate(batches):
            if step % epoch == 0:
                here[:] = 0
            counts[chosen] += 1
            here[chosen] += 1
            most[chosen] = np.maximum(most[chosen], here[chosen])
            gaps[chosen] = np.minimum(gaps[chosen], step - last[chosen])
            last[chosen] = step
        return cls(np.array([len(b) for b in batches]), counts, gaps, most)


def sampling_laws(drawn: Drawn, plan: PrivacyPlan, *, significance: float) -> list[LawTest]:
    """Hold what was drawn against the scheme of a plan.

    Args:
        significance: of each test.

    Returns:
        none for a rate of 1, where every record is always drawn, and for sampling with replacement.
    """
    if plan.sample_rate == 1:
        return []
    records, steps, rate = len(drawn.counts), len(drawn.sizes), plan.sample_rate
    if plan.sampling in _ONCE_AN_EPOCH:
        most = int(drawn.most_in_epoch.max())
        worst = f"a record was drawn {most} times in an epoch"
        return [LawTest("records once an epoch", float(most <= 1), 0.0, worst)]
    if plan.sampling == "fixed-size":
        expected = round(plan.expected_batch_size)
        off = np.abs(drawn.sizes - expected)
        step = int(off.argmax())
        worst = f"step {step} drew {int(drawn.sizes[step])} records, not {expected}"
        return [
            LawTest("records of each step", float(not off.any()), 0.0, worst),
            _most(drawn.counts, steps, expected / records, "record", significance),
        ]
    if plan.sampling == "cyclic-poisson":
        bands = plan.bands or 1
        least = int(drawn.gaps.min())
        apart = float(least >= min(bands, steps))
        return [
            LawTest(
                "records apart",
                apart,
                0.0,
                f"a record was drawn twice within {least} steps of {bands}",
            ),
            _most(drawn.sizes, records, rate, "step", significance),
            _most(drawn.counts, math.ceil(steps / bands), bands * rate, "record", significance),
        ]
    if plan.sampling not in ("poisson", "truncated-poisson"):
        return []
    tests = [
        _most(drawn.sizes.sum(keepdims=True), records * steps, rate, "run", significance),
        _most(drawn.sizes, records, rate, "step", significance),
        _most(drawn.counts, steps, rate, "record", significance),
    ]
    if plan.sampling == "poisson":
        for what, counts, trials in (
            ("records of steps", drawn.sizes, records),
            ("draws of records", drawn.counts, steps),
        ):
            tests += _dispersion(counts, trials, rate, what, significance)
    return tests


def _most(counts: Array, trials: int, rate: float, what: str, significance: float) -> LawTest:
    """The largest of several counts, none of which exceeds Binomial(trials, rate) in law."""
    from scipy.stats import binom

    worst = int(counts.argmax())
    tail = float(binom.sf(counts[worst] - 1, trials, min(1.0, rate)))
    which = "the run" if what == "run" else f"{what} {worst}"
    return LawTest(
        f"sampling rate of the {what}" if what == "run" else f"sampling rate of each {what}",
        min(1.0, len(counts) * tail),
        significance,
        f"{which} has {int(counts[worst])} draws of {trials} possible, where "
        f"{trials * rate:.4g} are expected",
    )


def _dispersion(
    counts: Array, trials: int, rate: float, what: str, significance: float
) -> list[LawTest]:
    """Whether independent counts scatter less, or more, than Binomial(trials, rate) does."""
    from scipy.stats import binom

    mean, variance = trials * rate, trials * rate * (1 - rate)
    reach = 40 * math.sqrt(variance) + 40
    values = np.arange(max(0, int(mean - reach)), min(trials, int(mean + reach)) + 1)
    # What lies further out weighs less than a rounding, and enters at the ends.
    log_mass = binom.logpmf(values, trials, rate)
    squares = (values - mean) ** 2 / variance
    seen = float(((counts - mean) ** 2).sum()) / variance
    found = f"{what} scatter {seen / len(counts):.3g} times as much as independent draws do"
    tests = []
    for law, sign in ((f"{what}: too even", -1.0), (f"{what}: too uneven", 1.0)):
        p_value = _chernoff(sign * seen, sign * squares, log_mass, len(counts))
        tests.append(LawTest(law, p_value, significance, found))
    return tests


def _chernoff(total: float, values: Array, log_mass: Array, count: int) -> float:
    """A bound on P(sum of `count` independent draws of `values` >= `total`)."""
    from scipy.special import logsumexp

    scale = float(np.abs(values).max()) or 1.0
    # Any tilt gives a bound; the best of these is hardly worse than the best of all.
    tilts = np.geomspace(1e-4, 1e3, 60) / scale
    exponents = count * logsumexp(log_mass + tilts[:, None] * values, axis=1) - tilts * total
    return math.exp(min(0.0, float(exponents.min())))
