"""Ordinary-looking scripts whose stated epsilon would be false. Each is refused, or made true."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

import dptorch
from dptorch.errors import (
    ConfigurationError,
    ExamplesMixError,
    NotCoveredError,
    PrivacyError,
    PrivacyWarning,
)
from tests.engine.setup import (
    SIZE,
    make_data,
    make_engine,
    make_model,
    parameters,
    recorded_sums,
    train,
)
from tests.oracles.loop import norm_of


def attached(model: nn.Module, **settings: Any) -> tuple[dptorch.PrivacyEngine, torch.optim.SGD]:
    engine = make_engine(model, **settings)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    engine.attach(optimizer)
    return engine, optimizer


# -- norms that cancel -----------------------------------------------------------------------------


class Pooled(nn.Module):
    """A layer on T positions, averaged: what the positions add up to may be tiny."""

    def __init__(self, layer: nn.Module, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.dims = layer, dims

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(self.dims)


def contribution(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor) -> float:
    """The length of what one record adds to the sum."""
    _, optimizer = attached(model, max_grad_norm=1.0, loss_reduction="sum", self_check=False)
    model(x).sum(1).sum().backward()
    sums = recorded_sums(monkeypatch, optimizer.step)[0]
    return norm_of(sums)


def worst_of_cancelling_records(
    monkeypatch: pytest.MonkeyPatch, width: int, scale: float, seeds: int = 10
) -> float:
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        u = torch.randn(1, width) * scale
        x = torch.cat([u, -u + torch.randn(1, width)])[None]
        model = Pooled(nn.Linear(width, width), (1,))
        found.append(contribution(monkeypatch, model, x))
    return max(found)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
@pytest.mark.parametrize("width", [4, 64, 256])
def test_a_linear_record_whose_positions_cancel_is_clipped(
    monkeypatch: pytest.MonkeyPatch, scale: float, width: int
) -> None:
    assert worst_of_cancelling_records(monkeypatch, width, scale) <= 1.01


def test_a_record_that_cancels_a_little_is_never_above_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Just above where it would be measured again, the error of a difference is some 1e-4 of it."""
    from dptorch.tape.gradients import outer

    scales = (10.0, 30.0, 50.0, 100.0)
    worst = [worst_of_cancelling_records(monkeypatch, 16, scale) for scale in scales]
    assert max(worst) <= 1 + 1e-6
    plain = outer.without_cancellation

    def without_margin(squared: Tensor, magnitude: Tensor, *rest: Any, **more: Any) -> Tensor:
        return plain(squared, magnitude, *rest, **more | {"formed": True})

    monkeypatch.setattr(outer, "without_cancellation", without_margin)  # the broken twin
    worst = [worst_of_cancelling_records(monkeypatch, 16, scale) for scale in scales]
    assert max(worst) > 1 + 1e-5


def test_a_record_that_is_formed_is_never_above_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norm is right; the sum that is released is off by roundings, in its direction too."""
    from dptorch.tape.gradients import base

    scales = (300.0, 1000.0, 3000.0)
    worst = [worst_of_cancelling_records(monkeypatch, 16, scale) for scale in scales]
    assert max(worst) <= 1 + 1e-7
    monkeypatch.setattr(base, "_ALONG", 0.0)  # the broken twin
    worst = [worst_of_cancelling_records(monkeypatch, 16, scale) for scale in scales]
    assert max(worst) > 1 + 5e-6


class Weighed(nn.Module):
    """An embedding of one word whose gradient at each position is that position of the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return (self.embedding(torch.zeros_like(x[:, :, 0]).long()) * x).sum(1)


