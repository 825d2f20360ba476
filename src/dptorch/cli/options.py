"""Options shared by `dptorch epsilon` and `dptorch calibrate`."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "Accountant",
    "AsJson",
    "BatchSize",
    "Delta",
    "Epochs",
    "SampleRate",
    "SampleSize",
    "Steps",
]

SAMPLING, LENGTH = "Sampling: two of these", "Length: one of these"

SampleRate = Annotated[
    float | None,
    typer.Option(
        help="Probability with which each example enters a batch.",
        show_default=False,
        rich_help_panel=SAMPLING,
    ),
]
BatchSize = Annotated[
    float | None,
    typer.Option(help="Expected batch size.", show_default=False, rich_help_panel=SAMPLING),
]
SampleSize = Annotated[
    int | None,
    typer.Option(
        help="Number of training examples. Not needed beside --sample-rate and --delta.",
        show_default=False,
        rich_help_panel=SAMPLING,
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
Delta = Annotated[
    float | None,
    typer.Option(
        help="Probability that the guarantee fails.",
        show_default="1 / (10 N), at most 1e-5, as a power of ten",
    ),
]
Accountant = Annotated[str, typer.Option(help="Who computes ε: pld, rdp, ...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON.")]
