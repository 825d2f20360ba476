"""Names and calls of Opacus: each is there, or says what to call instead. Opacus stands beside."""

import importlib
import inspect
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import opacus.validators
import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample.functorch import make_functional as their_make_functional
from opacus.layers import SequenceBias as TheirSequenceBias
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dptorch
from dptorch.compat.opacus import GradSampleModule, PrivacyEngine
from dptorch.compat.opacus.accountants import (
    IAccountant,
    PRVAccountant,
    create_accountant,
    register_accountant,
)
from dptorch.compat.opacus.grad_sample.functorch import make_functional
from dptorch.compat.opacus.layers import SequenceBias
from dptorch.compat.opacus.optimizers import DPOptimizer
from dptorch.compat.opacus.utils.batch_memory_manager import BatchMemoryManager
from dptorch.compat.opacus.validators import ModuleValidator
from dptorch.compat.opacus.validators.errors import IllegalModuleConfigurationError
from dptorch.errors import ConfigurationError, PrivacyError, PrivacyWarning
from tests.compat.opacus_setup import BATCH, SIZE, data_for, mlp, private, train, weights

# -- import paths ------------------------------------------------------------------------------------

PATHS = {
    "": ("GradSampleModule", "GradSampleModuleFastGradientClipping", "PrivacyEngine"),
    "accountants": ("IAccountant", "PRVAccountant", "create_accountant", "register_accountant"),
    "accountants.accountant": ("IAccountant",),
    "accountants.registry": ("create_accountant", "register_accountant"),
    "accountants.utils": ("get_noise_multiplier",),
    "data_loader": ("DPDataLoader", "switch_generator"),
    "distributed": ("DifferentiallyPrivateDistributedDataParallel", "average_gradients"),
    "grad_sample": ("GradSampleModule", "GradSampleModuleNoOp", "register_grad_sampler"),
    "grad_sample.conv": ("convolution2d_backward_as_a_convolution",),
    "grad_sample.functorch": ("make_functional", "prepare_layer"),
    "grad_sample.grad_sample_module": ("GradSampleModule",),
    "grad_sample.gsm_exp_weights": ("GradSampleModuleExpandedWeights",),
    "grad_sample.linear": ("compute_linear_grad_sample",),
    "grad_sample.utils": ("get_gsm_class", "register_grad_sampler", "wrap_model"),
    "layers": ("DPGRU", "DPLSTM", "DPRNN", "DPMultiheadAttention", "SequenceBias"),
    "layers.dp_multihead_attention": ("DPMultiheadAttention", "SequenceBias"),
    "layers.dp_rnn": ("DPGRU", "DPLSTM", "DPRNN"),
    "lightning": ("DPLightningDataModule",),
    "optimizers": ("DPOptimizer", "DPPerLayerOptimizer", "AdaClipDPOptimizer"),
    "optimizers.optimizer": ("DPOptimizer",),
    "schedulers": ("ExponentialNoise", "StepGradClip"),
    "utils.batch_memory_manager": ("BatchMemoryManager", "wrap_data_loader"),
    "utils.fast_gradient_clipping_utils": ("DPLossFastGradientClipping",),
    "utils.fsdp_utils": ("FSDP2Wrapper",),
    "utils.module_utils": ("clone_module", "trainable_parameters", "requires_grad"),
    "utils.packed_sequences": ("compute_seq_lengths",),
    "utils.per_sample_gradients_utils": (
        "check_per_sample_gradients_are_correct",
        "compute_opacus_grad_sample",
        "get_grad_sample_modes",
    ),
    "utils.tensor_utils": ("unfold2d",),
    "utils.uniform_sampler": ("UniformWithReplacementSampler",),
    "validators": ("ModuleValidator",),
    "validators.errors": ("IllegalModuleConfigurationError", "UnsupportedModuleError"),
}


def ours(path: str) -> ModuleType:
    return importlib.import_module(f"dptorch.compat.opacus{'.' if path else ''}{path}")


@pytest.mark.slow
@pytest.mark.parametrize(("path", "names"), PATHS.items(), ids=[p or "opacus" for p in PATHS])
def test_import_paths_are_those_of_opacus(path: str, names: tuple[str, ...]) -> None:
    theirs = importlib.import_module(f"opacus{'.' if path else ''}{path}")
    assert [name for name in names if not hasattr(theirs, name)] == []
    assert [name for name in names if not hasattr(ours(path), name)] == []


