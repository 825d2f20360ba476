"""`dptorch.compat.opacus` under the scenarios that Opacus tests its own engine with, and beside Opacus.

The installed opacus 1.6 is the oracle: without noise, on the same batches, both make the same step.
"""

import math
import warnings
from typing import Any

import opacus
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dptorch.accounting import epsilon as epsilon_of
from dptorch.compat.opacus import GradSampleModule, PrivacyEngine
from dptorch.compat.opacus.accountants import PRVAccountant
from dptorch.compat.opacus.data_loader import DPDataLoader
from dptorch.errors import PrivacyWarning
from tests.compat.opacus_setup import (
    BATCH,
    Model,
    cnn,
    data_for,
    lstm,
    mlp,
    private,
    train,
    weights,
)


def theirs(model: Model, convert: bool = False, **settings: Any) -> Tensor:
    """The weights after an epoch with opacus itself."""
    module = model()
    if convert:
        module = opacus.validators.ModuleValidator.fix(module)
    settings = {"noise_multiplier": 0.0, "poisson_sampling": False} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, optimizer, loader = opacus.PrivacyEngine().make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9),
            data_loader=DataLoader(data_for(model), batch_size=BATCH),
            **settings,
        )
        return train(module, optimizer, loader)


# -- beside opacus -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.05, 1e6], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("model", [mlp, cnn, lstm])
def test_steps_are_those_of_opacus(model: Model, bound: float) -> None:
    _, module, optimizer, loader = private(model, max_grad_norm=bound)
    expected = theirs(model, convert=model is lstm, max_grad_norm=bound)
    before = weights(model())
    found = train(module, optimizer, loader)
    assert (expected - before).abs().max() > 1e-3  # a step that does nothing agrees with anything
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_steps_per_layer_are_those_of_opacus() -> None:
    norms = [0.05, 0.01, 0.1, 0.02]
    _, module, optimizer, loader = private(max_grad_norm=norms, clipping="per_layer")
    found = train(module, optimizer, loader)
    expected = theirs(mlp, max_grad_norm=norms, clipping="per_layer")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    flat = theirs(mlp, max_grad_norm=math.hypot(*norms))
    assert (flat - expected).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["ew", "functorch", "ghost"])
def test_every_mode_makes_the_same_step(mode: str) -> None:
    expected = theirs(mlp, max_grad_norm=0.05)
    _, module, optimizer, *criterion, loader = private(max_grad_norm=0.05, grad_sample_mode=mode)
    assert len(criterion) == (mode == "ghost")
    torch.testing.assert_close(train(module, optimizer, loader), expected, rtol=0, atol=1e-5)


def test_ghost_returns_the_criterion_second_to_last() -> None:
    criterion = nn.NLLLoss()
    _, module, optimizer, returned, loader = private(grad_sample_mode="ghost", criterion=criterion)
    assert returned is criterion
    assert isinstance(module, GradSampleModule)
    assert isinstance(loader, DPDataLoader)
    assert optimizer.privacy_engine is not None


def test_a_sum_loss_is_as_in_opacus() -> None:
    def step(module: nn.Module, optimizer: Any, loader: Any) -> Tensor:
        batches = iter(loader)
        x, y = next(batches)
        F.cross_entropy(module(x), y, reduction="sum").backward()
        optimizer.step()
        return weights(module)

    settings: dict[str, Any] = {"max_grad_norm": 0.05, "loss_reduction": "sum"}
    _, module, optimizer, loader = private(**settings)
    theirs_module = mlp()
    made = opacus.PrivacyEngine().make_private(
        module=theirs_module,
        optimizer=torch.optim.SGD(theirs_module.parameters(), lr=0.5, momentum=0.9),
        data_loader=DataLoader(data_for(mlp), batch_size=BATCH),
        noise_multiplier=0.0,
        poisson_sampling=False,
        **settings,
    )
    torch.testing.assert_close(step(module, optimizer, loader), step(*made), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_epsilon_is_near_that_of_opacus(sigma: float) -> None:
    a, b = PRVAccountant(), opacus.accountants.PRVAccountant()
    for accountant in (a, b):
        for _ in range(200):
            accountant.step(noise_multiplier=sigma, sample_rate=0.02)
    assert a.history == b.history
    # Theirs adds its error of 0.01 to what it finds.
    assert b.get_epsilon(1e-5) - 0.015 < a.get_epsilon(1e-5) < b.get_epsilon(1e-5) + 1e-3


# -- equals vanilla if and only if there is no clipping and no noise -----------------------------------


def vanilla() -> Tensor:
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    return train(module, optimizer, DataLoader(data_for(mlp), batch_size=BATCH))


@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("bound", [0.01, 1e6])
def test_equals_vanilla_only_without_clipping_and_noise(sigma: float, bound: float) -> None:
    _, module, optimizer, loader = private(noise_multiplier=sigma, max_grad_norm=bound)
    difference = (train(module, optimizer, loader) - vanilla()).abs().max().item()
    if sigma == 0.0 and bound == 1e6:
        assert difference < 1e-6
    else:
        assert difference > 1e-3


# -- clipping ----------------------------------------------------------------------------------------


def gradient_of_one_example(**settings: Any) -> dict[str, Tensor]:
    """What one step on one example hands to the optimizer, under a sum loss."""
    module = mlp()
    engine = PrivacyEngine()
    made = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(torch.full((1, 6), 9.0), torch.zeros(1).long())),
        noise_multiplier=0.0,
        loss_reduction="sum",
        **settings,
    )
    model, optimizer, loader = made
    for x, y in loader:
        F.cross_entropy(model(x), y, reduction="sum").backward()
        optimizer.step()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_flat_clipping_bounds_the_whole_gradient() -> None:
    found = gradient_of_one_example(max_grad_norm=0.3)
    assert math.isclose(
        torch.cat([g.flatten() for g in found.values()]).norm().item(), 0.3, rel_tol=1e-4
    )


