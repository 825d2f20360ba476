"""The loader of a plan: batches of a data set, drawn as the plan says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dptorch.accounting import Adjacency
from dptorch.errors import ConfigurationError
from dptorch.plan import PrivacyPlan
from dptorch.randomness import RootKey
from dptorch.sampling import NOT_COVERED, PrivateLoader, Sampler, Users, UserSampler, dataset_size

__all__ = ["loader_of"]


def loader_of(
    plan: PrivacyPlan,
    key: RootKey,
    dataset: Any,
    *,
    user_ids: Any,
    start_step: Callable[[], int],
    max_physical_batch_size: int | None,
    dataloader_kwargs: dict[str, Any],
) -> PrivateLoader:
    """See `PrivacyEngine.loader`; `start_step` says where in the plan an iteration begins."""
    if dataloader_kwargs.get("sampler") is not None:
        name = type(dataloader_kwargs["sampler"]).__name__
        raise ConfigurationError(
            f"sampler={name}: the plan says how batches are drawn "
            f"(sampling={plan.sampling!r}). {NOT_COVERED}"
        )
    if dataloader_kwargs.get("world_size", 1) not in (None, 1):
        raise ConfigurationError(
            f"world_size={dataloader_kwargs['world_size']!r}: the clipped sums of all processes "
            "have to be added up before noise is, once, and that is not built yet. Each process "
            "would take a step of its own on its share. Train in one process; "
            "max_physical_batch_size makes large batches fit."
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
    return PrivateLoader(
        dataset,
        sampler,
        steps_per_epoch=terms.steps_per_epoch,
        start_step=start_step,
        total_steps=plan.steps,
        max_physical_batch_size=max_physical_batch_size,
        capacity=capacity,
        **dataloader_kwargs,
    )