def worst_of_long_records(monkeypatch: pytest.MonkeyPatch, kind: str) -> float:
    """Of 1,536 positions: up in equal steps, which all round alike, and down in steps twice as long."""
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        up = 1e4 * (torch.rand(16) / 2 + 0.3)
        x = torch.cat([up.expand(1024, 16), -2 * up.expand(512, 16)])[None]
        model = Weighed(16) if kind == "embedding" else Pooled(nn.Linear(16, 16, bias=False), (1,))
        found.append(contribution(monkeypatch, model, x))
    return max(found)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_long_record_whose_positions_cancel_is_clipped(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    assert worst_of_long_records(monkeypatch, kind) <= 1 + 1e-6


def test_long_records_do_catch_a_margin_of_a_few_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: an embedding adds up position by position on every CPU."""
    from dptorch.tape.gradients import base

    monkeypatch.setattr(base, "_positions", lambda forms: 1)
    assert worst_of_long_records(monkeypatch, "embedding") > 2


class Scaled(nn.Module):
    """A long parameter whose gradient is the same number everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(2**20))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_gradient_of_many_equal_entries_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from dptorch.tape.gradients import base

    def worst() -> float:
        entries = (0.3, 0.7, 1.3, 1.7)
        return max(contribution(monkeypatch, Scaled(), torch.full((1, 1), x)) for x in entries)

    assert worst() <= 1 + 1e-5
    monkeypatch.setattr(base, "_RUN", 2**40)  # the broken twin: one sum of all squares
    assert worst() > 1 + 2e-5


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_convolved_record_whose_positions_cancel_is_clipped(
    monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    torch.manual_seed(0)
    u = torch.randn(64, 2, 4) * scale
    x = torch.cat([u, -u + torch.randn(64, 2, 4)], 1)[None]
    assert contribution(monkeypatch, Pooled(nn.Conv2d(64, 64, 1), (2, 3)), x) <= 1.01


def test_a_tied_record_whose_uses_cancel_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            u, v = x[:, 0], x[:, 1]
            return F.linear(u, self.weight) + torch.einsum("bd,pd->bp", v, self.weight)

    torch.manual_seed(0)
    u = torch.randn(1, 16) * 1e5
    x = torch.stack([u, -u + torch.randn(1, 16)], 1)
    assert contribution(monkeypatch, Twice(), x) <= 1.01


def test_the_cancelling_records_do_catch_a_plain_gram_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    from dptorch.tape.gradients import base, outer

    monkeypatch.setattr(outer, "without_cancellation", lambda squared, *rest, **more: squared)
    # What cancels to nothing looks like an underflow, and would be measured again for that.
    monkeypatch.setattr(base, "underflowed", lambda *_: None)
    assert worst_of_cancelling_records(monkeypatch, 64, 1e5) > 2


# -- parameters the engine does not follow ---------------------------------------------------------


def test_unfreezing_later_is_refused() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    engine, _ = attached(model)
    model[0].requires_grad_(True)
    with pytest.raises(NotCoveredError, match="not followed"):
        model(torch.randn(4, 5))
    assert engine.steps_done == 0


def test_freezing_later_is_refused_before_the_step_is_counted() -> None:
    model = make_model()
    engine, optimizer = attached(model)
    x, y = make_data().tensors
    model[0].requires_grad_(False)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(PrivacyError, match="have changed since"):
        optimizer.step()
    assert engine.steps_done == 0


def test_a_replaced_layer_is_refused() -> None:
    model = make_model()
    attached(model)
    model[2] = nn.Linear(7, 3)
    with pytest.raises(NotCoveredError, match="not followed"):
        model(torch.randn(4, 5))


def test_a_new_parameter_group_is_refused() -> None:
    model = make_model()
    _, optimizer = attached(model)
    optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    x, y = make_data().tensors
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ConfigurationError, match="group 1"):
        optimizer.step()


def test_a_loss_with_parameters_of_its_own_is_refused() -> None:
    model, centers = make_model(), nn.Parameter(torch.randn(3, 3))
    attached(model)
    x, y = make_data().tensors
    with pytest.raises(NotCoveredError, match=r"not followed|was not computed"):
        (model(x) - centers[y]).square().sum(1)


