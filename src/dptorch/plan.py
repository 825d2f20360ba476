"""PrivacyPlan: one frozen object couples clipping, noise, sampling, adjacency and accounting.

What a run guarantees is read off its plan and nowhere else. Anything that only changes speed or
memory lives elsewhere and cannot change a guarantee.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, TypedDict

from typing_extensions import Unpack

from dptorch import accounting
from dptorch.accounting import Adjacency, Event, SampledDiscreteGaussian, SampledGaussian
from dptorch.accounting.arguments import number, positive_int
from dptorch.clipping import (
    LEAST_NORM,
    AdaptiveClipping,
    GroupSpec,
    get_clipping_function,
    joint_norm,
    read_style,
)
from dptorch.errors import ConfigurationError, one_of, warn
from dptorch.noise import get_mechanism
from dptorch.sampling import Scheme, Terms, get_scheme

__all__ = [
    "LOSS_REDUCTIONS",
    "UNITS",
    "PlanSettings",
    "PrivacyPlan",
    "PrivacySpent",
    "default_delta",
    "make_plan",
]

LOSS_REDUCTIONS = ("mean", "sum")
UNITS = ("example", "user", "packed sequence")
_FORMAT = 1
Style = str | Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class PrivacySpent:
    """What a run has spent so far. Unpacks as (epsilon, delta)."""

    epsilon: float
    delta: float

    def __iter__(self) -> Any:
        return iter((self.epsilon, self.delta))


@dataclass(frozen=True)
class PrivacyPlan:
    """Everything the guarantee of a run depends on. Build one with `make_plan`.

    All fields are public constants: publish them. None may be derived from the private data. Under
    add/remove adjacency that includes the exact number of records, so a plan made from it states
    zero-out adjacency, under which the number is public and ε is the same.

    Attributes:
        sample_rate: probability with which a step draws each record; the mean share where the scheme
            does not draw records one by one.
        steps: number of steps planned; the budget.
        noise_multiplier: standard deviation of the noise over max_grad_norm.
        max_grad_norm: bound C on one record's contribution to a step's sum, each time it is drawn;
            where groups have norms of their own, the root of the sum of their squares; under
            adaptive clipping, the first bound.
        expected_batch_size: public constant that the noisy sum is divided by under a mean loss.
        target_delta: δ of the statement.
        clipping_style: name of what is clipped together: "all-layer" (one norm over all parameters),
            "layer-wise", "param-wise", "block-wise", or "named groups".
        clipping_groups: the user's own groups, for the last two.
        unit: what one record is: "example"; "user", of whom at most max_examples_per_user examples
            enter a step; or "packed sequence", a row into which several texts were packed.
        target_epsilon: the ε that noise_multiplier was calibrated to, if it was.
        sample_size: number of records, where it was given and is treated as public.
        mechanism: "gaussian", or "discrete_gaussian": contributions rounded to integers, with integer
            noise; see docs/noise.md. It forms every example's gradient, and is accounted by "rdp".
        clipping_fn, accountant, adjacency, loss_reduction, sampling, capacity, max_examples_per_user,
        adaptive_clipping: as in `PlanSettings`.
    """

    sample_rate: float
    steps: int
    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: float
    target_delta: float
    clipping_fn: str = "abadi"
    clipping_style: str = "all-layer"
    accountant: str = "pld"
    adjacency: Adjacency = Adjacency.ADD_REMOVE
    loss_reduction: str = "mean"
    unit: str = "example"
    target_epsilon: float | None = None
    sample_size: int | None = None
    sampling: str = "poisson"
    capacity: int | None = None
    max_examples_per_user: int | None = None
    clipping_groups: tuple[GroupSpec, ...] = ()
    adaptive_clipping: AdaptiveClipping | None = None
    mechanism: str = "gaussian"

    def __post_init__(self) -> None:
        get_clipping_function(self.clipping_fn)
        one_of("loss_reduction", self.loss_reduction, LOSS_REDUCTIONS)
        specs = [s if isinstance(s, GroupSpec) else GroupSpec(**s) for s in self.clipping_groups]
        style, groups = read_style(self.clipping_style, specs)
        object.__setattr__(self, "clipping_style", style)
        object.__setattr__(self, "clipping_groups", groups)
        norm = joint_norm(groups)
        object.__setattr__(self, "max_grad_norm", self.max_grad_norm if norm is None else norm)
        adaptive = AdaptiveClipping.of(self.adaptive_clipping)
        object.__setattr__(self, "adaptive_clipping", adaptive)
        object.__setattr__(self, "adjacency", Adjacency.of(self.adjacency))
        accounting.get_accountant(self.accountant)
        one_of("unit", self.unit, UNITS)
        get_mechanism(self.mechanism)
        if self.mechanism == "discrete_gaussian" and (
            self.clipping_groups or self.clipping_style != "all-layer" or self.adaptive_clipping
        ):
            raise ConfigurationError(
                f"mechanism={self.mechanism!r} is for one fixed norm over all parameters: use "
                "clipping_style='all-layer' without adaptive_clipping, or mechanism='gaussian'."
            )
        if (self.unit == "user") != (self.max_examples_per_user is not None):
            raise ConfigurationError(
                f"unit={self.unit!r} and max_examples_per_user={self.max_examples_per_user!r}: the "
                "unit 'user', and no other, needs a bound on how many of a user's examples enter a "
                "step, for example 8."
            )
        if self.unit == "user" and self.adaptive_clipping is not None:
            raise ConfigurationError(
                "adaptive clipping counts examples, of which a user has several. Use a constant "
                "max_grad_norm with unit='user'."
            )
        if self.max_examples_per_user is not None:
            positive_int("max_examples_per_user", self.max_examples_per_user)
        if self.capacity is not None:
            positive_int("capacity", self.capacity)
        SampledGaussian(self.noise_multiplier, self.sample_rate, self.steps)  # checks all three
        _positive("max_grad_norm", self.max_grad_norm)
        if self.max_grad_norm < LEAST_NORM:
            raise ConfigurationError(
                f"max_grad_norm={self.max_grad_norm!r} must be at least {LEAST_NORM}: a shorter "
                "gradient's norm may come out as 0 in float32. Scale the loss if they are that short."
            )
        _positive("expected_batch_size", self.expected_batch_size)
        if not 0 < self.target_delta < 1:
            raise ConfigurationError(
                f"target_delta={self.target_delta!r} must be in (0, 1), and well below one over the "
                "number of records, for example 1e-5."
            )
        self.scheme.check(self.terms, self.adjacency)
        # Raises, at no cost, where the accountant does not cover what will be released.
        self.epsilon(0)

    @property
    def scheme(self) -> Scheme:
        """How batches are drawn, and what it costs."""
        return get_scheme(self.sampling)

    @property
    def terms(self) -> Terms:
        """What the scheme has to know."""
        return Terms(self.sample_rate, self.expected_batch_size, self.sample_size, self.capacity)

    @property
    def max_example_norm(self) -> float:
        """Bound on one row's contribution: C, or C / k for a user with at most k rows in a step,
        whose contributions together are then at most C by the triangle inequality."""
        return self.max_grad_norm / (self.max_examples_per_user or 1)

    def event(self, steps: int) -> Event:
        """What the first `steps` steps of this plan release, for an accountant."""
        return event_of(self.scheme, self.mechanism, self.terms, self.noise_multiplier, steps)

    def history(self, steps: int, *, own_loader_steps: int = 0) -> list[Event]:
        """What a run of `steps` steps released, some of them on batches of a loader of the user's own.

        Those are charged as releases in which any record may take part, once. What the scheme's own
        steps cost is bounded by what all steps would have: leaving releases out costs nothing.
        """
        if not own_loader_steps:
            return [self.event(steps)]
        own: Event = SampledGaussian(self.noise_multiplier, 1.0, own_loader_steps)
        if self.mechanism == "discrete_gaussian":
            own = SampledDiscreteGaussian(self.noise_multiplier, 1.0, own_loader_steps)
        return [own] if own_loader_steps == steps else [self.event(steps), own]

    def epsilon(
        self,
        steps: int | None = None,
        *,
        own_loader_steps: int = 0,
        accountant: str | None = None,
    ) -> float:
        """ε after some steps (by default all of them) at the plan's δ.

        Args:
            steps: steps done.
            own_loader_steps: how many of them took their batch from elsewhere than the plan's sampler.
            accountant: who is asked, by default the plan's.
        """
        history = self.history(
            self.steps if steps is None else steps, own_loader_steps=own_loader_steps
        )
        return accounting.get_accountant(accountant or self.accountant).epsilon(
            history, self.target_delta, adjacency=self.adjacency
        )

    def to_json(self) -> str:
        """The plan as JSON; `from_json` restores it exactly."""
        values = asdict(self) | {"adjacency": self.adjacency.value}
        return json.dumps({"format": _FORMAT, **values}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | Path) -> PrivacyPlan:
        """Read a plan from JSON text, or from a file given as a Path.

        Raises:
            ConfigurationError: if it is not a plan, or of a newer format.
        """
        source = text.read_text() if isinstance(text, Path) else text
        try:
            values = json.loads(source)
            if values.pop("format") > _FORMAT:
                raise ConfigurationError("the plan was written by a newer dptorch; upgrade.")
            return cls(**values)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ConfigurationError(f"this is not a privacy plan: {error}") from error

    def differences(self, other: PrivacyPlan) -> list[str]:
        """The fields in which two plans differ, as "name: mine, other"."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return [f"{name}: {mine!r}, {theirs!r}" for name, mine, theirs in pairs if mine != theirs]


