"""What the engine computes: equal to ordinary training where it must be, to a loop elsewhere."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

import dptorch
from dptorch.errors import ConfigurationError
from tests.engine.setup import (
    SIZE,
    clipped_mean,
    make_data,
    make_engine,
    make_model,
    parameters,
    train,
)

LR = 0.1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("physical", [None, 7])
def test_without_clipping_and_noise_it_is_ordinary_training(
    reduction: str, physical: int | None
) -> None:
    model = make_model()
    plain = copy.deepcopy(model)
    data = make_data()
    expected = train(
        plain, torch.optim.SGD(plain.parameters(), LR, momentum=0.9), [data.tensors] * 3, reduction
    )
    engine = make_engine(model, steps=3, loss_reduction=reduction)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), LR, momentum=0.9))
    loader = engine.loader(data, max_physical_batch_size=physical)
    found = train(model, optimizer, loader, reduction, epochs=3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert engine.steps_done == 3


def _optimizers() -> list[str]:
    skipped = {
        "Optimizer": "abstract",
        "SparseAdam": "needs sparse gradients, and noise is dense",
        "LBFGS": "has a test of its own",
        "Muon": "takes matrices only",
    }
    found = [
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and name not in skipped
    ]
    assert len(found) >= 12
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", _optimizers())
def test_every_optimizer_steps_as_without_the_engine(name: str) -> None:
    model = make_model()
    plain = copy.deepcopy(model)
    data = make_data()
    kind = getattr(torch.optim, name)
    expected = train(plain, kind(plain.parameters(), lr=0.01), [data.tensors] * 2)
    engine = make_engine(model, steps=2)
    optimizer = engine.attach(kind(model.parameters(), lr=0.01))
    assert not torch.equal(parameters(model), expected)
    found = train(model, optimizer, engine.loader(data), epochs=2)
    # Adam-like optimizers divide by tiny gradients, which magnifies the order of summation.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_an_optimizer_of_sparse_gradients_is_refused_before_a_step() -> None:
    model = make_model()
    engine = make_engine(model)
    with pytest.raises(ConfigurationError, match=r"noise in every row.*torch\.optim\.Adam"):
        engine.attach(torch.optim.SparseAdam(model.parameters()))
    engine.attach(torch.optim.Adam(model.parameters()))


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="torch has Muon from 2.9 on")
def test_muon_steps_matrices() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3, bias=False)
    plain = copy.deepcopy(model)
    data = make_data()
    expected = train(plain, torch.optim.Muon(plain.parameters(), lr=0.01), [data.tensors])
    engine = make_engine(model)
    optimizer = engine.attach(torch.optim.Muon(model.parameters(), lr=0.01))
    found = train(model, optimizer, engine.loader(data))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)  # bfloat16 inside Muon


def test_lbfgs_accounts_every_evaluation_of_its_closure() -> None:
    model = make_model()
    data = make_data()
    x, y = data.tensors
    engine = make_engine(model, steps=50)
    optimizer = engine.attach(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4))
    evaluations = 0

    def closure() -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    before = F.cross_entropy(model(x), y).item()
    returned = optimizer.step(closure)
    assert engine.steps_done == evaluations > 1
    assert returned.item() == pytest.approx(before)
    assert F.cross_entropy(model(x), y).item() < before


def test_a_line_search_on_private_losses_is_refused() -> None:
    model = make_model()
    engine = make_engine(model)
    optimizer = engine.attach(torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe"))
    with pytest.raises(dptorch.errors.ConfigurationError, match="line_search_fn=None"):
        optimizer.step(lambda: 0.0)
    assert engine.steps_done == 0


def test_an_optimizer_that_calls_its_closure_is_refused_in_words() -> None:
    class ByLoss(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            self.param_groups[0]["lr"] = float(closure())  # type: ignore[operator]
            super().step()

    model = make_model()
    x, y = make_data().tensors
    engine = make_engine(model)
    optimizer = engine.attach(ByLoss(model.parameters(), lr=0.1))

    def closure() -> torch.Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    before = parameters(model)
    with pytest.raises(dptorch.errors.ConfigurationError, match="ByLoss calls its closure"):
        optimizer.step(closure)
    assert torch.equal(before, parameters(model))


@pytest.mark.parametrize("physical", [None, 5, 1])
def test_clipping_equals_the_loop(physical: int | None) -> None:
    model = make_model()
    data = make_data()
    bound = 0.3
    expected = parameters(model) - LR * clipped_mean(model, data, bound, SIZE)
    engine = make_engine(model, max_grad_norm=bound)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), LR))
    found = train(model, optimizer, engine.loader(data, max_physical_batch_size=physical))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert engine.diagnostics is not None
    assert engine.diagnostics.clipped_fraction > 0.9
    assert engine.diagnostics.examples == SIZE


@pytest.mark.parametrize("how", ["backwards", "virtual steps", "per-example losses", "closure"])
def test_one_logical_batch_in_several_ways(how: str) -> None:
    model = make_model()
    data = make_data()
    bound = 0.3
    expected = parameters(model) - LR * clipped_mean(model, data, bound, SIZE)
    x, y = data.tensors
    engine = make_engine(model, max_grad_norm=bound)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), LR))
    if how == "per-example losses":
        F.cross_entropy(model(x), y, reduction="none").backward()
        optimizer.step()
    elif how == "closure":

        def closure() -> torch.Tensor:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
    else:
        for part in (slice(0, 10), slice(10, SIZE)):
            F.cross_entropy(model(x[part]), y[part]).backward()
            if how == "virtual steps" and part.start == 0:
                optimizer.virtual_step()
                optimizer.zero_grad()
        optimizer.step()
    torch.testing.assert_close(parameters(model), expected, rtol=1e-5, atol=1e-7)
    assert engine.steps_done == 1


def test_zero_grad_discards_what_was_not_stepped() -> None:
    model = make_model()
    data = make_data()
    x, y = data.tensors
    expected = parameters(model) - LR * clipped_mean(model, data, 0.3, SIZE)
    engine = make_engine(model, max_grad_norm=0.3)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), LR))
    F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    torch.testing.assert_close(parameters(model), expected, rtol=1e-5, atol=1e-7)


def test_a_schedule_made_before_or_after_attaching() -> None:
    for before in (True, False):
        model = make_model()
        engine = make_engine(model)
        optimizer = torch.optim.SGD(model.parameters(), LR)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) if before else None
        engine.attach(optimizer)
        schedule = schedule or torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for _ in range(2):
            train(model, optimizer, engine.loader(make_data()))
            schedule.step()
        assert engine.steps_done == 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(LR / 4)


def test_detach_gives_everything_back() -> None:
    model = make_model()
    plain = copy.deepcopy(model)
    data = make_data()
    engine = make_engine(model)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), LR))
    train(model, optimizer, engine.loader(data))
    plain.load_state_dict(model.state_dict())
    engine.detach()
    assert not hasattr(optimizer, "privacy_engine")
    assert not hasattr(optimizer, "virtual_step")
    expected = train(plain, torch.optim.SGD(plain.parameters(), LR), [data.tensors])
    torch.testing.assert_close(train(model, optimizer, [data.tensors]), expected)
    again = make_engine(model)
    again.attach(optimizer)
    again.detach()


def test_public_batches_are_ordinary() -> None:
    model = make_model()
    x, y = make_data().tensors
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(x), y).backward()
    engine = make_engine(model)
    engine.attach(torch.optim.SGD(model.parameters(), LR))
    with engine.public():
        F.cross_entropy(model(x), y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert engine.steps_done == 0


def test_copies_of_the_model_are_ordinary() -> None:
    model = make_model()
    data = make_data()
    engine = make_engine(model)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), LR))
    train(model, optimizer, engine.loader(data))
    averaged = copy.deepcopy(model)
    x, y = data.tensors
    F.cross_entropy(averaged(x), y).backward()
    assert all(p.grad is not None for p in averaged.parameters())
    other = make_engine(averaged)
    other.detach()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(loaded(x).detach(), model(x).detach())
    assert torch.equal(parameters(loaded), parameters(model))


def test_a_generator_and_a_discriminator() -> None:
    """Two private models in one loss: each engine sees the gradients of its own."""
    torch.manual_seed(0)
    real = torch.randn(SIZE, 5)
    generator, discriminator = torch.nn.Linear(2, 5), torch.nn.Linear(5, 1)
    engines = [make_engine(m) for m in (generator, discriminator)]
    optimizers = [e.attach(torch.optim.SGD(e.model.parameters(), LR)) for e in engines]
    plain = [copy.deepcopy(m) for m in (generator, discriminator)]
    z = torch.randn(SIZE, 2)
    fake = generator(z)
    loss = F.softplus(-discriminator(fake)).mean() + (fake - real).abs().mean()
    loss.backward()
    optimizers[0].step()
    fake = plain[0](z)
    (F.softplus(-plain[1](fake)).mean() + (fake - real).abs().mean()).backward()
    for p, q in zip(generator.parameters(), plain[0].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
    assert [e.steps_done for e in engines] == [1, 0]
