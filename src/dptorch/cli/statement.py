"""`dptorch statement`: what a run guarantees, in the form that somebody asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dptorch.errors import one_of

__all__ = ["statement"]


def statement(
    run: Annotated[Path, typer.Argument(help="Folder of a run or release.", show_default=False)],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="[bold]text[/], [bold]json[/], [bold]registry[/] (YAML for the Deployments Registry "
            "of NIST and OpenDP) or [bold]model-card[/] (a section for Hugging Face).",
        ),
    ] = "text",
) -> None:
    """Print the privacy statement of a run: for a layperson, for an expert, and what it rests on.

    A run says what it spent itself. What all runs on its data cost together is in the ledger:
    [bold]dptorch ledger total[/].

    [bold]Examples[/]

    [cyan]dptorch statement runs/patients-1[/]

    [cyan]dptorch statement runs/patients-1 --format registry > entry.yaml[/]
    """
    from dptorch.training.claims import FORMATS, claim
    from dptorch.training.run_folder import reopen

    one_of("format", form, FORMATS)
    typer.echo(claim(reopen(run.parent, run.name), form), nl=False)
