"""Layouts of ragged inputs: whose each row is, for the numbers of rows that the last inputs had.

Messages of a graph are added up in a constant with one row for each node, at places that the edges
name. Nothing says whose those rows are, but it can be guessed: they are laid out as an input was. This
remembers no more than a guess: `propagation.joining` checks each write against it, and a row that
no example wrote to is constant, whichever example it is given to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from dptorch.tape.provenance.tags import Tag

__all__ = ["guesses", "remember"]

_MOST = 16
_LAYOUTS: OrderedDict[tuple[int, int, tuple[int, ...]], None] = OrderedDict()


def remember(owner: tuple[int, ...], batch_size: int) -> None:
    """Note the owners of the rows of an input; the latest few are kept."""
    key = (len(owner), batch_size, owner)
    _LAYOUTS[key] = None
    _LAYOUTS.move_to_end(key)
    while len(_LAYOUTS) > _MOST:
        _LAYOUTS.popitem(last=False)


def guesses(rows: int, batch_size: int) -> Iterator[Tag]:
    """The layouts that `rows` rows of a batch may have, the usual ones first, along dimension 0."""
    for step in dict.fromkeys((rows // batch_size, 1)):
        if step and rows % (step * batch_size) == 0:
            yield Tag(0, step)
    for size, examples, owner in reversed(_LAYOUTS):
        if (size, examples) == (rows, batch_size):
            yield Tag(0, 1, owner)
