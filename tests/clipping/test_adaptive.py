"""Adaptive clipping: the norm finds its quantile; sum and counts together cost what the plan says."""

import math

import pytest
import torch
from torch import nn

import dptorch
from dptorch.clipping import COUNTS, AdaptiveClipping, ClippingGroup, centred_counts, noise_scales
from dptorch.errors import ConfigurationError

# The batches here do not come from the engine's loader, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:a batch did not come from")
B = 64


def engine_on(model: nn.Module, **overrides: object) -> dptorch.PrivacyEngine:
    settings: dict[str, object] = {
        "sample_rate": 1.0, "sample_size": B, "steps": 1000, "noise_multiplier": 0.0,
        "target_delta": 1e-3, "seed": 0, "self_check": False,
    }  # fmt: skip
    return dptorch.PrivacyEngine(model, **(settings | overrides))  # type: ignore[arg-type]


def scales_of(groups: int, noise_multiplier: float, count_stddev: float) -> tuple[float, ...]:
    parts = tuple(ClippingGroup(str(i), (str(i),), 1.0, 1 / groups) for i in range(groups))
    scales = noise_scales(
        parts, [1.0] * groups, AdaptiveClipping(count_stddev=count_stddev), noise_multiplier, 100.0
    )
    return scales["0"], scales[COUNTS]


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 4.0])
def test_sum_and_counts_cost_together_what_the_plan_says(
    groups: int, noise_multiplier: float
) -> None:
    scale, count_scale = scales_of(groups, noise_multiplier, count_stddev=20.0)
    # In units of the noise, an example moves each group by C / scale and each count by half.
    moved = groups * (1 / scale) ** 2 + groups * (0.5 / count_scale) ** 2
    assert moved == pytest.approx(1.0, rel=1e-12)
    assert noise_multiplier * count_scale == pytest.approx(20.0)


def test_one_group_has_the_noise_of_the_paper() -> None:
    """Andrew et al. 2021, theorem 1: z_sum = (z^-2 - (2 sigma_b)^-2)^(-1/2)."""
    z, sigma_b = 1.3, 7.0
    scale, _ = scales_of(1, z, sigma_b)
    assert z * scale == pytest.approx((z**-2 - (2 * sigma_b) ** -2) ** -0.5, rel=1e-12)


def test_counts_that_cost_more_than_the_plan_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"count_stddev well above 0\.5"):
        scales_of(1, 1.0, count_stddev=0.4)


def lengths_model(lengths: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """A model whose per-example gradients are vectors of the given lengths."""
    model = nn.Linear(3, 1, bias=False)
    directions = torch.nn.functional.normalize(torch.randn(len(lengths), 3), dim=1)
    return model, directions * lengths[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_norm_finds_the_quantile(quantile: float) -> None:
    torch.manual_seed(0)
    lengths = torch.logspace(-1, 1, B)
    model, x = lengths_model(lengths)
    engine = engine_on(model, max_grad_norm=100.0, adaptive_clipping=quantile)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for _ in range(150):
        model(x).mean().backward()
        optimizer.step()
    fraction = (lengths <= engine.max_grad_norm).float().mean().item()
    assert fraction == pytest.approx(quantile, abs=2.5 / B)


def test_each_group_follows_its_own_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 1))
    engine = engine_on(model, clipping_style="param-wise", adaptive_clipping=True)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    x = torch.randn(B, 3)
    for _ in range(120):
        model(x).square().mean().backward()
        optimizer.step()
    engine.detach()
    with dptorch.record(model) as tape:
        model(x).square().sum().backward()
    squared = tape.squared_norms()
    for group, norm in zip(engine._batch.groups, engine._batch.clipping_norms, strict=True):
        [name] = group.parameters
        assert (squared[name].sqrt() <= norm).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_neighbours_differ_by_at_most_one_unit_of_noise_sum_and_count_together() -> None:
    """Everything that is released, before noise, in units of its own noise."""
    torch.manual_seed(0)
    lengths = torch.logspace(-2, 2, B)
    model, x = lengths_model(lengths)
    worst = 0.0
    for i in (0, B // 2, B - 1):
        released = []
        for rows in (x, torch.cat([x[:i], x[i + 1 :]])):
            engine = engine_on(
                model, noise_multiplier=1.0, adaptive_clipping=AdaptiveClipping(count_stddev=1.0)
            )
            engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
            model(rows).mean().backward()
            engine._batch.add_pending()
            released.append(engine._batch.pop_sum())
            engine.detach()
        first, second = released
        moved = math.sqrt(
            sum(
                ((first.values[n] - second.values[n]) / first.scale(n)).square().sum().item()
                for n in first.values
            )
        )
        worst = max(worst, moved)
        assert moved <= 1 + 1e-6
        # The broken twin, noise scales that forget the count, would be caught:
        count = abs((first.values[COUNTS] - second.values[COUNTS]).item())
        assert count == pytest.approx(0.5)
    assert worst == pytest.approx(1.0, abs=1e-4)


def test_a_batch_that_was_dropped_is_not_counted() -> None:
    model = nn.Linear(3, 1)
    engine = engine_on(model, adaptive_clipping=True)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    x = torch.randn(B, 3)
    model(x).mean().backward()
    model(x)  # the next forward clips what has arrived
    optimizer.zero_grad()
    model(x).mean().backward()
    engine._batch.add_pending()
    assert abs(engine._batch.pop_sum().values[COUNTS].item()) <= B / 2


def test_the_norm_survives_a_checkpoint() -> None:
    model = nn.Linear(3, 1)
    engine = engine_on(model, noise_multiplier=1.0, adaptive_clipping=True)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for _ in range(3):
        model(torch.randn(B, 3)).mean().backward()
        optimizer.step()
    state, norm = engine.state_dict(), engine.max_grad_norm
    engine.detach()
    resumed = engine_on(model, noise_multiplier=1.0, adaptive_clipping=True)
    assert resumed.max_grad_norm == 1.0 != norm
    resumed.load_state_dict(state)
    assert resumed.max_grad_norm == norm


def test_counts_are_centred() -> None:
    fits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert centred_counts(fits).tolist() == [0.5, -1.5]
    assert centred_counts(torch.zeros(2, 0)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [{"quantile": 1.0}, {"learning_rate": 0.0}, {"count_stddev": -1.0}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="must lie between"):
        AdaptiveClipping(**bad)


def test_the_plan_round_trips() -> None:
    plan = dptorch.make_plan(
        batch_size=10, sample_size=100, steps=5, noise_multiplier=1.0, adaptive_clipping=0.3,
        clipping_style={"a*": 1.0, "*": (0.5)},
    )  # fmt: skip
    assert dptorch.PrivacyPlan.from_json(plan.to_json()) == plan
    assert plan.max_grad_norm == pytest.approx(math.hypot(1.0, 0.5))
