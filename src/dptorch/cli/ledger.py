"""`dptorch ledger`: what has been released about a data set, what it cost, and what is left."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from dptorch.cli.options import AsJson, Command, Group
from dptorch.errors import ConfigurationError
from dptorch.risk import rounded_up

if TYPE_CHECKING:
    from dptorch.ledger import DatasetLedger, Ledger, RunSummary, Total
    from dptorch.plan import PrivacyPlan
    from dptorch.plan.prediction_plan import PredictionPlan

__all__ = ["for_new_run", "for_resumed_run", "ledger"]

DEFAULT = Path("runs") / "ledger.db"

ledger = typer.Typer(
    cls=Group,
    help="What was released about each data set, what all runs cost together, and budgets.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Location = Annotated[
    str,
    typer.Option(
        "--ledger",
        envvar="DPTORCH_LEDGER",
        help="A file, or [bold]postgresql://user@host/database[/].",
        show_default=str(DEFAULT),
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        envvar="DPTORCH_LEDGER_KEY_FILE",
        help="The key that the ledger was made with, if it was.",
        show_default=False,
    ),
]
Dataset = Annotated[str | None, typer.Option(help="Only this data set.", show_default="every one")]
Delta = Annotated[
    float | None,
    typer.Option(help="State ε at this δ.", show_default="the cap's, or the runs' largest"),
]


@ledger.command(cls=Command)
def show(
    location: Location = str(DEFAULT),
    dataset: Dataset = None,
    entries: Annotated[
        bool, typer.Option("--entries", help="Every entry instead of one line a run.")
    ] = False,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """List the runs on each data set.

    [bold]Repeated[/] steps were released again because the run was killed after its last checkpoint.
    An [bold]open[/] run may still be going on, or was killed: resume it, or close it.
    """
    opened = _open(location, key_file)
    if entries:
        _show_entries(opened, dataset, as_json)
        return
    runs = opened.runs(dataset=dataset)
    if as_json:
        names = _names(location)
        rows = [_run_as_dict(run) | {"name": names.get(run.run)} for run in runs]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(
        "data set",
        Column("run", no_wrap=True),
        "name",
        "begun (UTC)",
        "steps",
        "repeated",
        "noise",
        "rate",
        "",
        "ε",
        "δ",
    )
    names = _names(location)
    for run in runs:
        table.add_row(
            run.dataset,
            run.run,
            names.get(run.run, ""),
            run.begun[:19].replace("T", " "),
            f"{run.steps:,} of {run.plan.steps:,}",
            f"{run.repeated:,}",
            *_noise_and_rate(run.plan),
            "open" if run.open else "closed",
            rounded_up(_epsilon(run)),
            f"{run.plan.target_delta:g}",
        )
    _console().print(table if runs else f"{opened.location} holds no run.")


@ledger.command(cls=Command)
def total(
    location: Location = str(DEFAULT),
    dataset: Dataset = None,
    delta: Delta = None,
    adjacency: Annotated[
        str | None,
        typer.Option(
            help="add-remove, zero-out or replace-one.", show_default="the cap's, or the runs' own"
        ),
    ] = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """What all runs on a data set cost together.

    [bold]planned[/] holds if no run's settings depended on what other runs had shown;
    [bold]adaptive[/] holds however they were chosen.
    """
    totals = _totals(_open(location, key_file), dataset, delta, adjacency)
    if as_json:
        typer.echo(json.dumps([_total_as_dict(t) for t in totals], indent=2))
        return
    table = Table("data set", "runs", "steps", "ε planned", "ε adaptive", "δ", "adjacency")
    for t in totals:
        table.add_row(
            t.dataset,
            f"{t.runs:,}",
            f"{t.steps:,}",
            rounded_up(t.planned),
            rounded_up(t.adaptive),
            f"{t.delta:g}",
            t.adjacency.value,
        )
    console = _console()
    console.print(table)
    for t in totals:
        for note in t.notes:
            console.print(f"{t.dataset}: {note}.")


@ledger.command(cls=Command)
def budgets(
    location: Location = str(DEFAULT), key_file: KeyFile = None, as_json: AsJson = False
) -> None:
    """What each data set's cap leaves."""
    totals = _totals(_open(location, key_file), None, None)
    if as_json:
        typer.echo(json.dumps([_total_as_dict(t) for t in totals], indent=2))
        return
    table = Table("data set", "cap", "spent", "spent or reserved", "left", "δ", "unit")
    for t in totals:
        table.add_row(
            t.dataset,
            "none" if t.cap is None else f"{t.cap.epsilon:g}",
            rounded_up(t.adaptive),
            rounded_up(t.committed),
            "" if t.left is None else f"{math.floor(1e4 * t.left) / 1e4:.4f}",
            f"{t.delta:g}",
            "" if t.cap is None else t.cap.unit,
        )
    _console().print(table)


