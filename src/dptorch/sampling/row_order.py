"""Find a collate function that puts the examples of a batch into an order of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dptorch.errors import ConfigurationError

__all__ = ["refuse_own_order"]


def refuse_own_order(collate: Callable[[list[Any]], Any], items: list[Any]) -> None:
    """Raise if `collate` makes the same batch of `items` and of the same items backwards.

    Where batches are padded with examples of zeros, which rows have weight zero is known by their
    place, and a collate function that sorts (by length, to pack) moves others to these places.

    Raises:
        ConfigurationError: if the rows come in an order that is not that of the items.

    Example:
        >>> rows = list(torch.arange(6.0))
        >>> refuse_own_order(torch.stack, rows)
        >>> try:
        ...     refuse_own_order(lambda items: torch.stack(sorted(items)), rows)
        ... except ConfigurationError as error:
        ...     print(str(error).partition(":")[0])
        collate_fn puts the examples of a batch into an order of its own
    """
    try:
        forwards, backwards = (list(_tensors(collate(rows))) for rows in (items, items[::-1]))
    except Exception:  # it may not take these together; on a batch of its own it raises that itself
        return
    kept = turned = 0
    for a, b in zip(forwards, backwards, strict=False):
        if a.shape == b.shape and a.dim() and len(a) == len(items):
            same, opposite = torch.equal(a, b), torch.equal(a, b.flip(0))
            kept += same and not opposite
            turned += opposite and not same
    if kept and not turned:
        raise ConfigurationError(
            "collate_fn puts the examples of a batch into an order of its own: it made the same batch "
            f"of {len(items)} examples and of the same examples backwards. Batches are padded here, "
            "and which rows are padding is known by their place, so real rows would be left out and "
            "padding counted. Keep the order of the examples: sort inside the model, or pack with "
            "pack_padded_sequence(..., enforce_sorted=False)."
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for v in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(v)
