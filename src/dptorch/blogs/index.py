"""The BloGS index: the number that ForgetNet's releases called epsilon.

Two of its formulas are kept as they were published in code. Neither is a privacy guarantee: a
permutation of blocks is not (ε, δ)-differentially private for any ε (see
`dptorch.blogs.index_statement`), and both formulas give a finite number even for a shuffle of one
block, which changes nothing. They are here so that a run of the method can be compared with what was
reported for it.

Symbols: a group of d coordinates cut into blocks of β, clip value C, T steps, q = batch size /
number of records. E is the sum of the groups' values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from dptorch.errors import ConfigurationError, one_of

__all__ = ["INDICES", "Index", "Index0121", "Index2024", "make_index"]

#: The published formulas, by the year or the release of ForgetNet that has them.
INDICES = ("2024", "0.1.21")


class Index(Protocol):
    """What a published formula says of one group, and of some steps.

    Attributes:
        name: its name in `INDICES`.
        delta: the δ that was reported beside it.
    """

    @property
    def name(self) -> str: ...

    @property
    def delta(self) -> float: ...

    def of_group(self, size: int, block_size: int) -> float:
        """The value of a group of `size` coordinates in blocks of `block_size`; grows with both
        block size and 1 / size."""
        ...

    def after(self, steps: int, per_step: float) -> float:
        """The value after `steps` steps whose groups sum to `per_step`; in closed form."""
        ...


@dataclass(frozen=True)
class Index2024:
    """The formula of releases 0.1.5 to 0.1.18, those of the withdrawn paper's time.

    ::

        ε1(d)    = 2 ln(1 + d (e^(2C/√d) - 1))
        ε2(d, β) = 2 ln(1 + (β/d) (e^(2C √(β/d)) - 1))
        ε        = min(ε1, ε2)                  for each group
        spent(t) = √(2 t ln(1/δ)) E + t E (e^E - 1)

    The releases showed spent(T) from the first step on; here it grows with t.

    Attributes:
        clip_value: C.
        delta: δ.

    Example:
        >>> index = Index2024(clip_value=1.0, delta=1e-5)
        >>> index.of_group(1, 1)
        4.0
        >>> index.of_group(1000, 1000)  # one block, no shuffle: still a finite number
        4.0
    """

    clip_value: float
    delta: float
    name: str = "2024"

    def of_group(self, size: int, block_size: int) -> float:
        """min(ε1, ε2)."""
        ratio = block_size / size
        alone = _log_mixture(size, 2 * self.clip_value / math.sqrt(size))
        blocks = _log_mixture(ratio, 2 * self.clip_value * math.sqrt(ratio))
        return 2 * min(alone, blocks)

    def after(self, steps: int, per_step: float) -> float:
        """Strong composition over steps of the sum over groups."""
        if not steps:
            return 0.0
        if per_step > 700:  # e^E overflows; the releases said infinity, too
            return math.inf
        first = math.sqrt(2 * steps * math.log(1 / self.delta)) * per_step
        return first + steps * per_step * math.expm1(per_step)


@dataclass(frozen=True)
class Index0121:
    """The formula of release 0.1.21: ε = q β² / (2d) for each group, spent(t) = t E, δ = 0.

    It reads neither the clip value nor δ.

    Attributes:
        sample_rate: q, batch size over number of records.

    Example:
        >>> round(Index0121(64 / 60000).of_group(1000, 1000), 5)
        0.53333
    """

    sample_rate: float
    name: str = "0.1.21"
    delta: float = 0.0

    def of_group(self, size: int, block_size: int) -> float:
        """q β² / (2d)."""
        return self.sample_rate * block_size**2 / (2 * size)

    def after(self, steps: int, per_step: float) -> float:
        """The sum over steps."""
        return steps * per_step


def make_index(
    name: str, *, clip_value: float, delta: float, batch_size: int, dataset_size: int | None
) -> Index:
    """The index called `name`.

    Raises:
        ConfigurationError: an unknown name, or "0.1.21" without a data set size.

    Example:
        >>> make_index("2024", clip_value=1.0, delta=1e-5, batch_size=8, dataset_size=None).name
        '2024'
    """
    one_of("index", name, INDICES)
    if name == "2024":
        return Index2024(clip_value, delta)
    if dataset_size is None:
        raise ConfigurationError(
            'index="0.1.21" divides the batch size by the number of records: pass dataset_size=, or '
            'use index="2024", which needs none.'
        )
    if not 0 < batch_size <= dataset_size:
        raise ConfigurationError(
            f"batch_size={batch_size!r} must be between 1 and dataset_size={dataset_size!r}."
        )
    return Index0121(batch_size / dataset_size)


def _log_mixture(weight: float, exponent: float) -> float:
    """ln(1 + weight (e^exponent - 1)), for exponents beyond float64's range, too."""
    if exponent < 700:
        return math.log1p(weight * math.expm1(exponent))
    return math.log(weight) + exponent
