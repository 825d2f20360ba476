"""Losses of torch.nn and torch.nn.functional with every reduction, and losses that users write."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from tests.engine.legitimate.harness import Loss, N, Program

Data = Callable[[], Dataset[Any]]


def data(*rows: Callable[[], Tensor]) -> Data:
    """A data set of x [N, 5] and what `rows` make, [N, ...] each."""
    return lambda: TensorDataset(torch.randn(N, 5), *(make() for make in rows))


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(N, *shape)


def positive(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(N, *shape) + 0.1


def labels(*shape: int, classes: int = 3, ignored: bool = False) -> Callable[[], Tensor]:
    def make() -> Tensor:
        y = torch.randint(0, classes, (N, *shape))
        return torch.where(torch.rand(y.shape) < 0.3, -100, y) if ignored else y

    return make


def signs(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 2, (N, *shape)).float() * 2 - 1


def bits(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 2, (N, *shape)).float()


def distributions() -> Tensor:
    return torch.softmax(torch.randn(N, 3), 1)


EXPECTED = 6.0  # half of N
WEIGHT = torch.tensor([0.5, 1.0, 2.0])


class Positions(nn.Module):
    """Scores of three classes at each of four positions, [B, 4, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(5, 12), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.out(torch.tanh(self.embed(x)).view(len(x), 4, 3))
        return h


#: A loss with one value for each example or element, by functional and module, and its targets.
#: Each is taken with the reductions "mean", "sum", "none" and mean, "none" and the vector itself.
ELEMENTWISE: dict[str, tuple[Callable[..., Tensor], Data]] = {
    "cross_entropy": (F.cross_entropy, data(labels())),
    "cross_entropy smoothed": (partial(F.cross_entropy, label_smoothing=0.1), data(labels())),
    "cross_entropy of distributions": (F.cross_entropy, data(lambda: distributions())),
    "CrossEntropyLoss": (lambda o, y, **k: nn.CrossEntropyLoss(**k)(o, y), data(labels())),
    "nll_loss": (lambda o, y, **k: F.nll_loss(F.log_softmax(o, -1), y, **k), data(labels())),
    "mse_loss": (F.mse_loss, data(numbers(3))),
    "MSELoss": (lambda o, y, **k: nn.MSELoss(**k)(o, y), data(numbers(3))),
    "l1_loss": (F.l1_loss, data(numbers(3))),
    "smooth_l1_loss": (partial(F.smooth_l1_loss, beta=0.5), data(numbers(3))),
    "huber_loss": (partial(F.huber_loss, delta=0.7), data(numbers(3))),
    "binary_cross_entropy": (
        lambda o, y, **k: F.binary_cross_entropy(torch.sigmoid(o), y, **k),
        data(bits(3)),
    ),
    "bce_with_logits": (F.binary_cross_entropy_with_logits, data(bits(3))),
    "bce_with_logits pos_weight": (
        partial(F.binary_cross_entropy_with_logits, pos_weight=WEIGHT),
        data(bits(3)),
    ),
    "bce_with_logits weight": (
        partial(F.binary_cross_entropy_with_logits, weight=WEIGHT),
        data(bits(3)),
    ),
    "poisson_nll_loss": (F.poisson_nll_loss, data(positive(3))),
    "PoissonNLLLoss": (
        lambda o, y, **k: nn.PoissonNLLLoss(log_input=False, **k)(F.softplus(o), y),
        data(positive(3)),
    ),
    "gaussian_nll_loss": (
        lambda o, y, **k: F.gaussian_nll_loss(o[:, :1], y, F.softplus(o[:, 1:2]), **k),
        data(numbers(1)),
    ),
    "soft_margin_loss": (F.soft_margin_loss, data(signs(3))),
    "hinge_embedding_loss": (F.hinge_embedding_loss, data(signs(3))),
    "kl_div": (lambda o, y, **k: F.kl_div(F.log_softmax(o, 1), y, **k), data(distributions)),
    "kl_div of logarithms": (
        lambda o, y, **k: F.kl_div(F.log_softmax(o, 1), y.log(), log_target=True, **k),
        data(distributions),
    ),
    "multi_margin_loss": (F.multi_margin_loss, data(labels())),
    "multilabel_margin_loss": (
        F.multilabel_margin_loss,
        data(lambda: torch.tensor([[0, 2, -1]] * N)),
    ),
    "multilabel_soft_margin_loss": (F.multilabel_soft_margin_loss, data(bits(3))),
    "margin_ranking_loss": (
        lambda o, y, **k: F.margin_ranking_loss(o[:, 0], o[:, 1], y, margin=0.2, **k),
        data(signs()),
    ),
    "cosine_embedding_loss": (
        lambda o, y, **k: F.cosine_embedding_loss(o, o.flip(1) * WEIGHT, y, **k),
        data(signs()),
    ),
    "triplet_margin_loss": (
        lambda o, y, **k: F.triplet_margin_loss(o, y[:, 0], y[:, 1], **k),
        data(numbers(2, 3)),
    ),
    "triplet_margin_with_distance_loss": (
        lambda o, y, **k: F.triplet_margin_with_distance_loss(
            o, y[:, 0], y[:, 1], distance_function=nn.PairwiseDistance(), **k
        ),
        data(numbers(2, 3)),
    ),
}  # fmt: skip

_REDUCTIONS: dict[str, Callable[[Callable[..., Tensor]], Loss]] = {
    "mean": lambda f: lambda m, b: f(m(b[0]), b[1], reduction="mean"),
    "sum": lambda f: lambda m, b: f(m(b[0]), b[1], reduction="sum"),
    "none, mean": lambda f: lambda m, b: f(m(b[0]), b[1], reduction="none").mean(),
    "none, rows": lambda f: lambda m, b: f(m(b[0]), b[1], reduction="none").flatten(1).mean(1),
    "none, vector": lambda f: lambda m, b: f(m(b[0]), b[1], reduction="none"),
}
_VECTORS = (
    "cross_entropy CrossEntropyLoss nll_loss multi_margin multilabel margin_ranking cosine triplet"
)


def _reduced() -> dict[str, Program]:
    found = {}
    for name, (function, rows) in ELEMENTWISE.items():
        vector = name.startswith(tuple(_VECTORS.split()))
        for reduction, wrap in _REDUCTIONS.items():
            if reduction == ("none, rows" if vector else "none, vector"):
                continue
            plan = "sum" if reduction == "sum" else "mean"
            loaders = "both" if reduction == "mean" else "engine"
            found[f"{name}: {reduction}"] = Program(
                wrap(function), data=rows, reduction=plan, loaders=loaders
            )
    return found


def _masked_mean(m: nn.Module, b: Any) -> Tensor:
    """The mean over each example's own positions."""
    x, y, mask = b
    each = F.cross_entropy(m(x).transpose(1, 2), y, reduction="none")
    return ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def _focal(m: nn.Module, b: Any) -> Tensor:
    each = F.cross_entropy(m(b[0]), b[1], reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


def _dice(m: nn.Module, b: Any) -> Tensor:
    p = torch.sigmoid(m(b[0]))
    both = (p * b[1]).sum(1)
    return (1 - (2 * both + 1) / (p.sum(1) + b[1].sum(1) + 1)).mean()


def _arcface(m: nn.Module, b: Any) -> Tensor:
    scores = F.normalize(m(b[0]), dim=1) @ F.normalize(PUBLIC[:3], dim=1).T
    margin = F.one_hot(b[1], 3) * 0.2
    return F.cross_entropy((scores - margin) * 4.0, b[1])


torch.manual_seed(7)
PUBLIC = torch.randn(6, 3)  # public anchors
TEACHER = nn.Linear(5, 3).requires_grad_(False)


def _distilled(m: nn.Module, b: Any) -> Tensor:
    x, y = b
    with torch.no_grad():
        soft = F.softmax(TEACHER(x) / 2.0, 1)
    out = m(x)
    hard = F.cross_entropy(out, y)
    return 0.7 * F.kl_div(F.log_softmax(out / 2.0, 1), soft, reduction="batchmean") * 4 + 0.3 * hard


def _vectors_distilled(m: nn.Module, b: Any) -> Tensor:
    x, y = b
    out, target = m(x), TEACHER(x).detach()
    kl = F.kl_div(
        F.log_softmax(out, 1), F.log_softmax(target, 1), log_target=True, reduction="none"
    )
    return (kl.sum(1) + F.cross_entropy(out, y, reduction="none")).mean()


def _anchored(m: nn.Module, b: Any) -> Tensor:
    """Contrastive against public anchors: the class's own anchor against the others."""
    q = F.normalize(m(b[0]), dim=1)
    return F.cross_entropy(q @ F.normalize(PUBLIC, dim=1).T / 0.5, b[1])


def _ctc(m: nn.Module, b: Any) -> Tensor:
    x, y, length = b
    scores = F.log_softmax(m(x), -1).transpose(0, 1)
    sizes = torch.full((len(x),), 4)
    return F.ctc_loss(scores, y, sizes, length, reduction="none", zero_infinity=True).mean()


def _within(m: nn.Module, b: Any) -> Tensor:
    """Mixup of two views of one example."""
    x = b[0]
    return F.cross_entropy(m(0.7 * x + 0.3 * x.flip(1)), b[1])


def _sampled_positions(m: nn.Module, b: Any) -> Tensor:
    out = m(b[0])[:, 1::2]
    return F.cross_entropy(out.reshape(-1, 3), b[1][:, 1::2].reshape(-1))


def _weights_of_examples(m: nn.Module, b: Any) -> Tensor:
    x, y, w = b
    return (F.cross_entropy(m(x), y, reduction="none") * w).mean()


def _over_rows(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(m(b[0]), b[1], reduction="none").sum() / len(b[0])


def _over_expected(m: nn.Module, b: Any) -> Tensor:
    out = m(b[0])
    each = F.cross_entropy(out, b[1], reduction="none")
    return (each.sum() + 0.5 * out.square().sum()) / EXPECTED


def _quantile(m: nn.Module, b: Any) -> Tensor:
    e = b[1] - m(b[0])
    return torch.maximum(0.9 * e, -0.1 * e).mean()


def _entropy_bonus(m: nn.Module, b: Any) -> Tensor:
    out = m(b[0])
    logp = F.log_softmax(out, 1)
    return F.nll_loss(logp, b[1]) + 0.01 * (logp.exp() * logp).sum(1).mean()


def _gathered(m: nn.Module, b: Any) -> Tensor:
    logp = torch.log_softmax(m(b[0]), 1)
    return -logp.gather(1, b[1][:, None]).squeeze(1).mean()


def _one_hot(m: nn.Module, b: Any) -> Tensor:
    return -(F.one_hot(b[1], 3).float() * F.log_softmax(m(b[0]), 1)).sum(dim=1).mean()


def _picked(m: nn.Module, b: Any) -> Tensor:
    out = F.log_softmax(m(b[0]), 1)
    return -out[torch.arange(len(out)), b[1]].mean()


def _selected_sum(m: nn.Module, b: Any) -> Tensor:
    each = F.cross_entropy(m(b[0]), b[1], reduction="none")
    return each[b[1] != 1].sum()


def _selected_logits_sum(m: nn.Module, b: Any) -> Tensor:
    out, y = m(b[0]), b[1]
    keep = y != 1
    return F.cross_entropy(out[keep], y[keep], reduction="sum")


def _token_sum(m: nn.Module, b: Any) -> Tensor:
    out, y = m(b[0]), b[1]
    keep = y != -100
    return F.cross_entropy(out[keep], y[keep], reduction="sum")


def _gram(m: nn.Module, b: Any) -> Tensor:
    """A style loss: each example's own Gram matrix."""
    h = m(b[0])
    return ((h.transpose(1, 2) @ h - torch.eye(3)) ** 2).mean()


def _total_variation(m: nn.Module, b: Any) -> Tensor:
    h = m(b[0])
    return (h[:, 1:] - h[:, :-1]).abs().mean() + F.cross_entropy(h.transpose(1, 2), b[1])


def _ordered(m: nn.Module, b: Any) -> Tensor:
    """Cumulative link: thresholds between ordered classes."""
    out = m(b[0])[:, :2]
    return F.binary_cross_entropy_with_logits(out, (b[1][:, None] > torch.arange(2)).float())


def _listwise(m: nn.Module, b: Any) -> Tensor:
    """ListNet within an example's own list."""
    return F.cross_entropy(m(b[0]), F.softmax(b[1], 1))


def _bpr(m: nn.Module, b: Any) -> Tensor:
    out = m(b[0])
    return -F.logsigmoid(out[:, 0] - out[:, 1]).mean()


def _dpo(m: nn.Module, b: Any) -> Tensor:
    x, worse = b
    with torch.no_grad():
        reference = TEACHER(x).sum(1) - TEACHER(worse).sum(1)
    pairs = m(torch.stack([x, worse], 1))
    chosen = pairs[:, 0].sum(1) - pairs[:, 1].sum(1)
    return -F.logsigmoid(0.1 * (chosen - reference)).mean()


def _vicinal(m: nn.Module, b: Any) -> Tensor:
    """Consistency of two augmentations on an axis of their own."""
    x = b[0]
    two = m(torch.stack([x, 0.9 * x], 1))
    return F.mse_loss(two[:, 0], two[:, 1]) + F.cross_entropy(two[:, 0], b[1])


def _clamped(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(m(b[0]), b[1], reduction="none").clamp(max=1.0).mean()


def _logsumexp(m: nn.Module, b: Any) -> Tensor:
    out = m(b[0])
    return (torch.logsumexp(out, 1) - out.gather(1, b[1].unsqueeze(1)).squeeze(1)).mean()


def _hinge(m: nn.Module, b: Any) -> Tensor:
    return torch.relu(1 - m(b[0])[:, 0] * (2.0 * (b[1] == 1) - 1)).mean()


def _multi_task(m: nn.Module, b: Any) -> Tensor:
    x, y, z = b
    out = m(x)
    return F.cross_entropy(out, y) + 0.5 * F.mse_loss(out[:, 0], z) + 0.1 * out.pow(2).mean()


def _multi_task_stacked(m: nn.Module, b: Any) -> Tensor:
    x, y, z = b
    out = m(x)
    parts = torch.stack([F.cross_entropy(out, y), F.mse_loss(out[:, 0], z)])
    return parts.sum()


def _sum_of_list(m: nn.Module, b: Any) -> Tensor:
    x, y, z = b
    out = m(x)
    losses = [F.cross_entropy(out, y), 0.5 * F.mse_loss(out[:, 0], z)]
    return sum(losses)  # type: ignore[return-value]


def _dict_of_losses(m: nn.Module, b: Any) -> Tensor:
    x, y, z = b
    out = m(x)
    losses = {"class": F.cross_entropy(out, y), "value": F.mse_loss(out[:, 0], z)}
    weights = {"class": 1.0, "value": 0.25}
    total = torch.zeros(())
    for name, loss in losses.items():
        total = total + weights[name] * loss
    return total


_TASKS = data(labels(), numbers())
_SEQUENCE = data(labels(4))


def _each(m: nn.Module, b: Any) -> list[Tensor]:
    """The loss of each example, in a list."""
    return [F.cross_entropy(z[None], y[None]) for z, y in zip(m(b[0]), b[1], strict=True)]


def _one_by_one(m: nn.Module, b: Any) -> Tensor:
    total = torch.zeros(())
    for loss in _each(m, b):
        total += loss
    return total / len(b[0])


WRITTEN: dict[str, Program] = {
    "class weights": Program(
        lambda m, b: F.cross_entropy(m(b[0]), b[1], WEIGHT, reduction="none").mean(),
    ),
    "class weights, mean": Program(lambda m, b: F.cross_entropy(m(b[0]), b[1], WEIGHT)),
    "ignored examples": Program(
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum", ignore_index=1),
        reduction="sum",
    ),
    "sequence": Program(
        lambda m, b: F.cross_entropy(m(b[0]).transpose(1, 2), b[1]), Positions, _SEQUENCE
    ),
    "sequence, flattened": Program(
        lambda m, b: F.cross_entropy(m(b[0]).view(-1, 3), b[1].view(-1)), Positions, _SEQUENCE
    ),
    "sequence, ignored positions": Program(
        lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten()),
        Positions,
        data(labels(4, ignored=True)),
    ),
    "sequence, ignored positions, sum": Program(
        lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten(), reduction="sum"),
        Positions,
        data(labels(4, ignored=True)),
        reduction="sum",
    ),
    "next token": Program(
        lambda m, b: F.cross_entropy(m(b[0])[:, :-1].reshape(-1, 3), b[1][:, 1:].reshape(-1)),
        Positions,
        _SEQUENCE,
    ),
    "masked mean of own positions": Program(_masked_mean, Positions, data(labels(4), bits(4))),
    "every second position": Program(_sampled_positions, Positions, _SEQUENCE),
    "focal": Program(_focal),
    "dice": Program(_dice, data=data(bits(3))),
    "arcface": Program(_arcface),
    "distillation": Program(_distilled),
    "distillation, vectors": Program(_vectors_distilled),
    "public anchors": Program(_anchored),
    "ctc": Program(
        _ctc,
        Positions,
        data(labels(2, classes=2), lambda: torch.randint(1, 3, (N,))),
        tolerance=2e-3,
    ),
    "mixup of own views": Program(_within),
    "weights of examples": Program(_weights_of_examples, data=data(labels(), positive())),
    "sum over rows": Program(_over_rows),
    "sum over expected batch size": Program(
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum") / EXPECTED,
        scale=EXPECTED,
    ),
    "sum of tasks over expected batch size": Program(
        _over_expected,
        scale=EXPECTED,
    ),
    "quantile": Program(_quantile, data=data(numbers(3))),
    "entropy bonus": Program(_entropy_bonus),
    "gathered": Program(_gathered),
    "one-hot": Program(_one_hot),
    "picked by index": Program(_picked),
    "selected losses, sum": Program(_selected_sum, reduction="sum"),
    "selected logits, sum": Program(_selected_logits_sum, reduction="sum"),
    "selected tokens, sum": Program(
        _token_sum, Positions, data(labels(4, ignored=True)), reduction="sum"
    ),
    "gram matrices": Program(_gram, Positions),
    "total variation": Program(_total_variation, Positions, _SEQUENCE),
    "ordered classes": Program(_ordered),
    "listwise": Program(_listwise, data=data(numbers(3))),
    "pairwise within an example": Program(_bpr),
    "preference pairs": Program(_dpo, data=data(numbers(5))),
    "two views on an axis": Program(_vicinal),
    "clamped losses": Program(_clamped),
    "logsumexp": Program(_logsumexp),
    "hinge": Program(_hinge),
    "tasks, weighted": Program(_multi_task, data=_TASKS),
    "tasks, stacked": Program(_multi_task_stacked, data=_TASKS),
    "tasks, list": Program(_sum_of_list, data=_TASKS),
    "tasks, dict": Program(_dict_of_losses, data=_TASKS),
    "examples, list": Program(lambda m, b: sum(_each(m, b)) / len(b[0])),  # type: ignore[arg-type]
    "examples, list of parts": Program(
        lambda m, b: sum(v / EXPECTED for v in _each(m, b)), scale=EXPECTED  # type: ignore[arg-type,return-value]
    ),
    "examples, one by one": Program(_one_by_one),
    "constant factor": Program(lambda m, b: 0.5 * F.cross_entropy(m(b[0]), b[1])),
    "added constant": Program(lambda m, b: F.cross_entropy(m(b[0]), b[1]) + 1.0),
    "squeezed outputs": Program(
        lambda m, b: F.mse_loss(m(b[0])[:, :1].squeeze(-1), b[1]), data=data(numbers())
    ),
    "target with a dimension more": Program(
        lambda m, b: F.mse_loss(m(b[0])[:, :1], b[1].unsqueeze(1)), data=data(numbers())
    ),
    "outer product with a teacher": Program(
        lambda m, b: torch.einsum("bi,bj->bij", m(b[0]), TEACHER(b[0])).pow(2).mean()
    ),
}  # fmt: skip


LOSSES: dict[str, Program] = {**_reduced(), **WRITTEN}
