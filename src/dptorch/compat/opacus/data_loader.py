"""`DPDataLoader`: Poisson batches, for a run or without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from dptorch.compat.arguments import known_arguments
from dptorch.compat.opacus.scheduled_run import ScheduledRun
from dptorch.compat.opacus.utils.uniform_sampler import UniformWithReplacementSampler
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import ConfigurationError, warn
from dptorch.sampling import NOT_COVERED, PrivateLoader, dataset_size
from dptorch.sampling.epochs import ShuffledSampler

__all__ = ["DPDataLoader", "order_of", "private_loader", "switch_generator"]

_KEPT = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


class DPDataLoader(DataLoader[Any]):
    """Iterates one epoch of batches, in each of which every example is with the same probability.

    `PrivacyEngine.make_private` returns one that belongs to its run: its batches are counted as drawn
    by the plan. One that was made by hand is not private by itself; give it to ``make_private``.

    An empty batch arrives as one row of zeros, which the engine gives no weight.

    Args:
        dataset: any map-style dataset.
        sample_rate: probability of drawing an example.
        collate_fn, dataloader_kwargs: as in `torch.utils.data.DataLoader`.
        generator: gives the seed of the batches, at the first of them: for tests, not private.
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
                "distributed=True: this loader draws for one process. Train in one, with "
                "distributed=False, or on several with dptorch.PrivacyEngine, whose loader gives each "
                "process its share: see docs/scale.md."
            )
        self.sample_rate = sample_rate
        super().__init__(
            dataset,
            batch_sampler=UniformWithReplacementSampler(
                num_samples=dataset_size(dataset), sample_rate=sample_rate, generator=generator
            ),
            collate_fn=collate_fn,
            generator=generator,
            num_workers=num_workers,
            pin_memory=pin_memory,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
        )
        self.max_physical_batch_size: int | None = None
        self._order: _UsersOrder | None = None
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

        A generator of `data_loader` is used where none is given.

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
            generator=data_loader.generator if generator is None else generator,
            distributed=distributed,
            **{name: getattr(data_loader, name) for name in _KEPT},
        )

    @property
    def _sampler(self) -> UniformWithReplacementSampler:
        sampler: Any = self.batch_sampler
        assert isinstance(sampler, UniformWithReplacementSampler)
        return sampler

    @property
    def steps_per_epoch(self) -> int:
        """Logical batches of an epoch."""
        return len(self._sampler)

    def of_run(self, run: ScheduledRun) -> DPDataLoader:
        """Return the same loader, whose batches the engine of `run` draws."""
        mine = copy(self)
        mine._run, mine._open = run, None
        return mine

    def in_parts(self, max_physical_batch_size: int) -> DPDataLoader:
        """The same loader, with batches in parts of at most `max_physical_batch_size` examples."""
        mine = copy(self)
        mine.max_physical_batch_size, mine._open = max_physical_batch_size, None
        return mine

    def __len__(self) -> int:
        """Batches of an epoch. In parts, those of the next iteration, which depend on the draws."""
        steps = len(self._sampler)
        if self.max_physical_batch_size is None:
            return steps
        if self._run is None:
            return len(self._loader(None))
        engine = self._run.engine
        first = engine.steps_done
        last = min(first + steps - self._run.steps_done % steps, engine.plan.steps)
        return self._loader(engine).count_parts(range(first, last))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        run = self._run
        if run is None:
            yield from self._loader(None)
            return
        left = len(self._sampler)
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
                if self._order is not None and isinstance(loader.sampler, ShuffledSampler):
                    before = self._run.steps_done - engine.steps_done if self._run else 0
                    done = before // loader.steps_per_epoch
                    loader.sampler.follow(self._order.from_epoch(done))
            else:
                sampler = self._sampler
                loader = PrivateLoader(
                    self.dataset, sampler.poisson, steps_per_epoch=len(sampler), **kwargs
                )
            self._open = engine, loader
        return self._open[1]


