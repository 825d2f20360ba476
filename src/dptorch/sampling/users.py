"""Sampling by user: a batch takes at most a fixed number of examples of each drawn user."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Final
from uuid import UUID

import numpy as np
import torch
from numpy.typing import NDArray

from dptorch.errors import ConfigurationError, DataError
from dptorch.randomness import RootKey
from dptorch.sampling.sampler import Sampler, check_key, distinct_indices

__all__ = ["UserSampler", "Users"]

_WORDS_FOR_MISSING: Final = frozenset({"nan", "NaN", "None", "NaT", "<NA>"})
_UNSEEN: Final = (
    "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060"  # a byte-order mark, and spaces of no width
)
_NAMED: Final = 3  # how many places an error names


class Users:
    """The user of each example.

    Two ids are one user if they have the same type and the same value; case counts. An id is an
    integer, a string, bytes, a `uuid.UUID` or a finite float, and all ids are of one type. What does
    not say for sure who somebody is, is refused, because a person who is taken for two would be
    protected half as well:

    - missing ids: None, NaN, NaT, masked and null entries, empty or blank strings, the words that
      Python writes for them ("nan", "None", "NaT", "<NA>"), and the -1 of `pandas.factorize`;
    - ids of several types, such as 1 beside 1.0, True or "1";
    - strings that differ only by what is around them and cannot be seen, or by the form of Unicode;
    - strings and bytes with a NUL, since numpy takes "a" and "a\\0" for one;
    - floats so large that different integers have become one (from 2**53 on, of float32 2**24).

    Args:
        user_ids: one id for each example, in any order: a list, an array, a tensor, or a column of
            pandas or pyarrow.

    Raises:
        DataError: an id is missing or ambiguous (the first places are named), or there are none.

    Example:
        >>> users = Users(["ada", "bob", "ada"])
        >>> len(users), users.examples(0).tolist()
        (2, [0, 2])
    """

    def __init__(self, user_ids: Any) -> None:
        owner = _owners(user_ids)
        self._by_user = np.argsort(owner, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(owner))])

    @classmethod
    def of(cls, dataset: Any, user_ids: Any) -> Users:
        """The users of a data set, from a list of ids or the name of its column.

        Raises:
            DataError: there is no such column, an id is missing, or not one for each example.
        """
        ids = user_ids
        if isinstance(user_ids, str):
            try:
                ids = dataset[user_ids]
            except Exception as error:
                raise DataError(
                    f"user_ids={user_ids!r} is no column of {type(dataset).__name__} ({error!r}). Give "
                    "the ids themselves: a list with one for each example."
                ) from error
        users = cls(ids)
        if users.examples_in_all != len(dataset):
            raise DataError(
                f"user_ids has {users.examples_in_all} ids for {len(dataset)} examples; expected one "
                "for each, in the order of the dataset."
            )
        return users

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def examples_in_all(self) -> int:
        """Number of examples of all users together."""
        return len(self._by_user)

    def examples(self, user: int) -> NDArray[np.int64]:
        """Indices of a user's examples, ascending."""
        return self._by_user[self._starts[user] : self._starts[user + 1]]


