"""Programs that look like breaks and are none: each runs, and its broken twin is refused."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.tape.recording import batches
from tests.engine.setup import SIZE, Loss, make_data, make_engine, make_model, steps_with

pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
EXPECTED = SIZE / 2


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h: Tensor = self.layer(x + z)
        return h


def order_of(x: Tensor) -> Tensor:
    return torch.randperm(len(x), generator=torch.Generator().manual_seed(5))


def _two_permuted(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    order = order_of(x)
    return F.cross_entropy(m(x[order], 0.1 * x[order]), y[order])


def _second_input_not_permuted(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    order = order_of(x)
    return F.cross_entropy(m(x[order], 0.1 * x), y[order])


def _second_input_mixed(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    order = order_of(x)
    return F.cross_entropy(m(x[order], x - x.mean(0)), y[order])


def _outputs_given_again(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    order = order_of(x)
    with torch.no_grad():
        again = m(x[order], x[order]).sum(1, keepdim=True)
    return F.cross_entropy(m(x[order], again.expand(-1, 5)), y[order])


def permuted(choose: Callable[[Tensor], Tensor], labels: bool = True) -> Loss:
    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        chosen = choose(order_of(x))
        return F.cross_entropy(m(x[chosen]), y[chosen] if labels else y[: len(chosen)])

    return loss


def _first_twice(order: Tensor) -> Tensor:
    return torch.cat([order[:1], order[:-1]])


@pytest.mark.parametrize("own", [False, True])
def test_rows_may_be_put_in_another_order(own: bool) -> None:
    assert steps_with(permuted(lambda order: order), make_model(), own=own) == 2
    assert steps_with(_two_permuted, TwoInputs(), own=own) == 2
    assert steps_with(_outputs_given_again, TwoInputs(), own=own) == 2


@pytest.mark.parametrize("loss", [_second_input_not_permuted, _second_input_mixed])
def test_inputs_in_different_orders_are_refused(loss: Loss) -> None:
    with pytest.raises(PrivacyError):
        steps_with(loss, TwoInputs())


@pytest.mark.parametrize(
    "loss",
    [
        permuted(lambda order: order, labels=False),
        permuted(_first_twice),
        permuted(lambda order: order[:-1]),
        permuted(lambda order: torch.zeros_like(order)),
    ],
)
def test_rows_that_are_paired_left_out_or_taken_twice_are_refused(loss: Loss) -> None:
    with pytest.raises(PrivacyError):
        steps_with(loss, make_model())


def total(divisor: Callable[[int], float]) -> Loss:
    """A sum of losses over a number; there is one more term at half its weight."""

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = m(x)
        each = F.cross_entropy(out, y, reduction="sum") + 0.5 * out.square().sum()
        return each / divisor(len(x))

    return loss


@pytest.mark.parametrize("physical", [None, 5, 1])
def test_a_sum_over_the_expected_batch_size_is_a_mean(physical: int | None) -> None:
    found = []
    for divisor, reduction in ((lambda n: EXPECTED, "mean"), (lambda n: 1.0, "sum")):
        model = make_model()
        engine = make_engine(model, sample_rate=0.5, steps=1, loss_reduction=reduction)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        for x, y in engine.loader(make_data(), max_physical_batch_size=physical):
            total(divisor)(model, x, y).backward()
            optimizer.step()
        scale = 1.0 if reduction == "mean" else EXPECTED
        found.append(torch.cat([p.grad.flatten() / scale for p in model.parameters()]))  # type: ignore[union-attr]
    assert torch.allclose(*found, rtol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_a_sum_over_anything_else_is_refused(own: bool) -> None:
    assert steps_with(total(lambda n: EXPECTED), make_model(), own=own) == 2
    assert steps_with(total(float), make_model(), own=own) == 2
    for divisor in (lambda n: n**2, lambda n: EXPECTED + 1, lambda n: 1.0):
        with pytest.raises(PrivacyError, match="expected batch size, 12"):
            steps_with(total(divisor), make_model(), own=own)


def test_a_divisor_that_changes_is_refused() -> None:
    divisors = iter([EXPECTED, 2 * EXPECTED])
    with pytest.raises(PrivacyError):
        steps_with(total(lambda n: next(divisors)), make_model())


def selected(reduction: str, *, column: bool = False) -> Loss:
    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out, keep = m(x), y != 1
        if column:
            return F.mse_loss(out[keep][:, 0], y[keep][:, None].float(), reduction=reduction)
        return F.cross_entropy(out[keep], y[keep], reduction=reduction)

    return loss


@pytest.mark.parametrize("own", [False, True])
def test_losses_of_selected_rows_may_be_summed(own: bool) -> None:
    def run(loss: Loss) -> int:
        return steps_with(loss, make_model(), own=own, loss_reduction="sum")

    assert run(selected("sum")) == 2
    for broken in (selected("mean"), selected("sum", column=True)):
        with pytest.raises(PrivacyError):
            run(broken)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_scaler_of_gradients_is_refused_with_a_way_out() -> None:
    model = make_model()
    engine = make_engine(model)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    x, y = make_data().tensors
    for enabled, unscale in ((True, False), (True, True), (False, False)):
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        if enabled:
            with pytest.raises(ConfigurationError, match=r"enabled=False"):
                scaler.step(optimizer)
            engine.drop_batch()
            engine._batch.loss_factors = None
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        else:
            scaler.step(optimizer)
    assert engine.steps_done == 1
    engine.detach()
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


def backwards(engine: Any, optimizer: Any, *batches: tuple[Tensor, Tensor]) -> None:
    """A step on the sum of several backwards."""
    optimizer.zero_grad()
    for x, y in batches:
        F.cross_entropy(engine.model(x), y).backward()
    optimizer.step()


def test_rows_of_a_loader_of_ones_own_count_once_a_step() -> None:
    model = make_model()
    engine = make_engine(model, steps=20)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    x, y = make_data().tensors
    whole, first, last = (x, y), (x[:8], y[:8]), (x[16:], y[16:])
    backwards(engine, optimizer, first, last)
    backwards(engine, optimizer, whole)
    backwards(engine, optimizer, whole)  # in another step
    backwards(engine, optimizer, (x[:8], y[:8]), (x[8:16], y[8:16]))
    outs = [model(a) for a, _ in (first, last)]  # two forwards, then a backward of each
    for out, (_, b) in zip(outs, (first, last), strict=True):
        F.cross_entropy(out, b).backward()
    optimizer.step()
    taken = engine.steps_done
    for again in ((whole, whole), (first, last, first), (whole, (x[:8], y[:8])),
                  ((x[4:8], y[4:8]), (x[7:9], y[7:9]))):  # fmt: skip
        with pytest.raises(PrivacyError, match="count twice"):
            backwards(engine, optimizer, *again)
        optimizer.zero_grad()
        engine.drop_batch()
    assert engine.steps_done == taken == 5


def test_a_virtual_step_does_not_forget_which_rows_it_counted() -> None:
    model = make_model()
    engine = make_engine(model)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    x, y = make_data().tensors
    F.cross_entropy(model(x), y).backward()
    optimizer.virtual_step()  # type: ignore[attr-defined]
    with pytest.raises(PrivacyError, match="count twice"):
        backwards(engine, optimizer, (x, y))


def by_numpy(t: Tensor) -> Tensor:
    return torch.from_numpy(2 * t.numpy() - 1) / 2


def by_a_list(t: Tensor) -> Tensor:
    return torch.tensor(t.tolist())


def by_pickling(t: Tensor) -> Tensor:
    found: Tensor = pickle.loads(pickle.dumps(t))
    return found


def came_back(how: Callable[[Tensor], Tensor], column: bool) -> Loss:
    """The target has left and come back, as a column for a column of outputs or not."""

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        target = how(y.float())
        return F.mse_loss(m(x)[:, :1], target[:, None] if column else target)

    return loss


def weights_that_came_back(how: Callable[[Tensor], Tensor], mixed: bool) -> Loss:
    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(m(x), y, reduction="none")
        weights = each.detach() / (each.detach().max() if mixed else 2.0)
        return (each * how(weights)).mean()

    return loss


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", [by_numpy, by_a_list, by_pickling, copy.deepcopy])
@pytest.mark.parametrize("own", [False, True])
def test_rows_that_left_and_came_back_are_rows(
    how: Any, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A batch of an earlier refusal, which new rows of that size would join.
    monkeypatch.setattr(batches, "_latest", None)
    assert steps_with(came_back(how, column=True), make_model(), own=own) == 2
    assert steps_with(weights_that_came_back(how, mixed=False), make_model(), own=own) == 2
    with pytest.raises(PrivacyError):
        steps_with(came_back(how, column=False), make_model(), own=own)
    with pytest.raises(PrivacyError):
        steps_with(weights_that_came_back(how, mixed=True), make_model(), own=own)


def scaled_by_numpy(scale: Callable[[Any], Any], of_input: bool) -> Loss:
    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if of_input:
            return F.cross_entropy(m(torch.from_numpy(scale(x.numpy()))), y)
        return F.mse_loss(m(x)[:, 0], torch.from_numpy(scale(x[:, 0].numpy())))

    return loss


STATISTICS = {
    "standardised": lambda v: (v - v.mean()) / v.std(),
    "over the largest": lambda v: v / abs(v).max(),
    "centred": lambda v: v - v.mean(),
    "range": lambda v: (v - v.min()) / (v.max() - v.min()),
    "share": lambda v: v / v.sum(),
    "centred round numbers": lambda v: v - v.mean(),
    "round numbers over the largest": lambda v: v / abs(v).max(),
}


@pytest.mark.slow
@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("name", STATISTICS)
def test_what_came_back_scaled_by_statistics_is_mixed(
    name: str, of_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = scaled_by_numpy(STATISTICS[name], of_input)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return scaled(m, x.round() if "round" in name else x, y)

    with pytest.raises(PrivacyError, match=r"times .* plus"):
        steps_with(loss, make_model())
    # Broken twin: any multiple is what it was, as if its constants were public.
    monkeypatch.setattr(batches, "_is_public", lambda *_: True)
    assert steps_with(loss, make_model()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "scale",
    [
        lambda v: 2 * v - 1,
        lambda v: v / 255,
        lambda v: v / 127.5 - 1,
        lambda v: (v - 0.485) / 0.229,
        lambda v: 0.9 * v + 0.1 / 7,
        lambda v: v.astype("float64").astype("float32"),
    ],
)
@pytest.mark.parametrize("of_input", [False, True])
def test_what_came_back_scaled_by_constants_is_what_it_was(scale: Any, of_input: bool) -> None:
    assert steps_with(scaled_by_numpy(scale, of_input), make_model()) == 2


def test_a_constant_with_as_many_rows_as_a_later_batch_stays_one() -> None:
    levels: Tensor

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert y.numpy().size == len(y)
        miss = y.float()[:, None] - m(x)[:, :1]
        return torch.maximum(levels * miss, (levels - 1) * miss).mean()

    for count in range(2, 5):  # the last part has as many rows as one of them
        levels = torch.linspace(0.1, 0.9, count)
        model = make_model()
        engine = make_engine(model, sample_rate=0.5, steps=1)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        for x, y in engine.loader(make_data(), max_physical_batch_size=4):
            loss(model, x, y).backward()
            optimizer.step()
        assert engine.steps_done == 1


class Looking(nn.Module):
    """Does something with its activations beside what it returns."""

    def __init__(self, look: Callable[[Any, Tensor], Any], scale: float = 1.0) -> None:
        super().__init__()
        self.layer, self.look, self.scale = nn.Linear(5, 3), look, scale
        self.total: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x * self.scale)
        changed = self.look(self, h)
        return h if changed is None else changed


def plain(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y)


def _assert_finite(m: Any, h: Tensor) -> None:
    assert torch.isfinite(h).all()
    assert not torch.isnan(h).any()
    assert not (~h.isfinite()).any().item()


def _branch_on_infinite(m: Any, h: Tensor) -> Tensor:
    return h if torch.isfinite(h * 1e38 * 1e38).all() else 1e-3 * h


def _branch_on_nan(m: Any, h: Tensor) -> Tensor:
    return 1e-3 * h if (h * math.inf * 0).isnan().any() else h


def _branch_on_size(m: Any, h: Tensor) -> Tensor:
    return h if (h.abs() < 1e3).all() else 1e-3 * h


def _scale_by_check(m: Any, h: Tensor) -> Tensor:
    return h * torch.isfinite(h).all()


def _branch_on_all_infinite(m: Any, h: Tensor) -> Tensor:
    return h if torch.isfinite(h).any() else 1e-3 * h


def _add_up(m: Any, h: Tensor) -> None:
    m.total = m.total + h.detach().mean()


def _add_up_and_use(m: Any, h: Tensor) -> Tensor:
    m.total = m.total + h.detach().mean()
    return h * m.total


def _keep_for_the_next(m: Any, h: Tensor) -> Tensor:
    before, m.total = m.total, h.detach().mean()
    return h + before


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("look", [_assert_finite, _add_up])
def test_asserts_and_logs_in_the_forward_run(look: Any, own: bool) -> None:
    assert steps_with(plain, Looking(look), own=own, self_check=False) == 2


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "look",
    [
        _branch_on_infinite,
        _branch_on_nan,
        _branch_on_size,
        _scale_by_check,
        _branch_on_all_infinite,
        _add_up_and_use,
        _keep_for_the_next,
    ],
)
def test_what_is_asserted_or_logged_may_not_change_what_is_computed(look: Any, own: bool) -> None:
    with pytest.raises(PrivacyError):
        steps_with(plain, Looking(look), own=own, self_check=False)


def _attack(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the loss in the inputs, which are a leaf of the loop's own."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(m(x), y), x)
    return F.cross_entropy(m(x.detach() + 0.1 * g.sign()), y)


def _attack_with_a_shared_step(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(m(x), y), x)
    return F.cross_entropy(m(x.detach() + 0.1 * g / g.norm()), y)


@pytest.mark.parametrize("own", [False, True])
def test_inputs_may_be_moved_along_their_own_gradient(own: bool) -> None:
    assert steps_with(_attack, make_model(), own=own) == 2
    with pytest.raises(PrivacyError):
        steps_with(_attack_with_a_shared_step, make_model(), own=own)


class Tagger(nn.Module):
    """Scores of three classes at each position, or of the mean of all positions."""

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        self.layer, self.pool = nn.Linear(1, 3), pool

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = torch.tanh(self.layer(x[..., None]))
        return h.mean(1) if self.pool else h


def pads(rows: list[Any], longest: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of different lengths with their mask: padded to the longest of the batch, or to 5."""
    lengths = [1 + int(y) for _, y in rows]
    size = longest or max(lengths)
    x = torch.stack(
        [F.pad(x[:n], (0, 5 - n))[:size] for (x, _), n in zip(rows, lengths, strict=True)]
    )
    mask = torch.arange(size) < torch.tensor(lengths)[:, None]
    return x, torch.stack([y for _, y in rows]), mask


