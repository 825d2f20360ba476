"""The loader of a plan: batches of a data set, drawn as the plan says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dptorch.accounting import Adjacency
from dptorch.distributed import Ranks
from dptorch.distributed.agreement import (
    digest_of_examples,
    digest_of_parameters,
    digest_of_values,
    places_of_key,
)
from dptorch.engine.secret_draws import seed_workers_in_secret
from dptorch.errors import ConfigurationError
from dptorch.plan import PrivacyPlan
from dptorch.randomness import RootKey
from dptorch.sampling import NOT_COVERED, PrivateLoader, Sampler, Users, UserSampler, dataset_size

__all__ = ["agree_on_data", "loader_of"]


def loader_of(
    plan: PrivacyPlan,
    key: RootKey,
    dataset: Any,
    *,
    user_ids: Any,
    ranks: Ranks,
    even: bool,
    start_step: Callable[[], int],
    max_physical_batch_size: int | None,
    dataloader_kwargs: dict[str, Any],
) -> PrivateLoader:
    """See `PrivacyEngine.loader`; `start_step` says where in the plan an iteration begins, and `even`
    whether all ranks get equally many rows."""
    if dataloader_kwargs.get("sampler") is not None:
        name = type(dataloader_kwargs["sampler"]).__name__
        raise ConfigurationError(
            f"sampler={name}: the plan says how batches are drawn "
            f"(sampling={plan.sampling!r}). {NOT_COVERED}"
        )
    for name, mine in (("rank", ranks.rank), ("world_size", ranks.size)):
        if (asked := dataloader_kwargs.pop(name, None)) not in (None, mine):
            raise ConfigurationError(
                f"{name}={asked!r}, but the engine adds up sums over {ranks.size} processes, of which "
                f"this is number {ranks.rank}. Leave it out: the engine's loader gives each process "
                "its share. For several processes, initialise torch.distributed before the engine."
            )
    size = dataset_size(dataset)
    users = None
    if (user_ids is not None) != (plan.unit == "user"):
        raise ConfigurationError(
            "unit='user' needs user_ids: the user ID of each example, as a list or a column name."
            if user_ids is None
            else f"user_ids is given, but the plan's unit is {plan.unit!r}. Make the engine with "
            "unit='user' and max_examples_per_user."
        )
    if user_ids is not None:
        users = Users.of(dataset, user_ids)
        size = len(users)
    public_size = plan.adjacency is not Adjacency.ADD_REMOVE
    if public_size and plan.sample_size is not None and size != plan.sample_size:
        raise ConfigurationError(
            f"the dataset has {size} records, but the plan was made for "
            f"sample_size={plan.sample_size}. Make the engine with sample_size={size}."
        )
    terms = plan.terms
    sampler: Sampler = plan.scheme.sampler(terms, size, key)
    capacity = terms.capacity
    if users is not None and plan.max_examples_per_user is not None:
        sampler = UserSampler(sampler, users, plan.max_examples_per_user, key)
        capacity = capacity and capacity * plan.max_examples_per_user
    if key.source.is_private:
        seed_workers_in_secret(dataloader_kwargs)
    return PrivateLoader(
        dataset,
        sampler,
        steps_per_epoch=terms.steps_per_epoch,
        start_step=start_step,
        total_steps=plan.steps,
        max_physical_batch_size=max_physical_batch_size,
        capacity=capacity,
        rank=ranks.rank,
        world_size=ranks.size,
        even=even,
        **dataloader_kwargs,
    )


def agree_on_data(
    ranks: Ranks,
    parameters: Mapping[str, Tensor],
    key: RootKey,
    dataset: Any,
    *,
    user_ids: Any,
    steps_done: int,
    max_physical_batch_size: int | None,
) -> None:
    """Check that all ranks draw from the same data set, in the same order, from the same step on.

    Raises:
        ConfigurationError: on every rank, naming what differs.
    """
    if ranks.size == 1:
        return
    with ranks.together():
        size = dataset_size(dataset)
        places = places_of_key(key, steps_done, size)
        values = {
            "steps done": str(steps_done),
            "max_physical_batch_size": str(max_physical_batch_size),
            "the number of examples": str(size),
            "the examples of the data set": digest_of_examples(dataset, places),
            "user_ids": digest_of_values(user_ids),
            "the values of the model's parameters": digest_of_parameters(parameters),
        }
    ranks.agree(values)
