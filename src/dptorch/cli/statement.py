"""`dptorch statement`: what a run guarantees, in the form that somebody asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dptorch.errors import one_of

if TYPE_CHECKING:
    from dptorch.ledger import Total

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
    ledger: Annotated[
        str | None,
        typer.Option(
            help="Ledger that knows of other runs on the data: a file, or "
            "[bold]postgresql://user@host/database[/].",
            envvar="DPTORCH_LEDGER",
            show_default="the one that the run wrote to",
        ),
    ] = None,
) -> None:
    """Print the privacy statement of a run: for a layperson, for an expert, and what it rests on.

    A run says what it spent itself. After it comes what all runs on its data have cost together by
    now, if their ledger can be read. Not where the best of a secret number of runs is among them
    ([bold]dptorch tune[/]): the total would tell the number.

    [bold]Examples[/]

    [cyan]dptorch statement runs/patients-1[/]

    [cyan]dptorch statement runs/patients-1 --format registry > entry.yaml[/]
    """
    from dptorch.training.claims import FORMATS, claim
    from dptorch.training.run_folder import reopen

    one_of("format", form, FORMATS)
    folder = reopen(run.parent, run.name)
    typer.echo(claim(folder, form, _total(folder.read_json("run.json"), ledger)), nl=False)


def _total(about: Mapping[str, Any], location: str | None) -> Total | None:
    """What all runs on the data of a run cost together; None, and a word, if no ledger says it."""
    from dptorch.cli.ledger import key_from_environment
    from dptorch.errors import ConfigurationError, DataError, LedgerError
    from dptorch.ledger import open_ledger

    stated = about.get("statement", {}).get("ledger")
    location = location or (about.get("ledger") or {}).get("location")
    if stated is None or location is None:
        return None
    try:
        opened = open_ledger(location, create=False, key_file=key_from_environment())
        total = opened.dataset(stated["dataset"]).total()
    except (ConfigurationError, DataError, LedgerError) as error:
        typer.echo(f"What all runs on the data cost together is not known: {error}", err=True)
        return None
    if total.number_is_secret:
        typer.echo(
            "What all runs on the data cost together is left out: it would tell how many runs "
            "dptorch tune made, and what publishing the best of them costs counts on that being "
            f"secret. For your eyes: dptorch ledger total {total.dataset}",
            err=True,
        )
        return None
    return total
