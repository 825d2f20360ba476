"""`dptorch.compat.opacus` under the scenarios that Opacus tests its own engine with, and beside Opacus.

The installed opacus 1.6 is the oracle: without noise, on the same batches, both make the same step.
"""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import opacus
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from dptorch.accounting import SampledGaussian
from dptorch.accounting import epsilon as epsilon_of
from dptorch.compat.opacus import GradSampleModule, PrivacyEngine
from dptorch.compat.opacus.accountants import PRVAccountant, create_accountant
from dptorch.compat.opacus.data_loader import DPDataLoader
from dptorch.compat.opacus.schedulers import ExponentialNoise, LambdaNoise, StepGradClip
from dptorch.compat.opacus.utils.batch_memory_manager import BatchMemoryManager
from dptorch.compat.opacus.utils.uniform_sampler import UniformWithReplacementSampler
from dptorch.compat.opacus.validators import ModuleValidator
from dptorch.compat.opacus.validators.errors import UnsupportedModuleError
from dptorch.errors import BudgetExhausted, ConfigurationError, PrivacyWarning

SIZE, BATCH = 24, 8
Model = Callable[[], nn.Module]


class Recurrent(nn.Module):
    """An embedding, a recurrent layer, and a head on its last output."""

    def __init__(self, kind: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.rnn = kind(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(ids))[0][:, -1])


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def cnn() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 3),
    )


def lstm() -> nn.Module:
    torch.manual_seed(1)
    return Recurrent()


def data_for(model: Model) -> TensorDataset:
    draw = torch.Generator().manual_seed(2)
    inputs = {
        mlp: lambda: torch.randn(SIZE, 6, generator=draw),
        cnn: lambda: torch.randn(SIZE, 1, 6, 6, generator=draw),
        lstm: lambda: torch.randint(0, 11, (SIZE, 4), generator=draw),
    }[model]()
    return TensorDataset(inputs, torch.randint(0, 3, (SIZE,), generator=draw))


def weights(model: nn.Module) -> Tensor:
    """By name: Opacus' DPLSTM has the names of nn.LSTM, in another order, and its own beside them."""
    state = {name: p for name, p in model.state_dict().items() if ".l0." not in name}
    return torch.cat([state[name].flatten() for name in sorted(state)]).detach().clone()


def train(model: nn.Module, optimizer: Any, loader: Any, epochs: int = 1) -> Tensor:
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return weights(model)


def private(model: Model = mlp, batch: int = BATCH, **changes: Any) -> tuple[Any, ...]:
    """(privacy engine, model, optimizer, loader) without noise or clipping that matters, over the
    batches of a sequential loader, unless told otherwise."""
    settings: dict[str, Any] = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 1e6,
        "poisson_sampling": False,
    }
    settings |= changes
    engine = settings.pop("engine", None) or PrivacyEngine()
    make = engine.make_private_with_epsilon if "epochs" in settings else engine.make_private
    if "epochs" in settings:
        del settings["noise_multiplier"]
    module = settings.pop("module", None) or model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrivacyWarning)
        made = make(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9),
            data_loader=DataLoader(data_for(model), batch_size=batch),
            **settings,
        )
    return engine, *made


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
    _, module, optimizer, loader = private(**settings, max_clipbound=10.0, min_clipbound=1e-4)
    train(module, optimizer, loader, epochs=2)
    moved = optimizer.max_grad_norm
    assert moved != 1.0
    _, module, optimizer, loader = private(**settings, max_clipbound=1.05, min_clipbound=0.95)
    train(module, optimizer, loader, epochs=2)
    assert 0.95 <= optimizer.max_grad_norm <= 1.05
    assert not 0.95 <= moved <= 1.05


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


# -- batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("poisson", [True, False])
def test_physical_batches_change_nothing(poisson: bool) -> None:
    def run(most: int | None) -> Tensor:
        _, module, optimizer, loader = private(
            noise_multiplier=0.5,
            max_grad_norm=0.1,
            noise_generator=torch.Generator().manual_seed(1),
            poisson_sampling=poisson,
        )
        if most is None:
            return train(module, optimizer, loader)
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=most, optimizer=optimizer
        ) as memory_safe_data_loader:
            for x, _ in memory_safe_data_loader:
                assert len(x) <= most
            return train(module, optimizer, memory_safe_data_loader)

    torch.testing.assert_close(run(3), run(None), rtol=0, atol=1e-5)


