"""Audit a plan: the engine runs it on canaries, before an adversary who sees every step."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from dptorch.audit.bounds import mu_lower_bound_from_scores
from dptorch.audit.evidence import Evidence
from dptorch.audit.games.dirac import Progress, play_dirac
from dptorch.audit.result import AuditResult, Proof, prove
from dptorch.plan import PrivacyPlan

__all__ = ["audit_plan"]

# An epsilon beyond all use; less noise than this need not be told apart.
_LEAST_NOISE = 0.1


def audit_plan(
    plan: PrivacyPlan,
    *,
    canaries: int = 1000,
    steps: int | None = None,
    significance: float = 0.05,
    seed: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    statement: str | None = None,
) -> AuditResult:
    """Run the engine under a plan on canaries, and hold what an observer of every step sees against
    the plan's ε.

    Two bounds share the significance. *Single steps*: each shows how much noise there is on one
    canary; the noise that is proved at most is composed over the plan's steps and sampling. It is
    nearly tight. *The whole run*: guesses about each canary, which any (ε, δ)-DP run limits, whatever
    it does; it finds what single steps do not show: batches that repeat, noise that repeats.

    Args:
        plan: what is claimed.
        canaries, steps, seed, device, progress: see `dptorch.audit.games.dirac.play_dirac`.
        significance: how often the audit of a true claim may say REFUTED.
        statement: shown in the report.

    Guarantees:
        If the engine does what the plan says, the result is REFUTED with probability at most
        `significance`.
        Held by `test_false_alarms_of_the_engine_itself`.

    Raises:
        ConfigurationError: fewer than 20 canaries, or more steps than the plan has.

    Example:
        >>> from dptorch import make_plan
        >>> plan = make_plan(sample_rate=1.0, sample_size=100, steps=10, noise_multiplier=3.0)
        >>> result = audit_plan(plan, canaries=500, seed=0)
        >>> result.verdict, result.epsilon_lower > 0.5 * plan.epsilon()
        ('NOT REFUTED', True)
    """
    game = play_dirac(
        plan, canaries=canaries, steps=steps, seed=seed, device=device, progress=progress
    )
    share = significance / 2
    whole = prove(game.run, "one-run", delta=plan.target_delta, significance=share)
    played = plan.steps if steps is None else steps
    notes = [
        "This measures the engine on a model made for it, with this plan. It says nothing about "
        "another loop, and it cannot see what a model or a data set adds."
    ]
    if played < plan.steps:
        notes.append(f"The first {played} of {plan.steps} steps were played.")
    return AuditResult(
        claimed_epsilon=plan.epsilon(),
        delta=plan.target_delta,
        significance=significance,
        adversary="white box: chooses the gradients of canaries, sees the noisy gradient of every step",
        canaries=len(game.run),
        proofs=(_from_single_steps(game.steps, plan, share), whole),
        evidence=game.run,
        plan=plan,
        steps=played,
        notes=tuple(notes),
        statement=statement,
    )


def _from_single_steps(evidence: Evidence, plan: PrivacyPlan, significance: float) -> Proof:
    """ε of the plan with the most noise that the scores of single steps leave possible."""
    epsilon = 0.0
    mu = mu_lower_bound_from_scores(evidence, significance=significance)
    if mu > 0:
        # In units of the clipping norm a canary moves a step by 1, or by 2 where it is replaced.
        noise = plan.adjacency.sensitivity_factor / mu
        epsilon = replace(plan, noise_multiplier=max(noise, _LEAST_NOISE)).epsilon()
    return Proof(
        bound="noise of single steps, composed (Gaussian, noncentral t)",
        epsilon_lower=epsilon,
        ceiling=math.inf,
        significance=significance,
    )
