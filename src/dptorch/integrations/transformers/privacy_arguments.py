"""PrivacyArguments: what a private trainer has to know beside its training arguments."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from dptorch.errors import ConfigurationError, one_of
from dptorch.plan import UNITS, PlanSettings

__all__ = ["PrivacyArguments"]


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class PrivacyArguments:
    """The privacy settings of a run, named as in `dptorch.plan.PlanSettings`.

    Batch size and length of the run are in the training arguments. As those are, this is a data class
    that `transformers.HfArgumentParser` reads from a command line.

    Attributes:
        target_delta: δ, well below one over the number of records. There is no default: one that is
            computed from the private data set would tell its size.
        target_epsilon: calibrate the noise so that the whole run spends at most this ε.
        noise_multiplier: or state the noise; ε follows.
        max_grad_norm: bound C on one record's gradient, in the place of the training argument of that
            name, which clips the noisy sum.
        unit: what one record is: "example", "user", or "packed sequence".
        user_column: column with the ID of each example's user; makes the unit the user.
        max_examples_per_user: most examples of a user in a step, for a user column.
        sample_size: number of records (of users, where the unit is the user); by default that of the
            data set. It is public.
        adjacency, accountant, sampling, clipping_fn, clipping_style, adaptive_clipping, mechanism,
            bands: as in `PlanSettings`.
        clipping_mode, secure_rng, seed: as in `dptorch.PrivacyEngine`.
        eval_is_public: whether `eval_dataset` is public. Only then may it choose anything: the best
            checkpoint, a learning rate, when to stop. Metrics of private data are logged under names
            that begin with ``not_private_``.

    Raises:
        ConfigurationError: settings are missing or contradict each other.

    Example:
        >>> PrivacyArguments(target_epsilon=8.0, target_delta=1e-6, user_column="uid",
        ...                  max_examples_per_user=4).unit
        'user'
    """

    target_delta: float = _help("delta, well below one over the number of records; required")
    target_epsilon: float | None = _help("spend at most this epsilon in the whole run")
    noise_multiplier: float | None = _help("or state the noise; epsilon follows")
    max_grad_norm: float = _help("bound on one record's gradient", 1.0)
    unit: str = _help("what one record is: example, user, or packed sequence", "example")
    user_column: str | None = _help("column with the ID of each example's user")
    max_examples_per_user: int | None = _help("most examples of one user in a step")
    sample_size: int | None = _help("number of records, which is public; that of the data set")
    adjacency: str | None = _help("neighbouring relation; zero-out by default")
    accountant: str = _help("whose epsilon is stated", "pld")
    sampling: str = _help("how batches are drawn", "poisson")
    clipping_fn: str = _help("how a gradient that is too long is shortened", "abadi")
    clipping_style: str = _help("what is clipped together", "all-layer")
    adaptive_clipping: float | None = _help("let the norm follow this quantile of the norms")
    mechanism: str = _help("gaussian, banded or discrete_gaussian", "gaussian")
    bands: int | None = _help("steps over which banded noise is correlated; the best by default")
    clipping_mode: str = _help("how norms are computed", "auto")
    secure_rng: bool = _help("noise from the cryptographic keystream on a GPU too", False)
    seed: int | None = _help("for tests: randomness from a number, which protects nobody")
    eval_is_public: bool = _help("whether the evaluation data is public", False)

    def __post_init__(self) -> None:
        if self.user_column is not None and self.unit == "example":
            object.__setattr__(self, "unit", "user")
        one_of("unit", self.unit, UNITS)
        if self.target_delta is None:
            raise ConfigurationError(
                "target_delta is missing: give a number well below one over the number of records, for "
                "example 1e-6. It is not computed from the data set, whose exact size may be private."
            )
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ConfigurationError(
                f"target_epsilon={self.target_epsilon!r} and noise_multiplier="
                f"{self.noise_multiplier!r}: give exactly one; the other follows."
            )
        if (self.unit == "user") != (self.user_column is not None):
            raise ConfigurationError(
                f"unit={self.unit!r} and user_column={self.user_column!r}: the unit 'user', and no "
                "other, needs the name of the column that says whose each example is."
            )

    def plan_settings(self) -> PlanSettings:
        """The settings among these that a plan is made from, by name."""
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        settings: Any = {n: v for n, v in mine.items() if n in PlanSettings.__annotations__}
        return settings