class _Making(nn.Module):
    """Makes a Parameter of constants, or of the batch, in its forward pass."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.layer, self.use = nn.Linear(5, 3), use
        self.made: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.made is None:
            self.made = nn.Parameter(x.mean(0) if self.use == "batch" else torch.ones(5))
        if self.use == "weight":
            return F.linear(x, self.layer.weight * self.made)
        out: Tensor = self.layer(x * self.made.square())
        return out


@pytest.mark.parametrize("use", ["input", "weight"])
def test_a_parameter_made_in_a_forward_pass_shows_no_example_and_is_not_kept(use: str) -> None:
    model = _Making(use)
    attached(model)
    x, y = make_data().tensors
    F.cross_entropy(model(x), y).backward()
    made = model.made
    assert made is not None
    assert made.grad is None or not made.grad.any()
    with pytest.raises(NotCoveredError, match="not followed"):
        model(x)


def test_a_parameter_made_of_the_batch_in_a_forward_pass_is_refused() -> None:
    """The broken twin."""
    attached(model := _Making("batch"))
    x, y = make_data().tensors
    with pytest.raises(PrivacyError):
        F.cross_entropy(model(x), y).backward()


# -- losses ----------------------------------------------------------------------------------------


def steps_on(loss: Callable[[Tensor, Tensor], Tensor], **settings: Any) -> int:
    """Two ordinary steps on batches of different sizes; how many were taken."""
    model = make_model()
    engine, optimizer = attached(model, **settings)
    x, y = make_data().tensors
    for part in (slice(0, 10), slice(10, SIZE)):
        loss(model(x[part]), y[part]).backward()
        optimizer.step()
    return engine.steps_done


def _masked(z: Tensor, y: Tensor) -> Tensor:
    mask = (y != 0).float()
    return (F.cross_entropy(z, y, reduction="none") * mask).sum() / mask.sum().item()


def _masked_by_tensor(z: Tensor, y: Tensor) -> Tensor:
    mask = (y != 0).float()
    return (F.cross_entropy(z, y, reduction="none") * mask).sum() / mask.sum()


def _by_own_value(z: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(z, y)
    return loss / loss.item()


@pytest.mark.parametrize("loss", [_masked, _masked_by_tensor, _by_own_value])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_factor_that_depends_on_the_batch_is_refused(loss: Any, reduction: str) -> None:
    with pytest.raises(
        PrivacyError, match=r"multiplied by|loss_reduction=|statistic over|read from"
    ):
        steps_on(loss, loss_reduction=reduction)


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.cross_entropy(z, y) + 0.5 * z.square().mean(),
        lambda z, y: 0.7 * F.cross_entropy(z, y) + 0.3 * z.abs().mean() * torch.tensor(2.0),
        lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(y),
        lambda z, y: sum([F.cross_entropy(z, y), z.square().mean() / 4]),
    ],
)
def test_weighted_sums_of_losses_are_welcome(loss: Any) -> None:
    assert steps_on(loss) == 2


@dataclass
class Output:
    feature: Tensor
    logits: Tensor


class Featured(nn.Module):
    """Hands out its features in a dataclass, and keeps them as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Output:
        self.kept = self.body(x)
        return Output(self.kept, self.head(self.kept))


