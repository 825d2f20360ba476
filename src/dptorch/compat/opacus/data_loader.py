"""`DPDataLoader`: Poisson batches, of a run or on their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from dptorch.compat.arguments import known_arguments
from dptorch.compat.opacus.scheduled_run import ScheduledRun
from dptorch.compat.opacus.utils.uniform_sampler import UniformWithReplacementSampler
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import ConfigurationError
from dptorch.sampling import NOT_COVERED, PrivateLoader, dataset_size

__all__ = ["DPDataLoader", "order_of", "private_loader"]

_KEPT = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


class DPDataLoader:
    """Iterates one epoch of batches, in each of which every example is with the same probability.

    `PrivacyEngine.make_private` returns one that belongs to its run: its batches are counted as drawn
    by the plan. One that was made by hand is not private by itself; give it to ``make_private``.

    An empty batch arrives as one row of zeros, which the engine gives no weight.

    Args:
        dataset: any map-style dataset.
        sample_rate: probability of drawing an example.
        collate_fn, dataloader_kwargs: as in `torch.utils.data.DataLoader`.
        generator: its seed makes the batches those of that seed: for tests, not private.
        drop_last: has no meaning for Poisson batches.
        distributed: not here, see Raises.
        batch_first, rand_on_empty: accepted; empty batches need no telling how to look.

    Raises:
        ConfigurationError: ``distributed=True``.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.randn(100, 3))
        >>> loader = DPDataLoader(data, sample_rate=0.25)
        >>> len(loader), sum(1 for batch in loader)
        (4, 4)
    """

    @known_arguments
    def __init__(
        self,
        dataset: Any,
        *,
        sample_rate: float,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        distributed: bool = False,
        batch_first: bool = True,
        rand_on_empty: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
    ) -> None:
        if distributed:
            raise ConfigurationError(
                "distributed=True: the clipped sums of all processes have to be added up before noise "
                "is, and that is not built yet. Train in one process, with distributed=False."
            )
        self.dataset = dataset
        self.sample_rate = sample_rate
        self.batch_sampler = UniformWithReplacementSampler(
            num_samples=dataset_size(dataset), sample_rate=sample_rate, generator=generator
        )
        self.collate_fn = collate_fn
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.timeout = timeout
        self.worker_init_fn = worker_init_fn
        self.multiprocessing_context = multiprocessing_context
        self.prefetch_factor = prefetch_factor
        self.persistent_workers = persistent_workers
        self.max_physical_batch_size: int | None = None
        self._run: ScheduledRun | None = None
        self._open: tuple[PrivacyEngine | None, PrivateLoader] | None = None

    @classmethod
    @known_arguments
    def from_data_loader(
        cls,
        data_loader: DataLoader[Any],
        *,
        generator: torch.Generator | None = None,
        distributed: bool = False,
        batch_first: bool = True,
        rand_on_empty: bool = False,
    ) -> DPDataLoader:
        """One over the dataset of `data_loader`, with as many batches an epoch, and its workers.

        Raises:
            ConfigurationError: for an IterableDataset, or ``distributed=True``.
        """
        dataset_size(data_loader.dataset)
        sampler = data_loader.batch_sampler
        known = isinstance(sampler, UniformWithReplacementSampler)
        return cls(
            data_loader.dataset,
            sample_rate=sampler.sample_rate if known else 1 / len(data_loader),  # type: ignore[union-attr]
            collate_fn=data_loader.collate_fn,
            generator=generator,
            distributed=distributed,
            **{name: getattr(data_loader, name) for name in _KEPT},
        )

    def of_run(self, run: ScheduledRun) -> DPDataLoader:
        """The same loader, whose batches the engine of `run` draws."""
        mine = copy(self)
        mine._run, mine._open = run, None
        return mine

    def in_parts(self, max_physical_batch_size: int) -> DPDataLoader:
        """The same loader, with batches in parts of at most `max_physical_batch_size` examples."""
        mine = copy(self)
        mine.max_physical_batch_size, mine._open = max_physical_batch_size, None
        return mine

    def __len__(self) -> int:
        """Batches of an epoch; if they come in parts, about how many parts."""
        steps = len(self.batch_sampler)
        if self.max_physical_batch_size is None:
            return steps
        expected = self.sample_rate * self.batch_sampler.num_samples
        return math.ceil(steps * max(1.0, expected / self.max_physical_batch_size))

    def __iter__(self) -> Iterator[Any]:
        run = self._run
        if run is None:
            yield from self._loader(None)
            return
        left = len(self.batch_sampler)
        left -= run.steps_done % left
        while left and not run.engine.exhausted:
            engine = run.engine
            run.loader = loader = self._loader(engine)
            for batch in loader:
                at = loader.current
                left -= at is None or at.is_last
                yield batch
                # An engine counts epochs from its own first step, which may be in the middle of one.
                inside = at is None or (at.logical_step + 1) % loader.steps_per_epoch
                if run.engine is not engine or (not left and inside):
                    break

    def _loader(self, engine: PrivacyEngine | None) -> PrivateLoader:
        if self._open is None or self._open[0] is not engine:
            kwargs = {name: getattr(self, name) for name in _KEPT}
            kwargs["collate_fn"] = self.collate_fn
            kwargs["max_physical_batch_size"] = self.max_physical_batch_size
            if engine is not None:
                loader = engine.loader(self.dataset, **kwargs)
            else:
                sampler = self.batch_sampler
                loader = PrivateLoader(
                    self.dataset, sampler.poisson, steps_per_epoch=len(sampler), **kwargs
                )
            self._open = engine, loader
        return self._open[1]


def private_loader(data_loader: DataLoader[Any] | DPDataLoader) -> DPDataLoader:
    """The Poisson loader in the place of the user's."""
    if isinstance(data_loader, DPDataLoader):
        return data_loader
    sampler = data_loader.batch_sampler
    if not isinstance(sampler, UniformWithReplacementSampler):
        if type(sampler) is not BatchSampler:
            name = "no batches" if sampler is None else type(sampler).__name__
            raise ConfigurationError(
                f"the loader has {name}, so the number of examples in a batch is not known. Pass a "
                f"DataLoader with batch_size=. {NOT_COVERED}"
            )
        order_of(data_loader)
    return DPDataLoader.from_data_loader(data_loader)


def order_of(data_loader: DataLoader[Any] | DPDataLoader) -> str:
    """Name of the scheme that goes through the data as `data_loader` does."""
    if isinstance(data_loader, DPDataLoader):
        return "poisson"
    sampler = data_loader.sampler
    if isinstance(data_loader.batch_sampler, UniformWithReplacementSampler):
        return "poisson"
    if type(sampler) not in (RandomSampler, SequentialSampler):
        raise ConfigurationError(
            f"the loader draws with {type(sampler).__name__}, which the private loader would "
            "replace. Apply a subset to the dataset itself (torch.utils.data.Subset), and weights to "
            f"the loss. {NOT_COVERED}"
        )
    return "shuffled" if type(sampler) is RandomSampler else "sequential"
