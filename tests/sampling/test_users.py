"""User-level sampling: users are drawn, and bring a bounded, keyed choice of their examples."""

from __future__ import annotations

from collections import Counter
from typing import Any
from uuid import UUID

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


@pytest.mark.slow
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


NAN, NAT = float("nan"), np.datetime64("NaT")
MISSING: dict[str, Any] = {
    "NaN among strings": ["b", "a", NAN, NAN],
    "None among strings": ["b", "a", None, "a"],
    "NaT": np.array(["2020-01-01", "2020-01-02", "NaT", "NaT"], dtype="M8[s]"),
    "NaT in a list": ["b", "a", NAT, "a"],
    "NaT among objects": np.array(["b", "a", NAT, "a"], dtype=object),
    "NaN in an array": np.array([2.0, 1.0, NAN, 1.0]),
    "NaN as text": np.array(["b", "a", NAN, NAN]),  # numpy writes "nan"
    "None as text": np.array(["b", "a", None, "a"]).astype(str),
    "empty": ["b", "a", "", "a"],
    "blank": ["b", "a", " \t", "a"],
    "empty bytes": [b"b", b"a", b"", b"a"],
    "a byte-order mark alone": ["b", "a", "\ufeff", "a"],
    "NaN as bytes": np.array(["b", "a", NAN, NAN]).astype("S"),
    "codes of pandas.factorize": np.array([1, 0, -1, 0]),
    "codes in a list": [1, 0, -1, 0],
    "masked": np.ma.masked_equal([2, 1, 9, 9], 9),
    "pandas": lambda pd: pd.Series(["b", "a", pd.NA, "a"], dtype="string"),
    "pandas integers": lambda pd: pd.Series([2, 1, None, 1], dtype="Int64"),
    "pandas categories": lambda pd: pd.Series(["b", "a", None, "a"], dtype="category"),
}


def made(ids: Any) -> Any:
    return ids(pytest.importorskip("pandas")) if callable(ids) else ids


@pytest.mark.parametrize("kind", MISSING)
def test_missing_ids_are_refused_and_the_first_named(kind: str) -> None:
    with pytest.raises(DataError, match=r"missing ids, at user_ids\[2\]"):
        Users(made(MISSING[kind]))


