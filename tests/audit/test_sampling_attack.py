"""The sampling attack: nearly as good as scores on a plain model, and bounded on accounted answers."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from dptorch.accounting import gaussian_mu_for
from dptorch.audit import Evidence, play_sampling
from dptorch.audit.attacked_run import _gaussian_auc
from dptorch.audit.roc import auc, auc_interval
from dptorch.prediction import PrivatePredictor, train_shards

QUERIES = (1, 10, 60)


@pytest.fixture(scope="module")
def digits():
    """300 digits, 15 % of them with a wrong label, and 300 others."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = (x / 16).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:600]
    noise = torch.Generator().manual_seed(1)
    wrong = torch.rand(600, generator=noise) < 0.15
    y = torch.where(wrong, torch.randint(0, 10, (600,), generator=noise), y[order])
    return (x[order[:300]], y[:300]), (x[order[300:]], y[300:])


def fit(part):
    """A network that learns its examples by heart."""
    x, y = (torch.stack([torch.as_tensor(each[i]) for each in part]) for i in (0, 1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def plain(digits):
    model = fit(torch.utils.data.TensorDataset(*digits[0]))
    with torch.no_grad():
        assert (model(digits[0][0]).argmax(1) == digits[0][1]).double().mean() > 0.98
    return model


def labels_of(model):
    return lambda inputs: model(inputs).argmax(1).detach()


def aucs(labels, digits, queries=QUERIES):
    return [auc(e) for e in play_sampling(labels, *digits, queries=queries)]


@pytest.mark.slow
def test_labels_alone_recover_what_scores_tell(digits, plain):
    scores = []
    for x, y in digits:
        with torch.no_grad():
            scores.append(plain(x).log_softmax(1)[torch.arange(len(y)), y].numpy())
    score_attack = auc(Evidence.of(*scores))
    assert score_attack > 0.6
    assert max(aucs(labels_of(plain), digits)) >= 0.95 * score_attack


def noisy(models, digits, **terms):
    predictor = PrivatePredictor(models, seed=3, **terms)
    return play_sampling(lambda x: predictor.predict(x).labels, *digits, queries=QUERIES)


@pytest.mark.slow
def test_noise_for_one_answer_averages_out_and_noise_for_all_does_not(digits, plain):
    total = 600 * max(QUERIES)
    useful = noisy([plain], digits, mechanism="gaussian", budget=(1e6, 1e-5), noise=0.25, clip=10.0)
    assert auc(useful[0]) < auc(useful[1]) - 0.02
    assert auc(useful[2]) > 0.6
    mu = gaussian_mu_for(1.0, 1e-5)
    shards = train_shards(fit, torch.utils.data.TensorDataset(*digits[0]), 10)
    for models, terms in (
        ([plain], {"mechanism": "gaussian", "clip": 10.0}),
        (shards, {"mechanism": "gnmax"}),
    ):
        honest = noisy(models, digits, budget=(1.0, 1e-5), queries=total, **terms)
        for k, evidence in zip(QUERIES, honest, strict=True):
            low, _ = auc_interval(evidence, significance=0.01)
            assert low <= _gaussian_auc(mu / np.sqrt(total), k) < 0.51
    # The broken twin: answers that cost nothing, held against the same bound.
    low, _ = auc_interval(useful[2], significance=0.01)
    assert low > _gaussian_auc(mu / np.sqrt(total), max(QUERIES))


def test_frequencies_are_counted_and_the_first_label_is_the_examples_own():
    seen = []

    def labels(inputs):
        seen.append(inputs)
        return torch.zeros(len(inputs), dtype=torch.int64)

    members = (torch.randn(4, 3), torch.tensor([0, 0, 1, 1]))
    found = play_sampling(labels, members, members, queries=(1, 3))
    assert torch.equal(seen[0], torch.cat([members[0]] * 2))
    assert not torch.equal(seen[1], seen[0])
    assert [e.members.tolist() for e in found] == [[1.0, 1.0, 0.0, 0.0]] * 2
    assert [auc(e) for e in found] == [0.5, 0.5]