def test_a_loop_left_within_a_batch_leaves_nothing_behind() -> None:
    engine, module, optimizer, loader = private(max_grad_norm=0.1)
    expected = train(*private(max_grad_norm=0.1)[1:])
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=3, optimizer=optimizer
    ) as parts:
        for x, y in parts:
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            break
        assert engine.accountant.history == []
        found = train(module, optimizer, parts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_empty_batches_are_steps() -> None:
    """At rate 1/24 of 24 examples more than a third of the batches are empty."""
    engine, module, optimizer, loader = private(
        batch=1, noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=True
    )
    train(module, optimizer, loader)
    assert engine.accountant.history == [(1.0, 1 / 24, 24)]


# -- checkpoints -------------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_the_run(tmp_path: Any) -> None:
    def make() -> tuple[Any, ...]:
        return private(noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=True)

    engine, module, optimizer, loader = make()
    train(module, optimizer, loader)
    engine.accountant.step(noise_multiplier=5.0, sample_rate=0.5)
    engine.save_checkpoint(
        path=tmp_path / "run.pt", module=module, optimizer=optimizer, checkpoint_dict={"epoch": 1}
    )
    expected = train(module, optimizer, loader)
    later, module, optimizer, loader = make()
    own = later.load_checkpoint(path=tmp_path / "run.pt", module=module, optimizer=optimizer)
    assert own == {"epoch": 1}
    assert (5.0, 0.5, 1) in later.accountant.history
    assert torch.equal(train(module, optimizer, loader), expected)
    assert later.get_epsilon(1e-5) == engine.get_epsilon(1e-5)


def test_history_is_events() -> None:
    engine, *rest = private(noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=True)
    train(*rest)
    assert engine.accountant.all_events() == [SampledGaussian(1.0, 1 / 3, 3)]


# -- schedules ---------------------------------------------------------------------------------------


def test_a_noise_schedule_is_composed_step_by_step() -> None:
    engine, module, optimizer, loader = private(
        noise_multiplier=2.0, max_grad_norm=1.0, poisson_sampling=True
    )
    scheduler = ExponentialNoise(optimizer, gamma=0.5)
    for _ in range(3):
        train(module, optimizer, loader)
        scheduler.step()
    assert engine.accountant.history == [(2.0, 1 / 3, 3), (1.0, 1 / 3, 3), (0.5, 1 / 3, 3)]
    assert optimizer.noise_multiplier == 0.25
    constant = epsilon_of(sample_rate=1 / 3, noise_multiplier=2.0, steps=9, delta=1e-5)
    assert engine.get_epsilon(1e-5) > 2 * constant


def test_a_schedule_within_an_epoch_ends_the_epoch_where_it_would_have_ended() -> None:
    engine, module, optimizer, loader = private(
        noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=True
    )
    scheduler = LambdaNoise(optimizer, noise_lambda=lambda i: 1 + i)
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            scheduler.step()
    assert engine.accountant.history == [(float(n), 1 / 3, 1) for n in range(1, 7)]


def test_noise_follows_a_schedule_of_clipping_norms() -> None:
    """In Opacus' ghost mode it is the noise alone that shrinks. Five standard errors, see above."""
    module = nn.Linear(100, 100, bias=False)
    _, model, optimizer, loader = (
        PrivacyEngine(),
        *PrivacyEngine().make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.0),
            data_loader=DataLoader(TensorDataset(torch.ones(16, 100)), batch_size=16),
            noise_multiplier=2.0,
            max_grad_norm=1.0,
        ),
    )
    scheduler = StepGradClip(optimizer, step_size=1, gamma=0.25)
    for bound in (1.0, 0.25):
        for (x,) in loader:
            (0.0 * model(x)).mean().backward()
            optimizer.step()
        expected = (2.0 * bound / 16) ** 2
        assert module.weight.grad is not None
        found = module.weight.grad.square().mean().item()
        assert abs(found - expected) < 5 * expected * math.sqrt(2 / module.weight.numel())
        assert optimizer.max_grad_norm == bound
        scheduler.step()


def test_a_schedule_goes_on_from_a_checkpoint(tmp_path: Any) -> None:
    def make() -> tuple[Any, ...]:
        engine, module, optimizer, loader = private(
            noise_multiplier=2.0, max_grad_norm=1.0, poisson_sampling=True
        )
        return engine, module, optimizer, loader, ExponentialNoise(optimizer, gamma=0.5)

    engine, module, optimizer, loader, scheduler = make()
    train(module, optimizer, loader)
    scheduler.step()
    train(module, optimizer, loader)
    file = tmp_path / "run.pt"
    engine.save_checkpoint(path=file, module=module, noise_scheduler=scheduler)
    later, module, optimizer, loader, scheduler = make()
    later.load_checkpoint(path=file, module=module, noise_scheduler=scheduler)
    scheduler.step()
    train(module, optimizer, loader)
    assert later.accountant.history == [(2.0, 1 / 3, 3), (1.0, 1 / 3, 3), (0.5, 1 / 3, 3)]


def test_a_schedule_cannot_change_half_a_batch() -> None:
    _, module, optimizer, loader = private(noise_multiplier=1.0, poisson_sampling=False)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=3, optimizer=optimizer
    ) as parts:
        for x, y in parts:
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            with pytest.raises(ConfigurationError, match="within a logical batch"):
                optimizer.noise_multiplier = 2.0
            break


