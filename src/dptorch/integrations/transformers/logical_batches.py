"""A private loader as a Hugging Face Trainer takes it: one item for each optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dptorch.sampling import PhysicalBatch, PrivateLoader

__all__ = ["LogicalBatches"]


class LogicalBatches:
    """Iterates the logical batches of a private loader: ``{"parts": iterator of (inputs, part)}``.

    The parts are drawn as the iterator is, as the engine follows which part is in the model. An epoch
    has the same length in every iteration, also in one that begins within it: a Trainer counts epochs
    by it.

    Args:
        loader: from `PrivacyEngine.loader`.
    """

    def __init__(self, loader: PrivateLoader) -> None:
        self._loader = loader
        self.dataset = loader.dataset
        self._part: PhysicalBatch | None = None
        loader.on_batch(self._note)

    def _note(self, part: PhysicalBatch) -> None:
        self._part = part

    def __len__(self) -> int:
        return self._loader.steps_per_epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self._loader)
        for _ in range(self._loader.steps_left):
            yield {"parts": self._parts(batches)}

    def _parts(self, batches: Iterator[Any]) -> Iterator[tuple[Any, PhysicalBatch]]:
        for inputs in batches:
            part = self._part
            assert part is not None
            yield inputs, part
            if part.is_last:
                return
