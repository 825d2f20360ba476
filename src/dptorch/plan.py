"""PrivacyPlan: one frozen object couples clipping, noise, sampling, adjacency and accounting.

What a run guarantees is read off its plan and nowhere else. Anything that only changes speed or
memory lives elsewhere and cannot change a guarantee.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dptorch import accounting
from dptorch.accounting import Adjacency, SampledGaussian
from dptorch.clipping import FUNCTIONS
from dptorch.errors import ConfigurationError, PrivacyWarning, one_of

__all__ = ["LOSS_REDUCTIONS", "PrivacyPlan", "PrivacySpent", "make_plan"]

LOSS_REDUCTIONS = ("mean", "sum")
_STYLES = {"all-layer": "all-layer", "flat": "all-layer"}
_FORMAT = 1


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
        sample_rate: probability with which a step draws each record.
        steps: number of steps planned; the budget.
        noise_multiplier: standard deviation of the noise over max_grad_norm.
        max_grad_norm: bound C on one record's contribution to a step's sum.
        expected_batch_size: public constant that the noisy sum is divided by under a mean loss.
        target_delta: δ of the statement.
        clipping_fn: name in `dptorch.clipping.FUNCTIONS`.
        clipping_style: "all-layer": one norm over all parameters.
        accountant: name of the accountant whose ε is stated.
        adjacency: the neighbouring relation.
        loss_reduction: how the user's loss joins the examples, "mean" or "sum".
        unit: what one record is.
        target_epsilon: the ε that noise_multiplier was calibrated to, if it was.
        sample_size: number of records, where it was given and is treated as public.
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

    def __post_init__(self) -> None:
        one_of("clipping_fn", self.clipping_fn, FUNCTIONS)
        one_of("loss_reduction", self.loss_reduction, LOSS_REDUCTIONS)
        style = _STYLES[one_of("clipping_style", self.clipping_style, _STYLES)]
        object.__setattr__(self, "clipping_style", style)
        object.__setattr__(self, "adjacency", Adjacency.of(self.adjacency))
        accounting.get(self.accountant)
        self.event(self.steps)  # checks rate, noise and steps
        _positive("max_grad_norm", self.max_grad_norm)
        _positive("expected_batch_size", self.expected_batch_size)
        if not 0 < self.target_delta < 1:
            raise ConfigurationError(
                f"target_delta={self.target_delta!r} must be in (0, 1), and well below one over the "
                "number of records, for example 1e-5."
            )

    def event(self, steps: int) -> SampledGaussian:
        """What `steps` steps of this plan release, for an accountant."""
        return SampledGaussian(self.noise_multiplier, self.sample_rate, steps)

    def epsilon(self, steps: int | None = None, *, amplified: bool = True) -> float:
        """ε after some steps (by default all of them) at the plan's δ.

        Args:
            steps: steps done.
            amplified: use that a step sees a random sample. False gives the ε of a run in which
                every record may take part in every step, once in each.
        """
        steps = self.steps if steps is None else steps
        event = self.event(steps)
        if not amplified:
            event = SampledGaussian(self.noise_multiplier, 1.0, steps)
        return accounting.get(self.accountant).epsilon(
            [event], self.target_delta, adjacency=self.adjacency
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


def make_plan(
    *,
    batch_size: float | None = None,
    sample_rate: float | None = None,
    sample_size: int | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    target_delta: float | None = None,
    max_grad_norm: float = 1.0,
    clipping_fn: str = "abadi",
    clipping_style: str = "all-layer",
    accountant: str = "pld",
    adjacency: Adjacency | str | None = None,
    loss_reduction: str = "mean",
    unit: str = "example",
) -> PrivacyPlan:
    """A plan from what a user knows: two of (batch size, rate, number of records), a length, and
    either the ε wanted or the noise.

    Args:
        batch_size: expected number of records a step draws.
        sample_rate: probability of drawing each record; batch_size / sample_size.
        sample_size: number of records. Treated as public if given.
        epochs: length of the run in passes over the data; steps = ceil(epochs / sample_rate).
        steps: length of the run in steps.
        target_epsilon: calibrate the noise so that all steps together spend at most this.
        noise_multiplier: or state the noise; ε follows.
        target_delta: δ; by default 1 / (10 * sample_size), at most 1e-5, rounded down to a power
            of ten.
        adjacency: the neighbouring relation. By default zero-out where sample_size is given, since
            rate and batch size then tell it, and add/remove otherwise.
        max_grad_norm, clipping_fn, clipping_style, accountant, loss_reduction, unit: see
            `PrivacyPlan`.

    Raises:
        ConfigurationError: where arguments are missing, contradict each other or cannot be met; for
            a target ε out of reach it names the smallest that is.

    Example:
        >>> plan = make_plan(batch_size=256, sample_size=50_000, epochs=3, target_epsilon=2.0)
        >>> plan.steps, plan.target_delta, plan.epsilon() <= 2.0
        (586, 1e-06, True)
    """
    rate, expected = _rate(batch_size, sample_rate, sample_size)
    if adjacency is None:
        adjacency = Adjacency.ADD_REMOVE if sample_size is None else Adjacency.ZERO_OUT
    if (epochs is None) == (steps is None):
        raise ConfigurationError(
            f"epochs={epochs!r} and steps={steps!r}: give exactly one, the length of the run."
        )
    if steps is None:
        assert epochs is not None
        _positive("epochs", epochs)
        # 1 / rate is often a hair above the whole number it means.
        steps = math.ceil(round(epochs / rate, 6))
    if (target_epsilon is None) == (noise_multiplier is None):
        raise ConfigurationError(
            f"target_epsilon={target_epsilon!r} and noise_multiplier={noise_multiplier!r}: give "
            "exactly one; the other follows."
        )
    delta = target_delta
    if delta is None:
        if sample_size is None:
            raise ConfigurationError(
                "target_delta is missing, and without sample_size there is no default. Give a "
                "number well below one over the number of records, for example 1e-5."
            )
        delta = min(1e-5, 10.0 ** math.floor(math.log10(1 / (10 * sample_size))))
    elif sample_size is not None and 1 / sample_size <= delta < 1:
        warnings.warn(
            f"target_delta={delta:g} is not below 1/{sample_size}: a mechanism that publishes one "
            f"record in full would satisfy it. Use at most "
            f"{10.0 ** math.floor(math.log10(0.1 / sample_size)):g}.",
            PrivacyWarning,
            stacklevel=2,
        )
    if noise_multiplier is None:
        assert target_epsilon is not None
        one_of("accountant", accountant, [*accounting.names(), "glw"])
        noise_multiplier = accounting.noise_multiplier(
            target_epsilon=target_epsilon,
            delta=delta,
            sample_rate=rate,
            steps=steps,
            accountant=accountant,
            adjacency=adjacency,
        )
    return PrivacyPlan(
        sample_rate=rate,
        steps=steps,
        noise_multiplier=noise_multiplier,
        max_grad_norm=float(max_grad_norm),
        expected_batch_size=expected,
        target_delta=delta,
        clipping_fn=clipping_fn,
        clipping_style=clipping_style,
        accountant=accountant,
        adjacency=Adjacency.of(adjacency),
        loss_reduction=loss_reduction,
        unit=unit,
        target_epsilon=target_epsilon,
        sample_size=sample_size,
    )


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
