"""`make_private`: an existing model, optimizer and DataLoader, made private in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from typing_extensions import Unpack

from dptorch.accounting import Adjacency
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.engine.settings import EngineSettings
from dptorch.errors import ConfigurationError
from dptorch.sampling import NOT_COVERED, PrivateLoader, dataset_size

__all__ = ["Private", "make_private"]


class Private(NamedTuple):
    """What `make_private` returns."""

    model: nn.Module
    optimizer: Optimizer
    loader: PrivateLoader
    engine: PrivacyEngine


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[Any],
    *,
    max_physical_batch_size: int | None = None,
    **settings: Unpack[EngineSettings],
) -> Private:
    """Make an existing model, optimizer and DataLoader private in one call.

    The loader is replaced by one that draws batches of the same dataset as the plan's `sampling` says
    (by default Poisson sampling), with the same mean size, collate function and workers. Model and
    optimizer are the same objects.

    Args:
        model, optimizer: as for `PrivacyEngine` and its `attach`.
        loader: a DataLoader with a batch size over a map-style dataset.
        max_physical_batch_size: see `PrivacyEngine.loader`.
        settings: the keyword arguments of `PrivacyEngine`. Batch size and number of records come from
            the loader; under add/remove adjacency, which protects the number of records, give
            sample_rate.

    Returns:
        (model, optimizer, loader, engine).

    Raises:
        ConfigurationError: for arguments that cannot be honoured.

    Example:
        >>> import torch, dptorch
        >>> model = torch.nn.Linear(4, 2)
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
        >>> model, optimizer, loader, engine = dptorch.make_private(
        ...     model, torch.optim.Adam(model.parameters()),
        ...     torch.utils.data.DataLoader(data, batch_size=8),
        ...     epochs=2, target_epsilon=3.0, target_delta=1e-3)
        >>> engine.plan.steps, len(loader)
        (16, 8)
    """
    if loader.batch_size is None:
        raise ConfigurationError(
            "the loader has no batch size (batch_size=None, or a batch_sampler of its own), so the "
            "expected batch size is not known. Pass a DataLoader with batch_size=, or use "
            "PrivacyEngine and its loader()."
        )
    size = dataset_size(loader.dataset)
    if type(loader.sampler) not in (RandomSampler, SequentialSampler):
        raise ConfigurationError(
            f"the loader draws with {type(loader.sampler).__name__}, which the plan's sampling would "
            "replace. Apply a subset to the dataset itself (torch.utils.data.Subset), and weights "
            f"to the loss. {NOT_COVERED}"
        )
    if settings.get("unit") == "user":
        raise ConfigurationError(
            "unit='user': a DataLoader's batch size counts examples, not users. Make a PrivacyEngine "
            "with a batch_size in users, and engine.loader(dataset, user_ids=...)."
        )
    if settings.get("plan") is None:
        adjacency = settings.get("adjacency")
        if adjacency is not None and Adjacency.of(adjacency) is Adjacency.ADD_REMOVE:
            if settings.get("sample_rate") is None:
                raise ConfigurationError(
                    "adjacency='add-remove' protects the number of records, so the sampling rate may "
                    "not be computed from it. Give sample_rate, from what is public, or use "
                    "adjacency='zero-out': the same epsilon, and the number is public."
                )
            settings.setdefault("batch_size", loader.batch_size)
        else:
            settings.setdefault("batch_size", min(loader.batch_size, size))
            settings.setdefault("sample_size", size)
    engine = PrivacyEngine(model, **settings)
    try:
        engine.attach(optimizer)
        private = engine.loader(
            loader.dataset,
            max_physical_batch_size=max_physical_batch_size,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            persistent_workers=loader.persistent_workers,
        )
    except BaseException:
        engine.detach()
        raise
    return Private(model, optimizer, private, engine)
