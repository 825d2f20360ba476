"""Parts that fit: where memory does not suffice, a logical batch goes on in smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dptorch.engine import out_of_memory
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.sampling import PrivateLoader

__all__ = ["PhysicalBatches"]


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
        """Whether smaller parts may help against `error`, and no step was counted."""
        no_step = self._engine.steps_done == steps_before
        return no_step and out_of_memory.can_halve(self._engine, self.rows, error)

    def halve(self) -> None:
        """Begin the logical batch that is due again, in parts of half as many examples."""
        advice = "--max-physical-batch-size says how many to begin with."
        self.rows = out_of_memory.halve(self._engine, self.rows, advice)
        self._again = True