class PlanSettings(TypedDict, total=False):
    """The settings that a plan is made from, by keyword; see `make_plan`.

    A setting that is left out has the default stated here.

    Attributes:
        batch_size: expected number of records that a step draws. A record is one `unit`, so this is a
            number of users where the unit is the user.
        sample_rate: probability with which a step draws each record; batch_size / sample_size.
        sample_size: number of records. It is treated as public if it is given.
        epochs: length of the run in passes over the data; steps = ceil(epochs / sample_rate).
        steps: length of the run in steps.
        target_epsilon: calibrate the noise so that all steps together spend at most this ε.
        noise_multiplier: or state the noise, standard deviation over max_grad_norm; ε follows.
        target_delta: δ; by default 1 / (10 * sample_size), at most 1e-5, rounded down to a power
            of ten.
        max_grad_norm: bound C on the norm of one record's gradient; by default 1.
        clipping_fn: name in `dptorch.clipping.FUNCTIONS`; by default "abadi".
        clipping_style: what is clipped together: a name of `dptorch.clipping.read_style` (by default
            "all-layer"), a list of module names or patterns (each module that matches is a group), or
            {pattern: norm} or {pattern: (norm, noise weight)}.
        adaptive_clipping: let the norm follow a quantile of the gradient norms (Andrew et al.
            2021), privately: True, the quantile, or `dptorch.clipping.AdaptiveClipping`.
        accountant: name of the accountant whose ε is stated; by default "pld".
        adjacency: the neighbouring relation. By default zero-out where sample_size is given, since
            rate and batch size then tell it, and add/remove otherwise.
        loss_reduction: how the loss joins the examples, "mean" (the default) or "sum".
        unit: what one record is, see `PrivacyPlan`; by default "example".
        sampling: name in `dptorch.sampling.SCHEMES`; by default "poisson". A scheme that goes through
            the data in epochs makes an epoch a whole number of steps, and adjusts rate and batch size
            to it.
        capacity: largest number of records in a batch of truncated Poisson sampling; by default
            B + 8 sqrt(B) for an expected B, or more where that would be exceeded too often.
        max_examples_per_user: largest number of one user's examples in a step, for unit="user".
        mechanism: "gaussian" (the default) or "discrete_gaussian", see `PrivacyPlan`.
    """

    batch_size: float | None
    sample_rate: float | None
    sample_size: int | None
    epochs: float | None
    steps: int | None
    target_epsilon: float | None
    noise_multiplier: float | None
    target_delta: float | None
    max_grad_norm: float
    clipping_fn: str
    clipping_style: Style
    adaptive_clipping: AdaptiveClipping | Mapping[str, float] | float | bool | None
    accountant: str
    adjacency: Adjacency | str | None
    loss_reduction: str
    unit: str
    sampling: str
    capacity: int | None
    max_examples_per_user: int | None
    mechanism: str


