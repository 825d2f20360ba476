"""Every loss of torch.nn.functional, its target the batch's own, against a loop over single examples.

Targets, weights and lengths come in three ways: as inputs of the model, so that they carry the
examples; as constants of the loss, as a loader of the user's own gives them; and, where a loss takes
one, as a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.oracles.loop import one_example_loop, relative_error
from tests.tape.zoo.base import Lambda
from torch import Tensor, nn

import dptorch
from dptorch.errors import ExamplesMixError
from dptorch.tape.propagation import FAMILIES
from dptorch.tape.propagation import losses as families
from dptorch.tape.provenance import tags
from dptorch.tape.rules import LOSSES as LOSS_RULES

B, D = 4, 6


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def reals(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(B, *shape)


def chances(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(B, *shape) * 0.8 + 0.1


def classes(*shape: int, most: int = D, ignored: bool = False) -> Callable[[], Tensor]:
    def make() -> Tensor:
        y = torch.randint(0, most, (B, *shape))
        if ignored:
            y[1].view(-1)[: 1 if not shape else 2] = -100
        return y

    return make


def signs(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 2, (B, *shape)) * 2.0 - 1


def labels() -> Tensor:
    """Of multilabel_margin_loss: class numbers, ended by -1."""
    return torch.tensor(
        [[1, 3, -1, 0, 0, 0], [0, -1, 0, 0, 0, 0], [5, 4, 3, -1, 0, 0], [2, -1, 0, 0, 0, 0]]
    )


def probabilities() -> Tensor:
    return torch.rand(B, D).softmax(1)


W = torch.rand(D, dtype=torch.float64) + 0.5

# name: (loss of an output h [B, D] and further operands, how each operand is drawn)
LOSSES: dict[str, tuple[Callable[..., Tensor], list[Callable[[], Tensor]]]] = {
    "mse": (lambda h, y, **k: F.mse_loss(h, y, **k), [reals(D)]),
    "mse weight": (lambda h, y, w, **k: F.mse_loss(h, y, weight=w, **k), [reals(D), chances(D)]),
    "l1": (F.l1_loss, [reals(D)]),
    "smooth_l1": (lambda h, y, **k: F.smooth_l1_loss(h, y, beta=0.7, **k), [reals(D)]),
    "huber": (lambda h, y, **k: F.huber_loss(h, y, delta=0.7, **k), [reals(D)]),
    "huber weight": (lambda h, y, w, **k: F.huber_loss(h, y, weight=w, **k), [reals(D), chances(D)]),
    "bce": (lambda h, y, **k: F.binary_cross_entropy(h.sigmoid(), y, **k), [chances(D)]),
    "bce weight": (
        lambda h, y, w, **k: F.binary_cross_entropy(h.sigmoid(), y, weight=w, **k),
        [chances(D), chances(D)],
    ),
    "bce logits": (F.binary_cross_entropy_with_logits, [chances(D)]),
    "bce logits, weight of each example": (
        lambda h, y, w, **k: F.binary_cross_entropy_with_logits(h, y, weight=w, **k),
        [chances(D), chances(1)],
    ),
    "bce logits, pos_weight": (
        lambda h, y, **k: F.binary_cross_entropy_with_logits(h, y, pos_weight=W, **k),
        [chances(D)],
    ),
    "kl_div": (lambda h, y, **k: F.kl_div(h.log_softmax(1), y, **k), [probabilities]),
    "kl_div log_target": (
        lambda h, y, **k: F.kl_div(h.log_softmax(1), y.log(), log_target=True, **k),
        [probabilities],
    ),
    "poisson_nll": (lambda h, y, **k: F.poisson_nll_loss(h, y, full=True, **k), [chances(D)]),
    "gaussian_nll": (F.gaussian_nll_loss, [reals(D), chances(D)]),
    "gaussian_nll, one variance each": (F.gaussian_nll_loss, [reals(D), chances(1)]),
    "gaussian_nll, variance without the last dimension": (F.gaussian_nll_loss, [reals(D), chances()]),
    "soft_margin": (F.soft_margin_loss, [signs(D)]),
    "margin_ranking": (
        lambda h, a, y, **k: F.margin_ranking_loss(h, a, y, margin=0.3, **k),
        [reals(D), signs(D)],
    ),
    "hinge_embedding": (F.hinge_embedding_loss, [signs(D)]),
    "multi_margin": (lambda h, y, **k: F.multi_margin_loss(h, y, weight=W, **k), [classes()]),
    "multilabel_margin": (F.multilabel_margin_loss, [labels]),
    "multilabel_soft_margin": (
        lambda h, y, **k: F.multilabel_soft_margin_loss(h, y, weight=W, **k),
        [lambda: (torch.rand(B, D) > 0.5).double()],
    ),
    "cosine_embedding": (F.cosine_embedding_loss, [reals(D), signs()]),
    "triplet_margin": (
        lambda h, a, b, **k: F.triplet_margin_loss(h, a, b, swap=True, **k),
        [reals(D), reals(D)],
    ),
    "triplet_margin_with_distance": (F.triplet_margin_with_distance_loss, [reals(D), reals(D)]),
    "cross_entropy": (F.cross_entropy, [classes()]),
    "cross_entropy ignore_index": (F.cross_entropy, [classes(ignored=True)]),
    "cross_entropy smoothing": (
        lambda h, y, **k: F.cross_entropy(h, y, label_smoothing=0.2, **k),
        [classes()],
    ),
    "cross_entropy probabilities": (
        lambda h, y, **k: F.cross_entropy(h, y, weight=W, label_smoothing=0.1, **k),
        [probabilities],
    ),
    "cross_entropy of positions": (
        lambda h, y, **k: F.cross_entropy(h.view(-1, 3, 2), y, **k),
        [classes(2, most=3, ignored=True)],
    ),
    "cross_entropy of folded positions": (
        lambda h, y, **k: F.cross_entropy(h.reshape(-1, 3), y.reshape(-1), **k),
        [classes(2, most=3, ignored=True)],
    ),
    "nll": (lambda h, y, **k: F.nll_loss(h.log_softmax(1), y, **k), [classes(ignored=True)]),
    "ctc": (
        lambda h, y, a, b, **k: F.ctc_loss(
            (h[:, None] * torch.arange(1.0, 6)[:, None]).log_softmax(2).transpose(0, 1), y, a, b, **k
        ),
        [
            lambda: torch.randint(1, D, (B, 2)),
            lambda: torch.tensor([5, 4, 5, 4]),
            lambda: torch.tensor([2, 1, 2, 1]),
        ],
    ),
}  # fmt: skip
CASES = [(n, r) for n in LOSSES for r in ("none", "mean", "sum")]


def run(name: str, reduction: str, tagged: bool) -> None:
    function, makers = LOSSES[name]
    further = [make() for make in makers]
    x = torch.randn(B, 5)
    layer = nn.Linear(5, D)

    def loss(m: nn.Module, x: Tensor, *operands: Tensor) -> Tensor:
        value = m(x, *operands) if tagged else function(m(x), *operands, reduction=reduction)
        return value.reshape(len(value), -1).sum(1) if reduction == "none" else value

    def inside(m: nn.Module, x: Tensor, *operands: Tensor) -> Tensor:
        h: Tensor = m.a(x)
        return function(h, *operands, reduction=reduction) if tagged else h

    model = Lambda(inside, a=layer)
    expected = one_example_loop(model, [x, *further], loss)
    if not any(g.abs().sum() for g in expected.values()):
        raise AssertionError("the loop has no gradient to compare with")
    with dptorch.record(model) as tape:
        value = loss(model, x, *further)
        if reduction == "none":
            value = value.sum()
        value.backward()
    assert tape.loss is not None
    assert reduction == "none" or tape.loss.kind == reduction  # what the engine scales by
    scale = B if reduction == "mean" else 1
    for parameter, gradient in tape.per_example_gradients().items():
        assert relative_error(scale * gradient, expected[parameter]) <= 1e-9, parameter


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_targets_that_carry_the_examples(name: str, reduction: str) -> None:
    run(name, reduction, tagged=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_targets_that_are_constants(name: str, reduction: str) -> None:
    run(name, reduction, tagged=False)


def test_every_loss_is_here() -> None:
    every = {n.removesuffix("_loss") for n in dir(F) if n.endswith("_loss")}
    covered = {n.split(",")[0].split(" ")[0] for n in LOSSES}
    assert every - covered <= {"multilabel_margin"}, every - covered
    assert FAMILIES["mse_loss"] is families.elementwise_loss


PARAMETERS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "variance": lambda m, h, y: F.gaussian_nll_loss(h, y, m.p.exp().expand(len(h), D)),
    "target": lambda m, h, y: F.mse_loss(h, m.p.expand(len(h), D)),
    "prior": lambda m, h, y: F.cross_entropy(m.p.expand(len(h), D), y.argmax(1))
    + F.cross_entropy(h, y.argmax(1)),
    "prior, summed": lambda m, h, y: F.cross_entropy(
        m.p.expand(len(h), D), y.argmax(1), reduction="sum"
    )
    + h.sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_in_a_reduced_loss(name: str) -> None:
    model = Lambda(
        lambda m, x, y: PARAMETERS[name](m, m.a(x), y), a=nn.Linear(5, D), p=torch.randn(D)
    )
    batch = [torch.randn(B, 5), torch.randn(B, D)]
    loss = lambda m, *b: m(*b)
    expected = one_example_loop(model, batch, loss)
    with dptorch.record(model) as tape:
        loss(model, *batch).backward()
    scale = 1 if "sum" in name else B
    for parameter, gradient in tape.per_example_gradients().items():
        assert relative_error(scale * gradient, expected[parameter]) <= 1e-9, parameter


MIXING: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "an output [B, 1] against targets [B]": lambda h, y: F.mse_loss(h[:, :1], y[:, 0]),
    "one row of triplets": lambda h, y: F.triplet_margin_loss(h[:, 0], y[:, 0], y[:, 1]),
    "one row of scores": lambda h, y: F.multi_margin_loss(h[:, 0], torch.tensor(1)),
    "one row of cosines": lambda h, y: F.cosine_embedding_loss(h[:, 0], y[:, 0], torch.tensor(1.0)),
    "classes weighed by the batch": lambda h, y: F.cross_entropy(
        h, y.argmax(1), weight=torch.bincount(y.argmax(1), minlength=D).double() + 1
    ),
    "classes counted by the batch": lambda h, y: (
        h * F.one_hot(y.argmax(1)).sum(1, keepdim=True)
    ).sum(),
    "targets centred": lambda h, y: F.mse_loss(h, y - y.mean(0)),
}


@pytest.mark.parametrize("name", MIXING)
def test_losses_that_mix_are_refused(name: str) -> None:
    model = Lambda(lambda m, x, y: MIXING[name](m.a(x), y), a=nn.Linear(5, D))
    with pytest.raises(ExamplesMixError), dptorch.record(model):
        model(torch.randn(B, 5), torch.randn(B, D)).backward()


def test_a_mean_that_is_taken_for_a_sum_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_reduced_or", lambda *a: tags.Reduced("sum"))
    with pytest.raises(AssertionError):
        run("mse", "mean", tagged=True)


def test_a_mean_over_the_weights_of_the_batch_would_be_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """F.mse_loss(weight=) divides by the sum of all weights: taken as it is, it mixes."""
    plain = lambda call, unreduced: tags.Reduced("mean")
    monkeypatch.setitem(LOSS_RULES, "mse_loss", lambda call, recording: NotImplemented)
    with pytest.raises(ExamplesMixError):
        run("mse weight", "mean", tagged=True)
    monkeypatch.setitem(FAMILIES, "mse_loss", plain)
    with pytest.raises(AssertionError):
        run("mse weight", "mean", tagged=True)
