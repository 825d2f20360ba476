"""Data loading under sampling: logical batches as drawn, handed out in physical batches that fit.

A *logical batch* is what the sampler draws for one step and what the guarantee is about. A
*physical batch* is the part of it that goes through the model at once. The split is a matter of
memory only.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from dptorch.errors import ConfigurationError, DataError, PrivacyError
from dptorch.sampling.padding import zeros_like_batch
from dptorch.sampling.parts import PaddedDataset, PhysicalBatch, PhysicalPlan
from dptorch.sampling.sampler import Sampler

__all__ = ["PrivateLoader", "dataset_size"]

_CONTRADICTS: Final = {
    "batch_size": "the size of a sampled batch is random and its mean belongs to the plan; to "
    "bound memory pass max_physical_batch_size",
    "shuffle": "the sampler decides which examples enter a batch, and the stated epsilon depends "
    "on it",
    "batch_sampler": "pass the sampling scheme as `sampler`, so that the accountant knows it",
    "drop_last": "dropping part of a drawn batch changes the sampling that the stated epsilon is "
    "for",
}

_TRIED: Final = 13  # examples that are collated twice where batches are padded
_EVERY: Final = 3  # of them is collated alone


class PrivateLoader:
    """Iterates one epoch of sampled batches; each item is an ordinary collated batch.

    One iteration runs from `start_step()` to the end of the epoch that step is in (the next
    multiple of `steps_per_epoch`, or `total_steps`), so a loop that was interrupted, by a `break`
    or by the end of the process, continues in the epoch it was in. Every logical batch is split
    into parts of at most `max_physical_batch_size`. When a part is handed to the loop, not when a
    worker prefetches it, `current` says where it belongs and the listeners of `on_batch` are called
    with the same value.

    An empty logical batch is a step like any other. It arrives as one example of zeros with the
    structure of a real batch, `examples=0` and `padding=1`: skipping it would skip noise that the
    accounting counts on, and would tell that the batch was empty; a batch of size 0 crashes models,
    which tells it too. Whoever sums gradients gives padding the weight zero.

    Args:
        dataset: any map-style dataset (`__len__` and `__getitem__`).
        sampler: the sampling scheme; its `sample_size` must be `len(dataset)`.
        steps_per_epoch: logical batches of one epoch.
        start_step: called at the start of each iteration (and by `len`) for the step to begin with.
            Or the first step of all: then the loader counts for itself, and begins each iteration
            with the first step that was not yet handed out completely.
        total_steps: logical batches of the whole run; None for no end.
        max_physical_batch_size: most examples at once; None hands out each logical batch whole.
        capacity: pad every logical batch with examples of zeros to this many, so that all steps come
            in equally many parts of equal shape; no draw may exceed it.
        rank, world_size: this process's share of each logical batch: every `world_size`-th example
            of the draw, beginning with the `rank`-th. All processes need the same key.
        even: give all processes equally many rows, with at most one example of zeros more in a part:
            for models whose forward and backward passes exchange messages, of which each process
            must send the same ones.
        collate_fn, num_workers, pin_memory, dataloader_kwargs: as in `torch.utils.data.DataLoader`.

    Guarantees:
        - The parts of logical step t together hold exactly the examples of `sampler.draw(t)`, each
          once, in that order, whatever the physical batch size and the number of workers.
        - `current` always describes the batch handed out last, in spite of prefetching.
        - Every step from the first to the last of the epoch arrives, empty ones included.
        - The shares of all ranks are disjoint and together the draw, and arrive in equally many
          parts on each; a rank that has no example for a part gets padding. With `even` a part
          has equally many rows on all.
        - The sampler and its key stay in this process; workers see indices only.
        Held by `test_parts_together_are_the_draw`,
        `test_current_is_set_when_handed_out_not_when_prefetched`,
        `test_empty_batches_arrive_in_their_place` and `test_ranks_share_each_batch`.

    Raises:
        ConfigurationError: an argument contradicts sampling or has an impossible value. With a
            `capacity` or `even`, at the first iteration: `collate_fn` puts examples into an order of
            its own.
        DataError: the dataset is empty.
        PrivacyError: the dataset is not of the size that the sampler samples from.

    Example:
        >>> from dptorch.randomness import RootKey
        >>> from dptorch.sampling.poisson import PoissonSampler
        >>> data = torch.arange(20.0)
        >>> sampler = PoissonSampler(20, 0.5, RootKey.from_seed(0))
        >>> loader = PrivateLoader(data, sampler, steps_per_epoch=2, max_physical_batch_size=8)
        >>> for batch in loader:
        ...     at = loader.current
        ...     assert batch.shape == (at.examples + at.padding,)
        ...     print(at.logical_step, at.index, at.count, at.is_last)
        0 0 1 True
        1 0 2 False
        1 1 2 True
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Sampler,
        *,
        steps_per_epoch: int,
        start_step: Callable[[], int] | int = 0,
        total_steps: int | None = None,
        max_physical_batch_size: int | None = None,
        capacity: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        even: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        **dataloader_kwargs: Any,
    ) -> None:
        for name, reason in _CONTRADICTS.items():
            value = dataloader_kwargs.pop(name, None)
            if value is not None and value is not False:
                raise ConfigurationError(f"{name}={value!r} contradicts private sampling: {reason}")
        if dataloader_kwargs.get("in_order", True) is not True:
            raise ConfigurationError(
                "in_order=False would mix the parts of different logical batches. Leave it out."
            )
        self.steps_per_epoch = _positive("steps_per_epoch", steps_per_epoch)
        self.total_steps = None if total_steps is None else _positive("total_steps", total_steps)
        self.max_physical_batch_size = (
            None
            if max_physical_batch_size is None
            else _positive("max_physical_batch_size", max_physical_batch_size)
        )
        self.capacity = None if capacity is None else _positive("capacity", capacity)
        self.world_size = _positive("world_size", world_size)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < world_size:
            raise ConfigurationError(
                f"rank={rank!r} must be a process number in [0, world_size={world_size})."
            )
        self.rank = rank
        self.dataset = dataset
        self.sampler = sampler
        self.collate_fn = default_collate if collate_fn is None else collate_fn
        if not isinstance(sampler, Sampler):
            raise ConfigurationError(
                f"sampler={type(sampler).__name__} is no private sampling scheme (it has no "
                "`draw(step)`), so no accountant covers it. Use dptorch.sampling.PoissonSampler, or a "
                "loader of your own: its steps are accounted without amplification."
            )
        self._check_dataset()
        self._start_step = start_step
        self._counted = 0
        self._own_generator: torch.Generator | None = None
        if dataloader_kwargs.get("generator") is None:
            # DataLoader draws the workers' seed at each iteration. Taken from the global generator,
            # that would shift the dropout masks of a resumed run against those of an uninterrupted
            # one.
            dataloader_kwargs["generator"] = self._own_generator = torch.Generator()
        self._plan = PhysicalPlan(
            sampler,
            self.max_physical_batch_size,
            self.capacity,
            rank,
            self.world_size,
            even and self.world_size > 1,
        )
        self._loader: DataLoader[Any] = DataLoader(
            PaddedDataset(dataset) if self._plan.pads else dataset,
            batch_sampler=self._plan,
            collate_fn=self.collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
            **dataloader_kwargs,
        )
        self._parts_of = range(0), 0  # the last answer of `count_parts`
        self._current: PhysicalBatch | None = None
        # Weak, because the end of a loop left early is noticed when its iterator is freed.
        self._active: weakref.ref[_Iteration] | None = None
        self._padding: Any = None
        self._alone: list[Any] = []
        self._has_padding = False
        self._batch_listeners: list[Callable[[PhysicalBatch], object]] = []
        self._item_listeners: list[Callable[[PhysicalBatch, Any], Any]] = []
        self._start_listeners: list[Callable[[int], object]] = []
        self._end_listeners: list[Callable[[bool], object]] = []

    @property
    def alone(self) -> list[Any]:
        """The first example and a few others, where a collate_fn makes batches, each collated without
        others and its numbers replaced by zeros; none before an iteration."""
        return self._alone

    @property
    def current(self) -> PhysicalBatch | None:
        """Where the batch handed out last belongs; None outside an iteration."""
        return self._current

    def on_batch(self, listener: Callable[[PhysicalBatch], object]) -> None:
        """Call `listener(current)` just before each physical batch is handed to the loop."""
        self._batch_listeners.append(listener)

    def on_items(self, listener: Callable[[PhysicalBatch, Any], Any]) -> None:
        """Call `listener(current, items)` just before `items` is handed to the loop as that batch."""
        self._item_listeners.append(listener)

    def on_start(self, listener: Callable[[int], object]) -> None:
        """Call `listener(first_step)` when an iteration starts, before anything is loaded."""
        self._start_listeners.append(listener)

    def on_end(self, listener: Callable[[bool], object]) -> None:
        """Call `listener(complete)` when an iteration ends.

        `complete` is False if the loop was left early (a `break`, an exception, a new iteration, an
        error in the data). Then a logical batch may be half done, and whatever was summed for it
        must be dropped: the same step is drawn again, and an example summed twice would count
        double. A loop that was left is noticed when its iterator is freed: at once after a `break`,
        but after an exception only with its traceback. At the latest it is noticed when the next
        iteration starts, before the listeners of `on_start` are called.
        """
        self._end_listeners.append(listener)

    def __len__(self) -> int:
        """Return how many batches the next iteration hands out (0 when `total_steps` are done).

        With `max_physical_batch_size` these are the parts of its logical batches. Their number
        follows from the sizes drawn, so it is NOT PRIVATE, and another epoch has another.
        """
        return self.count_parts(range(*self._range()))

    @property
    def steps_left(self) -> int:
        """Logical steps that the next iteration will take."""
        first, last = self._range()
        return last - first

    def count_parts(self, steps: range) -> int:
        """Return in how many parts the logical batches of `steps` are handed out. Work: O(examples)."""
        if self.max_physical_batch_size is None:
            return len(steps)
        if self._parts_of[0] != steps:
            self._parts_of = steps, sum(self._plan.split(step)[2] for step in steps)
        return self._parts_of[1]

    def __iter__(self) -> Iterator[Any]:
        previous = self._active() if self._active is not None else None
        if previous is not None:
            previous.overtake()
        self._check_dataset()
        first, last = self._range()
        iteration = _Iteration(self, first, last)
        self._active = weakref.ref(iteration)
        for listener in self._start_listeners:
            listener(first)
        return iteration

    def _range(self) -> tuple[int, int]:
        """First step of the next iteration, and one past its last."""
        start = self._start_step
        first = start() if callable(start) else start
        if isinstance(first, bool) or not isinstance(first, int | np.integer) or first < 0:
            raise ConfigurationError(
                f"start_step={first!r} must be a step number, an integer >= 0."
            )
        first = int(first) if callable(start) else int(first) + self._counted
        last = (first // self.steps_per_epoch + 1) * self.steps_per_epoch
        if self.total_steps is not None:
            last = max(first, min(last, self.total_steps))
        return first, last

    def _check_dataset(self) -> None:
        size = dataset_size(self.dataset)
        if size != self.sampler.sample_size:
            raise PrivacyError(
                f"the dataset has {size} examples but the sampler draws from "
                f"{self.sampler.sample_size}. Make the sampler for this dataset, and do not change "
                "the dataset during a run."
            )

    def _load(self, steps: range) -> tuple[deque[PhysicalBatch], Iterator[Any]]:
        """Start loading `steps`: what the parts are, as far as read ahead, and the batches."""
        parts = self._plan.begin(steps)
        if self._own_generator is not None:
            # Apart by rank, or the workers of all ranks would augment alike.
            own = steps.start * self.world_size + self.rank
            self._own_generator.manual_seed((torch.initial_seed() + own) % 2**63)
        batches = iter(self._loader)
        if not self._has_padding:
            # Now and not at the first empty batch, because a dataset or collate_fn that fails on
            # one example alone would then tell when a batch was empty; and after the workers are
            # forked, because datasets open their files at the first access.
            self._padding = zeros_like_batch(self._collated([0]))
            self._alone = [self._padding]
            if self.collate_fn is not default_collate:
                size = dataset_size(self.dataset)
                tried = sorted({i * size // _TRIED for i in range(_TRIED)})
                for i in tried[_EVERY::_EVERY]:
                    with suppress(Exception):  # one that cannot be alone tells no size
                        self._alone.append(zeros_like_batch(self._collated([i])))
                if self._plan.pads:
                    from dptorch.sampling.row_order import refuse_own_order

                    self._collated(tried, refuse_own_order)
            self._has_padding = True
        return parts, batches

    def _collated(
        self,
        indices: list[int],
        ask: Callable[[Callable[[list[Any]], Any], list[Any]], Any] = lambda f, items: f(items),
    ) -> Any:
        """`ask(collate_fn, examples)`, without moving the global random states."""
        python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            with torch.random.fork_rng(devices=[]):
                fetch = getattr(self.dataset, "__getitems__", None)
                return ask(
                    self.collate_fn, fetch(indices) if fetch else [self.dataset[i] for i in indices]
                )
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002

    def _padding_batch(self) -> Any:
        # Anew each time, because the loop may write into the batch it gets.
        return zeros_like_batch(self._padding)

    def _hand_out(self, part: PhysicalBatch, items: Any) -> Any:
        self._current = part
        if part.is_last:
            self._counted += 1
        for listener in self._batch_listeners:
            listener(part)
        for follower in self._item_listeners:
            items = follower(part, items)
        return items

    def _ended(self, iteration: _Iteration, complete: bool) -> None:
        if self._active is not None and self._active() in (iteration, None):
            self._active = None
            self._current = None
        for listener in self._end_listeners:
            listener(complete)


def dataset_size(dataset: Any) -> int:
    """Number of examples of a data set that can be sampled.

    Raises:
        ConfigurationError: its examples cannot be reached by index, or it has no length.
        DataError: it is empty.
    """
    if isinstance(dataset, DataLoader):
        raise ConfigurationError(
            "engine.loader() takes the data set and draws the batches itself; this is a DataLoader, "
            "which has drawn them. Pass engine.loader(loader.dataset, collate_fn=loader.collate_fn), "
            "or use dptorch.make_private(model, optimizer, loader, ...)."
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise ConfigurationError(
            f"{type(dataset).__name__} cannot be sampled: each example must be reachable by "
            "its index. Use a map-style dataset (with __len__ and __getitem__), for "
            "example by writing the stream to memory-mapped files first."
        )
    try:
        size = len(dataset)
    except TypeError:
        raise ConfigurationError(
            f"{type(dataset).__name__} has no length, and the sampling rate refers to it. Give "
            "it a __len__."
        ) from None
    if size == 0:
        raise DataError(
            f"the dataset ({type(dataset).__name__}) is empty. A run needs at least one example."
        )
    return size


class _Iteration:
    """One pass over the steps [first, last): pairs what DataLoader loaded with what it is."""

    def __init__(self, loader: PrivateLoader, first: int, last: int) -> None:
        self._loader = loader
        self._steps = range(first, last)
        self._parts: deque[PhysicalBatch] = deque()
        self._batches: Iterator[Any] | None = None
        # A batch that was loaded while empty ones before it are still to be handed out.
        self._loaded: deque[Any] = deque()
        self._exhausted = False
        self._closed = False
        self._overtaken = False

    def __iter__(self) -> _Iteration:
        return self

    def __next__(self) -> Any:
        if self._closed:
            if self._overtaken:
                raise PrivacyError(
                    "this iteration was ended by a newer one over the same loader. One loop at a "
                    "time can own the logical batch. Finish or leave the first loop before "
                    "you start another."
                )
            raise StopIteration
        try:
            item = self._next()
            items = None if item is None else self._loader._hand_out(*item)
        except BaseException:
            self.close()
            raise
        if item is None:
            self.close(complete=True)
            raise StopIteration
        return items

    def overtake(self) -> None:
        """End the iteration because a newer one begins."""
        self._overtaken = not self._closed
        self.close()

    def close(self, complete: bool = False) -> None:
        """End the iteration; what was prefetched for it is never handed out."""
        if self._closed:
            return
        self._closed = True
        self._batches = None
        self._loaded.clear()
        self._loader._ended(self, complete)

    def __del__(self) -> None:
        self.close()

    def _next(self) -> tuple[PhysicalBatch, Any] | None:
        """The next part and its batch; None when there is no more."""
        if self._batches is None:
            self._parts, self._batches = self._loader._load(self._steps)
        if not self._loaded and not self._exhausted:
            try:
                self._loaded.append(next(self._batches))
            except StopIteration:
                self._exhausted = True
        if self._parts and self._parts[0].examples == 0 and not self._loader._plan.pads:
            return self._parts.popleft(), self._loader._padding_batch()
        if self._loaded:
            return self._parts.popleft(), self._loaded.popleft()
        return None


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ConfigurationError(f"{name}={value!r} must be a positive integer.")
    return int(value)
