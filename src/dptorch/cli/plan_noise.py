"""`dptorch plan --mechanism`: what noise that is correlated over steps leaves in the model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dptorch.cli.calibrate import check_plot
from dptorch.errors import ConfigurationError

if TYPE_CHECKING:
    from dptorch.accounting import Workload
    from dptorch.plan.bands import BandChoice

__all__ = ["compare_noise"]

#: Budgets of the plot, over the one that was asked for.
_FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
_WHEN = {
    "gaussian": "independent noise: the tightest amplification; best at small ε",
    "banded": "cyclic Poisson batches: best from moderate ε on; a buffer of the model for a band",
    "inverse-banded": "batches in the order of the data, for what cannot be drawn from; no buffers",
    "buffered-toeplitz": "the same for long runs, by a few buffers of the model",
}


def compare_noise(
    mechanism: str,
    *,
    bands: str,
    workload: tuple[str, float, str],
    plot: Path | None,
    batch_sizes: Sequence[int],
    sample_size: int,
    length: Mapping[str, Any],
    budget: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Print what numbers of bands ("banded") or mechanisms ("all") give at one budget.

    Raises:
        ConfigurationError: there is not one batch size and one length, or an option of the other.

    Args:
        workload: what coefficients are for: their name, the momentum and the decay of "sgd".
    """
    from dptorch.plan.bands import best_bands, compare_bands, compare_mechanisms

    rate, steps = _run(batch_sizes, sample_size, length)
    run: dict[str, Any] = {"sample_rate": rate, "steps": steps, **budget}
    if plot is not None:
        if mechanism != "all":
            raise ConfigurationError(f"plot={str(plot)!r} is for mechanism='all'. Leave it out.")
        check_plot(plot)
    coefficients = _coefficients(mechanism, workload, steps)
    if mechanism == "all":
        found = compare_mechanisms(**run)
        best = min(found, key=lambda name: found[name].error)
        rows = [(name, choice, _WHEN[name]) for name, choice in found.items()]
    else:
        only = None if bands == "auto" else [1, _number(bands)]
        choices = compare_bands(**run, bands=only, coefficients=coefficients)
        best = str(best_bands(choices).bands)
        rows = [(str(choice.bands), choice, "") for choice in choices]
    if as_json:
        named = {name: asdict(choice) for name, choice, _ in rows}
        about = {"epsilon": budget["target_epsilon"], "delta": budget["delta"], "steps": steps}
        typer.echo(json.dumps({**about, "best": best, "choices": named}, indent=2))
    else:
        title = (
            f"epsilon {budget['target_epsilon']:g} at delta {budget['delta']:g}, {steps:,} steps"
        )
        _show(rows, best, title, "mechanism" if mechanism == "all" else "bands")
    if plot is not None:
        _draw(run, plot)
        if not as_json:
            typer.echo(f"plot {plot}")


def _run(
    batch_sizes: Sequence[int], sample_size: int, length: Mapping[str, Any]
) -> tuple[float, int]:
    """(sampling rate, steps) of the run that is planned."""
    if len(batch_sizes) != 1:
        raise ConfigurationError(
            f"batch_sizes={list(batch_sizes)}: correlated noise is compared for one batch size. Give "
            "it once, for example --batch-size 256."
        )
    epochs, steps = length["epochs"], length["steps"]
    if (epochs is None) == (steps is None):
        raise ConfigurationError(
            f"epochs={epochs!r} and steps={steps!r}: give exactly one, the length of the run."
        )
    rate = batch_sizes[0] / sample_size
    if not 0 < rate <= 1:
        raise ConfigurationError(
            f"batch_size={batch_sizes[0]!r} must be between 1 and sample_size={sample_size!r}."
        )
    return rate, steps if epochs is None else math.ceil(round(epochs / rate, 6))


def _coefficients(mechanism: str, workload: tuple[str, float, str], steps: int) -> str | Workload:
    from dptorch.accounting import Workload
    from dptorch.training.schedules import schedule_of

    coefficients, momentum, decay = workload
    if coefficients == "sgd" and mechanism == "banded":
        return Workload(momentum, schedule_of(decay, steps))
    if (momentum, decay) != (0.0, "constant"):
        raise ConfigurationError(
            f"momentum={momentum!r} and decay={decay!r} are for mechanism='banded' with "
            "coefficients='sgd'. Add them, or leave these out."
        )
    if mechanism == "all" and coefficients != "prefix-sum":
        raise ConfigurationError(
            f"coefficients={coefficients!r} is for mechanism='banded': mechanisms are compared by the "
            "noise of prefix sums. Leave it out."
        )
    return coefficients


def _number(bands: str) -> int:
    if not bands.isdecimal() or int(bands) < 1:
        raise ConfigurationError(f"bands={bands!r} must be a whole number or 'auto'.")
    return int(bands)


def _show(rows: Sequence[tuple[str, BandChoice, str]], best: str, title: str, heading: str) -> None:
    from rich.console import Console
    from rich.table import Table

    caption = (
        "σ: noise multiplier; noise: its root mean square in sums of gradients, which the parameters "
        "of SGD are, in units of max_grad_norm"
    )
    table = Table(title=title, caption=caption)
    table.add_column(heading, justify="left" if heading == "mechanism" else "right", no_wrap=True)
    for name in ("σ", "noise", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    if heading == "mechanism":
        table.add_column("bands", justify="right")
        table.add_column("when")
    independent = rows[0][1].error
    for name, choice, when in rows:
        row = [
            name,
            # Rounded up: the noise printed must be enough.
            f"{math.ceil(choice.noise_multiplier * 1e4) / 1e4:.4f}",
            f"{choice.error:.4g}",
            f"{choice.error / independent - 1:+.0%}",
        ]
        if heading == "mechanism":
            row += [str(choice.bands), when]
        table.add_row(*row, style="bold" if name == best else None)
    Console().print(table)


def _draw(run: Mapping[str, Any], path: Path) -> None:
    """The noise that each mechanism leaves, against ε."""
    from matplotlib.figure import Figure

    from dptorch.plan.bands import compare_mechanisms

    budgets = [run["target_epsilon"] * factor for factor in _FACTORS]
    found = [compare_mechanisms(**{**run, "target_epsilon": epsilon}) for epsilon in budgets]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in found[0]:
        axes.plot(budgets, [each[name].error for each in found], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="epsilon", ylabel="noise in sums of gradients / C")
    axes.set_title(f"{run['steps']:,} steps at rate {run['sample_rate']:.3g}")
    axes.legend()
    figure.savefig(path)
