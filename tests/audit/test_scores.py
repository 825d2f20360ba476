"""Each score against its definition, and on models that know their data by heart and that do not."""

import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from tests.audit.language import fit, make_model, make_texts, make_tokenizer
from tests.oracles.loop import norms_of, one_example_loop
from torch import Tensor, nn

from dptorch.audit import Evidence
from dptorch.audit.roc import auc
from dptorch.audit.scores import (
    TokenStatistics,
    class_gradient_norm,
    class_log_probabilities,
    class_loss,
    lira_offline,
    lira_online,
    logit_confidence,
    min_k,
    min_k_plus_plus,
    quantile_regression,
    reference_ratio,
    rmia,
    shadow_signals,
    text_gradient_norm,
    text_loss,
    token_statistics,
    tokenize,
    zlib_ratio,
)
from dptorch.audit.scores.signals import labelled
from dptorch.errors import ConfigurationError, DataError

SIZE = 60


def make_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 5)
    )


def learn(model: nn.Module, x: Tensor, y: Tensor, steps: int = 150) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor, nn.Module, nn.Module]:
    """Records, of which the first half is known by heart; the model that knows, and a fresh one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * SIZE, 3, 4, 4, generator=generator)
    y = torch.randint(0, 5, (2 * SIZE,), generator=generator)
    return x, y, learn(make_net(), x[:SIZE], y[:SIZE]), make_net()


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[list[int]], nn.Module, nn.Module]:
    tokenizer = make_tokenizer()
    found = make_texts(2 * SIZE, 1)
    ids = tokenize(found, tokenizer)
    model = make_model()
    fit(model, ids[:SIZE], 80)
    return found, ids, model, make_model()


def separation(scores: Any) -> float:
    return auc(Evidence(scores, np.arange(2 * SIZE) < SIZE))


def holds(known: Any, fresh: Any) -> None:
    """Members stand out where they are known, and not where they are not (three standard errors)."""
    assert separation(known) > 0.9
    assert abs(separation(fresh) - 0.5) < 3 * math.sqrt((2 * SIZE + 1) / (12 * SIZE * SIZE))


# -- images and rows -------------------------------------------------------------------------------


def test_loss_confidence_and_zlib_of_classes(images: Any) -> None:
    x, y, known, fresh = images
    found = {}
    for name, model in (("known", known), ("fresh", fresh)):
        log_p, labels = class_log_probabilities(model, (x, y), batch_size=32)
        loss = class_loss(log_p, labels)
        model.eval()
        with torch.no_grad():
            expected = nn.functional.cross_entropy(model(x), y, reduction="none")
        assert np.allclose(-loss, expected, atol=1e-5)
        p = np.exp(loss)
        phi = logit_confidence(log_p, labels)
        assert np.allclose(phi, np.log(p / (1 - p)), atol=1e-3)
        ratio = zlib_ratio(-loss, [row.numpy().tobytes() for row in x])
        assert ratio[7] == pytest.approx(loss[7] / len(zlib.compress(x[7].numpy().tobytes())))
        found[name] = loss, phi, ratio
    for known_score, fresh_score in zip(found["known"], found["fresh"], strict=True):
        holds(known_score, fresh_score)


def test_confidence_is_finite_where_the_probability_rounds_to_one() -> None:
    log_p = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64).log_softmax(-1).numpy()
    assert logit_confidence(log_p, np.array([0]))[0] == pytest.approx(60 - math.log(2))


def test_gradient_norm_of_classes(images: Any) -> None:
    x, y, known, fresh = images
    fresh.eval()
    loop = one_example_loop(
        fresh, (x[:5], y[:5]), lambda m, a, b: nn.functional.cross_entropy(m(a), b, reduction="sum")
    )
    fresh.train()
    assert np.allclose(-class_gradient_norm(fresh, (x[:5], y[:5])), norms_of(loop), rtol=1e-4)
    assert fresh.training
    assert all(p.grad is None for p in fresh.parameters())
    holds(class_gradient_norm(known, (x, y)), class_gradient_norm(fresh, (x, y)))


def test_reference_takes_out_how_hard_an_example_is(images: Any) -> None:
    x, y, known, fresh = images
    other = learn(make_net(), torch.randn(2, 3, 4, 4), torch.tensor([0, 1]), steps=1)
    loss = {m: -class_loss(*class_log_probabilities(m, (x, y))) for m in (known, fresh, other)}
    found = reference_ratio(loss[known], loss[fresh])
    assert np.allclose(found, loss[fresh] - loss[known])
    holds(found, reference_ratio(loss[other], loss[fresh]))


def test_lira_is_the_ratio_of_two_normals() -> None:
    rng = np.random.default_rng(0)
    shadow, member = rng.normal(size=(80, 3)), np.arange(80)[:, None] % 2 == np.zeros((1, 3))
    phi = rng.normal(size=3)
    sides = [(shadow[side[:, 0]].mean(0), shadow[side[:, 0]].std(0)) for side in (member, ~member)]
    expected = norm.logpdf(phi, *sides[0]) - norm.logpdf(phi, *sides[1])
    assert np.allclose(lira_online(phi, shadow, member), expected)
    assert np.allclose(lira_offline(phi, shadow, member), (phi - sides[1][0]) / sides[1][1])
    with pytest.raises(DataError, match="no shadow model"):
        lira_online(phi, shadow, np.ones_like(member))
    with pytest.raises(DataError, match="Expected both"):
        lira_offline(phi, shadow, member[:3])


def test_shadow_attacks_find_members_and_only_them(images: Any) -> None:
    x, y, known, fresh = images
    train = lambda chosen: learn(make_net(), x[chosen], y[chosen], steps=60)
    confidence = lambda model: logit_confidence(*class_log_probabilities(model, (x, y)))
    shadow, member = shadow_signals(train, confidence, examples=2 * SIZE, models=8)
    assert (member.sum(0) == 4).all()
    mine, other = confidence(known), confidence(fresh)
    holds(lira_online(mine, shadow, member), lira_online(other, shadow, member))
    holds(lira_offline(mine, shadow, member), lira_offline(other, shadow, member))
    log_p = lambda model, a, b: class_loss(*class_log_probabilities(model, (a, b)))
    z, z_y = torch.randn(100, 3, 4, 4), torch.randint(0, 5, (100,))
    population = np.stack([log_p(fresh, z, z_y)])
    reference = np.stack([log_p(fresh, x, y)])
    score = rmia(log_p(known, x, y), reference, log_p(known, z, z_y), population)
    assert separation(score) > 0.9


def test_rmia_by_hand() -> None:
    x, x_ref = np.array([0.8, 0.2]), np.array([[0.4, 0.4], [0.2, 0.4]])
    z, z_ref = np.array([0.5, 0.1, 0.9]), np.array([[0.5, 0.3, 0.3], [0.3, 0.5, 0.3]])
    a = 0.4
    p = lambda ref: ((1 + a) * ref.mean(0) + 1 - a) / 2
    ratios = (x / p(x_ref))[:, None] / (z / p(z_ref))[None]
    logs = [np.log(v) for v in (x, x_ref, z, z_ref)]
    assert np.allclose(rmia(*logs, a=a), (ratios >= 1).mean(1))
    assert np.allclose(rmia(*logs, a=a, gamma=2.0), (ratios >= 2).mean(1))
    with pytest.raises(ConfigurationError, match="gamma"):
        rmia(*logs, gamma=0.5)
    with pytest.raises(DataError, match="population"):
        rmia(x, x_ref, np.array([]), np.zeros((1, 0)))


@pytest.mark.slow
def test_quantile_regression_holds_its_false_positive_rate_at_every_kind_of_example() -> None:
    rng = np.random.default_rng(0)
    hard = rng.integers(0, 2, 4000).astype(float)
    scores = rng.normal(size=4000) * (1 + 3 * hard) + 5 * hard
    fresh_hard = rng.integers(0, 2, 4000).astype(float)
    fresh = rng.normal(size=4000) * (1 + 3 * fresh_hard) + 5 * fresh_hard
    above = quantile_regression(hard[:, None], scores, fresh_hard[:, None], fresh, fpr=0.1) > 0
    for kind in (0.0, 1.0):
        assert above[fresh_hard == kind].mean() == pytest.approx(0.1, abs=0.04)
    # One threshold for all would accuse the hard ones only.
    assert (fresh > np.quantile(scores, 0.9))[fresh_hard == 0].mean() < 0.01
    with pytest.raises(DataError, match="non-members"):
        quantile_regression(hard[:10, None], scores[:10], hard[:10, None], scores[:10], fpr=0.01)


def test_rows_and_mappings_are_data_too() -> None:
    model = nn.Linear(3, 2)
    rows = [{"input": torch.ones(3), "label": 1} for _ in range(4)]
    log_p, labels = class_log_probabilities(model, rows)
    assert log_p.shape == (4, 2)
    assert labels.tolist() == [1] * 4
    assert class_gradient_norm(model, rows).shape == (4,)
    with pytest.raises(DataError, match="true label"):
        labelled([torch.ones(3)])
    with pytest.raises(DataError, match="empty"):
        labelled([])
    with pytest.raises(DataError, match="do not fit labels"):
        class_log_probabilities(model, (torch.ones(2, 3), torch.tensor([0, 5])))
    with pytest.raises(ConfigurationError, match="without logits"):
        class_log_probabilities(nn.Flatten(0), (torch.ones(2, 3), torch.tensor([0, 1])))


# -- texts -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_token_statistics_by_hand(texts: Any) -> None:
    _, ids, model, _ = texts
    said = token_statistics(model, ids[:3])[1]
    model.eval()
    with torch.no_grad():
        p = model(input_ids=torch.tensor([ids[1]])).logits[0, :-1].double().softmax(-1).numpy()
    target = np.array(ids[1][1:])
    log = np.log(p)
    mean = (p * log).sum(1)
    assert np.allclose(said.log_p, log[np.arange(len(target)), target], atol=1e-4)
    assert np.allclose(said.mean, mean, atol=1e-4)
    assert np.allclose(said.std, np.sqrt((p * (log - mean[:, None]) ** 2).sum(1)), atol=1e-3)
    assert np.allclose(said.top, p.max(1), atol=1e-4)
    assert np.allclose(said.margin, np.sort(log, 1)[:, -1] - np.sort(log, 1)[:, -2], atol=1e-3)
    five = np.sort(p, 1)[:, -5:] / np.sort(p, 1)[:, -5:].sum(1, keepdims=True)
    assert np.allclose(said.top_entropy, -(five * np.log(five)).sum(1), atol=1e-3)


class RulesOut(nn.Module):
    """A language model of four words that rules out the last one, or has never heard of it."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = words
        self.fixed = nn.Parameter(torch.tensor([[0.0, 1.0, 2.0, -math.inf]]))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.fixed[:, : self.words].expand(*input_ids.shape, -1)


