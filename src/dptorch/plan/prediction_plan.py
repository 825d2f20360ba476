"""PredictionPlan: everything that the guarantee of private predictions depends on, frozen.

Every answer about one input is one release. Answers may be chosen adaptively: which inputs are asked
for, and when one stops, may depend on all earlier answers. A plan holds its budget all the same:

- Gaussian noise: the fully adaptive composition of Gaussian mechanisms whose Σ 1/σ² stays at most μ²
  is μ-Gaussian private (Koskela, Tobaben, Honkela 2022, arXiv:2209.15596, Theorem 9; Smith and
  Thakurta 2022, arXiv:2210.17520), so nothing is paid for adaptivity.
- (ε, 0)-private answers: all have one ε, and their largest number is settled beforehand.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Final

from dptorch.accounting import (
    Adjacency,
    Event,
    PureRelease,
    SampledGaussian,
    gaussian_mu_for,
    get_accountant,
    pure_delta,
    pure_epsilon,
)
from dptorch.accounting.arguments import positive, positive_int
from dptorch.errors import ConfigurationError, one_of

__all__ = ["ANSWERS", "PURE_ANSWERS", "PredictionPlan"]

#: Ways to answer with Gaussian noise, and those that are (ε, 0)-private.
GAUSSIAN_ANSWERS: Final = ("gaussian", "gnmax", "confident-gnmax")
#: Ways to answer that are (ε, 0)-private.
PURE_ANSWERS: Final = ("laplace", "noisy-max", "mixing")
#: Ways to answer a query, by name.
ANSWERS: Final = GAUSSIAN_ANSWERS + PURE_ANSWERS
_FORMAT: Final = 1
_MOST_ANSWERS: Final = 2**20  # of pure ones, whose composition is a sum of so many terms
_ERROR_OF_SUMS: Final = 1e-13  # of shares, in floating point
_ROUNDING: Final = 1e-9  # of the budget: as many answers as it was calibrated for fit


@dataclass(frozen=True)
class PredictionPlan:
    """What answers to queries cost, and how many there may be. Build one with `make`.

    All fields are public.

    Attributes:
        mechanism: one of `ANSWERS`.
        noise: Gaussian: standard deviation over the sensitivity Δ (s/Δ). Otherwise: ε of one answer.
        target_epsilon, target_delta: the budget of all answers together.
        models: how many models answer together; a record is in the training data of one of them.
        clip: B, the bound on one model's logits; None where models vote or are mixed.
        threshold: of "confident-gnmax": how many votes the first label needs, noise included.
        check_noise: of "confident-gnmax": standard deviation over Δ of that check.
        unit: what one record is.
        adjacency: the neighbouring relation.
    """

    mechanism: str
    noise: float
    target_epsilon: float
    target_delta: float
    models: int = 1
    clip: float | None = None
    threshold: float | None = None
    check_noise: float | None = None
    unit: str = "example"
    adjacency: Adjacency = Adjacency.ZERO_OUT

    def __post_init__(self) -> None:
        one_of("mechanism", self.mechanism, ANSWERS)
        object.__setattr__(self, "adjacency", Adjacency.of(self.adjacency))
        _check_budget(self.target_epsilon, self.target_delta)
        positive("noise", self.noise)
        positive_int("models", self.models)
        if self.clip is not None:
            positive("clip", self.clip)
        confident = self.mechanism == "confident-gnmax"
        for name in ("threshold", "check_noise"):
            value = getattr(self, name)
            if confident != (value is not None):
                raise ConfigurationError(
                    f"{name}={value!r} with mechanism={self.mechanism!r}: 'confident-gnmax', and no "
                    "other, needs threshold and check_noise."
                )
        if self.check_noise is not None:
            positive("check_noise", self.check_noise)
        if not self.queries:
            raise ConfigurationError(
                f"noise={self.noise:.4g}: one answer would cost more than the budget, epsilon="
                f"{self.target_epsilon:g} at delta={self.target_delta:g}. Give a larger budget, or "
                "more noise."
            )

    @classmethod
    def make(
        cls,
        mechanism: str,
        budget: tuple[float, float],
        *,
        queries: int | None = None,
        noise: float | None = None,
        **rest: Any,
    ) -> PredictionPlan:
        """The plan for a number of answers, or of a noise.

        Args:
            mechanism: one of `ANSWERS`.
            budget: (ε, δ) of all answers together.
            queries: *prepaid*: how many answers the budget has to pay for; the noise follows.
            noise: as in the attributes; the number of answers follows.
            rest: other attributes.

        Raises:
            ConfigurationError: both or neither of `queries` and `noise`, or a value out of range.

        Example:
            >>> for k in (1, 10, 100, 1000):
            ...     print(k, round(PredictionPlan.make("gaussian", (1.0, 1e-5), queries=k).noise, 2))
            1 3.73
            10 11.8
            100 37.31
            1000 117.97
        """
        one_of("mechanism", mechanism, ANSWERS)
        epsilon, delta = _pair(budget)
        _check_budget(epsilon, delta)
        if (queries is None) == (noise is None):
            raise ConfigurationError(
                f"queries={queries!r} and noise={noise!r}: give one of them. queries is how many "
                "answers the budget has to pay for, such as 1000."
            )
        if queries is not None:
            positive_int("queries", queries)
            adjacency = Adjacency.of(rest.get("adjacency", Adjacency.ZERO_OUT))
            noise = _noise_for(mechanism, queries, epsilon, delta, adjacency)
            if mechanism == "confident-gnmax":
                # The check and the answer take half of a query's share each.
                noise *= math.sqrt(2)
                rest.setdefault("check_noise", noise)
        assert noise is not None
        return cls(mechanism, noise, epsilon, delta, **rest)

    @property
    def pure(self) -> bool:
        """Whether each answer is (ε, 0)-private."""
        return self.mechanism in PURE_ANSWERS

    @property
    def queries(self) -> int:
        """How many answers the budget pays for; of "confident-gnmax", if all are given."""
        if self.pure:
            return _most_pure(self.noise * self._move, self.target_epsilon, self.target_delta)
        each = 1 / self.noise**2 + (1 / self.check_noise**2 if self.check_noise else 0.0)
        return math.floor(self._precision / each * (1 + _ROUNDING))

    @property
    def steps(self) -> int:
        """The same; a step is one release."""
        return self.queries

    @property
    def mu(self) -> float | None:
        """All answers together are mu-Gaussian private; None if they are pure."""
        return None if self.pure else math.sqrt(self._precision) * self._move

    def event(self, steps: int) -> Event:
        """What `steps` answers release."""
        return self._event(self.noise, steps)

    def check_event(self, steps: int) -> Event:
        """What `steps` checks of "confident-gnmax" release."""
        assert self.check_noise is not None
        return self._event(self.check_noise, steps)

    def whole(self) -> list[Event]:
        """What all answers together release at most, in whatever order they are asked for."""
        if self.pure:
            return [self.event(self.queries)]
        return [SampledGaussian(1 / math.sqrt(self._precision), 1.0, 1)]

    def share(self, event: Event) -> float:
        """The part of the budget that a release takes; all parts may add up to 1."""
        if isinstance(event, PureRelease) and self.pure and event.epsilon == self.noise:
            return event.steps / self.queries
        if isinstance(event, SampledGaussian) and not self.pure and event.sample_rate == 1:
            return event.steps / event.noise_multiplier**2 / self._precision
        raise ConfigurationError(f"{event} is not of the plan for {self.mechanism!r}.")

    @property
    def share_of_one(self) -> float:
        """The part of the budget that one query takes, if it is answered."""
        each = self.share(self.event(1))
        return each if self.check_noise is None else each + self.share(self.check_event(1))

    def epsilon(self, history: list[Event]) -> float:
        """ε at the plan's δ of answers that were given."""
        if self.pure:
            steps = sum(event.steps for event in history)
            each = self.noise * self._move
            return pure_epsilon(each, steps, self.target_delta) if steps else 0.0
        found = get_accountant("pld").epsilon(history, self.target_delta, adjacency=self.adjacency)
        # Within the budget it is the smaller: the accountant's bound has an error of its own.
        within = sum(map(self.share, history)) <= 1 + _ERROR_OF_SUMS
        return min(found, self.target_epsilon) if within else found

    def to_json(self) -> str:
        """The plan as JSON; `from_json` restores it exactly."""
        values = asdict(self) | {"adjacency": self.adjacency.value}
        return json.dumps({"format": _FORMAT, "predictions": True, **values}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PredictionPlan:
        """The plan that `to_json` wrote.

        Raises:
            ConfigurationError: it is not one, or of a newer format.
        """
        try:
            values = json.loads(text)
            if values.pop("format") > _FORMAT:
                raise ConfigurationError("the plan was written by a newer dptorch; upgrade.")
            if values.pop("predictions") is not True:
                raise KeyError("predictions")
            return cls(**values)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ConfigurationError(f"this is not a plan of predictions: {error}") from error

    @property
    def _move(self) -> int:
        # Replacing a record takes it out of one model's data and puts one into another's.
        return 2 if self.adjacency is Adjacency.REPLACE_ONE else 1

    @property
    def _precision(self) -> float:
        """The largest Σ 1/σ² that the budget allows."""
        return (gaussian_mu_for(self.target_epsilon, self.target_delta) / self._move) ** 2

    def _event(self, noise: float, steps: int) -> Event:
        return PureRelease(noise, steps) if self.pure else SampledGaussian(noise, 1.0, steps)


@lru_cache(maxsize=64)
def _noise_for(
    mechanism: str, queries: int, epsilon: float, delta: float, adjacency: Adjacency
) -> float:
    move = 2 if adjacency is Adjacency.REPLACE_ONE else 1
    if mechanism in GAUSSIAN_ANSWERS:
        return math.sqrt(queries) * move / gaussian_mu_for(epsilon, delta)
    low, high = epsilon / queries, epsilon  # basic composition always holds
    while pure_delta(high, queries, epsilon) <= delta:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if pure_delta(middle, queries, epsilon) <= delta:
            low = middle
        else:
            high = middle
    return low / move


@lru_cache(maxsize=64)
def _most_pure(each: float, epsilon: float, delta: float) -> int:
    """The most releases of `each` whose composition stays within the budget."""
    allowed = epsilon * (1 + _ROUNDING)
    low, high = 0, 1
    while pure_delta(each, high, allowed) <= delta:
        low, high = high, 2 * high
        if high > _MOST_ANSWERS:
            return low
    while high - low > 1:
        middle = (low + high) // 2
        if pure_delta(each, middle, allowed) <= delta:
            low = middle
        else:
            high = middle
    return low


def _pair(budget: Any) -> tuple[float, float]:
    try:
        epsilon, delta = budget
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"budget={budget!r} must be the pair (epsilon, delta), such as (8.0, 1e-5)."
        ) from None
    return epsilon, delta


def _check_budget(epsilon: float, delta: float) -> None:
    for name, value, most, such_as in (
        ("epsilon", epsilon, math.inf, "8.0"),
        ("delta", delta, 1.0, "1e-5"),
    ):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 < value < most):
            raise ConfigurationError(
                f"{name}={value!r} of a budget of predictions must be a number above 0 and below "
                f"{most:g}, such as {such_as}."
            )
