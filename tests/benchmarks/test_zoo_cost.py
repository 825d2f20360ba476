"""What the cost of the zoo is measured of, and how it is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.oracles.loop import relative_error

import dptorch
from benchmarks import zoo_cost
from dptorch.bench.workloads import Workload

SMALL: dict[str, Callable[[], Workload]] = {
    "recommender": lambda: zoo_cost.recommender(rows=20, d=4),
    "graph_network": lambda: zoo_cost.graph_network(graphs=3, nodes=5, d=8),
    "diffusion_unet": zoo_cost.diffusion_unet,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo_cost.OTHERS)
def test_the_models_that_are_no_image_models_are_exact_too(name: str) -> None:
    made = SMALL[name]()
    model = made.model.double()
    batch = [x[:3].double() if x.is_floating_point() else x[:3] for x in made.inputs]
    with dptorch.record(model) as tape:
        losses = made.losses(model, *batch)
    losses.sum().backward()
    norms = tape.norms()
    for i in range(3):
        model.zero_grad()
        made.losses(model, *(x[i : i + 1] for x in batch)).sum().backward()
        squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
        assert relative_error(norms[i], sum(squares) ** 0.5) < 1e-9  # type: ignore[arg-type]


def test_the_worst_comes_first_and_what_failed_says_why() -> None:
    rows = [
        {"model": "good", "parameters": 2_000_000, "ratio": 1.2},
        {"model": "bad", "parameters": 3_000_000, "ratio": 2.5},
        {"model": "none", "error": "no such model"},
    ]
    lines = zoo_cost.section({"rows": rows, "facts": {"machine": "a processor"}}).splitlines()
    assert "2 models: median 2.50, worst 2.50, 1 above 2." in lines
    table = lines[lines.index("|---|--:|--:|") + 1 :]
    assert table[:3] == [
        "| bad | 3.0 M | 2.50 |",
        "| good | 2.0 M | 1.20 |",
        "| none | | no such model |",
    ]