# The settings that are fields of the plan as they are, with the defaults that `PrivacyPlan` states.
_FIELDS: Final = (
    "clipping_fn",
    "accountant",
    "loss_reduction",
    "unit",
    "target_epsilon",
    "sample_size",
    "sampling",
    "max_examples_per_user",
    "mechanism",
)


def make_plan(**settings: Unpack[PlanSettings]) -> PrivacyPlan:
    """Make a plan from what a user knows.

    Give two of batch_size, sample_rate and sample_size; the length of the run, as epochs or steps; and
    either target_epsilon or noise_multiplier.

    Args:
        settings: see `PlanSettings`.

    Raises:
        ConfigurationError: where settings are unknown, missing, contradict each other or cannot be
            met; for a target ε out of reach it names the smallest that is.

    Example:
        >>> plan = make_plan(batch_size=256, sample_size=50_000, epochs=3, target_epsilon=2.0)
        >>> plan.steps, plan.target_delta, plan.epsilon() <= 2.0
        (586, 1e-06, True)
    """
    for name in settings:
        one_of("setting", name, PlanSettings.__annotations__)
    sample_size = settings.get("sample_size")
    scheme = get_scheme(settings.get("sampling", "poisson"))
    rate, batch_size = _rate(settings.get("batch_size"), settings.get("sample_rate"), sample_size)
    terms = scheme.settle(Terms(rate, batch_size, sample_size, settings.get("capacity")))
    rate = terms.sample_rate
    style, groups = read_style(settings.get("clipping_style", "all-layer"))
    adjacency = settings.get("adjacency")
    if adjacency is None:
        adjacency = Adjacency.ADD_REMOVE if sample_size is None else Adjacency.ZERO_OUT
    adjacency = Adjacency.of(adjacency)
    steps = _steps(settings.get("epochs"), settings.get("steps"), rate)
    delta = _delta(settings.get("target_delta"), sample_size, terms.expected_batch_size / rate)
    if terms.capacity is None and scheme.capacity is not None and sample_size is not None:
        terms = replace(terms, capacity=scheme.capacity(terms, steps, delta))
    scheme.check(terms, adjacency)
    noise_multiplier, target_epsilon = (
        settings.get("noise_multiplier"),
        settings.get("target_epsilon"),
    )
    if (target_epsilon is None) == (noise_multiplier is None):
        raise ConfigurationError(
            f"target_epsilon={target_epsilon!r} and noise_multiplier={noise_multiplier!r}: give "
            "exactly one; the other follows."
        )
    if noise_multiplier is None:
        assert target_epsilon is not None
        accountant = settings.get("accountant", PrivacyPlan.accountant)
        accounting.get_accountant(accountant)
        mechanism = settings.get("mechanism", PrivacyPlan.mechanism)
        noise_multiplier = accounting.noise_multiplier_for(
            lambda noise: event_of(scheme, mechanism, terms, noise, steps),
            target_epsilon=target_epsilon,
            delta=delta,
            accountant=accountant,
            adjacency=adjacency,
        )
    fields_given: dict[str, Any] = {n: v for n, v in settings.items() if n in _FIELDS}
    return PrivacyPlan(
        sample_rate=rate,
        steps=steps,
        noise_multiplier=noise_multiplier,
        max_grad_norm=number("max_grad_norm", settings.get("max_grad_norm", 1.0)),
        expected_batch_size=terms.expected_batch_size,
        target_delta=delta,
        clipping_style=style,
        clipping_groups=groups,
        adaptive_clipping=AdaptiveClipping.of(settings.get("adaptive_clipping")),
        adjacency=adjacency,
        capacity=terms.capacity,
        **fields_given,
    )


