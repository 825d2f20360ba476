"""BloGSPrivacyEngine with its shuffle: what is stepped, when it stops, and what it says of itself."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dptorch.blogs import BloGSPrivacyEngine, BloGSSpent
from dptorch.errors import BudgetExhausted, ConfigurationError, PrivacyError, PrivacyWarning

pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")

SETTINGS = {
    "target_epsilon": 8.0,
    "delta": 1e-5,
    "clip_value": 1.0,
    "steps": 20,
    "batch_size": 8,
    "seed": 0,
}

# An index that reads no clip value, and small blocks: what one step does to the gradient.
SMALL_BLOCKS = {"index": "0.1.21", "dataset_size": 800, "target_epsilon": 0.005}


def _mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 10))


def _engine(model, *, lr=0.1, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return BloGSPrivacyEngine(optimizer, model, **{**SETTINGS, **settings})


def _backward(model, n=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 30, generator=generator)
    F.cross_entropy(model(x), torch.arange(n) % 10).backward()


def _multiset(tensor):
    return Counter(tensor.flatten().tolist())


def test_forgetnets_loop(capsys):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    privacy_engine = BloGSPrivacyEngine(
        optimizer=optimizer,
        model=model,
        target_epsilon=8.0,
        delta=1e-5,
        clip_value=1.0,
        steps=4,
        batch_size=8,
    )
    for batch_idx in range(4):
        privacy_engine.zero_grad()
        loss = F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8))
        loss.backward()
        epsilon_spent, delta = privacy_engine.step()
        print(f"Batch {batch_idx}, Loss: {loss.item():.4f}, Epsilon: {epsilon_spent:.4f}")
    total_epsilon_spent = privacy_engine.get_privacy_spent()
    print(f"Total privacy spent: ε = {total_epsilon_spent:.4f}")
    assert delta == 1e-5
    assert 0 < total_epsilon_spent <= 8.0
    assert f"ε = {float(total_epsilon_spent):.4f}" in capsys.readouterr().out


def test_a_step_applies_the_clipped_blocks_in_another_order():
    model = _mlp()
    engine = _engine(model, lr=1.0, clip_value=0.01, **SMALL_BLOCKS)
    before = [p.detach().clone() for p in model.parameters()]
    _backward(model)
    raw = [p.grad.clone() for p in model.parameters()]
    engine.step()
    for p, old, g in zip(model.parameters(), before, raw, strict=True):
        clipped = g * (0.01 / g.norm()).clamp(max=1)
        applied = p.grad
        assert not torch.equal(applied, clipped)
        torch.testing.assert_close(applied.flatten().sort().values, clipped.flatten().sort().values)
        torch.testing.assert_close(p.detach(), old - applied)


@pytest.mark.parametrize("through", ["engine.step", "optimizer.step", "closure"])
def test_no_raw_gradient_is_stepped_whichever_step_is_called(through):
    model = _mlp()
    engine = _engine(model, clip_value=100.0, **SMALL_BLOCKS)
    _backward(model)
    raw = [p.grad.clone() for p in model.parameters()]
    if through == "engine.step":
        engine.step()
    elif through == "optimizer.step":
        engine.optimizer.step()
    else:
        engine.zero_grad()
        engine.optimizer.step(lambda: _backward(model))
    for p, g in zip(model.parameters(), raw, strict=True):
        assert not torch.equal(p.grad, g)
        assert _multiset(p.grad) == _multiset(g)
    assert engine.steps_done == 1


def test_accumulated_backwards_are_shuffled_once():
    model = _mlp()
    engine = _engine(model, clip_value=1e3, **SMALL_BLOCKS)
    for seed in (1, 2, 3):
        _backward(model, seed=seed)
    accumulated = [p.grad.clone() for p in model.parameters()]
    engine.step()
    assert engine.steps_done == 1
    for p, g in zip(model.parameters(), accumulated, strict=True):
        assert _multiset(p.grad) == _multiset(g)


def test_tied_frozen_and_unused_parameters():
    torch.manual_seed(0)
    model = nn.Module()
    model.embed = nn.Embedding(12, 6)
    model.head = nn.Linear(6, 12)
    model.head.weight = model.embed.weight
    model.frozen = nn.Linear(6, 6).requires_grad_(False)
    model.unused = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = BloGSPrivacyEngine(optimizer, model, **{**SETTINGS, "target_epsilon": 500.0})
    ids = torch.arange(12)
    logits = model.head(model.frozen(model.embed(ids)))
    F.cross_entropy(logits, ids).backward()
    raw = model.embed.weight.grad.clone()
    frozen = model.frozen.weight.clone()
    engine.step()
    torch.testing.assert_close(
        model.embed.weight.grad.flatten().sort().values,
        (raw * (1 / raw.norm()).clamp(max=1)).flatten().sort().values,
    )
    assert torch.equal(model.frozen.weight, frozen)
    sizes = engine.statement().block_sizes
    assert set(sizes) == {"embed.weight", "head.bias", "unused.weight", "unused.bias"}


def test_the_index_grows_and_the_run_stops_at_its_target():
    model = _mlp()
    engine = _engine(model, steps=5)
    spent = []
    for _ in range(5):
        engine.zero_grad()
        _backward(model)
        epsilon, _ = engine.step()
        spent.append(float(epsilon))
    assert spent == sorted(set(spent))
    assert 0 < spent[-1] <= 8.0
    while not engine.exhausted:
        _backward(model)
        engine.step()
    assert 5 <= engine.steps_done < 500
    before = [p.detach().clone() for p in model.parameters()]
    _backward(model)
    with pytest.warns(PrivacyWarning, match="was not taken"):
        engine.step()
    assert engine.get_privacy_spent() <= 8.0
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_run_past_its_target_raises_where_asked():
    model = _mlp()
    engine = _engine(model, steps=1, on_budget_exhausted="raise", index="0.1.21", dataset_size=80)
    while not engine.exhausted:
        _backward(model)
        engine.step()
    _backward(model)
    with pytest.raises(BudgetExhausted, match="BloGS index stands at"):
        engine.step()
    assert engine.get_privacy_spent() <= 8.0


def test_a_step_without_gradients_is_none():
    engine = _engine(_mlp())
    engine.zero_grad()
    assert engine.step() == 0.0
    assert engine.steps_done == 0


def test_a_target_out_of_reach_names_what_can_be_met_and_leaves_the_optimizer_alone():
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {**SETTINGS, "target_epsilon": 1e-3}
    with pytest.raises(ConfigurationError, match=r"BloGS index of (\d|\.)+.*gaussian"):
        BloGSPrivacyEngine(optimizer, model, **settings)
    assert not hasattr(optimizer, "privacy_engine")
    with pytest.warns(PrivacyWarning, match="cannot be met"):
        engine = BloGSPrivacyEngine(optimizer, model, **settings, on_unattainable="minimum")
    assert set(engine.statement().block_sizes.values()) == {1}
    for _ in range(20):
        _backward(model)
        engine.step()
    assert engine.exhausted
    assert engine.get_privacy_spent() == pytest.approx(engine.statement().target_epsilon)


def test_one_warning_at_construction_says_all_of_it():
    model = nn.Sequential(nn.Linear(30, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _engine(model, target_epsilon=50.0)
    said = [str(w.message) for w in caught if issubclass(w.category, PrivacyWarning)]
    assert len(said) == 1
    for part in ("withdrawn", "2407.21347", "every block", "infinity", "gaussian"):
        assert part in said[0]
    assert "2.bias" in said[0]  # one element: no order to permute
    assert "1.running_mean" in said[0]
    assert "seed" in said[0]
    assert caught[0].filename == __file__


def test_the_statement_claims_nothing():
    model = nn.Sequential(nn.Linear(30, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    engine = _engine(model, target_epsilon=50.0)
    model(torch.randn(4, 30)).sum().backward()
    engine.step()
    statement = engine.statement()
    text, plain = str(statement), statement.to_dict()
    assert statement.guarantee == "none (heuristic)"
    assert statement.formal_epsilon == math.inf
    assert "guarantee            none (heuristic)" in text
    assert "formal epsilon       infinity" in text
    assert "BloGS index" in text
    assert plain["unshuffled_tensors"] == ["2.bias"]
    assert "1.running_var" in plain["exact_buffers"]
    assert plain["nominal_epsilon"] == float(engine.get_privacy_spent())
    assert json.loads(json.dumps(plain)) == plain


def test_what_is_spent_is_a_number_with_its_meaning():
    spent = BloGSSpent.of_shuffle(0.99, 1e-5)
    epsilon, delta = spent
    assert (epsilon, delta) == (0.99, 1e-5)
    assert spent.nominal_epsilon == 0.99
    assert spent.formal_epsilon == math.inf
    assert "nominal_epsilon" in repr(spent)
    assert "none (heuristic)" in repr(spent)
    copy = pickle.loads(pickle.dumps(spent))
    assert copy == spent
    assert copy.guarantee == spent.guarantee


def test_a_parameter_unfrozen_later_is_not_stepped_as_it_is():
    model = _mlp()
    model[0].weight.requires_grad_(False)
    engine = _engine(model)
    model[0].weight.requires_grad_(True)
    before = model[0].weight.clone()
    _backward(model)
    with pytest.raises(PrivacyError, match="not trainable"):
        engine.step()
    assert torch.equal(model[0].weight, before)
    assert engine.steps_done == 0


def test_a_bad_gradient_is_no_step():
    model = _mlp()
    engine = _engine(model)
    before = [p.detach().clone() for p in model.parameters()]
    _backward(model)
    model[2].bias.grad[0] = float("inf")
    with pytest.raises(PrivacyError, match=r"'2\.bias' is not finite"):
        engine.step()
    assert engine.steps_done == 0
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_schedulers_and_adam_go_on_as_usual():
    model = _mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine = BloGSPrivacyEngine(optimizer, model, **SETTINGS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        engine.zero_grad()
        _backward(model)
        engine.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def _steps(model, engine, seeds):
    for seed in seeds:
        engine.zero_grad()
        _backward(model, seed=seed)
        engine.step()


def test_a_resumed_run_is_the_run():
    whole = _mlp()
    _steps(whole, _engine(whole), range(6))
    first = _mlp()
    engine = _engine(first)
    _steps(first, engine, range(3))
    second = _mlp()
    second.load_state_dict(first.state_dict())
    other = _engine(second, seed=None)
    other.load_state_dict(engine.state_dict())
    _steps(second, other, range(3, 6))
    assert other.steps_done == 6
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True)
    )
    with pytest.raises(ConfigurationError, match="another"):
        _engine(_mlp(), target_epsilon=4.0).load_state_dict(engine.state_dict())


def test_detach_gives_the_optimizer_back():
    model = _mlp()
    engine = _engine(model)
    with pytest.raises(ConfigurationError, match="already has a privacy engine"):
        BloGSPrivacyEngine(engine.optimizer, model, **SETTINGS)
    engine.detach()
    _backward(model)
    raw = model[0].weight.grad.clone()
    engine.optimizer.step()
    assert torch.equal(model[0].weight.grad, raw)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"target_epsilon": -1.0}, "target_epsilon=-1.0"),
        ({"target_epsilon": math.inf}, "target_epsilon=inf"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"clip_value": 0.0}, r"clip_value=0\.0"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, r"steps=2\.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"mechanism": "shufle"}, "Did you mean 'shuffle'"),
        ({"index": "2025"}, "Did you mean '2024'"),
        ({"index": "0.1.21"}, "dataset_size"),
        ({"on_unattainable": "ignore"}, "on_unattainable='ignore'"),
        ({"on_budget_exhausted": "go on"}, "on_budget_exhausted"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(ConfigurationError, match=message):
        _engine(_mlp(), **setting)


def test_an_optimizer_of_other_parameters_is_refused():
    model, other = _mlp(), _mlp()
    with pytest.raises(ConfigurationError, match="trainable parameter"):
        BloGSPrivacyEngine(torch.optim.SGD(other.parameters(), lr=0.1), model, **SETTINGS)