def test_a_schedule_scales_the_norms_of_all_layers() -> None:
    norms = [0.3, 0.1, 0.2, 0.05]
    _, _, optimizer, _ = private(max_grad_norm=norms, clipping="per_layer")
    optimizer.max_grad_norm *= 2
    assert optimizer.max_grad_norm == pytest.approx(2 * math.hypot(*norms))
    found = [group.max_grad_norm for group in optimizer._dp_run.plan.clipping_groups]
    assert found == pytest.approx([2 * norm for norm in norms])


# -- the loop of the tutorials -------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loop_of_the_tutorials(workers: int, recwarn: pytest.WarningsRecorder) -> None:
    """Target, physical batches, a learning-rate schedule and a sampler of the user's: no warning."""
    module, data = cnn(), data_for(cnn)
    sampler = UniformWithReplacementSampler(num_samples=SIZE, sample_rate=0.5)
    privacy_engine = PrivacyEngine()
    model, optimizer, train_loader = privacy_engine.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.RMSprop(module.parameters(), lr=1e-3),
        data_loader=DataLoader(data, batch_sampler=sampler, num_workers=workers),
        epochs=2,
        target_epsilon=5.0,
        target_delta=1e-3,
        max_grad_norm=1.2,
        poisson_sampling=False,  # the loader's batches are Poisson already
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    epsilons = []
    for _ in range(2):
        with BatchMemoryManager(
            data_loader=train_loader, max_physical_batch_size=4, optimizer=optimizer
        ) as memory_safe_data_loader:
            for images, target in memory_safe_data_loader:
                optimizer.zero_grad()
                loss = nn.CrossEntropyLoss()(model(images), target)
                loss.backward()
                optimizer.step()
            epsilons.append(privacy_engine.get_epsilon(1e-3))
        scheduler.step()
    assert 0 < epsilons[0] < epsilons[1] <= 5.0 < epsilons[1] * 1.03
    assert optimizer.param_groups[0]["lr"] == 2.5e-4
    state = privacy_engine.accountant.state_dict()
    other = create_accountant("prv")
    other.load_state_dict(state)
    assert other.get_epsilon(delta=1e-3) == epsilons[1]
    assert not [w for w in recwarn if isinstance(w.message, PrivacyWarning)]


# -- names, and what is refused ------------------------------------------------------------------------


def test_the_module_has_the_names_of_both(tmp_path: Any) -> None:
    _, module, _, _ = private()
    inside = module._module
    assert list(module.state_dict()) == [f"_module.{name}" for name in inside.state_dict()]
    module.load_state_dict(mlp().state_dict())
    module.load_state_dict(module.state_dict())
    assert module.to_standard_module() is inside
    assert torch.equal(weights(module), weights(mlp()))


def test_a_model_that_mixes_examples_is_refused_and_fixed() -> None:
    # Opacus lets the second one pass, whose running statistics see the private batch.
    for norm in (nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False)):
        model = nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 3))
        assert not ModuleValidator.is_valid(model)
        assert not PrivacyEngine().is_compatible(module=model)
        with pytest.raises(UnsupportedModuleError, match="BatchNorm1d at '1'"):
            private(module=model)
        fixed = ModuleValidator.fix_and_validate(model)
        assert PrivacyEngine().is_compatible(module=fixed)
        assert isinstance(model[1], nn.BatchNorm1d)
        private(module=fixed)


def _unknown() -> None:
    PrivacyEngine().make_private(max_gradnorm=1.0)


def _weighted() -> None:
    module = mlp()
    PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(
            data_for(mlp), batch_size=8, sampler=WeightedRandomSampler([1.0] * SIZE, SIZE)
        ),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (_unknown, "Did you mean 'max_grad_norm'"),
        (_weighted, "WeightedRandomSampler"),
        (lambda: PrivacyEngine(accountant="pvr"), "Did you mean 'prv'"),
        (lambda: private(grad_sample_mode="no_op"), "no_op"),
        (lambda: private(max_grad_norm=[1.0, 2.0]), "clipping='per_layer'"),
        (lambda: private(max_grad_norm=1.0, clipping="per_layer"), "a list of 4 norms"),
        (lambda: private(max_clipbound=1.0), "clipping='adaptive'"),
        (
            lambda: private(
                engine=PrivacyEngine(secure_mode=True), noise_generator=torch.Generator()
            ),
            "secure_mode",
        ),
    ],
)
def test_refusals_name_the_way_out(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        call()


def test_no_step_goes_past_the_target() -> None:
    _, module, optimizer, loader = private(
        target_epsilon=3.0, target_delta=1e-3, epochs=1, max_grad_norm=1.0, poisson_sampling=True
    )
    train(module, optimizer, loader)
    assert list(loader) == []
    x, y = data_for(mlp)[:4]
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(BudgetExhausted):
        optimizer.step()
