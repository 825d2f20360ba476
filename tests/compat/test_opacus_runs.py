"""`dptorch.compat.opacus` over a whole run: physical batches, checkpoints, schedules, refusals."""

import io
import math
import re
from collections.abc import Callable
from typing import Any

import opacus.schedulers
import pytest
import torch
import torch.nn.functional as F
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from dptorch.accounting import epsilon as epsilon_of
from dptorch.compat.opacus import PrivacyEngine, schedulers
from dptorch.compat.opacus.accountants import create_accountant
from dptorch.compat.opacus.schedulers import ExponentialNoise, LambdaNoise, StepGradClip
from dptorch.compat.opacus.utils.batch_memory_manager import BatchMemoryManager
from dptorch.compat.opacus.utils.uniform_sampler import UniformWithReplacementSampler
from dptorch.compat.opacus.validators import ModuleValidator
from dptorch.compat.opacus.validators.errors import UnsupportedModuleError
from dptorch.errors import BudgetExhausted, ConfigurationError, PrivacyWarning
from tests.compat.opacus_setup import (
    SIZE,
    cnn,
    data_for,
    mlp,
    private,
    train,
    weights,
)

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


@pytest.mark.parametrize("kind", ["path", "open file"])
def test_a_run_that_goes_on_is_the_run(tmp_path: Any, kind: str) -> None:
    file = tmp_path / "run.pt" if kind == "path" else io.BytesIO()

    def make() -> tuple[Any, ...]:
        return private(noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=True)

    engine, module, optimizer, loader = make()
    train(module, optimizer, loader)
    engine.accountant.step(noise_multiplier=5.0, sample_rate=0.5)
    engine.save_checkpoint(
        path=file, module=module, optimizer=optimizer, checkpoint_dict={"epoch": 1}
    )
    if isinstance(file, io.BytesIO):
        file.seek(0)
    expected = train(module, optimizer, loader)
    later, module, optimizer, loader = make()
    own = later.load_checkpoint(path=file, module=module, optimizer=optimizer)
    assert own == {"epoch": 1}
    assert (5.0, 0.5, 1) in later.accountant.history
    assert torch.equal(train(module, optimizer, loader), expected)
    assert later.get_epsilon(1e-5) == engine.get_epsilon(1e-5)


def test_a_checkpoint_tells_of_the_other_runs_of_its_engine(tmp_path: Any) -> None:
    """One engine, two models: whoever goes on with the second has spent what the first spent, too."""

    def two() -> tuple[Any, list[tuple[Any, ...]]]:
        engine = PrivacyEngine()
        return engine, [
            private(engine=engine, noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=True)[
                1:
            ]
            for _ in range(2)
        ]

    engine, runs = two()
    for run in runs:
        train(*run)
    engine.accountant.step(noise_multiplier=5.0, sample_rate=0.5)
    for i, (module, _, _) in enumerate(runs):
        engine.save_checkpoint(path=tmp_path / f"{i}.pt", module=module)
    spent = engine.get_epsilon(1e-5)

    later, again = two()
    later.load_checkpoint(path=tmp_path / "1.pt", module=again[1][0])
    assert later.get_epsilon(1e-5) == spent
    # The other run goes on here, too, and is not counted twice.
    later.load_checkpoint(path=tmp_path / "0.pt", module=again[0][0])
    assert later.get_epsilon(1e-5) == spent


def test_a_checkpoint_from_before_they_told_of_other_runs_still_loads(tmp_path: Any) -> None:
    from dptorch.engine import checkpoint

    engine, module, optimizer, loader = private(
        noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=True
    )
    train(module, optimizer, loader)
    engine.save_checkpoint(path=tmp_path / "new.pt", module=module)
    state = checkpoint.read(tmp_path / "new.pt")
    del state["extra"]["others"], state["extra"]["identity"]
    checkpoint.write(tmp_path / "old.pt", state)
    later, module, *_ = private(noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=True)
    later.load_checkpoint(path=tmp_path / "old.pt", module=module)
    assert later.get_epsilon(1e-5) == engine.get_epsilon(1e-5)


def test_an_optimizer_of_another_model_is_refused_in_opacus_words() -> None:
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.1)
    said = "Module parameters are different than optimizer Parameters"
    for engine, more in ((PrivacyEngine(), ": parameter 0 of"), (opacus.PrivacyEngine(), "")):
        with pytest.raises(ValueError, match=said + more):
            engine.make_private(
                module=mlp(), optimizer=optimizer, data_loader=DataLoader(data_for(mlp)),
                noise_multiplier=1.0, max_grad_norm=1.0,
            )  # fmt: skip


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


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ExponentialNoise", {"gamma": 0.5}),
        ("StepNoise", {"gamma": 0.5, "step_size": 3}),
        ("ExponentialGradClip", {"gamma": 0.5}),
        ("StepGradClip", {"gamma": 0.5, "step_size": 3}),
    ],
)
def test_the_state_of_a_schedule_holds_its_settings(name: str, settings: dict[str, Any]) -> None:
    """As Opacus's does: a schedule with other settings takes up those that were saved."""
    optimizers = [
        private(noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=True)[2],
        DPOptimizer(
            torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), noise_multiplier=1.0,
            max_grad_norm=1.0, expected_batch_size=4,
        ),
    ]  # fmt: skip
    states = []
    for module, optimizer in zip((schedulers, opacus.schedulers), optimizers, strict=True):
        other = dict.fromkeys(settings, 1)
        made = getattr(module, name)(optimizer, **settings)
        loaded = getattr(module, name)(optimizer, **other)
        loaded.load_state_dict(made.state_dict())
        states.append({key: made.state_dict()[key] for key in settings})
        assert loaded.state_dict() == made.state_dict()
    assert states == [settings, settings]


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


@pytest.mark.slow
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
