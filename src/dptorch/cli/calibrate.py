"""`dptorch calibrate`: how much noise a budget asks for."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from dptorch.cli.options import (
    Accountant,
    AsJson,
    BatchSize,
    Delta,
    Epochs,
    SampleRate,
    SampleSize,
    Steps,
)

__all__ = ["calibrate"]


def calibrate(
    target_epsilon: Annotated[float, typer.Option("--epsilon", help="Budget of the whole run.")],
    sample_rate: SampleRate = None,
    batch_size: BatchSize = None,
    sample_size: SampleSize = None,
    epochs: Epochs = None,
    steps: Steps = None,
    delta: Delta = None,
    accountant: Accountant = "pld",
    as_json: AsJson = False,
) -> None:
    """Find the smallest noise multiplier that keeps DP-SGD within a budget.

    [bold]Examples[/]

    [cyan]dptorch calibrate --epsilon 3 --batch-size 256 --sample-size 60000 --epochs 20[/]

    [cyan]dptorch calibrate --epsilon 8 --sample-rate 0.01 --steps 2000 --delta 1e-6[/]
    """
    from dptorch.cli.planning import plan_from

    plan = plan_from(
        target_epsilon=target_epsilon,
        sample_rate=sample_rate,
        batch_size=batch_size,
        sample_size=sample_size,
        epochs=epochs,
        steps=steps,
        target_delta=delta,
        accountant=accountant,
    )
    if as_json:
        typer.echo(plan.to_json().rstrip())
        return
    # Rounded up: the noise printed must be enough.
    shown = math.ceil(plan.noise_multiplier * 1e4) / 1e4
    typer.echo(
        f"noise multiplier {shown:.4f} for epsilon {target_epsilon:g} at delta "
        f"{plan.target_delta:g} over {plan.steps:,} steps"
    )
