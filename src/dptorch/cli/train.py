"""`dptorch train`: a privately trained model, its true ε and a report, from one command."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dptorch.cli.release import conclude as conclude_release
from dptorch.errors import ConfigurationError
from dptorch.training.recipes import RECIPES

if TYPE_CHECKING:
    from dptorch.training.job import Job, Setup
    from dptorch.training.loop import Outcome

__all__ = ["train"]


def _suggested(name: str) -> str:
    """What the recipes set a hyperparameter to, for `--help`."""
    values = {r.name: f"{getattr(r.hyperparameters, name)}" for r in RECIPES.values()}
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{recipe}: {value}" for recipe, value in values.items())


DATA, MODEL, PRIVACY, TRAINING, OUTPUT = "Data", "Model", "Privacy", "Training", "Run and output"
LEDGER = "Ledger"
# What --resume may be combined with: everything else is settled by the run's own record.
WITH_RESUME = frozenset(
    {"name", "runs", "resume", "device", "num_workers", "clipping_mode", "release", "ledger"}
    | {"no_ledger", "ctx"}
)


def train(
    ctx: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Data, preprocessing, model and settings that fit together: [bold]mnist[/] "
            "(a convolutional network) or [bold]mnist-features[/] (a linear model on fixed "
            "features, seconds).",
            show_default="mnist",
            rich_help_panel=DATA,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Your own data instead: a folder of images (one subfolder a class), [bold].npz[/] "
            "(arrays x, y), [bold].csv[/] or [bold].parquet[/].",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    label: Annotated[
        str, typer.Option(help="CSV, Parquet: the column to predict.", rich_help_panel=DATA)
    ] = "label",
    bounds: Annotated[
        str | None,
        typer.Option(
            metavar="LOW,HIGH",
            help="Tabular: clip values to this range and scale it to [-1, 1]. Take it from what "
            "the columns mean, not from the data. Or a JSON file: "
            '{"age": [0, 120], ...}, one range a column.',
            show_default="values as they are",
            rich_help_panel=DATA,
        ),
    ] = None,
    image_size: Annotated[
        int, typer.Option(help="Image folder: side in pixels.", rich_help_panel=DATA)
    ] = 28,
    channels: Annotated[
        int, typer.Option(help="Image folder: 1 for grey, 3 for RGB.", rich_help_panel=DATA)
    ] = 3,
    test_fraction: Annotated[
        float,
        typer.Option(
            help="Share held out for testing, if the data has no test set of its own. ε does not "
            "cover the test examples.",
            rich_help_panel=DATA,
        ),
    ] = 0.2,
    model: Annotated[
        str | None,
        typer.Option(
            help="[bold]cnn[/], [bold]mlp[/], [bold]linear[/], a recipe's name, "
            "[bold]torchvision:NAME[/], [bold]timm:NAME[/], or your own "
            "[bold]package.module:factory[/].",
            show_default="the recipe's; for own data cnn or mlp",
            rich_help_panel=MODEL,
        ),
    ] = None,
    pretrained: Annotated[
        bool,
        typer.Option(
            "--pretrained",
            help="torchvision, timm: start from their published weights (a download).",
            rich_help_panel=MODEL,
        ),
    ] = False,
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="Budget: noise is calibrated so that the whole run spends at most this.",
            show_default=_suggested("target_epsilon"),
            rich_help_panel=PRIVACY,
        ),
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(
            help="Or state the noise, in units of the clipping norm; ε follows.",
            show_default=False,
            rich_help_panel=PRIVACY,
        ),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(
            help="Probability that the guarantee fails; well below 1 / number of examples.",
            show_default="1 / (10 N), at most 1e-5, as a power of ten",
            rich_help_panel=PRIVACY,
        ),
    ] = None,
    max_grad_norm: Annotated[
        float | None,
        typer.Option(
            help="Clipping norm C of one example's gradient.",
            show_default=_suggested("max_grad_norm"),
            rich_help_panel=PRIVACY,
        ),
    ] = None,
    clipping_fn: Annotated[
        str | None,
        typer.Option(
            help="How gradients are clipped: abadi, automatic, ...",
            show_default=_suggested("clipping_fn"),
            rich_help_panel=PRIVACY,
        ),
    ] = None,
    clipping_style: Annotated[
        str,
        typer.Option(
            metavar="STYLE",
            help="What is clipped together: [bold]all-layer[/], or for less memory "
            "[bold]layer-wise[/], [bold]param-wise[/], [bold]block-wise[/], or modules of your "
            "model, comma separated, each its own block: [bold]encoder.*,head[/].",
            rich_help_panel=PRIVACY,
        ),
    ] = "all-layer",
    mechanism: Annotated[
        str,
        typer.Option(
            help="The noise: [bold]gaussian[/], or [bold]discrete_gaussian[/]: whole numbers on "
            "gradients rounded to such; slower, with --accountant rdp.",
            rich_help_panel=PRIVACY,
        ),
    ] = "gaussian",
    accountant: Annotated[
        str, typer.Option(help="Who computes ε: pld, rdp, ...", rich_help_panel=PRIVACY)
    ] = "pld",
    sampling: Annotated[
        str,
        typer.Option(
            help="How batches are drawn: poisson, truncated-poisson (constant shapes), "
            "random-allocation, fixed-size, shuffled, ... ε is each one's own.",
            rich_help_panel=PRIVACY,
        ),
    ] = "poisson",
    epochs: Annotated[
        float | None,
        typer.Option(
            help="Passes over the data. Every step costs privacy: few are better.",
            show_default=_suggested("epochs"),
            rich_help_panel=TRAINING,
        ),
    ] = None,
    sample_rate: Annotated[
        float | None,
        typer.Option(
            help="Probability with which each example enters a batch. Large is good.",
            show_default=_suggested("sample_rate"),
            rich_help_panel=TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        float | None,
        typer.Option(
            help="Or the expected batch size.", show_default=False, rich_help_panel=TRAINING
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            "--lr",
            help="Of SGD. Far above the ordinary: gradients are clipped small.",
            show_default=_suggested("learning_rate"),
            rich_help_panel=TRAINING,
        ),
    ] = None,
    momentum: Annotated[
        float | None,
        typer.Option(help="Of SGD.", show_default=_suggested("momentum"), rich_help_panel=TRAINING),
    ] = None,
    max_physical_batch_size: Annotated[
        int,
        typer.Option(
            help="Most examples in memory at once; changes speed and memory only.",
            rich_help_panel=TRAINING,
        ),
    ] = 512,
    clipping_mode: Annotated[
        str | None,
        typer.Option(
            help="How gradients' norms are computed: [bold]auto[/], [bold]non-ghost[/], "
            "[bold]ghost[/] (two passes, little memory), [bold]BK-MixOpt[/], ... Changes speed "
            "and memory only.",
            show_default="auto",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    num_workers: Annotated[
        int, typer.Option(help="Processes that load data.", rich_help_panel=TRAINING)
    ] = 0,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=TRAINING)
    ] = "auto",
    seed: Annotated[
        int | None,
        typer.Option(
            help="Make the run repeatable, for tests. [bold]Such a run is not private[/]: whoever "
            "knows the seed can remove the noise.",
            show_default="secret randomness",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    canaries: Annotated[
        int,
        typer.Option(
            help="Plant this many made-up examples, each in by a coin, so that [bold]dptorch "
            "audit[/] can measure what the run leaks. 1000 is usual; they cost some accuracy.",
            show_default="none",
            rich_help_panel=TRAINING,
        ),
    ] = 0,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the run.", show_default="recipe and a number", rich_help_panel=OUTPUT
        ),
    ] = None,
    runs: Annotated[
        Path, typer.Option(help="Folder that holds the runs.", rich_help_panel=OUTPUT)
    ] = Path("runs"),
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an earlier run of that name.", rich_help_panel=OUTPUT
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue an interrupted run: give its --name and nothing else.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    release: Annotated[
        Path | None,
        typer.Option(
            help="When the run is done, write what may be published of it to this new folder: see "
            "[bold]dptorch release[/].",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    ledger: Annotated[
        str | None,
        typer.Option(
            envvar="DPTORCH_LEDGER",
            help="Where every step is written down before it is released, so that runs on one data "
            "set add up: a file, or [bold]postgresql://user@host/database[/]. See "
            "[bold]dptorch ledger[/].",
            show_default="ledger.db beside the runs",
            rich_help_panel=LEDGER,
        ),
    ] = None,
    no_ledger: Annotated[
        bool,
        typer.Option(
            "--no-ledger",
            help="Keep none: steps lost when a run is killed are then not counted.",
            rich_help_panel=LEDGER,
        ),
    ] = False,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Name of the data set in the ledger; public, and always the same for the same data.",
            show_default="a random id kept beside the data; recipes: their name",
            rich_help_panel=LEDGER,
        ),
    ] = None,
    diagnostics: Annotated[
        bool,
        typer.Option(
            "--diagnostics/--no-diagnostics",
            help="Record training loss, gradient norms and clipping. They are [bold]not "
            "private[/]; leave them out of what you publish.",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
) -> None:
    """Train a model with differential privacy and write a report.

    Without options: a convolutional network on real handwritten digits, ε at most 3, no download.

    Writes [bold]runs/NAME/[/]: model.safetensors, plan.json, statement.txt, metrics.csv and
    report.html. Ctrl-C stops after the current batch and leaves all of these, and a checkpoint.

    [bold]Examples[/]

    [cyan]dptorch train[/]

    [cyan]dptorch train --recipe mnist-features --epsilon 1[/]

    [cyan]dptorch train --data patients.csv --label diagnosis --bounds ranges.json[/]

    [cyan]dptorch train --data photos/ --image-size 64 --model mypackage.nets:resnet[/]

    [cyan]dptorch train --canaries 1000 --name audited[/], then [cyan]dptorch audit runs/audited[/]

    [cyan]dptorch train --resume --name mnist-1[/]
    """
    from dptorch.cli.ledger import for_new_run, for_resumed_run
    from dptorch.training import run_folder
    from dptorch.training.canaries import CANARY_FILE, Canaries
    from dptorch.training.data import ReadOptions, parse_bounds
    from dptorch.training.job import Job, prepare
    from dptorch.training.loop import train as run_job
    from dptorch.training.release import check_destination
    from dptorch.training.release import release as make_release

    console = Console(highlight=False, soft_wrap=True)
    if release is not None:
        check_destination(release)
    if resume:
        _refuse_settings(ctx, overwrite)
        if name is None:
            raise ConfigurationError("--resume needs the --name of the run to continue.")
        folder = run_folder.reopen(runs, name)
        folder.require_checkpoint()
        job = Job.from_dict(folder.read_json("run.json")["job"])
        job = replace(
            job,
            device=device,
            num_workers=num_workers,
            clipping_mode=clipping_mode or job.clipping_mode,
        )
        planted = Canaries.read(folder.path / CANARY_FILE) if job.canaries else None
        setup = _prepare(partial(prepare, canaries=planted), job, console)
        if not no_ledger:
            kept = for_resumed_run(ctx, ledger, folder.read_json("run.json").get("ledger"))
            if kept is not None:
                setup.engine.use_ledger(kept)
        outcome = _watched(run_job, setup, folder, console, resume=True)
    else:
        if data is None:
            _refuse_reading_options(ctx)
        job = Job(
            recipe=recipe,
            data=None if data is None else str(data),
            reading=ReadOptions(label, *parse_bounds(bounds), image_size, channels, test_fraction),
            model=model,
            pretrained=pretrained,
            epochs=epochs,
            batch_size=batch_size,
            sample_rate=sample_rate,
            target_epsilon=epsilon,
            noise_multiplier=noise_multiplier,
            target_delta=delta,
            max_grad_norm=max_grad_norm,
            clipping_fn=clipping_fn,
            clipping_mode=clipping_mode or "auto",
            clipping_style=clipping_style,
            mechanism=mechanism,
            accountant=accountant,
            sampling=sampling,
            learning_rate=learning_rate,
            momentum=momentum,
            max_physical_batch_size=max_physical_batch_size,
            num_workers=num_workers,
            device=device,
            seed=seed,
            diagnostics=diagnostics,
            canaries=canaries,
        )
        stem = (data.name.split(".")[0] if data else recipe) or "mnist"
        name = name or run_folder.next_name(runs, stem)
        run_folder.check_free(runs, name, overwrite=overwrite)
        setup = _prepare(prepare, job, console)
        if not no_ledger:
            setup.engine.use_ledger(for_new_run(ledger, runs, dataset, setup.job))
            setup.engine.reserve_budget()
        folder = run_folder.create(runs, name, overwrite=overwrite)
        outcome = _watched(run_job, setup, folder, console, resume=False)
    _conclude(outcome, console)
    if outcome.interrupted:
        raise typer.Exit(130)
    if release is not None:
        conclude_release(make_release(outcome.folder, release), with_test_results=False)


def _refuse_settings(ctx: typer.Context, overwrite: bool) -> None:
    if overwrite:
        raise ConfigurationError("--resume and --overwrite exclude each other.")
    for parameter in ctx.params:
        source = ctx.get_parameter_source(parameter)
        given = source is not None and source.name == "COMMANDLINE"
        if given and parameter not in WITH_RESUME:
            raise ConfigurationError(
                f"--{parameter.replace('_', '-')} cannot be changed by --resume: the run goes on "
                f"with the settings it was begun with. Leave it out, or begin a new run."
            )


def _refuse_reading_options(ctx: typer.Context) -> None:
    for parameter in ("label", "bounds", "image_size", "channels", "test_fraction"):
        source = ctx.get_parameter_source(parameter)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigurationError(
                f"--{parameter.replace('_', '-')} says how to read --data; a recipe brings its own "
                "data and preprocessing. Leave it out, or give --data."
            )


def _prepare(prepare: Any, job: Job, console: Console) -> Setup:
    from dptorch.cli.progress import introduce

    if not console.is_terminal:
        console.print("Reading data, calibrating noise")
    with console.status("Reading data, calibrating noise"):
        setup: Setup = prepare(job)
    introduce(setup, console)
    return setup


def _watched(run_job: Any, setup: Setup, folder: Any, console: Console, resume: bool) -> Outcome:
    from dptorch.cli.progress import observer_for

    try:
        with observer_for(console) as observer:
            outcome: Outcome = run_job(setup, folder, observer=observer, resume=resume)
        return outcome
    finally:
        setup.engine.release_budget()


def _conclude(outcome: Outcome, console: Console) -> None:
    from dptorch.training.loop import spent_and_tested
    from dptorch.training.run_page import missing_packages

    path = outcome.folder.path
    console.print()
    if outcome.interrupted:
        console.print(
            f"[bold yellow]Interrupted[/] after step {outcome.last['step']}: "
            f"{spent_and_tested(outcome)}. What was trained is usable and its ε is true."
        )
        where = "" if path.parent == Path("runs") else f" --runs {path.parent}"
        console.print(f"Go on with: dptorch train --resume --name {path.name}{where}")
    else:
        console.print(f"[bold green]Done:[/] {spent_and_tested(outcome)}")
    if missing_packages():
        console.print("No report.html: pip install 'dptorch[report]' to have one.")
        console.print(f"Statement: {path / 'statement.txt'}")
    else:
        console.print(f"Report: {path / 'report.html'}")