@pytest.mark.parametrize("where", ["dataclass", "attribute"])
def test_a_contrastive_loss_is_refused_wherever_the_features_come_from(where: str) -> None:
    model = Featured()
    _, optimizer = attached(model)
    out = model(torch.randn(8, 5))
    feature = out.feature if where == "dataclass" else model.kept
    try:
        F.cross_entropy(feature @ feature.T, torch.arange(8)).backward()
    except PrivacyError:
        return
    with pytest.raises(PrivacyError, match="could not be followed"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
def test_a_dataclass_output_trains() -> None:
    model = Featured()
    engine, optimizer = attached(model)
    x, y = make_data().tensors
    F.cross_entropy(model(x).logits, y).backward()
    optimizer.step()
    assert engine.steps_done == 1


# -- batches ---------------------------------------------------------------------------------------


def test_pairing_or_selecting_rows_of_a_batch_is_refused() -> None:
    model = make_model()
    engine = make_engine(model)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    for x, _ in engine.loader(make_data()):
        with pytest.raises(PrivacyError, match="rows"):
            model(x[::2])


def test_a_batch_that_is_never_stepped_is_noticed() -> None:
    model = make_model()
    engine = make_engine(model, sample_rate=0.5, steps=4)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    loader = iter(engine.loader(make_data()))
    x, y = next(loader)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(PrivacyError, match="never stepped"):
        next(loader)


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
def test_epsilon_of_a_loader_of_ones_own_is_not_amplified_anywhere() -> None:
    model = make_model()
    engine = make_engine(model, sample_rate=0.5, noise_multiplier=1.5, max_grad_norm=1.0, steps=2)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    train(model, optimizer, DataLoader(make_data(), batch_size=12))
    assert engine.get_privacy_spent().epsilon == engine.plan.epsilon(2, own_loader_steps=2)


def test_a_sampler_that_poisson_sampling_would_replace_is_refused() -> None:
    model, data = make_model(), make_data()
    settings = {"epochs": 1, "noise_multiplier": 1.0, "target_delta": 1e-3}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(range(12)))
    with pytest.raises(ConfigurationError, match="SubsetRandomSampler"):
        dptorch.make_private(model, optimizer, loader, **settings)
    loader = DataLoader(Subset(data, range(12)), batch_size=4, shuffle=True)
    assert dptorch.make_private(model, optimizer, loader, **settings).engine.plan.sample_size == 12


# -- state -----------------------------------------------------------------------------------------


def test_a_checkpoint_used_twice_does_not_repeat_its_noise() -> None:
    """With other data the noise is other noise; with the same data the release is the same."""
    start = make_engine(make_model(), noise_multiplier=20.0, max_grad_norm=1.0, seed=None)
    state = start.state_dict()
    first, second = make_data(), TensorDataset(*(t.flip(0) for t in make_data().tensors))
    found = []
    for data in (first, first, second):
        model = make_model()
        engine = make_engine(model, noise_multiplier=20.0, max_grad_norm=1.0, seed=None)
        engine.load_state_dict(copy.deepcopy(state))
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        before = parameters(model)
        train(model, optimizer, engine.loader(data))
        found.append(parameters(model) - before)
        assert engine.statement().resumed == 1
    assert torch.equal(found[0], found[1])
    # Two independent draws, not one: the expected ratio is the root of 2, and 0 for a repetition.
    assert (found[0] - found[2]).std() > 0.8 * 20.0 * 0.1 / SIZE


def test_plan_and_counter_cannot_be_set() -> None:
    engine = make_engine(make_model())
    for name in ("plan", "steps_done"):
        with pytest.raises(AttributeError):
            setattr(engine, name, getattr(engine, name))


def test_training_a_copy_warns() -> None:
    model = make_model()
    make_engine(model)
    other = copy.deepcopy(model)
    with pytest.warns(PrivacyWarning, match="copy"):
        other(torch.randn(2, 5))


def test_an_interrupted_forward_leaves_a_usable_engine() -> None:
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.interrupt = nn.Linear(5, 3), True

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            if self.interrupt:
                raise KeyboardInterrupt
            return x

    model = Interrupted()
    _, optimizer = attached(model, self_check=False)
    x, y = make_data().tensors
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.interrupt = False
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(PrivacyWarning, match="did not come from"):
        optimizer.step()


def test_a_statistic_read_into_python_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x / x.abs().mean().item())

    model = Scaled()
    attached(model, self_check=False)
    with pytest.raises(ExamplesMixError, match=r"test_attacks.py, line \d+: 'item' reads"):
        model(torch.randn(4, 5))


@pytest.mark.parametrize("function", ["normalised", "automatic"])
def test_a_vanishing_gradient_is_not_blown_up(function: str) -> None:
    from dptorch.clipping import coefficients

    norms = torch.tensor([0.0, 1e-22, 1e-20, 1e-3])
    c = coefficients(norms, 1.0, function)
    assert (c[:3] == 0).all() if function == "normalised" else (c <= 100).all()
