"""Arguments and calls of Opacus, one by one; Opacus stands beside where it is sound."""

import warnings
from typing import Any

import opacus
import pytest
import torch
from opacus.accountants.utils import get_noise_multiplier as their_noise_multiplier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dptorch.compat.opacus import PrivacyEngine, layers
from dptorch.compat.opacus.accountants.utils import get_noise_multiplier
from dptorch.compat.opacus.data_loader import DPDataLoader
from dptorch.compat.opacus.utils.uniform_sampler import UniformWithReplacementSampler
from dptorch.errors import ConfigurationError
from tests.compat.opacus_setup import data_for, mlp, private, train


def test_secure_mode_changes_nothing() -> None:
    found = []
    for secure in (False, True):
        _, *made = private(engine=PrivacyEngine(secure_mode=secure), max_grad_norm=0.1)
        found.append(train(*made))
    assert torch.equal(*found)


def test_sums_are_divided_by_the_mean_batch_size() -> None:
    """25 examples in batches of 8 are 4 steps of 6.25; Opacus divides by 6."""

    def divisor(make: Any) -> float:
        module = nn.Linear(3, 1, bias=False)
        _, optimizer, _ = make.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
            data_loader=DataLoader(TensorDataset(torch.randn(25, 3)), batch_size=8),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        return float(optimizer.expected_batch_size)

    assert divisor(PrivacyEngine()) == 6.25
    assert divisor(opacus.PrivacyEngine()) == 6


@pytest.mark.parametrize("mode", ["no_op", "ghost_fsdp", "ghost_tp"])
def test_modes_that_cannot_be_vouched_for_are_refused(mode: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{mode}.*Use 'hooks'"):
        private(grad_sample_mode=mode)


def test_a_model_that_is_not_wrapped_is_the_model_itself() -> None:
    module = mlp()
    engine, returned, optimizer, loader = private(
        module=module, wrap_model=False, noise_multiplier=1.0
    )
    assert returned is module
    train(returned, optimizer, loader)
    assert engine.get_epsilon(1e-5) > 0


@pytest.mark.slow
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_noise_for_a_target_is_at_most_that_of_opacus(accountant: str) -> None:
    settings: dict[str, Any] = {
        "target_epsilon": 3.0, "target_delta": 1e-5, "sample_rate": 0.02, "epochs": 4,
        "accountant": accountant,
    }  # fmt: skip
    mine, theirs = get_noise_multiplier(**settings), their_noise_multiplier(**settings)
    assert 0.97 * theirs < mine <= theirs


def test_a_sampler_has_the_batches_of_an_epoch() -> None:
    """``int(1 / rate)`` is 92 for 93 examples; every example is drawn at the rate."""
    rate = 1 / 93
    assert int(1 / rate) == 92
    sampler = UniformWithReplacementSampler(num_samples=93, sample_rate=rate)
    assert len(list(sampler)) == len(sampler) == 93
    loader = DataLoader(data_for(mlp), batch_size=8)
    mine = DPDataLoader.from_data_loader(loader)
    theirs = opacus.data_loader.DPDataLoader.from_data_loader(loader)
    assert (len(mine), mine.sample_rate) == (len(theirs), theirs.sample_rate) == (3, 1 / 3)
    assert all(x.shape[1:] == (6,) for x, _ in mine)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "MultiheadAttention"])
def test_layers_are_those_of_torch(name: str) -> None:
    """And compute what Opacus's replacements do, by whose state they load."""
    mine, theirs = getattr(layers, f"DP{name}"), getattr(opacus.layers, f"DP{name}")
    assert mine is getattr(nn, name)
    torch.manual_seed(0)
    a, b = (kind(8, 2) if name == "MultiheadAttention" else kind(8, 5) for kind in (mine, theirs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        b.load_state_dict(a.state_dict())
    x = torch.randn(4, 3, 8)
    inputs = (x, x, x) if name == "MultiheadAttention" else (x,)
    torch.testing.assert_close(a(*inputs)[0], b(*inputs)[0])
