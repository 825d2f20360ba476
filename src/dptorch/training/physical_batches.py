"""Parts that fit: where memory does not suffice, a logical batch goes on in smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import warn
from dptorch.sampling import PrivateLoader

__all__ = ["PhysicalBatches", "is_out_of_memory"]

#: How torch says so where it raises no class of its own.
_SAID: Final = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice.

    Example:
        >>> is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
        True
    """
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)
    )


class PhysicalBatches:
    """Iterates an epoch of a private loader in parts that can be made smaller on the way.

    Args:
        engine: whose loader it is.
        make_loader: from a number of rows to the loader of `PrivacyEngine.loader` with that
            max_physical_batch_size.
        rows: most examples of a part.

    Guarantees:
        Parts made smaller are of the same logical batch: a draw is a function of the key and the step.
        Held by `test_a_step_that_does_not_fit_goes_on_in_smaller_parts`.
    """

    def __init__(
        self, engine: PrivacyEngine, make_loader: Callable[[int], PrivateLoader], rows: int
    ) -> None:
        self._engine = engine
        self._make_loader = make_loader
        self.rows = rows
        self._loader = make_loader(rows)
        self._again = False

    def __iter__(self) -> Iterator[Any]:
        self._again = True
        while self._again:
            self._again = False
            iteration: Any = iter(self._loader)
            for batch in iteration:
                yield batch
                if self._again:
                    iteration.close()
                    self._loader = self._make_loader(self.rows)
                    break

    def can_halve(self, error: BaseException, steps_before: int) -> bool:
        """Whether smaller parts may help against `error`: no step was counted, and no other rank waits
        for a part of this size."""
        return (
            self.rows > 1
            and self._engine.ranks.size == 1
            and self._engine.steps_done == steps_before
            and is_out_of_memory(error)
        )

    def halve(self) -> None:
        """Begin the logical batch that is due again, in parts of half as many examples."""
        self._engine.drop_batch()
        before, self.rows = self.rows, max(1, self.rows // 2)
        self._again = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warn(
            f"out of memory with {before} examples in the model: from here on {self.rows}. Logical "
            "batches, noise and epsilon stay as planned. --max-physical-batch-size says how many to "
            "begin with."
        )
