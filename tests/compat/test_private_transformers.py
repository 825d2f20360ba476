"""`dptorch.compat.private_transformers`: its calls. Its gradients are in test_hf_gradients.py."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dptorch.compat import fastdp, private_transformers
from dptorch.compat.private_transformers import PrivacyEngine
from dptorch.errors import BudgetExhausted, ConfigurationError, PrivacyWarning

SIZE, BATCH = 64, 16
pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(n: int = BATCH) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(n, 6, generator=draw, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=draw)


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def make(**changes: Any) -> tuple[nn.Module, Any, PrivacyEngine]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"batch_size": BATCH, "sample_size": SIZE, "max_grad_norm": 0.5, "epochs": 2}
    engine = PrivacyEngine(model, **(settings | {"noise_multiplier": 0.0} | changes))
    engine.attach(optimizer)
    return model, optimizer, engine


def test_a_loss_that_was_scaled_up_is_scaled_back() -> None:
    found = []
    for scale in (1.0, 1024.0):
        model, optimizer, _ = make()
        optimizer.step(loss=losses(model, *batch()) * scale, scale=scale)
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_a_callback_sees_the_noisy_gradient_and_may_change_it() -> None:
    model, optimizer, engine = make(noise_multiplier=1.0)
    before = copy.deepcopy(model.state_dict())
    seen = []

    def project(e: PrivacyEngine) -> None:
        for name, p in e.named_params:
            assert p.grad is not None
            seen.append(name)
            p.grad.zero_()

    model.eval()  # gradients are followed all the same
    with pytest.warns(PrivacyWarning, match="Nobody is shown the sum"):
        optimizer.step(loss=losses(model, *batch()), callback=project)
    assert seen == [n for n, _ in model.named_parameters()]
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrivacyWarning)
        optimizer.step(loss=losses(model, *batch()), callback=lambda e: None)  # said once
    optimizer.step(loss=losses(model, *batch()))  # each callback is for its step only
    assert len(seen) == 4
    assert any(not torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert engine.steps == 3


@pytest.mark.slow
def test_target_epsilon_with_parts_of_private_batches() -> None:
    model, optimizer, engine = make(noise_multiplier=None, target_epsilon=3.0, seed=5)
    loader = engine.loader(TensorDataset(*batch(SIZE)), max_physical_batch_size=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrivacyWarning)
        for _ in range(2):
            for x, y in loader:
                optimizer.step(loss=losses(model, x, y))
                optimizer.zero_grad()
    assert engine.steps == 8
    assert 2.98 < engine.get_privacy_spent()["eps_rdp"] <= 3.0
    with pytest.raises(BudgetExhausted):
        optimizer.step(loss=losses(model, *batch()))


def test_per_layer_percentile_moves_each_layers_norm() -> None:
    model, optimizer, engine = make(clipping_mode="per_layer_percentile", seed=1)
    loader = engine.loader(TensorDataset(*batch(SIZE)))
    before = engine.max_grad_norm
    for x, y in loader:
        optimizer.step(loss=losses(model, x, y))
    norms = engine.engine._batch.clipping_norms
    assert engine.engine.plan.clipping_style == "layer-wise"
    assert len(norms) == 2
    assert norms[0] != norms[1]
    assert engine.max_grad_norm != before


def test_stats_and_locks() -> None:
    model, optimizer, engine = make(noise_multiplier=1.0, accounting_mode="all")
    optimizer.step(loss=losses(model, *batch()))
    stats = optimizer.get_training_stats()
    expected = {"med_clip", "max_clip", "min_clip", "snr", "signal", "noise", "noise_limit"}
    assert stats.keys() == expected
    spent = engine.get_privacy_spent()
    assert spent.keys() == {"eps_rdp", "alpha_rdp", "eps_low", "eps_estimate", "eps_upper"}
    assert "noise_multiplier=1.0" in repr(engine)
    engine.detach()
    assert not hasattr(optimizer, "virtual_step")


@pytest.mark.parametrize("bad", ["none", "mean", "misspelt"])
def test_a_loss_that_is_no_vector_is_refused_and_costs_nothing(bad: str) -> None:
    model, optimizer, engine = make()
    loss = losses(model, *batch())
    given: dict[str, Any] = {"none": {}, "mean": {"loss": loss.mean()}, "misspelt": {"lss": loss}}[
        bad
    ]
    with pytest.raises(ConfigurationError, match=r"one loss for each|Did you mean 'loss'"):
        optimizer.step(**given)
    assert engine.steps == 0
    optimizer.step(loss=loss)
    assert engine.steps == 1


def test_misspelt_arguments_name_the_right_one() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'target_epsilon'"):
        make(target_eps=1.0)
    with pytest.raises(ConfigurationError, match="Did you mean 'per_layer'"):
        make(clipping_mode="perlayer")


@pytest.mark.parametrize("drop", ["model", "optimizer", "engine"])
def test_leftovers_of_an_epoch_are_dropped_by_zero_grad(drop: str) -> None:
    """The original's trainer ends an epoch with virtual steps left over, and model.zero_grad()."""
    model = nn.Linear(3, 1, bias=False)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = PrivacyEngine(
        model, batch_size=6, sample_size=10, epochs=1, max_grad_norm=1.0, noise_multiplier=0.0
    )
    engine.attach(optimizer)
    x = 100 * torch.eye(3)[[0] * 10]  # every gradient is clipped to (1, 0, 0)

    def losses(i: int) -> torch.Tensor:
        out: torch.Tensor = model(x[2 * i : 2 * i + 2]).sum(1)
        return out

    optimizer.virtual_step(loss=losses(3))
    optimizer.virtual_step(loss=losses(4))
    {"model": model, "optimizer": optimizer, "engine": engine}[drop].zero_grad()
    optimizer.virtual_step(loss=losses(3))
    optimizer.virtual_step(loss=losses(4))
    optimizer.step(loss=losses(0))
    assert model.weight.grad is not None
    assert model.weight.grad.norm().item() * 6 == pytest.approx(6)


def test_leftovers_that_are_kept_count_an_example_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin."""
    from dptorch.engine import PrivacyEngine as Engine

    monkeypatch.setattr(Engine, "drop_batch", lambda self: None)
    with pytest.raises(AssertionError, match=r"9\.99"):
        test_leftovers_of_an_epoch_are_dropped_by_zero_grad("model")


@pytest.mark.parametrize("module", [private_transformers, fastdp])
def test_modules_of_single_layers_say_what_to_do(module: Any) -> None:
    """Importable, as in the originals; used, they name the way here."""
    with pytest.raises(
        ConfigurationError, match=r"lora_utils.* is not in dptorch\. LoRA of the peft"
    ):
        module.lora_utils.mark_only_lora_as_trainable(nn.Linear(1, 1))
    name = module.__all__[-1]
    assert name.startswith("supported_")
    with pytest.raises(
        ConfigurationError, match=rf"{name}\.compute is not in dptorch\. No per-example"
    ):
        getattr(module, name).compute(nn.Linear(1, 1))
