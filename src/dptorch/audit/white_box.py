"""Audit a plan: the engine runs it on canaries, before an adversary who sees every step."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from dptorch.audit.bounds import mu_lower_bound_from_scores
from dptorch.audit.evidence import Evidence
from dptorch.audit.games.dirac import DiracGame, Progress, play_dirac
from dptorch.audit.laws.composition import claim_against_composition
from dptorch.audit.laws.law_test import LawTest
from dptorch.audit.laws.noise import NOISE_LAWS, noise_between_runs, noise_within_run
from dptorch.audit.laws.sampling import SAMPLING_LAWS, sampling_laws
from dptorch.audit.result import AuditResult, Proof, prove
from dptorch.plan import PrivacyPlan

__all__ = ["audit_plan"]

# An epsilon beyond all use; less noise than this need not be told apart.
_LEAST_NOISE = 0.1
# The share of the significance that the tests of laws have; the two bounds have the rest.
_FOR_LAWS = 0.04


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

    Two bounds and the tests of laws share the significance. *Single steps*: each shows how much noise
    there is on one canary; the noise that is proved at most is composed over the plan's steps and
    sampling. It is nearly tight. *The whole run*: guesses about each canary, which any (ε, δ)-DP run
    limits, whatever it does; it finds what single steps do not show: batches that repeat, noise that
    repeats. *Laws*: the claim is about a run in which each step, each coordinate and each cell has its
    noise, no noise repeats (neither in the run nor in a second one), and records are drawn as the
    scheme says; and its ε is held against one composed apart. What was not tested is in the notes.

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
    share = significance * (1 - _FOR_LAWS) / 2
    whole = prove(game.run, "one-run", delta=plan.target_delta, significance=share)
    fresh = None
    if seed is None:
        # On the same data: noise depends on that too, so that only there a key shows twice.
        member = np.asarray(game.run.member)
        fresh = play_dirac(plan, canaries=len(member), steps=1, device=device, member=member)
    played = plan.steps if steps is None else steps
    notes = [
        "This measures the engine on a model made for it, with this plan. It says nothing about "
        "another loop, and it cannot see what a model or a data set adds."
    ]
    if played < plan.steps:
        notes.append(f"The first {played} of {plan.steps} steps were played.")
    laws, unseen = _laws(game, plan, significance * _FOR_LAWS, fresh=fresh)
    if unseen:
        notes.append(f"Taken at its word, not tested: {'; '.join(unseen)}.")
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
        laws=laws,
    )


def _laws(
    game: DiracGame, plan: PrivacyPlan, significance: float, *, fresh: DiracGame | None
) -> tuple[tuple[LawTest, ...], list[str]]:
    """The tests of laws, and what of the claim they do not see.

    Args:
        fresh: a game of one step with a key of its own; None where the key came from a seed.
    """
    share = significance / (NOISE_LAWS + SAMPLING_LAWS)
    found: list[LawTest] = []
    unseen: list[str] = []
    if plan.noise_multiplier > 0 and plan.adaptive_clipping is None and not plan.clipping_groups:
        found += noise_within_run(
            game.noise,
            plan.noise_multiplier,
            significance=share,
            continuous=plan.mechanism != "discrete_gaussian",
        )
        if fresh is None:
            unseen.append("that each run has a key of its own (a seed was given)")
        else:
            found.append(noise_between_runs(game.noise, fresh.noise, significance=share))
    elif plan.noise_multiplier > 0:
        unseen.append("the noise of each step and coordinate, whose scale is not the plan's alone")
    drawn = sampling_laws(game.drawn, plan, significance=share)
    found += drawn
    if plan.sample_rate < 1 and not drawn:
        unseen.append(f"how {plan.sampling} sampling draws")
    composed = claim_against_composition(plan)
    if composed is not None:
        found.append(composed)
    elif math.isfinite(plan.epsilon()):
        unseen.append(
            "that the claimed epsilon follows from the plan, which its accountant alone says"
        )
    return tuple(found), unseen


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
