"""`dptorch schema`: propose what a table's columns are, and check what its owner made of it."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dptorch.errors import ConfigurationError

__all__ = ["schema"]


def schema(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet file.", show_default=False)],
    label: Annotated[
        str | None,
        typer.Option(help="The column to predict: a class or a number.", show_default="to fill in"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write it.", show_default="TABLE.schema.json beside the table"),
    ] = None,
    unit_column: Annotated[
        str | None,
        typer.Option(
            help="Column that says whose a row is, so that ε protects a person with all their rows.",
            show_default="one row",
        ),
    ] = None,
    edit: Annotated[
        bool, typer.Option("--edit", help="Open it in $EDITOR, and check what was made of it.")
    ] = False,
    from_data: Annotated[
        bool,
        typer.Option(
            "--from-data",
            help="Read bounds, values and classes off the private data. [bold]ε does not cover "
            "that[/]; the statement says so.",
        ),
    ] = False,
    separator: Annotated[
        str | None,
        typer.Option(help="Between fields.", show_default="what the header line has most of"),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Such as latin-1.", show_default="UTF-8, or by the mark")
    ] = None,
    decimal: Annotated[str, typer.Option(help="Before the decimals: . or ,")] = ".",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier schema.")
    ] = False,
) -> None:
    """Propose a schema: what each column of a table is.

    It comes from names and types of columns alone. Bounds, lists of values and classes say what a
    column [bold]can[/] hold. Where its name does not tell, the schema says FILL IN: you know it from
    what the column means. Reading it off the data would reveal something of the people in it (the
    largest salary is somebody's), which no noise hides. --from-data does so all the same.

    [bold]Examples[/]

    [cyan]dptorch schema patients.csv --label diagnosis --unit-column patient_id --edit[/]

    [cyan]dptorch train --data patients.csv --schema patients.schema.json[/]
    """
    from dptorch.atomic_files import replacing
    from dptorch.errors import DataError
    from dptorch.tables import Schema
    from dptorch.tables.proposing import proposal_text, propose, read_off
    from dptorch.tables.schema import FILL_IN, FileFormat

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not table.exists():
        raise DataError(f"{table} does not exist (looked from {Path.cwd()}).")
    path = out or table.with_name(f"{table.name.split('.')[0]}.schema.json")
    if path.exists() and not overwrite:
        raise ConfigurationError(
            f"--out {path} exists. Edit it, or pass --overwrite to propose a new one."
        )
    if from_data and label is None:
        raise ConfigurationError("--from-data needs --label: which column is to be predicted?")
    values, looked = propose(
        table, label, unit=unit_column, file=FileFormat(separator, encoding, decimal)
    )
    text = proposal_text(values)
    if from_data:
        found = read_off(values, table)
        text, looked = found.to_json(), list(found.read_from_data)
    try:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--out {path} cannot be written ({error.strerror}).") from None
    if edit:
        _edit(path)
        Schema.read(path)
    for item in looked:
        console.print(f"[bold yellow]Read off the data[/], so not covered by ε: {item}")
    left = path.read_text(encoding="utf-8").count(f'"{FILL_IN}')
    console.print(
        f"[bold]{path}[/]: {left} places to fill in."
        if left
        else f"[bold green]{path}[/] is complete."
    )
    console.print(f"Then: dptorch train --data {table} --schema {path}")


def _edit(path: Path) -> None:
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        done = subprocess.run([*shlex.split(editor), str(path)], check=False)
    except OSError as error:
        raise ConfigurationError(
            f"--edit: {editor} cannot be started ({error.strerror}). Set EDITOR, or edit {path} "
            "yourself."
        ) from None
    if done.returncode:
        raise ConfigurationError(
            f"--edit: {editor} ended with {done.returncode}. {path} is as it was."
        )
