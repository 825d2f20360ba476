"""Take norms in a first backward pass and add up the clipped gradients in a second.

Nothing is kept between the passes but one norm and one scale for each example and parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dptorch.errors import NotCoveredError
from dptorch.tape.gradients.base import PerExampleGradient
from dptorch.tape.gradients.store import nonzero, weighted_sum

__all__ = ["TwoPasses"]

_ONE_PASS = "Use clipping_mode='auto' or a 'BK-' mode, with a larger memory_budget."


class TwoPasses:
    """The sums of a backward that is made in two passes.

    Attributes:
        taking_norms: whether the first pass is running.
        made: whether the second pass was begun.
        sums: what the second pass has added up, by parameter id; None before its first gradient.
    """

    def __init__(self) -> None:
        self.taking_norms = False
        self.made = False
        self.sums: dict[int, Tensor | None] = {}
        self._weights: dict[int, tuple[Tensor, Tensor | None]] | None = None
        self._magnitudes: dict[int, Tensor] = {}  # of the first pass

    @contextmanager
    def first(self) -> Iterator[None]:
        """A backward inside takes norms and keeps no gradient."""
        self.taking_norms = True
        try:
            yield
        finally:
            self.taking_norms = False

    @contextmanager
    def second(self) -> Iterator[None]:
        """A backward inside adds up the gradients that the first took the norms of."""
        self.made = True
        try:
            yield
        finally:
            self._weights = None

    @property
    def summing(self) -> bool:
        """Whether gradients are weighed and added as they arrive."""
        return self._weights is not None

    def weigh(self, coefficients: Mapping[int, Tensor]) -> None:
        """Set what the second pass weighs gradients by: [B] for each parameter id."""
        distinct = {id(c): nonzero(c) for c in coefficients.values()}
        self._weights = {key: distinct[id(c)] for key, c in coefficients.items()}

    def note(self, key: int, form: PerExampleGradient) -> None:
        """Note in the first pass that the norm of `form` was taken."""
        self.sums[key] = None
        self._magnitudes[key] = form.magnitude()

    def add(self, key: int, form: PerExampleGradient, name: str) -> None:
        """Weigh and add one gradient in the second pass.

        Raises:
            NotCoveredError: if it is not the gradient whose norm was taken.
        """
        assert self._weights is not None
        if key not in self.sums:  # was kept in the first pass
            return
        # A norm is good for the gradient it was taken of: NaN and what is far too long compare equal.
        first, second = self._magnitudes.pop(key, None), form.magnitude()
        if first is None or not torch.allclose(first, second, rtol=1e-3, equal_nan=True):
            raise NotCoveredError(
                f"the two backward passes gave '{name}' different gradients: something in the "
                f"model's backward is random, or changes from one call to the next. {_ONE_PASS}"
            )
        before, found = self.sums[key], weighted_sum([form], *self._weights[key])
        self.sums[key] = found if before is None or found is None else before + found

    def refuse_second_use(self, key: int, name: str) -> None:
        """Raise if a gradient of a parameter whose norm was taken arrives once more.

        Raises:
            NotCoveredError: then.
        """
        if key in self.sums:
            raise NotCoveredError(
                f"parameter '{name}' has several gradients from what looked like one use of it (one "
                "op that takes it twice, or a reentrant checkpoint), which a mode of two backward "
                f"passes cannot add up. {_ONE_PASS}"
            )

    def clear(self) -> None:
        """Free everything."""
        self.sums.clear()
        self._weights = None
