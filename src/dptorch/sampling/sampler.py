"""What a sampling scheme must offer, whatever the scheme."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Sampler"]


@runtime_checkable
class Sampler(Protocol):
    """Chooses the examples of each logical batch, as a pure function of its key and the step.

    Attributes:
        sample_size: number of examples the indices refer to.
        scheme: name of the scheme, by which an accountant knows whether it covers it.
    """

    @property
    def sample_size(self) -> int: ...

    @property
    def scheme(self) -> str: ...

    def draw(self, step: int) -> NDArray[np.int64]:
        """Distinct indices in [0, sample_size) of logical batch `step`; possibly none."""
        ...
