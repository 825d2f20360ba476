"""Run the study of DP-BloGS beside DP-SGD and write its page with plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.blogs_study import TASKS, run_study, write_page
from dptorch.errors import ConfigurationError, one_of

__all__ = ["app", "main"]


def main(
    task: Annotated[
        list[str] | None,
        typer.Option(help="digits, mnist or gpt2; may be repeated.", show_default="all three"),
    ] = None,
    epsilon: Annotated[
        list[float] | None,
        typer.Option(help="Target of every method that has one.", show_default="1, 3 and 8"),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for blogs.md; plots go to blogs/ inside it.")
    ] = Path("docs"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A small part of it, to see that it works.")
    ] = False,
) -> None:
    """Compare DP-BloGS with DP-SGD: accuracy, time for a step, and measured leakage.

    Trains non-privately, with the block shuffle under both of its published indices, with DP-SGD and
    with BloGS's Gaussian sibling; attacks each; writes a page with tables and plots. Some minutes on
    two cores for each task.

    [bold]Examples[/]

    [cyan]python -m benchmarks.blogs_study[/]

    [cyan]python -m benchmarks.blogs_study --task digits --epsilon 1 --quick --output /tmp/blogs[/]
    """
    try:
        names = [one_of("task", name, TASKS) for name in task or TASKS]
    except ConfigurationError as error:
        raise typer.BadParameter(str(error)) from None
    targets = epsilon or [1.0, 3.0, 8.0]
    if min(targets) <= 0:
        raise typer.BadParameter(f"--epsilon {min(targets):g} must be positive.")
    study = run_study(names, epsilons=sorted(targets), quick=quick, progress=typer.echo)
    typer.echo(f"Page: {write_page(study, output)}")


app = typer.Typer(rich_markup_mode="rich", add_completion=False)
app.command()(main)


if __name__ == "__main__":
    app()
