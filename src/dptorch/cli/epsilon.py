"""`dptorch epsilon`: compute the ε of a run with given noise."""

from __future__ import annotations

import json
import math
from typing import Annotated

import typer

from dptorch.cli.options import AsJson, RunOptions, grouped, plan_option

__all__ = ["epsilon"]


@grouped
def epsilon(
    noise_multiplier: Annotated[float, plan_option("noise_multiplier")],
    run: RunOptions,
    runs: Annotated[
        float | None,
        typer.Option(
            help="Mean number of such runs. The best of them by a private score is published.",
            show_default=False,
        ),
    ] = None,
    run_law: Annotated[
        str,
        typer.Option(help="How --runs is drawn: geometric, logarithmic, poisson or fixed."),
    ] = "geometric",
    as_json: AsJson = False,
) -> None:
    """Compute the ε of DP-SGD with given noise.

    [bold]Examples[/]

    [cyan]dptorch epsilon --noise-multiplier 1.1 --batch-size 256 --sample-size 60000 --epochs 60[/]

    [cyan]dptorch epsilon --noise-multiplier 3.3 --sample-rate 0.25 --steps 80 --delta 1e-5[/]

    [cyan]dptorch epsilon --noise-multiplier 2 --batch-size 60 --sample-size 6000 --epochs 9
    --sampling shuffled[/]

    Ten trials with other learning rates, the best by validation accuracy on private data:

    [cyan]dptorch epsilon --noise-multiplier 2 --sample-rate 0.01 --steps 1000 --delta 1e-5 --runs 10[/]
    """
    from dptorch.accounting import RunLaw, tuned_epsilon
    from dptorch.plan import make_plan

    law = None if runs is None else RunLaw(run_law, runs)
    plan = make_plan(**run.settings(noise_multiplier=noise_multiplier))
    spent = plan.epsilon()
    tuned = None
    if law is not None:
        event = plan.event(plan.steps)
        tuned = tuned_epsilon([event], plan.target_delta, law, adjacency=plan.adjacency)
    if as_json:
        found = {"epsilon": spent, "plan": json.loads(plan.to_json())}
        if law is not None:
            found |= {"epsilon_with_tuning": tuned, "mean_runs": runs, "run_law": run_law}
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(
        f"epsilon {_rounded_up(spent)} at delta {plan.target_delta:g} after {plan.steps:,} steps"
    )
    if tuned is not None:
        typer.echo(
            f"epsilon {_rounded_up(tuned)} if the best of {runs:g} such runs is published "
            f"({'exactly' if run_law == 'fixed' else f'{run_law} law, mean'} {runs:g})"
        )


def _rounded_up(epsilon: float) -> str:
    # A bound shown smaller than it is would be false.
    return "inf" if math.isinf(epsilon) else f"{math.ceil(epsilon * 1e4) / 1e4:.4f}"
