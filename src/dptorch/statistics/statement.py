"""What released statistics guarantee, in words and as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dptorch.plan import PrivacyPlan
from dptorch.randomness import KeySource
from dptorch.risk import in_words, rounded_up
from dptorch.statement import FLOATING_POINT, VARIANT
from dptorch.statistics.quantities import Numeric, Quantity

__all__ = ["StatisticsStatement"]

_TRUST: Final = "central: whoever makes the release sees the data"
_ADJACENCY: Final = {
    "zero-out": "replacing one {unit} by one that contributes nothing",
    "replace-one": "replacing one {unit} by another",
}
_NOT_COVERED: Final = (
    "choices made by looking at the private data: bounds, lists of values, bins, what is asked for",
    "how many {unit}s there are",
    "other releases from the same data: their epsilons add up, which a ledger does",
    "releases of the same data without differential privacy, whoever makes them",
    "how long the release takes, memory and other side channels of the machine",
)


def _text(number: float) -> str:
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


@dataclass(frozen=True)
class StatisticsStatement:
    """A statement about one release; ``str()`` is the text, `to_dict` the same for machines.

    Attributes:
        plan: of the release: one step in which everybody takes part.
        epsilon: of it.
        quantities: what was released.
        key_source: where the noise came from.
        ledger: the run and data set under which it was charged beforehand.
        read_from_data: what of the bounds and lists of values was read off the private data.
    """

    plan: PrivacyPlan
    epsilon: float
    quantities: tuple[Quantity, ...]
    key_source: KeySource
    ledger: Mapping[str, str] | None = None
    read_from_data: tuple[str, ...] = ()

    @property
    def in_words(self) -> list[str]:
        """What the guarantee means for one person; of a seeded release nothing."""
        if not self.key_source.is_private:
            return [
                "The noise came from a seed that is known, so that this release protects nobody."
            ]
        plan = self.plan
        return in_words(
            self.epsilon,
            plan.target_delta,
            plan.unit,
            plan.sample_size,
            data="data",
            published="statistics",
        )

    @property
    def unit_text(self) -> str:
        """Whom it protects."""
        if self.plan.unit == "user":
            return "one user with all their rows, which count as the mean of them"
        return f"one {self.plan.unit}"

    @property
    def adjacency_text(self) -> str:
        """Which two data sets are compared."""
        return _ADJACENCY[self.plan.adjacency.value].format(unit=self.plan.unit)

    @property
    def public(self) -> list[str]:
        """What none of which may come from the private data."""
        found = [f"number of {self.plan.unit}s {self.plan.sample_size}"]
        for quantity in self.quantities:
            if isinstance(quantity, Numeric):
                low, high = quantity.bounds
                found.append(
                    f"{quantity.name}: bounds {_text(low)} to {_text(high)}, {quantity.bins} bins"
                )
            else:
                found.append(f"{quantity.name}: the values {', '.join(quantity.values)}")
        return found

    @property
    def not_covered(self) -> list[str]:
        """What the guarantee says nothing of."""
        floats = [FLOATING_POINT] if self.plan.mechanism != "discrete_gaussian" else []
        read = [
            f"what was read off the private data, without noise, to say what is public: {each}"
            for each in self.read_from_data
        ]
        return [*read, *(item.format(unit=self.plan.unit) for item in _NOT_COVERED), *floats]

    def to_dict(self) -> dict[str, Any]:
        """The statement as plain values."""
        plan = self.plan
        return {
            "epsilon": self.epsilon,
            "delta": plan.target_delta,
            "variant": VARIANT,
            "trust_model": _TRUST,
            "unit": plan.unit,
            "unit_text": self.unit_text,
            "adjacency": plan.adjacency.value,
            "adjacency_text": self.adjacency_text,
            "mechanism": plan.mechanism,
            "noise_multiplier": plan.noise_multiplier,
            "accountant": plan.accountant,
            "key_provenance": self.key_source.value,
            "private_randomness": self.key_source.is_private,
            "ledger": None if self.ledger is None else dict(self.ledger),
            "plan": json.loads(plan.to_json()),
            "in_words": self.in_words,
            "public": self.public,
            "not_covered": self.not_covered,
            "read_from_data": list(self.read_from_data),
        }

    def __str__(self) -> str:
        plan = self.plan
        epsilon = rounded_up(self.epsilon)
        first = "These" if self.key_source.is_private else "But for a seed that is known, these"
        lines = [
            f"{first} statistics are ({epsilon}, {plan.target_delta:g})-differentially private with "
            f"respect to {self.adjacency_text}.",
            "",
            "In words:",
            *(f"  {paragraph}" for paragraph in self.in_words),
            "",
            f"Variant              {VARIANT}",
            f"Trust model          {_TRUST}",
            "Releases             one, not interactive: all of these numbers together",
            f"Unit of privacy      {self.unit_text}",
            f"Mechanism            {plan.mechanism}, multiplier {plan.noise_multiplier:.6g}, on one "
            "sum of vectors of norm at most 1",
            f"Accountant           {plan.accountant}, an upper bound",
            f"Randomness           key from the {self.key_source.value}",
            "Ledger               "
            + ("run {run} on {dataset}".format(**self.ledger) if self.ledger else "none"),
            "",
            "Treated as public, so that none of it may come from the private data:",
            *(f"  - {item}" for item in self.public),
            "Not covered:",
            *(f"  - {item}" for item in self.not_covered),
        ]
        return "\n".join(lines) + "\n"