def _each(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x).transpose(1, 2), y[:, None].expand_as(x), reduction="none")


PADDED: dict[str, tuple[Any, bool]] = {
    "all positions": (lambda m, x, y, k: _each(m, x, y).mean(), True),
    "positions, then examples": (lambda m, x, y, k: _each(m, x, y).mean(1).mean(), True),
    "cross_entropy": (
        lambda m, x, y, k: F.cross_entropy(m(x).flatten(0, 1), y.repeat_interleave(x.shape[1])),
        True,
    ),
    "mse_loss": (lambda m, x, y, k: F.mse_loss(m(x), torch.zeros_like(m(x))), True),
    "own positions": (lambda m, x, y, k: ((_each(m, x, y) * k).sum(1) / k.sum(1)).mean(), False),
    "sum": (lambda m, x, y, k: (_each(m, x, y) * k).sum(1).mean(), False),
    "ignored": (
        lambda m, x, y, k: F.cross_entropy(
            m(x).transpose(1, 2), torch.where(k, y[:, None], torch.tensor(-100))
        ),
        False,
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("default::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("longest", [None, 5])
def test_means_over_padded_positions_are_warned_of(name: str, longest: int | None) -> None:
    loss, warned = PADDED[name]
    model = Tagger()
    x, y = make_data().tensors
    # Two lengths in each batch, the longest of the first being shorter than those of the others.
    y = torch.tensor([0, 1] * 4 + [0, 2] * 4 + [1, 2] * 4)
    engine = make_engine(model, steps=3, sample_size=SIZE)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    rows = list(zip(x, y, strict=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(0, SIZE, 8):
            padded, labels, mask = pads(rows[i : i + 8], longest)
            loss(model, padded, labels, mask).backward()
            optimizer.step()
    found = [w for w in caught if "a mean was taken over" in str(w.message)]
    assert len(found) == (warned and longest is None)
