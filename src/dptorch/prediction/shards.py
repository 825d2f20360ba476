"""Disjoint parts of a data set, and a model for each."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from dptorch.accounting.arguments import positive_int
from dptorch.errors import ConfigurationError, DataError
from dptorch.prediction.predictor import Model

__all__ = ["assign_shards", "draws_of", "seed_of_all", "shard_of", "train_shards"]


def shard_of(content: bytes, shards: int) -> int:
    """The shard of an example or user, by a hash of its content alone.

    Example:
        >>> [shard_of(str(i).encode(), 4) for i in range(8)]
        [0, 0, 3, 2, 3, 3, 1, 0]
    """
    digest = hashlib.blake2b(content, digest_size=8, person=b"dptorch shard").digest()
    return int.from_bytes(digest, "big") * shards >> 64


def assign_shards(
    dataset: Dataset[Any], shards: int, users: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """The indices of each shard's examples.

    Args:
        dataset: map-style; without `users` its items are hashed, so they have to be tensors, arrays,
            numbers or texts, or tuples of those.
        shards: how many.
        users: the user of each example; all of a user's examples are in one shard.

    Guarantees:
        The shard of an example (of a user) depends on no other: one that is added or removed changes
        one shard and moves nobody (`test_a_record_moves_no_other`).

    Raises:
        DataError: a shard would be empty.
        ConfigurationError: `users` has another length, or an item cannot be hashed.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(40.0).reshape(20, 2))
        >>> sorted(i for part in assign_shards(data, 3) for i in part) == list(range(20))
        True
    """
    positive_int("shards", shards)
    size = len(dataset)  # type: ignore[arg-type]
    if users is not None and len(users) != size:
        raise ConfigurationError(
            f"users has {len(users)} entries for {size} examples. Give the user of each."
        )
    parts: list[list[int]] = [[] for _ in range(shards)]
    for i in range(size):
        content = _content(dataset[i]) if users is None else repr(users[i]).encode()
        parts[shard_of(content, shards)].append(i)
    if not all(parts):
        raise DataError(
            f"{sum(not part for part in parts)} of {shards} shards would be empty, with {size} "
            f"examples{'' if users is None else f' of {len(set(users))} users'}. Use fewer shards."
        )
    return parts


def train_shards(
    fit: Callable[[Dataset[Any]], Model],
    dataset: Dataset[Any],
    shards: int,
    *,
    users: Sequence[Hashable] | None = None,
) -> list[Model]:
    """Train one model on each of `shards` disjoint parts of a data set, without privacy.

    Give the models to `PrivatePredictor`: an answer of m models moves by 2B/m where one record changes.

    Args:
        fit: trains a model on a part. It may look at nothing else that is private: not at the other
            parts, and not at what was learnt from them.
        dataset: map-style.
        shards: m. More of them need less noise, and each sees less data.
        users: the user of each example, where the unit is a user.

    Returns:
        m models, none of which may be published.

    Guarantees:
        Each part is trained with generators of its own (torch's, Python's and NumPy's global ones), so
        that what one draws moves no other, whatever seed was set before.
        Held by `test_a_record_changes_one_model`.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(40.0).reshape(20, 2))
        >>> len(train_shards(lambda part: (lambda x: x[:, :2]), data, 3))
        3
    """
    base, models = seed_of_all(), []
    for i, part in enumerate(assign_shards(dataset, shards, users)):
        with draws_of(base, i):
            models.append(fit(Subset(dataset, part)))
    return models


def seed_of_all() -> int:
    """A number from torch's global generator, for `draws_of` of each shard."""
    return int(torch.randint(2**62, ()))


@contextmanager
def draws_of(base: int, shard: int) -> Iterator[None]:
    """Draw from generators of the shard's own inside: torch's, Python's and NumPy's global ones.

    How much a shard draws depends on its rows. On one stream the weights and masks of all later shards
    would move with it, so that one record changed many models.
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    digest = hashlib.blake2b(f"{base} {shard}".encode(), digest_size=16).digest()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            random.seed(digest)
            np.random.seed(np.frombuffer(digest, np.uint32))  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def _content(item: Any) -> bytes:
    """The bytes of an item, with its form."""
    if isinstance(item, (tuple, list)):
        parts = [_content(each) for each in item]
        return b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    if isinstance(item, dict):
        return _content([part for key in sorted(item) for part in (key, item[key])])
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu().numpy()
    if isinstance(item, np.ndarray) and item.dtype != object:
        return f"{item.dtype.str} {item.shape} ".encode() + np.ascontiguousarray(item).tobytes()
    if isinstance(item, (str, int, float, bool, bytes, np.generic)):
        return repr(item).encode()
    raise ConfigurationError(
        f"an example holds a {type(item).__name__}, of which no shard can be told. Give users, such as "
        "the number of each example in a list that never changes."
    )
