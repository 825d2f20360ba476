"""Choose settings by private runs, and pay for the choice: the best of a random number of runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
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

__all__ = ["Selection", "begun", "noise_for", "resume", "trials_of", "tune"]

_CHOICE_FILE = "choice.json"

Candidate = Mapping[str, Any]
# Trains a run in a folder, from its checkpoint or anew.
Run = Callable[["Setup", RunFolder, bool], "Outcome"]
Chosen = tuple["Outcome | None", Candidate]


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
    def number_is_secret(self) -> bool:
        """Whether nobody may learn how many runs there were."""
        return self.law.is_secret

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


def trials_of(folder: Path) -> Path:
    """Return the folder of the runs among which a run is chosen: hidden, and gone when it is done."""
    return folder.parent / f".{folder.name}-trials"


def tune(job: Job, candidates: Sequence[Candidate], law: RunLaw, folder: Path, run: Run) -> Chosen:
    """Train a random number of runs, each with settings drawn at random, and keep the best.

    Args:
        job: with a target ε, which is that of publishing the best.
        candidates: values of fields of `job` that do not change what a step costs.
        law: of the number of runs.
        folder: where the best run is left, in place of what is there.
        run: trains a run in a folder, and writes its steps to the ledger.

    Returns:
        its outcome and settings; None, if a run was interrupted: `resume` goes on.

    Guarantees:
        Every run has the same cost, so that `tuned_epsilon` bounds that of publishing the best: scores
        are of test examples, which ε does not cover. The folders of the others are deleted.
        Held by `test_the_best_of_several_runs_costs_the_budget`,
        `test_every_run_costs_what_the_choice_was_paid_for` and `test_other_runs_leave_nothing`.

    Raises:
        ConfigurationError: no candidates, a job without a target ε, or a choice that was not finished.
        PrivacyError: a candidate changes what a step costs.
    """
    if not candidates or job.target_epsilon is None:
        raise ConfigurationError("tuning needs settings to choose from and a target_epsilon.")
    planned = prepare(replace(job, **candidates[0])).engine.plan
    noise, epsilon = noise_for(planned, job.target_epsilon, law)
    # What was found for the budget, and would be another without it.
    bands = str(planned.bands) if planned.mechanism == "banded" else job.bands
    each = replace(job, bands=bands, target_epsilon=None, noise_multiplier=noise)
    rng = np.random.default_rng(job.seed)  # from the system's entropy, unless a test gives a seed
    number = law.draw(rng)
    drawn = [int(rng.integers(len(candidates))) for _ in range(number)]
    trials = trials_of(folder)
    try:
        trials.mkdir(parents=True, mode=0o700)
    except FileExistsError:
        raise ConfigurationError(
            f"{trials} has the runs of a choice that was not finished. Go on with it by --resume "
            f"--name {folder.name}, delete it by --overwrite, or take another --name."
        ) from None
    RunFolder(trials).write_json(
        _CHOICE_FILE,
        {
            "job": each.to_dict(),
            "plan": replace(planned, noise_multiplier=noise).to_json(),
            "candidates": [dict(candidate) for candidate in candidates],
            "law": {"name": law.name, "mean_runs": law.mean_runs},
            "epsilon": epsilon,
            "drawn": drawn,
        },
    )
    return _finish(folder, run)


def resume(
    folder: Path, run: Run, changed: Mapping[str, Any], again: Callable[[RunFolder], Setup]
) -> Chosen:
    """Go on with `tune` where it was interrupted or killed.

    Args:
        folder: as it was given to `tune`.
        run: as there.
        changed: fields of the job that say how to compute, not what.
        again: prepares a run that has a checkpoint.

    Guarantees:
        The number of runs and their settings are those that were drawn at first, and runs that ended
        are not trained again. Held by `test_a_choice_that_was_killed_goes_on_to_the_same_end`.

    Raises:
        ConfigurationError: there is nothing to go on with.
    """
    begun(folder)
    return _finish(folder, run, changed, again)


def begun(folder: Path) -> RunFolder:
    """A run of a choice that was interrupted.

    Raises:
        ConfigurationError: there is none.
    """
    found = sorted(trials_of(folder).glob("*/*/run.json"))
    if not found:
        raise ConfigurationError(
            f"name={folder.name!r} is no choice that can go on: {trials_of(folder)} has no run that "
            "was begun. Leave --resume out."
        )
    return RunFolder(found[0].parent)


def _finish(
    folder: Path,
    run: Run,
    changed: Mapping[str, Any] = MappingProxyType({}),
    again: Callable[[RunFolder], Setup] | None = None,
) -> Chosen:
    """Train the runs that are left, and keep the best."""
    trials = trials_of(folder)
    choice = RunFolder(trials).read_json(_CHOICE_FILE)
    law, candidates = RunLaw(**choice["law"]), tuple(choice["candidates"])
    selection = Selection(law, choice["epsilon"], candidates)
    job = replace(Job.from_dict(choice["job"]), **changed)
    paid = PrivacyPlan.from_json(choice["plan"])
    ended: list[tuple[Outcome, Candidate]] = []
    try:
        for number, index in enumerate(choice["drawn"]):
            # Its report has the folder's name, which must not say that it was the second of all.
            trial, candidate = RunFolder(trials / str(number) / folder.name), candidates[index]
            outcome = _ended(trial)
            if outcome is None:
                kept = trial.checkpoint.exists()
                setup = again(trial) if again and kept else prepare(replace(job, **candidate))
                _refuse_other_cost(setup.engine.plan, paid)
                trial.path.mkdir(parents=True, exist_ok=True)
                outcome = run(replace(setup, selection=selection), trial, kept)
                if outcome.interrupted:
                    return None, candidate
            ended.append((outcome, candidate))
        if not ended:  # of a Poisson law
            raise ConfigurationError(
                "the number of runs that was drawn is 0: nothing is published."
            )
        best, candidate = max(ended, key=lambda each: _score(each[0].last))
        if folder.exists():
            shutil.rmtree(folder)
        shutil.move(best.folder.path, folder)
        shutil.rmtree(trials)
        return replace(best, folder=RunFolder(folder)), candidate
    except BaseException:
        if not any(trials.glob("*/*/run.json")):  # nothing that a resumption could use
            shutil.rmtree(trials)
        raise


def _refuse_other_cost(plan: PrivacyPlan, planned: PrivacyPlan) -> None:
    """Raise unless the steps of a run cost what the choice was paid for."""
    costs = [(p.history(p.steps), p.target_delta, p.adjacency) for p in (plan, planned)]
    if costs[0] != costs[1]:
        raise PrivacyError(
            f"a run would release {costs[0][0]} and the choice was paid for {costs[1][0]}. Choose "
            "among settings that do not change what a step costs."
        )


def _ended(trial: RunFolder) -> Outcome | None:
    """How a run ended that was trained before; None if it was not, or not to its end."""
    from dptorch.training.loop import Outcome

    if (
        not (trial.path / "run.json").exists()
        or trial.read_json("run.json")["status"] != "complete"
    ):
        return None
    return Outcome(trial, trial.read_metrics()[-1], interrupted=False)


def _score(row: Mapping[str, float]) -> float:
    """A test result of which more is better."""
    column = next(c for c in TESTED if c in row)
    return row[column] if column == "test_accuracy" else -row[column]