def test_a_word_that_a_model_rules_out_adds_nothing_to_its_expectations() -> None:
    ruled_out, unheard = (token_statistics(RulesOut(n), [[0, 1, 2, 0]])[0] for n in (4, 3))
    for name in ("log_p", "mean", "std", "top", "margin", "top_entropy"):
        assert np.allclose(getattr(ruled_out, name), getattr(unheard, name), atol=1e-6), name


def test_min_k_by_hand() -> None:
    zeros = np.zeros(10)
    s = TokenStatistics(
        log_p=-np.arange(10.0), mean=zeros + 1, std=zeros + 2, top=zeros, margin=zeros,
        top_entropy=zeros, variance_p=zeros,
    )  # fmt: skip
    assert min_k([s], 0.2)[0] == -8.5
    assert min_k([s], 0.01)[0] == -9.0
    assert min_k_plus_plus([s], 0.2)[0] == (-8.5 - 1) / 2
    with pytest.raises(ConfigurationError, match="share"):
        min_k([s], 0.0)


@pytest.mark.slow
def test_scores_of_texts(texts: Any) -> None:
    words, ids, known, fresh = texts
    said = {m: token_statistics(m, ids) for m in (known, fresh)}
    total = {m: np.array([s.loss * len(s) for s in said[m]]) for m in said}
    holds(text_loss(said[known]), text_loss(said[fresh]))
    holds(min_k(said[known]), min_k(said[fresh]))
    holds(min_k_plus_plus(said[known]), min_k_plus_plus(said[fresh]))
    holds(
        reference_ratio(-text_loss(said[known]), -text_loss(said[fresh])),
        text_loss(said[fresh]),
    )
    holds(zlib_ratio(total[known], words), zlib_ratio(total[fresh], words))
    holds(text_gradient_norm(known, ids), text_gradient_norm(fresh, ids))


@pytest.mark.slow
def test_texts_without_a_next_token(texts: Any) -> None:
    _, _, model, _ = texts
    tokenizer = make_tokenizer()
    assert tokenize(["w1", "w1 w2", ""], tokenizer) == [[1, 3], [3, 4], []]
    with pytest.raises(DataError, match="at least two"):
        token_statistics(model, [[1, 2], [3]])
    with pytest.raises(ConfigurationError, match="one prediction a token"):
        token_statistics(_Pooled(), [[1, 2, 3]])


class _Pooled(nn.Module):
    """A classifier of texts: one row of logits a text."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.zeros(len(input_ids), 4)
