"""Choose settings by private runs, and pay for the choice: the best of a random number of runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dptorch.accounting import RunLaw, tuned_epsilon
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.plan import PrivacyPlan
from dptorch.training.job import Job, Setup, prepare
from dptorch.training.run_folder import RunFolder
from dptorch.training.task import TESTED

if TYPE_CHECKING:
    from dptorch.training.loop import Outcome

__all__ = ["Selection", "noise_for", "tune"]

Candidate = Mapping[str, Any]


@dataclass(frozen=True)
class Selection:
    """How a run was chosen among others, and what publishing it costs.

    Attributes:
        law: of the number of runs.
        epsilon: of publishing the best run.
        candidates: the settings that a run drew from.
    """

    law: RunLaw
    epsilon: float
    candidates: tuple[Candidate, ...]

    @property
    def accountant(self) -> str:
        """The one that `epsilon` comes from."""
        return "rdp" if self.law.is_secret else "pld"

    @property
    def note(self) -> str:
        """The same in words, for the statement."""
        grids = {name: sorted({c[name] for c in self.candidates}) for name in self.candidates[0]}
        tried = "; ".join(f"{n} of {', '.join(f'{v:g}' for v in g)}" for n, g in grids.items())
        number, why = f"There were {self.law.mean_runs:g}", "all of them together"
        if self.law.is_secret:
            number = (
                f"Their number was drawn from a {self.law.name} law of mean {self.law.mean_runs:g} and "
                "is secret"
            )
            why = "publishing the best of them (Papernot and Steinke 2022)"
        return (
            f"this run is the best of several, by its test result. {number}; each drew {tried}. The "
            f"epsilon that is certified is that of {why}; the others below it, and those by step, are "
            "of one run."
        )


def noise_for(plan: PrivacyPlan, target_epsilon: float, law: RunLaw) -> tuple[float, float]:
    """The least noise with which publishing the best of several runs of a plan costs a budget.

    Args:
        plan: of one run; its own noise is not looked at.
        target_epsilon: the budget.
        law: of the number of runs.

    Returns:
        (noise multiplier, ε of publishing the best).

    Raises:
        ConfigurationError: no noise is enough.
    """

    def cost(noise: float) -> float:
        with_noise = replace(plan, noise_multiplier=noise, target_epsilon=None)
        history = with_noise.history(plan.steps)
        return tuned_epsilon(history, plan.target_delta, law, adjacency=plan.adjacency)

    low, high = 0.0, max(0.5, plan.noise_multiplier)
    while cost(high) > target_epsilon:
        low, high = high, 2 * high
        if high > 1e6:
            raise ConfigurationError(
                f"target_epsilon={target_epsilon:g}: no noise keeps the best of {law.mean_runs:g} runs "
                "within it. Give a larger budget, or fewer runs."
            )
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > target_epsilon else (low, middle)
    return high, cost(high)


def tune(
    job: Job,
    candidates: Sequence[Candidate],
    law: RunLaw,
    folder: Path,
    run: Callable[[Setup, RunFolder], Outcome],
) -> tuple[Outcome | None, Candidate]:
    """Train a random number of runs, each with settings drawn at random, and keep the best.

    Args:
        job: with a target ε, which is that of publishing the best.
        candidates: values of fields of `job` that do not change what a step costs.
        law: of the number of runs.
        folder: where the best run is left; it does not exist yet.
        run: trains a run in a folder, and writes its steps to the ledger.

    Returns:
        its outcome and settings; None, if a run was interrupted: nothing is kept then.

    Guarantees:
        Every run has the same cost, so that `tuned_epsilon` bounds that of publishing the best: scores
        are of test examples, which ε does not cover. The folders of the others are deleted.
        Held by `test_the_best_of_several_runs_costs_the_budget`,
        `test_every_run_costs_what_the_choice_was_paid_for` and `test_other_runs_leave_nothing`.

    Raises:
        ConfigurationError: no candidates, or a job without a target ε.
        PrivacyError: a candidate changes what a step costs.
    """
    if not candidates or job.target_epsilon is None:
        raise ConfigurationError("tuning needs settings to choose from and a target_epsilon.")
    planned = prepare(replace(job, **candidates[0])).engine.plan
    noise, epsilon = noise_for(planned, job.target_epsilon, law)
    # What was found for the budget, and would be another without it.
    bands = str(planned.bands) if planned.mechanism == "banded" else job.bands
    selection = Selection(law, epsilon, tuple(candidates))
    drawn = np.random.default_rng(job.seed)  # from the system's entropy, unless a test gives a seed
    best: tuple[float, Outcome, Candidate] | None = None
    trials = folder.parent / f".{folder.name}-trials"
    trials.mkdir(parents=True)
    try:
        for number in range(law.draw(drawn)):
            candidate = candidates[int(drawn.integers(len(candidates)))]
            one = replace(
                job, **candidate, bands=bands, target_epsilon=None, noise_multiplier=noise
            )
            setup = replace(prepare(one), selection=selection)
            _refuse_other_cost(setup.engine.plan, replace(planned, noise_multiplier=noise))
            # Its report has the folder's name, which must not say that it was the second of all.
            trial = RunFolder(trials / str(number) / folder.name)
            trial.path.mkdir(parents=True)
            outcome = run(setup, trial)
            if outcome.interrupted:
                return None, candidate
            score = _score(outcome.last)
            if best is None or score > best[0]:
                best = score, outcome, candidate
        if best is None:  # of a Poisson law
            raise ConfigurationError(
                "the number of runs that was drawn is 0: nothing is published."
            )
        shutil.move(best[1].folder.path, folder)
        return replace(best[1], folder=RunFolder(folder)), best[2]
    finally:
        shutil.rmtree(trials)


def _refuse_other_cost(plan: PrivacyPlan, planned: PrivacyPlan) -> None:
    """Raise unless the steps of a run cost what the choice was paid for."""
    costs = [(p.history(p.steps), p.target_delta, p.adjacency) for p in (plan, planned)]
    if costs[0] != costs[1]:
        raise PrivacyError(
            f"a run would release {costs[0][0]} and the choice was paid for {costs[1][0]}. Choose "
            "among settings that do not change what a step costs."
        )


def _score(row: Mapping[str, float]) -> float:
    """A test result of which more is better."""
    column = next(c for c in TESTED if c in row)
    return row[column] if column == "test_accuracy" else -row[column]