class UserSampler:
    """Draws users as `sampler` says, and of each at most `max_examples_per_user` examples.

    A user with more contributes a uniformly random subset, chosen anew at each step they are drawn
    and independently of everybody else.

    Args:
        sampler: draws users; its `sample_size` is their number.
        users: whose each example is.
        max_examples_per_user: bound k.
        key: root key of the run.

    Guarantees:
        At most k examples of a user are in a batch for each time the user was drawn, and whether they
        are, and which, does not depend on any other user's examples. With every example clipped to
        C / k, a user moves a batch's sum by at most C, by the triangle inequality.
        Held by `test_a_drawn_user_brings_at_most_the_bound_and_all_up_to_it` and
        `test_nobody_elses_choice_moves`.

    Example:
        >>> from dptorch.sampling import PoissonSampler
        >>> key = RootKey.from_seed(0)
        >>> users = Users(["ada"] * 50 + ["bob"])
        >>> UserSampler(PoissonSampler(2, 1.0, key), users, 3, key).draw(0).shape
        (4,)
    """

    def __init__(
        self, sampler: Sampler, users: Users, max_examples_per_user: int, key: RootKey
    ) -> None:
        if sampler.sample_size != len(users):
            raise ConfigurationError(
                f"the sampler draws from {sampler.sample_size} users, but there are {len(users)}. "
                "Make it for the number of users."
            )
        self._sampler, self._users = sampler, users
        self._most = max_examples_per_user
        self._key = check_key(key)

    @property
    def scheme(self) -> str:
        """Name of the scheme that draws the users."""
        return self._sampler.scheme

    @property
    def sample_size(self) -> int:
        """Number of examples that the indices refer to."""
        return self._users.examples_in_all

    def draw(self, step: int) -> NDArray[np.int64]:
        """int64 indices of the examples in logical batch `step`, user by user; possibly none."""
        chosen = [self._examples(int(user), step) for user in self._sampler.draw(step)]
        return np.concatenate(chosen) if chosen else np.empty(0, np.int64)

    def _examples(self, user: int, step: int) -> NDArray[np.int64]:
        examples = self._users.examples(user)
        if len(examples) <= self._most:
            return examples
        # A stream of the user's own first example, so that nobody else's presence shifts it.
        seed = self._key.derive("user examples", step, int(examples[0]))
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(seed[:16], "little")))
        return examples[distinct_indices(generator, len(examples), self._most)]


# -- identities ------------------------------------------------------------------------------------


def _owners(user_ids: Any) -> NDArray[np.int64]:
    """The number of the user of each example, [N]: 0, 1, ... in the order of their ids."""
    if isinstance(user_ids, np.ma.MaskedArray):
        _refuse_missing(np.flatnonzero(np.ma.getmaskarray(user_ids)).tolist())
    exact_below = 0.0
    if isinstance(user_ids, torch.Tensor):
        user_ids = user_ids.detach().cpu()
        if user_ids.is_floating_point():  # numpy lacks some of torch's types
            exact_below, user_ids = _exact_below(user_ids.dtype), user_ids.double()
    plain = isinstance(user_ids, Sequence) and not isinstance(user_ids, str | bytes)
    # An array of a list would turn 1 into "1" and NaN into "nan".
    ids: Any = _one_dimensional(user_ids) if plain else np.asarray(user_ids)
    if ids.ndim != 1 or len(ids) == 0:
        raise DataError(
            f"user_ids has the shape {ids.shape}; expected one id for each example, at least one."
        )
    if ids.dtype.kind == "f":
        _refuse_missing(np.flatnonzero(np.isnan(ids)).tolist())
        limit = exact_below or _exact_below(ids.dtype)
        _refuse_inexact(np.flatnonzero(~(np.abs(ids) < limit)).tolist())
    if ids.dtype.kind in "iuf":
        found, owners = np.unique(ids, return_inverse=True)
        if ids.dtype.kind == "i" and _are_codes(found.tolist()):
            _refuse_missing(np.flatnonzero(ids == -1).tolist())
        return np.asarray(owners, np.int64)
    if ids.dtype.kind in "mM":
        _refuse_missing(np.flatnonzero(np.isnat(ids)).tolist())
    values = [_plain(value) for value in ids]
    _refuse_missing([i for i, value in enumerate(values) if _is_missing(value)])
    _refuse_mixed(values)
    if isinstance(values[0], float):
        pairs = enumerate(zip(ids, values, strict=True))
        _refuse_inexact([i for i, (raw, v) in pairs if not abs(v) < _exact_below_of(raw)])
    if isinstance(values[0], str | bytes):
        _refuse_nul(values)
        _refuse_alike(values)
    users = sorted(set(values))
    if isinstance(values[0], int) and _are_codes(users):
        _refuse_missing([i for i, value in enumerate(values) if value == -1])
    number = {value: i for i, value in enumerate(users)}
    return np.array([number[value] for value in values])


def _exact_below(dtype: Any) -> float:
    """Below it, each integer is a float of this type of numpy or torch."""
    info: Any = torch.finfo(dtype) if isinstance(dtype, torch.dtype) else np.finfo(dtype)
    return 2.0 / float(info.eps)


def _exact_below_of(value: Any) -> float:
    """`_exact_below` for the type of a scalar of numpy, torch or Python."""
    return _exact_below(getattr(value, "dtype", np.float64))