def default_delta(sample_size: int) -> float:
    """1 / (10 * sample_size), at most 1e-5, rounded down to a power of ten.

    Example:
        >>> default_delta(60_000), default_delta(3_000_000)
        (1e-06, 1e-08)
    """
    return min(1e-5, 10.0 ** math.floor(math.log10(1 / (10 * sample_size))))


def _steps(epochs: float | None, steps: int | None, rate: float) -> int:
    """The length of the run in steps, from the one of the two that is given."""
    if epochs is None and steps is not None:
        return steps
    if epochs is None or steps is not None:
        raise ConfigurationError(
            f"epochs={epochs!r} and steps={steps!r}: give exactly one, the length of the run."
        )
    _positive("epochs", epochs)
    # 1 / rate is often a hair above the whole number it means.
    return math.ceil(round(epochs / rate, 6))


def _delta(target: float | None, sample_size: int | None, expected_size: float) -> float:
    """δ of the plan: the one wanted, or the default. `expected_size` is batch size over rate."""
    if target is None:
        if sample_size is None:
            raise ConfigurationError(
                "target_delta is missing, and without sample_size there is no default. Give a "
                "number well below one over the number of records, for example 1e-5."
            )
        return default_delta(sample_size)
    size = expected_size if sample_size is None else sample_size
    if 1 / size <= target < 1:
        warn(
            f"target_delta={target:g} is not below 1/{size:.6g}, one over the number of records: a "
            "mechanism that publishes one record in full would satisfy it. Use at most "
            f"{10.0 ** math.floor(math.log10(0.1 / size)):g}."
        )
    return target


