"""`dptorch compare`: several runs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dptorch.cli.options import AsJson

__all__ = ["compare"]


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of two or more runs.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the page.", show_default="comparison.html beside the first run"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what several runs reached at what ε, beside training without privacy.

    Prints a table, and writes a page with test results against ε, the settings that differ, and of
    pictures which classes are taken for which. Test results are exact: ε does not cover the test
    examples.

    [bold]Example[/]

    [cyan]dptorch train vision --data ./cifar --clipping-mode non-private --name plain[/]

    [cyan]dptorch train vision --data ./cifar --epsilon 3 --name private[/]

    [cyan]dptorch compare runs/plain runs/private[/]
    """
    import json

    from dptorch.atomic_files import replacing
    from dptorch.errors import ConfigurationError
    from dptorch.training.comparison import compare as read
    from dptorch.training.run_page import missing_packages

    found = read(runs)
    rows: list[dict[str, Any]] = [
        {
            "run": run.name,
            found.column: run.result,
            "epsilon": run.epsilon if run.private else None,
            "delta": run.about["result"]["delta"] if run.private else None,
            "steps": run.about["result"]["step"],
        }
        for run in found.runs
    ]
    console = Console(highlight=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({"runs": rows, "same_test": found.same_test}, indent=2))
    else:
        table = Table("run", found.words, "ε", "δ", "steps", box=None, pad_edge=False)
        for run in found.runs:
            epsilon, delta = "no privacy", ""
            if run.private:
                epsilon, delta = f"{run.epsilon:.3f}", f"{run.about['result']['delta']:g}"
            steps = f"{run.about['result']['step']:,}"
            table.add_row(run.name, found.shown(run.result), epsilon, delta, steps)
        console.print(table)
        if not found.same_test:
            console.print("[bold yellow]The test sets differ[/] in their source or size.")
    if out is None and missing_packages():
        return
    place = out or runs[0].resolve().parent / "comparison.html"
    try:
        with replacing(place) as partial:
            partial.write_text(found.to_html(), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--out {place} cannot be written ({error.strerror}).") from None
    if not as_json:
        console.print(f"Page: {place}")