@ledger.command(cls=Command)
def cap(
    dataset: Annotated[str, typer.Argument(help="The data set, as `show` names it.")],
    epsilon: Annotated[
        float | None, typer.Option(help="Everything released together stays below this.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="At this δ.")] = None,
    unit: Annotated[str, typer.Option(help="What one record is.")] = "example",
    adjacency: Annotated[
        str, typer.Option(help="add-remove, zero-out or replace-one.")
    ] = "zero-out",
    lift: Annotated[bool, typer.Option("--lift", help="Take the cap away.")] = False,
    location: Location = str(DEFAULT),
    key_file: KeyFile = None,
) -> None:
    """Set the budget of a data set, which all its runs share.

    A run reserves what its plan costs before its first step, and is refused if that does not fit;
    what it does not use is given back.

    [bold]Example[/]

    [cyan]dptorch ledger cap patients-2026 --epsilon 8 --delta 1e-6[/]
    """
    from dptorch.accounting import Adjacency
    from dptorch.ledger import Cap

    if lift == (epsilon is not None or delta is not None) or (epsilon is None) != (delta is None):
        raise ConfigurationError("give --epsilon and --delta, or --lift.")
    _make_folder(location)
    opened = _open(location, key_file, create=True).dataset(dataset)
    if epsilon is None or delta is None:
        opened.set_cap(None)
        _console().print(f"{dataset}: no cap.")
        return
    opened.set_cap(Cap(epsilon, delta, Adjacency.of(adjacency), unit))
    _console().print(f"{dataset}: at most epsilon {epsilon:g} at delta {delta:g}, per {unit}.")


@ledger.command(cls=Command)
def close(
    run: Annotated[str, typer.Argument(help="Its id, as `show` names it.")],
    location: Location = str(DEFAULT),
    key_file: KeyFile = None,
) -> None:
    """Give back what a killed run had reserved and not used.

    If its process is alive after all, its next step is refused. The run can still be resumed, if
    the budget has room.
    """
    _open(location, key_file).close_run(run)
    _console().print(f"{run}: closed.")


@ledger.command(cls=Command)
def verify(
    location: Location = str(DEFAULT),
    head: Annotated[
        str | None,
        typer.Option(
            help="A head hash that you kept elsewhere: some entry must have it.",
            show_default=False,
        ),
    ] = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Recompute the chain of hashes; exit with 1 if it is broken.

    Finds entries that were edited, deleted, inserted or reordered, and an end that was cut off. Who
    can write to the ledger could rebuild it as a whole; keep the printed head elsewhere (it is in
    each run's run.json too) and give it with --head, and nothing before it can change unnoticed.
    """
    found = _open(location, key_file).verify(head)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        console = _console()
        for problem in found.problems[:20]:
            console.print(f"[bold red]Broken:[/] {problem}.")
        if len(found.problems) > 20:
            console.print(f"... and {len(found.problems) - 20} more.")
        if found.clock_went_back:
            console.print(
                f"The clock was behind at {len(found.clock_went_back)} entries; their order holds."
            )
        if not found.problems:
            console.print(f"{found.entries:,} entries, unbroken. Head: {found.head}")
    if found.problems:
        raise typer.Exit(1)


# -- for `dptorch train` -------------------------------------------------------------------------------


def for_new_run(
    location: str | None,
    runs: Path,
    dataset: str | None,
    *,
    data: str | None,
    recipe: str | None = None,
    as_json: bool = False,
) -> DatasetLedger:
    """The ledger of a new run, made if there is none.

    Args:
        location: what was asked for; by default ``ledger.db`` in `runs`.
        dataset: its name, if one was given.
        data: where the data is from; None for a recipe's.
        recipe: its name.
        as_json: the command prints JSON, which a new data set is then not introduced among.
    """
    from dptorch.ledger import beside
    from dptorch.ledger.dataset_id import of_path

    opened = _open(
        location or str(runs / "ledger.db"), key_from_environment(), create=True, runs=runs
    )
    if dataset is None and data is not None and data.startswith(("hub:", "package:")):
        dataset = data
    console = Console(stderr=True) if as_json else _console()
    if dataset is not None:
        _mention_accounts_alike(data, dataset, opened.datasets(), console)
    elif data is not None:
        known = of_path(data)
        dataset = beside(data)
        if known is None:
            _introduce(data, dataset, console)
    return opened.dataset(dataset or f"recipe:{recipe}")


def _mention_accounts_alike(
    data: str | None, dataset: str, accounts: list[str], console: Console
) -> None:
    """Say what other accounts the same data may have: by its path, or by a name almost the same."""
    from dptorch.ledger.dataset_id import of_path

    own = None if data is None else of_path(data)
    alike = own if own in accounts else None
    if alike is None and dataset not in accounts:
        alike = next((name for name in accounts if _letters(name) == _letters(dataset)), None)
    if alike not in (None, dataset):
        console.print(
            f"[bold]Ledger[/]   {alike} has an account here too. If {dataset} is the same data, their "
            f"costs add up only under one name: --dataset {alike}",
            soft_wrap=True,
            highlight=False,
        )


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).casefold()


def _introduce(data: str, dataset: str, console: Console) -> None:
    """Say that a data set is new to the ledger, and what to do if it is not."""
    from dptorch.ledger.dataset_id import neighbours, nested

    others, same = neighbours(data), nested(data)
    text = f"[bold]Ledger[/]   {data} has an account of its own from now on: {dataset}."
    if same:
        path, known = next(iter(same.items()))
        text += (
            f" So has {path}, and one lies in the other: they have records in common, whose costs "
            f"add up only under one name: --dataset {known}"
        )
    elif others:
        name, known = next(iter(others.items()))
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        text += (
            f" So has {name}{more} beside it. If the same people are in both, their costs add up only "
            f"under one name: --dataset {known}"
        )
    else:
        text += (
            " A copy of it, or the same people in another format, would have another: give both one "
            "name with --dataset."
        )
    console.print(text, soft_wrap=True, highlight=False)


def for_resumed_run(
    ctx: typer.Context, location: str | None, recorded: dict[str, str] | None
) -> DatasetLedger | None:
    """The ledger that a run was begun with; None if it was begun without one.

    Args:
        ctx: tells an option from an environment variable, which may be meant for other runs.
        location: what was asked for.
        recorded: what ``run.json`` says.
    """
    if recorded is None:
        return None
    source = ctx.get_parameter_source("ledger")
    asked = source is not None and source.name == "COMMANDLINE"
    # A URL is recorded without its password.
    if location is None or not (asked or "://" in recorded["location"]):
        location = recorded["location"]
    return _open(location, key_from_environment()).dataset(recorded["dataset"])


def key_from_environment() -> Path | None:
    """The file of the key that seals a ledger, as ``DPTORCH_LEDGER_KEY_FILE`` names it, if it does."""
    import os

    found = os.environ.get("DPTORCH_LEDGER_KEY_FILE")
    return Path(found) if found else None


def _open(
    location: str, key_file: Path | None, *, create: bool = False, runs: Path | None = None
) -> Ledger:
    from dptorch.ledger import open_ledger

    if runs is not None:
        _make_folder(location)
    return open_ledger(location, create=create, key_file=key_file)


def _make_folder(location: str) -> None:
    if "://" not in location:
        try:
            Path(location).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"The folder of the ledger {location} cannot be made ({error.strerror})."
            ) from None


# -- tables --------------------------------------------------------------------------------------------


def _totals(
    opened: Ledger, dataset: str | None, delta: float | None, adjacency: str | None = None
) -> list[Total]:
    names = opened.datasets() if dataset is None else [dataset]
    return [opened.dataset(name).total(delta, adjacency) for name in names]


def _epsilon(run: RunSummary) -> float:
    from dptorch import accounting
    from dptorch.plan.prediction_plan import PredictionPlan

    if isinstance(run.plan, PredictionPlan):
        return run.plan.epsilon(run.history)
    return accounting.get_accountant(run.plan.accountant).epsilon(
        run.history, run.plan.target_delta, adjacency=run.plan.adjacency
    )


def _noise_and_rate(plan: PrivacyPlan | PredictionPlan) -> tuple[str, str]:
    from dptorch.plan.prediction_plan import PredictionPlan

    if isinstance(plan, PredictionPlan):  # every answer looks at all data
        return (f"{plan.noise:.4g}{' (ε)' if plan.pure else ''}", "answers")
    return f"{plan.noise_multiplier:.4g}", f"{plan.sample_rate:.4g}"


def _names(location: str) -> dict[str, str]:
    """Run id -> the folder that says it was written by that run, of the runs beside a ledger."""
    found = {}
    root = DEFAULT.parent if "://" in location else Path(location).parent
    for path in sorted(root.glob("*/run.json")):
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            found[about["ledger"]["run"]] = path.parent.name
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _run_as_dict(run: RunSummary) -> dict[str, Any]:
    return {
        "dataset": run.dataset,
        "run": run.run,
        "begun": run.begun,
        "open": run.open,
        "steps": run.steps,
        "repeated": run.repeated,
        "epsilon": _finite(_epsilon(run)),
        "delta": run.plan.target_delta,
        "key": run.key_provenance,
        "plan": json.loads(run.plan.to_json()),
    }


def _total_as_dict(total: Total) -> dict[str, Any]:
    values = asdict(total)
    values["adjacency"] = total.adjacency.value
    if total.cap is not None:
        values["cap"]["adjacency"] = total.cap.adjacency.value
    return {name: _finite(value) for name, value in values.items()}


def _show_entries(opened: Ledger, dataset: str | None, as_json: bool) -> None:
    found = opened.entries(dataset=dataset)
    if as_json:
        typer.echo(json.dumps([asdict(e) | {"body": e.detail} for e in found], indent=2))
        return
    table = Table("seq", "time (UTC)", "kind", "data set", "run", "first", "steps", "hash")
    for e in found:
        first, steps = ("" if n is None else f"{n:,}" for n in (e.first, e.steps))
        table.add_row(
            str(e.seq), e.time[:19], e.kind, e.dataset or "", e.run or "", first, steps, e.hash[:12]
        )
    _console().print(table)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and math.isinf(value) else value


def _console() -> Console:
    # A pipe or a file has no width: nothing is to be cut short in it.
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
