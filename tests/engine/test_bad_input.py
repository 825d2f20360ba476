"""Every mistake the engine can see is an error that states the value and the way out."""

import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dptorch
from dptorch.errors import (
    ConfigurationError,
    DataError,
    ExamplesMixError,
    PrivacyError,
    PrivacyWarning,
)
from tests.engine.setup import SIZE, make_data, make_engine, make_model, parameters


def test_batchnorm_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    for self_check in (True, False):
        engine = make_engine(model, self_check=self_check)
        with pytest.raises(
            ExamplesMixError, match=r"'1' \(BatchNorm1d\).*dptorch\.prepare"
        ) as error:
            model(torch.randn(4, 5))
        assert "eval" in str(error.value) or self_check
        engine.detach()
    model.eval()
    make_engine(model)
    assert model(torch.randn(4, 5)).shape == (4, 3)


@pytest.mark.parametrize("shape", [(SIZE, 3), (1, SIZE)])
def test_a_loss_that_is_neither_scalar_nor_per_example(shape: tuple[int, ...]) -> None:
    model = make_model()
    engine = make_engine(model)
    assert engine.steps_done == 0
    loss = model(torch.randn(SIZE, 5))
    loss = loss if shape == (SIZE, 3) else loss.sum(1)[None]
    with pytest.raises(ConfigurationError, match=r"expected a scalar, or one value for each"):
        loss.backward()


def test_target_epsilon_out_of_reach() -> None:
    with pytest.raises(ConfigurationError, match=r"unreachable.*no epsilon below 0\.0035"):
        dptorch.make_plan(
            batch_size=10, sample_size=100, steps=10**6, target_epsilon=1e-9, target_delta=1e-5,
            accountant="rdp",
        )  # fmt: skip


def test_delta_that_is_too_large_warns() -> None:
    with pytest.warns(PrivacyWarning, match="1/100"):
        dptorch.make_plan(
            batch_size=10, sample_size=100, steps=1, noise_multiplier=1.0, target_delta=0.02
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"sample_rate": None, "batch_size": 2 * SIZE}, "larger than sample_size"),
        ({"sample_rate": None, "batch_size": 2, "sample_size": None}, "sample_size"),
        ({"sample_rate": 0.5, "batch_size": 3}, "contradict"),
        ({"sample_size": 0}, "sample_size"),
        ({"steps": 0.5}, "steps"),
        ({"steps": None}, "exactly one"),
        ({"epochs": 3}, "exactly one"),
        ({"target_epsilon": 1.0}, "exactly one"),
        ({"noise_multiplier": None}, "exactly one"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"target_delta": 0.0}, "target_delta"),
        ({"target_delta": 1.0}, "target_delta"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm"),
        ({"clipping_fn": "abbadi"}, "'abadi'.*Did you mean 'abadi'"),
        ({"clipping_mode": "gosth"}, "clipping_mode"),
        ({"clipping_style": "all-layers"}, "Did you mean 'all-layer'"),
        ({"accountant": "pdl"}, "'pld'"),
        ({"adjacency": "replace"}, "replace-one"),
        ({"loss_reduction": "none"}, "'mean', 'sum'"),
        ({"on_budget_exhausted": "ignore"}, "'raise', 'stop'"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    model = make_model()
    with pytest.raises(ConfigurationError, match=message):
        make_engine(model, **settings)
    make_engine(model)  # nothing half done: the model is free


def test_an_unknown_argument() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"'max_grad_nrm' is not known.*'plan'.*Did you mean 'max_grad_norm'",
    ):
        make_engine(make_model(), max_grad_nrm=1.0)


def test_parameters_that_only_one_side_has() -> None:
    model = make_model()
    engine = make_engine(model)
    stranger = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match=r"not\s+a trainable parameter of the model"):
        engine.attach(torch.optim.SGD([*model.parameters(), *stranger.parameters()], 0.1))
    with pytest.raises(
        ConfigurationError, match=r"'0\.weight' and 1 more are not in the optimizer"
    ):
        engine.attach(torch.optim.SGD(model[2].parameters(), 0.1))
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ConfigurationError, match="already has an optimizer"):
        engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    other = make_engine(make_model())
    with pytest.raises(ConfigurationError):
        other.attach(optimizer)


def test_step_without_backward() -> None:
    model = make_model()
    engine = make_engine(model)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    for call in (optimizer.step, optimizer.virtual_step):
        with pytest.raises(PrivacyError, match="without a backward"):
            call()
    with torch.no_grad():
        model(torch.randn(4, 5))
    with pytest.raises(PrivacyError, match="without a backward"):
        optimizer.step()
    assert engine.steps_done == 0


def test_two_engines_on_one_model() -> None:
    model = make_model()
    first = make_engine(model)
    with pytest.raises(ConfigurationError, match="already has a privacy engine"):
        make_engine(model)
    first.detach()
    make_engine(model)


def test_a_model_without_trainable_parameters() -> None:
    model = make_model().requires_grad_(False)
    with pytest.raises(ConfigurationError, match="no trainable parameter"):
        make_engine(model)


def test_a_lazy_layer_without_a_shape() -> None:
    with pytest.raises(ConfigurationError, match="Call the model once"):
        make_engine(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)))