def test_per_layer_clipping_bounds_each_parameter() -> None:
    norms = [0.3, 0.1, 0.2, 0.05]
    found = gradient_of_one_example(max_grad_norm=norms, clipping="per_layer")
    assert [g.norm().item() for g in found.values()] == pytest.approx(norms, rel=1e-4)


def test_adaptive_clipping_moves_the_norm_within_its_bounds() -> None:
    settings: dict[str, Any] = {
        "clipping": "adaptive",
        "max_grad_norm": 1.0,
        "noise_multiplier": 0.1,
        "target_unclipped_quantile": 0.5,
        "clipbound_learning_rate": 2.0,
        "unclipped_num_std": 1.0,
    }
    torch.manual_seed(0)  # by chance the norm could end where the bounds are
    seeded = torch.Generator().manual_seed(7)
    _, module, optimizer, loader = private(
        **settings, max_clipbound=10.0, min_clipbound=1e-4, noise_generator=seeded
    )
    train(module, optimizer, loader, epochs=2)
    moved = optimizer.max_grad_norm
    assert moved != 1.0
    _, module, optimizer, loader = private(**settings, max_clipbound=1.05, min_clipbound=0.95)
    train(module, optimizer, loader, epochs=2)
    assert 0.95 <= optimizer.max_grad_norm <= 1.05
    assert not 0.95 <= moved <= 1.05, moved


# -- determinism -------------------------------------------------------------------------------------


def test_a_noise_generator_repeats_a_run_and_nothing_else_does() -> None:
    def run(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        torch.manual_seed(3)
        _, module, optimizer, loader = private(
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            noise_generator=generator,
            poisson_sampling=True,
        )
        return train(module, optimizer, loader)

    assert torch.equal(run(7), run(7))
    assert not torch.equal(run(7), run(8))
    assert not torch.equal(run(None), run(None))  # a global seed makes no noise known


def test_a_noise_generator_is_said_to_be_for_tests() -> None:
    module = mlp()
    with pytest.warns(PrivacyWarning, match="not private"):
        PrivacyEngine().make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
            data_loader=DataLoader(data_for(mlp), batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            noise_generator=torch.Generator().manual_seed(0),
        )


# -- targets and what is spent -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("target", [0.8, 6.0])
def test_a_target_epsilon_is_met_and_used(accountant: str, target: float) -> None:
    engine, module, optimizer, loader = private(
        engine=PrivacyEngine(accountant=accountant),
        target_epsilon=target,
        target_delta=1e-3,
        epochs=3,
        max_grad_norm=1.0,
        poisson_sampling=True,
    )
    train(module, optimizer, loader, epochs=3)
    assert 0.97 * target < engine.get_epsilon(1e-3) <= target
    assert sum(n for _, _, n in engine.accountant.history) == 9


def test_what_is_spent_is_what_was_done() -> None:
    engine, module, optimizer, loader = private(
        noise_multiplier=1.1, max_grad_norm=1.0, poisson_sampling=True
    )
    assert engine.get_epsilon(1e-5) == 0.0  # nothing was released
    train(module, optimizer, loader, epochs=2)
    assert engine.accountant.history == [(1.1, 1 / 3, 6)]
    expected = epsilon_of(sample_rate=1 / 3, noise_multiplier=1.1, steps=6, delta=1e-5)
    assert engine.get_epsilon(1e-5) == pytest.approx(expected)


def test_a_shuffled_loader_is_accounted_as_one() -> None:
    module = mlp()
    engine = PrivacyEngine()
    with pytest.warns(PrivacyWarning, match="not amplified"):
        model, optimizer, loader = engine.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(data_for(mlp), batch_size=BATCH, shuffle=True),
            noise_multiplier=2.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )
    train(model, optimizer, loader, epochs=2)
    assert engine.accountant.history == [(2.0, 1.0, 2)]
    poisson = epsilon_of(sample_rate=1 / 3, noise_multiplier=2.0, steps=6, delta=1e-5)
    assert engine.get_epsilon(1e-5) > poisson


def test_two_models_of_one_engine_add_up() -> None:
    engine, *first = private(noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=True)
    train(*first)
    alone = engine.get_epsilon(1e-5)
    _, *second = private(
        engine=engine, noise_multiplier=2.0, max_grad_norm=1.0, poisson_sampling=True
    )
    train(*second)
    assert engine.get_epsilon(1e-5) > alone
    assert [statement.steps for statement in engine.statements()] == [3, 3]
    assert sorted(engine.accountant.history) == [(1.0, 1 / 3, 3), (2.0, 1 / 3, 3)]


# -- noise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_noise_has_the_variance_that_is_accounted(clipping: str) -> None:
    """Two-sided at five standard errors of a variance: a false alarm once in 10**6 runs."""
    module = nn.Linear(100, 100, bias=True)
    norms = [0.3, 0.4]
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(torch.zeros(16, 100)), batch_size=16),
        noise_multiplier=3.0,
        max_grad_norm=norms if clipping == "per_layer" else 0.5,
        clipping=clipping,
    )
    for (x,) in loader:
        (0.0 * model(x)).mean().backward()
        optimizer.step()
    found = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    expected = (3.0 * 0.5 / 16) ** 2
    error = expected * math.sqrt(2 / found.numel())
    assert abs(found.square().mean().item() - expected) < 5 * error
    assert abs(found.square().mean().item() - 1.21 * expected) > 5 * error  # 10 % would be seen
