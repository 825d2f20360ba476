"""Seed what the loop draws in secret: the place of a draw tells of the other records.

Dropout masks and augmentations come from the generators of torch, Python and NumPy, one row after the
other. A record more or less moves all later rows, and so does one that is longer than the others of
its batch, has more rows (of a user), or draws more numbers when it is augmented: whoever knows the
seed sees other masks for everybody. With a secret seed nobody can tell a row's place by its mask.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from dptorch.distributed import Ranks
from dptorch.errors import PrivacyError
from dptorch.randomness import RootKey

__all__ = ["SecretDraws", "seed_workers_in_secret"]


#: The seeds that engines of this process gave: one's batch may be handed out before another's step.
_SECRET: set[int] = set()

_KNOWN = (
    "torch was seeded with {} after the batch was handed out, and numbers were drawn before the step. "
    "A known seed gives each row a mask by its place, which tells of the records before it. The step "
    "was neither taken nor counted. Call torch.manual_seed before the loop; draw what is not for the "
    "training from a torch.Generator of your own."
)


def seed_workers_in_secret(dataloader_kwargs: dict[str, Any]) -> None:
    """Let no known seed reach the worker processes of a loader, in place.

    A `generator` would give the seed that workers begin with, and draws no batch here; a
    `worker_init_fn` runs, and what it seeded is seeded anew.

    Guarantees:
        The draws of workers come from a secret seed, unless the data set seeds them itself.
        Held by `test_a_known_seed_does_not_reach_the_workers_of_a_private_run`.
    """
    dataloader_kwargs["generator"] = None
    given = dataloader_kwargs.get("worker_init_fn")
    if given is not None:
        dataloader_kwargs["worker_init_fn"] = partial(_begin_worker, given)


def _begin_worker(given: Callable[[int], object], worker: int) -> None:
    secret = torch.initial_seed()  # of this worker, as DataLoader drew it
    given(worker)
    torch.manual_seed(secret)
    random.seed(secret)
    np.random.seed([secret & 0xFFFFFFFF, secret >> 32])  # noqa: NPY002


class SecretDraws:
    """Keeps the seed of the global generators secret while batches are handed out.

    They are seeded from the run's key when they have another seed than the last that was given here:
    at first, and whenever the program has called ``torch.manual_seed``. A run whose own key comes from
    a seed protects nobody, and is left as it is.

    Guarantees:
        No known seed decides the masks of a private run.
        Held by `test_a_known_seed_does_not_decide_the_masks_of_a_private_run` and, for seeds that are
        set between the batch and its step, `test_a_seed_set_after_the_batch_is_refused`. Seeds of
        single devices, and generators that the program makes, are not looked at.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._seed: int | None = None

    def begin_batch(self, key: RootKey, step: int) -> None:
        """Seed anew, unless it is done; `step` is due next."""
        if not key.source.is_private or torch.initial_seed() == self._seed:
            return
        secret = key.derive("draws", step, self._ranks.rank)
        self._seed = int.from_bytes(secret[:7], "big")
        _SECRET.add(self._seed)
        torch.manual_seed(self._seed)
        random.seed(secret)
        np.random.seed(np.frombuffer(secret[:16], np.uint32))  # noqa: NPY002

    def refuse_known(self) -> None:
        """Refuse draws since the last batch that came from another seed than the secret one.

        Raises:
            PrivacyError: such draws were made. Seeding alone reveals nothing, and passes.
        """
        seed = torch.initial_seed()
        if self._seed is None or seed in _SECRET:
            return
        untouched = torch.Generator().manual_seed(seed).get_state()
        if not torch.equal(torch.get_rng_state(), untouched):
            raise PrivacyError(_KNOWN.format(seed))

    def values(self) -> dict[str, Any]:
        """Return what was seeded, as plain values for `restore`."""
        return {"draws": self._seed}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on with the generators' states of a checkpoint."""
        self._seed = values.get("draws")
        if self._seed is not None:
            _SECRET.add(self._seed)