@known_arguments
def switch_generator(
    *, data_loader: DataLoader[Any], generator: torch.Generator
) -> DataLoader[Any]:
    """Return a loader of the same batches, in the order that `generator` gives: for tests, not private.

    Raises:
        ConfigurationError: the loader does not draw at random.
    """
    batches = data_loader.batch_sampler
    drawn: Any = (
        batches if isinstance(batches, UniformWithReplacementSampler) else data_loader.sampler
    )
    if not hasattr(drawn, "generator"):
        raise ConfigurationError(
            f"the loader draws with {type(drawn).__name__}, which has no generator. Use shuffle=True."
        )
    drawn = copy(drawn)
    drawn.generator = generator
    if isinstance(data_loader, DPDataLoader):
        return DPDataLoader.from_data_loader(data_loader, generator=generator)
    if not isinstance(drawn, UniformWithReplacementSampler):
        assert isinstance(batches, BatchSampler)
        drawn = BatchSampler(drawn, batches.batch_size, batches.drop_last)
    return DataLoader(
        data_loader.dataset,
        batch_sampler=drawn,
        collate_fn=data_loader.collate_fn,
        generator=generator,
        **{name: getattr(data_loader, name) for name in _KEPT},
    )


class _UsersOrder:
    """The orders in which ``DataLoader(shuffle=True, generator=...)`` would go through its data."""

    def __init__(self, data_loader: DataLoader[Any]) -> None:
        sampler = data_loader.sampler
        assert isinstance(sampler, RandomSampler)
        self._size = dataset_size(data_loader.dataset)
        self._shared = data_loader.generator is sampler.generator
        self._begin = sampler.generator.clone_state()
        self._next = 0
        self._generator = self._begin.clone_state()

    def from_epoch(self, first: int) -> Callable[[int], NDArray[np.int64]]:
        """Return the same orders, counted from epoch `first`."""
        return lambda epoch: self(epoch + first)

    def __call__(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of an epoch, int64 [N]."""
        if epoch < self._next:
            self._next, self._generator = 0, self._begin.clone_state()
        while self._next <= epoch:
            if self._shared:  # a DataLoader draws a seed for its workers first
                torch.empty((), dtype=torch.int64).random_(generator=self._generator)
            order = torch.randperm(self._size, generator=self._generator)
            torch.randperm(self._size, generator=self._generator)  # RandomSampler's empty remainder
            self._next += 1
        found: NDArray[np.int64] = order.numpy()
        return found


def private_loader(
    data_loader: DataLoader[Any] | DPDataLoader, *, poisson: bool = True
) -> DPDataLoader:
    """Return the private loader in the place of the user's.

    Args:
        data_loader: the user's.
        poisson: whether batches are drawn anew; else they come in the user's own order.
    """
    if isinstance(data_loader, DPDataLoader):
        return data_loader
    sampler = data_loader.batch_sampler
    order = None
    if not isinstance(sampler, UniformWithReplacementSampler):
        if type(sampler) is not BatchSampler:
            name = "no batches" if sampler is None else type(sampler).__name__
            raise ConfigurationError(
                f"the loader has {name}, so the number of examples in a batch is not known. Pass a "
                f"DataLoader with batch_size=. {NOT_COVERED}."
            )
        order_of(data_loader)
        if getattr(data_loader.sampler, "generator", None) is not None:
            if not poisson:
                order = _UsersOrder(data_loader)
            else:
                warn(
                    "the loader's generator is not used: Poisson batches are drawn from a secret key, "
                    "because epsilon assumes that nobody can know them. Pass noise_generator= for a "
                    "run that can be repeated in tests."
                )
    loader = DPDataLoader.from_data_loader(data_loader)
    loader._order = order
    return loader


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
            f"the loss. {NOT_COVERED}."
        )
    if type(sampler) is RandomSampler and (
        sampler.replacement or sampler.num_samples != dataset_size(data_loader.dataset)
    ):
        raise ConfigurationError(
            f"the loader draws {sampler.num_samples} examples with replacement={sampler.replacement}, "
            "which the private loader would replace. Use shuffle=True, and steps or epochs for the "
            f"length of the run. {NOT_COVERED}."
        )
    return "shuffled" if type(sampler) is RandomSampler else "sequential"