def event_of(
    scheme: Scheme, mechanism: str, terms: Terms, noise_multiplier: float, steps: int
) -> Event:
    """What steps of a sampling scheme with a mechanism release.

    Raises:
        ConfigurationError: no event stands for the two together.
    """
    event = scheme.event(terms, noise_multiplier, steps)
    get_mechanism(mechanism)
    if mechanism == "gaussian":
        return event
    if not isinstance(event, SampledGaussian):
        raise ConfigurationError(
            f"mechanism={mechanism!r} with sampling={scheme.name!r}: no theorem here covers the two "
            "together. Use sampling='poisson', or mechanism='gaussian'."
        )
    return SampledDiscreteGaussian(event.noise_multiplier, event.sample_rate, event.steps)


def _rate(
    batch_size: float | None, sample_rate: float | None, sample_size: int | None
) -> tuple[float, float]:
    """(sample_rate, expected_batch_size) from any two of the three."""
    if sample_size is not None and (
        isinstance(sample_size, bool) or int(sample_size) != sample_size or sample_size < 1
    ):
        raise ConfigurationError(
            f"sample_size={sample_size!r} must be a whole number of records, at least 1."
        )
    if batch_size is not None and sample_rate is not None and sample_size is not None:
        if not math.isclose(batch_size, sample_rate * sample_size, rel_tol=1e-6):
            raise ConfigurationError(
                f"batch_size={batch_size!r}, sample_rate={sample_rate!r} and "
                f"sample_size={sample_size!r} contradict each other: "
                f"{sample_rate} * {sample_size} = {sample_rate * sample_size:g}. Leave one out."
            )
        batch_size = None
    if batch_size is not None:
        _positive("batch_size", batch_size)
        if sample_rate is None and sample_size is None:
            raise ConfigurationError(
                f"batch_size={batch_size!r} alone does not say how likely a record is to be drawn. "
                "Give sample_size (the number of records) or sample_rate too."
            )
        if sample_rate is None:
            assert sample_size is not None
            if batch_size > sample_size:
                raise ConfigurationError(
                    f"batch_size={batch_size!r} is larger than sample_size={sample_size!r}."
                )
            sample_rate = batch_size / sample_size
        return sample_rate, float(batch_size)
    if sample_rate is None or sample_size is None:
        raise ConfigurationError(
            f"batch_size={batch_size!r}, sample_rate={sample_rate!r}, sample_size={sample_size!r}: "
            "give two of the three."
        )
    if not 0 < sample_rate <= 1:
        raise ConfigurationError(f"sample_rate={sample_rate!r} must be in (0, 1].")
    return sample_rate, sample_rate * sample_size


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{name}={value!r} must be a finite number above 0.")
