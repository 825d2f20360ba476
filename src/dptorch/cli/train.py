"""`dptorch train`: train a model privately, and write its ε and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer
from rich.console import Console

from dptorch.cli.options import Group, flag_of, grouped
from dptorch.cli.processes import joined, launch, place
from dptorch.cli.release import conclude as conclude_release
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
    from dptorch.distributed import Ranks
    from dptorch.training.job import Job, Setup
    from dptorch.training.loop import Outcome
    from dptorch.training.run_folder import RunFolder

__all__ = ["Computing", "job_of", "run_task", "train", "train_group", "watched"]

# What --resume may be combined with. Everything else is settled by the record of the run.
WITH_RESUME = frozenset(
    {"name", "runs", "resume", "device", "num_workers", "clipping_mode", "release", "ledger"}
    | {"no_ledger", "nproc"}
)


class Computing(Protocol):
    """Options that change speed and memory only, which a resumed run may have of its own."""

    @property
    def device(self) -> str:
        """Where it runs."""

    @property
    def num_workers(self) -> int:
        """Processes that read data."""

    @property
    def clipping_mode(self) -> str | None:
        """How norms are computed; None for what the run was begun with."""


@grouped
def train(
    ctx: typer.Context,
    source: DataOptions,
    reading: ReadingOptions,
    model: ModelOptions,
    privacy: PrivacyOptions,
    training: TrainingOptions,
    output: OutputOptions,
    ledger: LedgerOptions,
) -> None:
    """Train a model with differential privacy and write a report.

    Without options: a convolutional network on real handwritten digits, ε at most 3, no download.

    Writes [bold]runs/NAME/[/]: model.safetensors, plan.json, statement.txt, metrics.csv and
    report.html. Ctrl-C stops after the current batch and leaves all of these, and a checkpoint.

    [bold]Examples[/]

    [cyan]dptorch train[/]

    [cyan]dptorch train --recipe mnist-features --epsilon 1[/]

    [cyan]dptorch train --data patients.csv --schema patients.schema.json[/]

    [cyan]dptorch train --data numbers.csv --label kind --bounds ranges.json[/]

    [cyan]dptorch train --data photos/ --image-size 64 --model mypackage.nets:resnet[/]

    [cyan]dptorch train --canaries 1000 --name audited[/], then [cyan]dptorch audit runs/audited[/]

    [cyan]dptorch train --resume --name mnist-1[/]

    Texts and pictures have commands of their own, below.
    """
    if ctx.invoked_subcommand is not None:
        if given := _given(ctx):
            raise ConfigurationError(
                f"{given[0][1]} stands before {ctx.invoked_subcommand}. Write what belongs to a task "
                f"after it: dptorch train {ctx.invoked_subcommand} {given[0][1]} ..."
            )
        return

    if source.shards is not None and not output.resume:
        if output.nproc is not None or place()[1] > 1:
            raise ConfigurationError(
                "--shards trains one small model after the other, on one process. Leave --nproc out."
            )
        job = job_of(ctx, source, reading, model, privacy, training, output)
        console = Console(highlight=False, soft_wrap=True)
        return _shards(ctx, job, source, source.shards, output, ledger, console)

    def prepared() -> Setup:
        from dptorch.training.job import prepare

        return prepare(job_of(ctx, source, reading, model, privacy, training, output))

    stem = (source.data.name.split(".")[0] if source.data else source.recipe) or "mnist"
    run_task(ctx, prepared, stem, training, output, ledger)


def run_task(
    ctx: typer.Context,
    prepared: Callable[[], Setup],
    stem: str,
    computing: Computing,
    output: OutputOptions,
    ledger: LedgerOptions,
) -> None:
    """Begin or resume a run, train it, and say what came of it.

    Args:
        ctx: of the command.
        prepared: builds what a new run needs.
        stem: what a new run's name begins with.
        computing, output, ledger: options.
    """
    from dptorch.training.release import check_destination, release

    if output.release is not None:
        check_destination(output.release)
    if launch(ctx, output.nproc, computing.device):
        return
    with joined(computing.device) as ranks:
        console = Console(highlight=False, soft_wrap=True, quiet=not ranks.is_first)
        if output.resume:
            outcome = _resume(ctx, computing, output, ledger, ranks, console)
        else:
            outcome = _begin(prepared, stem, output, ledger, ranks, console)
    if not ranks.is_first:
        return
    _conclude(outcome, console)
    if outcome.interrupted:
        raise typer.Exit(130)
    if output.release is not None:
        conclude_release(release(outcome.folder, output.release), with_test_results=False)


def job_of(
    ctx: typer.Context,
    source: DataOptions,
    reading: ReadingOptions,
    model: ModelOptions,
    privacy: PrivacyOptions,
    training: TrainingOptions,
    output: OutputOptions,
) -> Job:
    """Return the job that the options describe."""
    from dptorch.training.data import ReadOptions, parse_bounds
    from dptorch.training.job import Job

    if source.data is None:
        for name, flag in _given(ctx):
            if name in {f.name for f in fields(ReadingOptions)}:
                raise ConfigurationError(
                    f"{flag} says how --data is read, but a recipe brings its own data and "
                    "preprocessing. Leave it out, or give --data."
                )
    if reading.schema is not None:
        for name, flag in _given(ctx):
            if name in ("label", "bounds"):
                raise ConfigurationError(
                    f"{flag} and --schema exclude each other: the schema says it. Leave one out."
                )
    read = vars(reading) | {"bounds": None}
    read["schema"] = None if reading.schema is None else str(reading.schema)
    read["bounds"], read["column_bounds"] = parse_bounds(reading.bounds)
    settings = {**vars(model), **vars(privacy), **vars(training)}
    return Job(
        recipe=source.recipe,
        data=None if source.data is None else str(source.data),
        reading=ReadOptions(**read),
        diagnostics=output.diagnostics,
        **settings | {"clipping_mode": training.clipping_mode or "auto"},
    )


def _begin(
    prepared: Callable[[], Setup],
    stem: str,
    output: OutputOptions,
    ledger: LedgerOptions,
    ranks: Ranks,
    console: Console,
) -> Outcome:
    """Begin a run and train it. The first rank names it, and keeps folder and ledger."""
    from dptorch.cli.ledger import for_new_run
    from dptorch.training import run_folder

    name = output.name or ranks.from_first(run_folder.next_name(output.runs, stem))
    folder, account = run_folder.RunFolder(output.runs / name), None
    with ranks.together():
        if ranks.is_first:
            run_folder.check_free(output.runs, name, overwrite=output.overwrite)
    setup = _introduced(prepared, console)
    if output.release is not None and not setup.private:
        raise ConfigurationError(
            "--release publishes what noise protects, and this run has none. Leave it out, or train "
            "with a --clipping-mode that is private."
        )
    if not ledger.no_ledger and setup.private:
        with ranks.together():
            if ranks.is_first:
                account = for_new_run(
                    ledger.ledger,
                    output.runs,
                    ledger.dataset,
                    data=setup.job.data,
                    recipe=setup.job.recipe,
                )
        setup.engine.use_ledger(account)
        setup.engine.reserve_budget()
    with ranks.together():
        if ranks.is_first:
            folder = run_folder.create(output.runs, name, overwrite=output.overwrite)
    return watched(setup, folder, console, resume=False)


def _shards(
    ctx: typer.Context,
    job: Job,
    source: DataOptions,
    shards: int,
    output: OutputOptions,
    ledger: LedgerOptions,
    console: Console,
) -> None:
    """Train a model on each shard, without privacy."""
    from dptorch.ledger import beside
    from dptorch.prediction.ensemble import train_ensemble
    from dptorch.training import run_folder

    for name, flag in _given(ctx):
        if name in {f.name for f in fields(PrivacyOptions)} | {
            "release",
            "no_ledger",
            "sample_rate",
        }:
            raise ConfigurationError(
                f"{flag} does not go with --shards: the shards are trained without privacy, and noise "
                "comes with their answers (`dptorch serve`). Leave it out."
            )
    stem = (source.data.name.split(".")[0] if source.data else source.recipe) or "mnist-features"
    name = output.name or run_folder.next_name(output.runs, stem)
    dataset = ledger.dataset
    if dataset is None:
        dataset = f"recipe:{job.recipe or stem}" if job.data is None else beside(job.data)
    run_folder.check_free(output.runs, name, overwrite=output.overwrite)
    folder = run_folder.create(output.runs, name, overwrite=output.overwrite)
    console.print(f"Training {shards} models on disjoint shards, without privacy")
    about = train_ensemble(job, folder, shards, dataset=dataset)
    result = about["result"]
    console.print(
        f"[bold green]Done:[/] test accuracy of one shard {result['test_accuracy_of_one']:.3f}, of all "
        f"their votes {result['test_accuracy_of_votes_without_noise']:.3f} without noise. "
        "[bold]These models are not private: publish none.[/]"
    )
    console.print(f"Answer queries under a budget: dptorch serve {folder.path} --budget 8,1e-5")


def _resume(
    ctx: typer.Context,
    computing: Computing,
    output: OutputOptions,
    ledger: LedgerOptions,
    ranks: Ranks,
    console: Console,
) -> Outcome:
    """Continue a run, on however many ranks it was begun."""
    from dptorch.cli.ledger import for_resumed_run
    from dptorch.training import run_folder

    folder = run_folder.reopen(output.runs, name_to_resume(ctx, output))
    folder.require_checkpoint()
    setup = _introduced(partial(prepared_again, folder, changed_by(computing)), console)
    if not ledger.no_ledger:
        account = None
        with ranks.together():
            if ranks.is_first:
                kept = folder.read_json("run.json").get("ledger")
                account = for_resumed_run(ctx, ledger.ledger, kept)
        if ranks.from_first(account is not None):
            setup.engine.use_ledger(account)
    return watched(setup, folder, console, resume=True)


def name_to_resume(ctx: typer.Context, output: OutputOptions) -> str:
    """The name of the run to go on with.

    Raises:
        ConfigurationError: there is none, or another option was given that a run begins with.
    """
    if output.overwrite:
        raise ConfigurationError("--resume and --overwrite exclude each other.")
    for name, flag in _given(ctx):
        if name not in WITH_RESUME:
            raise ConfigurationError(
                f"{flag} cannot be changed by --resume: the run continues with the settings that it "
                "was begun with. Leave it out, or begin a new run."
            )
    if output.name is None:
        raise ConfigurationError("--resume needs the --name of the run to continue.")
    return output.name


def changed_by(computing: Computing) -> dict[str, Any]:
    """What a resumed run has of its own."""
    changed = {"device": computing.device, "num_workers": computing.num_workers}
    return changed | ({"clipping_mode": computing.clipping_mode} if computing.clipping_mode else {})


def prepared_again(folder: RunFolder, changed: Mapping[str, Any]) -> Setup:
    """What a run is resumed with, by the record of it."""
    record = folder.read_json("run.json")["job"]
    if record.get("task") == "vision":
        from dptorch.vision.job import VisionJob
        from dptorch.vision.job import prepare as prepare_vision

        return prepare_vision(
            replace(VisionJob.from_dict(record), **{**changed, "download": False})
        )
    if "task" in record:
        from dptorch.text.job import TextJob
        from dptorch.text.job import prepare as prepare_text

        return prepare_text(replace(TextJob.from_dict(record), **changed))
    from dptorch.training.canaries import CANARY_FILE, Canaries
    from dptorch.training.job import Job, prepare
    from dptorch.training.run_folder import SCHEMA_FILE

    job = replace(Job.from_dict(record), **changed)
    kept = folder.path / SCHEMA_FILE
    if kept.exists():  # what the run was begun with, wherever the file that it came from is now
        job = replace(job, reading=replace(job.reading, schema=str(kept)))
    planted = Canaries.read(folder.path / CANARY_FILE) if job.canaries else None
    return prepare(job, canaries=planted)


def _given(ctx: typer.Context) -> list[tuple[str, str]]:
    """Return (name, flag) of every option that was given on the command line."""
    sources = ((p, ctx.get_parameter_source(p.name or "")) for p in ctx.command.params)
    return [
        (parameter.name or "", flag_of(parameter))
        for parameter, source in sources
        if source is not None and source.name == "COMMANDLINE"
    ]


def _introduced(prepared: Callable[[], Setup], console: Console) -> Setup:
    from dptorch.cli.progress import introduce

    if not console.is_terminal:
        console.print("Reading data, calibrating noise")
    with console.status("Reading data, calibrating noise"):
        setup = prepared()
    introduce(setup, console)
    return setup


def watched(setup: Setup, folder: Any, console: Console, *, resume: bool) -> Outcome:
    """Run the loop and show on the console how far it is.

    Budget that the run has set aside in a ledger is given back, however it ends.

    Args:
        setup: what `prepare` of a task made of the options.
        folder: the run's.
        resume: whether to go on from the checkpoint in `folder`.
    """
    from dptorch.cli.progress import observer_for
    from dptorch.training.loop import train as run_job

    try:
        with observer_for(console) as observer:
            return run_job(setup, folder, observer=observer, resume=resume)
    finally:
        setup.engine.release_budget()


def _conclude(outcome: Outcome, console: Console) -> None:
    from dptorch.training.loop import spent_and_tested
    from dptorch.training.run_page import missing_packages, time_in_words

    path = outcome.folder.path
    task = outcome.folder.read_json("run.json")["job"].get("task")
    console.print()
    if missing_packages():
        console.print("No report.html: pip install 'dptorch[report]' to have one.")
        console.print(f"Statement: {path / 'statement.txt'}")
    else:
        console.print(f"Report: {path / 'report.html'}")
    if outcome.interrupted:
        console.print(
            f"[bold yellow]Interrupted[/] after step {outcome.last['step']}: "
            f"{spent_and_tested(outcome)}. What was trained is usable and its ε is true."
        )
        where = "" if path.parent == Path("runs") else f" --runs {path.parent}"
        console.print(f"Go on with: dptorch train --resume --name {path.name}{where}")
    else:
        largest = outcome.folder.read_json("run.json").get("majority", 0.0)
        if outcome.last.get("test_accuracy", 1.0) <= largest:
            console.print(
                f"[bold yellow]Nothing was learned[/]: always saying the largest class is right as "
                f"often ({largest:.3f}). The noise hides what there is. Give more data or a larger "
                "--epsilon."
            )
        if task in ("table-to-text", "language-model"):
            console.print(f"Generate: dptorch generate {path}")
        else:
            console.print(f"Predict: dptorch predict {path} NEW_ROWS --out predictions.csv")
        console.print(
            f"[bold green]Done:[/] {spent_and_tested(outcome)}, in {time_in_words(outcome.last)}"
        )


#: `dptorch train` itself, and a command for each task of `dptorch.text`.
train_group = typer.Typer(
    cls=Group,
    name="train",
    callback=train,
    invoke_without_command=True,
    rich_markup_mode="rich",
)
