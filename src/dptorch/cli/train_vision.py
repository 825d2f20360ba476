"""`dptorch train vision`: pictures, from files to a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dptorch.cli.options import grouped
from dptorch.cli.train import run_task
from dptorch.cli.train_options import LedgerOptions, OutputOptions, PrivacyOptions
from dptorch.cli.vision_options import (
    AccuracyOptions,
    MethodOptions,
    OptimizerOptions,
    VisionDataOptions,
    VisionModelOptions,
    VisionTrainingOptions,
)

if TYPE_CHECKING:
    from dptorch.training.job import Setup

__all__ = ["vision"]


@grouped
def vision(
    ctx: typer.Context,
    source: VisionDataOptions,
    model: VisionModelOptions,
    method: MethodOptions,
    accuracy: AccuracyOptions,
    privacy: PrivacyOptions,
    training: VisionTrainingOptions,
    optimizer: OptimizerOptions,
    output: OutputOptions,
    ledger: LedgerOptions,
) -> None:
    """Train a classifier of pictures with differential privacy.

    Writes [bold]runs/NAME/[/] with model.safetensors, statement.txt, metrics.csv and report.html.
    Ctrl-C stops after the current batch, and --resume goes on.

    [bold]Examples[/]

    [cyan]dptorch train vision --data ./cifar --download --format cifar10 --recipe cifar10-wrn-16-4[/]

    [cyan]dptorch train vision --data ./cifar --model timm:vit_small_patch16_224 --pretrained --method
    bias-only --optimizer adam --epsilon 2[/]

    [cyan]dptorch train vision --data photos/ --augment flip-crop --views 8 --ema 0.99[/]
    """

    def prepared() -> Setup:
        from dptorch.vision.job import VisionJob, prepare

        groups = (source, model, method, accuracy, privacy, training, optimizer)
        settings = {name: value for group in groups for name, value in vars(group).items()}
        settings["clipping_mode"] = training.clipping_mode or "auto"
        return prepare(VisionJob(diagnostics=output.diagnostics, **settings))

    stem = source.recipe or (Path(source.data).resolve().name if source.data else "vision")
    run_task(ctx, prepared, stem.replace(" ", "-"), training, output, ledger)