def stand_ins() -> Iterator[Any]:
    for path in PATHS:
        for name, value in vars(ours(path)).items():
            if inspect.isclass(value) and (value.__doc__ or "").startswith("Not in dptorch"):
                yield pytest.param(value, id=name)


@pytest.mark.parametrize("name", stand_ins())
def test_what_is_not_here_says_what_to_do(name: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"is not in dptorch\. \w+"):
        name(nn.Linear(1, 1))


def test_module_utils_are_those_of_opacus() -> None:
    theirs = importlib.import_module("opacus.utils.module_utils")
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1).requires_grad_(False))
    mine = ours("utils.module_utils")
    for name in ("parametrized_modules", "trainable_modules", "trainable_parameters"):
        assert list(getattr(mine, name)(model)) == list(getattr(theirs, name)(model))
    for module in model.modules():
        assert mine.has_trainable_params(module) == theirs.has_trainable_params(module)
        for recurse in (False, True):
            theirs_found = theirs.requires_grad(module, recurse=recurse)
            assert mine.requires_grad(module, recurse=recurse) == theirs_found
    assert mine.get_submodule(model, "0") is theirs.get_submodule(model, "0")
    copy = mine.clone_module(model)
    assert mine.are_state_dict_equal(copy.state_dict(), model.state_dict())
    assert copy[0].weight is not model[0].weight


def test_make_functional_is_that_of_opacus() -> None:
    model, x = mlp(), torch.randn(3, 6)
    (call, values), (their_call, their_values) = (
        make_functional(model),
        their_make_functional(model),
    )
    assert all(a is b for a, b in zip(values, their_values, strict=True))
    assert torch.equal(call(values, x), their_call(their_values, x))


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_sequence_bias_is_that_of_opacus_and_is_followed(batch_first: bool) -> None:
    bias, theirs = SequenceBias(4, batch_first), TheirSequenceBias(4, batch_first)
    bias.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 4)
    assert torch.equal(bias(x), theirs(x))
    report = dptorch.check(
        bias,
        (x,),
        lambda model, batch: model(*batch).square().sum((1, 2) if batch_first else (0, 2)),
        batch_dims=0 if batch_first else 1,
    )
    assert report.ok, str(report)


# -- ModuleValidator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 16, 24, 64, 96, 128, 512])
@pytest.mark.parametrize("num_groups", [None, 2])
def test_fix_makes_the_groups_of_opacus(channels: int, num_groups: int | None) -> None:
    """And weights that were trained there compute the same here."""
    given = {} if num_groups is None else {"num_groups": num_groups}
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels))
    mine = ModuleValidator.fix_and_validate(model, **given)
    theirs = opacus.validators.ModuleValidator.fix_and_validate(model, **given)
    assert mine[1].num_groups == theirs[1].num_groups
    nn.init.normal_(theirs[1].weight)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(mine(x), theirs(x))


def test_fix_does_not_erase_rows_as_opacus_does() -> None:
    model = nn.Sequential(nn.Linear(3, 32), nn.BatchNorm1d(32))
    x = torch.randn(5, 3)
    theirs = opacus.validators.ModuleValidator.fix(model)
    assert theirs(x).abs().max() < 1e-4  # groups of one channel: every row is zero
    with pytest.warns(UserWarning, match="num_groups=32"):
        mine = ModuleValidator.fix(model)
    assert mine(x).std() > 0.5
    assert ModuleValidator.fix(model, num_groups=32)[1].num_groups == 32


def test_groups_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="num_groups=5"):
        ModuleValidator.fix(nn.Sequential(nn.BatchNorm2d(64)), num_groups=5)
    assert issubclass(IllegalModuleConfigurationError, ConfigurationError)


# -- accountants -------------------------------------------------------------------------------------


def test_an_accountant_of_ones_own_is_asked() -> None:
    class Twice(PRVAccountant):
        _mechanism = "twice"

        def get_epsilon(self, delta: float, **settings: Any) -> float:
            return 2 * super().get_epsilon(delta, **settings)

    register_accountant("twice", Twice, force=True)
    with pytest.raises(ConfigurationError, match="registered already"):
        register_accountant("twice", Twice)
    with pytest.raises(ConfigurationError, match="subclass"):
        register_accountant("other", dict)  # type: ignore[arg-type]
    engine, *rest = private(engine=PrivacyEngine(accountant="twice"), noise_multiplier=1.0)
    train(*rest)
    prv = create_accountant("prv")
    prv.runs = engine.accountant.runs
    assert engine.get_epsilon(1e-5) == 2 * prv.get_epsilon(1e-5) > 0


