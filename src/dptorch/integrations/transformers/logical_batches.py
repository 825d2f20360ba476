"""A private loader as a Hugging Face Trainer takes it: one item for each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dptorch.errors import ConfigurationError
from dptorch.sampling import PhysicalBatch, PrivateLoader

__all__ = ["LogicalBatches", "parts_in"]


class LogicalBatches:
    """Iterates the logical batches of a private loader: ``{"parts": iterator of (inputs, part)}``.

    The parts are drawn as the iterator is, as the engine follows which part is in the model. An epoch
    has the same length in every iteration, also in one that begins within it: a Trainer counts epochs
    by it.

    Args:
        make_loader: from a number of rows to the loader of `PrivacyEngine.loader` with that
            max_physical_batch_size.
        rows: most examples of a part.
    """

    def __init__(self, make_loader: Callable[[int], PrivateLoader], rows: int) -> None:
        self._make_loader = make_loader
        self.rows = rows
        self._iteration: Any = None
        self._take(make_loader(rows))

    def _take(self, loader: PrivateLoader) -> None:
        self._loader = loader
        self._part: PhysicalBatch | None = None
        self.dataset = loader.dataset
        loader.on_batch(self._note)

    def _note(self, part: PhysicalBatch) -> None:
        self._part = part

    def __len__(self) -> int:
        return self._loader.steps_per_epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        steps = self._loader.steps_left
        self._iteration = iter(self._loader)
        for _ in range(steps):
            yield {"parts": self.parts()}

    def parts(self) -> Iterator[tuple[Any, PhysicalBatch]]:
        """The parts of the logical batch that is due."""
        while True:
            try:
                inputs = next(self._iteration)
            except StopIteration:
                return
            part = self._part
            assert part is not None
            yield inputs, part
            if part.is_last:
                return

    def begin_again(self, rows: int) -> None:
        """Hand out parts of at most `rows` rows, beginning with the step that is due, drawn again: a
        draw is a function of the key and the step, so that it is the same."""
        self._iteration.close()  # or its end would drop what the next one has begun
        self.rows = rows
        self._take(self._make_loader(self.rows))
        self._iteration = iter(self._loader)


def parts_in(inputs: Any) -> Iterator[tuple[Any, PhysicalBatch]]:
    """The parts in an item of `LogicalBatches`.

    Raises:
        ConfigurationError: it is none, but of a loader of the trainer's own.
    """
    if not isinstance(inputs, dict) or "parts" not in inputs:
        raise ConfigurationError(
            "the training batches are not the engine's: this trainer has a get_train_dataloader() of "
            "its own, and what it draws has no accounting. Leave that method out; give the data set as "
            "train_dataset, its batches as data_collator, and the sampling in PrivacyArguments."
        )
    parts: Iterator[tuple[Any, PhysicalBatch]] = inputs["parts"]
    return parts
