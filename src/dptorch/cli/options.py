"""Options that several commands share, each written once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["LENGTH", "AsJson", "Command", "Delta", "Epochs", "Group", "Steps", "takes_run"]

SAMPLING, LENGTH = "Sampling: two of these", "Length: one of these"

AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
Delta = Annotated[
    float | None,
    typer.Option(
        help="Probability that the guarantee fails.",
        show_default="1 / (10 N), at most 1e-5, as a power of ten",
    ),
]
Epochs = Annotated[
    float | None,
    typer.Option(help="Passes over the data.", show_default=False, rich_help_panel=LENGTH),
]
Steps = Annotated[
    int | None,
    typer.Option(help="Training steps.", show_default=False, rich_help_panel=LENGTH),
]


class Command(TyperCommand):
    """A command whose help shows a switch as what is typed: ``--json``, without ``<bool>``."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, ``--help`` among them."""
        return _bare_switches(super().get_params(ctx))


class Group(TyperGroup):
    """The same for a command that has commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, ``--help`` among them."""
        return _bare_switches(super().get_params(ctx))


def _bare_switches(parameters: list[Any]) -> list[Any]:
    """The parameters, the switches among them without a type in their help."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


def _run_options(
    sample_rate: Annotated[
        float | None,
        typer.Option(
            help="Probability with which each example enters a batch.",
            show_default=False,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    batch_size: Annotated[
        float | None,
        typer.Option(help="Expected batch size.", show_default=False, rich_help_panel=SAMPLING),
    ] = None,
    sample_size: Annotated[
        int | None,
        typer.Option(
            help="Number of training examples. Not needed beside --sample-rate and --delta.",
            show_default=False,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    sampling: Annotated[
        str,
        typer.Option(
            help="How batches are drawn: poisson, truncated-poisson, random-allocation, shuffled, ...",
        ),
    ] = "poisson",
    epochs: Epochs = None,
    steps: Steps = None,
    delta: Delta = None,
    mechanism: Annotated[
        str,
        typer.Option(help="The noise: gaussian, or discrete_gaussian with --accountant rdp."),
    ] = "gaussian",
    accountant: Annotated[
        str, typer.Option(help="Who computes ε: pld, exact, rdp, prv, gdp.")
    ] = "pld",
    adjacency: Annotated[
        str | None,
        typer.Option(
            help="Which data sets must look alike: add-remove, zero-out, replace-one.",
            show_default="zero-out with --sample-size, else add-remove",
        ),
    ] = None,
) -> None:
    """The options that describe a run; only its signature is used."""


def takes_run(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that describe a run, in place of its parameter `run`.

    `run` receives them as keyword arguments of `dptorch.plan.make_plan`.

    Example:
        >>> @takes_run
        ... def show(noise: float, run: dict, as_json: AsJson = False) -> None:
        ...     print(noise, run["steps"], run["target_delta"])
        >>> show(noise=1.0, steps=3, delta=1e-5)
        1.0 3 1e-05
    """
    own = dict(inspect.signature(command).parameters)
    own.pop("run")
    shared = inspect.signature(_run_options).parameters

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        run = {name: given.pop(name, parameter.default) for name, parameter in shared.items()}
        command(run=_for_plan(run), **given)

    hints = get_type_hints(command, include_extras=True)
    hints |= get_type_hints(_run_options, include_extras=True)
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
        for parameter in (*own.values(), *shared.values())
    ]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _for_plan(run: dict[str, Any]) -> dict[str, Any]:
    run["target_delta"] = run.pop("delta")
    if run["sample_rate"] is not None and run["batch_size"] is None and run["sample_size"] is None:
        run["batch_size"] = 1.0  # the divisor of the noisy sum, on which ε does not depend
    return run
