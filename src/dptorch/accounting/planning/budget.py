"""Plan a budget: batch size, number of steps and noise.

At a fixed budget larger batches need more noise per step, but less than in proportion; so they carry
more signal, until the compute runs out. `plan_budget` tabulates the trade.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dptorch.accounting.accountants.protocol import check_delta, check_epsilon
from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.arguments import positive_int
from dptorch.accounting.events import SampledGaussian
from dptorch.accounting.planning.solve import noise_multiplier
from dptorch.accounting.planning.tuning import RunLaw, tuned_epsilon
from dptorch.errors import ConfigurationError

__all__ = ["Choice", "plan_budget"]

_CLOSE = 1e-4  # in log σ, where tuning has to be solved for


@dataclass(frozen=True)
class Choice:
    """One way to spend the budget.

    Attributes:
        batch_size: expected batch size B of Poisson sampling.
        steps: T.
        epochs: passes over the data, B T / N.
        noise_multiplier: σ that spends the whole budget.
        noise_per_gradient: σ / B: standard deviation of the noise in the averaged gradient, per
            coordinate, in units of max_grad_norm.
        signal_to_noise: sqrt(T) B / σ: the run's summed signal over its summed noise, if every step's
            averaged gradient had norm max_grad_norm in one direction. Compares choices with each
            other; its size means little.
        memory_bytes: of a batch held at once, where bytes per example are known; physical batches
            may be smaller.
        hours: of all steps, where examples per second are known.
    """

    batch_size: int
    steps: int
    epochs: float
    noise_multiplier: float
    noise_per_gradient: float
    signal_to_noise: float
    memory_bytes: float | None = None
    hours: float | None = None


def plan_budget(
    *,
    sample_size: int,
    target_epsilon: float,
    delta: float,
    steps: int | None = None,
    epochs: float | None = None,
    examples: float | None = None,
    hours: float | None = None,
    examples_per_second: float | None = None,
    bytes_per_example: float | None = None,
    batch_sizes: Sequence[int] | None = None,
    least_steps: int = 100,
    runs: RunLaw | None = None,
    accountant: str = "exact",
    adjacency: Adjacency | str = Adjacency.ZERO_OUT,
) -> list[Choice]:
    """Ways to spend a budget, the highest signal-to-noise first.

    Args:
        sample_size: number of examples N.
        target_epsilon, delta: the budget; of the published run, tuning included, if `runs` is given.
        steps, epochs, examples, hours: what limits the run; exactly one. A number of steps is kept
            for every batch size; the others are compute, so larger batches mean fewer steps.
        examples_per_second: measured speed of private training; needed for `hours`.
        bytes_per_example: measured memory of one more example in a physical batch.
        batch_sizes: to compare; by default powers of 2 from 16 up to N.
        least_steps: choices with fewer are left out: signal-to-noise says nothing about how well an
            optimizer does in a handful of steps.
        runs: how many runs the published one is chosen from by a private score.
        accountant: who calibrates; the statement of the run is the `pld` accountant's.
        adjacency: as for `noise_multiplier`.

    Raises:
        ConfigurationError: a value out of range, not exactly one limit, or no choice that satisfies
            all of them.

    Example:
        >>> best, *_ = plan_budget(sample_size=60_000, target_epsilon=3.0, delta=1e-6, epochs=20,
        ...                        batch_sizes=[256, 1024, 4096])
        >>> best.batch_size, best.steps, round(best.noise_multiplier, 2)
        (4096, 293, 2.03)
    """
    positive_int("sample_size", sample_size)
    positive_int("least_steps", least_steps)
    check_epsilon(target_epsilon, name="target_epsilon")
    check_delta(delta)
    limits = {"steps": steps, "epochs": epochs, "examples": examples, "hours": hours}
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) != 1:
        listed = ", ".join(f"{name}={value!r}" for name, value in limits.items())
        raise ConfigurationError(f"{listed}: give exactly one, what limits the run.")
    optional = {"examples_per_second": examples_per_second, "bytes_per_example": bytes_per_example}
    for name, value in {**given, **optional}.items():
        if value is not None and (isinstance(value, bool) or not 0 < value < math.inf):
            raise ConfigurationError(f"{name}={value!r} must be a finite number above 0.")
    if steps is not None:
        positive_int("steps", steps)
    if hours is not None and examples_per_second is None:
        raise ConfigurationError(
            f"hours={hours!r} needs examples_per_second, the measured speed of private training: "
            "run a few steps of `dptorch train` and read it there, or plan by epochs."
        )
    if batch_sizes is None:
        batch_sizes = [2**k for k in range(4, 40) if 2**k <= sample_size] or [sample_size]
    if hours is not None:
        examples = hours * 3600 * (examples_per_second or 0.0)
    choices = []
    for batch_size in batch_sizes:
        positive_int("batch_size", batch_size)
        if batch_size > sample_size:
            raise ConfigurationError(
                f"batch_size={batch_size} is larger than sample_size={sample_size}."
            )
        if steps is not None:
            count = steps
        elif examples is not None:
            # Compute is a limit, so it is never exceeded.
            count = math.floor(examples / batch_size)
        else:
            # Rounded first, as an error in the last bit would cost a step.
            # As in a plan: the last pass is completed.
            count = math.ceil(round((epochs or 0.0) * sample_size / batch_size, 6))
        if count < (1 if steps is not None else least_steps):
            continue
        sigma = _noise(
            batch_size / sample_size, count, target_epsilon, delta, runs, accountant, adjacency
        )
        choices.append(
            Choice(
                batch_size=batch_size,
                steps=count,
                epochs=batch_size * count / sample_size,
                noise_multiplier=sigma,
                noise_per_gradient=sigma / batch_size,
                signal_to_noise=math.sqrt(count) * batch_size / sigma,
                memory_bytes=bytes_per_example and bytes_per_example * batch_size,
                hours=examples_per_second and count * batch_size / examples_per_second / 3600,
            )
        )
    if not choices:
        raise ConfigurationError(
            f"no batch size of {list(batch_sizes)} leaves {least_steps} steps. Allow more compute, "
            "smaller batch_sizes or a lower least_steps."
        )
    return sorted(choices, key=lambda choice: -choice.signal_to_noise)


def _noise(
    rate: float,
    steps: int,
    target: float,
    delta: float,
    runs: RunLaw | None,
    accountant: str,
    adjacency: Adjacency | str,
) -> float:
    """σ that keeps the run within the target; with `runs`, the best of them."""
    from scipy.optimize import brentq

    def single(epsilon: float) -> float:
        return noise_multiplier(
            target_epsilon=epsilon,
            delta=delta,
            sample_rate=rate,
            steps=steps,
            accountant=accountant,
            adjacency=adjacency,
        )

    if runs is None:
        return single(target)
    law = runs

    def excess(log_noise: float) -> float:
        event = SampledGaussian(math.exp(log_noise), rate, steps)
        # Finite, because brentq interpolates between values.
        return min(tuned_epsilon([event], delta, law, adjacency=adjacency), 1e6) - target

    # The published run has to keep the target by itself too, so this is the least noise.
    low = high = math.log(single(target))
    while excess(high) > 0:
        if high > math.log(1e6):
            least = excess(high) + target
            raise ConfigurationError(
                f"target_epsilon={target} is unreachable: tuning over {law.mean_runs:g} runs shows "
                f"no epsilon below {least:.4g} for any noise. Take fewer runs or a larger delta."
            )
        low, high = high, high + 0.5
    if high > low:
        high = float(brentq(excess, low, high, xtol=_CLOSE / 2))
        # The root may lie on the wrong side of the target by the tolerance.
        while excess(high) > 0:
            high += _CLOSE
    return math.exp(high)
