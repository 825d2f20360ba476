"""The privacy statement: what was guaranteed, under which assumptions, and what was not."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import dataclass, field
from typing import Any

import torch

from dptorch.accounting import Adjacency
from dptorch.plan import PrivacyPlan

__all__ = ["ASSUMED", "NOT_COVERED", "Statement", "make_statement"]

_ADJACENCY_TEXT = {
    Adjacency.ADD_REMOVE: "adding or removing one {unit}",
    Adjacency.ZERO_OUT: "replacing one {unit} by one that contributes nothing",
    Adjacency.REPLACE_ONE: "replacing one {unit} by another",
}

NOT_COVERED = (
    "values logged in training that are exact functions of private data: loss, gradient norms, "
    "the clipped fraction, batch sizes",
    "choices made by looking at private data, inside the run or outside: hyper-parameters, "
    "learning-rate schedules that follow the loss, early stopping, which run to keep",
    "metrics computed on private data, and any preprocessing that used statistics of it",
    "buffers of the model, and parameters written by anything but the optimizer's steps",
    "other engines and other runs on the same data: their epsilons add up",
    "attacks on floating-point arithmetic: noise and sums are floating-point numbers",
)
ASSUMED = (
    "every row of a batch, its label and its weight come from one {unit} alone: no mixing in the "
    "dataset, the collate function or the loop",
    "the loss is multiplied by public constants only",
)


@dataclass(frozen=True)
class Statement:
    """A statement about one run; ``str()`` is the text, `to_dict` the same for machines.

    Attributes:
        plan: what the run committed to.
        steps: steps taken, empty batches included.
        epsilon: certified ε under the sampling that was run.
        epsilon_unamplified: ε of steps in each of which any record may take part, once.
        resumed: how often the run went on from a checkpoint.
        sampling_run: how many steps each sampler served.
        key_provenance: where the randomness came from.
        versions: software that ran.
    """

    plan: PrivacyPlan
    steps: int
    epsilon: float
    epsilon_unamplified: float
    sampling_run: dict[str, int]
    key_provenance: str
    versions: dict[str, str] = field(default_factory=dict)
    resumed: int = 0

    @property
    def sampling_holds(self) -> bool:
        """Whether every step drew its batch as the amplified ε assumes."""
        return all(scheme == "poisson" or not n for scheme, n in self.sampling_run.items())

    @property
    def private(self) -> bool:
        """Whether the randomness was secret."""
        return "not private" not in self.key_provenance

    def to_dict(self) -> dict[str, Any]:
        """The statement as plain values."""
        return {
            "epsilon": self.epsilon if self.sampling_holds else self.epsilon_unamplified,
            "epsilon_if_poisson_sampled": self.epsilon,
            "epsilon_without_amplification": self.epsilon_unamplified,
            "delta": self.plan.target_delta,
            "unit": self.plan.unit,
            "adjacency": self.plan.adjacency.value,
            "steps": self.steps,
            "resumed": self.resumed,
            "sampling_assumed": "poisson",
            "sampling_run": dict(self.sampling_run),
            "key_provenance": self.key_provenance,
            "plan": json.loads(self.plan.to_json()),
            "assumed": [item.format(unit=self.plan.unit) for item in ASSUMED],
            "not_covered": list(NOT_COVERED),
            "versions": dict(self.versions),
        }

    def __str__(self) -> str:
        plan = self.plan
        adjacency = _ADJACENCY_TEXT[plan.adjacency].format(unit=plan.unit)
        run = ", ".join(f"{n} steps: {s}" for s, n in self.sampling_run.items() if n) or "no step"
        headline = self.epsilon if self.sampling_holds else self.epsilon_unamplified
        lines = [
            f"These {self.steps} training steps are ({_number(headline)}, {plan.target_delta:g})-"
            f"differentially private with respect to {adjacency}.",
            "",
            f"Unit of privacy      one {plan.unit}",
            f"Adjacency            {plan.adjacency.value}",
            f"delta                {plan.target_delta:g}",
            f"Mechanism            Gaussian noise, multiplier {plan.noise_multiplier:.6g}, on sums of "
            f"gradients clipped to {plan.max_grad_norm:g} ({plan.clipping_fn}, {plan.clipping_style})",
            f"Steps                {self.steps} of {plan.steps} planned, empty batches included"
            + (f"; resumed {self.resumed} times" if self.resumed else ""),
            f"Sampling assumed     Poisson, rate {plan.sample_rate:.6g}",
            f"Sampling run         {run}",
            f"epsilon              {_number(self.epsilon)} if every batch is a Poisson sample"
            + (", as here" if self.sampling_holds else ""),
            f"                     {_number(self.epsilon_unamplified)} "
            + ("for comparison: " if self.sampling_holds else "")
            + "if batches are chosen otherwise, without looking at the data, a record",
            "                     at most once a step and in a place that no other record moves",
            f"Accountant           {plan.accountant}",
            f"Randomness           key from the {self.key_provenance}",
            "",
        ]
        if not self.sampling_holds:
            lines += [
                "NOTE: not every batch was drawn by the engine's Poisson loader, so the first line",
                "states the epsilon without amplification.",
                "",
            ]
        if not self.private:
            lines += [
                "NOTE: the noise comes from a seed given by the user. Whoever knows the seed can",
                "remove the noise. This run is for tests; it protects nobody.",
                "",
            ]
        lines += [
            "Released and covered: the model's trained parameters after every step, and anything "
            "computed from them.",
            "Assumed:",
            *(f"  - {item.format(unit=plan.unit)}" for item in ASSUMED),
            "Treated as public: every number in the plan"
            + (
                f", the number of records ({plan.sample_size}) included."
                if plan.sample_size
                else "."
            ),
            "Not covered:",
            *(f"  - {item}" for item in NOT_COVERED),
            "",
            "Software: " + ", ".join(f"{k} {v}" for k, v in self.versions.items()),
        ]
        return "\n".join(lines) + "\n"


def make_statement(
    plan: PrivacyPlan,
    steps: int,
    sampling_run: dict[str, int],
    key_provenance: str,
    resumed: int = 0,
) -> Statement:
    """The statement for a run that took `steps` steps of `plan`."""
    from dptorch import __version__

    return Statement(
        plan=plan,
        steps=steps,
        epsilon=plan.epsilon(steps),
        epsilon_unamplified=plan.epsilon(steps, amplified=False),
        sampling_run=sampling_run,
        key_provenance=key_provenance,
        versions={
            "dptorch": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        resumed=resumed,
    )


def _number(epsilon: float) -> str:
    # Rounded up: a stated bound may not be below the computed one.
    return "infinity" if math.isinf(epsilon) else f"{math.ceil(epsilon * 1e4) / 1e4:.4f}"
