"""`dptorch export`: a model with its preprocessing for programs without dptorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["export"]


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run or release.", show_default=False)],
    path: Annotated[
        Path,
        typer.Argument(
            help="File to write: [bold]model.pt2[/] (torch.export) or [bold]model.onnx[/].",
            show_default=False,
        ),
    ],
) -> None:
    """Write a model with its preprocessing as one program of torch.export or ONNX.

    It takes the numbers of a row and gives probabilities. What the numbers are is printed, and is in
    the file: inputs.json.

    [bold]Examples[/]

    [cyan]dptorch export runs/patients-1 patients.pt2[/]

    [cyan]dptorch export runs/patients-1 patients.onnx[/]
    """
    from dptorch.training.export import export as write
    from dptorch.training.predictor import load

    described = write(load(run), path)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold green]Exported[/] to {path}. Input: {described['input']}", markup=True)
    for column in described.get("columns", []):
        console.print(f"  {column['column']} ({column['numbers']}): {column['are']}", markup=False)
    console.print(f"Output: {', '.join(described['outputs'])}", markup=False)
