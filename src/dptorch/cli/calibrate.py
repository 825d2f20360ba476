"""`dptorch calibrate`: find the noise that a budget needs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dptorch.cli.options import AsJson, RunOptions, grouped, plan_option

if TYPE_CHECKING:
    from dptorch.plan import PrivacyPlan

__all__ = ["calibrate", "check_plot"]


@grouped
def calibrate(
    target_epsilon: Annotated[float, plan_option("target_epsilon")],
    run: RunOptions,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Also draw ε against steps, for several noise multipliers, into this file "
            "(.png, .svg, .pdf).",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the smallest noise multiplier that keeps DP-SGD within a budget.

    [bold]Examples[/]

    [cyan]dptorch calibrate --epsilon 3 --batch-size 256 --sample-size 60000 --epochs 20[/]

    [cyan]dptorch calibrate --epsilon 8 --sample-rate 0.01 --steps 2000 --delta 1e-6 --plot eps.png[/]
    """
    from dptorch.plan import make_plan

    if plot is not None:
        check_plot(plot)
    plan = make_plan(**run.settings(target_epsilon=target_epsilon))
    if plot is not None:
        _draw(plan, target_epsilon, plot)
    if as_json:
        typer.echo(plan.to_json().rstrip())
        return
    # Rounded up: the noise printed must be enough.
    shown = math.ceil(plan.noise_multiplier * 1e4) / 1e4
    typer.echo(
        f"noise multiplier {shown:.4f} for epsilon {target_epsilon:g} at delta "
        f"{plan.target_delta:g} over {plan.steps:,} steps"
    )
    if plot is not None:
        typer.echo(f"plot {plot}")


def check_plot(path: Path) -> None:
    """Raise ConfigurationError unless a plot can be drawn into the file `path`."""
    from dptorch.errors import ConfigurationError

    try:
        import matplotlib  # noqa: F401
    except ImportError as problem:
        raise ConfigurationError(
            "--plot needs matplotlib, which is not installed. Run: pip install 'dptorch[report]'."
        ) from problem
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigurationError(f"plot={str(path)!r} must end in .png, .svg or .pdf.")
    if not path.absolute().parent.is_dir():
        raise ConfigurationError(
            f"plot={str(path)!r}: there is no folder {path.absolute().parent}."
        )


def _draw(plan: PrivacyPlan, target: float, path: Path) -> None:
    """ε after 1 .. 2T steps, for the noise found and for more and less of it."""
    from dptorch import accounting
    from dptorch.training.run_charts import BLUE, DASHES, INK, MUTED, canvas

    last = 2 * plan.steps
    # Planning accuracy will do for a curve; where `exact` does not cover the event, the plan's own
    # accountant does, at up to seconds a point.
    accountant, points, factors = (
        accounting.get_accountant("exact"),
        24,
        [0.7, 0.85, 1.0, 1.25, 1.6],
    )
    if not accountant.covers(plan.event(1)):
        accountant, points, factors = (
            accounting.get_accountant(plan.accountant),
            6,
            [0.8, 1.0, 1.25],
        )
    counts = sorted({max(1, round(last * (k / points) ** 2)) for k in range(1, points + 1)})
    law = f"{plan.sampling} sampling, rate {plan.sample_rate:.4g}, {plan.adjacency.value}"
    figure, axes = canvas("steps", f"ε at δ = {plan.target_delta:g}; {law}", size=(7, 4.5))
    for factor, dashes in zip(factors, DASHES, strict=False):
        sigma = plan.noise_multiplier * factor
        costs = [
            accountant.epsilon(
                [_scaled(plan, sigma, n)], plan.target_delta, adjacency=plan.adjacency
            )
            for n in counts
        ]
        axes.plot(
            counts, costs, color=BLUE, linestyle="solid" if factor == 1 else dashes,
            linewidth=2.5 if factor == 1 else 1.2, label=f"{sigma:.3g}",
        )  # fmt: skip
    axes.axhline(target, color=MUTED, linestyle=(0, (2, 3)), linewidth=1)
    axes.axvline(plan.steps, color=MUTED, linestyle=(0, (2, 3)), linewidth=1)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
    axes.annotate(f"target ε = {target:g}", (0.99, target), color=MUTED, fontsize=9, **place)
    axes.set(xlim=(0, last), ylim=(0, None))
    axes.legend(title="noise multiplier", frameon=False, labelcolor=INK)
    figure.savefig(path, dpi=150)


def _scaled(plan: PrivacyPlan, sigma: float, steps: int) -> Any:
    from dataclasses import replace

    return replace(plan, noise_multiplier=sigma).event(steps)
