"""In which order to turn kept gradients into sums, so that memory peaks as low as it can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from dptorch.tape.gradients.base import PerExampleGradient

__all__ = ["least_peak_order"]

K = TypeVar("K", bound=Hashable)


def least_peak_order(
    kept: Mapping[K, Sequence[PerExampleGradient]], sum_bytes: Mapping[K, int]
) -> list[K]:
    """The order in which gradients are summed and freed with the lowest peak.

    First what frees more than its sum takes, the smallest sums first; then the others, what frees most
    first. This is the best order of jobs that each take some memory and then give some back
    (Abdel-Wahab & Kameda 1978, Operations Research 26, on scheduling with cumulative costs). Memory
    that several gradients hold (an input of several layers) counts in equal shares, which makes it a
    heuristic there.

    Args:
        kept: what is held for each parameter.
        sum_bytes: size of its sum.

    Example:
        >>> import torch
        >>> from dptorch.tape.gradients import Dense
        >>> many, few = Dense(torch.ones(8, 4)), Dense(torch.ones(8, 2))
        >>> least_peak_order({"few": [few], "many": [many]}, {"few": 200, "many": 200})
        ['many', 'few']
    """
    memory: dict[K, dict[int, int]] = {}
    for key, forms in kept.items():
        storages = [t.untyped_storage() for form in forms for t in form.held()]
        memory[key] = {s._cdata: s.nbytes() for s in storages}
    holders = Counter(storage for own in memory.values() for storage in own)
    freed = {key: sum(n / holders[s] for s, n in own.items()) for key, own in memory.items()}

    def rank(key: K) -> tuple[bool, float]:
        grows = sum_bytes[key] > freed[key]
        return grows, -freed[key] if grows else sum_bytes[key]

    return sorted(kept, key=rank)