def _are_codes(users: Sequence[int]) -> bool:
    """Whether ids, in order, are -1, 0, 1, 2, ...: what pandas.factorize makes of a column that has
    missing values."""
    return len(users) > 1 and users[0] == -1 and users[-1] == len(users) - 2


def _one_dimensional(values: Sequence[Any]) -> NDArray[Any]:
    """An array [N] of the objects in a list."""
    if values and np.ndim(values[0]):
        raise DataError(
            f"user_ids[0] has the shape {np.shape(values[0])}; expected one id for each example."
        )
    ids = np.empty(len(values), object)
    ids[:] = values
    return ids


def _plain(value: Any) -> Any:
    """Python's own value of a scalar of numpy or of a tensor without dimensions."""
    if isinstance(value, np.datetime64 | np.timedelta64):
        return None if np.isnat(value) else value
    if isinstance(value, np.generic) or (hasattr(value, "item") and np.ndim(value) == 0):
        return value.item()
    return value


def _is_missing(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, str | bytes):
        return not _seen(_text(value)) or _text(value) in _WORDS_FOR_MISSING
    try:
        return bool(value != value)
    except (TypeError, ValueError):  # pandas.NA is neither equal nor unequal to anything
        return True


def _seen(value: str) -> str:
    """What a reader sees of a string: in one form of Unicode, without what is around it unseen."""
    return unicodedata.normalize("NFC", value.strip().strip(_UNSEEN).strip())


def _kind(value: Any) -> str:
    """The name of the type by which an id is compared; "" for one that is no identity."""
    for kind in (bool, int, float, str, bytes, UUID):  # a bool is an int to Python
        if isinstance(value, kind):
            return "" if kind is bool else kind.__name__
    return ""


def _places(indices: Iterable[int]) -> str:
    found = list(indices)
    more = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
    return ", ".join(f"user_ids[{i}]" for i in found[:_NAMED]) + more


def _refuse_missing(indices: list[int]) -> None:
    if indices:
        raise DataError(
            f"user_ids has missing ids, at {_places(indices)}: None, NaN, a blank string, a word for "
            "it such as 'nan', or the -1 that pandas.factorize writes for it. Every example needs an "
            "owner. Drop these examples, or give each of them the id of a user."
        )


def _refuse_inexact(indices: list[int]) -> None:
    if indices:
        raise DataError(
            f"user_ids has floats so large, at {_places(indices)}, that two different integers can "
            "have become one float. Give the ids as integers or as strings."
        )


def _refuse_nul(values: list[Any]) -> None:
    zero = "\0" if isinstance(values[0], str) else b"\0"
    found = [i for i, value in enumerate(values) if zero in value]
    if found:
        raise DataError(
            f"user_ids has ids with a NUL, at {_places(found)}: numpy takes 'a' and 'a\\0' for one "
            "id, and others do not. Strip it, as in [u.rstrip('\\0') for u in user_ids]."
        )


def _refuse_alike(values: list[Any]) -> None:
    first: dict[str, Any] = {}
    for value in dict.fromkeys(values):
        other = first.setdefault(_seen(_text(value)), value)
        if other != value:
            raise DataError(
                f"user_ids[{values.index(other)}] and user_ids[{values.index(value)}] differ only by "
                "what is around them and cannot be seen, as spaces, or by the form of Unicode: they "
                "may be one person or two. Strip the ids, as in [u.strip() for u in user_ids], or give "
                "each user a number."
            )


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _refuse_mixed(values: list[Any]) -> None:
    first: dict[str, int] = {}  # of each kind, its first place
    for i, value in enumerate(values):
        first.setdefault(_kind(value), i)
    if "" in first:
        i = first[""]
        raise DataError(
            f"user_ids[{i}] is of type {type(values[i]).__name__}; expected integers, strings, bytes, "
            "UUIDs or floats, all of one type. Give each user a number, as pandas.factorize does."
        )
    if len(first) > 1:
        told = ", ".join(f"user_ids[{i}] is of type {kind}" for kind, i in first.items())
        raise DataError(
            f"user_ids has ids of several types ({told}), so that 1, 1.0 and '1' may be one person or "
            "three. Give all ids as one type, as in [str(u) for u in user_ids]."
        )
