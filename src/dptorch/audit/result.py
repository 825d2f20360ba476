"""The result of an audit: what was claimed, what was measured, and what follows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from scipy.stats import binomtest

from dptorch.accounting import arguments
from dptorch.audit import bounds, thresholds
from dptorch.audit.evidence import Evidence
from dptorch.errors import ConfigurationError

if TYPE_CHECKING:
    from dptorch.audit.bounds import Bound
    from dptorch.audit.laws.law_test import LawTest
    from dptorch.audit.thresholds import Threshold
    from dptorch.plan import PrivacyPlan

__all__ = ["FEWEST_CANARIES", "NOT_REFUTED", "REFUTED", "AuditResult", "Proof", "judge", "prove"]

REFUTED: Final = "REFUTED"
NOT_REFUTED: Final = "NOT REFUTED"
FEWEST_CANARIES: Final = 20
_UNFAIR: Final = 1e-9  # how likely fair coins may be to fall so far from half


@dataclass(frozen=True)
class Proof:
    """One lower bound.

    Attributes:
        bound: the argument it rests on.
        epsilon_lower: what it proves with confidence 1 - significance.
        ceiling: the most it could have proved from as many canaries.
        significance: its share of the audit's.
    """

    bound: str
    epsilon_lower: float
    ceiling: float
    significance: float


@dataclass(frozen=True, eq=False)
class AuditResult:
    """What an audit found. ``str()`` is the text, `to_dict` the same for machines.

    An audit can refute a claim and never confirm one: a leak that this adversary does not see stays
    unseen. So the verdict is "REFUTED" or "NOT REFUTED".

    Attributes:
        claimed_epsilon: ε that is claimed at `delta`.
        significance: α: how often an audit of a true claim says REFUTED, at most.
        adversary: what it sees and does, in words.
        canaries: number of canaries, or of games.
        proofs: the bounds; the largest counts. They and the laws err with probability α at most,
            together.
        evidence: scores and memberships, for curves.
        plan: the claim, where it is a plan; the report draws its trade-off curve.
        steps: how many steps of the plan were audited.
        notes: what a reader must know to weigh the result.
        statement: the privacy statement of the run.
        laws: tests of single laws that the plan states; one that is broken refutes the claim, since
            the claim is about a run that keeps them.
    """

    claimed_epsilon: float
    delta: float
    significance: float
    adversary: str
    canaries: int
    proofs: tuple[Proof, ...]
    evidence: Evidence
    plan: PrivacyPlan | None = None
    steps: int | None = None
    notes: tuple[str, ...] = ()
    statement: str | None = field(default=None, repr=False)
    laws: tuple[LawTest, ...] = ()

    @property
    def epsilon_lower(self) -> float:
        """ε at `delta` that was measured at least, with confidence 1 - significance."""
        return max(proof.epsilon_lower for proof in self.proofs)

    @property
    def ceiling(self) -> float:
        """The most that this audit could have measured, had every guess been right."""
        return max(proof.ceiling for proof in self.proofs)

    @property
    def refuted(self) -> bool:
        """Whether a bound is above the claim, or what ran breaks a law that the claim is about."""
        return self.epsilon_lower > self.claimed_epsilon or bool(self.broken_laws)

    @property
    def broken_laws(self) -> tuple[LawTest, ...]:
        """The tests of laws that failed."""
        return tuple(law for law in self.laws if law.broken)

    @property
    def conclusion(self) -> str:
        """What follows, in a sentence or two."""
        chance = f"or an event of probability {self.significance:g} at most happened."
        said = []
        if self.epsilon_lower > self.claimed_epsilon:
            said.append(
                f"At least {number(self.epsilon_lower)} was measured where "
                f"{number(self.claimed_epsilon)} is claimed, so the claim is false, {chance}"
            )
        for law in self.broken_laws:
            certain = "." if law.significance == 0 else f", {chance}"
            said.append(
                f"What ran is not what the claim is about ({law.law}): {law.worst}{certain}"
            )
        if not said:
            return (
                "This adversary found no more than is claimed. That is no proof that no other can."
            )
        return " ".join(said)

    @property
    def verdict(self) -> str:
        """ "REFUTED" or "NOT REFUTED"."""
        return REFUTED if self.refuted else NOT_REFUTED

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values; infinity is None."""
        from dptorch.audit.roc import roc_summary

        return {
            "verdict": self.verdict,
            "confidence": 1 - self.significance,
            "claimed_epsilon": _finite(self.claimed_epsilon),
            "delta": self.delta,
            "epsilon_lower": _finite(self.epsilon_lower),
            "ceiling": _finite(self.ceiling),
            "adversary": self.adversary,
            "canaries": self.canaries,
            "steps": self.steps,
            "proofs": [
                {
                    "bound": p.bound,
                    "epsilon_lower": _finite(p.epsilon_lower),
                    "ceiling": _finite(p.ceiling),
                    "significance": p.significance,
                }
                for p in self.proofs
            ],
            "laws": [
                {
                    "law": t.law,
                    "p_value": t.p_value,
                    "significance": t.significance,
                    "broken": t.broken,
                    "worst": t.worst,
                }
                for t in self.laws
            ],
            "roc": roc_summary(self.evidence),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        lines = [
            f"{self.verdict} at confidence {100 * (1 - self.significance):g} %",
            "",
            f"Claimed epsilon      {number(self.claimed_epsilon)} at delta {self.delta:g}",
            f"Measured at least    {number(self.epsilon_lower)}",
            f"Could have measured  {_ceiling(self.ceiling)}",
            f"Adversary            {self.adversary}",
            f"Canaries             {self.canaries}"
            + (f", {self.steps} steps" if self.steps is not None else ""),
            *(
                f"Bound                {p.bound}: {number(p.epsilon_lower)} "
                f"(at most {_ceiling(p.ceiling)}; significance {p.significance:g})"
                for p in self.proofs
            ),
            *(
                f"Law                  {t.law}: {'BROKEN' if t.broken else 'not broken'} "
                f"(p = {t.p_value:.2g}; significance {t.significance:.2g})"
                for t in self.laws
            ),
            "",
            self.conclusion,
            *(f"Note: {note}" for note in self.notes),
        ]
        return "\n".join(lines) + "\n"


def prove(
    evidence: Evidence,
    bound: Bound | str,
    threshold: Threshold | str | float | tuple[float, float] = "bonferroni",
    *,
    delta: float,
    significance: float,
) -> Proof:
    """One lower bound on ε from scores.

    Raises:
        ConfigurationError: an unknown name, or fewer than 20 canaries.
    """
    argument = bounds.get_bound(bound) if isinstance(bound, str) else bound
    strategy = thresholds.get_threshold(threshold)
    if not 0 < significance < 1:
        raise ConfigurationError(f"significance={significance!r} must lie between 0 and 1.")
    if not 0 <= delta < 1:
        raise ConfigurationError(f"delta={delta!r} must lie in [0, 1).")
    inside, outside = len(evidence.members), len(evidence.others)
    if len(evidence) < FEWEST_CANARIES or min(inside, outside) < 2:
        raise ConfigurationError(
            f"{len(evidence)} canaries, {inside} in and {outside} out: with so few, no measurement "
            f"says anything. Use at least {FEWEST_CANARIES}. 1000 is usual."
        )
    return Proof(
        bound=argument.name,
        epsilon_lower=strategy.epsilon(argument, evidence, delta=delta, significance=significance),
        ceiling=argument.ceiling(evidence, delta=delta, significance=significance),
        significance=significance,
    )


def judge(
    evidence: Evidence,
    *,
    epsilon: float,
    delta: float,
    adversary: str,
    bound: Bound | str = "one-run",
    threshold: Threshold | str | float | tuple[float, float] = "bonferroni",
    significance: float = 0.05,
    notes: Sequence[str] = (),
    plan: PrivacyPlan | None = None,
    steps: int | None = None,
    statement: str | None = None,
) -> AuditResult:
    """Hold a claim against scores.

    Args:
        evidence: a score for each canary or game, and whether it was in.
        epsilon, delta: the claim.
        adversary: how the scores came about, in words.
        bound: name in `dptorch.audit.bounds.BOUNDS`. "one-run" is valid for canaries of one run; for
            independent games "clopper-pearson", and the Gaussian ones for Gaussian noise. A bound of
            one run takes for granted that a fair coin of its own decided of each canary whether it
            was in.
        threshold: how guesses are made from scores: "bonferroni", "split", "multi-split", or what is
            fixed beforehand: a number, or for a bound of one run two shares of the canaries, to guess
            in and out.
        significance: how often the audit of a true claim may say REFUTED.

    Raises:
        ConfigurationError: fewer than 20 canaries, an unknown name, a claim that is none, or canaries
            of one run that no fair coin put in.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> member = rng.random(1000) < 0.5
        >>> leak = Evidence(member + 0.1 * rng.normal(size=1000), member)
        >>> judge(leak, epsilon=1.0, delta=1e-5, adversary="sees a leak").verdict
        'REFUTED'
    """
    _check_claim(epsilon, delta)
    argument = bounds.get_bound(bound) if isinstance(bound, str) else bound
    if isinstance(argument, bounds.OneRun):
        _check_coins(evidence)
    proof = prove(evidence, argument, threshold, delta=delta, significance=significance)
    return AuditResult(
        claimed_epsilon=epsilon,
        delta=delta,
        significance=significance,
        adversary=adversary,
        canaries=len(evidence),
        proofs=(proof,),
        evidence=evidence,
        plan=plan,
        steps=steps,
        notes=tuple(notes),
        statement=statement,
    )


def _check_claim(epsilon: float, delta: float) -> None:
    for name, value, most in (("epsilon", epsilon, math.inf), ("delta", delta, 1.0)):
        if not 0 <= arguments.number(name, value) <= most:
            raise ConfigurationError(
                f"{name}={value!r} of a claim must be at least 0 and at most {most:g}."
            )


def _check_coins(evidence: Evidence) -> None:
    """Raise where fair coins would hardly ever have put as many canaries in."""
    inside, all_of_them = len(evidence.members), len(evidence)
    if binomtest(inside, all_of_them).pvalue < _UNFAIR:
        raise ConfigurationError(
            f"{inside} of {all_of_them} canaries were in: a bound of one run takes for granted that a "
            "fair coin decided of each whether it was in, and would refute true claims here. Toss one "
            "for each canary, or play independent games and give bound='clopper-pearson'."
        )


def number(value: float) -> str:
    """A lower bound or a claim, with three decimals."""
    return "infinity" if math.isinf(value) else f"{value:.3f}"


def _ceiling(value: float) -> str:
    return "anything" if math.isinf(value) else number(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
