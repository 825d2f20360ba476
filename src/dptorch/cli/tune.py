"""`dptorch tune`: choose settings by private runs, and pay for the choice."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dptorch.cli.options import grouped, panel_option
from dptorch.cli.train import changed_by, job_of, name_to_resume, prepared_again, watched
from dptorch.cli.train_options import (
    DataOptions,
    LedgerOptions,
    ModelOptions,
    OutputOptions,
    PrivacyOptions,
    ReadingOptions,
    TrainingOptions,
)
from dptorch.errors import ConfigurationError

if TYPE_CHECKING:
    from dptorch.training.job import Job, Setup
    from dptorch.training.loop import Outcome
    from dptorch.training.run_folder import RunFolder

__all__ = ["tune"]

_PANEL = "Choice"


@dataclass(frozen=True)
class ChoiceOptions:
    """What is chosen from, and by how many runs."""

    grid: Annotated[
        str,
        panel_option(_PANEL, metavar="C,C,...", help="Clipping norms that a run draws from."),
    ] = "0.1,0.3,1,3,10"
    learning_rates: Annotated[
        str | None,
        panel_option(
            _PANEL,
            metavar="RATE,RATE,...",
            help="Learning rates that it draws from, too.",
            default="--learning-rate alone",
        ),
    ] = None
    mean_runs: Annotated[float, panel_option(_PANEL, help="Mean number of runs.")] = 5.0
    run_law: Annotated[
        str,
        panel_option(
            _PANEL,
            help="Law of their number: [bold]geometric[/], [bold]logarithmic[/], [bold]poisson[/]; or "
            "[bold]fixed[/], which costs most.",
        ),
    ] = "geometric"


@grouped
def tune(
    ctx: typer.Context,
    choice: ChoiceOptions,
    source: DataOptions,
    reading: ReadingOptions,
    model: ModelOptions,
    privacy: PrivacyOptions,
    training: TrainingOptions,
    output: OutputOptions,
    ledger: LedgerOptions,
) -> None:
    """Choose the clipping norm (and learning rate) by private runs, and pay for the choice.

    Trains a random number of runs, each with a clipping norm drawn from the grid, keeps the one with
    the best test result, and deletes the others. [bold]--epsilon[/] is what publishing that run costs,
    the choice included, so that each run has more noise than one by itself would. All other options are
    those of [bold]dptorch train[/].

    Finding the norm by a run with little noise is not private: what was chosen by it tells of the data,
    and no ε covers that. [bold]dptorch train --clipping-fn automatic[/] needs no choice: every
    gradient is then scaled to the norm, which only scales the learning rate.

    [bold]Example[/]

    [cyan]dptorch tune --recipe mnist-features --epsilon 3 --grid 0.3,1,3 --mean-runs 4[/]

    What was interrupted or killed goes on, with the number of runs and the settings that were drawn at
    first: [cyan]dptorch tune --resume --name mnist-features-tuned-1[/]
    """
    from dptorch.accounting import RunLaw
    from dptorch.cli.ledger import for_new_run, for_resumed_run
    from dptorch.training import selection
    from dptorch.training.loop import spent_and_tested

    console = Console(highlight=False, soft_wrap=True)
    recorded: dict[str, str] | None = None

    def run(setup: Setup, folder: RunFolder, begun: bool) -> Outcome:
        account = None
        if output.resume and not ledger.no_ledger:
            account = for_resumed_run(ctx, ledger.ledger, recorded)
        elif not ledger.no_ledger:
            account = for_new_run(
                ledger.ledger,
                output.runs,
                ledger.dataset,
                data=setup.job.data,
                recipe=setup.job.recipe,
            )
        if account is not None and setup.selection is not None:
            account.number_is_secret = setup.selection.number_is_secret
            setup.engine.use_ledger(account)
        return watched(setup, folder, console, resume=begun)

    if output.resume:
        folder = output.runs / name_to_resume(ctx, output)
        recorded = selection.begun(folder).read_json("run.json")["ledger"]
        changed = changed_by(training)
        outcome, chosen = selection.resume(
            folder, run, changed, lambda trial: prepared_again(trial, changed)
        )
    else:
        _refuse_options(source, privacy, output)
        job = _with_budget(job_of(ctx, source, reading, model, privacy, training, output))
        folder = _free_folder(source, output)
        candidates = _candidates(choice)
        law = RunLaw(choice.run_law, choice.mean_runs)
        console.print(
            f"[bold]Choice[/]   of {len(candidates)} settings, by a {law.name} number of runs, on "
            f"average {law.mean_runs:g}; publishing the best costs ε = {job.target_epsilon:g}"
        )
        outcome, chosen = selection.tune(job, candidates, law, folder, run)
    if outcome is None:
        where = "" if output.runs == Path("runs") else f" --runs {output.runs}"
        console.print(
            "[bold yellow]Interrupted[/]: nothing is published, and the ledger has what was spent.\n"
            f"Go on with: dptorch tune --resume --name {folder.name}{where}"
        )
        raise typer.Exit(130)
    words = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in chosen.items())
    console.print(f"Statement: {outcome.folder.path / 'statement.txt'}")
    cost = outcome.folder.read_json("run.json")["result"]["epsilon"]
    last = {**outcome.last, "epsilon": cost}
    console.print(f"[bold green]Done:[/] {words}: {spent_and_tested(replace(outcome, last=last))}")


def _refuse_options(source: DataOptions, privacy: PrivacyOptions, output: OutputOptions) -> None:
    if privacy.noise_multiplier is not None:
        raise ConfigurationError(
            f"noise_multiplier={privacy.noise_multiplier:g} does not go with tuning: the noise follows "
            "from --epsilon and the number of runs. A run with little noise that shows which norm is "
            "good is not private, and no ε covers what was chosen by it."
        )
    if source.shards is not None or output.release is not None or output.nproc:
        raise ConfigurationError(
            "--shards, --release and --nproc do not go with dptorch tune. Release what it leaves with: "
            "dptorch release"
        )


def _with_budget(job: Job) -> Job:
    """The job with the ε that publishing the best run costs, if its recipe decides that."""
    from dptorch.training.job import prepare

    decided: float | None = job.target_epsilon or prepare(job).job.to_dict()["target_epsilon"]
    return replace(job, target_epsilon=decided)


def _free_folder(source: DataOptions, output: OutputOptions) -> Path:
    """Where the best run is left: a folder whose name no run and no unfinished choice has."""
    from dptorch.training import run_folder
    from dptorch.training.selection import trials_of

    stem = (source.data.name.split(".")[0] if source.data else source.recipe) or "mnist"
    name = output.name or run_folder.next_name(output.runs, f"{stem}-tuned")
    run_folder.check_free(output.runs, name, overwrite=output.overwrite)
    folder = output.runs / name
    if output.overwrite and trials_of(folder).exists():
        shutil.rmtree(trials_of(folder))
    return folder


def _candidates(choice: ChoiceOptions) -> list[dict[str, float]]:
    norms = _numbers("grid", choice.grid)
    rates = _numbers("learning_rates", choice.learning_rates or "")
    grids = {"max_grad_norm": norms, **({"learning_rate": rates} if rates else {})}
    return [dict(zip(grids, values, strict=True)) for values in product(*grids.values())]


def _numbers(name: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0.0]
    if any(not value > 0 for value in found) or (name == "grid" and not found):
        raise ConfigurationError(
            f"{name}={text!r}: expected positive numbers with commas: 0.1,1,10."
        )
    return found
