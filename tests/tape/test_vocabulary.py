"""A trained layer before a softmax over many classes, some classes at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.oracles.loop import norms_of, one_example_loop, relative_error
from torch import Tensor, nn

from dptorch import PrivacyEngine, record
from dptorch.tape import summed_cross_entropy
from dptorch.tape.gradients import Outer, Scatter
from dptorch.tape.gradients.softmax_outer import SoftmaxOuter

B, T, H, V = 4, 5, 3, 11
C = 0.3


class Words(nn.Module):
    """Predicts words from words: hidden states, and a head that is tied to the embedding or not."""

    def __init__(self, *, tied: bool, bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(self.layer(self.embedding(ids)))
        return hidden


def batch() -> tuple[Tensor, Tensor]:
    ids, labels = torch.randint(0, V, (B, T)), torch.randint(0, V, (B, T))
    ids[0, 1:3] = ids[0, 0]
    labels[0, 2:], labels[2, 0] = -100, -100
    labels[1, 0] = ids[1, 1]
    return ids, labels


def whole(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model.head(model(ids))
    return nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=-100
    ).sum(1)


def step(model: Any, ids: Tensor, labels: Tensor, columns: int, mode: str) -> dict[str, Any]:
    engine = PrivacyEngine(
        model, sample_rate=1.0, sample_size=B, steps=1, noise_multiplier=0.0, target_delta=1e-3,
        max_grad_norm=C, clipping_mode=mode, seed=0,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    data = torch.utils.data.TensorDataset(ids, labels)
    for given, wanted in engine.loader(data):
        head = model.head
        summed_cross_entropy(
            model(given), head.weight, head.bias, wanted, columns
        ).mean().backward()
        optimizer.step()
        break
    engine.detach()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize("mode", ["auto", "ghost", "non-ghost"])
@pytest.mark.parametrize(
    ("tied", "bias", "columns"),
    [(False, True, 4), (True, True, 4), (True, False, 1), (False, False, 50)],
)
def test_a_trained_head_is_the_loop_over_single_examples(
    tied: bool, bias: bool, columns: int, mode: str, float64: None
) -> None:
    torch.manual_seed(0)
    model = Words(tied=tied, bias=bias)
    ids, labels = batch()
    truth = one_example_loop(model, (ids, labels), whole)
    norms = norms_of(truth)
    assert (norms > C).all()
    expected = {n: torch.tensordot(C / norms, g, 1) / B for n, g in truth.items()}
    found = step(model, ids, labels, columns, mode)
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-9, name


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize("trained_bias", [True, False])
def test_a_frozen_weight(trained_bias: bool, float64: None) -> None:
    torch.manual_seed(0)
    model = Words(tied=False, bias=True)
    model.head.weight.requires_grad_(False)
    model.head.bias.requires_grad_(trained_bias)
    ids, labels = batch()
    truth = one_example_loop(model, (ids, labels), whole)
    norms = norms_of(truth)
    found = step(model, ids, labels, 4, "auto")
    assert found["head.weight"] is None
    for name, g in truth.items():
        assert relative_error(found[name], torch.tensordot(C / norms, g, 1) / B) < 1e-9, name


@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize("broken", ["norm", "cross term"])
def test_the_broken_twins_are_seen(
    broken: str, float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm that leaves out the last classes, and a tied one without its cross term."""
    if broken == "norm":
        whole_norm = SoftmaxOuter.squared_norm
        monkeypatch.setattr(SoftmaxOuter, "squared_norm", lambda self: 0.5 * whole_norm(self))
    else:
        monkeypatch.setattr(
            SoftmaxOuter, "factored_inner", lambda self, other: self.lengths.new_zeros(B)
        )
    with pytest.raises(AssertionError, match="weight"):
        test_a_trained_head_is_the_loop_over_single_examples(True, False, 4, "auto", float64)


