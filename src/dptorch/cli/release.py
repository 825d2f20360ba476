"""`dptorch release`: copy what may be published of a run to a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = ["conclude", "release"]


def release(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", show_default=False)],
    destination: Annotated[
        Path, typer.Argument(help="New folder for what is published.", show_default=False)
    ],
    with_test_results: Annotated[
        bool,
        typer.Option(
            "--with-test-results",
            help="Publish accuracy and loss on the held-out examples too: exact numbers, which "
            "the guarantee does not cover.",
        ),
    ] = False,
) -> None:
    """Copy what may be published of a run, and nothing else.

    A run folder also holds training losses, gradient norms, batch sizes, times, paths and, until the
    run is done, the key of its noise. [bold]Publish a release, not the folder.[/]

    [bold]Examples[/]

    [cyan]dptorch release runs/mnist-1 mnist-model[/]

    [cyan]dptorch release runs/mnist-1 mnist-model --with-test-results[/]
    """
    from dptorch.training.release import release as make
    from dptorch.training.run_folder import reopen

    folder = reopen(run.parent, run.name)
    made = make(folder, destination, with_test_results=with_test_results)
    conclude(made, with_test_results)


def conclude(made: Any, with_test_results: bool) -> None:
    """Say what was released."""
    from dptorch.randomness import KeySource

    console = Console(highlight=False, soft_wrap=True)
    files = ", ".join(sorted(p.name for p in made.path.iterdir()))
    console.print(f"[bold green]Released[/] to {made.path}: {files}")
    claims = made.read_json("run.json")["statement"]
    if not KeySource(claims["key_provenance"]).is_private:
        console.print("[bold yellow]This run protects nobody[/]: its noise came from a seed.")
    if not with_test_results:
        console.print("Results on held-out examples were left out. --with-test-results keeps them.")
