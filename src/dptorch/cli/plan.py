"""`dptorch plan`: compare ways to spend a budget."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dptorch.cli.options import LENGTH, AsJson, plan_option
from dptorch.cli.plan_noise import compare_noise

if TYPE_CHECKING:
    from dptorch.accounting import Choice

__all__ = ["plan"]

MACHINE = "Your machine, as measured"
NOISE = "Noise that is correlated over steps"


def plan(
    sample_size: Annotated[int, plan_option("sample_size")],
    target_epsilon: Annotated[float, plan_option("target_epsilon")],
    target_delta: Annotated[float | None, plan_option("target_delta")] = None,
    epochs: Annotated[float | None, plan_option("epochs", LENGTH)] = None,
    steps: Annotated[int | None, plan_option("steps", LENGTH)] = None,
    examples: Annotated[
        float | None,
        typer.Option(
            help="Number of examples processed in all steps together.",
            show_default=False,
            rich_help_panel=LENGTH,
        ),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(
            help="Time. Needs --examples-per-second.", show_default=False, rich_help_panel=LENGTH
        ),
    ] = None,
    examples_per_second: Annotated[
        float | None,
        typer.Option(
            help="Speed of private training.", show_default=False, rich_help_panel=MACHINE
        ),
    ] = None,
    bytes_per_example: Annotated[
        float | None,
        typer.Option(
            help="Memory that one more example in a physical batch takes.",
            show_default=False,
            rich_help_panel=MACHINE,
        ),
    ] = None,
    batch_sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--batch-size",
            help="Batch size to compare. Can be given several times. By default powers of 2.",
            show_default=False,
        ),
    ] = None,
    least_steps: Annotated[
        int, typer.Option(help="Leave out choices with fewer steps than this.")
    ] = 100,
    mechanism: Annotated[
        str,
        typer.Option(
            help="gaussian; banded: compare numbers of bands for one --batch-size; all: compare "
            "mechanisms for it.",
            rich_help_panel=NOISE,
        ),
    ] = "gaussian",
    bands: Annotated[
        str,
        typer.Option(
            help="For --mechanism banded: show this number alone, or auto: all.",
            rich_help_panel=NOISE,
        ),
    ] = "auto",
    coefficients: Annotated[
        str,
        typer.Option(
            help="For --mechanism banded: prefix-sum, square-root, or sgd for --momentum and --decay.",
            rich_help_panel=NOISE,
        ),
    ] = "prefix-sum",
    momentum: Annotated[
        float, typer.Option(help="For --coefficients sgd.", rich_help_panel=NOISE)
    ] = 0.0,
    decay: Annotated[
        str,
        typer.Option(
            help="For --coefficients sgd: how the learning rate falls to 0: constant, linear, cosine.",
            rich_help_panel=NOISE,
        ),
    ] = "constant",
    plot: Annotated[
        Path | None,
        typer.Option(
            help="For --mechanism all: also draw noise against ε into this file (.png, .svg, .pdf).",
            show_default=False,
            rich_help_panel=NOISE,
        ),
    ] = None,
    runs: Annotated[
        float | None,
        typer.Option(
            help="Mean number of runs. The best of them by a private score is published, and the "
            "budget covers that choice.",
            show_default=False,
        ),
    ] = None,
    run_law: Annotated[
        str, typer.Option(help="How the number of runs is drawn: geometric, logarithmic, fixed.")
    ] = "geometric",
    accountant: Annotated[str, plan_option("accountant")] = "exact",
    adjacency: Annotated[str, plan_option("adjacency", default=True)] = "zero-out",
    as_json: AsJson = False,
) -> None:
    """Compare batch sizes, steps and noise that spend a budget, best first.

    The order is by signal-to-noise ratio, sqrt(steps) · batch size / noise multiplier: the sum of a
    run's gradients divided by the sum of its noise. It does not depend on your model. Very large
    batches leave few steps, and only training shows how few are too few.

    [bold]Examples[/]

    [cyan]dptorch plan --sample-size 60000 --epsilon 3 --epochs 20[/]

    [cyan]dptorch plan --sample-size 1000000 --epsilon 8 --hours 5 --examples-per-second 900[/]

    A budget that also covers choosing among ten runs by a private score:

    [cyan]dptorch plan --sample-size 60000 --epsilon 3 --epochs 20 --runs 10[/]

    How many bands noise should have, and which mechanism leaves the least noise in the model:

    [cyan]dptorch plan --sample-size 50000 --epsilon 4 --epochs 8 --batch-size 256 --mechanism banded[/]

    [cyan]dptorch plan --sample-size 50000 --epsilon 4 --epochs 8 --batch-size 256 --mechanism all[/]

    The same for SGD with momentum and a learning rate that falls:

    [cyan]dptorch plan --sample-size 50000 --epsilon 4 --epochs 8 --batch-size 256 --mechanism banded
    --coefficients sgd --momentum 0.9 --decay cosine[/]
    """
    from dptorch.accounting import RunLaw, plan_budget
    from dptorch.accounting.arguments import positive_int
    from dptorch.errors import one_of
    from dptorch.plan import default_delta

    positive_int("sample_size", sample_size)
    delta = default_delta(sample_size) if target_delta is None else target_delta
    if one_of("mechanism", mechanism, ("gaussian", "banded", "all")) != "gaussian":
        compare_noise(
            mechanism,
            bands=bands,
            workload=(coefficients, momentum, decay),
            plot=plot,
            batch_sizes=batch_sizes or [],
            sample_size=sample_size,
            length={"epochs": epochs, "steps": steps},
            budget={
                "target_epsilon": target_epsilon,
                "delta": delta,
                "accountant": accountant,
                "adjacency": adjacency,
            },
            as_json=as_json,
        )
        return
    choices = plan_budget(
        sample_size=sample_size,
        target_epsilon=target_epsilon,
        delta=delta,
        steps=steps,
        epochs=epochs,
        examples=examples,
        hours=hours,
        examples_per_second=examples_per_second,
        bytes_per_example=bytes_per_example,
        batch_sizes=batch_sizes or None,
        least_steps=least_steps,
        runs=None if runs is None else RunLaw(run_law, runs),
        accountant=accountant,
        adjacency=adjacency,
    )
    if as_json:
        budget = {"epsilon": target_epsilon, "delta": delta, "sample_size": sample_size}
        typer.echo(json.dumps({**budget, "choices": [asdict(c) for c in choices]}, indent=2))
        return
    _show(choices, f"epsilon {target_epsilon:g} at delta {delta:g}, {sample_size:,} examples")


def _show(choices: list[Choice], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    caption = (
        "σ: noise multiplier; σ/B: noise in the averaged gradient, in units of max_grad_norm; "
        "SNR: sqrt(steps) B/σ"
    )
    table = Table(title=title, caption=caption)
    for name in ("batch B", "steps", "epochs", "σ", "σ/B", "SNR"):
        table.add_column(name, justify="right", no_wrap=True)
    with_memory = choices[0].memory_bytes is not None
    with_hours = choices[0].hours is not None
    if with_memory:
        table.add_column("batch memory", justify="right", no_wrap=True)
    if with_hours:
        table.add_column("hours", justify="right", no_wrap=True)
    for choice in choices:
        row = [
            f"{choice.batch_size:,}",
            f"{choice.steps:,}",
            f"{choice.epochs:.3g}",
            # Rounded up: the noise printed must be enough.
            f"{math.ceil(choice.noise_multiplier * 1e4) / 1e4:.4f}",
            f"{choice.noise_per_gradient:.3g}",
            f"{choice.signal_to_noise:,.0f}",
        ]
        if with_memory:
            row.append(f"{(choice.memory_bytes or 0) / 2**30:.3g} GiB")
        if with_hours:
            row.append(f"{choice.hours or 0:.3g}")
        table.add_row(*row, style="bold" if choice is choices[0] else None)
    Console().print(table)
