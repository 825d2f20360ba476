"""`dptorch epsilon`: what a run with given noise costs."""

from __future__ import annotations

import json
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

__all__ = ["epsilon"]


def epsilon(
    noise_multiplier: Annotated[
        float,
        typer.Option(help="Standard deviation of the noise over the clipping norm."),
    ],
    sample_rate: SampleRate = None,
    batch_size: BatchSize = None,
    sample_size: SampleSize = None,
    epochs: Epochs = None,
    steps: Steps = None,
    delta: Delta = None,
    accountant: Accountant = "pld",
    as_json: AsJson = False,
) -> None:
    """Compute the ε of DP-SGD with given noise.

    [bold]Examples[/]

    [cyan]dptorch epsilon --noise-multiplier 1.1 --batch-size 256 --sample-size 60000 --epochs 60[/]

    [cyan]dptorch epsilon --noise-multiplier 3.3 --sample-rate 0.25 --steps 80 --delta 1e-5[/]
    """
    from dptorch.cli.planning import plan_from

    plan = plan_from(
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        batch_size=batch_size,
        sample_size=sample_size,
        epochs=epochs,
        steps=steps,
        target_delta=delta,
        accountant=accountant,
    )
    spent = plan.epsilon()
    if as_json:
        typer.echo(json.dumps({"epsilon": spent, "plan": json.loads(plan.to_json())}, indent=2))
        return
    # Rounded up, because a bound shown smaller than it is would be false.
    shown = math.inf if math.isinf(spent) else math.ceil(spent * 1e4) / 1e4
    typer.echo(f"epsilon {shown:.4f} at delta {plan.target_delta:g} after {plan.steps:,} steps")
