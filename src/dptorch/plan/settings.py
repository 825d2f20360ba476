"""PlanSettings and make_plan: a plan from what a user knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypedDict

from typing_extensions import Unpack

from dptorch import accounting
from dptorch.accounting import Adjacency
from dptorch.accounting.arguments import number, positive, positive_int
from dptorch.accounting.toeplitz import Coefficients, Workload, coefficients_of
from dptorch.clipping import AdaptiveClipping, read_style
from dptorch.errors import ConfigurationError, one_of, warn
from dptorch.noise import get_mechanism
from dptorch.plan.privacy_plan import CORRELATED, PrivacyPlan, event_of
from dptorch.sampling import Terms, get_scheme

Style = str | Sequence[str] | Mapping[str, Any]


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
        mechanism: "gaussian" (the default), "banded", "inverse-banded", "buffered-toeplitz" or
            "discrete_gaussian", see `PrivacyPlan`. "banded" makes Poisson sampling cyclic, the two
            after it sequential.
        bands: over how many steps noise is correlated: a number, or "auto" (the default, for "banded"
            with target_epsilon): the number that leaves the least noise in the parameters.
            `dptorch plan --mechanism banded` shows what others give. For "buffered-toeplitz" the number
            of buffers.
        coefficients: for mechanism="banded": "prefix-sum" (the default: optimised for SGD),
            "square-root", a `dptorch.accounting.Workload` (optimised for momentum and a schedule of
            learning rates), or the numbers themselves; for "inverse-banded": "square-root" or numbers;
            for "buffered-toeplitz": "prefix-sum" (the default) or numbers. A function of the number of
            steps returns one of these.
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
    bands: int | str | None
    coefficients: Coefficients | Callable[[int], Coefficients] | None


# The settings that are fields of the plan as they are, with the defaults that `PrivacyPlan` states.
_FIELDS: Final = (
    "clipping_fn",
    "accountant",
    "loss_reduction",
    "unit",
    "target_epsilon",
    "sample_size",
    "max_examples_per_user",
    "mechanism",
)

# The settings that have to be numbers. What they must be beyond that is checked where they are used.
_NUMBERS: Final = (
    "batch_size",
    "sample_rate",
    "sample_size",
    "epochs",
    "steps",
    "target_epsilon",
    "noise_multiplier",
    "target_delta",
    "max_grad_norm",
    "capacity",
    "max_examples_per_user",
)

# What Poisson sampling becomes under noise that is correlated over steps.
_SAMPLING: Final = {
    "banded": "cyclic-poisson",
    "inverse-banded": "sequential",
    "buffered-toeplitz": "sequential",
}
#: Mechanisms whose number of bands or buffers is found without a budget.
_FOUND_ALONE: Final = ("inverse-banded", "buffered-toeplitz")


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
    for name, value in settings.items():
        one_of("setting", name, PlanSettings.__annotations__)
        if name in _NUMBERS and value is not None and not isinstance(value, bool):
            number(name, value)
    sample_size = settings.get("sample_size")
    mechanism = settings.get("mechanism", PrivacyPlan.mechanism)
    get_mechanism(mechanism)  # refuses one that is unknown
    sampling = settings.get("sampling", "poisson")
    if sampling == "poisson":
        sampling = _SAMPLING.get(mechanism, sampling)
    scheme = get_scheme(sampling)
    rate, batch_size = _rate(settings.get("batch_size"), settings.get("sample_rate"), sample_size)
    bands = _bands(settings.get("bands"), mechanism, settings.get("target_epsilon"))
    terms = scheme.settle(
        Terms(
            rate,
            batch_size,
            sample_size,
            _capacity(settings.get("capacity")),
            bands if isinstance(bands, int) and mechanism not in _FOUND_ALONE else None,
        )
    )
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
    given = settings.get("coefficients")
    asked = _coefficients(given(steps) if callable(given) else given)
    wanted: Coefficients = "prefix-sum" if asked is None else asked
    if mechanism not in CORRELATED and asked is not None:
        raise ConfigurationError(
            "coefficients= is for noise that is correlated over steps, by mechanism="
            f"{' or '.join(map(repr, CORRELATED))}, and mechanism={mechanism!r}. Leave it out."
        )
    coefficients: tuple[float, ...] = ()
    event_of(scheme, mechanism, terms, 1.0, 0)  # refuses what no theorem covers together
    if mechanism in CORRELATED:
        from dptorch.plan.bands import best_bands, best_buffered, best_inverse, compare_bands
    if mechanism == "inverse-banded":
        coefficients = best_inverse(steps, terms.steps_per_epoch, bands, asked)
    if mechanism == "buffered-toeplitz":
        coefficients = best_buffered(steps, terms.steps_per_epoch, bands, asked)
    if mechanism == "banded" and bands == "auto":
        assert target_epsilon is not None
        found = compare_bands(
            sample_rate=rate,
            steps=steps,
            target_epsilon=target_epsilon,
            delta=delta,
            accountant="exact",
            adjacency=adjacency,
            coefficients=wanted,
            every=False,
        )
        terms = replace(terms, bands=best_bands(found).bands)
    if mechanism == "banded":
        coefficients = tuple(coefficients_of(terms.bands or 1, steps, wanted).tolist())
    if noise_multiplier is None:
        assert target_epsilon is not None
        accountant = settings.get("accountant", PrivacyPlan.accountant)
        accounting.get_accountant(accountant)
        noise_multiplier = accounting.noise_multiplier_for(
            lambda noise: event_of(scheme, mechanism, terms, noise, steps, coefficients),
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
        sampling=scheme.name,
        bands=terms.bands,
        coefficients=coefficients,
        **fields_given,
    )


def default_delta(sample_size: int) -> float:
    """1 / (10 * sample_size), at most 1e-5, rounded down to a power of ten.

    Example:
        >>> default_delta(60_000), default_delta(3_000_000)
        (1e-06, 1e-08)
    """
    return min(1e-5, 10.0 ** math.floor(math.log10(1 / (10 * sample_size))))


def _capacity(wanted: int | None) -> int | None:
    return None if wanted is None else positive_int("capacity", wanted)


def _coefficients(asked: Any) -> Coefficients | None:
    if asked is None or isinstance(asked, (str, Workload)):
        return asked
    if not isinstance(asked, Iterable) or isinstance(asked, (bytes, Mapping)):
        raise ConfigurationError(
            f"coefficients={asked!r}: expected 'prefix-sum', 'square-root', a Workload or numbers."
        )
    return [number("coefficients", value) for value in asked]


def _bands(
    wanted: int | str | None, mechanism: str, target_epsilon: float | None
) -> int | str | None:
    """The number of bands that is asked for, "auto", or None for the scheme's default.

    Raises:
        ConfigurationError: it is neither, or there is no budget to find it by.
    """
    found_alone = mechanism in _FOUND_ALONE
    if wanted is None:
        planned = mechanism == "banded" and target_epsilon is not None
        return "auto" if found_alone or planned else None
    if isinstance(wanted, str) and wanted.isdecimal():
        wanted = int(wanted)
    if wanted != "auto":
        if isinstance(wanted, str):
            raise ConfigurationError(f"bands={wanted!r} must be a whole number or 'auto'.")
        number("bands", wanted)
        return positive_int("bands", wanted)
    if not found_alone and (mechanism != "banded" or target_epsilon is None):
        raise ConfigurationError(
            "bands='auto' finds the number of bands for a budget: it needs mechanism='banded' and "
            "target_epsilon. Give a number, for example 8."
        )
    return "auto"


def _steps(epochs: float | None, steps: int | None, rate: float) -> int:
    """The length of the run in steps, from the one of the two that is given."""
    if epochs is None and steps is not None:
        return positive_int("steps", steps, least=0)
    if epochs is None or steps is not None:
        raise ConfigurationError(
            f"epochs={epochs!r} and steps={steps!r}: give exactly one, the length of the run."
        )
    positive("epochs", epochs)
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


def _rate(
    batch_size: float | None, sample_rate: float | None, sample_size: int | None
) -> tuple[float, float]:
    """(sample_rate, expected_batch_size) from any two of the three."""
    if sample_size is not None and (
        isinstance(sample_size, bool)
        or not math.isfinite(sample_size)
        or int(sample_size) != sample_size
        or sample_size < 1
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
        positive("batch_size", batch_size)
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
