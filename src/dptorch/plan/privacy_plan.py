"""PrivacyPlan: one frozen object couples clipping, noise, sampling, adjacency and accounting.

What a run guarantees is read off its plan and nowhere else. Anything that only changes speed or
memory lives elsewhere and cannot change a guarantee.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from dptorch import accounting
from dptorch.accounting import (
    Adjacency,
    BufferedGaussian,
    CorrelatedGaussian,
    CyclicGaussian,
    EpochwiseGaussian,
    Event,
    SampledDiscreteGaussian,
    SampledGaussian,
    SeparatedGaussian,
)
from dptorch.accounting.arguments import positive, positive_int
from dptorch.accounting.toeplitz import (
    column_norms,
    inverse_coefficients_of,
    unbounded_sensitivity,
)
from dptorch.clipping import (
    LEAST_NORM,
    AdaptiveClipping,
    GroupSpec,
    get_clipping_function,
    joint_norm,
    read_style,
)
from dptorch.errors import ConfigurationError, one_of
from dptorch.noise import get_mechanism
from dptorch.sampling import Scheme, Terms, get_scheme

#: What a loss does with a batch: "mean" divides the noisy sum by the expected batch size.
LOSS_REDUCTIONS = ("mean", "sum")
#: What a guarantee may protect: see docs/sampling.md, "Units".
UNITS = ("example", "user", "packed sequence")
#: Mechanisms whose noise is correlated over steps; their plans have coefficients.
CORRELATED: Final = ("banded", "inverse-banded", "buffered-toeplitz")
_FORMAT = 1
_SEPARATED: Final = (
    "one Gaussian mechanism of the sensitivity of C over participations so far apart (Choquette-Choo "
    "et al. 2023, arXiv:2306.08153; Kalinin and Lampert 2024, arXiv:2405.13763, Theorem 2; adaptively: "
    "Denisov et al. 2022, arXiv:2202.08312); no amplification by sampling is claimed"
)


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
        mechanism: "gaussian"; "banded": noise that later steps take back in part, on batches of which
            no record is in two of `bands` in a row; "inverse-banded": the same for records that come
            once an epoch, always in the same step, without amplification; "buffered-toeplitz": the same
            over all steps of a long run, by a few buffers; or "discrete_gaussian":
            contributions rounded to integers, with integer noise, which forms every example's gradient
            and is accounted by "rdp". See docs/noise.md.
        bands: groups that take turns in cyclic Poisson sampling, and so the most steps over which
            noise may be correlated.
        coefficients: of banded noise: the first column of its matrix C, at most `bands` numbers.
            noise_multiplier is that for columns of norm 1. Of inverse-banded noise that of C⁻¹, and
            of buffered noise ω and then θ of each buffer; noise_multiplier is then that of z.
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
    bands: int | None = None
    coefficients: tuple[float, ...] = ()

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
        object.__setattr__(self, "coefficients", tuple(float(c) for c in self.coefficients))
        if (self.mechanism in CORRELATED) != bool(self.coefficients):
            raise ConfigurationError(
                f"mechanism={self.mechanism!r} with {len(self.coefficients)} coefficients: "
                f"{' and '.join(CORRELATED)}, and no other, have them. Use dptorch.make_plan, which "
                "finds them."
            )
        if self.mechanism == "inverse-banded":
            inverse_coefficients_of(
                len(self.coefficients),
                self.steps,
                self.coefficients,
                separation=self.terms.steps_per_epoch,
            )
        if self.mechanism == "banded":
            column_norms(self.coefficients, self.steps)  # checks them
            if len(self.coefficients) > (self.bands or 0):
                raise ConfigurationError(
                    f"{len(self.coefficients)} coefficients with bands={self.bands}: a record that "
                    f"takes part every {self.bands} steps would overlap with itself. Give at most as "
                    "many."
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
        positive("max_grad_norm", self.max_grad_norm)
        if self.max_grad_norm < LEAST_NORM:
            raise ConfigurationError(
                f"max_grad_norm={self.max_grad_norm!r} must be at least {LEAST_NORM}: a shorter "
                "gradient's norm may come out as 0 in float32. Scale the loss if they are that short."
            )
        positive("expected_batch_size", self.expected_batch_size)
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
    def places_kept(self) -> str:
        """How long a record must keep its place in the data set: "an epoch", "the run"; or ""."""
        return "the run" if self.coefficients else self.scheme.places_kept

    @property
    def theorem(self) -> str:
        """Why the event covers what runs."""
        one_release = self.coefficients and self.bands is None
        return _SEPARATED if one_release else self.scheme.theorem

    @property
    def terms(self) -> Terms:
        """What the scheme has to know."""
        return Terms(
            self.sample_rate,
            self.expected_batch_size,
            self.sample_size,
            self.capacity,
            self.bands,
        )

    @property
    def max_example_norm(self) -> float:
        """Bound on one row's contribution: C, or C / k for a user with at most k rows in a step,
        whose contributions together are then at most C by the triangle inequality."""
        return self.max_grad_norm / (self.max_examples_per_user or 1)

    def event(self, steps: int) -> Event:
        """What the first `steps` steps of this plan release, for an accountant."""
        return event_of(
            self.scheme,
            self.mechanism,
            self.terms,
            self.noise_multiplier,
            steps,
            self.coefficients,
        )

    def history(self, steps: int, *, own_loader_steps: int = 0) -> list[Event]:
        """What a run of `steps` steps released, some of them on batches of a loader of the user's own.

        Those are charged as releases in which any record may take part, once. What the scheme's own
        steps cost is bounded by what all steps would have: leaving releases out costs nothing.
        Under banded noise a record may then overlap with itself in any way, and nothing is amplified.
        """
        if not own_loader_steps:
            return [self.event(steps)]
        if self.mechanism in ("inverse-banded", "buffered-toeplitz"):
            anywhere: Any = self.event(steps)
            return [replace(anywhere, separation=1)]
        if self.coefficients:
            worst = unbounded_sensitivity(self.coefficients, min(steps, self.steps))
            return [CorrelatedGaussian(self.noise_multiplier, worst, 1)]
        own = _with_mechanism(
            self.mechanism,
            SampledGaussian(self.noise_multiplier, 1.0, own_loader_steps),
            "an own loader",
        )
        return [own] if own_loader_steps == steps else [self.event(steps), own]

    def if_poisson(self) -> PrivacyPlan:
        """The plan with independent noise on Poisson samples."""
        mechanism = "gaussian" if self.coefficients else self.mechanism
        poisson: dict[str, Any] = {"sampling": "poisson", "capacity": None, "bands": None}
        return replace(self, mechanism=mechanism, coefficients=(), **poisson)

    def unamplified(self, releases: int, most: int) -> list[Event]:
        """What so many releases cost if any record may take part in each.

        Steps of a correlated run are one release, which was repeated as often as the most often
        released of them, `most`: two releases of one sum are one with noise smaller by the root of 2.
        """
        noise = self.noise_multiplier / (math.sqrt(most) if self.coefficients else 1.0)
        plan = replace(self, noise_multiplier=noise)
        return plan.history(releases, own_loader_steps=releases)

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
        # Left out where they say nothing, so that the hash of an older plan is what it was.
        values = {n: v for n, v in values.items() if v or n not in ("bands", "coefficients")}
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


def event_of(
    scheme: Scheme,
    mechanism: str,
    terms: Terms,
    noise_multiplier: float,
    steps: int,
    coefficients: tuple[float, ...] = (),
) -> Event:
    """What steps of a sampling scheme with a mechanism release.

    Args:
        coefficients: of noise that is correlated over steps.

    Raises:
        ConfigurationError: no event stands for the two together.
    """
    get_mechanism(mechanism)
    apart = None if scheme.separation is None else scheme.separation(terms)
    event = scheme.event(terms, noise_multiplier, steps)
    return _with_mechanism(mechanism, event, scheme.name, coefficients, apart)


def _with_mechanism(
    mechanism: str,
    event: Event,
    sampling: str,
    coefficients: tuple[float, ...] = (),
    apart: int | None = None,
) -> Event:
    """The event of a mechanism, from that of Gaussian noise on the same batches."""
    one_of("mechanism", mechanism, _EVENTS)
    found = _EVENTS[mechanism](event, coefficients, apart)
    if found is None:
        raise ConfigurationError(
            f"mechanism={mechanism!r} with sampling={sampling!r}: no theorem here covers the two "
            "together. Leave out sampling=, or use mechanism='gaussian'."
        )
    return found


def _discrete(event: Event, *_: Any) -> Event | None:
    if not isinstance(event, SampledGaussian):
        return None
    return SampledDiscreteGaussian(event.noise_multiplier, event.sample_rate, event.steps)


def _separated(event: Event, coefficients: tuple[float, ...], apart: int | None) -> Event | None:
    if not isinstance(event, EpochwiseGaussian) or apart is None:
        return None
    return SeparatedGaussian(event.noise_multiplier, coefficients or (1.0,), apart, event.steps)


def _buffered(event: Event, coefficients: tuple[float, ...], apart: int | None) -> Event | None:
    if not isinstance(event, EpochwiseGaussian) or apart is None:
        return None
    return BufferedGaussian(event.noise_multiplier, coefficients, apart, event.steps)


#: For each mechanism, from the event of Gaussian noise, coefficients and how many steps lie between a
#: record's participations to its own event; None where no theorem covers it.
_EVENTS: Final[dict[str, Callable[[Event, tuple[float, ...], int | None], Event | None]]] = {
    "gaussian": lambda event, *_: event,
    "discrete_gaussian": _discrete,
    "banded": lambda event, *_: event if isinstance(event, CyclicGaussian) else None,
    "inverse-banded": _separated,
    "buffered-toeplitz": _buffered,
}
