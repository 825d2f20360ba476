"""`dptorch.compat.opacus0`: batches of the user's DataLoader are known, and dealt out as accounted."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dptorch.accounting import SampledGaussian, get_accountant
from dptorch.compat.opacus0 import PrivacyEngine
from dptorch.compat.opacus0.dp_model_inspector import DPModelInspector
from dptorch.compat.opacus0.utils.uniform_sampler import UniformWithReplacementSampler
from dptorch.errors import BudgetExhausted, ConfigurationError, PrivacyError, PrivacyWarning

SIZE = 40


def make(
    rate: float = 0.25, parts: int = 2, workers: int = 0, sampler: Any = None, **settings: Any
) -> tuple[Any, ...]:
    """(engine, model, optimizer, loader), without noise or clipping unless told otherwise."""
    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    draw = torch.Generator().manual_seed(2)
    data = TensorDataset(
        torch.randn(SIZE, 3, generator=draw),
        torch.randint(0, 2, (SIZE,), generator=draw),
        torch.arange(SIZE),
    )
    sampler = sampler or UniformWithReplacementSampler(SIZE, rate)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 1e6, "target_delta": 1e-3} | settings
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = PrivacyEngine(model, sample_rate=rate * parts, **settings)
    engine.attach(optimizer)
    return engine, model, optimizer, loader


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def after_one_step(model: nn.Module, loader: Any, drawn: Tensor) -> Tensor:
    """The weights after a step on the examples `drawn`: their sum, over the expected batch size."""
    twin = nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    x, y, _ = (values[drawn] for values in loader.dataset.tensors)
    (F.cross_entropy(twin(x), y, reduction="sum") / 20).backward()
    return weights(twin) - 0.5 * torch.cat([p.grad.flatten() for p in twin.parameters()])


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_add_up_to_one_batch_of_the_rate_that_is_accounted(workers: int) -> None:
    engine, model, optimizer, loader = make(workers=workers)
    seen: list[Tensor] = []
    for i, (x, y, index) in enumerate(loader):
        part = engine._sampler.current
        before = weights(model)
        F.cross_entropy(model(x), y).backward()
        seen.append(index[: part.examples])
        if i % 2 == 0:
            optimizer.virtual_step()
            assert torch.equal(weights(model), before)
            continue
        drawn = torch.cat(seen)
        assert len(set(drawn.tolist())) == len(drawn)
        expected = after_one_step(model, loader, drawn)
        optimizer.step()
        torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-6)
        seen = []
    assert engine.steps == 2
    assert engine._run.history() == [SampledGaussian(0.0, 0.5, 2)]


def test_independent_draws_would_overlap() -> None:
    """The control of the test above: what 0.x adds up is not one Poisson batch."""
    sampler = UniformWithReplacementSampler(SIZE, 0.25)
    lists = list(sampler)
    assert len({index for one in lists for index in one}) < sum(len(one) for one in lists)


def test_the_parts_are_draws_of_the_sampler_s_own_rate() -> None:
    """Counts of each example in each part, at five standard errors: 400 numbers, a false alarm once in
    4000 runs."""
    rate, rounds, size = 0.2, 3000, 100
    sampler = UniformWithReplacementSampler(size, rate, torch.Generator().manual_seed(0))
    sampler.serve(0.8, lambda: 0)
    counts = np.zeros((4, size))
    for _ in range(rounds):
        for part, indices in enumerate(sampler.deal(4)):
            counts[part, indices] += 1
    spread = math.sqrt(rounds * rate * (1 - rate))
    assert np.abs(counts - rounds * rate).max() < 5 * spread
    assert np.abs(counts - rounds * 0.25).max() > 5 * spread


def test_the_rest_of_an_epoch_is_a_step() -> None:
    engine, model, optimizer, loader = make(rate=0.2, parts=2, noise_multiplier=1.0)
    assert optimizer.privacy_engine.get_privacy_spent(1e-3) == (0.0, math.inf)
    for _ in range(2):
        for i, (x, y, _) in enumerate(loader):
            F.cross_entropy(model(x), y).backward()
            if (i + 1) % 2 == 0 or i + 1 == len(loader):
                optimizer.step()
            else:
                optimizer.virtual_step()
    assert engine._run.history() == [SampledGaussian(1.0, 0.4, 6)]
    epsilon, alpha = optimizer.privacy_engine.get_privacy_spent(1e-3)
    expected = get_accountant("rdp").epsilon(
        [SampledGaussian(1.0, 0.4, 6)], 1e-3, adjacency="zero-out"
    )
    assert epsilon == expected
    assert alpha > 1


def test_a_loop_left_within_a_batch_leaves_nothing_behind() -> None:
    engine, model, optimizer, loader = make(parts=2)
    for x, y, _ in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.virtual_step()
        break
    before, drawn = weights(model), []
    expected: Any = None
    for x, y, index in loader:
        drawn.append(index[: engine._sampler.current.examples])
        if len(drawn) == 2:
            expected = after_one_step(model, loader, torch.cat(drawn))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()  # waits for the last part by itself
        if len(drawn) == 2:
            break
        assert torch.equal(weights(model), before)
    assert engine.steps == 1
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-6)


def test_another_loop_over_the_sampler_ends_the_first() -> None:
    _, model, optimizer, loader = make()

    def train() -> None:
        for x, y, _ in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            assert len(list(loader)) == 4

    with pytest.raises(PrivacyError, match="ended by a newer one"):
        train()


def test_a_batch_that_is_not_the_loaders_is_refused() -> None:
    _, model, optimizer, loader = make()

    def train() -> None:
        for x, y, _ in loader:
            F.cross_entropy(model(torch.cat([x, x])), torch.cat([y, y])).backward()
            optimizer.step()

    with pytest.raises(PrivacyError, match="rows"):
        train()


def test_empty_parts_count_and_weigh_nothing() -> None:
    engine, model, optimizer, loader = make(rate=1 / SIZE, parts=1)
    before = weights(model)
    for x, y, _ in loader:
        part = engine._sampler.current
        weight = 1.0 if part.examples else 1e6
        (weight * 0.0 * F.cross_entropy(model(x), y)).backward()
        optimizer.step()
    assert engine.steps == SIZE
    assert torch.equal(weights(model), before)


def test_a_shuffled_loader_is_not_amplified() -> None:
    model = nn.Linear(3, 2)
    with pytest.warns(PrivacyWarning, match="not amplified by sampling"):
        engine = PrivacyEngine(
            model,
            batch_size=7,
            sample_size=41,
            epochs=1,
            target_epsilon=3.0,
            target_delta=1e-3,
            max_grad_norm=1.0,
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine.attach(optimizer)
    x, y = torch.randn(7, 3), torch.zeros(7).long()
    for _ in range(6):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert engine._run.history() == [SampledGaussian(engine.noise_multiplier, 1.0, 6)]
    assert 2.9 < engine.get_privacy_spent()[0] <= 3.0
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(BudgetExhausted):
        optimizer.step()


def test_detach_gives_model_and_optimizer_back() -> None:
    engine, model, optimizer, _loader = make()
    engine.detach()
    assert not hasattr(optimizer, "privacy_engine")
    assert not model._forward_pre_hooks
    F.cross_entropy(model(torch.randn(4, 3)), torch.zeros(4).long()).backward()
    optimizer.step()
    assert engine.steps == 0


def test_the_inspector_finds_batchnorm() -> None:
    assert DPModelInspector().validate(nn.Linear(2, 2))
    assert not DPModelInspector(should_throw=False).validate(nn.Sequential(nn.BatchNorm1d(8)))


def test_refusals_name_the_way_out() -> None:
    model = nn.Linear(2, 2)
    for settings, said in (
        ({"sample_rate": 0.0123, "noise_multiplier": 1.0}, "batch_sampler="),
        ({"noise_multiplier": 1.0}, "give sample_rate, or both sizes"),
        ({"sample_rate": 0.1, "target_epsilon": 1.0}, "needs epochs"),
        ({"sample_rat": 0.1}, "Did you mean 'sample_rate'"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            PrivacyEngine(model, **settings)