def test_a_history_can_be_set_and_is_never_taken_back() -> None:
    mine, theirs = PRVAccountant(), opacus.accountants.PRVAccountant()
    for accountant in (mine, theirs):
        accountant.history = [(1.0, 0.01, 10)]
        accountant.history.append((2.0, 0.02, 5))
    assert mine.history == theirs.history
    assert abs(mine.get_epsilon(1e-5) - theirs.get_epsilon(1e-5)) < 0.02
    for accountant in (mine, theirs):
        into: dict[str, Any] = {"own": 1}
        assert accountant.state_dict(into) is into
        assert into["own"] == 1
        assert into["history"] == mine.history
    with pytest.raises(PrivacyError, match="taken back"):
        mine.history.clear()
    engine, *rest = private(noise_multiplier=1.0)
    train(*rest)
    before = engine.get_epsilon(1e-5)
    with pytest.raises(PrivacyError, match="new PrivacyEngine"):
        engine.accountant.history = []
    assert engine.get_epsilon(1e-5) == before
    assert issubclass(PRVAccountant, IAccountant)
    engine.accountant = PRVAccountant()  # Opacus then says 0
    assert engine.get_epsilon(1e-5) == before > 0
    with pytest.raises(ConfigurationError, match="create_accountant"):
        engine.accountant = opacus.accountants.PRVAccountant()


# -- the loader --------------------------------------------------------------------------------------


def test_the_loader_is_a_data_loader() -> None:
    def attributes(make: Any) -> list[Any]:
        module = mlp()
        loader = make.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(data_for(mlp), batch_size=BATCH),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )[2]
        assert isinstance(loader, DataLoader)
        return [loader.batch_size, loader.drop_last, loader.num_workers, len(loader)]

    assert attributes(PrivacyEngine()) == attributes(opacus.PrivacyEngine())


@pytest.mark.parametrize("poisson", [True, False])
def test_the_length_is_the_number_of_parts(poisson: bool) -> None:
    _, module, optimizer, loader = private(noise_multiplier=1.0, poisson_sampling=poisson)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=3, optimizer=optimizer
    ) as parts:
        for _ in range(3):
            promised, came = len(parts), 0
            for x, y in parts:
                came += 1
                optimizer.zero_grad()
                F.cross_entropy(module(x), y).backward()
                optimizer.step()
            assert came == promised > len(loader)


def orders(loader: Any, epochs: int) -> list[list[int]]:
    """The examples of each batch, sorted, of several epochs."""
    return [sorted(batch[0].tolist()) for _ in range(epochs) for batch in loader]


@pytest.mark.parametrize("own", [True, False], ids=["generator of the loader", "of its sampler"])
def test_a_seeded_shuffle_keeps_its_order(own: bool) -> None:
    data = TensorDataset(torch.arange(float(SIZE)))

    def shuffled(seed: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        if own:
            return DataLoader(data, batch_size=BATCH, shuffle=True, generator=generator)
        sampler = torch.utils.data.RandomSampler(data, generator=generator)
        return DataLoader(data, batch_size=BATCH, sampler=sampler)

    def ours(seed: int) -> list[list[int]]:
        module = nn.Linear(1, 1)
        with pytest.warns(PrivacyWarning, match="not amplified"):
            model, optimizer, loader = PrivacyEngine().make_private(
                module=module,
                optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
                data_loader=shuffled(seed),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                poisson_sampling=False,
            )
        found = []
        for _ in range(3):
            for (x,) in loader:
                found.append(sorted(x.tolist()))
                model(x[:, None]).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return found

    assert ours(1) == orders(shuffled(1), 3)
    assert ours(1) != ours(2)


def test_poisson_batches_do_not_follow_a_loaders_generator_and_it_says_so() -> None:
    generator = torch.Generator().manual_seed(1)
    module = mlp()
    with pytest.warns(PrivacyWarning, match="generator is not used"):
        PrivacyEngine().make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(data_for(mlp), batch_size=8, shuffle=True, generator=generator),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


def test_a_sampler_with_replacement_is_refused() -> None:
    module, data = mlp(), data_for(mlp)
    sampler = torch.utils.data.RandomSampler(data, replacement=True)
    with pytest.raises(ConfigurationError, match="replacement=True"):
        PrivacyEngine().make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=8, sampler=sampler),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


# -- model and optimizer -----------------------------------------------------------------------------