def test_a_step_that_is_given_a_loss() -> None:
    model = make_model()
    optimizer = make_engine(model).attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ConfigurationError, match=r"step\(loss=\)"):
        optimizer.step(loss=1.0)  # type: ignore[call-arg]


def test_datasets_that_cannot_be_sampled() -> None:
    engine = make_engine(make_model())
    empty = TensorDataset(torch.zeros(0, 5))
    with pytest.raises(DataError, match="empty"):
        engine.loader(empty)
    with pytest.raises(ConfigurationError, match="sample_size=24"):
        engine.loader(make_data(10))
    with pytest.raises(ConfigurationError, match="shuffle"):
        engine.loader(make_data(), shuffle=True)


def test_make_private_needs_a_batch_size() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = DataLoader(make_data(), batch_size=None)
    with pytest.raises(ConfigurationError, match="no batch size"):
        dptorch.make_private(model, optimizer, loader, epochs=1, noise_multiplier=1.0)


def test_make_private_leaves_nothing_behind_when_it_fails() -> None:
    model = make_model()
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    loader = DataLoader(make_data(), batch_size=4)
    settings = {"epochs": 1, "noise_multiplier": 1.0, "target_delta": 1e-3}
    with pytest.raises(ConfigurationError):
        dptorch.make_private(model, stranger, loader, **settings)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    private = dptorch.make_private(model, optimizer, loader, **settings)
    assert private.engine.plan.expected_batch_size == 4


@pytest.mark.parametrize("told", ["mean", "sum"])
def test_a_loss_reduced_otherwise_than_told(told: str) -> None:
    model = make_model()
    x, y = make_data().tensors
    engine = make_engine(model, loss_reduction=told)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    used = "sum" if told == "mean" else "mean"
    loss = F.cross_entropy(model(x), y, reduction=used)
    with pytest.raises(PrivacyError, match=f"loss_reduction='{used}'"):
        loss.backward()
    assert engine.steps_done == 0


def test_inputs_with_different_numbers_of_examples() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return self.a(x) + table.sum()

    model = Two()
    engine = make_engine(model)
    with pytest.raises(ConfigurationError, match="batch_dims"):
        model(torch.randn(4, 3), torch.randn(5, 2))
    engine.detach()
    make_engine(model, batch_dims={"table": None})
    assert model(torch.randn(4, 3), torch.randn(5, 2)).shape == (4, 2)


class _InsideAnObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, batch: Any) -> torch.Tensor:
        return self.linear(batch["x"] if isinstance(batch, dict) else batch.x)


def test_a_batch_inside_an_object_of_ones_own() -> None:
    """What the message names as the way out works: a dict."""
    for wrap in (lambda x: SimpleNamespace(x=x), lambda x: {"x": x}):
        model = _InsideAnObject()
        engine = make_engine(model)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        data = TensorDataset(torch.randn(SIZE, 5), torch.zeros(SIZE, dtype=torch.long))
        refused = pytest.raises(PrivacyError, match="no argument of the model was a tensor")
        for x, y in engine.loader(data):
            with nullcontext() if isinstance(wrap(x), dict) else refused:
                F.cross_entropy(model(wrap(x)), y).backward()
                optimizer.step()
            break
        assert engine.steps_done == isinstance(wrap(x), dict)


def test_a_loss_over_pairs_of_examples() -> None:
    model = make_model()
    make_engine(model)
    z = model(torch.randn(4, 5))
    scores = z @ z.T
    with pytest.raises(ExamplesMixError, match="matmul"):
        F.cross_entropy(scores, torch.arange(4)).backward()


def backward(model: nn.Module) -> None:
    x, y = make_data().tensors
    F.cross_entropy(model(x), y).backward()


def test_training_without_an_attached_optimizer_is_noticed_once() -> None:
    model = make_model()
    make_engine(model)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    before = parameters(model)
    backward(model)
    plain.step()
    assert torch.equal(parameters(model), before)
    with pytest.warns(PrivacyWarning, match=r"no optimizer is attached.*engine\.attach") as caught:
        backward(model)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrivacyWarning)
        backward(model)


def test_the_engines_loader_refuses_to_go_on_without_an_optimizer() -> None:
    model = make_model()
    batches = iter(make_engine(model, sample_rate=0.5).loader(make_data()))
    for _ in range(10):
        x, y = next(batches)
        if len(x):
            break
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(PrivacyError, match=r"no optimizer is attached.*engine\.attach"):
        next(batches)


@pytest.mark.filterwarnings("error::dptorch.errors.PrivacyWarning")
def test_who_has_an_optimizer_or_evaluates_is_not_warned() -> None:
    model = make_model()
    engine = make_engine(model)
    with engine.public():  # on public data, ordinary gradients
        backward(model)
        backward(model)
    assert model[0].weight.grad is not None
    model(make_data().tensors[0])  # a forward pass without a backward
    with torch.no_grad():
        model(make_data().tensors[0])
    backward(model)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))  # late, in time
    backward(model)
    optimizer.zero_grad()
    for x, y in engine.loader(make_data()):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.steps_done == 1