AMBIGUOUS: dict[str, tuple[Any, str]] = {
    "1 and 1.0": ([1, 1.0, 2], r"user_ids\[0\] is of type int, user_ids\[1\] is of type float"),
    "1 and 1.0 and a string": (np.array([1, 1.0, "x"], dtype=object), "several types"),
    "1 and '1'": ([1, "1"], "several types"),
    "True and 1": ([True, 1], r"user_ids\[0\] is of type bool"),
    "True, 1 and a string": (
        np.array([1, True, "x"], dtype=object),
        r"user_ids\[1\] is of type bool",
    ),
    "bytes and a string": (np.array([b"a", "a"], dtype=object), r"type bytes.*type str"),
    "numpy's and Python's": (np.array([np.int64(7), 7.0], dtype=object), "several types"),
    "a trailing NUL": (["b", "a\0", "a"], r"NUL, at user_ids\[1\]"),
    "a trailing NUL in bytes": ([b"b", b"a\0"], r"NUL, at user_ids\[1\]"),
    "large floats": (
        [2.0**53, 2.0**53 + 1, 0.5],
        r"floats so large, at user_ids\[0\], user_ids\[1\], that",
    ),
    "large floats in an array": (
        np.array([0.5, 2.0**53]),
        r"floats so large, at user_ids\[1\], that",
    ),
    "large floats of 32 bits": (
        np.array([0.5, 2.0**24], np.float32),
        r"floats so large, at user_ids\[1\], that",
    ),
    "large floats of 32 bits in a list": (
        [np.float32(0.5), np.float32(2.0**24)],
        r"floats so large, at user_ids\[1\], that",
    ),
    "large floats of 16 bits": (
        torch.tensor([1.0, 256.0], dtype=torch.bfloat16),
        r"floats so large, at user_ids\[1\], that",
    ),
    "spaces around": (["b", "a", "a "], r"user_ids\[1\] and user_ids\[2\] differ only by"),
    "spaces around bytes": ([b"a ", b"a"], r"user_ids\[0\] and user_ids\[1\] differ only by"),
    "a byte-order mark": (["\ufeffada", "ada"], r"user_ids\[0\] and user_ids\[1\] differ only by"),
    "forms of Unicode": (["e\u0301", "\u00e9"], r"user_ids\[0\] and user_ids\[1\] differ only by"),
    "infinity": (np.array([0.5, np.inf]), r"floats so large, at user_ids\[1\], that"),
    "tuples": (((1, 2), (1, 2)), r"user_ids\[0\] has the shape \(2,\)"),
    "lists of several lengths": ([["a"], ["b", "c"]], r"user_ids\[0\] has the shape \(1,\)"),
    "dates": (np.array(["2020-01-01"], dtype="M8[s]"), r"user_ids\[0\] is of type datetime64"),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_ambiguous_ids_are_refused_and_the_first_named(kind: str) -> None:
    ids, says = AMBIGUOUS[kind]
    with pytest.raises(DataError, match=says):
        Users(ids)


def test_ids_are_one_user_if_type_and_value_are_the_same() -> None:
    assert len(Users(["a", "A", "a"])) == len(Users(["a b", "ab", "ab"])) == 2
    assert len(Users([-1, -2, 0])) == 3  # no codes of pandas.factorize
    assert len(Users([0.0, -0.0])) == len(Users(np.array([0.0, -0.0]))) == 1
    assert len(Users(torch.tensor([1.0, 2.0], requires_grad=True))) == 2
    assert len(Users(torch.tensor([1.0, 255.0], dtype=torch.bfloat16))) == 2
    assert len(Users([2**53, 2**53 + 1, -1, 2**64])) == 4
    assert len(Users(np.array([np.int64(7), 7, np.uint8(7)], dtype=object))) == 1
    assert len(Users([torch.tensor(7), 7])) == 1
    assert len(Users([UUID(int=1), UUID(int=1), UUID(int=2)])) == 2
    assert len(Users(np.array(["a", "b"], dtype="U9"))) == 2


@pytest.mark.parametrize("dtype", ["Int64", "int64", "string", "object", "category"])
def test_columns_of_pandas(dtype: str) -> None:
    pd = pytest.importorskip("pandas")
    ids = [ord(u) for u in IDS] if dtype in ("Int64", "int64") else IDS
    users = Users(pd.Series(ids, dtype=dtype))
    assert [users.examples(u).tolist() for u in range(6)] == [
        Users(IDS).examples(u).tolist() for u in range(6)
    ]


def test_columns_of_pyarrow() -> None:
    pa = pytest.importorskip("pyarrow")
    for ids in (pa.array(IDS), pa.chunked_array([IDS]), pa.array([ord(u) for u in IDS])):
        assert len(Users(ids)) == 6
    assert len(Users(pa.array(IDS).dictionary_encode())) == 6
    for missing in (
        pa.array(["b", "a", None]),
        pa.array(["b", "a", None]).dictionary_encode(),
        pa.chunked_array([[2, 1, None]]),
    ):
        with pytest.raises(DataError, match=r"missing ids, at user_ids\[2\]"):
            Users(missing)


def test_ids_as_text_would_pass_what_is_missing_or_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: what numpy makes of a list."""

    def as_text(ids: Any) -> np.ndarray:
        return np.unique(np.asarray(ids).astype(str), return_inverse=True)[1]

    monkeypatch.setattr("dptorch.sampling.users._owners", as_text)
    assert len(Users(MISSING["NaN among strings"])) == 3
    assert len(Users(AMBIGUOUS["1 and 1.0 and a string"][0])) == 3
    assert len(Users(AMBIGUOUS["a byte-order mark"][0])) == 2
    assert len(Users([1, "1"])) == 1


def test_the_sampler_must_draw_users() -> None:
    with pytest.raises(ConfigurationError, match="21 users, but there are 6"):
        UserSampler(PoissonSampler(21, 0.5, KEY), Users(IDS), 2, KEY)