def test_one_generator_given_to_two_runs_gives_other_noise() -> None:
    def two(engine_of: Any) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        found = []
        for _ in range(2):
            module = mlp()
            made = engine_of.make_private(
                module=module,
                optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
                data_loader=DataLoader(data_for(mlp), batch_size=BATCH),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                noise_generator=generator,
                poisson_sampling=False,
            )
            found.append(train(*made))
        return found

    with pytest.warns(PrivacyWarning, match="for tests"):
        first, second = two(PrivacyEngine())
    with pytest.warns(PrivacyWarning, match="for tests"):
        again = two(PrivacyEngine())
    assert not torch.allclose(first, second)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    theirs = two(opacus.PrivacyEngine())
    assert not torch.allclose(*theirs)


def test_a_model_is_made_private_round_after_round() -> None:
    """As every client of a federated round does, with the model of the round before."""
    engine, model, optimizer, loader = private(noise_multiplier=1.0, poisson_sampling=True)
    train(model, optimizer, loader)
    one = engine.get_epsilon(1e-5)
    _, again, newer, other = private(engine=engine, module=model, noise_multiplier=1.0)
    assert again._module is model._module
    F.cross_entropy(model(torch.randn(4, 6)), torch.zeros(4).long()).backward()
    with pytest.raises(PrivacyError, match="no longer takes private steps"):
        optimizer.step()
    newer.zero_grad()
    before = weights(again)
    train(again, newer, other)
    assert not torch.equal(weights(again), before)
    assert engine.get_epsilon(1e-5) > one
    assert [statement.steps for statement in engine.statements()] == [3, 3]


def test_another_engine_may_take_over() -> None:
    first, model, _, _ = private(noise_multiplier=1.0)
    second, *made = private(module=model, noise_multiplier=1.0)
    train(*made)
    assert first.get_epsilon(1e-5) == 0 < second.get_epsilon(1e-5)


@pytest.mark.parametrize("call", ["remove_hooks", "to_standard_module"])
def test_a_model_is_ordinary_again(call: str) -> None:
    engine, model, optimizer, loader = private(noise_multiplier=1.0)
    train(model, optimizer, loader)
    spent = engine.get_epsilon(1e-5)
    getattr(model, call)()
    inside = model._module
    x, y = torch.randn(4, 6), torch.zeros(4).long()
    F.cross_entropy(inside(x), y).backward()
    assert inside[0].weight.grad is not None
    with pytest.raises(PrivacyError, match="no longer takes private steps"):
        optimizer.step()
    torch.optim.SGD(inside.parameters(), lr=0.1).step()
    assert engine.get_epsilon(1e-5) == spent


def test_parts_of_opacus_that_cannot_be_had_alone_say_so() -> None:
    module = mlp()
    with pytest.raises(ConfigurationError, match=r"make_private\(module="):
        DPOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0)
    assert GradSampleModule(module, batch_first=True)._module is module
    with pytest.raises(ConfigurationError, match="make_private"):
        GradSampleModule(module, batch_first=False)
    with pytest.raises(PrivacyError, match=r"dptorch\.record"):
        _ = GradSampleModule(module).grad_sample
    _, _, optimizer, _ = private()
    with pytest.raises(AttributeError, match="register_step_pre_hook"):
        optimizer.attach_step_hook(print)
    assert [id(p) for p in optimizer.params] == [
        id(p) for group in optimizer.param_groups for p in group["params"]
    ]


def test_a_closure_returns_an_ordinary_loss() -> None:
    _, model, optimizer, loader = private()
    x, y = next(iter(loader))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert type(loss) is torch.Tensor
    assert math.isfinite(loss.item())


def test_count_noise_that_costs_more_than_a_step_is_refused_when_making_private() -> None:
    settings: dict[str, Any] = {
        "clipping": "adaptive",
        "max_grad_norm": 1.0,
        "target_unclipped_quantile": 0.5,
        "clipbound_learning_rate": 0.2,
        "max_clipbound": 10.0,
        "min_clipbound": 0.01,
        "unclipped_num_std": 1.0,
    }
    module = mlp()
    with pytest.raises(ValueError, match="unclipped_num_std"):
        opacus.PrivacyEngine().make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(data_for(mlp), batch_size=BATCH),
            noise_multiplier=2.0,
            **settings,
        )
    with pytest.raises(ConfigurationError, match="unclipped_num_std"):
        private(noise_multiplier=2.0, **settings)
    private(noise_multiplier=1.9, **settings)
