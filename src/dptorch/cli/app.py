"""The entry point of `dptorch`: registers the commands, and shows errors in one readable line."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version as installed_version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from dptorch.cli.audit import audit
from dptorch.cli.bench import bench
from dptorch.cli.calibrate import calibrate
from dptorch.cli.check import check
from dptorch.cli.compare import compare
from dptorch.cli.epsilon import epsilon
from dptorch.cli.export import export
from dptorch.cli.generate import generate
from dptorch.cli.ledger import ledger
from dptorch.cli.options import Command, Group, flag_of
from dptorch.cli.plan import plan
from dptorch.cli.predict import predict
from dptorch.cli.processes import ARGUMENTS, place
from dptorch.cli.release import release
from dptorch.cli.scale import scale
from dptorch.cli.schema import schema
from dptorch.cli.serve import serve
from dptorch.cli.statement import statement
from dptorch.cli.statistics import statistics
from dptorch.cli.train import train_group
from dptorch.cli.train_text import TASK_COMMANDS
from dptorch.cli.train_vision import vision
from dptorch.cli.tune import tune
from dptorch.errors import ConfigurationError, DataError, PrivacyError, PrivacyWarning

__all__ = ["app", "main"]


class ReadableErrors(Group):
    """Prints the errors that a user can act on in one line, without a traceback; exit code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the words as they are, for `--nproc`."""
        ctx.meta[ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        with warnings.catch_warnings():
            warnings.showwarning = _show_with(console, warnings.showwarning)
            try:
                return super().invoke(ctx)
            except (ConfigurationError, DataError, PrivacyError) as error:
                command = self.commands.get(ctx.invoked_subcommand or "", self)
                text = with_flags(_one_line(error), _parameters(command))
                if place()[0] == 0:  # the other processes have met the same, or were told of it
                    console.print(f"[bold red]Error:[/] {escape(text)}")
                raise typer.Exit(2) from None
            except KeyboardInterrupt:
                console.print("Interrupted.")
                raise typer.Exit(130) from None


def _parameters(command: Any) -> list[Any]:
    """The options of a command and, where it is a group, of those in it."""
    inside = getattr(command, "commands", {}).values()
    return [p for each in (command, *inside) for p in each.params]


def with_flags(message: str, parameters: Iterable[Any]) -> str:
    """Name an error's arguments as the command line does: `sample_rate=7.0` is --sample-rate 7.0.

    Example:
        >>> import click
        >>> rate = click.Option(["--sample-rate"])
        >>> with_flags("sample_rate=7.0 must be in (0, 1].", [rate])
        '--sample-rate 7.0 must be in (0, 1].'
    """
    for parameter in parameters:
        if not parameter.name or not parameter.opts or not parameter.opts[0].startswith("-"):
            continue
        flag = flag_of(parameter)
        # The library says both delta and target_delta of the command line's --delta.
        stem = re.escape(parameter.name.removeprefix("target_"))
        name = f"(?:target_)?{stem}"
        message = re.sub(rf"(?<![\w.-]){name}=None\b", f"{flag} (not given)", message)
        message = re.sub(rf"(?<![\w.-]){name}=(?=\S)", f"{flag} ", message)
        if "_" in parameter.name:
            bare = name if "_" in stem else f"target_{stem}"
            message = re.sub(rf"(?<![\w.-]){bare}\b(?!\()", flag, message)
    return message


def _one_line(error: BaseException | Warning) -> str:
    """The text of an error on one line, but for a list of faults: one a line, indented."""
    head, *faults = re.split(r"\n  (?=\S)", str(error))
    return "\n  ".join(" ".join(part.split()) for part in (head, *faults))


def _show_with(console: Console, otherwise: Callable[..., None]) -> Callable[..., None]:
    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, PrivacyWarning):
            if place()[0] > 0:
                return
            console.print(f"[bold yellow]Warning:[/] {escape(' '.join(str(message).split()))}")
        else:
            otherwise(message, category, *args, **kwargs)

    return show


app = typer.Typer(
    cls=ReadableErrors,
    name="dptorch",
    help="Train PyTorch models with differential privacy, and know what it guarantees.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Train": (tune, schema, predict, generate, serve, compare, check, release, statement, export),
    "Plan": (epsilon, calibrate, plan, scale),
    "Measure": (statistics, bench, audit),
}
app.add_typer(train_group, rich_help_panel="Train")
for task in TASK_COMMANDS:
    train_group.command(cls=Command, rich_help_panel="Tasks on texts")(task)
train_group.command(cls=Command, rich_help_panel="Tasks on pictures")(vision)
for panel, commands in PANELS.items():
    for command in commands:
        app.command(cls=Command, rich_help_panel=panel)(command)
app.add_typer(ledger, name="ledger", rich_help_panel="Plan")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dptorch {installed_version('dptorch')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Train PyTorch models with differential privacy, and know what it guarantees."""


def main() -> None:
    """What the console script `dptorch` runs."""
    app()
