"""Attacks on how norms and sums are computed, found by a hostile reader: each broke the bound once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dptorch
from dptorch.clipping import LEAST_NORM, AdaptiveClipping, GroupSpec, coefficients
from dptorch.errors import ConfigurationError, NotCoveredError
from dptorch.noise.fingerprint import fingerprint
from dptorch.randomness import RootKey
from dptorch.tape.gradients.vjp import batched_vjp
from tests.oracles.loop import norm_of

# The batches here do not come from the engine's loader, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:a batch did not come from")
BOUND = 0.5


def released(model: nn.Module, x: Tensor, **settings: Any) -> float:
    """Length of the sum for one record, in units of the bound."""
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=1, steps=50, noise_multiplier=0.0, target_delta=1e-3,
        max_grad_norm=BOUND, self_check=False, seed=0, loss_reduction="sum", **settings,
    )  # fmt: skip
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    model(x).square().sum().backward()
    engine._batch.add_pending()
    values = engine._batch.pop_sum().values
    engine.detach()
    return norm_of(values) / BOUND


class Recomputed(nn.Module):
    """Draws other dropout when its checkpoint is recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 50), nn.Linear(50, 1)

    def forward(self, x: Tensor) -> Tensor:
        drop = lambda t: F.dropout(torch.exp(self.inner(t)), 0.9)
        return self.head(checkpoint(drop, x, use_reentrant=False, preserve_rng_state=False))


class Hooked(nn.Module):
    """A gradient that changes from one backward to the next, by numbers that no generator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(6, 3), 0

    def _grow(self, g: Tensor) -> Tensor:
        self.calls += 1
        return g * 10.0**self.calls

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        h.register_hook(self._grow)
        return h


@pytest.mark.parametrize("settings", [{"clipping_mode": "ghost"}, {"memory_budget": 0}], ids=str)
def test_two_passes_draw_the_same_random_numbers(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Recomputed()
    for seed in range(5):
        torch.manual_seed(seed)
        assert released(model, 10 * torch.ones(1, 6), **settings) <= 1 + 1e-5


def test_two_passes_that_differ_otherwise_are_refused() -> None:
    with pytest.raises(NotCoveredError, match="different gradients"):
        released(Hooked(), torch.ones(1, 6), clipping_mode="ghost")


def test_one_op_that_takes_a_parameter_twice_is_refused_in_two_passes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, (6,), self.p, self.p)

    x = torch.randn(1, 6)
    assert released(Twice(), x) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(NotCoveredError, match="several gradients"):
        released(Twice(), x, clipping_mode="ghost")


@pytest.mark.parametrize("style", ["block-wise", "named groups"])
def test_groups_of_which_only_some_have_a_norm_are_refused(style: str) -> None:
    with pytest.raises(ConfigurationError, match="has no norm while others"):
        dptorch.PrivacyPlan(
            sample_rate=1.0, steps=1, noise_multiplier=1.0, max_grad_norm=1.0,
            expected_batch_size=1.0, target_delta=1e-3, clipping_style=style,
            clipping_groups=(GroupSpec("0", 1.0), GroupSpec("2")),
        )  # fmt: skip


@pytest.mark.parametrize("positions", [1, 2, 40])
@pytest.mark.parametrize("mode", ["auto", "BK-ghost", "BK-MixGhostClip", "non-ghost"])
def test_factors_that_underflow_beside_huge_ones_are_measured(mode: str, positions: int) -> None:
    """A gradient of length about 1 as the product of 1e-23 and 1e+18 many times over."""
    model = nn.Linear(64, 4096, bias=False)
    scale = 1e-23
    weigh: Callable[[Tensor], Tensor] = lambda out: out * scale
    torch.manual_seed(0)
    x = 1e18 * torch.randn(1, positions, 64).sign()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return weigh(self.inner(x))

    engine = dptorch.PrivacyEngine(
        Scaled(), sample_rate=1.0, sample_size=1, steps=5, noise_multiplier=0.0, target_delta=1e-3,
        max_grad_norm=1e-4, self_check=False, seed=0, loss_reduction="sum", clipping_mode=mode,
    )  # fmt: skip
    engine.attach(torch.optim.SGD(engine.model.parameters(), lr=0.0))
    engine.model(x).sum().backward()
    engine._batch.add_pending()
    found = engine._batch.pop_sum().values["inner.weight"]
    assert found.norm().item() == pytest.approx(1e-4, rel=0.02)


@pytest.mark.parametrize("mode", ["auto", "BK-ghost", "non-ghost"])
def test_a_factor_too_long_for_its_square_beside_one_that_underflows(mode: str) -> None:
    """The longer factor's squared length is infinite, its length is not, and the other's is 0."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(1, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 1e-23

    engine = dptorch.PrivacyEngine(
        Scaled(), sample_rate=1.0, sample_size=1, steps=5, noise_multiplier=0.0, target_delta=1e-3,
        self_check=False, seed=0, loss_reduction="sum", clipping_mode=mode,
    )  # fmt: skip
    engine.attach(torch.optim.SGD(engine.model.parameters(), lr=0.0))
    engine.model(torch.full((1, 1), 1e25)).sum().backward()
    engine._batch.add_pending()
    found = engine._batch.pop_sum().values["inner.weight"]
    assert found.norm().item() <= 1.02


