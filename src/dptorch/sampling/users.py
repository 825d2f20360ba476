"""Sampling by user: a drawn user brings some of their examples, never more than a bound."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dptorch.errors import ConfigurationError, DataError
from dptorch.randomness import RootKey
from dptorch.sampling.sampler import Sampler, check_key, distinct_indices

__all__ = ["UserSampler", "Users"]


class Users:
    """Whose each example is.

    Args:
        user_ids: one id for each example: integers, strings or a tensor, in any order.

    Raises:
        DataError: an id is missing, or there are none.

    Example:
        >>> users = Users(["ada", "bob", "ada"])
        >>> len(users), users.examples(0).tolist()
        (2, [0, 2])
    """

    def __init__(self, user_ids: Any) -> None:
        ids = np.asarray(user_ids)
        if ids.ndim != 1 or len(ids) == 0:
            raise DataError(
                f"user_ids has the shape {ids.shape}; expected one id for each example, at least one"
            )
        missing = ids.dtype.kind in "fO" and any(v is None or v != v for v in ids.tolist())
        if missing:
            raise DataError("user_ids has missing ids (None or NaN); every example needs an owner")
        if ids.dtype == object:
            ids = ids.astype(str)
        _, owner = np.unique(ids, return_inverse=True)
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
                "for each, in the order of the dataset"
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
                f"the sampler draws from {sampler.sample_size} users, but there are {len(users)}"
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