def test_inner_products_with_every_form(float64: None) -> None:
    """Of a head that is used twice, and one that is also used on all logits."""
    torch.manual_seed(0)
    model = Words(tied=False, bias=True)
    found: list[Any] = []
    make = SoftmaxOuter.__init__

    def keep(self: Any, *args: Any) -> None:
        make(self, *args)
        found.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SoftmaxOuter, "__init__", keep)
        for _ in range(2):
            step(model, *batch(), 4, "auto")
    first, second = found[0], found[-1]
    assert first is not second
    left = torch.randn(B, 2, V)
    others = [second, Outer(left, torch.randn(B, 2, H), first.shape)]
    others.append(Scatter(torch.randint(0, V, (B, 6)), torch.randn(B, 6, H), first.shape))
    for other in others:
        expected = (first.dense() * other.dense()).sum((1, 2))
        torch.testing.assert_close(first.inner(other), expected)
        torch.testing.assert_close(other.inner(first), expected)
    taken = first.take(torch.tensor([2, 0]))
    torch.testing.assert_close(taken.dense(), first.dense()[[2, 0]])
    torch.testing.assert_close(first.squared_norm(), first.dense().square().sum((1, 2)))


class Sure(nn.Module):
    """A head over 2,000 words that gives the next one a probability of nearly 1."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(256, 2000, bias=False)
        nn.init.normal_(self.head.weight, std=256**-0.5)

    def batch(self, positions: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 2000, (2, positions))
        rows = self.head.weight.detach()[labels]
        hidden = 24 * torch.nn.functional.normalize(rows, dim=2)
        return hidden + 0.01 * torch.randn_like(hidden), labels

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return summed_cross_entropy(hidden, self.head.weight, None, labels, 256)


@pytest.mark.parametrize("seed", [1, 2])
def test_logits_that_round_otherwise_stay_within_the_bound(seed: int) -> None:
    """An example is left out, so the sum comes from a product of another shape than the norms."""
    torch.manual_seed(seed)
    model = Sure()
    hidden, labels = model.batch(1)
    hidden[0] = math.inf
    with record(model) as tape:
        loss = model(hidden, labels).sum()
    loss.backward()
    norms = tape.norms()
    assert norms.isfinite().tolist() == [False, True]
    coefficients = torch.where(norms.isfinite(), 1 / norms, 0.0)
    total = tape.clipped_sum(coefficients)["head.weight"]
    assert total.double().norm() <= 1 + 1e-5


def test_the_error_of_computing_logits_again_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Sure()
    found: list[Any] = []
    make = SoftmaxOuter.__init__

    def keep(self: Any, *args: Any) -> None:
        make(self, *args)
        found.append(self)

    monkeypatch.setattr(SoftmaxOuter, "__init__", keep)
    with record(model):
        loss = model(*model.batch(4)).sum()
    loss.backward()
    form = found[0]
    exact = form.take(torch.arange(2), torch.float64).dense()
    error = (form.dense() - exact).flatten(1).norm(dim=1)
    bound = form.recomputed_error()
    assert (error <= bound).all()
    assert (form.squared_norm().sqrt() >= exact.flatten(1).norm(dim=1)).all()
    # Without it the norm is that of rounding errors, and so is what it divides.
    assert (bound > 0.1 * exact.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("label", [-1, V])
def test_labels_that_are_no_class_are_refused(label: int) -> None:
    model = Words(tied=False, bias=True)
    ids, labels = batch()
    labels[1, 1] = label
    with record(model), pytest.raises(IndexError, match=f"labels hold {label}: expected classes"):
        summed_cross_entropy(model(ids), model.head.weight, model.head.bias, labels, 4)


def test_without_a_recording_it_is_the_cross_entropy(float64: None) -> None:
    torch.manual_seed(0)
    model = Words(tied=False, bias=True)
    ids, labels = batch()
    head = model.head
    found = summed_cross_entropy(model(ids), head.weight, head.bias, labels, 2)
    torch.testing.assert_close(found, whole(model, ids, labels))