def test_a_bound_below_what_float32_can_measure_is_refused() -> None:
    """Squares of gradients that short are 0, and so were their norms: nothing was clipped."""
    with pytest.raises(ConfigurationError, match="max_grad_norm"):
        dptorch.PrivacyEngine(
            nn.Linear(4, 3), sample_rate=1.0, sample_size=8, steps=5, noise_multiplier=1.0,
            target_delta=1e-3, max_grad_norm=1e-25,
        )  # fmt: skip
    with pytest.raises(ConfigurationError, match="at least"):
        coefficients(torch.zeros(3), 1e-25)
    adaptive = AdaptiveClipping()
    norms = [1e-9]
    for _ in range(1000):
        norms = adaptive.follow(norms, torch.tensor([50.0]), expected_batch_size=100)
    assert norms == [LEAST_NORM]


def test_an_op_that_has_no_gradient_for_some_examples() -> None:
    """What autograd.Function leaves out is zero, not what was in memory before."""

    class Picky(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            return w.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return g if bool(g.sum() > 0) else None

    w = torch.ones(3, requires_grad=True)
    out = Picky.apply(w)
    wanted = torch.tensor([[0.0] * 3, [1.0] * 3, [0.0] * 3, [2.0] * 3])
    torch.empty(4, 3).fill_(7.0)  # what new memory may hold
    [found] = batched_vjp([out], [w], lambda start, stop: [wanted[start:stop]], 4, 2**19)
    assert found is not None
    assert torch.equal(found, wanted)


def test_any_change_of_the_sum_changes_its_fingerprint() -> None:
    """Also one that keeps the mean, and one of a single bit anywhere."""
    torch.manual_seed(0)
    key, x = RootKey.from_seed(0), torch.randn(3000, 64)
    before = fingerprint({"w": x}, key, 3)
    assert before == fingerprint({"w": x.clone()}, key, 3)
    for row in range(0, 3000, 37):
        moved = x.clone()
        direction = torch.randn(64)
        moved[row] += 1e-3 * (direction - direction.mean())
        assert fingerprint({"w": moved}, key, 3) != before
        bit = x.clone()
        bit[row, row % 64] = torch.nextafter(bit[row, row % 64], torch.tensor(9.0))
        assert fingerprint({"w": bit}, key, 3) != before
    swapped = x[torch.randperm(3000)]
    assert fingerprint({"w": swapped}, key, 3) != before


def test_the_fingerprint_of_other_devices_sees_every_bit() -> None:
    from dptorch.noise.fingerprint import _weighed_bits

    x = torch.randn(1000)
    before = _weighed_bits(x, 7)
    for i in range(0, 1000, 13):
        y = x.clone()
        y[i] = torch.nextafter(y[i], torch.tensor(9.0))
        assert not torch.equal(_weighed_bits(y, 7), before)
    assert torch.equal(_weighed_bits(x.clone(), 7), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fingerprint_of_other_devices_sees_two_signs_change(dtype: torch.dtype) -> None:
    """Odd weights would cancel: twice the highest bit is 0 modulo 2^64."""
    from dptorch.noise.fingerprint import _weighed_bits

    x = torch.randn(1000, dtype=dtype)
    for i in range(0, 1000, 50):
        y = x.clone()
        y[i], y[(i + 7) % 1000] = -y[i], -y[(i + 7) % 1000]
        assert not torch.equal(_weighed_bits(y, i), _weighed_bits(x, i))


def test_a_frozen_parameter_with_a_gradient_from_before_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model(torch.randn(5, 4)).sum().backward()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=5, steps=5, noise_multiplier=1.0, target_delta=1e-3
    )
    with pytest.raises(ConfigurationError, match="holds a gradient from before"):
        engine.attach(optimizer)
    optimizer.zero_grad()
    engine.attach(optimizer)
