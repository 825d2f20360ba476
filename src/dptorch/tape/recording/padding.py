"""Which sizes of a batch follow its longest example, and whether an example in it is padded to them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Padding", "tensors"]


class Padding:
    """The collated tensors of a batch of which a dimension follows the longest example.

    Args:
        items: the batch, collated.
        alone: some of the data set's examples, each collated without others.

    Attributes:
        widths: (dimension, size) in `items`, but for its rows, where one of `alone` has another size.
        sizes: the sizes alone.

    Guarantees:
        The longest example is no longer than its batch, and others are: one of them is enough.
        Held by ``test_a_width_is_tested_whichever_row_is_the_longest``.
    """

    def __init__(self, items: Any, alone: Iterable[Any]) -> None:
        leaves = list(tensors(items))
        singles = [s for one in alone if len(s := list(tensors(one))) == len(leaves)]
        self._found = [
            (weakref.ref(t), dim, t.shape[dim])
            for i, t in enumerate(leaves)
            for dim in range(1, t.dim())
            if any(s[i].dim() == t.dim() and s[i].shape[dim] != t.shape[dim] for s in singles)
        ]
        self.widths = frozenset((dim, size) for _, dim, size in self._found)
        self.sizes = frozenset(size for _, size in self.widths)

    def is_seen(self, size: int) -> bool:
        """Whether a row is padded to `size` columns: its last or first column is 0 in all tensors that
        have these, or in one that looks like a mask."""
        columns = [(t, d) for r, d, n in self._found if n == size and (t := r()) is not None]
        if not columns:
            return False
        with torch._C.DisableTorchFunction():
            for at in (-1, 0):
                empty = [_is_zero(t, dim, at) for t, dim in columns]
                masks = [e for e, (t, _) in zip(empty, columns, strict=True) if _is_mask(t)]
                if bool(torch.stack(masks or empty).all(0).any()):
                    return True
        return False


def _is_zero(t: Tensor, dim: int, at: int) -> Tensor:
    """Which rows have nothing but 0 in one of their columns, bool [rows]."""
    return ~t.detach().select(dim, at).bool().reshape(t.shape[0], -1).any(1).cpu()


def _is_mask(t: Tensor) -> bool:
    if t.is_floating_point() or t.dim() != 2:
        return False
    return bool(((t == 0) | (t == 1)).all()) and bool(t.any(1).all())


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, inside mappings, lists and tuples too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for v in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(v)
