"""Shards: every record in one, by its own content, users whole."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from dptorch.errors import ConfigurationError, DataError
from dptorch.prediction import PrivatePredictor, assign_shards, train_shards
from dptorch.prediction.shards import _content, shard_of


def data(n=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 3, generator=generator), torch.arange(n) % 2)


def test_shards_are_disjoint_complete_and_of_like_size():
    parts = assign_shards(data(2000), 10)
    assert sorted(i for part in parts for i in part) == list(range(2000))
    assert 150 < min(map(len, parts)) <= max(map(len, parts)) < 250


def moved(assign):
    """How many records are in another shard once record 7 is gone."""
    whole = data()
    rest = TensorDataset(*(t[torch.arange(200) != 7] for t in whole.tensors))
    before = {i - (i > 7): s for s, part in enumerate(assign(whole, 5)) for i in part if i != 7}
    after = {i: s for s, part in enumerate(assign(rest, 5)) for i in part}
    return sum(before[i] != after[i] for i in after)


def test_a_record_moves_no_other():
    assert moved(assign_shards) == 0
    in_turn = lambda dataset, m: [list(range(s, len(dataset), m)) for s in range(m)]
    assert moved(in_turn) > 100  # the broken twin: dealt out in turn


def test_all_of_a_user_is_in_one_shard():
    users = [f"user-{i % 40}" for i in range(200)]
    parts = assign_shards(data(), 5, users)
    where = {}
    for s, part in enumerate(parts):
        for i in part:
            assert where.setdefault(users[i], s) == s
    split = [{users[i] for i in part} for part in assign_shards(data(), 5)]
    assert split[0] & split[1]  # the broken twin: by example, a user is everywhere


def test_equal_examples_are_in_one_shard_and_forms_differ():
    x = torch.ones(3)
    assert _content((x, 1)) == _content((x.clone(), 1))
    assert (
        len(
            {_content(c) for c in ((x, 1), (x, 2), (x.double(), 1), (x[:, None], 1), "a", {"a": 1})}
        )
        == 6
    )
    assert _content(np.float64(1)) != _content(1)
    assert {shard_of(str(i).encode(), 3) for i in range(50)} == {0, 1, 2}


def test_each_model_sees_its_part_alone():
    seen = []

    def fit(part):
        seen.append({int(1e6 * x[0]) for x, _ in part})
        return lambda x: torch.zeros(len(x), 2)

    models = train_shards(fit, data(), 4)
    assert sum(map(len, seen)) == 200
    assert len(set.union(*seen)) == 200
    assert PrivatePredictor(models, "gnmax", budget=(1.0, 1e-5), queries=3).plan.models == 4


def changed_models(train):
    """How many models are others once a record of the first part is gone, under one known seed."""

    def fit(part):  # as long as the part is: masks, an order of rows
        return [
            torch.rand(1 + len(part)).tolist(),
            [random.random() for _ in part],
            [np.random.rand() for _ in part],  # noqa: NPY002
        ]

    models, everybody = [], torch.arange(200)
    for kept in (everybody, everybody[everybody != assign_shards(data(), 5)[0][0]]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        part = TensorDataset(*(t[kept] for t in data().tensors))
        models.append(train(fit, part, 5))
    return sum(a != b for a, b in zip(*models, strict=True))


def test_a_record_changes_one_model():
    assert changed_models(train_shards) == 1
    in_one_stream = lambda fit, dataset, m: [fit(part) for part in assign_shards(dataset, m)]
    assert changed_models(in_one_stream) > 1  # the broken twin


def test_shards_leave_the_generators_as_they_were():
    torch.manual_seed(0)
    first = train_shards(lambda part: torch.rand(()).item(), data(), 3)
    after = torch.rand(())
    torch.manual_seed(0)
    assert train_shards(lambda part: torch.rand(()).item(), data(), 3) == first
    assert len(set(first)) == 3
    assert torch.equal(torch.rand(()), after)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shards": 0}, ConfigurationError, "shards=0"),
        ({"shards": 1000}, DataError, "would be empty"),
        ({"shards": 3, "users": [1]}, ConfigurationError, "200 examples"),
        ({"shards": 3, "users": [1] * 200}, DataError, "of 1 users"),
        ({"dataset": [object()], "shards": 1}, ConfigurationError, "holds a object"),
    ],
)
def test_what_cannot_be_split_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        assign_shards(**{"dataset": data()} | arguments)
