"""User-level sampling: users are drawn, and bring a bounded, keyed choice of their examples."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from dptorch.errors import ConfigurationError, DataError
from dptorch.randomness import RootKey
from dptorch.sampling import FixedSizeSampler, PoissonSampler, Sampler, Users, UserSampler

KEY = RootKey.from_seed(5)
FALSE_ALARM = 1e-7
# Interleaved, of 1 to 6 examples each.
IDS = [u for round_ in range(6) for u in "abcdef"[: 6 - round_]]


def sampler(most: int, *, ids: Any = IDS, rate: float = 0.5) -> UserSampler:
    users = Users(ids)
    return UserSampler(PoissonSampler(len(users), rate, KEY), users, most, KEY)


@pytest.mark.parametrize(
    "ids",
    [
        IDS,
        np.array(IDS),
        tuple(IDS),
        [ord(u) for u in IDS],
        torch.tensor([ord(u) for u in IDS]),
        np.array([ord(u) * 0.5 for u in IDS]),
        np.array([*IDS], dtype=object),
    ],
)
def test_ids_of_any_kind_say_whose_each_example_is(ids: Any) -> None:
    users = Users(ids)
    assert (len(users), users.examples_in_all) == (6, 21)
    for user, name in enumerate("abcdef"):
        assert users.examples(user).tolist() == [i for i, u in enumerate(IDS) if u == name]


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_a_drawn_user_brings_at_most_the_bound_and_all_up_to_it(most: int) -> None:
    drawn_users = PoissonSampler(6, 0.5, KEY)
    users = Users(IDS)
    for step in range(200):
        drawn = sampler(most).draw(step)
        assert len(set(drawn.tolist())) == len(drawn)
        count = Counter(IDS[i] for i in drawn)
        expected = {
            "abcdef"[u]: min(most, len(users.examples(u))) for u in drawn_users.draw(step).tolist()
        }
        assert count == expected


def test_the_choice_is_uniform_and_fresh_at_each_step() -> None:
    """Pairs of the six examples of "a": 15 of them; chi-square, false alarm 1e-7."""
    mine = [i for i, u in enumerate(IDS) if u == "a"]
    full = sampler(2, rate=1.0)
    pairs = Counter(tuple(i for i in full.draw(step).tolist() if i in mine) for step in range(3000))
    assert len(pairs) == 15
    assert stats.chisquare(list(pairs.values())).pvalue > FALSE_ALARM


def test_nobody_elses_choice_moves() -> None:
    """With other users' examples appended, each user still brings the same ones."""
    fewer, more = sampler(2, rate=1.0), sampler(2, ids=[*IDS, *"zzzzz"], rate=1.0)
    for step in range(20):
        drawn = more.draw(step)
        assert drawn[drawn < len(IDS)].tolist() == fewer.draw(step).tolist()


def test_a_user_drawn_twice_counts_twice() -> None:
    users = Users(IDS)
    twice = UserSampler(FixedSizeSampler(6, 12, KEY, replacement=True), users, 2, KEY)
    drawn = twice.draw(0)
    assert len(set(drawn.tolist())) < len(drawn)


def test_draws_are_functions_of_key_and_step() -> None:
    forward = [sampler(2).draw(step).tolist() for step in range(20)]
    again = sampler(2)
    assert [again.draw(step).tolist() for step in reversed(range(20))] == forward[::-1]
    assert isinstance(again, Sampler)
    assert (again.scheme, again.sample_size) == ("poisson", 21)
    assert [] in forward or sampler(2, rate=0.01).draw(0).tolist() == []


class Table:
    """As a `datasets.Dataset`: rows by number, columns by name."""

    def __len__(self) -> int:
        return 21

    def __getitem__(self, at: Any) -> Any:
        return {"user": IDS}[at] if isinstance(at, str) else {"x": at}


def test_a_column_or_a_list() -> None:
    for ids in ("user", IDS):
        assert len(Users.of(Table(), ids)) == 6
    with pytest.raises(DataError, match="'usr' is no column of Table"):
        Users.of(Table(), "usr")
    with pytest.raises(DataError, match="no column of list"):
        Users.of([0] * 21, "user")
    for wrong in (IDS[:-1], [*IDS, "a"]):
        with pytest.raises(DataError, match=f"{len(wrong)} ids for 21 examples"):
            Users.of(Table(), wrong)


@pytest.mark.parametrize(
    "ids", [[], [["a"], ["b"]], ["a", None], [1.0, float("nan")], 7, np.array([1.0, np.nan])]
)
def test_impossible_ids_are_refused(ids: Any) -> None:
    with pytest.raises(DataError, match="user_ids"):
        Users(ids)


def test_the_sampler_must_draw_users() -> None:
    with pytest.raises(ConfigurationError, match="21 users, but there are 6"):
        UserSampler(PoissonSampler(21, 0.5, KEY), Users(IDS), 2, KEY)
